"""
Look at what train.py has left behind. Of one run: a text that its model writes.

    python sample.py out/quick_start/aoe
    python sample.py out/quick_start/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/quick_start/aoe --show_experts=True --layer=2

--show_experts=True colours each token by its first expert, which has the
largest weight. It also writes experts.html beside best.pt, for a browser: all
layers, what stands out in them, and for the token that you point at the scores
of all experts. Of a folder of runs: their table and pictures, as at the end of
train.py.

    python sample.py out/quick_start

Four parts: 1. a run's model; 2. which expert took which token; 3. results of
several runs, their table and pictures; 4. main, and the text that is written.
"""

import glob
import inspect
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass, fields
from html import escape
from typing import NamedTuple

import numpy as np
import torch

from configurator import (UserError, choose_device, expect, expecting, hash_of, is_run_name,
                          last_of, parse, read_text, replacing, run, write_text)
from model import GPT, GPTConfig
from prepare_data import CLASSES, tokenizer_from


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

def load_model(folder, device):
    """The best model of the run in folder, its tokenizer's meta, and the dtype it trained in. Tells
    where model.py is another than the one that it was trained with. Raises UserError."""
    path = os.path.join(folder, 'best.pt')
    with expecting(f'{path}: expected a model of this train.py and model.py'):
        saved = torch.load(path, map_location=device, weights_only=True)       # runs no code
        recipe = saved['recipe']
        keys = {field.name for field in fields(GPTConfig)} & recipe.keys()
        model = GPT(GPTConfig(**{key: recipe[key] for key in keys}))
        model.load_state_dict(saved['model'])
    if last_of(recipe.get('model.py')) != hash_of(inspect.getsourcefile(GPT)):
        print(f'{folder}: trained with another model.py than this, which may compute other things',
              file=sys.stderr)
    return model.eval().to(device), saved['meta'], getattr(torch, recipe['dtype'])


def read_log(folder):
    """The evaluations of a run, oldest first. Raises UserError."""
    path = os.path.join(folder, 'log.jsonl')
    with expecting(f'{path}: expected a line for each evaluation'):
        return [json.loads(line) for line in read_text(path).splitlines()]


# -----------------------------------------------------------------------------
# Part 2: which expert took which token

# a colour for each of eight experts, on which black letters can be read
PALETTE = ['#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#DDDDDD', '#44BB99', '#BBCC33', '#BB99DD']
LINE_END = '\u00b6'                      # a line end is a token, too, and drawn as this


@torch.no_grad()
def watch_experts(model, tokens):
    """All experts' scores and weights (L, S, E) for tokens (S,); an expert that isn't chosen weighs
    0. As in training they are read in windows of block_size, of which the first token has no
    context."""
    routings = [model(window[None])[2] for window in tokens.split(model.config.block_size)]
    scores, chosen, weights, _ = zip(*routings)
    scores, chosen, weights = (torch.cat(part, dim=1) for part in (scores, chosen, weights))
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
    taken = sorted(set(experts) - {None})
    legend = ' '.join(paint(f' {expert} ', expert) for expert in taken)
    painted = (paint(text.replace('\n', LINE_END).replace('\r', ' '), expert)
               + '\n' * text.count('\n') for text, expert in zip(texts, experts))
    return f'expert {legend}   {LINE_END} line end\n\n{"".join(painted)}'


def stand_outs(evaluation):
    """What stands out in an evaluation of log.jsonl: for each layer and expert the classes of
    characters of which it handles more than of all, by 25 points or more; '' if there are none:

        [['', '', '91 % of the line ends, 64 % of the capitals (25 % of all characters)', ''], ...]
    """
    names, layers = (*CLASSES[:-1], 'digits and punctuation'), []
    for loads, per_token, class_load in zip(evaluation['load'], evaluation['experts_per_token'],
                                            evaluation['class_load']):
        texts = []
        for expert, load in enumerate(loads):
            share = load * per_token                               # of all characters
            parts = sorted(zip([of_class[expert] for of_class in class_load], names), reverse=True)
            told = ', '.join(f'{100 * part:.0f} % of the {name}' for part, name in parts
                             if part - share >= 0.25)
            texts.append(f'{told} ({100 * share:.0f} % of all characters)' if told else '')
        layers.append(texts)
    return layers


PAGE_HEAD = f"""<!doctype html><meta charset="utf-8"><title>Which expert took which token?</title>
<style>
  body {{ max-width: 50em; margin: auto; font-family: sans-serif }}
  pre {{ white-space: break-spaces; line-height: 1.6 }}
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
    E, per_token = weights.shape[2], (weights > 0).sum(2).float().mean().item()
    page = [PAGE_HEAD, f'<p>Each token goes to {per_token:.3g} experts, so the shares of a class '
            f'sum to {100 * per_token:.0f} %; an even one is {100 * per_token / E:.0f} %.</p>\n']
    for layer, (layer_scores, layer_weights) in enumerate(zip(scores.tolist(), weights.tolist())):
        page.append(f'<h2>Layer {layer + 1}</h2>\n')
        # those without a note come last
        for note, expert in sorted(zip(notes[layer], range(E)), key=lambda pair: pair[0] == ''):
            page.append(paint(f'&nbsp;expert {expert}&nbsp;', expert))
            page.append(f' takes {note}<br>\n' if note else '\n')
        page.append('<pre>')
        for text, p, w in zip(texts, layer_scores, layer_weights):
            tip = [f'{expert}: {score:.2f}' + (f', weight {weight:.2f}' if weight else '')
                   for expert, (score, weight) in enumerate(zip(p, w))]
            text = escape(text).replace('\n', f'{LINE_END}\n')
            page.append(paint(text, first_expert(w), '\n'.join(tip)))
        page.append('</pre>\n')
    return ''.join(page)


# -----------------------------------------------------------------------------
# Part 3: results. A result is a dict: what a run is and what shaped it (its config.json), its last
# evaluation, its lowest validation loss and its whole log (of log.jsonl).

def read_result(folder):
    """The result of the run in folder. Raises many kinds of Exception where there is none."""
    log = read_log(folder)
    result = json.loads(read_text(os.path.join(folder, 'config.json')))
    lowest = min(entry['val_loss'] for entry in log)
    return checked({**result, 'lowest_val_loss': lowest, **log[-1], 'log': log})


def checked(result):
    """result, if it has what tables need. Raises many kinds of Exception if not."""
    numbers = [result[key] for key in ('iter', 'tokens', 'seconds', 'val_loss', 'lowest_val_loss')]
    if not (all(map(math.isfinite, numbers + result['ent_load'])) and is_run_name(result['run'])
            and isinstance(result['seed'], int) and isinstance(result['recipe']['mlp'], str)):
        raise ValueError('no result')
    return result


def read_results(out_dir):
    """The results of all runs in out_dir, without those that can't be read, which it tells. Raises
    UserError where there are none."""
    results = []
    for name in sorted(os.listdir(out_dir)) if os.path.isdir(out_dir) else ():
        folder = os.path.join(out_dir, name)
        files = [os.path.join(folder, file) for file in ('log.jsonl', 'config.json')]
        # what lacks one of them is no run, or has not been evaluated yet
        if all(os.path.exists(file) and os.path.getsize(file) for file in files):
            try:
                results.append(read_result(folder))
            except Exception as error:   # files can be damaged in many ways
                print(f'{folder!r} is left out: {error!r:.90}')
    if not results:
        inner = sorted({os.path.dirname(os.path.dirname(path))
                        for path in glob.glob(f'{glob.escape(out_dir)}/*/*/log.jsonl')})
        hint = f'; there are some in {", ".join(inner)}' if inner else ''
        raise UserError(f'expected a folder of runs that have been evaluated, got none in {out_dir}'
                        f'{hint}')
    return results


def group(results):
    """Run -> {seed: result}. Results are seeds of one run where name, recipe (but for the seed) and
    iteration are equal. Where runs of one name differ in these, or others are further, the name
    says in what:

        two called aoe, with top_k 1 and 2, the second stopped at iteration 10
        ->  {'aoe (top_k 1)': {1: ..., 2: ...}, 'aoe (iter 10, top_k 2)': {1: ...}}
    """
    groups = []                          # (name, what its results have in common, {seed: result})
    for result in results:
        end = 'diverged' if 'diverged' in result else 'iter'
        common = {key: value for key, value in result['recipe'].items()
                  if key != 'seed' and value is not None} | {end: result[end]}
        seeds = next((seeds for name, other, seeds in groups
                      if name == result['run'] and other == common), None)
        if seeds is None:
            seeds = {}
            groups.append((result['run'], common, seeds))
        seeds[result['seed']] = result
    furthest = max(result['iter'] for result in results)

    def label(name, common):
        keys = differing([other for other_name, other, _ in groups if other_name == name])
        keys -= {'iter', 'diverged'}
        if common.get('iter') != furthest:
            keys |= common.keys() & {'iter', 'diverged'}           # how far it is, or was
        notes = [f'{key} {common.get(key)}' for key in sorted(keys)]
        return f'{name} ({", ".join(notes)})' if notes else name
    return {label(name, common): seeds for name, common, seeds in groups}


def differing(recipes):
    """The keys that do not have the same value in all recipes."""
    return {key for key in set().union(*recipes)
            if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)}


def first_of(seeds):
    """A result of a run, for what all its seeds share."""
    return next(iter(seeds.values()))


# the comparison of runs, seed by seed

# two runs can be compared if they agree in these: the tokens that they trained on, and the windows
# in which they were evaluated
AGREE = ('sha256', 'train_tokens', 'val_tokens', 'block_size', 'batch_size', 'eval_iters',
         'gradient_accumulation_steps')
# these make one MLP another, so they may differ without a word; what else differs is told
OF_THE_MLP = {'mlp', 'factorised', 'router', 'router_std', 'd_low', 'd_judge'}


class Difference(NamedTuple):
    """A run's losses minus those of another, its base, seed by seed."""
    base: str                # the name of the run that is subtracted
    differ: list             # the keys of the recipe that differ, besides those of the MLP
    minus: dict              # seed -> loss minus that of the base with the same seed
    base_loss: float         # the mean loss of the base on these seeds
    left_out: list           # the seeds that only one of the two has


def is_plain_moe(recipe):
    """Whether a run is the paper's MoE: whole gates, a linear router, small first weights."""
    return (recipe['mlp'] == 'moe' and not recipe.get('factorised')
            and recipe.get('router') in (None, 'linear')
            and recipe.get('router_std') in (None, GPTConfig.router_std))


def is_base(name, recipe, base):
    """Whether a run is to be subtracted. 'moe' is any plain moe, since runs are named freely; other
    bases are runs of that name. (A label of group is the name, and maybe notes in parentheses.)"""
    return is_plain_moe(recipe) if base == 'moe' else name.partition(' (')[0] == base


def difference_from(base, base_seeds, seeds, loss):
    """The Difference of a run from base, by the {seed: result} of both; None where they can't be
    compared."""
    one, base_one = first_of(seeds), first_of(base_seeds)
    recipe, base_recipe = one['recipe'], base_one['recipe']
    common = sorted(seeds.keys() & base_seeds.keys())
    if (not common or one['iter'] != base_one['iter'] or 'diverged' in one or 'diverged' in base_one
            or any(recipe.get(key) != base_recipe.get(key) for key in AGREE)):
        return None
    base_losses = {seed: base_seeds[seed][loss] for seed in common}
    return Difference(base, sorted(differing([recipe, base_recipe]) - OF_THE_MLP - {'seed'}),
                      {seed: seeds[seed][loss] - base_losses[seed] for seed in common},
                      statistics.mean(base_losses.values()),
                      sorted(seeds.keys() ^ base_seeds.keys()))


def differences(runs, base='moe', loss='lowest_val_loss'):
    """Run -> its Difference from base, on the seeds that both have. Of several bases it is the one
    most like the run: of two moe, with top_k 1 and 2, that with the run's top_k."""
    def unlikeness(difference):
        differ = set(difference.differ)
        return len(differ - {'learning_rate', 'min_lr'}), len(differ)      # rates decide last

    bases = [name for name in runs if is_base(name, first_of(runs[name])['recipe'], base)]
    found = {}
    for name, seeds in runs.items():
        candidates = [difference_from(other, runs[other], seeds, loss) for other in bases]
        if name not in bases and any(candidates):
            found[name] = min(filter(None, candidates), key=unlikeness)
    return found


def student(n):
    """Student's t with n - 1 degrees of freedom, to be taken on trust: angles a, and for each the
    probability that t lies within ± sqrt(n - 1) tan(a). (In a, the density is cos(a)^(n - 2).)"""
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (n - 2)
    within = np.append(0, np.cumsum(density[1:] + density[:-1]))   # up to a factor
    return angle, within / within[-1]


def half_interval(values):
    """Half a 95 % interval of the mean of values: t s / sqrt(n), where Student's t is 12.7 for two
    values, 4.3 for three, 2.1 for 24. Infinite for a single one."""
    n = len(values)
    if n < 2:
        return math.inf
    angle, within = student(n)
    t = math.sqrt(n - 1) * math.tan(np.interp(0.95, within, angle))
    return t * statistics.stdev(values) / math.sqrt(n)


def interval(difference):
    """The mean of a Difference and half its 95 % interval, in nats per token."""
    values = list(difference.minus.values())
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
    """What is to be said below a table of Differences, in lines: in what else, and on how many
    seeds, two runs are compared."""
    for name, difference in found.items():
        if difference.differ:
            yield f'{name} differs from {difference.base} in {", ".join(difference.differ)}, too'
        if difference.left_out:
            seeds = ', '.join(map(str, difference.minus))
            yield f'{name} minus {difference.base}: over the seeds {seeds} alone'


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
    found = differences(runs) if several else {}
    rows = [['run', 'parameters', 'val loss', 'minus moe', 'Ent_load', 'tokens/s']]
    for name, seeds in runs.items():
        first = first_of(seeds)
        ent_load = [layer for result in seeds.values() for layer in result['ent_load']]
        speeds = [result['tokens'] / result['seconds'] for result in seeds.values()
                  if result['tokens']]
        rows.append([name, f'{first["total_parameters"]:,}',
                     'diverged' if 'diverged' in first else mean_and_spread(losses_of(seeds)),
                     difference_as_text(found.get(name)),
                     f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                     f'{statistics.median(speeds):,.0f}' if speeds else '-'])
    print()
    print_rows(rows if found else [row[:3] + row[4:] for row in rows])
    print(f'\nval loss: the lowest; Ent_load: ln E where all is even; pictures in {out_dir}')
    if found:
        print('minus moe: mean and 95 % interval over the seeds; **bold** if it excludes 0',
              *notes_of(found), sep='\n')
    if len({len(seeds) for seeds in runs.values()}) > 1:
        print('seeds:', ', '.join(f'{name} has {len(seeds)}' for name, seeds in runs.items()))
    recipes = [first_of(seeds)['recipe'] for seeds in runs.values()]
    if differ := differing(recipes) - OF_THE_MLP - {'seed'}:
        print(f'these runs differ in {", ".join(sorted(differ))}')
    for name, seeds in runs.items():
        last = statistics.mean(losses_of(seeds, 'val_loss'))
        if last > 1.02 * statistics.mean(losses_of(seeds)):
            print(f'{name} ended at {last:.4f}, above its lowest')


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


def draw(results, out_dir, files):
    """Draw these files of PICTURES, of all results. What hinders is told in a line."""
    for file in files:
        try:
            runs = group(results)
            figure = PICTURES[file](runs, colors_of(runs))
            if figure:
                save_figure(figure, os.path.join(out_dir, file))
        except Exception as error:       # a picture is never worth a run
            print(f'{file} is not drawn: {error!s:.150}')


def draw_loss(runs, color):
    """Validation loss over iterations, and over seconds: of each run the mean of its seeds, in a
    band of them all. The legend has the lowest last."""
    from matplotlib.figure import Figure
    figure, shown = Figure(figsize=(11, 4.5), layout='constrained'), []
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
    first = {name: first_of(seeds)['log'] for name, seeds in runs.items()}
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
    return draw_panels(runs, 'load', 'expert; its share of all that is handled, dashed: 1/E', panel)


def draw_norm(runs, color):
    """Figure 4 of the paper: the mean activation norm of every expert over training."""
    def panel(axes, name, log, layer):
        axes.plot([entry['iter'] for entry in log], [entry['norm'][layer] for entry in log],
                  color=color[name], alpha=0.7)
    return draw_panels(runs, 'norm', 'iteration; a line: the mean norm of an expert', panel)


def draw_class(runs, color):
    """Who takes what: the share of each class of characters that each expert handled."""
    def panel(axes, name, log, layer):
        even = log[-1]['experts_per_token'][layer] / len(log[-1]['load'][layer])
        axes.set_title(f'{name}, layer {layer + 1}; even: {even:.2f}', fontsize=9)
        axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)
        image = axes.imshow(log[-1]['class_load'][layer], cmap='cividis', vmin=0, vmax=1,
                            aspect='auto')
        if layer == len(log[-1]['class_load']) - 1:
            axes.figure.colorbar(image, ax=axes)
    return draw_panels(runs, 'class_load', 'expert; how much of a class of characters it handles '
                       '(a row sums to the experts of a token)', panel)


PICTURES = {'loss.png': draw_loss, 'expert_load.png': draw_load, 'norm.png': draw_norm,
            'expert_class.png': draw_class}


# -----------------------------------------------------------------------------
# Part 4: main

def main(arguments):
    given, folders = parse(SampleConfig, arguments, __doc__)
    config = SampleConfig(**given)
    if len(folders) != 1:
        raise UserError(f'expected one folder, got {len(folders)}: of a run, as python sample.py '
                        'out/quick_start/aoe, or of several, as python sample.py out/quick_start')
    if os.path.exists(os.path.join(folders[0], 'best.pt')):
        write_samples(folders[0], config)
    elif os.path.exists(os.path.join(folders[0], 'config.json')):
        raise UserError(f'{folders[0]}: expected a run with a best.pt, as it has from its first '
                        'evaluation on')
    else:
        show_results(folders[0])


def show_results(out_dir):
    """Draw and print what the runs in out_dir have come to."""
    results = read_results(out_dir)
    print_table(results, out_dir)
    draw(results, out_dir, PICTURES)


def write_samples(folder, config):
    """Print texts that the model of the run in folder writes; maybe coloured by their experts."""
    device = choose_device(config.device)
    model, meta, dtype = load_model(folder, device)
    with expecting(f'{folder}/best.pt: expected a tokenizer of prepare_data.py in it'):
        tokenizer = tokenizer_from(meta, config.data_dir)
    mlp, n_layer = model.config.mlp, model.config.n_layer
    if config.show_experts and (mlp == 'dense' or config.layer > n_layer):
        raise UserError(f'show_experts: expected a --layer of at most {n_layer} in a model with '
                        f'experts, got layer {config.layer} of {mlp}')
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
        try:                             # best.pt is of the latest of the lowest losses
            notes = stand_outs(min(reversed(read_log(folder)), key=lambda entry: entry['val_loss']))
        except (ValueError, KeyError, TypeError, IndexError):      # its log is gone, or damaged
            notes = []
        notes = notes or [[''] * model.config.n_expert] * n_layer  # tokens are no characters
        path = os.path.join(folder, 'experts.html')
        write_text(path, experts_page(texts, scores, weights, notes))
        print(f'\nto open in a browser: {path}')


if __name__ == '__main__':
    run(main)
