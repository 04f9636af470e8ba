"""
Who is better than moe? Loss minus that of moe with the same seed, which has the same
batches: its mean with a 95 % interval, bold where that excludes 0.

    python tests/tools/compare.py out/quick_start
    python tests/tools/compare.py config/how_far/sizes.jsonl --by_setting=True
    python tests/tools/compare.py config/quick_start/results.jsonl --cell=aoe --percent=True
    python tests/tools/compare.py --forest=out/forest.png config/*/*.jsonl
    python tests/tools/compare.py --pages=True README.md config/*.md config/*/*.md

reads out_dirs of train.py, or their results.jsonl. Seeds are brought together where all
else that shaped them is equal; else what differs is part of the run's name. A run is
compared with the moe whose settings differ least from its own, on the same data, with the
same iterations and schedule; what differs is told below the table.

The last command writes the marked numbers of pages anew. A mark is a comment that ends
with <!-- end -->, and begins with the command that prints what is between: a table, or in
a sentence a single difference (--cell). A mark that begins with = has the keys alone, for
the files of the mark before it, or for files beside the page:

    <!-- python tests/tools/compare.py config/quick_start/results.jsonl -->
    | variant | ...
    <!-- end -->
    The paper's aoe ends <!-- = --cell=aoe --percent=True -->1.5 % worse (1.0 to
    2.0)<!-- end --> than moe.
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
from typing import Literal, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, expect, parse, read_text, write_text
from train import (COLOR_OF, group, losses_of, mean_and_spread, print_rows, pyplot, read_results,
                   save_figure)

# what makes a variant, and differs between a run and its moe without a word
OF_VARIANT = {'mlp', 'factorised', 'router', 'd_low', 'd_judge', 'seed', 'frozen', 'router_std',
              'score_scale', 'jitter', 'bias_step', 'virtual'}
# what may not differ, and what older train.py didn't write: where it is not known, it is not told
SAME = ('lr_decay_iters', 'sha256', 'tokenizer', 'train_tokens', 'val_tokens', 'device')
NEW = {'tokenizer', 'train_tokens', 'val_tokens', 'eval_interval', 'processor', 'model.py',
       'train.py'}
RATES = {'learning_rate', 'min_lr'}
LOSSES = {'lowest_val_loss': 'validation loss', 'val_loss': 'last validation loss',
          'test_loss': 'test loss'}
# half a 95 % interval in standard errors, of 2, 3 ... 11 differences (Student's t)
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)

# the rows of the forest plot, from above: results in config/, and which of their settings. Where
# two have a variant of the same row, the one with more seeds is drawn
ROWS = {
    ('who_scores/large_router.jsonl', ''): '2 of 8 experts, 96 wide',
    ('who_scores/large_router_xeon.jsonl', ''): 'the same, another kind of CPU',
    ('who_scores/in_float32.jsonl', ''): 'the same in float32',
    ('who_scores/norm.jsonl', 'bfloat16'): 'seeds 61 to 68',
    ('who_scores/norm.jsonl', 'float32'): 'seeds 61 to 68 in float32',
    ('who_scores/again.jsonl', 'bfloat16'): 'seeds 69 to 76',
    ('who_scores/again.jsonl', 'float32'): 'seeds 69 to 76 in float32',
    ('how_far/new_sizes.jsonl', '48'): '48 wide',
    ('how_far/sizes.jsonl', '48'): '48 wide',
    ('how_far/new_sizes.jsonl', '192'): '192 wide',
    ('how_far/sizes.jsonl', '192'): '192 wide',
    ('how_far/longer.jsonl', '4 of 16'): '4 of 16 experts',
    ('how_far/todays_shapes.jsonl', '4 of 32'): '4 of 32 experts',
    ('how_far/todays_shapes.jsonl', '3 of 12'): '3 of 12 small experts',
    ('how_far/longer.jsonl', 'long'): 'three times the tokens',
    ('how_far/longer.jsonl', 'code'): 'on Python code',
    ('quick_start/results.jsonl', ''): 'the quick start',
}
# the marked parts of pages: = or the command, its arguments, what it has printed
MARK = '<!-- (python tests/tools/compare.py|=)\\s'
MARKED = re.compile(f'({MARK}([^>]*?)-->)((?:(?!<!--).)*)<!-- end -->', re.S)


@dataclass
class CompareConfig:
    """The keys of this script."""
    # keys
    minus: str = 'moe'                   # the variant that the others are compared with
    loss: Literal[tuple(LOSSES)] = 'lowest_val_loss'   # which loss of a run is compared
    by_setting: bool = False             # a row for each setting, a column for each variant
    short: bool = False                  # no columns of entropies and norms
    losses: bool = False                 # with by_setting or cell: losses, and no differences
    table: bool = False                  # the file is a table of pilot.py or coder.py: print it
    cell: str | None = None              # print the difference of this run alone; several with
                                         # commas: their mean, seed by seed
    less: str | None = None              # with cell: minus the difference of this run
    percent: bool = False                # with cell: in percent of the loss that is subtracted
    forest: str | None = None            # draw better or worse than moe to this file, in percent
    pages: bool = False                  # the files are pages: write their marked numbers anew

    def __post_init__(self):
        expect(self, 'losses', 'False without --by_setting=True or --cell=',
               lambda losses: self.by_setting or self.cell or not losses)
        expect(self, 'percent', 'False without --cell=', lambda percent: self.cell or not percent)
        expect(self, 'less', 'None without --cell=', lambda less: self.cell or less is None)


# -----------------------------------------------------------------------------
# what is compared with what

def variant_of(seeds):
    """By what shaped the run: 'moe factorised'; seeds: {seed: result}."""
    recipe = next(iter(seeds.values()))['recipe']
    moe, whole = recipe['mlp'] == 'moe', not recipe['factorised']
    scale = recipe.get('score_scale', 1)                 # as all below it, of rivals.patch
    parts = {'aoe_whole' if recipe['mlp'] == 'aoe' and whole else recipe['mlp']: True,
             'factorised': moe and not whole, 'norm router': moe and recipe['router'] == 'norm',
             'large router': moe and recipe['router'] == 'large',
             'wide router': recipe.get('router_std'), f'x{scale:g}': scale != 1,
             'jitter': recipe.get('jitter'), 'frozen': recipe.get('frozen'),
             'sigmoid': recipe.get('bias_step'), 'virtual': recipe.get('virtual')}
    return ' '.join(part for part, there in parts.items() if there)


def setting_of(name, seeds):
    """What a run's name says besides its variant: 'aux' of 'aoe_whole aux'."""
    return name.removeprefix(variant_of(seeds)).strip()


def order_of(name, seeds):
    """To sort runs by: settings, by size where they have numbers, and in each the variants."""
    parts = re.findall(r'\d+(?:\.\d+)?(?:e[+-]?\d+)?|\D+?(?=\d|$)', setting_of(name, seeds))
    key = [(1, float(part), '') if part[0].isdigit() else (0, 0, part) for part in parts]
    factorised = next(iter(seeds.values()))['recipe']['factorised']
    variant = variant_of(seeds)
    return key, 'mad'.index(variant[0]), factorised, variant       # moe, aoe, dense


def has_diverged(seeds):
    return 'diverged' in next(iter(seeds.values()))


def read_runs(files, loss='lowest_val_loss'):
    """Run -> {seed: result}, of all files and folders, in the order of a table."""
    if not files:
        raise UserError('expected an out_dir or a results.jsonl, got none; --help has examples')
    results = []
    for file in files:
        for result in read_results(file):
            name, seeds = result['run'], {result['seed']: result}
            try:                                                   # what the tables need is there
                order_of(name, seeds), columns_of(seeds)
                if not (has_diverged(seeds) or math.isfinite(result[loss])):
                    raise ValueError(f'{loss} is {result[loss]}')
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f'{file}: expected results of train.py with a {loss}, got of '
                                f'{name!r} {error!r:.60}') from None
            results.append(result)
    return dict(sorted(group(results).items(), key=lambda run: order_of(*run)))


class Difference(NamedTuple):
    base: str                # the name of the moe that a run is compared with
    differ: list             # the settings that differ, besides those that make the variant
    minus: dict              # seed -> loss minus that of the base
    loss: float              # the mean loss of the base on these seeds


def differences(runs, base='moe', loss='lowest_val_loss'):
    """Run -> its Difference, for all that have a moe to compare with; base: another variant in its
    place. All seeds of a run have one recipe (train.group), so a pair tells what differs."""
    found = {}
    for name, seeds in runs.items():
        near = []
        for other, others in runs.items():
            pairs = {seed: (seeds[seed], others[seed]) for seed in seeds if seed in others}
            if not (variant_of(others) == base != variant_of(seeds) and pairs) or (
                    has_diverged(seeds) or has_diverged(others)):
                continue
            one, other_one = next(iter(pairs.values()))
            recipe, its = one['recipe'], other_one['recipe']
            unknown = NEW & (recipe.keys() ^ its.keys())
            differ = [key for key in sorted((recipe | its).keys() - OF_VARIANT - unknown)
                      if recipe.get(key) != its.get(key)]
            if one['iter'] == other_one['iter'] and not {*SAME} & {*differ}:
                minus = {seed: a[loss] - b[loss] for seed, (a, b) in pairs.items()}
                near.append(Difference(other, differ, minus,
                                       statistics.mean(b[loss] for _, b in pairs.values())))
        if near:
            found[name] = min(near, key=lambda candidate: len(candidate.differ))
    return found


def known(runs, key, name):
    """What a run's name stands for, in a dict of runs."""
    if name not in runs:
        raise UserError(f'{key}: expected one of {", ".join(runs)}, got {name!r}')
    return runs[name]


def combined(found, config):
    """The Difference of --cell. Of several runs it is their mean, seed by seed, minus --less."""
    names = config.cell.split(',')
    of = [known(found, 'cell', name) for name in names]
    if config.less:
        names.append(config.less)
        of.append(known(found, 'less', config.less))
    seeds = sorted(set.intersection(*(set(difference.minus) for difference in of)))
    if not seeds:
        raise UserError(f'cell: expected runs with a seed in common, got {", ".join(names)}')
    less = of.pop().minus if config.less else dict.fromkeys(seeds, 0)
    return Difference(of[0].base, [], {seed: statistics.mean(
        difference.minus[seed] for difference in of) - less[seed] for seed in seeds},
        statistics.mean(difference.loss for difference in of))


def half_interval(values):
    """Half a 95 % interval of their mean; a little too wide beyond the table of T_95."""
    if len(values) < 2:
        return math.inf
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


# -----------------------------------------------------------------------------
# tables, and single cells of them

def difference_of(values):
    mean, half = statistics.mean(values), half_interval(values)
    text = f'{mean:+.4f}' + f' ± {half:.4f}' * (half < math.inf)
    return f'**{text}**' if abs(mean) > half else text


def percent_of(difference):
    """The mean and the ends of the interval, in percent of the base's loss."""
    values = difference.minus.values()
    mean, half = statistics.mean(values), half_interval(values)
    return [100 * loss / difference.loss for loss in (mean, mean - half, mean + half)]


def in_words(difference):
    """'1.5 % worse (1.0 to 2.0)', or where the interval has 0 in it '0.2 % better (1.0 better to
    0.5 worse)'."""
    mean, low, high = percent_of(difference)
    text = f'{abs(mean):.1f} % ' + ('worse' if mean > 0 else 'better')
    if not math.isfinite(low):
        return text
    if low < 0 < high:
        return f'{text} ({-low:.1f} better to {high:.1f} worse)'
    near, far = sorted((abs(low), abs(high)))
    return f'{text} ({near:.1f} to {far:.1f})'


def loss_of(seeds, config):
    return 'diverged' if has_diverged(seeds) else mean_and_spread(losses_of(seeds, config.loss))


def by_layer(seeds, key, of_layer=float):
    """As text, for each layer the mean over seeds of what was logged under key."""
    layers = zip(*(filter(None, result[key]) for result in seeds.values()))    # moe has no norms
    return ' '.join(f'{statistics.mean(map(of_layer, layer)):.2f}' for layer in layers) or '-'


def spread_of(norms):
    return max(norms) / min(norms) if min(norms) else math.inf


def columns_of(seeds):
    return (by_layer(seeds, 'ent_load'), by_layer(seeds, 'ent_conf'),
            by_layer(seeds, 'norm', spread_of))


def rows_by_run(runs, found, config):
    yield ('variant', 'seeds', LOSSES[config.loss], f'minus {config.minus}', 'seeds better',
           *(() if config.short else ('Ent_load by layer', 'Ent_conf by layer',
                                      'norms, max / min')))
    for name, seeds in runs.items():
        minus, better = '-', '-'
        if name in found:
            values = found[name].minus.values()
            minus, better = difference_of(values), f'{sum(d < 0 for d in values)} of {len(values)}'
        yield (name, str(len(seeds)), loss_of(seeds, config), minus, better,
               *(() if config.short else columns_of(seeds)))


def rows_by_setting(runs, found, config):
    variants = list(dict.fromkeys(variant_of(seeds) for seeds in runs.values()))
    variants.sort(key=lambda variant: variant != config.minus)     # stable: the base first
    cells = {}                           # setting -> {variant: cell}
    for name, seeds in runs.items():
        variant, cell = variant_of(seeds), '-'
        if variant == config.minus or config.losses or has_diverged(seeds):
            cell = loss_of(seeds, config)
        elif name in found:
            cell = difference_of(found[name].minus.values())
        row = cells.setdefault(setting_of(name, seeds), {})
        row[variant] = f'{row[variant]} and {cell}' if variant in row else cell
    yield ('', *(variant if variant == config.minus or config.losses
                 else f'{variant}, minus {config.minus}' for variant in variants))
    for setting, row in cells.items():
        yield (setting or 'default', *(row.get(variant, '') for variant in variants))


def notes_of(runs, found, config):
    """Which runs are compared with what is not quite alike, or with nothing: lines of a list."""
    notes = {}                                           # what is to be said -> of which runs
    for name, seeds in runs.items():
        if name in found:
            differ = {*found[name].differ}
            if differ & RATES:
                notes.setdefault('with a learning rate of its own', []).append(name)
            if differ - RATES:
                note = (f'minus a run of {found[name].base} that differs in '
                        f'{", ".join(sorted(differ - RATES))}, too')
                notes.setdefault(note, []).append(name)
        elif variant_of(seeds) != config.minus and not has_diverged(seeds):
            note = f'no {config.minus} with the same seeds, data, iterations and schedule'
            notes.setdefault(note, []).append(name)
    return [f'- {", ".join(names)}: {note}' for note, names in notes.items()]


def print_table_of(file):
    """Print what pilot.py or coder.py has written: a row for each line, its cells by column."""
    try:
        rows = [json.loads(line) for line in read_text(file).splitlines()]
        print_rows([list(rows[0]), *(list(row.values()) for row in rows)])
    except (ValueError, TypeError, AttributeError, IndexError):
        raise UserError(f'{file}: expected a table of pilot.py or coder.py, got another file, or '
                        'none') from None


def compare(files, config):
    """Print a table and what is to be said of its runs, or a single cell. Returns how many
    differences are in it."""
    if config.table:
        for file in files:
            print_table_of(file)
        return 0
    runs = read_runs(files, config.loss)
    variants = {variant_of(seeds) for seeds in runs.values()}
    if config.minus not in variants and not config.losses:
        raise UserError(f'minus: expected one of {", ".join(sorted(variants))}, got '
                        f'{config.minus!r}')
    found = differences(runs, config.minus, config.loss)
    if config.cell and config.losses:
        print(loss_of(known(runs, 'cell', config.cell), config))
        return 0
    if config.cell:
        cell = combined(found, config)
        print(in_words(cell) if config.percent else
              difference_of(cell.minus.values()).strip('*'))
        return 0
    rows = rows_by_setting if config.by_setting else rows_by_run
    print_rows(list(rows(runs, found, config)))
    if config.losses:
        return 0
    if notes := notes_of(runs, found, config):
        print('\n' + '\n'.join(notes))
    return len(found)


# -----------------------------------------------------------------------------
# the forest plot, and pages

def forest_rows(files, config):
    """Label -> {variant: Difference}, of aoe and aoe_whole: for each of ROWS; or, where no file is
    in it, for each of their settings."""
    rows = {}
    where = {file: '/'.join(os.path.abspath(file).split(os.sep)[-2:]) for file in files}
    known = {file for file, _ in ROWS} & {*where.values()}
    for file in files:
        if known and where[file] not in known:
            continue                     # such as a table of coder.py
        runs = read_runs([file], config.loss)
        for name, difference in differences(runs, 'moe', config.loss).items():
            variant, setting = variant_of(runs[name]), setting_of(name, runs[name])
            label = ROWS.get((where[file], setting)) if known else f'{where[file]} {setting}'
            if label and variant in ('aoe', 'aoe_whole'):
                row = rows.setdefault(label, {})
                row[variant] = max(row.get(variant, difference), difference,
                                   key=lambda candidate: len(candidate.minus))
    if not rows:
        raise UserError('expected results of moe and of aoe on the same seeds, got none')
    return {label: rows[label] for label in sorted(rows, key=[*ROWS.values(), *rows].index)}


def draw_forest(rows, config):
    """The mean of each Difference in percent, with its 95 % interval and its number of seeds."""
    figure, axes = pyplot().subplots(figsize=(8, 1.6 + 0.45 * len(rows)), layout='constrained')
    axes.axvline(0, color='black', linewidth=1.5)
    for y, row in enumerate(rows.values()):
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color='#f2f2f2', zorder=0)
        for variant, difference in row.items():
            (mean, low, high), n = percent_of(difference), len(difference.minus)
            if n == 1:                                             # it has no interval
                low = high = mean
            at, color = y + (0.2 if variant == 'aoe' else -0.2), COLOR_OF[variant]
            axes.plot([low, high], [at, at], color=color, linewidth=2)
            axes.plot(mean, at, 'os'[variant == 'aoe'], color=color, markersize=7)
            axes.annotate(f'{n} seed' + 's' * (n > 1), (high, at), (5, 0), va='center',
                          textcoords='offset points', fontsize=8, color='#555555')
    for variant, marker, says in (('aoe_whole', 'o', 'aoe_whole: the gate is one matrix'),
                                  ('aoe', 's', 'aoe: the paper\'s, the gate is factorised')):
        axes.plot([], marker=marker, color=COLOR_OF[variant], label=says)
    figure.legend(ncols=2, loc='outside lower center', frameon=False)
    figure.suptitle('Is AoE better than MoE?', fontsize=14)
    for x, side, text in ((-6, 'right', '\u2190 better than MoE'), (6, 'left', 'worse \u2192')):
        axes.annotate(text, (0, -0.5), (x, 5), ha=side, textcoords='offset points', fontsize=12)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f'{LOSSES[config.loss]} minus that of MoE, in '
             'percent: mean, 95 % interval')
    axes.margins(x=0.12)
    save_figure(figure, config.forest)


def with_marked(page):
    """The text of a page with what stands between its marks written anew. Raises UserError."""
    text, files = read_text(page), []
    if not text:
        raise UserError(f'{page}: expected a page, got no file, or an empty one')

    def anew(match):
        nonlocal files
        mark, begin, arguments, was = match.groups()
        values, own = parse(CompareConfig, shlex.split(arguments), __doc__)
        if begin == '=':
            own = [os.path.join(os.path.dirname(page), file) for file in own]
        files, config = own or files, CompareConfig(**values)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            compare(files, config)
        now = printed.getvalue().strip()
        if config.cell:                                            # lines of prose may break in it
            now = was if was.split() == now.split() else now
        else:
            now = f'\n{now}\n' + '\n' * ('\n\n' in now)            # an empty line ends its list
        return f'{mark}{now}<!-- end -->'

    begun, marked = len(re.findall(MARK, text)), len(MARKED.findall(text))
    if not begun == marked == text.count('<!-- end -->'):
        raise UserError(f'{page}: expected marks, each with its <!-- end -->, got {begun} marks, '
                        f'{text.count("<!-- end -->")} ends and {marked} pairs of them')
    try:
        return MARKED.sub(anew, text)
    except UserError as error:
        raise UserError(f'{page}: {error}') from None


def main(arguments):
    values, files = parse(CompareConfig, arguments, __doc__)
    config = CompareConfig(**values)
    if config.pages:
        for page in files:
            write_text(page, with_marked(page))
    elif config.forest:
        draw_forest(forest_rows(files, config), config)
    elif n := compare(files, config):
        print(f'\nminus {config.minus}: mean ± half of a 95 % interval (Student\'s t), bold where '
              'it excludes 0. One\nin twenty does by chance: of ten rows without any difference, '
              'one or more would be bold\nwith a probability of 40 %, of these '
              f'{n} with {1 - 0.95 ** n:.0%}')


if __name__ == '__main__':
    configurator.run(main)
