"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE loses its router. For
each token the K experts go on that have the largest norm at an inner node; the
router only weights them. No weight changes.

    python train.py config/paper_table2.py --seeds=1           # trains some
    python tests/test_pilot.py "out/paper_table2/moe*-1"

The arguments are folders of runs with --mlp=moe, or patterns of them. Prints the
validation loss of each choice, its mean and standard deviation where a run has
several seeds.
"""

import dataclasses
import glob
import itertools
import json
import math
import os
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import UserError, build, read_text
from model import GPT, MLPS, GPTConfig, MoE, at_least_float32

NODES = ('g', 'u', 'silu', 'product', 'output')
ORDERS = (1.0, 2.0, math.inf)


def value(layer, x, i, node):
    """A node in expert i: g, its gate, u = x Wp, silu = SiLU(g), product = SiLU(g) * u, output."""
    if node == 'u':
        return x @ layer.w_p[i]                                    # (T, d_ffn)
    if layer.config.factorised:
        y = layer.look_through(layer.w_down, x)[:, i] @ layer.w_up[i]
    else:
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
    for node, order, factorised in itertools.product(NODES, ORDERS, (False, True)):
        compare_with_a_loop(node, order, factorised)


def compare_with_a_loop(node, order, factorised):
    torch.manual_seed(0)
    m = MLPS['moe'](GPTConfig(mlp='moe', n_embd=16, n_head=1, n_expert=5, d_ffn=24,
                              factorised=factorised, d_low=8)).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(20, 16, dtype=torch.float64)
    choose_by(m, CHOICES[f'{node}.L{order:g}'])
    slow = []
    for token in x:
        outputs, found = [], []
        for i in range(5):
            w_g = m.w_down[:, 8 * i:8 * i + 8] @ m.w_up[i] if factorised else m.w_g[i]
            g, u = token @ w_g, token @ m.w_p[i]
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


def test_the_script_evaluates_every_choice_and_refuses_what_it_cannot_average(workspace):
    from conftest import SMALL, run_script, table_of
    for out_dir, *more in (('pilot', '--mlp=moe,aoe', '--seeds=1,2'),
                           ('other', '--mlp=moe', '--seeds=3', '--learning_rate=1e-3'),
                           ('long', '--mlp=moe', '--seeds=3', '--max_iters=30',
                            '--lr_decay_iters=20')):
        run_script('train.py', *SMALL, f'--out_dir=out/{out_dir}', *more, cwd=workspace)
    printed = run_script('tests/test_pilot.py', 'out/pilot/moe-*', cwd=workspace).stdout
    table = table_of(printed)
    assert table.pop('chosen by') == ['moe']
    assert len(table) == 17 and len({loss for loss, in table.values()}) > 4
    lowest = [min(entry['val_loss'] for entry in train.read_log(
        workspace / f'out/pilot/moe-{seed}/log.jsonl')) for seed in (1, 2)]
    assert table['router'] == [train.mean_and_spread(lowest)]
    for more, says in (('out/pilot/aoe-1', 'got aoe'), ('out/none', 'got no file out/none/best.pt'),
                       ('out/pilot/moe-[12]', 'pilot/moe-1: expected another seed than 1 of moe'),
                       ('out/other/moe-3', 'expected what moe was trained with before, got another'
                        ' learning_rate, min_lr'),
                       ('out/long/moe-3', 'got another iter')):
        process = run_script('tests/test_pilot.py', 'out/pilot/moe-1', more, cwd=workspace,
                             check=False)
        assert process.returncode == 2 and says in process.stderr, process.stderr
    assert 'python tests/test_pilot.py' in run_script('tests/test_pilot.py', '--help',
                                                      cwd=workspace).stdout


def read_runs(folders):
    """Run name -> [(TrainConfig, checkpoint)], one for each seed. Refuses, with a UserError, what is
    no moe, and what cannot be averaged."""
    runs, first = {}, {}
    for folder in folders:
        checkpoint = train.load_checkpoint(os.path.join(folder, 'best.pt'), 'cpu')
        try:
            about = json.loads(read_text(os.path.join(folder, 'config.json')))
            name, seed, dataset = about['name'], about['seed'], about['dataset']
            kind = {**about['shape'], 'seed': None, 'iter': about['iter']}
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{folder}: expected its config.json of this train.py, got another, or '
                            'none') from None
        if kind['mlp'] != 'moe':
            raise UserError(f'{folder}: expected a run with --mlp=moe, got {kind["mlp"]}')
        differ = [key for key, value in first.setdefault(name, kind).items() if value != kind[key]]
        if differ:
            raise UserError(f'{folder}: expected what {name} was trained with before, got another '
                            f'{", ".join(differ)}')
        if seed in [config.seed for config, _ in runs.setdefault(name, [])]:
            raise UserError(f'{folder}: expected another seed than {seed} of {name}, got it twice')
        known = {field.name for field in dataclasses.fields(train.Recipe)} & checkpoint['shape'].keys()
        runs[name].append((build(train.TrainConfig, {'name': name, 'dataset': dataset} | {
            key: checkpoint['shape'][key] for key in known}), checkpoint))
    return runs


def evaluate(config, checkpoint, scores):
    """The validation loss with experts chosen by the scores of CHOICES; None: by the router."""
    device = train.choose_device(config.device)
    data = train.Data(config, device)
    torch.manual_seed(config.seed)                                 # of the random choice
    model = GPT(config).to(device)
    model.load_state_dict(checkpoint['model'])
    for layer in model.modules():
        if isinstance(layer, MoE) and scores:
            choose_by(layer, scores)
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return train.evaluate(model, data, autocast, ['val'])['val_loss']


def main(arguments):
    if {'-h', '--help'} & set(arguments):
        return print(__doc__.strip())
    folders = [folder for pattern in arguments for folder in sorted(glob.glob(pattern)) or [pattern]]
    if not folders:
        raise UserError('expected folders of runs, such as out/paper_table2/moe-1, got none')
    runs = read_runs(folders)
    rows = [('chosen by', *runs)]
    for choice, scores in tqdm(CHOICES.items(), unit='choice', disable=None):
        losses = [[evaluate(*run, scores) for run in seeds] for seeds in runs.values()]
        rows.append((choice, *map(train.mean_and_spread, losses)))
    train.print_rows(rows)


if __name__ == '__main__':
    configurator.run(main)
