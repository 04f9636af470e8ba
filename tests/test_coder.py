"""tests/tools/coder.py: how much of what an expert handles is code."""

import math
import os
import sys

import numpy as np
import torch

import prepare_data
from conftest import ROOT, table_of
from sample import load_model

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

import coder
from coder import main, shares_of_code


def test_the_share_of_code_against_a_loop_over_tokens(train_here, monkeypatch, capsys, refuse):
    assert prepare_data.prose_and_code.__defaults__ == (coder.TURN,)
    for mlp in ('moe', 'dense'):
        train_here(f'--mlp={mlp}', '--out_dir=out/coder')
    monkeypatch.setattr(coder, 'TURN', 7)
    monkeypatch.setattr(coder, 'DATASET', 'code')
    text = open('code.txt', encoding='utf-8').read()
    model, meta, _ = load_model('out/coder/moe', 'cpu')
    first = meta['train_tokens']
    handled = np.zeros((2, 2, 4))                                  # of layer, kind, expert
    for start in np.linspace(0, len(text) - first - 16, 60).astype(int) + first:
        tokens = [meta['vocabulary'].index(c) for c in text[start:start + 16]]
        _, _, routing = model(torch.tensor([tokens]))
        for layer, chosen in enumerate(routing.chosen.tolist()):
            for place, experts in enumerate(chosen, start):
                for expert in experts:
                    handled[layer, place // 7 % 2, expert] += 1
    shares = handled[:, 1] / handled.sum(1)
    np.testing.assert_allclose(shares_of_code('out/coder/moe', 60), shares, atol=1e-3)
    assert 'expected a run with experts on code' in refuse(main, 'out/coder/dense')
    assert 'expected folders of runs' in refuse(main)
    layers = torch.tensor([[0.7, 0.25, math.nan], [1.0, 0.0, 0.504]])
    monkeypatch.setattr(coder, 'shares_of_code', lambda folder: layers[:len(folder) - 11])
    main(['out/coder/moe', 'out/coder/m'])
    table = table_of(capsys.readouterr().out)
    assert (table['out/coder/moe'], table['out/coder/m']) == (['25 70', '0 50 100'], ['', ''])
