"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE loses its router. For
each token the K experts go on that have the largest norm at an inner node; the
router only weights them. No weight changes.

    python train.py config/paper_table2.py --seeds=1           # trains some
    python tests/test_pilot.py out/paper_table2/moe*-1

The arguments are folders of runs with --mlp=moe. Prints the validation loss of
each choice, its mean and standard deviation where a run has several seeds.
"""

import itertools
import math
import os
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import UserError, build
from model import MLPS, GPTConfig, MoE, at_least_float32

NODES = ('g', 'u', 'silu', 'product', 'output')
ORDERS = (1.0, 2.0, math.inf)


def value(layer, x, i, node):
    """A node in expert i: g = x Wg, u = x Wp, silu = SiLU(g), product = SiLU(g) * u, output."""
    if node == 'u':
        return x @ layer.w_p[i]                                    # (T, d_ffn)
    y = x @ layer.w_g[i]
    if node != 'g':
        y = torch.nn.functional.silu(y)
    if node in ('product', 'output'):
        y = y * (x @ layer.w_p[i])
    return y @ layer.w_o[i] if node == 'output' else y             # (T, D) or (T, d_ffn)


def choose_by(layer, scores):
    """Let a MoE choose by the scores (T, E) = scores(layer, x), and weight by its router."""
    seen = {}
    layer.register_forward_pre_hook(lambda _, arguments: seen.update(x=arguments[0]))
    layer.choose = lambda p: type(layer).choose(layer, scores(layer, seen['x']))


def norms(node, order):
    """scores for choose_by: the norm of a node in every expert."""
    def scores(layer, x):
        values = [at_least_float32(value(layer, x, i, node)) for i in range(len(layer.w_p))]
        return torch.stack([torch.linalg.vector_norm(y, order, dim=-1) for y in values], dim=-1)
    return scores


CHOICES = {'router': None,
           'random': lambda layer, x: torch.rand(len(x), len(layer.w_p), device=x.device)}
CHOICES |= {f'{node}.L{order:g}': norms(node, order) for node in NODES for order in ORDERS}


def test_experts_are_chosen_by_the_norm_of_a_node_and_weighted_by_the_router():
    for node, order in itertools.product(NODES, ORDERS):
        compare_with_a_loop(node, order)


def compare_with_a_loop(node, order):
    torch.manual_seed(0)
    m = MLPS['moe'](GPTConfig(mlp='moe', n_embd=16, n_head=1, n_expert=5, d_ffn=24)).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(20, 16, dtype=torch.float64)
    choose_by(m, CHOICES[f'{node}.L{order:g}'])
    slow = []
    for token in x:
        outputs, found = [], []
        for i in range(5):
            g, u = token @ m.w_g[i], token @ m.w_p[i]
            silu = g / (1 + (-g).exp())
            nodes = {'g': g, 'u': u, 'silu': silu, 'product': silu * u}
            nodes['output'] = nodes['product'] @ m.w_o[i]
            outputs.append(nodes['output'])
            found.append(max(abs(v) for v in nodes[node]) if order == math.inf else
                         sum(abs(v) ** order for v in nodes[node]) ** (1 / order))
        chosen = sorted(range(5), key=lambda i: -found[i].item())[:2]
        p = (token @ m.router).exp()
        slow.append(sum(p[i] * outputs[i] for i in chosen) / sum(p[i] for i in chosen))
    torch.testing.assert_close(m(x)[0], torch.stack(slow), rtol=1e-10, atol=1e-10)


def test_the_script_evaluates_every_choice(workspace):
    from conftest import SMALL, run_script, table_of
    run_script('train.py', *SMALL, '--mlp=moe,aoe', '--seeds=1,2', '--out_dir=out/pilot',
               cwd=workspace)
    folders = ['out/pilot/moe-1', 'out/pilot/moe-2']
    printed = run_script('tests/test_pilot.py', *folders, cwd=workspace).stdout
    table = table_of(printed)
    assert table.pop('chosen by') == ['moe']
    assert len(table) == 17 and len({loss for loss, in table.values()}) > 4
    lowest = [min(entry['val_loss'] for entry in train.read_log(workspace / folder / 'log.jsonl'))
              for folder in folders]
    assert table['router'] == [train.mean_and_spread(lowest)]
    for folder, says in (('out/pilot/aoe-1', 'got aoe'), ('out/none', 'got no file')):
        process = run_script('tests/test_pilot.py', folder, cwd=workspace, check=False)
        assert process.returncode == 2 and says in process.stderr


def main(folders):
    if not folders:
        raise UserError('expected folders of runs, such as out/paper_table2/moe-1, got none')
    losses = {choice: {} for choice in CHOICES}
    for folder in folders:
        path = os.path.join(folder, 'best.pt')
        trained = train.load_checkpoint(path, 'cpu')['config']
        config = build(train.TrainConfig, trained | {'eval_only': True})
        if config.mlp != 'moe' or config.factorised:
            raise UserError(f'{folder}: expected a moe that is not factorised, got {config.mlp}')
        for choice, scores in tqdm(CHOICES.items(), desc=folder, unit='choice', disable=None):
            training = train.Training(config)
            checkpoint = train.load_checkpoint(path, training.device)
            train.check_checkpoint(path, checkpoint, config, training.data)
            training.model.load_state_dict(checkpoint['model'])
            for layer in training.model.modules():
                if isinstance(layer, MoE) and scores:
                    choose_by(layer, scores)
            found = train.evaluate(training.model, training.data, training.autocast, ['val'])
            losses[choice].setdefault(config.name, []).append(found['val_loss'])
    names = losses['router']
    train.print_rows([('chosen by', *names)] + [
        (choice, *(train.mean_and_spread(found[name]) for name in names))
        for choice, found in losses.items()])


if __name__ == '__main__':
    configurator.run(main)
