"""tests/tools/compare.py, and how sample.py brings results together and compares them."""

import glob
import json
import math
import os
import sys

import numpy as np
import pytest

from configurator import read_text
from conftest import ROOT, run_here, table_of
from sample import Difference, differences, group, half_interval, of_variant, variant_of

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from compare import END, MARK, holm, main, order_of, p_value, with_marked

PAGES = ['README.md', *sorted(glob.glob('config/**/*.md', root_dir=ROOT, recursive=True))]


def result(loss, mlp='moe', run=None, seed=1, iter=100, **recipe):
    recipe = {'mlp': mlp, 'factorised': False, 'router': 'linear', 'router_std': 0.02, 'n_embd': 64,
              'd_low': None, 'd_judge': None, 'top_k': 2, 'aux_weight': 0.0, 'batch_size': 16,
              'block_size': 64, 'eval_iters': 50, 'learning_rate': 1e-3, 'sha256': 'a',
              'val_tokens': 7, 'torch': '2', 'processor': 'x', 'model.py': 'c'} | recipe
    return {'run': run or mlp, 'seed': seed, 'iter': iter, 'tokens': 10 * iter, 'seconds': 1.0,
            'val_loss': loss, 'lowest_val_loss': loss, 'ent_load': [2.0], 'ent_conf': [1.0],
            'norm': [[1.0, 2.0]], 'recipe': recipe}


def results(losses, mlp='moe', run=None, **keys):
    return [result(loss, mlp, run, seed, **keys) for seed, loss in enumerate(losses, 1)]


def seeds_of(losses, mlp='moe', **keys):
    return {line['seed']: line for line in results(losses, mlp, **keys)}


@pytest.fixture
def file(tmp_path):
    """file(lines, name) -> the path of a results.jsonl with these lines."""
    def write(lines, name='results.jsonl'):
        path = tmp_path / name
        path.write_text('\n'.join(map(json.dumps, lines)), encoding='utf-8')
        return str(path)
    return write


def printed(*arguments):
    return run_here(main, *arguments).stdout


# -----------------------------------------------------------------------------
# sample.py

def test_results_of_one_name_are_told_apart_by_what_differs():
    lines = results([2.0, 2.1], 'aoe', top_k=1) + results([3.0], 'aoe', top_k=2, iter=10)
    runs = group([*lines, lines[0] | {'from': 'a copy'}])          # equal ones count once
    assert {name: list(seeds) for name, seeds in runs.items()} == {
        'aoe (top_k 1)': [1, 2], 'aoe (top_k 2, to 10)': [1]}


def test_different_losses_of_one_run_and_seed_are_an_error_that_names_both_places(file, refuse):
    here, there = file(results([2.0, 2.1]), 'here.jsonl'), file(results([2.0, 2.2]), 'there.jsonl')
    assert f'{there}, line 2: expected what {here}, line 2 has' in refuse(main, here, there)


def test_variants_are_told_by_what_shaped_them():
    whole, gate, large = {'mlp': 'aoe'}, {'factorised': True, 'd_low': 32}, {'router': 'large'}
    for name, keys in {'dense': {'mlp': 'dense'}, 'moe': {}, 'moe wide': {'router_std': 0.1},
                       'moe factorised': gate, 'moe factorised large': gate | large,
                       'moe large': large, 'aoe_whole': whole | {'d_judge': 16},
                       'aoe': whole | gate | {'d_judge': 32},
                       'aoe narrow': whole | gate | {'d_judge': 8}}.items():
        assert variant_of(seeds_of([1.0], **{'mlp': 'moe'} | keys)) == name
    old = seeds_of([1.0], 'aoe', **gate)
    del old[1]['recipe']['router_std'], old[1]['recipe']['d_judge']          # newer keys
    assert variant_of(old) == 'aoe'


def test_a_run_is_compared_with_the_nearest_moe_seed_by_seed():
    runs = {'one': seeds_of([1.0, 2.0, 3.0]), 'two': seeds_of([1.5, 2.5], aux_weight=0.1),
            'aoe': seeds_of([1.1, 2.2, 3.3, 4.0], 'aoe'), 'none': {9: result(1.0, 'aoe', seed=9)},
            'aoe aux': seeds_of([1.4, 2.4], 'aoe', aux_weight=0.1)}
    found = differences(runs, of_variant(runs, 'moe'))
    assert {name: difference.base for name, difference in found.items()} == {
        'aoe': 'one', 'aoe aux': 'two'}
    assert found['aoe'].minus == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert (found['aoe'].base_loss, found['aoe'].differ) == (2.0, set())     # of seeds 1 to 3
    assert set(differences(runs, of_variant(runs, 'aoe_whole'))) == {'one', 'two'}


@pytest.mark.parametrize('ours', ({'batch_size': 8}, {'eval_iters': 10}, {'sha256': 'b'},
                                  {'block_size': 32}, {'iter': 20}, {'val_tokens': 8}))
def test_runs_with_other_tokens_or_windows_are_no_pair(ours, file, refuse):
    path = file(results([2.0, 2.1]) + results([1.9, 2.2], 'aoe', **ours))
    assert ': no moe with the same seeds, data, tokens and windows\n' in printed(path)
    assert 'cell: expected one of ' in refuse(main, path, '--cell=aoe')


@pytest.mark.parametrize('key', ('torch', 'processor', 'model.py', 'learning_rate'))
def test_what_else_differs_is_told_refused_and_marked(key, file, refuse, monkeypatch):
    path = file(results([2.0, 2.1]) + results([1.9, 2.2], 'aoe', **{key: 3}))
    assert f'\n- aoe differs from moe in {key}, too\n' in printed(path)
    figures = []
    monkeypatch.setattr('compare.save_figure', lambda figure, path: figures.append(figure))
    main([path, '--forest=forest.png'])
    label = figures[0].axes[0].get_yticklabels()[0].get_text()
    if key == 'learning_rate':
        assert printed(path, '--cell=aoe') == '+0.0000 ± 1.2706\n' and label == 'aoe'
    else:
        assert refuse(main, path, '--cell=aoe').endswith(f"got 'moe', which differs in {key}")
        assert label == '* aoe'
        assert f'\n* aoe differs from moe in {key}' in figures[0].get_supxlabel()


@pytest.mark.parametrize('n, t', ((2, 12.7062), (11, 2.2281), (16, 2.1314), (24, 2.0687),
                                  (61, 2.0003)))
def test_intervals_and_p_are_those_of_students_t(n, t):
    values = np.random.default_rng(1).normal(size=n)
    half = t * values.std(ddof=1) / math.sqrt(n)
    assert half_interval(values.tolist()) == pytest.approx(half, rel=3e-5)
    for mean in (half, -half):                                     # an interval that ends at 0
        assert p_value((values - values.mean() + mean).tolist()) == pytest.approx(0.05, rel=1e-3)


def test_intervals_and_p_at_their_ends():
    assert half_interval([1.0]) == math.inf and p_value([0.0, 0.0, 0.0]) == 1
    values = np.linspace(-1, 1, 11)
    values += 4.587 * values.std(ddof=1) / math.sqrt(11)           # of 10 degrees of freedom
    assert p_value(values.tolist()) == pytest.approx(0.001, rel=1e-3) and p_value([0.5, 0.5]) == 0


# -----------------------------------------------------------------------------
# compare.py

def test_holm_stops_at_the_first_that_does_not_survive(monkeypatch):
    p_of = {'a': 0.04, 'b': 0.001, 'c': 0.03, 'd': 0.012}
    monkeypatch.setattr('compare.p_value', lambda values: p_of[values[0]])
    lines = list(holm({name: Difference('moe', set(), {1: name, 2: name}, 2.0) for name in p_of}
                      | {'one seed': Difference('moe', set(), {1: 0.1}, 2.0)}))
    assert lines[0] == "b: p 0.001, survives Holm's correction"
    assert [(line[0], 'survives' in line) for line in lines] == [  # 4 b, 3 d, 2 c, and 1 a
        ('b', True), ('d', True), ('c', False), ('a', False)]


def test_numbers_in_names_sort_as_numbers():
    names = ['moe', 'aoe_whole', 'moe_0', 'aoe_whole_0', 'moe 1e-3', 'aoe_whole 1e-3',
             'moe 4 of 16', 'moe 48 2e-3', 'aoe_whole 48 2e-3', 'moe 48 1.5e-2', 'moe 192 5e-4']
    assert names == sorted(sorted(names), key=lambda name: order_of(name, seeds_of([1], name[:3])))


def test_the_table_by_run_and_by_setting(file):
    lines = [*results([2.0, 2.1]), *results([1.9, 2.0002], 'dense'),
             *results([3.0, 3.1], 'moe', 'moe 48', n_embd=48),
             *results([3.002, 3.101], 'aoe', 'aoe_whole 48', n_embd=48)]
    lines[0]['norm'] = [[0.0, 1.0]]                                # an expert that finds nothing
    lines += [line | {'diverged': 30} for line in results([4.0, 4.0], 'aoe', iter=10)]
    path = file(lines)
    text = printed(path, '--margin=0.01', '--holm=True')
    table = table_of(text)
    assert table['run'][:4] == ['seeds', 'lowest val loss', 'minus moe', 'seeds better']
    assert table['dense'][:4] == ['2', '1.9501 ± 0.0709', '**-0.0999 ± 0.0013**', '2 of 2']
    assert table['aoe_whole 48'][2:4] == ['+0.0015 ± 0.0064', '0 of 2']
    assert table['aoe (diverged at 30)'][1:4] == ['diverged', '-', '-'] and '4.0' not in text
    assert table['moe'][-1] == 'inf' and '- within ± 0.01 (level): aoe_whole 48\n' in text
    assert "- dense: p 0.00064, survives Holm's correction" in text
    assert len(table_of(printed(path, '--short=True'))['moe']) == 4 < len(table['moe'])
    for key, aoe in (('--short=True', '+0.0015 ± 0.0064'), ('--minus=None', '3.0515 ± 0.0700')):
        row = table_of(printed(path, '--by_setting=True', key))['48']
        assert row == ['3.0500 ± 0.0707', '', aoe]
    assert table_of(printed(path, '--minus=dense'))['moe'][2] == '**+0.0999 ± 0.0013**'


def test_an_out_dir_gives_what_its_results_give(file, tmp_path):
    lines = results([2.0, 2.1]) + results([2.5, 2.6], 'aoe')
    for line in lines:
        folder = tmp_path / 'out' / f'{line["run"]}-{line["seed"]}'
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text(json.dumps(line))
        (folder / 'log.jsonl').write_text(json.dumps(line | {'test_loss': line['val_loss'] + 1}))
    out_dir = str(tmp_path / 'out')
    assert printed(file(lines)) == printed(out_dir)
    assert table_of(printed(out_dir, '--loss=test_loss'))['aoe'][1] == '3.5500 ± 0.0707'


@pytest.mark.parametrize('minus, words', (
    ((0.02, 0.04), "can't tell: 1.5 % worse (95 %: 4.9 better to 7.9 worse)"),
    ((0.02, 0.0222), '1.1 % worse (95 %: 0.4 to 1.8)'),
    ((-0.02, -0.0222), '1.1 % better (95 %: 0.4 to 1.8)'),
    ((-0.1,), "can't tell: 5.0 % better (one seed)")))
def test_a_single_difference_in_words_and_in_the_forest(minus, words, file):
    path = file(results([2.0, 2.0, 9.0]) + results([2.0 + loss for loss in minus], 'aoe'))
    assert printed(path, '--cell=aoe', '--percent=True') == words + '\n'
    assert printed(path, '--cell=aoe').startswith(f'{np.mean(minus):+.4f}')
    main([path, f'--forest={path}.png'])
    assert 1_000 < os.path.getsize(f'{path}.png') < 100_000


def test_a_run_is_subtracted_by_its_name(file, refuse):
    keys = {'factorised': True, 'd_low': 32}
    path = file(results([2.0, 2.5], 'aoe', 'plain', **keys) + results([1.0, 1.0])
                + results([2.1, 2.75], 'aoe', 'mine', **keys))
    table = printed(path, '--minus=plain')
    assert ' +0.1750 ± 0.9530 ' in table and table.count('of 2') == 2      # mine and moe
    # by the variant both might be subtracted: that is refused, as is a run that only is called moe
    assert "minus: expected a run, such as 'mine' or 'plain', got 'aoe'" in refuse(
        main, path, '--minus=aoe')
    wide = file(results([2.0, 2.0], router_std=0.1) + results([1.9, 1.9], 'aoe'), 'wide.jsonl')
    assert "minus: expected a run, or one of aoe_whole, moe wide, got 'moe'" in refuse(main, wide)
    assert 'forest: expected runs to compare with None, got none' in refuse(
        main, path, '--minus=None', f'--forest={path}.png')


def test_what_cannot_be_compared_is_refused_in_one_line(refuse, file, tmp_path):
    known, line = file(results([2.0]) + results([1.9], 'aoe')), result(1.0)
    texts = [json.dumps(line | wrong) for wrong in (
        {'val_loss': None}, {'lowest_val_loss': math.nan}, {'ent_load': ['even']}, {'seed': 's'},
        {'recipe': line['recipe'] | {'mlp': 'ffn'}}, {'recipe': {'mlp': 'moe'}}, {'iter': 10**400},
        {'norm': [None, 3]}, {'run': 'a\x1b[31m\n'}, {'run': '../a'})]
    for text in (*texts, '[' * 100_000, '{', '[]', '3', '{}', ''):
        (tmp_path / 'wrong.jsonl').write_text(f'{json.dumps(line)}\n{text}\n')
        error = refuse(main, str(tmp_path / 'wrong.jsonl'))
        assert 'wrong.jsonl, line 2: expected a result of train.py, got ' in error
        assert error.isprintable()
    for keys, says in ((['--minus=no'], "minus: expected a run, or one of aoe_whole, moe, got"),
                       (['--cell=moe'], "cell: expected one of aoe, got 'moe'"),
                       (['--loss=test_loss'], 'line 1: expected a result with a test_loss'),
                       (['--loss=loss'], 'loss: expected lowest_val_loss or')):
        assert says in refuse(main, known, *keys)
    assert 'none.jsonl' in refuse(main, 'none.jsonl') and 'got none' in refuse(main)


@pytest.mark.parametrize('page', PAGES)
def test_the_pages_hold_what_the_commands_in_their_marks_print(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert with_marked(page) == read_text(page), f'{page}: write it anew with --pages=True'


def test_a_page_is_written_anew(file, tmp_path):
    file(results([2.0, 2.0]) + results([2.02, 2.0222], 'aoe', learning_rate=2e-3))
    page, mark = tmp_path / 'page.md', f'{MARK} results.jsonl --short=True -->\n'
    page.write_text(f'Text.\n\n{mark}| old |\n{END}\nIt is\n', encoding='utf-8')
    main(['--pages=True', str(page)])
    new = page.read_text(encoding='utf-8')
    assert new.startswith(f'Text.\n\n{mark}| run ') and table_of(new)['aoe'][3] == '0 of 2'
    assert new.endswith(f'- aoe differs from moe in learning_rate, too\n{END}\nIt is\n')
    assert with_marked(str(page)) == new


def test_a_page_without_whole_marks_is_refused_and_left(refuse, tmp_path):
    page = tmp_path / 'page.md'
    for text, says in ((f'{MARK} a.jsonl -->\ntext', '1 marks and 0 ends'),
                       (f'{MARK} a.jsonl -->\n<!-- other -->\n{END}', 'of which 0 are pairs'),
                       (f'text {END}', '0 marks and 1 ends'), ('', 'expected a page'),
                       (f'{MARK} none.jsonl -->\n{END}', 'page.md: expected a folder that holds'),
                       (f'{MARK} config/none.jsonl -->\n{END}', os.path.join(ROOT, 'config')),
                       (f'{MARK} --shrt=True -->\n{END}', 'page.md: --shrt: no such key')):
        page.write_text(text)
        assert says in refuse(main, '--pages=True', str(page))
        assert page.read_text() == text
    assert 'expected a page' in refuse(main, '--pages=True', str(tmp_path / 'none.md'))
