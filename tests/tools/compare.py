"""
Which runs are better than moe? Each is compared, seed by seed, with the moe that had the same
batches: its loss minus that of moe, as a mean with a 95 % interval, bold where that excludes 0.

    python tests/tools/compare.py out/mine
    python tests/tools/compare.py out/mine --save=config/mine.jsonl
    python tests/tools/compare.py config/quick_start/results.jsonl --cell=aoe --percent=True
    python tests/tools/compare.py config/quick_start/results.jsonl --forest=out/forest.png
    python tests/tools/compare.py out/mine --effect="gate: aoe - aoe_whole"
    python tests/tools/compare.py --pages=True config/*/README.md

It reads out_dirs of train.py, and what --save has written: a .jsonl in which a line is a result.
Several together are one table, so an experiment may run in blocks. The last command writes the
tables in pages anew, each between <!-- python tests/tools/compare.py FILES KEYS --> and
<!-- end -->. There a FILE without a / lies beside the page, another in the repository.
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
import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, as_lines, parse, read_text, run, write_text
from sample import (AGREE, OF_THE_MLP, Difference, checked, colors_of, difference_as_text,
                    differences, differing, first_of, group, interval, losses_of, mean_and_spread,
                    notes_of, print_rows, read_results, save_figure, student)


@dataclass
class CompareConfig:
    """The keys of this script."""
    # the table
    minus: str | None = 'moe'            # the run that is subtracted; None: losses alone
    effect: str | None = None            # in place of minus: runs with + and -, see effects_of
    loss: Literal['lowest_val_loss', 'val_loss', 'test_loss'] = 'lowest_val_loss'   # of a run
    short: bool = False                  # no columns of entropies and norms
    margin: float | None = None          # say whose interval lies within this of 0, on both sides
    holm: bool = False                   # say which differences survive Holm's correction at 5 %
    # in place of the table
    cell: str | None = None              # print the difference of this run alone
    percent: bool = False                # with cell: in words, in percent of the base's loss
    forest: str | None = None            # draw all differences to this .png, in percent
    save: str | None = None              # write all results to this .jsonl, a line for each
    pages: bool = False                  # the files are pages: write their marked tables anew


# -----------------------------------------------------------------------------
# runs

def read(files, config):
    """The results in files and folders; by run, as a table has them; their Differences."""
    results = []
    for file in files:
        results += read_lines(file) if os.path.isfile(file) else read_results(file)
    if not results:
        raise UserError('expected out_dirs or files of results, got none; --help has examples')
    for result in results:
        if 'diverged' not in result and config.loss not in result:
            raise UserError(f'loss: expected results with a {config.loss}, got one of '
                            f'{result["run"]} without')
    runs = group(results)
    if config.effect:
        return results, runs, effects_of(runs, config)
    found = differences(runs, config.minus, config.loss) if config.minus else {}
    if config.minus and not found and not config.save:
        raise UserError(f'minus: expected one of {", ".join(runs)} that others can be compared '
                        f'with, got {config.minus!r}')
    return results, runs, found


def effects_of(runs, config):
    """The effects that config.effect asks for, as Differences: the mean loss of the runs with +
    minus the mean of those with -, seed by seed. Each may have a name, and ; is between two:

        who scores: aoe_whole + aoe - moe - moe_factorised; aoe_narrow - aoe

    Raises UserError."""
    found = {}
    for text in config.effect.split(';'):
        name, _, terms = text.rpartition(':')
        words = re.split(r'\s([+-])\s', f' + {terms.strip()}')[1:]
        sides = {'+': [], '-': []}
        for sign, word in zip(words[::2], words[1::2]):
            called = [run for run in runs if run == word or run.startswith(f'{word} (')]
            if len(called) != 1:
                raise UserError(f'effect: expected names of {", ".join(runs):.200}, each of one '
                                f'run, got {word!r} in {terms.strip()!r}')
            sides[sign] += called
        used = [runs[run] for run in sides['+'] + sides['-']]
        if not sides['-']:
            raise UserError(f'effect: expected runs with + and -, got {terms.strip()!r}')
        recipes = [first_of(seeds)['recipe'] | {'iter': first_of(seeds)['iter']} for seeds in used]
        differ = differing(recipes) - OF_THE_MLP - {'seed'}
        # a longer run may be meant, but none that was stopped
        stopped = 'iter' in differ and any(recipe['iter'] != recipe.get('lr_decay_iters')
                                           for recipe in recipes)
        seeds = sorted(set.intersection(*map(set, used)))
        if (not seeds or stopped or differ & {*AGREE}
                or any('diverged' in first_of(of_run) for of_run in used)):
            raise UserError('effect: expected runs of one text, with the same windows and seeds, '
                            f'that have ended, got {terms.strip()}')
        mean = {sign: {seed: statistics.mean(runs[run][seed][config.loss] for run in side)
                       for seed in seeds} for sign, side in sides.items()}
        found[name.strip() or terms.strip()] = Difference(
            ', '.join(sides['-']), sorted(differ),
            {seed: mean['+'][seed] - mean['-'][seed] for seed in seeds},
            statistics.mean(mean['-'].values()), sorted(set.union(*map(set, used)) - {*seeds}))
    return found


def read_lines(file):
    """The results in a .jsonl, of which each line is one. Raises UserError."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            result = checked(json.loads(line))
            list(by_layer({0: result}))                            # what this needs is there, too
        except Exception as error:       # a line can be wrong in many ways
            raise UserError(f'{file}, line {number}: expected a result of train.py, got '
                            f'{error!r:.60}') from None
        yield result


def save(results, path):
    """Write results as a .jsonl, without what tables don't need; each run and seed once."""
    lines = {}
    for result in results:
        line = as_lines([{key: value for key, value in result.items()
                          if key not in ('log', 'class_load')}])
        lines[line] = None
    write_text(path, ''.join(lines))


# -----------------------------------------------------------------------------
# tables, a single cell, the forest plot, pages

def by_layer(seeds):
    """As text, of Ent_load, Ent_conf and the spread of norms: for each layer the mean of seeds."""
    measures = {'ent_load': float, 'ent_conf': float,
                'norm': lambda norms: max(norms) / min(norms) if min(norms) else math.inf}
    for key, measure in measures.items():
        # the layers of moe have no norms: they are [], or aren't there
        layers = zip(*([of for of in result[key] if of != []] for result in seeds.values()))
        yield ' '.join(f'{statistics.mean(map(measure, layer)):.2f}' for layer in layers) or '-'


def loss_of(seeds, config):
    diverged = 'diverged' in first_of(seeds)
    return 'diverged' if diverged else mean_and_spread(losses_of(seeds, config.loss))


def rows_of(runs, found, config):
    columns = 3 if config.minus is None else 5 if config.short else 8
    yield ('run', 'seeds', config.loss.replace('_', ' '), f'minus {config.minus}', 'seeds better',
           'Ent_load by layer', 'Ent_conf by layer', 'norms, max / min')[:columns]
    for name, seeds in sorted(runs.items(), key=lambda run: run[0] in found):  # first the bases
        minus = found[name].minus.values() if name in found else ()
        yield (name, str(len(seeds)), loss_of(seeds, config), difference_as_text(found.get(name)),
               f'{sum(loss < 0 for loss in minus)} of {len(minus)}' if minus else '-',
               *by_layer(seeds))[:columns]


def rows_of_effects(found, config):
    loss = config.loss.replace('_', ' ')
    yield 'effect', 'seeds', f'in {loss}', 'in percent', 'seeds better', 'p'
    for name, difference in found.items():
        minus = list(difference.minus.values())
        yield (name, str(len(minus)), difference_as_text(difference),
               in_words(difference, config.margin),
               f'{sum(loss < 0 for loss in minus)} of {len(minus)}',
               p_as_text(p_value(minus)) if len(minus) > 1 else '-')


def print_comparison(runs, found, config):
    """Print a table of runs or of effects, and below it a list of what is to be said of them."""
    print_rows(list(rows_of_effects(found, config) if config.effect
                    else rows_of(runs, found, config)))
    notes = list(notes_of(found))
    if config.margin:
        level = [name for name in found if sum(map(abs, interval(found[name]))) <= config.margin]
        notes.append(f'within ± {config.margin:g} (level): {", ".join(level) or "none"}')
    if config.holm:
        notes += holm(found)
    if notes:
        print('\n' + '\n'.join(f'- {note}' for note in notes))


def p_value(values):
    """The two-sided p of their mean, by Student's t."""
    n, mean = len(values), abs(statistics.mean(values))
    angle, within = student(n)
    here = math.atan2(mean, statistics.stdev(values) * math.sqrt((n - 1) / n))
    return 1 - np.interp(here, angle, within)


def p_as_text(p):
    return f'{p:.2g}' if p > 1e-9 else 'below 1e-9'                # it is a sum, to 1e-12


def holm(found):
    """A line for each difference of several seeds. Of m such the smallest p counts m times, the
    next m - 1 times, and so on, up to the first that is then above 5 %."""
    p_of = {name: p_value(list(difference.minus.values()))
            for name, difference in found.items() if len(difference.minus) > 1}
    survives = True
    for i, name in enumerate(sorted(p_of, key=p_of.get)):
        survives = survives and (len(p_of) - i) * p_of[name] <= 0.05
        yield (f"{name}: p {p_as_text(p_of[name])}, {'survives' if survives else 'fails'} Holm's "
               'correction')


def cell_of(found, config):
    """The text of --cell. Raises UserError where there is none."""
    if config.cell not in found:
        known = ', '.join(found) or 'no run'
        raise UserError(f'cell: expected one of {known}, got {config.cell!r}')
    difference = found[config.cell]
    if config.percent:
        return in_words(difference, config.margin)
    return difference_as_text(difference).strip('*')


def in_words(difference, margin=None):
    """'1.5 % worse (95 %: 1.0 to 2.0)', or where the interval has 0 in it "can't tell: ..."; where
    it lies within ± margin (nats) 'level: ...'."""
    mean, half = (100 * loss / difference.base_loss for loss in interval(difference))
    told = f'{abs(mean):.1f} % {"worse" if mean > 0 else "better"}'
    if abs(mean) > half:
        return f'{told} (95 %: {abs(mean) - half:.1f} to {abs(mean) + half:.1f})'
    ends = f'95 %: {half - mean:.1f} better to {half + mean:.1f} worse'
    level = margin and sum(map(abs, interval(difference))) <= margin
    verdict = 'level' if level else "can't tell"
    return f'{verdict}: {told} ({ends if half < math.inf else "one seed"})'


def draw_forest(runs, found, config):
    """A row for each difference: its mean, and its 95 % interval."""
    from matplotlib.figure import Figure
    if not found:
        raise UserError(f'forest: expected runs to compare with {config.minus}, got none')
    color = colors_of(runs)
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(found)), layout='constrained')
    axes = figure.subplots()
    axes.axvline(0, color='black')
    for y, (name, difference) in enumerate(found.items()):
        mean, half = (100 * loss / difference.base_loss for loss in interval(difference))
        n = len(difference.minus)
        axes.errorbar(mean, y, xerr=half if n > 1 else 0, marker='o', markersize=9, linewidth=3,
                      color=color.get(name, 'black'))              # an effect is no run
        axes.annotate(f'{n} seed' + 's' * (n > 1), (1.01, y), xycoords=('axes fraction', 'data'),
                      va='center', fontsize=12)
    labels = [textwrap.fill(name, 34, max_lines=2) for name in found]
    axes.set_yticks(range(len(labels)), labels, fontsize=12)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    of = 'effects' if config.effect else f'minus that of {config.minus}'
    than = '' if config.effect else f' than {config.minus}'
    axes.set_title(f'Better (left) or worse (right){than}, in percent', fontsize=14)
    differ = sorted({key for difference in found.values() for key in difference.differ})
    figure.supxlabel('\n'.join([
        f'{config.loss.replace("_", " ")}, {of}: mean and 95 % interval',
        *([f'runs differ in {", ".join(differ)}, too'] if differ else [])]), fontsize=12)
    save_figure(figure, config.forest)


MARK, END = '<!-- python tests/tools/compare.py', '<!-- end -->'
# a first line, with the command's words; then text without another comment; then the end
MARKED = re.compile(f'^({MARK} ([^>\\n]*)-->\n)(?:(?!<!--).)*{END}', re.S | re.M)


def with_marked(page):
    """The text of a page with what stands between its marks written anew. Raises UserError."""
    def anew(match):
        try:
            given, files = parse(CompareConfig, shlex.split(match[2]), __doc__)
        except ValueError as error:      # a quote that isn't closed, or a UserError
            raise UserError(str(error)) from None
        if {'cell', 'forest', 'save', 'pages'} & {*given}:
            raise UserError(f'expected keys of a table, got {match[2]}')
        folders = (ROOT if '/' in file else os.path.dirname(page) for file in files)
        config, printed = CompareConfig(**given), io.StringIO()
        with contextlib.redirect_stdout(printed):
            print_comparison(*read(map(os.path.join, folders, files), config)[1:], config)
        return f'{match[1]}{printed.getvalue()}{END}'

    text = read_text(page) if os.path.isfile(page) else ''
    marks, ends, pairs = text.count(MARK), text.count(END), len(MARKED.findall(text))
    if not text or not marks == ends == pairs:
        raise UserError(f'{page}: expected a page of marks, each with its {END}, got {marks} marks '
                        f'and {ends} ends, of which {pairs} are pairs')
    try:
        return MARKED.sub(anew, text)
    except UserError as error:
        raise UserError(f'{page}: {error}') from None


def main(arguments):
    given, files = parse(CompareConfig, arguments, __doc__)
    config = CompareConfig(**given)
    if config.forest and not config.forest.endswith('.png'):
        raise UserError(f'forest: expected the name of a .png, got {config.forest}')
    if config.pages:
        if not files:
            raise UserError('pages: expected the paths of pages, got none')
        for page in files:
            write_text(page, with_marked(page))
        return
    results, runs, found = read(files, config)
    if config.save:
        save(results, config.save)
    elif config.forest:
        draw_forest(runs, found, config)
    elif config.cell:
        print(cell_of(found, config), *notes_of({config.cell: found[config.cell]}), sep='; ')
    else:
        print_comparison(runs, found, config)
        if found:
            print('\nbold: the 95 % interval excludes 0; by chance one in 20 does, see --holm=True')


if __name__ == '__main__':
    run(main)
