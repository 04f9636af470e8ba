"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE chooses without its router. For each token
the K experts go on that have the largest norm at an inner node; the router only weighs them.

    python train.py config/small.py config/paper/table2.py --seeds=1
    python tests/tools/pilot.py out/table2/moe*-1

The arguments are folders of runs with --mlp=moe, or patterns of them. Prints the validation loss of
each choice, its mean and standard deviation where a run has several seeds.
"""

import glob
import math
import os
import sys

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, choose_device, run
from model import MoE, at_least_float32
from sample import group, load_model, mean_and_spread, print_rows, read_result
from train import Data, TrainConfig, evaluate

NODES = ('g', 'u', 'silu', 'product', 'output')
ORDERS = (1.0, 2.0, math.inf)


def value(layer, x, i, node):
    """A node in expert i: g, its gate, u = x Wp, silu = SiLU(g), product = SiLU(g) * u, output."""
    if node == 'u':
        return x @ layer.w_p[i]                                    # (T, d_ffn)
    if layer.config.factorised:
        y = x @ layer.w_down[i] @ layer.w_up[i]
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


def folders_of(arguments, usage):
    """The folders that the arguments, which are patterns, match; what matches none is a folder's
    name. --help prints the usage and ends. Raises UserError."""
    if {'-h', '--help'} & {*arguments}:
        print(usage.strip())
        sys.exit(0)
    if not arguments or arguments[0].startswith('-'):
        raise UserError('expected folders of runs, such as out/table2/moe-1, got '
                        f'{arguments[0] if arguments else "none"}')
    return [folder for pattern in arguments for folder in sorted(glob.glob(pattern)) or [pattern]]


def read_runs(folders):
    """Run -> {seed: result}. Seeds of other recipes are other runs."""
    results = []
    for folder in folders:
        try:
            results.append(read_result(folder))
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            raise UserError(f'{folder}: expected the folder of a run, got another') from None
        mlp = results[-1]['recipe']['mlp']
        if mlp != 'moe':
            raise UserError(f'{folder}: expected a run with --mlp=moe, got {mlp}')
    return group(results)


def losses_of(result):
    """The validation loss of a run with experts chosen by each of CHOICES."""
    device, recipe = choose_device('auto'), result['recipe']
    model, meta, dtype = load_model(result['from'], device)
    data = Data(TrainConfig(dataset=result['dataset'], **{
        key: recipe[key] for key in ('block_size', 'batch_size', 'eval_iters')}), device)
    if data.meta['sha256'] != meta['sha256']:
        raise UserError(f'{result["dataset"]}: expected the text of {result["from"]}')
    torch.manual_seed(result['seed'])                              # of the random choice
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    losses = []
    for scores in tqdm(CHOICES.values(), desc=result['from'], unit='choice', disable=None):
        for layer in model.modules():
            if isinstance(layer, MoE):
                choose_by(layer, scores)
        losses.append(evaluate(model, data, autocast, ['val'])['val_loss'])
    return losses


def main(arguments):
    runs = read_runs(folders_of(arguments, __doc__))
    columns = [map(mean_and_spread, zip(*map(losses_of, seeds.values())))
               for seeds in runs.values()]
    print_rows([('chosen by', *runs), *zip(CHOICES, *columns)])


if __name__ == '__main__':
    run(main)
