"""tests/tools/compare.py: what is compared with what, and that the pages hold what it prints."""

import json
import math
import os
import sys

import numpy as np

from configurator import read_text
from conftest import ROOT, table_of

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from compare import MARK, T_95, differences, half_interval, main, order_of, variant_of, with_tables


def line(loss, mlp='moe', iter=100, **shape):
    """What the tests need of a line of results.jsonl."""
    shape = {'factorised': False, 'router': 'linear', 'aux_weight': 0.0, 'lr_decay_iters': 100,
             'sha256': 'a', 'd_low': None} | shape
    return {'lowest_val_loss': loss, 'iter': iter, 'shape': {'mlp': mlp} | shape}


def test_a_run_is_compared_with_the_nearest_moe_seed_by_seed():
    results = {
        'one': {1: line(1.0), 2: line(2.0), 3: line(3.0)},
        'two': {seed: line(seed + 0.5, aux_weight=0.1) for seed in (1, 2, 3)},
        'aoe': {1: line(1.1, 'aoe'), 2: line(2.2, 'aoe'), 3: line(3.3, 'aoe'), 4: line(4, 'aoe')},
        'aoe aux': {seed: line(seed + 0.4, 'aoe', aux_weight=0.1, d_low=8) for seed in (1, 2)},
        'aoe 64': {3: line(2.0, 'aoe', top_k=1)},                  # for want of a moe with top_k 1
        'two aux': {1: line(1.6, factorised=True, aux_weight=0.1)}}
    found = differences(results)
    assert {name: (base, differ) for name, (base, differ, _) in found.items()} == {
        'aoe': ('one', []), 'aoe aux': ('two', []), 'aoe 64': ('one', ['top_k']),
        'two aux': ('two', [])}
    for name, minus in (('aoe', [0.1, 0.2, 0.3]), ('aoe aux', [-0.1, -0.1]), ('aoe 64', [-1.0])):
        np.testing.assert_allclose(found[name][2], minus)


def test_what_differs_in_iterations_schedule_or_data_is_not_compared():
    for other in (line(1, 'aoe', iter=20), line(1, 'aoe', lr_decay_iters=200),
                  line(1, 'aoe', sha256='b')):
        assert differences({'moe': {1: line(2.0)}, 'aoe': {1: other}}) == {}


def test_the_interval_is_the_one_of_students_t():
    for n, t in enumerate(T_95, 2):
        x = np.linspace(0, t, 20_001)
        density = (1 + x * x / (n - 1)) ** (-n / 2)
        density *= math.gamma(n / 2) / math.sqrt((n - 1) * math.pi) / math.gamma((n - 1) / 2)
        assert abs(2 * np.mean((density[1:] + density[:-1]) / 2) * t - 0.95) < 1e-4
    np.testing.assert_allclose(half_interval([0.1, 0.2, 0.3]), 4.303 * 0.1 / math.sqrt(3))


def test_numbers_in_names_sort_as_numbers():
    names = ['aoe 1e-3', 'moe 1e-3', 'moe 192 5e-4', 'aoe 48 2e-3', 'moe 48 2e-3', 'moe 48 1.5e-2',
             'aoe aux', 'moe', 'moe 4 of 16']
    assert sorted(names, key=lambda name: order_of(name, {1: line(1, mlp=name[:3], factorised=(
        name[:3] == 'aoe'))})) == [
        'moe', 'aoe aux', 'moe 1e-3', 'aoe 1e-3', 'moe 4 of 16', 'moe 48 2e-3', 'aoe 48 2e-3',
        'moe 48 1.5e-2', 'moe 192 5e-4']


def test_the_script_says_what_it_compares_and_what_not(tmp_path, capsys):
    entropies = {'ent_load': [2.0], 'ent_conf': [1.0], 'norm': [[1.0, 2.0]]}
    lines = [line(loss, mlp, iter) | entropies | {'run': name, 'seed': seed}
             for name, mlp, iter, losses in (('moe', 'moe', 60, (2.0, 2.1)), ('dense', 'dense', 60,
                                             (1.9, 2.0002)), ('aoe', 'aoe', 20, (1.0, 1.1)))
             for seed, loss in enumerate(losses)]
    (tmp_path / 'results.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    main([str(tmp_path / 'results.jsonl')])
    printed = capsys.readouterr().out
    assert '**-0.0999 ± 0.0013**' in printed and printed.count('**') == 2
    assert '- aoe: no moe with the same seeds, data, iterations and schedule' in printed


def test_rivals_are_variants_of_their_own_and_may_take_the_place_of_moe():
    results = {'moe': {1: line(1.0)}, 'moe frozen': {1: line(1.5, frozen=True)},
               'moe sigmoid': {1: line(1.2, bias_step=0.001)},
               'aoe whole virtual': {1: line(1.1, 'aoe', virtual=True)}}
    assert all(variant_of(seeds) == name for name, seeds in results.items())
    for base, minus in (('moe', {'moe frozen': 0.5, 'moe sigmoid': 0.2, 'aoe whole virtual': 0.1}),
                        ('moe sigmoid', {'moe': -0.2, 'moe frozen': 0.3,
                                         'aoe whole virtual': -0.1})):
        found = {name: difference for name, (_, _, (difference,)) in
                 differences(results, base).items()}
        assert found.keys() == minus.keys()
        np.testing.assert_allclose([found[name] for name in minus], list(minus.values()))


def test_by_setting_a_row_has_a_column_for_each_variant(tmp_path, capsys):
    lines = [line(loss + seed / 10, mlp, n_embd=size) | {'run': f'{mlp} {size}', 'seed': seed}
             for size, mlp, loss in ((96, 'moe', 2.0), (96, 'dense', 2.5), (48, 'moe', 3.0))
             for seed in (1, 2)]
    (tmp_path / 'results.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    printed = {}
    for losses in (False, True):
        main([str(tmp_path / 'results.jsonl'), '--by_setting=True', f'--losses={losses}'])
        printed[losses] = table_of(capsys.readouterr().out)
    assert printed[False] == {'': ['moe', 'dense, minus moe'], '48': ['3.1500 ± 0.0707', ''],
                              '96': ['2.1500 ± 0.0707', '**+0.5000 ± 0.0000**']}
    assert printed[True] | {'96': ['2.1500 ± 0.0707', '2.6500 ± 0.0707']} == printed[True]


def test_the_pages_hold_what_the_commands_in_their_marks_print(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    found = 0
    for page in ('README.md', 'config/README.md', 'config/lab/README.md'):
        found += read_text(page).count(MARK)
        assert with_tables(page) == read_text(page), f'{page}: write it anew with --pages=True'
    assert found > 5
    page, right = tmp_path / 'page.md', read_text('config/README.md')
    page.write_text(right.replace(' 5 of 6 |', ' 6 of 6 |'), encoding='utf-8')
    main(['--pages=True', str(page)])
    assert page.read_text(encoding='utf-8') == right


def test_what_cannot_be_compared_is_refused(refuse, tmp_path):
    file = os.path.join(ROOT, 'config', 'sizes_results.jsonl')
    for wrong in ('config/none.jsonl', 'config/how_far/sizes.py', 'config'):
        assert 'expected a results.jsonl' in refuse(main, os.path.join(ROOT, wrong))
    assert "each run once, got 'aoe 192', seed 1, again" in refuse(main, file, file)
    assert 'minus: expected one of aoe, aoe whole, moe, got' in refuse(main, file, '--minus=no')
    assert 'losses: expected False without' in refuse(main, file, '--losses=True')
    assert 'expected a results.jsonl, got none' in refuse(main)


def test_a_page_without_whole_marks_is_refused_and_left(refuse, tmp_path):
    page = tmp_path / 'page.md'
    a, b = f'{MARK}a.jsonl -->\n', f'{MARK}b.jsonl -->\n'
    for text in ('', f'{a}text', f'{a}{b}<!-- end -->'):
        page.write_text(text)
        assert 'expected marks' in refuse(main, '--pages=True', str(page))
        assert page.read_text() == text
    assert 'expected marks' in refuse(main, '--pages=True', str(tmp_path / 'none.md'))
    assert not (tmp_path / 'none.md').exists()
