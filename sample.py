"""
Let a trained model write.

    python sample.py out/shakespeare_cpu/aoe
    python sample.py out/shakespeare_cpu/moe --prompt="ROMEO." --temperature=0.8
    python sample.py out/shakespeare_cpu/aoe --num_samples=3 --seed=1
    python sample.py out/shakespeare_cpu/aoe --show_experts=True --layer=2

The argument is the folder of a run. Its best.pt brings its own configuration
and tokenizer. --show_experts=True colours each token by its first expert, or
writes the expert's number under it where there is no terminal (or NO_COLOR),
and writes experts.html beside best.pt: all layers, and for a token under the
mouse all its experts, their weights and scores.
"""

import html
import os
import sys
from dataclasses import dataclass

import torch

import configurator
from configurator import UserError, build, check_type, parse
from model import GPT, Choice, GPTConfig
from prepare_data import tokenizer_from
from train import choose_device, choose_dtype, load_checkpoint, write_text


@dataclass
class SampleConfig:
    """The keys of this script."""
    # keys
    prompt: str = '\n'                  # the text to go on from
    num_samples: int = 1                # texts to write
    max_new_tokens: int = 500           # length of each, in tokens
    temperature: float = 0.8            # below 1: safer, above: wilder, 0: always the likeliest token
    vocab_top_k: int | None = None      # draw from that many likeliest tokens only; None: from all
    seed: int = 1337                    # the same seed draws the same texts
    show_experts: bool = False          # show which expert took each token, and write experts.html
    layer: int = 1                      # for show_experts: the layer to print, from 1
    device: str = 'auto'                # auto: cuda, else mps, else cpu
    data_dir: str = 'data'              # where the gpt2 tokenizer keeps its table, if it had to be fetched

    def __post_init__(self):
        for key in ('num_samples', 'max_new_tokens', 'vocab_top_k', 'layer'):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f'{key}: expected a positive number, got {value}')
        if not 0 <= self.seed < 2**62:
            raise ValueError(f'seed: expected 0 or more and below 2^62, got {self.seed}')
        if self.temperature < 0:
            raise ValueError(f'temperature: expected 0 or more, got {self.temperature}')
        if not self.prompt:
            raise ValueError('prompt: expected at least one character, got none')


def load_model(folder, device):
    """The best model of the run in folder, and its tokenizer's meta. Raises UserError."""
    path = os.path.join(folder, 'best.pt')
    checkpoint = load_checkpoint(path, device)
    keys = GPTConfig.__dataclass_fields__
    model = GPT(build(GPTConfig, {key: check_type(GPTConfig, key, value, f'{path}: ')
                                  for key, value in checkpoint['config'].items() if key in keys}))
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path}: expected weights of the shapes in its own configuration, got others; '
                        'train again') from None
    return model.to(device), checkpoint['meta']


# -----------------------------------------------------------------------------
# which expert took which token

# Okabe and Ito's palette, whose colours all readers can tell apart, with the colour of letters on them
PALETTE = ['#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7', '#000000']
LETTERS = ['black', 'black', 'black', 'black', 'white', 'white', 'black', 'white']
LINE_END = '\u21b5'                       # an arrow: the line's end is a token, too


@torch.no_grad()
def watch_experts(model, tokens):
    """A Choice for each layer, of tokens (S,) read in windows of block_size; a token's heaviest expert comes first."""
    windows = []
    with model.without_looking_ahead(), model.watching_experts() as choices:
        for window in tokens.split(model.config.block_size):
            choices.clear()
            model(window[None])
            windows.append([heaviest_first(choice) for choice in choices])
    return [Choice(*map(torch.cat, zip(*layer))) for layer in zip(*windows)]


def heaviest_first(choice):
    order = choice.weights.argsort(descending=True)
    return Choice(*(field.gather(1, order) for field in choice))


def color_text(texts, experts):
    """The texts of tokens, each on the colour of its expert, for a terminal."""
    def paint(text, expert):
        red, green, blue = (int(PALETTE[expert % 8][i:i + 2], 16) for i in (1, 3, 5))
        return f'\033[48;2;{red};{green};{blue};{30 if LETTERS[expert % 8] == "black" else 97}m{text}\033[0m'
    legend = ' '.join(paint(f' {expert} ', expert) for expert in sorted(set(experts)))
    body = ''.join('\n'.join(paint(part, expert) if part else '' for part in text.replace('\n', f'{LINE_END}\n').split('\n'))
                   for text, expert in zip(texts, experts))
    return f'experts {legend}\n{body}'


def number_text(texts, experts, width=80):
    """The texts of tokens in lines of at most width, each with the numbers of the experts under it."""
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


def experts_page(name, texts, layers, score):
    """An HTML page: the texts of tokens once for each layer's Choice; score is what its scores are called."""
    styles = ''.join(f'.e{i}{{background:{color};color:{letters}}}' for i, (color, letters) in enumerate(zip(PALETTE, LETTERS)))
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title><style>body{{max-width:50em;'
             f'margin:2em auto;font-family:sans-serif}}pre{{white-space:pre-wrap;line-height:1.5}}{styles}</style>'
             f'<h1>{html.escape(name)}</h1><p>Each token has the colour of its first expert. Point at one to see all its experts.']
    for number, choice in enumerate(layers, 1):
        used = sorted(set(choice.experts[:, 0].tolist()))
        legend = ' '.join(f'<span class="e{expert % 8}">&nbsp;{expert}&nbsp;</span>' for expert in used)
        parts.append(f'<h2>layer {number}</h2><p>{legend}<pre>')
        for text, *columns in zip(texts, *(field.tolist() for field in choice)):
            told = ', '.join(f'expert {e}: weight {w:.2f}, {score} {s:.2f}' for e, w, s in zip(*columns) if w > 0)
            shown = html.escape(text).replace('\n', f'{LINE_END}\n')
            parts.append(f'<span class="e{columns[0][0] % 8}" title="{html.escape(repr(text))} {told}">{shown}</span>')
        parts.append('</pre>')
    return ''.join(parts) + '</html>\n'


def main(arguments):
    values, folders = parse(SampleConfig, arguments, __doc__)
    config = build(SampleConfig, values)
    if len(folders) != 1:
        raise UserError(f'expected the folder of one run, such as out/shakespeare_cpu/aoe, got {len(folders)}')
    device = choose_device(config.device)
    model, meta = load_model(folders[0], device)
    tokenizer = tokenizer_from(meta, config.data_dir)
    if config.show_experts and (model.config.mlp == 'dense' or config.layer > model.config.n_layer):
        raise UserError(f'show_experts: expected a model with experts and a --layer of at most {model.config.n_layer}, got '
                        f'{model.config.mlp} and {config.layer}')
    if model.config.mlp != 'dense' and model.config.select == 'expert_choice':
        print('expert_choice needs the tokens to come: experts are chosen by top_k here', file=sys.stderr)
    idx = torch.tensor([tokenizer.encode(config.prompt)], device=device)      # (1, S)

    dtype = choose_dtype('auto', device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for i in range(config.num_samples):
            tokens = model.generate(idx, config.max_new_tokens, config.temperature, config.vocab_top_k, config.seed + i)
            if config.show_experts:
                layers = watch_experts(model, tokens[0])
                texts = [tokenizer.decode([token]) for token in tokens[0].tolist()]
                show = color_text if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else number_text
                print(show(texts, layers[config.layer - 1].experts[:, 0].tolist()))
            else:
                print(tokenizer.decode(tokens[0].tolist()))
            if i < config.num_samples - 1:
                print('-' * 80)
    if config.show_experts:
        path = os.path.join(folders[0], 'experts.html')
        write_text(path, experts_page(folders[0], texts, layers, 'norm' if model.config.mlp == 'aoe' else 'logit'))
        print(f'\nall layers{" of the last text" * (config.num_samples > 1)}: {path}')


if __name__ == '__main__':
    configurator.run(main)
