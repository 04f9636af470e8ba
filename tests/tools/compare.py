"""
Which runs are better than moe? Each is compared, seed by seed, with the moe that had the same
batches: its loss minus that of moe, as a mean with a 95 % interval, bold where that excludes 0.

    python tests/tools/compare.py out/mine
    python tests/tools/compare.py config/how_far/sizes.jsonl --by_setting=True
    python tests/tools/compare.py config/quick_start/results.jsonl --cell=aoe --percent=True
    python tests/tools/compare.py config/quick_start/results.jsonl --forest=out/forest.png
    python tests/tools/compare.py --pages=True config/*/README.md

It reads out_dirs of train.py, and results.jsonl, in which a line is a result. The last command
writes the tables in pages anew, each between <!-- python tests/tools/compare.py FILES KEYS --> and
<!-- end -->. There a FILE without a / lies beside the page, another in the repository.
"""

import contextlib
import io
import itertools
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

from configurator import UserError, parse, read_text, run, write_text
from sample import (RATES, checked, colors_of, comparable, difference_as_text, differences, group,
                    interval, losses_of, mean_and_spread, notes_of, of_variant, print_rows,
                    read_results, save_figure, student, variant_of, what_differs)


@dataclass
class CompareConfig:
    """The keys of this script."""
    # the table
    minus: str | None = 'moe'            # the variant or run that is subtracted; None: losses alone
    loss: Literal['lowest_val_loss', 'val_loss', 'test_loss'] = 'lowest_val_loss'   # of a run
    by_setting: bool = False             # a row for each setting, a column for each variant
    short: bool = False                  # no columns of entropies and norms
    margin: float | None = None          # say whose interval lies within this of 0, on both sides
    holm: bool = False                   # say which differences survive Holm's correction at 5 %
    # in place of the table
    cell: str | None = None              # print the difference of this run alone
    percent: bool = False                # with cell: in words, in percent of the base's loss
    forest: str | None = None            # draw all differences to this .png, in percent
    pages: bool = False                  # the files are pages: write their marked tables anew


# -----------------------------------------------------------------------------
# runs

def read(files, config):
    """What is in files and folders: {run: {seed: result}}, as a table has them; the Differences."""
    results = []
    for file in files:
        results += read_lines(file) if os.path.isfile(file) else read_results(file)
    if not results:
        raise UserError('expected out_dirs or files of results, got none; --help has examples')
    for result in results:
        if 'diverged' not in result and not isinstance(result.get(config.loss), float):
            raise UserError(f'{result["from"]}: expected a result with a {config.loss}, got none')
    runs = dict(sorted(group(results).items(), key=lambda item: order_of(*item)))
    variants = sorted({variant_of(seeds) for seeds in runs.values()})
    # (a run that only is called moe isn't taken for moe)
    bases = of_variant(runs, config.minus) or [run for run in runs if run == config.minus != 'moe']
    if config.minus and not bases:
        raise UserError(f'minus: expected a run, or one of {", ".join(variants)}, got '
                        f'{config.minus!r}')
    for one, two in itertools.combinations(bases, 2):              # if only what is untold differs
        pair = [next(iter(runs[name].values())) for name in (one, two)]
        if comparable(*pair) and not what_differs(*pair):
            raise UserError(f'minus: expected a run, such as {one!r} or {two!r}, got '
                            f'{config.minus!r}, which both are')
    return runs, differences(runs, bases, config.loss)


def read_lines(file):
    """The results in a .jsonl, of which each line is one. Raises UserError."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        place = f'{file}, line {number}'
        try:
            result = checked(json.loads(line) | {'from': place})
            order_of(result['run'], {0: result})                   # what these need is there, too
            list(by_layer({0: result}))
        except Exception as error:       # a line can be wrong in many ways
            raise UserError(f'{place}: expected a result of train.py, got {error!r:.60}') from None
        yield result


def setting_of(name, seeds):
    """What a run's name says besides its variant: '3 of 12' of 'aoe 3 of 12 narrow'."""
    variant, *more = variant_of(seeds).split()                     # older names: 'moe large router'
    words = name.removeprefix(variant).split()
    return ' '.join(word for word in words if word not in (*more, 'router'))


def order_of(name, seeds):
    """To sort runs by: settings, by size where they have numbers, and in each the variants."""
    parts = re.findall(r'\d+(?:\.\d+)?(?:e-?\d+)?|\D+', setting_of(name, seeds))
    sizes = [(1, float(part), '') if part[0].isdecimal() else (0, 0, part) for part in parts]
    variant, *more = variant_of(seeds).split()
    return sizes, ('moe', 'aoe_whole', 'aoe', 'dense').index(variant), more


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
    diverged = 'diverged' in next(iter(seeds.values()))
    return 'diverged' if diverged else mean_and_spread(losses_of(seeds, config.loss))


def rows_by_run(runs, found, config):
    columns = 3 if config.minus is None else 5 if config.short else 8
    yield ('run', 'seeds', config.loss.replace('_', ' '), f'minus {config.minus}', 'seeds better',
           'Ent_load by layer', 'Ent_conf by layer', 'norms, max / min')[:columns]
    for name, seeds in runs.items():
        minus = found[name].minus.values() if name in found else ()
        yield (name, str(len(seeds)), loss_of(seeds, config), difference_as_text(found.get(name)),
               f'{sum(loss < 0 for loss in minus)} of {len(minus)}' if minus else '-',
               *by_layer(seeds))[:columns]


def rows_by_setting(runs, found, config):
    variants = sorted(dict.fromkeys(map(variant_of, runs.values())),           # the base first
                      key=lambda variant: variant != config.minus)
    yield ('', *(variant if config.minus in (None, variant) else f'{variant}, minus {config.minus}'
                 for variant in variants))
    rows = {}                            # setting -> {variant: cell}
    for name, seeds in runs.items():
        variant = variant_of(seeds)
        cell = (loss_of(seeds, config) if config.minus in (None, variant, name)
                else difference_as_text(found.get(name)))
        row = rows.setdefault(setting_of(name, seeds), {})
        row[variant] = f'{row[variant]} and {cell}' if variant in row else cell
    for setting, row in rows.items():
        yield (setting or 'default', *(row.get(variant, '') for variant in variants))


def print_comparison(runs, found, config):
    """Print a table of runs, and below it a list of what is to be said of them."""
    rows = rows_by_setting if config.by_setting else rows_by_run
    print_rows(list(rows(runs, found, config)))
    notes = notes_of(found)
    alone = [name for name, seeds in runs.items()
             if name not in found and config.minus not in (None, name, variant_of(seeds))]
    if alone:
        notes.append(f'{", ".join(alone)}: no {config.minus} with the same seeds, data, tokens and '
                     'windows')
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


def holm(found):
    """A line for each difference of several seeds. Of m such the smallest p counts m times, the
    next m - 1 times, and so on, up to the first that is then above 5 %."""
    p_of = {name: p_value(list(difference.minus.values()))
            for name, difference in found.items() if len(difference.minus) > 1}
    survives = True
    for i, name in enumerate(sorted(p_of, key=p_of.get)):
        survives = survives and (len(p_of) - i) * p_of[name] <= 0.05
        p = f'{p_of[name]:.2g}' if p_of[name] > 1e-9 else 'below 1e-9'         # a sum, to 1e-12
        yield f"{name}: p {p}, {'survives' if survives else 'fails'} Holm's correction"


def cell_of(found, config):
    """The text of --cell. Raises UserError where a number alone would hide what differs."""
    if config.cell not in found:
        known = ', '.join(found) or 'no run'
        raise UserError(f'cell: expected one of {known}, got {config.cell!r}')
    difference = found[config.cell]
    if differ := difference.differ - RATES:
        raise UserError(f'cell: expected a {config.minus} like {config.cell!r} in all but rates, '
                        f'got {difference.base!r}, which differs in {", ".join(sorted(differ))}')
    return in_words(difference) if config.percent else difference_as_text(difference).strip('*')


def in_words(difference):
    """'1.5 % worse (95 %: 1.0 to 2.0)', or where the interval has 0 in it "can't tell: ..."."""
    mean, half = interval(difference, difference.base_loss / 100)
    told = f'{abs(mean):.1f} % {"worse" if mean > 0 else "better"}'
    if abs(mean) > half:
        return f'{told} (95 %: {abs(mean) - half:.1f} to {abs(mean) + half:.1f})'
    ends = f'95 %: {half - mean:.1f} better to {half + mean:.1f} worse'
    return f"can't tell: {told} ({ends if half < math.inf else 'one seed'})"


def draw_forest(runs, found, config):
    """A row for each difference: its mean, its 95 % interval; a * where more than rates differ."""
    from matplotlib.figure import Figure
    if not found:
        raise UserError(f'forest: expected runs to compare with {config.minus}, got none')
    starred = {name: difference for name, difference in found.items() if difference.differ - RATES}
    color = colors_of(dict.fromkeys(map(variant_of, runs.values())))
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(found)), layout='constrained')
    axes = figure.subplots()
    axes.axvline(0, color='black')
    for y, (name, difference) in enumerate(found.items()):
        mean, half = interval(difference, difference.base_loss / 100)
        n = len(difference.minus)
        axes.errorbar(mean, y, xerr=half if n > 1 else 0, marker='o', markersize=9, linewidth=3,
                      color=color[variant_of(runs[name])])
        axes.annotate(f'{n} seed' + 's' * (n > 1), (1.01, y), xycoords=('axes fraction', 'data'),
                      va='center', fontsize=12)
    labels = [textwrap.fill('* ' * (name in starred) + name, 34, max_lines=2) for name in found]
    axes.set_yticks(range(len(labels)), labels, fontsize=12)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(f'Better (left) or worse (right) than {config.minus}, in percent', fontsize=14)
    figure.supxlabel('\n'.join([
        f'{config.loss.replace("_", " ")} minus that of {config.minus}: mean and 95 % interval',
        *(textwrap.fill(f'* {note}', 90) for note in notes_of(starred))]), fontsize=12)
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
        if {'cell', 'forest', 'pages'} & {*given}:
            raise UserError(f'expected keys of a table, got {match[2]}')
        folders = (ROOT if '/' in file else os.path.dirname(page) for file in files)
        config, printed = CompareConfig(**given), io.StringIO()
        with contextlib.redirect_stdout(printed):
            print_comparison(*read(map(os.path.join, folders, files), config), config)
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
    if config.pages:
        if not files:
            raise UserError('pages: expected the paths of pages, got none')
        for page in files:
            write_text(page, with_marked(page))
        return
    runs, found = read(files, config)
    if config.forest:
        draw_forest(runs, found, config)
    elif config.cell:
        print(cell_of(found, config))
    else:
        print_comparison(runs, found, config)
        if found:
            print('\nbold: the 95 % interval excludes 0; by chance one in 20 does, see --holm=True')


if __name__ == '__main__':
    run(main)
