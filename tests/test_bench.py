"""tests/tools/bench.py: what it counts, which is the same on any machine."""

import json

import pytest
import torch
import torch.nn.functional as F

import bench
from bench import (LAYERS, SIDES, BenchConfig, bytes_kept, forward_and_backward, layer_config,
                   make_input, make_layer, multiply_adds)
from conftest import run_script, table_of
from model import GPT, GPTConfig

CPU = torch.device('cpu')


def layer_and_input(side, shape, tokens, **changes):
    config = BenchConfig(**changes)
    layer = make_layer(layer_config(side, shape, config), config, CPU)
    return layer, make_input(shape, tokens, config, CPU, 0)


def kept_per_token(side, label, **changes):
    shape, tokens = LAYERS[label]
    return bytes_kept(*layer_and_input(side, shape, tokens, **changes)) / tokens


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
    assert K * 2 * 2 * d <= whole <= bound(2 * d)                  # as moe: nothing of what judges


def test_the_norms_of_all_experts_are_not_kept_with_aux_loss_either():
    without = kept_per_token('aoe', 'medium', aux_weight=0)
    assert kept_per_token('aoe', 'medium', aux_weight=0.01) < without + 100


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('aux_weight', (0.0, 0.01))
def test_multiply_adds_are_those_that_a_hand_counts(dtype, aux_weight):
    """Of a product forward, and of its gradients by both factors; of an expert's there are K."""
    T, D, E, K, d, n, m = 64, 128, 8, 2, 256, 48, 24               # n: d_low, m: d_judge
    d_wide = GPTConfig(mlp='aoe', n_embd=D, d_ffn=d, d_low=n).d_wide
    expected = {
        'dense': 3 * 3 * D * K * d,
        'moe': 3 * D * E + 3 * K * 3 * D * d,
        # C of all E and, for the chosen, C_i Wup_i are computed again in backward
        'aoe': 4 * E * D * n + K * (4 * n * d_wide + 3 * 2 * D * d_wide),
        'aoe whole': 4 * E * D * m + 3 * K * 3 * D * d}
    for side, count in expected.items():
        layer, x = layer_and_input(side, {'n_embd': D, 'd_ffn': d}, T, dtype=dtype,
                                   aux_weight=aux_weight)
        assert multiply_adds(forward_and_backward(layer), x) == T * count, side


def test_what_is_timed_has_the_gradient_of_l_aux():
    for aux_weight in (0.0, 1.0):
        # of one expert the weight is 1: without L_aux a router learns nothing
        layer, x = layer_and_input('moe', {'n_embd': 16, 'n_head': 1, 'top_k': 1}, 32,
                                   dtype='float32', aux_weight=aux_weight)
        gradients = []
        layer.router.register_hook(gradients.append)
        forward_and_backward(layer)(x)
        assert gradients[0].any() == (aux_weight > 0)


def test_the_script_writes_what_it_prints(tmp_path):
    printed = run_script('tests/tools/bench.py', '--shapes=small', '--rounds=1', '--warmup=1',
                         '--only=layer,step,memory,cost,experts', '--threads=1',
                         '--json=bench.json', cwd=tmp_path).stdout
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    cost = {'dense', 'moe', 'aoe 8', 'aoe 24', 'aoe 40', 'aoe 88', 'aoe whole 8', 'aoe whole 24',
            'aoe whole 40'}
    many = {*SIDES, 'aoe 8', 'aoe whole 8'}
    for part, figure, sides in (('layer', '{ms:.2f}', set(SIDES)), ('memory', '{small:.1f}', set(
            SIDES)), ('cost', '{kib_per_token:.1f}', cost), ('step', '{of_dense:.2f}', set(SIDES)),
            *((f'{E // 8} of {E}', '{predicted_of_moe:.2f}', many) for E in (16, 32, 64))):
        rows = [row for row in results if row['part'] == part]
        assert {row['side'] for row in rows} == sides
        assert all(figure.format(**row) in printed for row in rows)


@pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='this PyTorch has no F.grouped_mm')
@pytest.mark.parametrize('where, sizes', (
    ('head and loss', {'n_layer': 1, 'd_ffn': 48, 'vocab_size': 50_304}),
    ('backward of layers', {'n_layer': 2, 'd_ffn': 512, 'vocab_size': 84})))
def test_the_peak_of_a_step_lies_where_it_should(where, sizes, tmp_path, capsys):
    T, sizes = 8 * 256, sizes | {'n_embd': 32, 'block_size': 256}
    lines = [f'{key} = {value}' for key, value in (sizes | {'batch_size': 8}).items()]
    (tmp_path / 'sizes.py').write_text('\n'.join(lines))
    bench.main(['--only=fake', str(tmp_path / 'sizes.py'), '--keep_freed_memory=False'])
    table = table_of(capsys.readouterr().out)
    assert table.pop('') == ['GiB', 'of moe', 'where']
    assert {side: row[2] for side, row in table.items()} == dict.fromkeys(SIDES, where)
    if where == 'head and loss':         # in float32 weights and AdamW's averages, the logarithms
        parameters = GPT(GPTConfig(mlp='dense', **sizes)).total_parameters()
        least = 3 * 4 * parameters + (3 * 4 + 2) * T * 50_304      # and two gradients of them; and
        assert least < 2**30 * float(table['dense'][0]) < 1.05 * least   # logits, in bfloat16


def test_what_cannot_be_measured_or_written_is_refused_at_once(refuse, monkeypatch):
    monkeypatch.setattr(bench, 'alternate', None)                  # which measuring would call
    assert 'json: expected a file to write to' in refuse(bench.main, '--json=none/bench.json')
    assert "got 'config/lab/lab.py'" in refuse(bench.main, 'config/lab/lab.py')
