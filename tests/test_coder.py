"""tests/tools/coder.py: what an expert takes."""

import os
import sys

import pytest
import torch

import prepare_data
from conftest import ROOT, table_of
from sample import load_model

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

import coder
from coder import CoderConfig, class_of, explained, main, what_experts_take


def test_the_lookup_by_hand():
    assert explained(torch.tensor([[3, 0], [0, 5], [2, 0]])) == pytest.approx(1)   # a lookup
    assert explained(torch.tensor([[1, 3], [2, 6]])) == pytest.approx(0, abs=1e-6)
    # H(expert) is 1.5 ln 2. A character leaves 0 or ln 2 of it, each half of the time.
    assert explained(torch.tensor([[4, 0, 0], [0, 2, 2]])) == pytest.approx(1 - 0.5 / 1.5)


def test_counts_against_a_loop_over_tokens(train_here, monkeypatch, capsys, refuse):
    assert prepare_data.prose_and_code.__defaults__ == (coder.TURN,)
    for mlp in ('moe', 'dense'):
        train_here(f'--mlp={mlp}', '--out_dir=out/coder')
    monkeypatch.setattr(coder, 'TURN', 7)
    monkeypatch.setattr(coder, 'CODE', 'code')
    text = open('code.txt', encoding='utf-8').read()
    model, meta, _ = load_model('out/coder/moe', 'cpu')
    first, V = meta['train_tokens'], meta['vocab_size']
    last = len(text) - first - 16
    expected = torch.zeros(6), torch.zeros(2, 6, 4), torch.zeros(2, V, 4)
    for start in (0, last // 2, last):
        place = first + start
        tokens = [meta['vocabulary'].index(c) for c in text[place:place + 16]]
        routing = model(torch.tensor([tokens]))[2]
        for t, token in enumerate(tokens):
            kinds = [coder.CLASSES.index(class_of(text[place + t]))]
            kinds += [0] if (place + t) // 7 % 2 else []
            expected[0][kinds] += 1
            for layer in range(2):
                chosen = routing.chosen[layer, t]
                for kind in kinds:
                    expected[1][layer, kind, chosen] += 1
                expected[2][layer, token, chosen[routing.weights[layer, t].argmax()]] += 1
    for counted, by_hand in zip(what_experts_take('out/coder/moe', CoderConfig(windows=3)),
                                expected):
        assert torch.equal(counted.float(), by_hand)
    assert [class_of(c) for c in 'aZ \n7'] == ['letters', 'capitals', 'spaces', 'line ends',
                                               'others']
    assert 'expected a run with experts' in refuse(main, 'out/coder/dense')

    capsys.readouterr()
    main(['out/coder/moe', '--windows=3', '--picture=out/coder.png'])
    total, handled, heaviest = expected
    table = table_of(capsys.readouterr().out)
    assert table['out/coder/moe, layer 2'] == [
        'all text', *(f'{100 * n / 48:.0f}' for n in total), f'{100 * explained(heaviest[1]):.0f}']
    last = [f'{100 * n / handled[1, 1:, 3].sum():.0f}' for n in handled[1, :, 3]]
    assert table[''] == ['expert 3', *last, '']                    # the last row without a name
    assert os.path.getsize('out/coder.png') > 1000
