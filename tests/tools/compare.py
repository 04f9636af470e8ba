"""
Who is ahead of moe? Loss minus that of moe with the same seed, which has the same
batches: its mean with a 95 % interval, bold where that excludes 0.

    python tests/tools/compare.py config/who_scores/two_questions.jsonl
    python tests/tools/compare.py config/how_far/sizes.jsonl --picture=out/sizes.png
    python tests/tools/compare.py --pages=True README.md config/README.md config/lab/README.md

reads what train.py left in an out_dir's results.jsonl, or in several. A run is
compared with the moe run whose settings differ least from its own, on the same
data, with the same iterations and schedule; what differs is told below the table.
The last command writes the tables of these pages anew, each by the command in the
mark above it.
"""

import contextlib
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, build, expect, parse, read_text, write_text
from train import COLORS, mean_and_spread, print_rows, pyplot, save_figure

LABELS = {'': 'without L_aux', 'aux': 'with L_aux'}                # of settings in the picture
# what makes a variant, and may differ between a run and its moe; and what may not
OF_VARIANT = {'mlp', 'factorised', 'router', 'd_low', 'd_judge', 'seed', 'frozen', 'bias_step',
              'virtual'}
SAME = ('lr_decay_iters', 'sha256', 'tokenizer', 'device', 'torch')
RATES = {'learning_rate', 'min_lr'}
# half a 95 % interval in standard errors, of 2, 3 ... 11 differences (Student's t)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# the tables of pages: between a mark, with the command that prints it, and the end mark
MARK = '<!-- python tests/tools/compare.py '
TABLE = re.compile(f'({MARK}([^\n]+) -->\n)(?:(?!<!--).)*(<!-- end -->)', re.S)


@dataclass
class MinusConfig:
    """The keys of this script."""
    # keys
    minus: str = 'moe'                   # the variant that the others are compared with
    by_setting: bool = False             # a row for each setting, a column for each variant
    losses: bool = False                 # with by_setting: losses, and no differences
    picture: str | None = None           # draw the differences to this file
    pages: bool = False                  # the files are pages: write their tables anew

    def __post_init__(self):
        expect(self, 'losses', 'False without --by_setting=True',
               lambda losses: self.by_setting or not losses)


def variant_of(seeds):
    """By what shaped the run: 'moe factorised'; seeds: {seed: its line of results.jsonl}."""
    shape = next(iter(seeds.values()))['shape']
    mlp, factorised = shape['mlp'], shape['factorised']
    parts = {mlp: True, 'factorised': mlp == 'moe' and factorised,
             'whole': mlp == 'aoe' and not factorised,
             'large router': mlp == 'moe' and shape['router'] == 'large',
             'frozen': shape.get('frozen'), 'sigmoid': shape.get('bias_step'),   # rivals.patch
             'virtual': shape.get('virtual')}
    return ' '.join(part for part, there in parts.items() if there)


def setting_of(name, seeds):
    """What a run's name says besides its variant: 'aux' of 'aoe whole aux'."""
    return name.removeprefix(variant_of(seeds)).strip()


def order_of(name, seeds):
    """To sort runs by: settings, by size where they have numbers, and in each the variants."""
    parts = re.findall(r'\d+(?:\.\d+)?(?:e[+-]?\d+)?|\D+?(?=\d|$)', setting_of(name, seeds))
    key = [(1, float(part), '') if part[0].isdigit() else (0, 0, part) for part in parts]
    factorised = next(iter(seeds.values()))['shape']['factorised']
    variant = variant_of(seeds)
    return key, 'mad'.index(variant[0]), factorised, variant       # moe, aoe, dense


def may_be_compared(a, b):
    return a['iter'] == b['iter'] and all(a['shape'].get(key) == b['shape'].get(key)
                                          for key in SAME)


def settings_that_differ(a, b):
    a, b = a['shape'], b['shape']
    return sorted(key for key in (a | b).keys() - OF_VARIANT if a.get(key) != b.get(key))


def differences(results, base='moe'):
    """results: run name -> {seed: its line}. Returns run name -> (the name of its moe, settings
    that differ, losses minus that moe's seed by seed), for all that have one to compare with.
    base: another variant in the place of moe."""
    found = {}
    for name, seeds in results.items():
        near = []
        for other, others in results.items():
            pairs = [(seeds[seed], others[seed]) for seed in seeds
                     if seed in others and may_be_compared(seeds[seed], others[seed])]
            if pairs and variant_of(others) == base != variant_of(seeds):
                minus = [a['lowest_val_loss'] - b['lowest_val_loss'] for a, b in pairs]
                near.append((other, settings_that_differ(*pairs[0]), minus))
        if near:
            found[name] = min(near, key=lambda candidate: len(candidate[1]))
    return found


def half_interval(values):
    """Half a 95 % interval of their mean; a little too wide beyond the table of T_95."""
    if len(values) < 2:
        return math.inf
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


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
    from conftest import table_of        # which needs pytest
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


def draw(results, found, config):
    """Of each variant the differences over its settings, with 95 % intervals; moe is 0."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout='constrained')
    axes.axhline(0, color='black', linewidth=1, label=config.minus)
    settings = list(dict.fromkeys(setting_of(name, results[name]) for name in found))
    variants = list(dict.fromkeys(variant_of(seeds) for seeds in results.values()))
    for i, variant in enumerate(variants):
        points = [(settings.index(setting_of(name, results[name])), minus)
                  for name, (_, _, minus) in found.items()
                  if variant_of(results[name]) == variant]
        if points:
            axes.errorbar([x for x, _ in points], [statistics.mean(d) for _, d in points],
                          yerr=[half_interval(d) if len(d) > 1 else 0 for _, d in points],
                          color=COLORS[i % len(COLORS)], marker='o', capsize=4, label=variant)
    axes.set_xticks(range(len(settings)), [LABELS.get(setting, setting) for setting in settings])
    axes.set(ylabel=f"validation loss minus {config.minus}'s (below 0: ahead)",
             title='Seed by seed: mean, 95 % interval')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper')
    save_figure(figure, config.picture)


def read_results(files):
    """Run name -> {seed: its line}, in the order of a table."""
    results = {}
    for file in files:
        try:
            lines = [json.loads(text) for text in read_text(file).splitlines() or ['']]
            for line in lines:           # what the tables need is there
                order_of(line['run'], {line['seed']: line}), line['iter'], line['lowest_val_loss']
        except (ValueError, KeyError, TypeError, OSError):
            raise UserError(f'{file}: expected a results.jsonl of this train.py, got another file, '
                            'or none') from None
        for line in lines:
            seeds = results.setdefault(line['run'], {})
            if line['seed'] in seeds:
                raise UserError(f'{file}: expected each run once, got {line["run"]!r}, seed '
                                f'{line["seed"]}, again')
            seeds[line['seed']] = line
    return dict(sorted(results.items(), key=lambda run: order_of(*run)))


def loss_of(seeds):
    return mean_and_spread([result['lowest_val_loss'] for result in seeds.values()])


def difference_of(values):
    mean, half = statistics.mean(values), half_interval(values)
    text = f'{mean:+.4f}' + f' ± {half:.4f}' * (half < math.inf)
    return f'**{text}**' if abs(mean) > half else text


def rows_by_run(results, found, config):
    yield ('variant', 'seeds', 'validation loss', f'minus {config.minus}', 'seeds ahead',
           'Ent_load by layer', 'Ent_conf by layer', 'norms, max / min')
    for name, seeds in results.items():
        minus, ahead = '-', '-'
        if name in found:
            values = found[name][2]
            minus, ahead = difference_of(values), f'{sum(d < 0 for d in values)} of {len(values)}'

        def by_layer(key, form, of_layer, seeds=seeds):
            layers = zip(*(filter(None, r[key]) for r in seeds.values()))   # moe has no norms
            return ' '.join(format(statistics.mean(map(of_layer, layer)), form)
                            for layer in layers) or '-'
        yield (name, str(len(seeds)), loss_of(seeds), minus, ahead,
               by_layer('ent_load', '.2f', float), by_layer('ent_conf', '.2f', float),
               by_layer('norm', '.2f', lambda norms: max(norms) / min(norms)))


def rows_by_setting(results, found, config):
    variants = list(dict.fromkeys(variant_of(seeds) for seeds in results.values()))
    cells = {}                           # setting -> {variant: cell}
    for name, seeds in results.items():
        variant, cell = variant_of(seeds), '-'
        if variant == config.minus or config.losses:
            cell = loss_of(seeds)
        elif name in found:
            cell = difference_of(found[name][2])
        cells.setdefault(setting_of(name, seeds), {})[variant] = cell
    yield ('', *(variant if variant == config.minus or config.losses
                 else f'{variant}, minus {config.minus}' for variant in variants))
    for setting, row in cells.items():
        yield (setting or 'default', *(row.get(variant, '') for variant in variants))


def with_tables(page):
    """The text of a page, its tables written anew, each by the command in its mark, and below a
    table what differs between a run and its moe. Raises UserError."""
    def table(match):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(shlex.split(match[2]))
        rows, *notes = printed.getvalue().strip().split('\n\n')[::2]
        return '\n'.join([match[1] + rows, *(['', *notes, ''] if notes else []), match[3]])

    text = read_text(page)
    if not text.count(MARK) == len(TABLE.findall(text)) > 0:
        raise UserError(f'{page}: expected marks {MARK}... -->, each with its <!-- end -->, got '
                        f'{text.count(MARK)} marks and {len(TABLE.findall(text))} tables')
    return TABLE.sub(table, text)


def main(arguments):
    values, files = parse(MinusConfig, arguments, __doc__)
    config = build(MinusConfig, values)
    if not files:
        raise UserError('expected a results.jsonl, got none; --help has examples')
    if config.pages:
        for page in files:
            write_text(page, with_tables(page))
        return
    results = read_results(files)
    variants = {variant_of(seeds) for seeds in results.values()}
    if config.minus not in variants and not config.losses:
        raise UserError(f'minus: expected one of {", ".join(sorted(variants))}, got '
                        f'{config.minus!r}')
    found = differences(results, config.minus)
    rows = rows_by_setting if config.by_setting else rows_by_run
    print_rows(list(rows(results, found, config)))
    if config.losses:
        return
    print(f'\nminus {config.minus}: mean ± half of a 95 % interval (Student\'s t), bold where it '
          'excludes 0. One\nin twenty does by chance: of ten rows without any difference, one or '
          'more would be bold\nwith a probability of 40 %, of these '
          f'{len(found)} with {1 - 0.95 ** len(found):.0%}')
    own_rate = [name for name in found if {*found[name][1]} & RATES]
    if own_rate:
        print(f'with learning rates of their own: {", ".join(own_rate)}')
    notes = {}                                           # what is to be said -> of which runs
    for name, seeds in results.items():
        if name in found and {*found[name][1]} - RATES:
            base, differ, _ = found[name]
            note = f'minus a run of {base} that differs in {", ".join(differ)}, too'
        elif name not in found and variant_of(seeds) != config.minus:
            note = f'no {config.minus} with the same seeds, data, iterations and schedule'
        else:
            continue
        notes.setdefault(note, []).append(name)
    if notes:
        print('\n' + '\n'.join(f'- {", ".join(names)}: {note}' for note, names in notes.items()))
    if config.picture:
        draw(results, found, config)


if __name__ == '__main__':
    configurator.run(main)
