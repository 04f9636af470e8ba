"""tests/tools/bench.py: what it counts, which is the same on any machine."""

import contextlib
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, table_of

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))
import bench
from bench import (SIDES, BenchConfig, bytes_kept, forward_and_backward, layer_config, make_input,
                   make_layer, multiply_adds)
from model import GPT, GPTConfig

CPU = torch.device('cpu')
T, D, E, K, d, n, m = 64, 64, 8, 2, 128, 24, 16                    # n: d_low, m: d_judge
SHAPE = {'n_embd': D, 'd_ffn': d, 'd_low': n}
d_wide = GPTConfig(mlp='aoe', **SHAPE).d_wide
P = T * K + 16 * E                                                 # rows, with their padding

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='no F.grouped_mm')


@pytest.fixture(autouse=True)
def free_memory_as_usual(monkeypatch):
    """keep_freed_memory would change this process for good."""
    monkeypatch.setattr(bench, 'keep_freed_memory', lambda: None)


def layer_and_input(side, shape=SHAPE, **changes):
    config = BenchConfig(**{'dtype': 'float32'} | changes)
    sizes = shape | ({'d_judge': m} if side == 'aoe_whole' else {})
    return (make_layer(layer_config(side, sizes, config), config, CPU),
            make_input(shape, T, config, CPU, 0))


@pytest.mark.parametrize('recompute', (True, False))
def test_bytes_kept_are_those_that_a_hand_counts(recompute):
    """In float32, with L_aux. All that is wide is counted; what is not is less than one row of D
    numbers a token: scores of E experts, the choice, weights, the places of rows."""
    numbers = {'moe': P * 2 * d, 'aoe': P * (n + d_wide), 'aoe_whole': P * 2 * d}    # g, u; C_i, u
    if not recompute:                    # and SiLU(g), SiLU(g) u, the rows of x, those of w x:
        numbers = {'moe': P * (4 * d + 3 * D),                     # (of x twice, for Wg and for w)
                   'aoe': P * (n + 4 * d_wide + 2 * D) + T * E * n,            # C of all experts
                   'aoe_whole': P * (4 * d + 3 * D) + (T + D) * E * m}         # and what scores
    for side, count in numbers.items():
        assert 0 < bytes_kept(*layer_and_input(side, recompute=recompute)) - 4 * count < 4 * T * D
    dense = bytes_kept(*layer_and_input('dense', recompute=recompute))
    assert dense == 4 * T * 4 * K * d                              # g, u, SiLU(g), SiLU(g) u


@needs_grouped_mm
def test_tensors_without_numbers_tell_the_same_bytes_but_for_16_a_token():
    for side in SIDES:
        kept = []
        for mode in (contextlib.nullcontext(), bench.FakeTensorMode()):
            with mode:
                kept.append(bytes_kept(*layer_and_input(side, dtype='bfloat16', recompute=True)))
        assert kept[0] <= kept[1] <= kept[0] + 16 * T              # of F.embedding_bag


@pytest.mark.parametrize('recompute', (True, False))
@pytest.mark.parametrize('aux_weight', (0.0, 0.01))
def test_multiply_adds_are_those_that_a_hand_counts(recompute, aux_weight):
    """Of a product forward, and of its gradients by both factors. With recompute C of all experts
    and, of the chosen, C_i Wup_i are computed once more."""
    if recompute and not hasattr(torch.nn.functional, 'grouped_mm'):
        pytest.skip('a loop over experts is computed again to its end')
    times = 4 if recompute else 3
    expected = {'dense': T * 3 * 3 * D * K * d,
                'moe': T * 3 * D * E + P * 3 * 3 * D * d,
                'aoe': T * times * D * E * n + P * (times * n * d_wide + 3 * 2 * D * d_wide),
                'aoe_whole': T * times * D * E * m + P * 3 * 3 * D * d}
    for side, count in expected.items():
        layer, x = layer_and_input(side, recompute=recompute, aux_weight=aux_weight)
        assert multiply_adds(forward_and_backward(layer), x) == count, side


def test_what_is_timed_has_the_gradient_of_l_aux():
    for aux_weight in (0.0, 1.0):
        # of one expert the weight is 1: without L_aux a router learns nothing
        layer, x = layer_and_input('moe', {'n_embd': 16, 'n_head': 1, 'top_k': 1},
                                   aux_weight=aux_weight)
        gradients = []
        layer.router.register_hook(gradients.append)
        forward_and_backward(layer)(x)
        assert gradients[0].any() == (aux_weight > 0)


def test_a_ratio_is_the_median_of_the_rounds():
    assert bench.ratio([1, 10, 2], [2, 40, 2]) == 2                # twice as fast in the median


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.gc, 'collect', lambda: None)         # slow in a process full of tests
    monkeypatch.setattr(bench, 'LAYERS', {'tiny': (SHAPE, T)})
    monkeypatch.setattr(bench, 'MODELS', {'tiny': SHAPE | {'n_layer': 1, 'batch_size': 2}})
    bench.main(['--shapes=tiny', '--rounds=1', '--warmup=1', '--dtype=float32',
                '--only=layer,step,memory,cost,experts', f'--json={tmp_path}/bench.json'])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / 'bench.json').read_text())
    cost = {'dense', 'moe', 'aoe 8', 'aoe 24', 'aoe 40', 'aoe_whole 8', 'aoe_whole 24'}
    many = {*SIDES, 'aoe 8', 'aoe_whole 8'}
    for part, figure, sides in (
            ('layer', '{ms:.2f}', {*SIDES}), ('step', '{of_dense:.2f}', {*SIDES}),
            ('memory', '{tiny:.1f}', {*SIDES}), ('cost', '{KiB_per_token:.1f}', cost),
            *((f'{E // 8} of {E}', '{predicted_of_moe:.2f}', many) for E in (16, 32, 64))):
        rows = [row for row in written['results'] if row['part'] == part]
        assert {row['side'] for row in rows} == sides
        assert all(figure.format(**row) in printed for row in rows)
        # a CPU has memory, but what a layer keeps is told for a GPU
        on_gpu = part == 'memory' or torch.cuda.is_available()
        assert all(row['recompute'] == on_gpu for row in rows)
    assert written['dtype'] == 'float32' and 'float32, recompute=True (a GPU: True)' in printed


def test_the_dtype_is_that_of_train_where_something_is_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, 'fast_dtype', lambda config, _: asked.append(config) or 'float32')
    for only, expected in (('memory,fake', 'bfloat16'), ('layer,memory', 'float32')):
        assert bench.choose_dtype(BenchConfig(only=only, shapes='small,medium'), CPU) == expected
    config, = asked
    assert (config.n_embd, config.batch_size * config.block_size) == (384, 8192)     # of medium


@needs_grouped_mm
@pytest.mark.parametrize('where, sizes', (
    ('head and loss', {'n_layer': 1, 'd_ffn': 48, 'vocab_size': 50_304}),
    ('backward of layers', {'n_layer': 1, 'd_ffn': 512, 'vocab_size': 84})))
def test_the_peak_of_a_step_lies_where_it_should(where, sizes, tmp_path, capsys):
    T, sizes = 8 * 256, sizes | {'n_embd': 32, 'block_size': 256}
    lines = [f'{key} = {value}' for key, value in (sizes | {'batch_size': 8}).items()]
    (tmp_path / 'sizes.py').write_text('\n'.join(lines))
    bench.main(['--only=fake', str(tmp_path / 'sizes.py')])
    table = table_of(capsys.readouterr().out)
    assert table.pop('') == ['GiB', 'of moe', 'where']
    assert {side: row[2] for side, row in table.items()} == dict.fromkeys(SIDES, where)
    if where == 'head and loss':         # in float32 weights and AdamW's averages, the logarithms
        parameters = GPT(GPTConfig(mlp='dense', **sizes)).total_parameters()
        least = 3 * 4 * parameters + (3 * 4 + 2) * T * 50_304      # and two gradients of them; and
        assert least < 2**30 * float(table['dense'][0]) < 1.05 * least   # logits, in bfloat16


@pytest.mark.parametrize('line, got', (
    ("select = 'top_p'", 'top_p, 32, 48, None'), ("select = 'expert_choice'", 'expert_choice, 32'),
    ('d_ffn = 50', 'top_k, 32, 50, None')))
def test_what_has_no_numbers_cannot_tell_how_many_rows_there_are(line, got, tmp_path, refuse):
    file = tmp_path / 'sizes.py'
    file.write_text(f'n_layer = 1\nn_embd = 32\nd_ffn = 48\nblock_size = 256\n{line}')
    error = refuse(bench.main, '--only=fake', str(file))
    assert 'fake: expected select = top_k, n_embd, d_ffn, d_low in multiples of 8' in error
    assert f'got {got}' in error


def test_what_cannot_be_measured_or_written_is_refused_at_once(refuse, monkeypatch):
    monkeypatch.setattr(bench, 'alternate', None)                  # which measuring would call
    for arguments, expected in (
            (['--json=none/bench.json'], 'json: expected a file to write to'),
            (['config/lab/lab.py'], "got 'config/lab/lab.py'"),
            (['--only=fake', '--dtype=float32'], 'dtype: expected bfloat16 for fake, got'),
            (['--dtype=float16'], '--dtype: expected auto or float32 or bfloat16'),
            (['--threads=100000'], 'threads: expected at most the '),
            (['--seed=12345678901234567890123'], 'seed: expected 0 or more and below 2^62'),
            (['--seed=-1'], 'seed: expected 0 or more and below 2^62, got -1'),
            (['--aux_weight=1e400'], 'aux_weight: expected '),
            (['--aux_weight=-1'], 'aux_weight: expected 0 or more, got -1'),
            (['--plain=True'], '--plain: no such key')):
        assert expected in refuse(bench.main, *arguments)
