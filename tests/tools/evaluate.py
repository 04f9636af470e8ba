"""
Exercises 2 and 7 of the lab: the validation loss of all seeds of finished runs, with model.py as it
is now, and perhaps with another number of experts for each token. Nothing is trained.

    python tests/tools/evaluate.py out/lab/aoe out/lab/moe
    python tests/tools/evaluate.py out/lab/aoe out/lab/moe --top_k=1
"""

import glob
import os
import statistics
import sys
from dataclasses import dataclass, fields

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from configurator import UserError, parse, run
from sample import load_model, read_result
from train import Data, TrainConfig, evaluate


@dataclass
class EvaluateConfig:
    """The keys of this script."""
    top_k: int | None = None             # experts that handle a token; None: as in training


def val_loss(folder, top_k):
    """The validation loss of the run in folder."""
    model, _, dtype = load_model(folder, 'cpu')
    model.config.top_k = top_k or model.config.top_k
    result = read_result(folder)
    keys = {field.name for field in fields(TrainConfig)} & result['recipe'].keys()
    config = TrainConfig(**{key: result['recipe'][key] for key in keys}, dataset=result['dataset'])
    autocast = torch.autocast('cpu', dtype, enabled=dtype != torch.float32)
    return evaluate(model, Data(config, 'cpu'), autocast, ['val'])['val_loss']


def main(arguments):
    given, runs = parse(EvaluateConfig, arguments, __doc__)
    top_k = EvaluateConfig(**given).top_k
    for name in runs:
        folders = sorted(glob.glob(f'{glob.escape(name)}-seed*'))
        if not folders:
            raise UserError(f'expected runs such as out/lab/aoe, got {name}; train it first')
        losses = [val_loss(folder, top_k) for folder in folders]
        print(f'{name}: val loss', *(f'{loss:.4f}' for loss in losses),
              f'mean {statistics.mean(losses):.4f}')


if __name__ == '__main__':
    run(main)
