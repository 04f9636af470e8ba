"""tests/bench.py: the bytes that a layer keeps for backward, which are the same on any machine."""

import json

import torch

from bench import LAYERS, SIDES, BenchConfig, bytes_kept, layer_config, make_input, make_layer
from conftest import run_script


def kept_per_token(side, label, **changes):
    bench, device = BenchConfig(**changes), torch.device('cpu')
    shape, tokens = LAYERS[label]
    layer = make_layer(layer_config(side, shape, bench), bench, device)
    return bytes_kept(layer, make_input(shape, tokens, bench, device, 0)) / tokens


def test_the_layers_keep_what_they_should():
    K, d, d_low, d_wide = 2, 1024, 128, 1264
    # bfloat16, padding of at most a sixteenth, 64 bytes a pair for weights, scores and indices
    def bound(numbers_per_pair):
        return K * (2 * numbers_per_pair * 17 / 16 + 64)
    dense, moe, aoe, whole = (kept_per_token(side, 'medium') for side in SIDES)
    assert dense == 2 * 4 * K * d                                  # g, u, SiLU(g), SiLU(g) * u
    assert K * 2 * 2 * d <= moe <= bound(2 * d)                    # g, u
    kept = d_low + d_wide                                          # C_i, u: nothing of all E
    assert K * 2 * kept <= aoe <= bound(kept) and aoe < 0.75 * moe
    assert whole <= bound(2 * d + 64)                              # the 64 numbers that judge


def test_the_norms_of_all_experts_are_not_kept_with_aux_loss_either():
    without = kept_per_token('aoe', 'medium')
    assert kept_per_token('aoe', 'medium', aux_weight=0.01) < without + 100


def test_the_script_writes_what_it_prints(tmp_path):
    printed = run_script('tests/bench.py', '--only=layer,memory,cost', '--shapes=small',
                         '--rounds=1', '--warmup=1', '--threads=1', '--json=bench.json',
                         cwd=tmp_path).stdout
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    cost = {'moe', 'aoe 8', 'aoe 24', 'aoe 40', 'aoe 88', 'aoe whole 24', 'aoe whole 40'}
    for part, figure, sides in (('layer', '{ms:.2f}', set(SIDES)),
                                ('cost', '{kib_per_token:.1f}', cost),
                                ('memory', '{kib_per_token:.1f}', set(SIDES))):
        rows = [row for row in results if row['part'] == part]
        assert {row['side'] for row in rows} >= sides
        assert all(figure.format(**row) in printed for row in rows)
