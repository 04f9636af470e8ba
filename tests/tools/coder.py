"""
Does an expert become the coder? How much of what each expert of a trained model
handles is code, on prose_and_code's validation text: half if experts ignore it.

    python train.py config/quick_start.py
    python tests/tools/coder.py out/quick_start/moe "out/quick_start/aoe whole"

Prints for each layer the experts' percentages, from the lowest to the highest.
"""

import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import UserError
from model import count
from sample import load_model, watch_experts
from pilot import folders_of

DATASET = 'prose_and_code'
TURN = 20_000                            # characters of prose, then as many of code, and so on


def shares_of_code(folder, windows=2000):
    """Of the tokens that each expert of the run in folder handles, the share that is code: (L, E),
    on as many windows, spread over the validation text."""
    model, meta, _ = load_model(folder, 'cpu')
    data = train.Data(train.TrainConfig(dataset=DATASET), torch.device('cpu'))
    if meta['sha256'] != data.meta['sha256'] or model.config.mlp == 'dense':
        raise UserError(f'{folder}: expected a run with experts on {DATASET}, got another')
    S, E, tokens = model.config.block_size, model.config.n_expert, data.tokens['val']
    starts = np.linspace(0, len(tokens) - S, windows).astype(int)
    place = (starts[:, None] + np.arange(S)).flatten()             # window after window
    routing = watch_experts(model, torch.from_numpy(tokens[place].astype(np.int64)))
    code = torch.from_numpy(place + data.meta['train_tokens']) // TURN % 2 == 1
    return torch.stack([count(I[code], E) / count(I, E) for I in routing.chosen])


def main(arguments):
    if {'-h', '--help'} & set(arguments):
        return print(__doc__.strip())
    rows = []
    for folder in folders_of(arguments):
        layers = [layer[~layer.isnan()].sort().values.tolist()     # nan: handled nothing
                  for layer in shares_of_code(folder)]
        rows.append((folder, *(' '.join(f'{100 * share:.0f}' for share in layer)
                               for layer in layers)))
    train.print_rows([('% code', *(f'layer {i}' for i in range(1, len(rows[0])))), *rows])


if __name__ == '__main__':
    configurator.run(main)
