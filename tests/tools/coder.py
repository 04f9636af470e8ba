"""
Does an expert become the coder? How much of what each expert of a trained model handles is code, on
prose_and_code's validation text: half if experts ignore it.

    python train.py config/quick_start.py
    python tests/tools/coder.py out/quick_start/moe out/quick_start/aoe_whole

Prints for each layer the experts' percentages, from the lowest to the highest.
"""

import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, run
from model import count
from pilot import folders_of
from sample import load_model, print_rows
from train import Data, TrainConfig

DATASET = 'prose_and_code'
TURN = 20_000                            # characters of prose, then as many of code, and so on


@torch.no_grad()
def shares_of_code(folder, windows=2000):
    """Of the tokens that each expert of the run in folder handles, the share that is code: (L, E),
    on as many windows, spread over the validation text."""
    model, meta, _ = load_model(folder, 'cpu')
    data = Data(TrainConfig(dataset=DATASET), 'cpu')
    if meta['sha256'] != data.meta['sha256'] or model.config.mlp == 'dense':
        raise UserError(f'{folder}: expected a run with experts on {DATASET}, got another')
    S, E, tokens = model.config.block_size, model.config.n_expert, data.tokens['val']
    starts = np.linspace(0, len(tokens) - S, windows).astype(int)
    code = everything = 0                                          # that experts handle: (L, E)
    for place in torch.from_numpy(starts[:, None] + np.arange(S)).split(50):
        is_code = (place.flatten() + data.meta['train_tokens']) // TURN % 2 == 1
        idx = torch.from_numpy(tokens[place.numpy()].astype(np.int64))         # (50, S)
        chosen = model(idx)[2].chosen                              # (L, T, K)
        code += torch.stack([count(I[is_code], E) for I in chosen])
        everything += torch.stack([count(I, E) for I in chosen])
    return code / everything


def main(arguments):
    rows = []
    for folder in folders_of(arguments, __doc__):
        # nan is the share of an expert that handles nothing
        layers = [layer[~layer.isnan()].sort().values for layer in shares_of_code(folder)]
        rows.append((folder, *(' '.join(f'{100 * x:.0f}' for x in layer) for layer in layers)))
    width = max(map(len, rows))
    rows = [row + ('',) * (width - len(row)) for row in rows]      # not all are as deep
    head = ('% code', *(f'layer {i}' for i in range(1, width)))
    print_rows([head, *rows])


if __name__ == '__main__':
    run(main)
