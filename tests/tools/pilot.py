"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE loses its router. For
each token the K experts go on that have the largest norm at an inner node; the
router only weights them. No weight changes.

    python train.py config/small.py config/paper/table2.py --seeds=1
    python tests/tools/pilot.py out/table2/moe*-1

The arguments are folders of runs with --mlp=moe, or patterns of them. Prints the
validation loss of each choice, its mean and standard deviation where a run has
several seeds.
"""

import glob
import math
import os
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import UserError, parse, write_text
from model import MoE, at_least_float32

NODES = ('g', 'u', 'silu', 'product', 'output')
ORDERS = (1.0, 2.0, math.inf)


@dataclass
class TableConfig:
    """The keys of this script, and of coder.py."""
    # keys
    json: str | None = None              # write the table to this file, too, a line for each row


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


def norms(node, order):
    """scores for choose_by: the norm of a node in every expert."""
    def scores(layer, x):
        values = [at_least_float32(value(layer, x, i, node)) for i in range(len(layer.w_p))]
        return torch.stack([torch.linalg.vector_norm(y, order, dim=-1) for y in values], dim=-1)
    return scores


CHOICES = {'router': MoE.route,
           'random': lambda layer, x: torch.rand(len(x), len(layer.w_p), device=x.device)}
CHOICES |= {f'{node}.L{order:g}': norms(node, order) for node in NODES for order in ORDERS}


def choose_by(layer, scores):
    """Let a MoE choose by the scores (T, E) = scores(layer, x), and weight by its router."""
    seen = {}

    def route(x):
        seen['x'] = x
        return MoE.route(layer, x)
    layer.route = route
    layer.choose = lambda p: MoE.choose(layer, scores(layer, seen['x']))


def folders_of(patterns):
    """The folders that the patterns match; what matches none is a folder's name. Refuses none."""
    if not patterns:
        raise UserError('expected folders of runs, such as out/table2/moe-1, got none')
    return [folder for pattern in patterns for folder in sorted(glob.glob(pattern)) or [pattern]]


def read_runs(folders):
    """Run -> {seed: result}, each with its folder. Seeds of other recipes are other runs."""
    results = []
    for folder in folders:
        try:
            results.append(train.read_result(folder) | {'folder': folder})
        except (ValueError, TypeError, KeyError, IndexError):
            raise UserError(f'{folder}: expected the folder of a run of train.py, got another, or '
                            'none') from None
        if results[-1]['recipe']['mlp'] != 'moe':
            raise UserError(f'{folder}: expected a run with --mlp=moe, got '
                            f'{results[-1]["recipe"]["mlp"]}')
    return train.group(results)


def losses_of(result):
    """The validation loss of a run with experts chosen by each of CHOICES."""
    device, recipe = train.choose_device('auto'), result['recipe']
    model, meta, dtype = train.load_model(result['folder'], device)
    data = train.Data(train.TrainConfig(dataset=result['dataset'], **{
        key: recipe[key] for key in ('block_size', 'batch_size', 'eval_iters')}), device)
    if data.meta['sha256'] != meta['sha256']:
        raise UserError(f'{result["dataset"]}: expected the text of {result["folder"]}, got '
                        'another')
    torch.manual_seed(result['seed'])                              # of the random choice
    autocast, losses = torch.autocast(device.type, dtype, enabled=dtype != torch.float32), []
    for scores in tqdm(CHOICES.values(), desc=result['folder'], unit='choice', disable=None):
        for layer in model.modules():
            if isinstance(layer, MoE):
                choose_by(layer, scores)
        losses.append(train.evaluate(model, data, autocast, ['val'])['val_loss'])
    return losses


def print_table(rows, config):
    """Print rows of strings, and write them to config.json: an object for each, by column."""
    train.print_rows(rows)
    if config.json:
        write_text(config.json, train.as_lines(dict(zip(rows[0], row)) for row in rows[1:]))


def main(arguments):
    values, patterns = parse(TableConfig, arguments, __doc__)
    runs = read_runs(folders_of(patterns))
    columns = [map(train.mean_and_spread, zip(*map(losses_of, seeds.values())))
               for seeds in runs.values()]
    print_table([('chosen by', *runs), *zip(CHOICES, *columns)], TableConfig(**values))


if __name__ == '__main__':
    configurator.run(main)
