"""
Who is ahead of moe? Loss minus that of moe with the same seed, which has the same
batches, so that much of the noise is in both: its mean and its standard error,
bold beyond two of them.

    python tests/test_minus_moe.py config/two_questions_results.jsonl
    python tests/test_minus_moe.py config/sizes_results.jsonl out/sizes.png

reads what train.py left in an out_dir's results.jsonl. `aoe whole 96` is compared
with `moe 96` where there is one, or else with `moe`: of all moe runs with the one
that shares most words. The picture has these words along x.
"""

import json
import math
import os
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


def parts_of(name):
    """A run's name as (variant, setting): 'aoe whole 96' is ('aoe whole', '96')."""
    known = [variant for variant in VARIANTS if f'{name} '.startswith(f'{variant} ')]
    if not known:
        raise UserError(f'expected runs called {", ".join(VARIANTS)}, and a setting, got {name!r}')
    variant = max(known, key=len)
    return variant, name[len(variant):].strip()


def order_of(name):
    """To sort names by: settings, by size where they are numbers, and in each the variants."""
    variant, setting = parts_of(name)
    try:
        number = float(setting)
    except ValueError:
        number = -math.inf
    return number, setting, VARIANTS.index(variant)


def differences(losses):
    """losses: run name -> {seed: loss}. Returns run name -> its losses minus moe's, seed by seed,
    for all that have a moe to compare with."""
    found = {}
    for name, of_seed in losses.items():
        words = name.split()
        bases = [other for other in losses if parts_of(other)[0] == 'moe'
                 and set(other.split()[1:]) <= set(words)]
        if parts_of(name)[0] != 'moe' and bases:
            base = losses[max(bases, key=len)]
            found[name] = [of_seed[seed] - base[seed] for seed in of_seed if seed in base]
    return found


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def test_a_run_is_compared_with_moe_seed_by_seed():
    losses = {'moe': {1: 1.0, 2: 2.0, 3: 3.0}, 'moe aux': {1: 1.5, 2: 2.5, 3: 3.5},
              'aoe': {1: 1.1, 2: 2.2, 3: 3.3}, 'aoe whole aux': {1: 1.4, 2: 2.4},
              'aoe whole 64': {3: 2.0}, 'aoe 8 aux': {1: 1.6}}
    found = differences(losses)
    assert set(found) == {'aoe', 'aoe whole aux', 'aoe whole 64', 'aoe 8 aux'}
    np.testing.assert_allclose(found['aoe'], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(found['aoe whole aux'], [-0.1, -0.1])           # minus moe aux
    np.testing.assert_allclose(found['aoe 8 aux'], [0.1])          # likewise
    np.testing.assert_allclose(found['aoe whole 64'], [-1.0])      # minus moe, for want of moe 64
    np.testing.assert_allclose(standard_error([0.1, 0.2, 0.3]), 0.1 / math.sqrt(3))
    assert sorted(['aoe 1e-3', 'moe 1e-3', 'aoe 16', 'aoe 8', 'aoe aux', 'moe'], key=order_of) == [
        'moe', 'aoe aux', 'moe 1e-3', 'aoe 1e-3', 'aoe 8', 'aoe 16']


def test_what_is_no_results_file_is_refused(refuse):
    for file in ('none.jsonl', 'two_questions.py'):
        assert 'expected a results.jsonl' in refuse(main, os.path.join(ROOT, 'config', file))


def draw(found, file):
    """Of each variant the differences over its settings, with standard errors; moe is 0."""
    settings = list(dict.fromkeys(parts_of(name)[1] for name in sorted(found, key=order_of)))
    figure, axes = pyplot().subplots(figsize=(7, 4), layout='constrained')
    axes.axhline(0, color='black', linewidth=1, label='moe')
    for variant, color in zip(VARIANTS, COLORS):
        points = [(settings.index(setting), found[f'{variant} {setting}'.strip()])
                  for setting in settings if f'{variant} {setting}'.strip() in found]
        if points:
            axes.errorbar([x for x, _ in points], [statistics.mean(d) for _, d in points],
                          yerr=[standard_error(d) for _, d in points], color=color, marker='o',
                          capsize=4, label=variant)
    axes.set_xticks(range(len(settings)), [LABELS.get(setting, setting) for setting in settings])
    axes.set(ylabel="validation loss minus moe's (below 0: ahead)",
             title='Seed by seed: mean, standard error')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper')
    save_figure(figure, file)


def main(files):
    if not files:
        raise UserError('expected a results.jsonl that train.py wrote, got none')
    try:
        results = [json.loads(line) for line in read_text(files[0]).splitlines()]
        results = {name: {r['seed']: r for r in results if r['run'] == name}
                   for name in sorted({r['run'] for r in results}, key=order_of)}
    except (ValueError, KeyError, TypeError):
        results = {}
    if not results:
        raise UserError(f'{files[0]}: expected a results.jsonl that train.py wrote, got another '
                        'file, or none')
    losses = {name: {seed: r['lowest_val_loss'] for seed, r in of_seed.items()}
              for name, of_seed in results.items()}
    found = differences(losses)
    rows = [('variant', 'seeds', 'validation loss', 'minus moe', 'seeds ahead',
             'Ent_load by layer', 'Ent_conf by layer', 'norms, max / min')]
    for name, of_seed in results.items():
        minus, ahead = '-', '-'
        if name in found:
            mean, error = statistics.mean(found[name]), standard_error(found[name])
            minus = f'{mean:+.4f}' + f' ± {error:.4f}' * (error < math.inf)
            minus = f'**{minus}**' if abs(mean) > 2 * error else minus
            ahead = f'{sum(d < 0 for d in found[name])} of {len(found[name])}'

        def by_layer(key, form, of_layer, of_seed=of_seed):
            layers = zip(*(filter(None, r[key]) for r in of_seed.values()))   # moe has no norms
            return ' '.join(format(statistics.mean(map(of_layer, layer)), form)
                            for layer in layers) or '-'
        rows.append((name, str(len(of_seed)), mean_and_spread(losses[name].values()), minus, ahead,
                     by_layer('ent_load', '.2f', float), by_layer('ent_conf', '.2f', float),
                     by_layer('norm', '.2f', lambda norms: max(norms) / min(norms))))
    print_rows(rows)
    if files[1:]:
        draw(found, files[1])


if __name__ == '__main__':
    configurator.run(main)
