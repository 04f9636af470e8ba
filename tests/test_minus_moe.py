"""
Who is ahead of moe? Loss minus that of moe with the same seed, which has the same
batches, so that much of the noise is in both: its mean with a 95 % interval, bold
where that excludes 0.

    python tests/test_minus_moe.py config/two_questions_results.jsonl
    python tests/test_minus_moe.py config/sizes_results.jsonl out/sizes.png

reads what train.py left in an out_dir's results.jsonl. A run is compared with the
moe run whose settings differ least from its own, on the same data, with the same
code, iterations and schedule. The picture has the rest of the runs' names along x.
"""

import json
import math
import os
import re
import statistics
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, read_text
from train import COLORS, mean_and_spread, print_rows, pyplot, save_figure

VARIANTS = ('moe', 'moe factorised', 'moe large router', 'aoe whole', 'aoe', 'dense')
LABELS = {'': 'without L_aux', 'aux': 'with L_aux'}                # of settings in the picture
# what makes a variant, and may differ between a run and its moe; and what may not
OF_VARIANT = {'mlp', 'factorised', 'router', 'd_low', 'd_judge', 'seed'}
SAME = ('lr_decay_iters', 'sha256', 'tokenizer', 'device', 'torch', 'model.py')
# half a 95 % interval in standard errors, of 2, 3 ... 11 differences (Student's t)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def variant_of(seeds):
    """Of VARIANTS, by what shaped the run; seeds: {seed: its line of results.jsonl}."""
    shape = next(iter(seeds.values()))['shape']
    if shape['mlp'] == 'moe' and shape['factorised']:
        return 'moe factorised'
    if shape['mlp'] == 'moe' and shape['router'] == 'large':
        return 'moe large router'
    return 'aoe whole' if shape['mlp'] == 'aoe' and not shape['factorised'] else shape['mlp']


def setting_of(name, seeds):
    """What a run's name says besides its variant: 'aux' of 'aoe whole aux'."""
    return name.removeprefix(variant_of(seeds)).strip()


def order_of(name, seeds):
    """To sort runs by: settings, by size where they have numbers, and in each the variants."""
    parts = re.findall(r'\d+(?:\.\d+)?(?:e[+-]?\d+)?|\D+?(?=\d|$)', setting_of(name, seeds))
    key = [(1, float(part), '') if part[0].isdigit() else (0, 0, part) for part in parts]
    return key, VARIANTS.index(variant_of(seeds))


def may_be_compared(a, b):
    return a['iter'] == b['iter'] and all(a['shape'].get(key) == b['shape'].get(key)
                                          for key in SAME)


def settings_that_differ(a, b):
    a, b = a['shape'], b['shape']
    return sorted(key for key in (a | b).keys() - OF_VARIANT if a.get(key) != b.get(key))


def differences(results):
    """results: run name -> {seed: its line}. Returns run name -> (the name of its moe, settings
    that differ, losses minus that moe's seed by seed), for all that have one to compare with."""
    found = {}
    for name, seeds in results.items():
        near = []
        for base, others in results.items():
            pairs = [(seeds[seed], others[seed]) for seed in seeds
                     if seed in others and may_be_compared(seeds[seed], others[seed])]
            if pairs and variant_of(others) == 'moe' != variant_of(seeds):
                minus = [a['lowest_val_loss'] - b['lowest_val_loss'] for a, b in pairs]
                near.append((base, settings_that_differ(*pairs[0]), minus))
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
    assert 'aoe: no moe of its seeds, data, code, iterations and schedule' in printed


def test_what_is_no_results_file_is_refused(refuse):
    for file in ('none.jsonl', 'two_questions.py'):
        assert 'expected a results.jsonl' in refuse(main, os.path.join(ROOT, 'config', file))


def draw(results, found, file):
    """Of each variant the differences over its settings, with 95 % intervals; moe is 0."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout='constrained')
    axes.axhline(0, color='black', linewidth=1, label='moe')
    settings = list(dict.fromkeys(setting_of(name, results[name]) for name in found))
    for variant, color in zip(VARIANTS, COLORS):
        points = [(settings.index(setting_of(name, results[name])), minus)
                  for name, (_, _, minus) in found.items()
                  if variant_of(results[name]) == variant]
        if points:
            axes.errorbar([x for x, _ in points], [statistics.mean(d) for _, d in points],
                          yerr=[half_interval(d) if len(d) > 1 else 0 for _, d in points],
                          color=color, marker='o', capsize=4, label=variant)
    axes.set_xticks(range(len(settings)), [LABELS.get(setting, setting) for setting in settings])
    axes.set(ylabel="validation loss minus moe's (below 0: ahead)",
             title='Seed by seed: mean, 95 % interval')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper')
    save_figure(figure, file)


def read_results(file):
    """Run name -> {seed: its line}, in the order of a table."""
    try:
        lines, results = [json.loads(text) for text in read_text(file).splitlines()], {}
        for result in lines:
            results.setdefault(result['run'], {})[result['seed']] = result
        return dict(sorted(results.items(), key=lambda run: order_of(*run)))
    except (ValueError, KeyError, TypeError):
        return {}


def main(arguments):
    if not arguments or {'-h', '--help'} & set(arguments):
        return print(__doc__.strip())
    results = read_results(arguments[0])
    if not results:
        raise UserError(f'{arguments[0]}: expected a results.jsonl of this train.py, got another '
                        'file, or none')
    found = differences(results)
    rows = [('variant', 'seeds', 'validation loss', 'minus moe', 'seeds ahead',
             'Ent_load by layer', 'Ent_conf by layer', 'norms, max / min')]
    for name, seeds in results.items():
        minus, ahead = '-', '-'
        if name in found:
            values = found[name][2]
            mean, half = statistics.mean(values), half_interval(values)
            minus = f'{mean:+.4f}' + f' ± {half:.4f}' * (half < math.inf)
            minus = f'**{minus}**' if abs(mean) > half else minus
            ahead = f'{sum(d < 0 for d in values)} of {len(values)}'

        def by_layer(key, form, of_layer, seeds=seeds):
            layers = zip(*(filter(None, r[key]) for r in seeds.values()))   # moe has no norms
            return ' '.join(format(statistics.mean(map(of_layer, layer)), form)
                            for layer in layers) or '-'
        losses = [r['lowest_val_loss'] for r in seeds.values()]
        rows.append((name, str(len(seeds)), mean_and_spread(losses), minus, ahead,
                     by_layer('ent_load', '.2f', float), by_layer('ent_conf', '.2f', float),
                     by_layer('norm', '.2f', lambda norms: max(norms) / min(norms))))
    print_rows(rows)
    print("\nminus moe: mean ± half of a 95 % interval (Student's t), bold where it excludes 0. "
          'One in twenty does\nby chance: of ten rows without any difference, one or more would be '
          f'bold with a probability of 40 %,\nof these {len(found)} with '
          f'{1 - 0.95 ** len(found):.0%}')
    for name, seeds in results.items():
        if name in found and found[name][1]:
            base, differ, _ = found[name]
            print(f'{name}: minus {base}, which differs in {", ".join(differ)}')
        elif name not in found and variant_of(seeds) != 'moe':
            print(f'{name}: no moe of its seeds, data, code, iterations and schedule')
    if arguments[1:]:
        draw(results, found, arguments[1])


if __name__ == '__main__':
    configurator.run(main)
