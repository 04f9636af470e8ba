"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE loses its router. For
each token the K experts go on that have the largest norm at an inner node; the
router only weights them. No weight changes.

    python train.py config/paper/table2.py --seeds=1           # trains some
    python tests/tools/pilot.py out/table2/moe*-1

The arguments are folders of runs with --mlp=moe, or patterns of them. Prints the
validation loss of each choice, its mean and standard deviation where a run has
several seeds.
"""

import dataclasses
import glob
import json
import math
import os
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import UserError, build, read_text
from model import GPT, MoE, at_least_float32

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


def folders_of(patterns):
    """The folders that the patterns match; what matches none is a folder's name. Refuses none."""
    if not patterns:
        raise UserError('expected folders of runs, such as out/table2/moe-1, got none')
    return [folder for pattern in patterns for folder in sorted(glob.glob(pattern)) or [pattern]]


def read_runs(folders):
    """Run name -> [(TrainConfig, checkpoint)], one for each seed. Refuses, with a UserError, what
    is no moe, and what cannot be averaged."""
    runs, first = {}, {}
    for folder in folders:
        checkpoint = train.load_checkpoint(os.path.join(folder, 'best.pt'), 'cpu')
        try:
            about = json.loads(read_text(os.path.join(folder, 'config.json')))
            name, seed, dataset = about['name'], about['seed'], about['dataset']
            kind = {**about['shape'], 'seed': None, 'iter': about['iter']}
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{folder}: expected a config.json of this train.py, got another, or '
                            'none') from None
        if kind['mlp'] != 'moe':
            raise UserError(f'{folder}: expected a run with --mlp=moe, got {kind["mlp"]}')
        was = first.setdefault(name, kind)
        differ = [key for key in was | kind if was.get(key) != kind.get(key)]
        if differ:
            raise UserError(f'{folder}: expected settings as in the folder of {name} before, got '
                            f'another {", ".join(differ)}')
        seeds = runs.setdefault(name, [])
        if seed in [config.seed for config, _ in seeds]:
            raise UserError(f'{folder}: expected another seed of {name}, got {seed} again')
        recipe = {field.name for field in dataclasses.fields(train.Recipe)}
        settings = {key: value for key, value in checkpoint['shape'].items() if key in recipe}
        config = build(train.TrainConfig, {**settings, 'name': name, 'dataset': dataset})
        seeds.append((config, checkpoint))
    return runs


def evaluate(config, checkpoint, scores):
    """The validation loss with experts chosen by the scores of CHOICES; None: by the router."""
    device = train.choose_device(config.device)
    data = train.Data(config, device)
    if not data.meta['sha256'].startswith(checkpoint['shape']['sha256']):
        raise UserError(f'{config.dataset}: expected the text that the run was trained on, got '
                        'another')
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
    runs = read_runs(folders_of(arguments))
    rows = [('chosen by', *runs)]
    for choice, scores in tqdm(CHOICES.items(), unit='choice', disable=None):
        losses = [[evaluate(*run, scores) for run in seeds] for seeds in runs.values()]
        rows.append((choice, *map(train.mean_and_spread, losses)))
    train.print_rows(rows)


if __name__ == '__main__':
    configurator.run(main)
