"""
Let a trained model write.

    python sample.py out/quick_start/aoe
    python sample.py out/quick_start/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/quick_start/aoe --num_samples=3 --seed=1
    python sample.py out/quick_start/aoe --show_experts=True --layer=2

The argument is the folder of a run. Its best.pt brings settings and tokenizer.
--show_experts=True colours each token by its first expert, which has the largest
weight; where there is no terminal (or NO_COLOR) the expert's number stands below.
It also writes experts.html beside best.pt, for a browser: all layers, what stands
out in them, and for the token that you point at the scores of all experts.
"""

import signal

if __name__ == '__main__':               # Ctrl-C while the next lines import: end without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
import re
import sys
from dataclasses import dataclass
from html import escape

import torch

from configurator import UserError, expect, parse, run, write_text
from model import Routing
from prepare_data import tokenizer_from
from train import CLASSES, choose_device, load_model, read_log


@dataclass
class SampleConfig:
    """The keys of this script; the comments between them are headings of --help."""
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
    data_dir: str = 'data'               # where gpt2's tokenizer file lies, if it had to be fetched

    def __post_init__(self):
        expect(self, ('num_samples', 'max_new_tokens', 'vocab_top_k', 'layer'),
               'a positive number', lambda n: n > 0)
        expect(self, 'seed', '0 or more and below 2^62', lambda seed: 0 <= seed < 2**62)
        expect(self, 'temperature', '0, or 0.001 or more', lambda t: t == 0 or t >= 0.001)
        expect(self, 'prompt', 'at least one character', lambda prompt: prompt)


# -----------------------------------------------------------------------------
# which expert took which token

# Paul Tol's light scheme: black letters can be read on it, and all readers tell it apart
PALETTE = ['#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#99DDFF', '#44BB99', '#BBCC33', '#AAAA00']
LINE_END = '\u00b6'                      # a line end is a token, too, and drawn as this


@torch.no_grad()
def watch_experts(model, tokens):
    """The Routing (L, S, ...) of tokens (S,); a token's heaviest expert comes first. As in training
    they are read in windows of block_size: the first token of each has no context."""
    windows = [model(window[None])[2] for window in tokens.split(model.config.block_size)]
    scores, chosen, weights = (torch.cat(parts, dim=1) for parts in list(zip(*windows))[:3])
    order = weights.argsort(descending=True)
    return Routing(scores, chosen.gather(2, order), weights.gather(2, order), None)


def without_controls(text):
    """text without what would ring or steer a terminal."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)


def color_text(texts, experts):
    """For a terminal: the texts of tokens, each on the colour of its expert."""
    def paint(text, expert):
        red, green, blue = bytes.fromhex(PALETTE[expert % 8][1:])
        return f'\033[48;2;{red};{green};{blue};30m{text}\033[0m'
    legend = ' '.join(paint(f' {expert} ', expert) for expert in sorted(set(experts)))
    painted = (paint(text.replace('\n', LINE_END), expert) + '\n' * text.count('\n')
               for text, expert in zip(texts, experts))
    return f'expert {legend}   {LINE_END} line end\n\n{"".join(painted)}'


def number_text(texts, experts):
    """For a file: the texts of tokens, and below each line of them its experts' numbers."""
    upper, lower = '', ''
    for text, expert in zip(texts, map(str, experts)):
        width, end = max(len(text), len(expert)), '\n' * text.endswith('\n')
        upper += text.replace('\n', LINE_END).ljust(width) + end
        lower += expert.ljust(width) + end
    return '\n'.join(map('\n'.join, zip(upper.split('\n'), lower.split('\n')))).rstrip('\n')


def stand_outs(entry):
    """What stands out in an evaluation, an entry of log.jsonl: for each layer the experts that
    handle more of a class of characters than of all, by 25 points or more: [(expert, text), ...],
    such as (3, '91 % of the line ends, 64 % of the capitals (25 % of all)')."""
    names, layers = (*CLASSES[:-1], 'digits and punctuation'), []
    for loads, per_token, class_load in zip(entry['load'], entry['experts_per_token'],
                                            entry['class_load']):
        found = []
        for expert, load in enumerate(loads):
            share = load * per_token                               # of all characters
            parts = zip([of_class[expert] for of_class in class_load], names)
            told = [f'{100 * part:.0f} % of the {name}' for part, name in sorted(parts)[::-1]
                    if part - share >= 0.25]
            if told:
                found.append((expert, f'{", ".join(told)} ({100 * share:.0f} % of all)'))
        layers.append(found)
    return layers


def experts_page(name, texts, routing, config, layer, notes):
    """A page of HTML that needs nothing else: which experts took the texts of tokens. It opens with
    layer, from 1; notes are those of stand_outs. Texts are escaped, so no < is in the data."""
    scores, weights = (part.cpu().double().round(decimals=3)
                       for part in (routing.scores, routing.weights))
    k = config.top_k if config.select == 'top_k' else 'some'
    return PAGE.replace('DATA', json.dumps({
        'about': f'{escape(name)} gives each token to {k} of {config.n_expert} experts.',
        'layer': layer - 1, 'notes': notes, 'palette': PALETTE,
        'texts': [escape(text).replace('\n', f'{LINE_END}\n') for text in texts],
        'chosen': routing.chosen.tolist(), 'weights': weights.tolist(), 'scores': scores.tolist(),
        'score': 'norm' if config.mlp == 'aoe' else 'score',
        'low': min(0, scores.min().item()), 'high': max(0, scores.max().item())}))


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Which expert took which token?</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 58em; margin: auto; padding: 1em }
  h1 { font-size: 1.5em; margin: 0 }
  main { display: grid; grid-template-columns: 1fr 19em; gap: 1.5em; align-items: start }
  pre { font: 15px/1.6 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
  button { font: inherit; min-width: 2em; padding: 0 0.4em; border: 0; cursor: pointer }
  .on { outline: 2px solid CanvasText; position: relative; z-index: 1 }
  aside { position: sticky; top: 0; bottom: 0; max-height: 100vh; overflow: auto;
          padding: 2px; background: Canvas }
  aside div { display: grid; grid-template-columns: 3em 1fr 3.5em 4em; align-items: center }
  aside i { height: 1em; background: gray }
  @media (max-width: 45em) {
    :root { font-size: 14px } main { display: block }
    aside { max-height: 50vh; border-top: 1px solid } }
</style>
<h1>Which expert took which token?</h1>
<p><span id="about"></span> Its colour is that of the first, which has the largest weight. Point at
a token for its scores; press an expert for its tokens.</p>
<p>layer <span id="layers"></span></p>
<p>expert <span id="legend"></span> &nbsp;&para;&nbsp;line&nbsp;end</p>
<p id="notes"></p>
<main><pre id="text"></pre><aside id="token"></aside></main>
<script>
const data = DATA
let layer = data.layer, token = 0, only = null   // only: the expert whose tokens alone are coloured

const put = (id, parts) => document.getElementById(id).innerHTML = parts.join('')
const color = i => `color: black; background: ${data.palette[i % 8]}`
const expert = i => `<button style="${color(i)}" class="${i === only ? 'on' : ''}"
  onclick="only = ${i === only ? null : i}; drawLayer()">${i}</button>`

function drawLayer() {
  put('about', [data.about])
  put('layers', data.scores.map((_, l) => `<button class="${l === layer ? 'on' : ''}"
    onclick="layer = ${l}; drawLayer()">${l + 1}</button>`))
  put('legend', data.scores[0][0].map((_, i) => expert(i)))
  const notes = (data.notes[layer] ?? []).map(([i, s]) => `<br>expert ${expert(i)} takes ${s}`)
  put('notes', notes.length ? ['Of the whole validation text', ...notes] : [])
  put('text', data.texts.map((text, t) => {
    const chosen = data.chosen[layer][t], shown = only === null || chosen.includes(only)
    return `<span style="${shown ? color(only ?? chosen[0]) : ''}"
      onpointerover="token = ${t}; drawToken()">${text}</span>`
  }))
  drawToken()
}

function drawToken() {
  const head = `<div><b>"${data.texts[token]}"</b><b></b><b>${data.score}</b><b>weight</b></div>`
  const percent = 100 / (data.high - data.low)
  put('token', [head, ...data.scores[layer][token].map((score, i) => {
    const place = data.chosen[layer][token].indexOf(i)             // -1: not chosen
    const weight = data.weights[layer][token][place]
    return `<div><span>${expert(i)}</span><i style="${place < 0 ? '' : color(i)};
      margin-left: ${percent * (Math.min(0, score) - data.low)}%;
      width: ${percent * Math.abs(score)}%"></i> <span>${score.toFixed(2)}</span>
      <b>${place < 0 ? '' : weight.toFixed(2)}</b></div>`
  })])
  document.querySelector('pre .on')?.classList.remove('on')
  document.getElementById('text').children[token].classList.add('on')
}
drawLayer()
</script>
"""


# -----------------------------------------------------------------------------

def main(arguments):
    values, folders = parse(SampleConfig, arguments, __doc__)
    c = SampleConfig(**values)
    if len(folders) != 1:
        raise UserError('expected the folder of one run, such as out/quick_start/aoe, got '
                        f'{len(folders)}')
    folder, device = folders[0], choose_device(c.device)
    model, meta, dtype = load_model(folder, device)
    mlp, n_layer = model.config.mlp, model.config.n_layer
    if c.show_experts and (mlp == 'dense' or c.layer > n_layer):
        raise UserError('show_experts: expected a model with experts and a --layer of at most '
                        f'{n_layer}, got {mlp} and {c.layer}')
    if model.config.select == 'expert_choice':
        print('expert_choice needs the tokens to come: experts are chosen by top_k here',
              file=sys.stderr)
        model.config.select = 'top_k'                              # of all layers: they share it
    tokenizer = tokenizer_from(meta, c.data_dir)
    prompt = torch.tensor([tokenizer.encode(c.prompt)], device=device)         # (1, S)
    terminal = sys.stdout.isatty()
    as_text = color_text if terminal and not os.environ.get('NO_COLOR') else number_text

    for i in range(c.num_samples):
        if i > 0:
            print('-' * 80)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.generate(prompt, c.max_new_tokens, c.temperature, c.vocab_top_k,
                                    tokenizer.vocab_size, c.seed + i)[0]
            routing = watch_experts(model, tokens) if c.show_experts else None
        if c.show_experts:
            texts = [without_controls(tokenizer.decode([token])) for token in tokens.tolist()]
            print(as_text(texts, routing.chosen[c.layer - 1, :, 0].tolist()))
        else:
            text = tokenizer.decode(tokens.tolist())
            print(without_controls(text) if terminal else text)
    if c.show_experts:                   # a page of the last text
        log = read_log(os.path.join(folder, 'log.jsonl'))
        best = min(reversed(log), key=lambda entry: entry['val_loss'], default=None)
        notes = stand_outs(best) if best else []                   # best.pt is of this evaluation
        path = os.path.join(folder, 'experts.html')
        write_text(path, experts_page(folder, texts, routing, model.config, c.layer, notes))
        print(f'\nto open in a browser: {path}')


if __name__ == '__main__':
    run(main)
