"""
Look at what train.py has left behind. Of one run: a text that its model writes.

    python sample.py out/quick_start/aoe
    python sample.py out/quick_start/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/quick_start/aoe --show_experts=True --layer=2

--show_experts=True colours each token by its first expert, which has the largest weight. It also
writes experts.html beside best.pt, for a browser: all layers, what stands out in them, and for the
token that you point at the scores of all experts. Of a folder of runs: their table and pictures,
as at the end of train.py.

    python sample.py out/quick_start
"""

import contextlib
import json
import math
import os
import re
import statistics
from dataclasses import dataclass, fields
from html import escape
from typing import NamedTuple

import numpy as np
import torch

from configurator import (UserError, choose_device, expect, parse, read_text, replacing, run,
                          write_text)
from model import GPT, GPTConfig
from prepare_data import tokenizer_from


@dataclass
class SampleConfig:
    """The keys of this script."""
    # text
    prompt: str = '\n'                   # the text to go on from
    num_samples: int = 1                 # texts to write
    max_new_tokens: int = 500            # length of each, in tokens
    temperature: float = 0.8             # below 1: safer, above: wilder, 0: always the likeliest
    vocab_top_k: int | None = None       # draw from that many likeliest tokens only; None: from all
    seed: int = 1337                     # the same seed draws the same texts
    # experts
    show_experts: bool = False           # show which expert took each token, and write experts.html
    layer: int = 1                       # the layer to show, from 1
    # machine
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    data_dir: str = 'data'               # where gpt2's tokenizer file lies

    def __post_init__(self):
        expect(self, ('num_samples', 'max_new_tokens', 'vocab_top_k', 'layer'),
               'a positive number', lambda n: n > 0)
        expect(self, 'seed', '0 or more and below 2^62', lambda seed: 0 <= seed < 2**62)
        expect(self, 'temperature', '0, or 0.001 or more', lambda t: t == 0 or t >= 0.001)
        expect(self, 'prompt', 'at least one character', lambda prompt: prompt)


# -----------------------------------------------------------------------------
# Part 1: a run's files, and its model

def load_checkpoint(path, device, mmap=False):
    """What train.py has saved as ckpt.pt or best.pt. Nothing in the file can run code. mmap: read
    from the disk only what is looked at. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f'expected a checkpoint, got no file {path}; train one with train.py')
    type_of = {'model': dict, 'meta': dict, 'recipe': dict}        # what both files hold
    if os.path.basename(path) != 'best.pt':
        type_of |= {'optimizer': dict, 'scaler': dict, 'iter': int, 'seconds': float, 'log': list}
    with contextlib.suppress(Exception):                           # a file is damaged in many ways
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if (all(isinstance(checkpoint[key], type_of[key]) for key in type_of)
                and all(isinstance(entry['iter'], int) and math.isfinite(entry['val_loss'])
                        for entry in checkpoint.get('log', ()))):
            return checkpoint
    raise UserError(f'{path}: expected a checkpoint of this train.py, got a damaged or foreign '
                    'file; --name= trains anew, beside it')


def load_states(checkpoint, path, **parts):
    """Give the model, and maybe optimizer and scaler, the state that is in the checkpoint."""
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path}: expected the {name} of a run with these keys and this '
                            'model.py, got another; train anew with --name=') from None


def load_model(folder, device):
    """The best model of the run in folder, its tokenizer's meta, and the dtype it trained in."""
    path = os.path.join(folder, 'best.pt')
    checkpoint = load_checkpoint(path, device)
    recipe, meta = checkpoint['recipe'], checkpoint['meta']
    keys = {field.name for field in fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{key: recipe[key] for key in keys & recipe.keys()}))
        dtype = getattr(torch, recipe['dtype'])
        if meta['tokenizer'] != 'gpt2' and not isinstance(meta['vocabulary'], str):
            raise ValueError('a tokenizer without a vocabulary')
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: expected a model of this model.py, got {error!r:.80}') from None
    load_states(checkpoint, path, model=model)
    return model.eval().to(device), meta, dtype


def read_log(folder):
    """The evaluations of a run, oldest first. Raises UserError for a damaged log.jsonl."""
    path = os.path.join(folder, 'log.jsonl')
    try:
        log = [json.loads(line) for line in read_text(path).splitlines()]
        if not all(math.isfinite(entry['val_loss']) for entry in log):
            raise ValueError('a loss that is not finite')
        return log
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{path}: expected a line for each evaluation, got {error!r:.60}') from None


def is_run_name(name):
    """Whether a run can be called so. Its name is that of a folder in out_dir; of a row in tables,
    where | ends a cell and (...) says what differs; and of a line in matplotlib's legend, where $
    begins mathematics and a first _ hides it."""
    return (isinstance(name, str) and re.fullmatch(r'(?!_)\w[\w .,=+%-]*', name) is not None
            and not name.endswith((' ', '.', '.jsonl', '.png')))


# -----------------------------------------------------------------------------
# Part 2: which expert took which token

CLASSES = ('letters', 'capitals', 'spaces', 'line ends', 'other')  # of characters


def class_of(character):
    """The place in CLASSES of a character; digits and punctuation are others."""
    if character.isalpha():
        return CLASSES.index('capitals' if character.isupper() else 'letters')
    if character in '\r\n':
        return CLASSES.index('line ends')
    return CLASSES.index('spaces' if character.isspace() else 'other')


# a colour for each of eight experts, on which black letters can be read
PALETTE = ['#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#DDDDDD', '#44BB99', '#BBCC33', '#BB99DD']
LINE_END = '\u00b6'                      # a line end is a token, too, and drawn as this


@torch.no_grad()
def watch_experts(model, tokens):
    """All experts' scores and weights (L, S, E) for tokens (S,); an expert that isn't chosen weighs
    0. As in training they are read in windows of block_size, of which the first token has no
    context. (When generate drew them, each had more.)"""
    windows = [model(window[None])[2][:3] for window in tokens.split(model.config.block_size)]
    scores, chosen, weights = (torch.cat(parts, dim=1) for parts in zip(*windows))
    return scores, torch.zeros_like(scores).scatter_add(2, chosen.clamp(min=0), weights)


def first_expert(weights):
    """The expert with the largest of a token's weights; None where nobody handles it."""
    return max(range(len(weights)), key=weights.__getitem__) if any(weights) else None


def color_text(texts, experts):
    """For a terminal: the texts of tokens, each on the colour of its expert."""
    def paint(text, expert):
        if expert is None:                                         # nobody handles the token
            return text
        red, green, blue = bytes.fromhex(PALETTE[expert % 8][1:])
        return f'\033[48;2;{red};{green};{blue};30m{text}\033[0m'  # 48;2: a background; 30: black
    legend = ' '.join(paint(f' {expert} ', expert) for expert in sorted({*experts} - {None}))
    painted = (paint(text.replace('\n', LINE_END), expert) + '\n' * text.count('\n')
               for text, expert in zip(texts, experts))
    return f'expert {legend}   {LINE_END} line end\n\n{"".join(painted)}'


def stand_outs(evaluation):
    """What stands out in an evaluation of log.jsonl: for each layer the experts that handle more of
    a class of characters than of all, by 25 points or more: [(expert, text), ...], such as
    (3, '91 % of the line ends, 64 % of the capitals (25 % of all characters)')."""
    names, layers = (*CLASSES[:-1], 'digits and punctuation'), []
    for loads, per_token, class_load in zip(evaluation['load'], evaluation['experts_per_token'],
                                            evaluation['class_load']):
        found = []
        for expert, load in enumerate(loads):
            share = load * per_token                               # of all characters
            parts = sorted(zip([of_class[expert] for of_class in class_load], names), reverse=True)
            told = ', '.join(f'{100 * part:.0f} % of the {name}' for part, name in parts
                             if part - share >= 0.25)
            if told:
                found.append((expert, f'{told} ({100 * share:.0f} % of all characters)'))
        layers.append(found)
    return layers


PAGE_HEAD = f"""<!doctype html><meta charset="utf-8"><title>Which expert took which token?</title>
<style>
  body {{ max-width: 50em; margin: auto; font-family: sans-serif }}
  pre {{ white-space: pre-wrap; line-height: 1.6 }}
</style>
<p>A token's colour is that of its first expert, which has the largest weight. Point at a token for
the scores of all experts, and the weights of those that handle it. {LINE_END} is a line end.</p>
"""


def experts_page(texts, scores, weights, notes):
    """A page of HTML: for each layer what stands out in it (notes, of stand_outs), and the texts of
    tokens, each coloured by its first expert; scores and weights (L, S, E) show at the pointer."""
    def paint(text, expert, tip=''):
        color = '' if expert is None else f'color: black; background: {PALETTE[expert % 8]}'
        return f'<span style="{color}" title="{tip}">{text}</span>'
    page = [PAGE_HEAD]
    for layer, (layer_scores, layer_weights) in enumerate(zip(scores.tolist(), weights.tolist())):
        page.append(f'<h2>Layer {layer + 1}</h2>\n')
        for expert, text in notes[layer] if layer < len(notes) else ():
            page.append(paint(f'&nbsp;expert {expert}&nbsp;', expert) + f' takes {text}<br>\n')
        page.append('<pre>')
        for text, p, w in zip(texts, layer_scores, layer_weights):
            tip = [f'{expert}: {score:.2f}' + (f', weight {weight:.2f}' if weight else '')
                   for expert, (score, weight) in enumerate(zip(p, w))]
            text = escape(text).replace('\n', f'{LINE_END}\n')
            page.append(paint(text, first_expert(w), '\n'.join(tip)))
        page.append('</pre>\n')
    return ''.join(page)


# -----------------------------------------------------------------------------
# Part 3: results. A result is a dict of what a run has come to: what it is called and what shaped
# it (config.json) and its last evaluation (log.jsonl); a line of results.jsonl is one, too.

def read_result(folder):
    """The result of the run in folder, with its whole log and its lowest validation loss. Raises
    many kinds of Exception where there is none."""
    log = read_log(folder)
    result = json.loads(read_text(os.path.join(folder, 'config.json')))
    lowest = min(evaluation['val_loss'] for evaluation in log)
    return checked({**result, 'lowest_val_loss': lowest, **log[-1], 'log': log, 'from': folder})


def checked(result):
    """result, if all is in it that tables need. Raises KeyError, TypeError or ValueError if not."""
    for key in ('iter', 'tokens', 'seconds', 'val_loss', 'lowest_val_loss'):
        if not math.isfinite(result[key]):
            raise ValueError(f'{key} = {result[key]}')
    if not is_run_name(result['run']):
        raise ValueError(f'a run called {result["run"]!r:.30}')
    if not (isinstance(result['seed'], int) and result['recipe']['mlp']
            and all(map(math.isfinite, result['ent_load']))):
        raise ValueError('no result')
    variant_of({0: result})              # raises KeyError where its recipe lacks a key
    return result


def read_results(out_dir, tell=print):
    """The results of all runs in out_dir, without those that can't be read, which it tells. Raises
    UserError where there are none."""
    results = []
    for name in sorted(os.listdir(out_dir)) if os.path.isdir(out_dir) else ():
        folder = os.path.join(out_dir, name)
        try:
            if os.path.exists(os.path.join(folder, 'log.jsonl')):
                results.append(read_result(folder))
        except Exception as error:       # files can be damaged in many ways
            tell(f'{folder!r} is left out: {error!r:.90}')
    if not results:
        raise UserError(f'expected a folder that holds runs, got none in {out_dir}')
    return results


def group(results):
    """Run -> {seed: result}. Results are seeds of one run where name, recipe (but for the seed) and
    iteration are equal. Where runs of one name differ in their recipes, the label says in what. It
    also says how far a run is where others are further, and where a run has diverged:

        two called aoe, with top_k 1 and 2, the second stopped at iteration 10
        ->  {'aoe (top_k 1)': {1: ..., 2: ...}, 'aoe (top_k 2, to 10)': {1: ...}}

    Equal results of one seed count once. Raises UserError for different ones."""
    groups, furthest = [], max(result['iter'] for result in results)   # groups: (shape, seeds)
    for result in results:
        end = 'diverged' if 'diverged' in result else 'iter'
        shape = result['recipe'] | {'seed': None, 'run': result['run'], end: result[end]}
        shape = {key: value for key, value in shape.items() if value is not None or key == end}
        seeds = next((seeds for other, seeds in groups if other == shape), None)
        if seeds is None:
            groups.append((shape, seeds := {}))
        twin = seeds.setdefault(result['seed'], result)
        if any(twin[key] != result[key] for key in ('val_loss', 'lowest_val_loss')):
            raise UserError(f'{result["from"]}: expected what {twin["from"]} has, which is the same'
                            f' run {result["run"]!r} with the same seed, got another loss; '
                            'remove one of the two')
    runs = {}
    for shape, seeds in groups:
        others = [other for other, _ in groups if other['run'] == shape['run']]
        notes = [f'{key} {shape.get(key)}'
                 for key in sorted(set().union(*others) - {'iter', 'diverged'})
                 if any(other.get(key) != shape.get(key) for other in others)]
        if 'diverged' in shape:
            notes.append(f'diverged at {shape["diverged"]}')
        elif shape['iter'] < furthest:
            notes.append(f'to {shape["iter"]}')
        runs[shape['run'] + (f' ({", ".join(notes)})' if notes else '')] = seeds
    return runs


# the comparison of runs, seed by seed

# a run and what it is compared with must agree in these: the tokens that they trained on and the
# windows in which they were evaluated
AGREE = {'sha256', 'train_tokens', 'val_tokens', 'block_size', 'batch_size', 'eval_iters',
         'gradient_accumulation_steps'}
RATES = {'learning_rate', 'min_lr'}      # these are told, too, but count least: see differences
# what makes a variant may differ without a word; what else differs is told
OF_VARIANT = {'mlp', 'factorised', 'router', 'router_std', 'd_low', 'd_judge', 'seed'}


class Difference(NamedTuple):
    base: str                # the run that is subtracted
    differ: set              # the keys of the recipe that differ, besides those of the variant
    minus: dict              # seed -> loss minus that of the base
    base_loss: float         # the mean loss of the base on these seeds


def variant_of(seeds):
    """What a run is by its recipe, such as 'moe', 'moe wide', 'aoe_whole' or 'aoe narrow'. seeds:
    its {seed: result}."""
    recipe = next(iter(seeds.values()))['recipe']
    moe, aoe, factorised = recipe['mlp'] == 'moe', recipe['mlp'] == 'aoe', recipe['factorised']
    std = recipe.get('router_std')
    std = 0.02 if std is None else std                             # of older results
    narrow = aoe and factorised and (recipe.get('d_judge') or math.inf) < recipe['d_low']
    parts = {'_whole': aoe and not factorised, ' narrow': narrow, ' factorised': moe and factorised,
             f' {recipe["router"]}': moe and recipe['router'] != 'linear',
             ' wide': moe and std > 0.02, ' flat': moe and std < 0.02}
    return recipe['mlp'] + ''.join(part for part, there in parts.items() if there)


def of_variant(runs, variant):
    """The names of the runs that are this variant."""
    return [name for name, seeds in runs.items() if variant_of(seeds) == variant]


def what_differs(one, its):
    """The keys in which the recipes of two results differ, besides those that make a variant."""
    recipe, its_recipe = one['recipe'], its['recipe']
    return {key for key in (recipe | its_recipe).keys() - OF_VARIANT
            if recipe.get(key) != its_recipe.get(key)}


def comparable(one, its):
    """Whether the losses of two results of one seed can be compared."""
    return (one['tokens'] == its['tokens'] and one['iter'] == its['iter']
            and 'diverged' not in one and 'diverged' not in its
            and all(one['recipe'].get(key) == its['recipe'].get(key) for key in AGREE))


def differences(runs, bases, loss='lowest_val_loss'):
    """Run -> its Difference from that of bases (names of runs) with which it can be compared, and
    has seeds in common; among several it is the one that differs least, rates aside."""
    found = {}
    for name, seeds in runs.items():
        candidates = []
        for other in bases if name not in bases else ():
            others = runs[other]
            common = sorted(seeds.keys() & others.keys())
            # all seeds have one recipe, so the first tells
            if common and comparable(seeds[common[0]], others[common[0]]):
                differ = what_differs(seeds[common[0]], others[common[0]])
                minus = {seed: seeds[seed][loss] - others[seed][loss] for seed in common}
                base_loss = statistics.mean(others[seed][loss] for seed in common)
                candidates.append(Difference(other, differ, minus, base_loss))
        if candidates:
            found[name] = min(candidates, key=lambda difference: (
                len(difference.differ - RATES), len(difference.differ)))
    return found


def student(n):
    """Student's t with n - 1 degrees of freedom: angles a, and for each the probability that t lies
    within ± sqrt(n - 1) tan(a). (Written in a, the density of t is cos(a)^(n - 2).)"""
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (n - 2)
    within = np.append(0, np.cumsum(density[1:] + density[:-1]))   # up to a factor
    return angle, within / within[-1]


def half_interval(values):
    """Half a 95 % interval of the mean of values; infinite for a single one."""
    n = len(values)
    if n < 2:
        return math.inf
    angle, within = student(n)
    t = math.sqrt(n - 1) * math.tan(np.interp(0.95, within, angle))
    return t * statistics.stdev(values) / math.sqrt(n)


def interval(difference, unit=1):
    """The mean of a Difference and half its 95 % interval, in units."""
    values = [minus / unit for minus in difference.minus.values()]
    return statistics.mean(values), half_interval(values)


def difference_as_text(difference):
    """'-0.0123 ± 0.0045', bold where the interval excludes 0; the mean alone for one seed; '-' for
    None, a run that is compared with none."""
    if difference is None:
        return '-'
    mean, half = interval(difference)
    text = f'{mean:+.4f}' + (f' ± {half:.4f}' if half < math.inf else '')
    return f'**{text}**' if abs(mean) > half else text


def notes_of(found):
    """What is to be said below a table of Differences: in what else the two differ."""
    return [f'{name} differs from {difference.base} in {", ".join(sorted(difference.differ))}, too'
            for name, difference in found.items() if difference.differ]


# the table

def losses_of(seeds, key='lowest_val_loss'):
    return [result[key] for result in seeds.values()]


def mean_and_spread(values):
    """As text: the mean, and the standard deviation where there are several."""
    spread = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4f}{spread}'


def print_rows(rows):
    """Print rows of strings as a table, in the form of Markdown: numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ['-' * width for width in widths], *rows[1:]]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        print('| ' + ' | '.join(cells) + ' |')


def print_table(results, out_dir):
    """The runs of out_dir side by side. Where they have several seeds: mean and standard deviation,
    and the difference from moe, seed by seed, with what else differs between the two."""
    runs = group(results)
    several = any(len(seeds) > 1 for seeds in runs.values())
    found = differences(runs, of_variant(runs, 'moe')) if several else {}
    table = [('run', 'parameters', 'val loss', *(['minus moe'] if found else []), 'Ent_load',
              'tokens/s')]
    for name, seeds in runs.items():
        of_seeds = list(seeds.values())
        loss = 'diverged' if 'diverged' in of_seeds[0] else mean_and_spread(losses_of(seeds))
        ent_load = [layer for result in of_seeds for layer in result['ent_load']]
        speeds = [result['tokens'] / result['seconds'] for result in of_seeds if result['tokens']]
        table.append((name, f'{of_seeds[0]["total_parameters"]:,}', loss,
                      *([difference_as_text(found.get(name))] if found else []),
                      f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                      f'{statistics.median(speeds):,.0f}' if speeds else '-'))
    print()
    print_rows(table)
    print(f'\nval loss: the lowest; Ent_load: ln E where all is even; pictures in {out_dir}')
    print_notes(runs, found)


def print_notes(runs, found):
    """The lines below print_table's table: of the differences, and of the runs themselves."""
    if found:
        print('minus moe: mean and 95 % interval over the seeds; **bold** if it excludes 0',
              *notes_of(found), sep='\n')
    for name, difference in found.items():                         # which seeds both have
        if len(difference.minus) < max(len(runs[name]), len(runs[difference.base])):
            seeds = ', '.join(map(str, difference.minus))
            print(f'{name}: minus moe over the seeds {seeds} alone')
    first, *others = (next(iter(seeds.values())) for seeds in runs.values())
    if differ := set().union(*(what_differs(first, other) for other in others)):
        print(f'these runs differ in {", ".join(sorted(differ))}')
    for name, seeds in runs.items():
        last = statistics.mean(losses_of(seeds, 'val_loss'))
        if last > 1.02 * statistics.mean(losses_of(seeds)):        # its lowest
            print(f'{name} ended at {last:.4f}, above its lowest')


def write_results(results, out_dir):
    """Write results.jsonl: a line for each result. It keeps the lines of runs whose folders are
    gone, hold another run now, or went on with other code. So an experiment may run in blocks."""
    path = os.path.join(out_dir, 'results.jsonl')
    lines = [{key: value for key, value in result.items()
              if key not in ('log', 'class_load', 'from')} for result in results]
    kept = []
    for line in read_text(path).splitlines() if os.path.exists(path) else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):     # not ours
            old = json.loads(line)
            if any(all(old[key] == result[key] for key in ('run', 'seed', 'recipe'))
                   and old['iter'] <= result['iter'] for result in results):
                continue                 # it is present
        kept.append(line + '\n')
    write_text(path, ''.join(kept) + as_lines(lines))


def as_lines(entries):
    """The text of a .jsonl."""
    return ''.join(json.dumps(entry, allow_nan=False) + '\n' for entry in entries)


# pictures; matplotlib is slow to import, so it is imported where a figure is made

# a variant has the same colour in all pictures; these are of Okabe and Ito's palette
COLOR_OF = {'dense': '#000000', 'moe': '#0072B2', 'aoe': '#D55E00', 'aoe_whole': '#009E73'}
OTHER_COLORS = ['#CC79A7', '#E69F00', '#56B4E9', '#999999']


def colors_of(names):
    others = [name for name in names if name not in COLOR_OF]
    return COLOR_OF | {name: OTHER_COLORS[i % 4] for i, name in enumerate(others)}


def save_figure(figure, path):
    with replacing(path) as part:
        figure.savefig(part, format='png', dpi=100)


def draw(results, out_dir, files, tell=print):
    """Draw these files of PICTURES, of all results. What hinders is told in a line."""
    for file in files:
        try:
            runs = group(results)
            figure = PICTURES[file](runs, colors_of(runs))
            if figure:
                save_figure(figure, os.path.join(out_dir, file))
        except Exception as error:       # a picture is never worth a run
            tell(f'{file} is not drawn: {error!s:.150}')


def draw_loss(runs, color):
    """Validation loss over iterations, and over seconds: of each run the mean of its seeds, in a
    band of them all. The legend has the lowest last."""
    from matplotlib.figure import Figure
    figure, shown = Figure(figsize=(12, 5), layout='constrained'), []
    panels = figure.subplots(1, 2, sharey=True)
    for name in sorted(runs, key=lambda name: -statistics.mean(losses_of(runs[name]))):
        logs = [{entry['iter']: entry for entry in result['log']} for result in runs[name].values()]
        iterations = sorted(set.intersection(*map(set, logs)))     # where all seeds were evaluated
        losses = np.array([[log[n]['val_loss'] for log in logs] for n in iterations])
        seconds = np.array([[log[n]['seconds'] for log in logs] for n in iterations])
        label = f'{name} {statistics.mean(losses_of(runs[name])):.4f}'
        label += f', {len(logs)} seeds' if len(logs) > 1 else ''
        for axes, x in zip(panels, (iterations, seconds.mean(1))):
            axes.plot(x, losses.mean(1), color=color[name], marker='.', label=label,
                      linestyle='-' if name in COLOR_OF else '--')
            axes.fill_between(x, losses.min(1), losses.max(1), color=color[name], alpha=0.2)
            axes.grid(alpha=0.3)
        later = losses[1:] if len(losses) > 1 else losses          # the first is of no training
        shown += later.flatten().tolist()
    panels[0].set(title='same tokens', xlabel='iteration', ylabel='validation loss (nats per '
                  'token)', ylim=(min(shown) - 0.05, max(shown) + 0.05))
    panels[1].set(title='same seconds (of runs that share a machine)', xlabel='seconds of training')
    panels[0].legend(title='lowest loss')
    return figure


def draw_panels(runs, key, label, draw_panel):
    """A row for each run that has logged `key` (its first seed), in it a panel for each layer, by
    draw_panel(axes, name, log, layer). None where no run has."""
    from matplotlib.figure import Figure
    first = {name: next(iter(seeds.values()))['log'] for name, seeds in runs.items()}
    logs = {name: log for name, log in first.items() if any(log[-1][key])}
    if not logs:
        return None
    n_layer = max(len(log[-1][key]) for log in logs.values())
    figure = Figure(figsize=(1.6 + 2.4 * n_layer, 0.9 + 1.3 * len(logs)), layout='constrained')
    panels = figure.subplots(len(logs), n_layer, squeeze=False, sharex=True, sharey=True)
    for row, (name, log) in zip(panels, logs.items()):
        for layer, axes in enumerate(row):
            if layer < len(log[-1][key]):
                axes.set_title(f'{name}, layer {layer + 1}', fontsize=9)
                draw_panel(axes, name, log, layer)
            else:
                axes.set_visible(False)                            # this model has fewer layers
    figure.supxlabel(label, fontsize=9)
    return figure


def draw_load(runs, color):
    """Figure 3 of the paper: the load of each expert, against 1/E."""
    def panel(axes, name, log, layer):
        last, load = log[-1], log[-1]['load'][layer]               # load: (E,)
        axes.bar(range(len(load)), load, color=color[name])
        axes.axhline(1 / len(load), color='black', linestyle='--', linewidth=1)
        axes.set_title(f'{name}, layer {layer + 1}\nEnt_load {last["ent_load"][layer]:.2f}, '
                       f'Ent_conf {last["ent_conf"][layer]:.2f}', fontsize=9)
    return draw_panels(runs, 'load', 'expert; dashed: 1/E', panel)


def draw_norm(runs, color):
    """Figure 4 of the paper: the mean activation norm of every expert over training."""
    def panel(axes, name, log, layer):
        axes.plot([entry['iter'] for entry in log], [entry['norm'][layer] for entry in log],
                  color=color[name], alpha=0.7)
    return draw_panels(runs, 'norm', 'iteration; a line: the mean norm of an expert', panel)


def draw_class(runs, color):
    """Who takes what: the share of each class of characters that each expert handled."""
    def panel(axes, name, log, layer):
        axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)
        image = axes.imshow(log[-1]['class_load'][layer], cmap='cividis', vmin=0, vmax=1,
                            aspect='auto')
        if layer == len(log[-1]['class_load']) - 1:
            axes.figure.colorbar(image, ax=axes)
    return draw_panels(runs, 'class_load', 'expert; how much of a class of characters it handles',
                       panel)


PICTURES = {'loss.png': draw_loss, 'expert_load.png': draw_load, 'norm.png': draw_norm,
            'expert_class.png': draw_class}


# -----------------------------------------------------------------------------
# Part 4: main

def main(arguments):
    given, folders = parse(SampleConfig, arguments, __doc__)
    config = SampleConfig(**given)
    if len(folders) != 1:
        raise UserError('expected the folder of a run, as out/default/aoe, or of several, as '
                        f'out/default, got {len(folders)}')
    if os.path.exists(os.path.join(folders[0], 'best.pt')):
        write_samples(folders[0], config)
    else:
        show_results(folders[0])


def show_results(out_dir):
    """Draw and print what the runs in out_dir have come to."""
    results = read_results(out_dir)
    draw(results, out_dir, PICTURES)
    print_table(results, out_dir)
    write_results(results, out_dir)


def write_samples(folder, config):
    """Print texts that the model of the run in folder writes; maybe coloured by their experts."""
    device = choose_device(config.device)
    model, meta, dtype = load_model(folder, device)
    tokenizer = tokenizer_from(meta, config.data_dir)
    mlp, n_layer = model.config.mlp, model.config.n_layer
    if config.show_experts and (mlp == 'dense' or config.layer > n_layer):
        raise UserError('show_experts: expected a model with experts and a --layer of at most '
                        f'{n_layer}, got {mlp} and {config.layer}')
    prompt = torch.tensor([tokenizer.encode(config.prompt)], device=device)    # (1, S)
    for i in range(config.num_samples):
        if i > 0:
            print('-' * 80)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.generate(prompt, config.max_new_tokens, config.temperature,
                                    config.vocab_top_k, tokenizer.vocab_size, config.seed + i)[0]
            if config.show_experts:
                scores, weights = watch_experts(model, tokens)     # (L, S, E)
        if config.show_experts:
            texts = [tokenizer.decode([token]) for token in tokens.tolist()]
            print(color_text(texts, [first_expert(w) for w in weights[config.layer - 1].tolist()]))
        else:
            print(tokenizer.decode(tokens.tolist()))
    if config.show_experts:              # a page of the last text
        try:                             # best.pt is of the evaluation with the lowest loss
            notes = stand_outs(min(reversed(read_log(folder)), key=lambda entry: entry['val_loss']))
        except (ValueError, KeyError, TypeError, IndexError):      # its log is gone, or damaged
            notes = []
        path = os.path.join(folder, 'experts.html')
        write_text(path, experts_page(texts, scores, weights, notes))
        print(f'\nto open in a browser: {path}')


if __name__ == '__main__':
    run(main)
