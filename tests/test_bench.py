"""tests/tools/bench.py: what it counts is the same on any machine."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, table_of

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))
import bench
from bench import SIDES, FakeTensorMode, bytes_kept
from model import GPT, GPTConfig, mlp_of

T, D, E, K, d, n, m = 64, 64, 8, 2, 128, 24, 16                    # n: d_low, m: d_judge
N = T * K + 16 * E                                                 # rows, with their padding

pytestmark = pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='no F.grouped_mm')


@pytest.fixture(autouse=True)
def free_memory_as_usual(monkeypatch):
    """keep_freed_memory would change this process for good."""
    monkeypatch.setattr(bench, 'keep_freed_memory', lambda: None)


@pytest.mark.parametrize('mode', (FakeTensorMode, torch.enable_grad), ids=('fake', 'real'))
def test_bytes_kept_are_those_that_a_hand_counts(mode):
    """A hand counts all that is wide. The rest is less than two rows of D float32s per token: the
    scores of E experts, the choice, the weights, the places of rows, and a router's x."""
    d_wide = GPTConfig(n_embd=D, d_ffn=d, d_low=n).d_wide
    # gate, u, SiLU(gate), SiLU(gate) u; rows of x, and of the result before and after times w
    rows = {'dense': T * K * 4 * d, 'moe': N * (4 * d + 3 * D), 'aoe_whole': N * (4 * d + 3 * D),
            'aoe': N * (4 * d_wide + 3 * D + n)}
    # of all experts: C, and the matrices in the order of their product
    judging = {'aoe': (T + D) * E * n, 'aoe_whole': (T + D) * E * m}
    for side, keys in SIDES.items():
        keys = {'n_embd': D, 'd_ffn': d, 'aux_weight': 0.01} | keys
        keys |= {'aoe': {'d_low': n}, 'aoe_whole': {'d_judge': m}}.get(side, {})
        with mode():
            layer = mlp_of(GPTConfig(**keys))
            for p in layer.parameters():
                p.data = p.data.bfloat16()
            x = torch.ones(T, D, dtype=torch.bfloat16, requires_grad=True)
            counted = 2 * (rows[side] + judging.get(side, 0))
            assert 0 <= bytes_kept(layer, x) - counted < 8 * T * D, side


def test_every_variant_gets_its_speed_and_its_memory(monkeypatch, capsys):
    assert bench.ratio([1, 10, 2], [2, 40, 2]) == 2                # the median of 2, 4 and 1
    monkeypatch.setattr(bench, 'SHAPES', {'tiny': dict(zip(bench.SIZES, (1, 4, D, d, 8, 2)))})
    bench.main(['--shapes=tiny', '--rounds=2', '--warmup=1', '--dtype=float32'])
    step, memory = capsys.readouterr().out.split('\nKiB per token')
    assert list(table_of(step)) == ['', *SIDES] == list(table_of(memory))
    for place, side in ((1, 'dense'), (2, 'moe')):
        assert table_of(step)[side][place] == '1.00'
    assert float(table_of(memory)['aoe'][0]) > float(table_of(memory)['moe'][0])


@pytest.mark.slow
@pytest.mark.parametrize('where, sizes, less', (
    ('head and loss', {'n_layer': 1, 'd_ffn': 48, 'vocab_size': 50_304}, '--batch_size=4'),
    ('backward of layers', {'n_layer': 2, 'd_ffn': 512, 'vocab_size': 84}, '--recompute=True')))
def test_the_peak_of_a_step_lies_where_it_should(where, sizes, less, tmp_path, capsys):
    sizes |= {'n_embd': 32, 'block_size': 256}
    keys, file = sizes | {'batch_size': 8, 'gradient_accumulation_steps': 2}, tmp_path / 'sizes.py'
    file.write_text('\n'.join(f'{key} = {keys[key]}' for key in keys))
    tables = []
    for more in ([], [less]):
        bench.main(['--only=fake', str(file), *more])
        tables.append(table_of(capsys.readouterr().out))
        assert tables[-1].pop('') == ['GiB', 'of moe', 'where']
    assert {side: row[2] for side, row in tables[0].items()} == dict.fromkeys(SIDES, where)
    assert all(float(tables[1][side][0]) < 0.8 * float(tables[0][side][0]) for side in SIDES)
    if where == 'head and loss':
        # weights, gradients, AdamW's averages; logarithms and two gradients of them, in float32
        model = GPT(GPTConfig(mlp='dense', **sizes))
        least = 4 * 4 * model.total_parameters() + 3 * 4 * 8 * 256 * 50_304
        assert 0.99 * least < 2**30 * float(tables[0]['dense'][0]) < 1.05 * least


def test_without_numbers_the_count_of_rows_must_not_depend_on_them(tmp_path, refuse):
    for line, error in (("select = 'top_p'", 'DynamicOutput'), ('d_ffn = 50', 'DataDependent')):
        (tmp_path / 'sizes.py').write_text(f'n_layer = 1\nn_embd = 32\nd_ffn = 48\n{line}')
        told = refuse(bench.main, '--only=fake', f'{tmp_path}/sizes.py')
        assert 'fake: expected select = top_k, widths in' in told and error in told
