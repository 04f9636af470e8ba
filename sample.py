"""
Let a trained model write.

    python sample.py out/quick_start/aoe
    python sample.py out/quick_start/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/quick_start/aoe --num_samples=3 --seed=1
    python sample.py out/quick_start/aoe --show_experts=True --layer=2

The argument is the folder of a run. Its best.pt brings its own configuration
and tokenizer. --show_experts=True colours each token by its first expert, or
writes the expert's number under it where there is no terminal (or NO_COLOR),
and writes experts.html beside best.pt: all layers, and for a token under the
mouse all its experts, their weights and scores.
"""

import os
import re
import sys
from dataclasses import dataclass
from html import escape

import torch

from configurator import UserError, build, expect, parse, run, write_text
from model import GPT, GPTConfig, Routing
from prepare_data import tokenizer_from
from train import choose_device, load_checkpoint, load_weights


@dataclass
class SampleConfig:
    """The keys of this script."""
    # keys
    prompt: str = '\n'                   # the text to go on from
    num_samples: int = 1                 # texts to write
    max_new_tokens: int = 500            # length of each, in tokens
    temperature: float = 0.8             # below 1: safer, above: wilder, 0: always the likeliest
    vocab_top_k: int | None = None       # draw from that many likeliest tokens only; None: from all
    seed: int = 1337                     # the same seed draws the same texts
    show_experts: bool = False           # show which expert took each token, and write experts.html
    layer: int = 1                       # for show_experts: the layer to print, from 1
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    data_dir: str = 'data'               # where gpt2's table lies, if it had to be fetched

    def __post_init__(self):
        expect(self, 'num_samples max_new_tokens vocab_top_k layer', 'a positive number',
               lambda n: n > 0)
        expect(self, 'seed', '0 or more and below 2^62', lambda seed: 0 <= seed < 2**62)
        expect(self, 'temperature', '0, or 0.001 or more', lambda t: t == 0 or t >= 0.001)
        expect(self, 'prompt', 'at least one character', lambda prompt: prompt)


def load_model(folder, device):
    """The best model of the run in folder, its tokenizer's meta, and the dtype it trained in."""
    path = os.path.join(folder, 'best.pt')
    checkpoint = load_checkpoint(path, device)
    shape = checkpoint['shape']          # the model's keys and others
    values = {key: value for key, value in shape.items() if hasattr(GPTConfig, key)}
    if values.get('select') == 'expert_choice':
        print('expert_choice needs the tokens to come: experts are chosen by top_k here',
              file=sys.stderr)
        values['select'] = 'top_k'
    model = GPT(build(GPTConfig, values))
    load_weights(model, checkpoint, path)
    return model.eval().to(device), checkpoint['meta'], getattr(torch, shape['dtype'])


# -----------------------------------------------------------------------------
# which expert took which token

# Paul Tol's light scheme: black letters can be read on it, and all readers tell it apart
PALETTE = ['#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#99DDFF', '#44BB99', '#BBCC33', '#AAAA00']
LINE_END = '\u00b6'                      # the line's end is a token, too


@torch.no_grad()
def watch_experts(model, tokens):
    """The Routing (L, S, ...) of tokens (S,), read in windows of block_size; a token's heaviest
    expert comes first."""
    windows = [model(window[None])[2] for window in tokens.split(model.config.block_size)]
    scores, chosen, weights = (torch.cat(parts, dim=1) for parts in list(zip(*windows))[:3])
    order = weights.argsort(descending=True)
    return Routing(scores, chosen.gather(2, order), weights.gather(2, order), None)


def without_controls(text):
    """text without what would ring or steer a terminal."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)


def color_text(texts, experts):
    """The texts of tokens, each on the colour of its expert, for a terminal."""
    def paint(text, expert):
        red, green, blue = bytes.fromhex(PALETTE[expert % 8][1:])
        return f'\033[48;2;{red};{green};{blue};30m{text}\033[0m'
    legend = ' '.join(paint(f' {expert} ', expert) for expert in sorted(set(experts)))
    lines = [f'experts {legend}', '']
    for text, expert in zip(texts, experts):
        first, *others = text.replace('\n', f'{LINE_END}\n').split('\n')
        lines[-1] += paint(first, expert)
        lines += [paint(part, expert) if part else '' for part in others]
    return '\n'.join(lines)


def number_text(texts, experts, width=80):
    """The texts of tokens in lines of at most width, each with the numbers of experts under it."""
    lines, upper, lower = [], '', ''
    for text, expert in zip(texts, experts):
        text = text.replace('\n', LINE_END)
        column = max(len(text), len(str(expert)))
        if len(upper) + column > width:
            lines, upper, lower = [*lines, upper, lower], '', ''
        upper, lower = upper + text.ljust(column), lower + str(expert).ljust(column)
        if text.endswith(LINE_END):
            lines, upper, lower = [*lines, upper, lower], '', ''
    return '\n'.join([*lines, upper, lower]).rstrip('\n')


def experts_page(name, texts, routing, score):
    """An HTML page: the texts of tokens, once for each layer; score is what scores are called."""
    colors = ''.join(f'.e{i}{{background:{color}}}' for i, color in enumerate(PALETTE))
    parts = [f'<!doctype html><meta charset="utf-8"><title>{escape(name)}</title><style>{colors}'
             'body{max-width:50em;margin:2em auto} pre{white-space:pre-wrap}</style>'
             'Each token has the colour of its first expert. Point at one to see all.']
    facts = (part.tolist() for part in routing[:3])
    for layer, (scores, chosen, weights) in enumerate(zip(*facts), 1):
        used = sorted({experts[0] for experts in chosen})
        legend = ' '.join(f'<span class="e{i % 8}">&nbsp;{i}&nbsp;</span>' for i in used)
        parts.append(f'<h2>layer {layer}</h2>{legend}<pre>')
        for text, p, I, w in zip(texts, scores, chosen, weights):
            told = ', '.join(f'expert {i}: weight {weight:.2f}, {score} {p[i]:.2f}'
                             for i, weight in zip(I, w) if i >= 0)
            parts.append(f'<span class="e{I[0] % 8}" title="{escape(repr(text))} {told}">'
                         + escape(text).replace('\n', f'{LINE_END}\n') + '</span>')
        parts.append('</pre>')
    return ''.join(parts)


def main(arguments):
    values, folders = parse(SampleConfig, arguments, __doc__)
    config = build(SampleConfig, values)
    if len(folders) != 1:
        raise UserError('expected the folder of one run, such as out/quick_start/aoe, got '
                        f'{len(folders)}')
    folder, device = folders[0], choose_device(config.device)
    model, meta, dtype = load_model(folder, device)
    tokenizer = tokenizer_from(meta, config.data_dir)
    mlp, n_layer = model.config.mlp, model.config.n_layer
    if config.show_experts and (mlp == 'dense' or config.layer > n_layer):
        raise UserError(f'show_experts: expected a model with experts and a --layer of at most '
                        f'{n_layer}, got {mlp} and {config.layer}')
    idx = torch.tensor([tokenizer.encode(config.prompt)], device=device)      # (1, S)
    terminal = sys.stdout.isatty()
    for i in range(config.num_samples):
        if i > 0:
            print('-' * 80)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = model.generate(idx, config.max_new_tokens, config.temperature,
                                    config.vocab_top_k, tokenizer.vocab_size, config.seed + i)[0]
            routing = watch_experts(model, tokens) if config.show_experts else None
        if not config.show_experts:
            text = tokenizer.decode(tokens.tolist())
            print(without_controls(text) if terminal else text)
            continue
        texts = [without_controls(tokenizer.decode([token])) for token in tokens.tolist()]
        show = color_text if terminal and not os.environ.get('NO_COLOR') else number_text
        print(show(texts, routing.chosen[config.layer - 1, :, 0].tolist()))
    if config.show_experts:
        path, score = os.path.join(folder, 'experts.html'), 'norm' if mlp == 'aoe' else 'logit'
        write_text(path, experts_page(folder, texts, routing, score))
        print(f'\nall layers of the last text: {path}')


if __name__ == '__main__':
    run(main)
