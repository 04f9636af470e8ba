"""tests/tools/compare.py: what is compared with what, and that the pages hold what it prints."""

import glob
import json
import math
import os
import sys

import numpy as np
import pytest

from configurator import read_config_file, read_text
from conftest import ROOT, table_of
from train import TrainConfig, plan_runs, read_results

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from compare import (MARK, T_95, CompareConfig, differences, forest_rows, half_interval, main,
                     order_of, variant_of, with_marked)

PAGES = [page for page in ('README.md', *sorted(glob.glob('config/**/*.md', root_dir=ROOT,
                                                          recursive=True)))
         if '<!-- python tests/tools/compare.py' in read_text(os.path.join(ROOT, page))]


def result(loss, mlp='moe', run=None, seed=1, iter=100, **recipe):
    """What the tool needs of a line of results.jsonl."""
    recipe = {'mlp': mlp, 'factorised': False, 'router': 'linear', 'aux_weight': 0.0,
              'lr_decay_iters': 100, 'sha256': 'a', 'd_low': None, 'seed': seed} | recipe
    return {'run': run or mlp, 'seed': seed, 'iter': iter, 'tokens': 10, 'seconds': 1.0,
            'val_loss': loss, 'lowest_val_loss': loss, 'ent_load': [2.0], 'ent_conf': [1.0],
            'norm': [[1.0, 2.0]], 'recipe': recipe}


def seeds_of(losses, mlp='moe', **keys):
    return {seed: result(loss, mlp, seed=seed, **keys) for seed, loss in losses.items()}


@pytest.fixture
def file(tmp_path):
    """file(results, name) -> the path of a results.jsonl with these lines."""
    def write(results, name='results.jsonl'):
        path = tmp_path / name
        path.write_text('\n'.join(map(json.dumps, results)), encoding='utf-8')
        return str(path)
    return write


@pytest.fixture
def printed(capsys):
    """printed(*arguments) -> what the tool prints."""
    def call(*arguments):
        main(list(arguments))
        return capsys.readouterr().out
    return call


def test_a_run_is_compared_with_the_nearest_moe_seed_by_seed():
    runs = {
        'one': seeds_of({1: 1.0, 2: 2.0, 3: 3.0}),
        'two': seeds_of({seed: seed + 0.5 for seed in (1, 2, 3)}, aux_weight=0.1),
        'aoe': seeds_of({1: 1.1, 2: 2.2, 3: 3.3, 4: 4.0}, 'aoe'),
        'aoe aux': seeds_of({1: 1.4, 2: 2.4}, 'aoe', aux_weight=0.1, d_low=8),
        'aoe 64': seeds_of({3: 2.0}, 'aoe', top_k=1),              # for want of a moe with top_k 1
        'two aux': seeds_of({1: 1.6}, factorised=True, aux_weight=0.1, d_ffn=64)}
    found = differences(runs)
    assert {name: (difference.base, difference.differ) for name, difference in found.items()} == {
        'aoe': ('one', []), 'aoe aux': ('two', []), 'aoe 64': ('one', ['top_k']),
        'two aux': ('two', ['d_ffn'])}
    for name, minus, loss in (('aoe', [0.1, 0.2, 0.3], 2.0), ('aoe aux', [-0.1, -0.1], 2.0),
                              ('aoe 64', [-1.0], 3.0)):
        np.testing.assert_allclose([*found[name].minus.values()], minus)
        assert found[name].loss == loss


@pytest.mark.parametrize('ours, its, differ', (
    ({'iter': 20}, {}, None), ({'lr_decay_iters': 200}, {}, None), ({'sha256': 'b'}, {}, None),
    ({'val_tokens': 7}, {'val_tokens': 8}, None), ({'device': 'cpu'}, {'device': 'mps'}, None),
    ({'val_tokens': 7, 'processor': 'x', 'train.py': 'c'}, {}, []),            # an older line
    ({'processor': 'x', 'torch': '2'}, {'processor': 'y', 'torch': '3'}, ['processor', 'torch'])))
def test_other_data_or_iterations_are_not_compared_and_another_machine_is_told(ours, its, differ):
    runs = {'moe': seeds_of({1: 2.0}, **its), 'aoe': seeds_of({1: 1.0}, 'aoe', **ours)}
    found = differences(runs)
    assert (found['aoe'].differ if found else None) == differ


def test_the_interval_is_the_one_of_students_t():
    for n, t in enumerate(T_95, 2):
        x = np.linspace(0, t, 200_001)
        density = (1 + x * x / (n - 1)) ** (-n / 2)
        density *= math.gamma(n / 2) / math.sqrt((n - 1) * math.pi) / math.gamma((n - 1) / 2)
        assert abs(2 * np.mean((density[1:] + density[:-1]) / 2) * t - 0.95) < 1e-5
    np.testing.assert_allclose(half_interval([0.1, 0.2, 0.3]), 4.3027 * 0.1 / math.sqrt(3))


def test_numbers_in_names_sort_as_numbers():
    names = ['aoe 1e-3', 'moe 1e-3', 'moe 192 5e-4', 'aoe 48 2e-3', 'moe 48 2e-3', 'moe 48 1.5e-2',
             'aoe aux', 'moe', 'moe 4 of 16']
    assert sorted(names, key=lambda name: order_of(name, seeds_of({1: 1.0}, name[:3], factorised=(
        name[:3] == 'aoe')))) == [
        'moe', 'aoe aux', 'moe 1e-3', 'aoe 1e-3', 'moe 4 of 16', 'moe 48 2e-3', 'aoe 48 2e-3',
        'moe 48 1.5e-2', 'moe 192 5e-4']


def test_rivals_are_variants_of_their_own_and_may_take_the_place_of_moe():
    large, norm, whole, gate = ({'router': 'large'}, {'router': 'norm'}, {'mlp': 'aoe'},
                                {'factorised': True})
    for name, keys in {
            'dense': {'mlp': 'dense'}, 'aoe': whole | gate, 'aoe_whole': whole,
            'moe factorised': gate, 'moe factorised large router': gate | large,
            'moe norm router': norm, 'moe wide router': {'router_std': 0.1},
            'moe large router wide router': large | {'router_std': 0.1},
            'moe x2': {'score_scale': 2.0}, 'moe norm router x4': norm | {'score_scale': 4.0},
            'moe jitter': {'jitter': 0.01}, 'moe norm router frozen': norm | {'frozen': True},
            'moe sigmoid': {'bias_step': 0.001}, 'aoe_whole virtual': whole | {'virtual': True},
            'moe': {'router_std': None, 'score_scale': 1.0, 'jitter': 0.0}}.items():
        assert variant_of(seeds_of({1: 1.0}, **{'mlp': 'moe'} | keys)) == name
    runs = {'moe': seeds_of({1: 1.0}), 'moe frozen': seeds_of({1: 1.5}, frozen=True),
            'moe sigmoid': seeds_of({1: 1.2}, bias_step=0.001)}
    for base, minus in (('moe', {'moe frozen': 0.5, 'moe sigmoid': 0.2}),
                        ('moe sigmoid', {'moe': -0.2, 'moe frozen': 0.3})):
        found = {name: difference.minus[1] for name, difference in differences(runs, base).items()}
        assert found == pytest.approx(minus)


def test_unequal_recipes_are_never_averaged_and_say_what_differs(file, printed):
    one = [result(loss, mlp, seed=seed) for mlp, loss in (('moe', 2.0), ('aoe', 2.1))
           for seed in (1, 2)]
    two = [result(loss, mlp, seed=seed, learning_rate=0.02)
           for mlp, loss in (('moe', 3.0), ('aoe', 3.3)) for seed in (3, 4)]
    one = [line | {'recipe': line['recipe'] | {'learning_rate': 0.001}} for line in one]
    table = table_of(printed(file(one, 'a.jsonl'), file(two, 'b.jsonl'), '--short=True'))
    assert {name: row[2] for name, row in table.items()} == {
        'variant': 'minus moe', 'moe (learning_rate 0.001)': '-', 'moe (learning_rate 0.02)': '-',
        'aoe (learning_rate 0.001)': '**+0.1000 ± 0.0000**',
        'aoe (learning_rate 0.02)': '**+0.3000 ± 0.0000**'}


def test_it_says_what_it_compares_and_what_not(file, printed):
    lines = [result(loss, mlp, name, seed, iter, learning_rate=rate)
             for name, mlp, iter, rate, losses in (
                 ('moe', 'moe', 60, 1, (2.0, 2.1)), ('dense', 'dense', 60, 1, (1.9, 2.0002)),
                 ('aoe', 'aoe', 20, 1, (1.0, 1.1)), ('aoe rate', 'aoe', 60, 2, (2.0, 2.3)))
             for seed, loss in enumerate(losses)]
    lines[0]['norm'] = [[0.0, 1.0]]                                # an expert that finds nothing
    lines += [result(4.0, 'aoe', 'aoe nan', seed, 10) | {'diverged': 30} for seed in (0, 1)]
    path = file(lines)
    text = printed(path)
    table = table_of(text)
    assert table['dense'][2:4] == ['**-0.0999 ± 0.0013**', '2 of 2']
    assert text.count('**') == 2 and table['moe'][-1] == 'inf'
    assert table['aoe nan (diverged at 30)'][1:3] == ['diverged', '-'] and '4.0' not in text
    assert '- aoe: no moe with the same seeds, data, iterations and schedule\n' in text
    assert '- aoe rate: with a learning rate of its own\n' in text
    assert 'diverged' in table_of(printed(path, '--by_setting=True'))[
        'aoe nan (diverged at 30)']


def test_an_out_dir_gives_what_its_results_give(file, printed, tmp_path):
    lines = [result(loss, mlp, seed=seed, d_low=8) | {'test_loss': loss + 1}
             for mlp, loss in (('moe', 2.0), ('aoe', 2.5)) for seed in (1, 2)]
    for line in lines:
        folder = tmp_path / 'out' / f'{line["run"]}-{line["seed"]}'
        folder.mkdir(parents=True)
        about = {key: line[key] for key in ('seed', 'recipe')} | {'name': line['run']}
        (folder / 'config.json').write_text(json.dumps(about))
        (folder / 'log.jsonl').write_text(json.dumps(line | {'val_loss': 9.0, 'iter': 0}) + '\n'
                                          + json.dumps(line))
    path = file(lines)
    assert printed(path) == printed(str(tmp_path / 'out'))
    assert table_of(printed(path, '--loss=test_loss'))['aoe'][:3] == [
        '2', '3.5000 ± 0.0000', '**+0.5000 ± 0.0000**']


def test_by_setting_a_row_has_a_column_for_each_variant(file, printed):
    path = file([result(loss + seed / 10, mlp, f'{mlp} {size}', seed, n_embd=size)
                 for size, mlp, loss in ((96, 'moe', 2.0), (96, 'dense', 2.5), (48, 'moe', 3.0))
                 for seed in (1, 2)])
    assert table_of(printed(path, '--by_setting=True')) == {
        '': ['moe', 'dense, minus moe'], '48': ['3.1500 ± 0.0707', ''],
        '96': ['2.1500 ± 0.0707', '**+0.5000 ± 0.0000**']}
    assert table_of(printed(path, '--by_setting=True', '--losses=True'))['96'] == [
        '2.1500 ± 0.0707', '2.6500 ± 0.0707']
    two = file([result(1.5, run='moe big'), result(1.25, run='big')])      # neither is lost
    assert table_of(printed(two, '--by_setting=True'))['big'] == ['1.5000 and 1.2500']


@pytest.mark.parametrize('losses, words', (
    ((2.02, 2.04), '1.5 % worse (4.9 better to 7.9 worse)'),
    ((2.02, 2.0222), '1.1 % worse (0.4 to 1.8)'), ((1.98, 1.9778), '1.1 % better (0.4 to 1.8)'),
    ((1.9,), '5.0 % better')))
def test_a_single_difference_in_percent(file, printed, losses, words):
    path = file([result(loss, mlp, seed=seed) for mlp, its in (('moe', (2.0, 2.0)), ('aoe', losses))
                 for seed, loss in enumerate(its)])
    assert printed(path, '--cell=aoe', '--percent=True') == words + '\n'
    assert printed(path, '--cell=aoe').startswith(f'{np.mean(losses) - 2:+.4f}')
    assert printed(path, '--cell=moe', '--losses=True') == '2.0000 ± 0.0000\n'


def test_a_cell_of_several_runs_is_their_mean_seed_by_seed(file, printed, refuse):
    losses = {('moe', 'a'): (2.0, 2.1, 2.2), ('moe', 'b'): (3.0, 3.1, 3.5),
              ('aoe', 'a'): (1.9, 2.2, 2.6), ('aoe', 'b'): (3.1, 3.4, 3.3)}
    path = file([result(loss, mlp, f'{mlp} {dtype}', seed, dtype=dtype)
                 for (mlp, dtype), its in losses.items() for seed, loss in enumerate(its)
                 if (mlp, dtype, seed) != ('moe', 'b', 1)])        # seeds 0 and 2 are in common
    def interval(a, b):
        return f'{(a + b) / 2:+.4f} ± {12.7062 * abs(a - b) / 2:.4f}\n'
    # seed 0: -0.1 and +0.1; seed 2: +0.4 and -0.2
    assert printed(path, '--cell=aoe a,aoe b') == interval(0, 0.1)
    assert printed(path, '--cell=aoe b', '--less=aoe a') == interval(0.2, -0.6)
    assert printed(path, '--cell=aoe a,aoe b', '--percent=True').startswith('1.9 % worse (')
    assert "got 'aoe c'" in refuse(main, path, '--cell=aoe a,aoe c')
    assert "got 'moe a'" in refuse(main, path, '--cell=aoe a', '--less=moe a')
    apart = file([result(loss, mlp, f'{mlp} {seed}', seed, dtype=str(seed))
                  for mlp, loss in (('moe', 2.0), ('aoe', 2.1)) for seed in (1, 2)], 'apart.jsonl')
    assert 'a seed in common, got aoe 1, aoe 2' in refuse(main, apart, '--cell=aoe 1,aoe 2')


def test_what_cannot_be_compared_is_refused(refuse, file):
    known, line = file([result(2.0), result(1.9, 'aoe')]), result(1.0)
    for wrong in ('none.jsonl', 'config', 'config/quick_start.py'):
        assert 'expected a' in refuse(main, os.path.join(ROOT, wrong))
    for wrong in ({'val_loss': None}, {'lowest_val_loss': 'low'}, {'ent_load': ['even']},
                  {'recipe': line['recipe'] | {'mlp': 'ffn'}},
                  {'recipe': {'mlp': 'moe'}}, {'norm': [None, 3]}):
        assert 'wrong.jsonl' in refuse(main, file([line | wrong], 'wrong.jsonl'))
    del line['iter']
    assert "KeyError('iter')" in refuse(main, file([line], 'wrong.jsonl'))
    assert "each run once, got 'moe', seed 1, again" in refuse(main, known, known)
    for keys, says in ((['--minus=no'], 'minus: expected one of aoe_whole, moe, got'),
                       (['--losses=True'], 'losses: expected False without'),
                       (['--percent=True'], 'percent: expected False without'),
                       (['--less=aoe'], 'less: expected None without'),
                       (['--cell=moe'], "cell: expected one of aoe, got 'moe'"),
                       (['--loss=test_loss'], "with a test_loss, got of 'moe' KeyError"),
                       (['--loss=loss'], 'loss: expected lowest_val_loss or')):
        assert says in refuse(main, known, *keys)
    assert 'expected a table of pilot.py' in refuse(main, str(file([3])), '--table=True')
    assert 'expected an out_dir or a results.jsonl, got none' in refuse(main)
    assert 'results of moe and of aoe' in refuse(main, file([result(1.0)]), '--forest=no.png')


def test_the_forest_has_a_row_for_each_setting_on_the_seeds_that_are_most(tmp_path):
    files = sorted(glob.glob(os.path.join(ROOT, 'config', '*', '*.jsonl')))
    rows = forest_rows(files, CompareConfig())
    assert {label: {variant: len(difference.minus) for variant, difference in row.items()}
            for label, row in rows.items()} == {
        '2 of 8 experts, 96 wide': {'aoe': 8, 'aoe_whole': 8},
        'the same, another kind of CPU': {'aoe': 4, 'aoe_whole': 8},
        'the same in float32': {'aoe_whole': 8}, 'seeds 61 to 68': {'aoe_whole': 8},
        'seeds 61 to 68 in float32': {'aoe_whole': 8}, 'seeds 69 to 76': {'aoe_whole': 8},
        'seeds 69 to 76 in float32': {'aoe_whole': 8},
        '48 wide': {'aoe': 3, 'aoe_whole': 5}, '192 wide': {'aoe': 3, 'aoe_whole': 5},
        '4 of 16 experts': {'aoe': 3, 'aoe_whole': 3},
        '4 of 32 experts': {'aoe': 3, 'aoe_whole': 3},
        '3 of 12 small experts': {'aoe': 3, 'aoe_whole': 3},
        'three times the tokens': {'aoe': 3, 'aoe_whole': 3},
        'on Python code': {'aoe': 3, 'aoe_whole': 3}, 'the quick start': {'aoe': 5, 'aoe_whole': 5}}
    picture = tmp_path / 'forest.png'
    main([f'--forest={picture}', *files])
    assert picture.read_bytes()[:4] == b'\x89PNG' and picture.stat().st_size < 100_000


# -----------------------------------------------------------------------------
# pages, and the committed results

@pytest.mark.parametrize('page', PAGES)
def test_the_pages_hold_what_the_commands_in_their_marks_print(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert with_marked(page) == read_text(page), f'{page}: write it anew with --pages=True'


def test_a_page_is_written_anew(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file([result(loss, mlp, seed=seed, learning_rate=rate) for mlp, rate, losses in (
        ('moe', 1, (2.0, 2.0)), ('aoe', 2, (2.02, 2.0222))) for seed, loss in enumerate(losses)])
    page = tmp_path / 'page.md'
    text = (f'{MARK[:5]}python tests/tools/compare.py results.jsonl --short=True -->\nold\n'
            '<!-- end -->\nIt is <!-- = --cell=aoe --percent=True -->2 %<!-- end --> or\n'
            '<!-- = results.jsonl --cell=aoe -->+0.0211\n± 0.0140<!-- end -->.\n')
    page.write_text(text, encoding='utf-8')
    main(['--pages=True', 'page.md'])
    new = page.read_text(encoding='utf-8')
    assert '-->\nold' not in new and 'seeds better |\n' in new
    assert 'It is <!-- = --cell=aoe --percent=True -->1.1 % worse (' in new
    assert 'own\n\n<!-- end -->\nIt is' in new                   # an empty line ends a list
    assert '-->+0.0211\n± 0.0140<!-- end -->.\n' in new            # as it was, broken into lines
    main(['--pages=True', 'page.md'])
    assert page.read_text(encoding='utf-8') == new


def test_a_page_without_whole_marks_is_refused_and_left(refuse, tmp_path):
    page, command = tmp_path / 'page.md', '<!-- python tests/tools/compare.py'
    for text, says in ((f'{command} a.jsonl -->\ntext', '1 marks, 0 ends'),
                       (f'{command} a.jsonl -->\n<!-- = --cell=b -->\n<!-- end -->', '2 marks'),
                       ('text <!-- end -->', '0 marks, 1 ends'), ('', 'expected a page'),
                       (f'{command} none.jsonl -->\n<!-- end -->', 'page.md: none.jsonl: expected'),
                       ('<!-- = --cell=b --> <!-- end -->', 'page.md: expected')):
        page.write_text(text)
        assert says in refuse(main, '--pages=True', str(page))
        assert page.read_text() == text
    assert 'expected a page' in refuse(main, '--pages=True', str(tmp_path / 'none.md'))
    assert not (tmp_path / 'none.md').exists()


@pytest.mark.parametrize('results, config', [
    *((f'how_far/{name}', f'how_far/{name.split("_xeon")[0]}') for name in (
        'judge_width', 'longer', 'new_sizes', 'one_expert', 'sizes', 'todays_shapes',
        'todays_shapes_xeon')),
    *((f'how_far/learning_rate_{width}', 'how_far/learning_rate') for width in (48, 96, 192)),
    *((f'paper/{name}', f'paper/{name}') for name in ('table2', 'table3')),
    *((f'who_scores/{name}', f'who_scores/{name}') for name in (
        'large_router', 'rates', 'two_questions')),
    ('quick_start/results', 'quick_start')])
def test_configs_still_plan_the_runs_whose_results_are_there(results, config):
    keys = {} if results.startswith('quick') else read_config_file(
        TrainConfig, os.path.join(ROOT, 'config', 'small.py'))
    keys |= read_config_file(TrainConfig, os.path.join(ROOT, 'config', f'{config}.py'))
    planned = {run.name: run for run in plan_runs(keys, {})}
    lines = read_results(os.path.join(ROOT, 'config', f'{results}.jsonl'))
    assert lines
    for line in lines:
        run = planned[line['run']]
        # what train.py decides on the spot, or takes from the command line
        own = line['recipe'].keys() & vars(run).keys() - {'seed', 'dtype', 'device', 'vocab_size',
                                                          'lr_decay_iters'}
        assert {key: line['recipe'][key] for key in own} == {key: getattr(run, key) for key in own}
