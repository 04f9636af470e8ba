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
