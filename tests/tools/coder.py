"""
What does an expert take? Code or prose, letters, capitals, spaces, line ends? This counts it on the
validation text, for runs that train.py has finished with experts and characters as tokens.

    python train.py config/quick_start.py
    python tests/tools/coder.py out/quick_start/moe out/quick_start/aoe --picture=out/classes.png

The table says, in percent, how much of what an expert handles is of each class, and how much of all
text is. The last column asks whether an expert is a lookup on the character: it is the share of the
entropy of the heaviest expert that the current character alone explains, 100 % if one character
always goes to the same expert.

The picture has a row for each run and a panel for each layer. It shows how much of a class each
expert handles, so a row of a panel sums to the number of experts that take a token.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, parse, run
from model import count
from prepare_data import load_meta, tokenizer_from
from sample import load_model, print_rows, read_result, save_figure

CLASSES = ('code', 'letters', 'capitals', 'spaces', 'line ends', 'others')
CODE, TURN = 'prose_and_code', 20_000    # the data in which prose and code take turns, of this size


@dataclass
class CoderConfig:
    """The keys of this script."""
    picture: str | None = None           # draw to this .png, too
    windows: int = 2000                  # windows of block_size to read, spread over the text
    data_dir: str = 'data'               # where the runs' data are


def class_of(character):
    """The class of a character, but for code."""
    if character.isalpha():
        return 'capitals' if character.isupper() else 'letters'
    if character in '\r\n':
        return 'line ends'
    return 'spaces' if character.isspace() else 'others'


@torch.no_grad()
def what_experts_take(folder, config):
    """Three counts of tokens: all of each class (C,); those of each class that the experts of the
    run in folder handle (L, C, E); and those of each character whose heaviest expert each one is
    (L, V, E). Raises UserError."""
    model, meta, _ = load_model(folder, 'cpu')
    dataset = read_result(folder)['dataset']
    data = os.path.join(config.data_dir, dataset)
    if model.config.mlp == 'dense' or load_meta(data)['sha256'] != meta['sha256']:
        raise UserError(f'{folder}: expected a run with experts, trained on {data} as it is now')
    S, E, V = model.config.block_size, model.config.n_expert, meta['vocab_size']
    text = np.fromfile(os.path.join(data, 'val.bin'), np.uint16).astype(np.int64)
    starts = np.linspace(0, len(text) - S, config.windows).astype(int)
    places = torch.from_numpy(starts[:, None] + np.arange(S))      # (windows, S)
    tokenizer = tokenizer_from(meta)
    kinds = [class_of(tokenizer.decode([token])) for token in range(V)]
    is_of = torch.tensor([[kind == name for kind in kinds] for name in CLASSES])           # (C, V)
    total = handled = heaviest = 0
    for place in places.split(50):
        tokens = torch.from_numpy(text[place])                     # (50, S)
        routing = model(tokens)[2]
        of_class = is_of[:, tokens.flatten()]                      # (C, T)
        if dataset == CODE:
            of_class[0] = (place.flatten() + meta['train_tokens']) // TURN % 2 == 1
        total += of_class.sum(1)
        handled += torch.stack([torch.stack([count(I[mask], E) for mask in of_class])
                                for I in routing.chosen])
        first = routing.chosen.gather(2, routing.weights.argmax(2, keepdim=True))[:, :, 0]
        heaviest += torch.stack([count(tokens.flatten()[I >= 0] * E + I[I >= 0], V * E).view(V, E)
                                 for I in first])                  # I (T,): -1 where nobody is
    return total, handled, heaviest


def entropy(counts):
    """The entropy of what is counted, in nats."""
    return torch.special.entr(counts.flatten() / counts.sum()).sum()


def explained(joint):
    """The share of the entropy of a token's expert that its character explains, from how often each
    character (V) meets each expert (E): 1 - H(expert | character) / H(expert)."""
    given_character = entropy(joint) - entropy(joint.sum(1))
    return 1 - (given_character / entropy(joint.sum(0))).item()


def rows_of(folder, total, handled, heaviest):
    """The rows of the table for one run: for each layer all text, then each expert."""
    def percent(counts):                 # code is one question, the other classes another
        return [f'{100 * n:.0f}' for n in counts / counts[1:].sum()]
    for layer, (of_class, joint) in enumerate(zip(handled, heaviest), 1):
        share = f'{100 * explained(joint):.0f}'
        yield f'{folder}, layer {layer}', 'all text', *percent(total), share
        for expert, taken in enumerate(of_class.T):
            yield '', f'expert {expert}', *percent(taken), ''


def draw(counts, path):
    """The picture of counts, {folder: what_experts_take(folder)}."""
    from matplotlib.figure import Figure
    n_layer = max(len(handled) for _, handled, _ in counts.values())
    figure = Figure(figsize=(1.2 + 1.8 * n_layer, 0.6 + 1.1 * len(counts)), layout='constrained')
    panels = figure.subplots(len(counts), n_layer, squeeze=False, sharey=True)
    for row, (folder, (total, handled, _)) in zip(panels, counts.items()):
        for layer, axes in enumerate(row):
            axes.set_visible(layer < len(handled))                 # some runs have fewer layers
            if axes.get_visible():
                axes.set_title(f'{os.path.basename(folder)}, layer {layer + 1}', fontsize=8)
                axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=7)
                axes.tick_params(axis='x', labelsize=7)
                share = (handled[layer] / total[:, None]).numpy()  # (C, E)
                image = axes.imshow(share, cmap='cividis', vmin=0, vmax=1, aspect='auto')
    figure.colorbar(image, ax=panels)
    figure.supxlabel('expert; how much of a class it handles', fontsize=8)
    save_figure(figure, path)


def main(arguments):
    given, folders = parse(CoderConfig, arguments, __doc__)
    config = CoderConfig(**given)
    if not folders:
        raise UserError('expected folders of runs, such as out/quick_start/moe, got none')
    counts = {folder: what_experts_take(folder, config) for folder in folders}
    print_rows([('run', 'in percent', *CLASSES, 'character explains'),
                *(row for folder in folders for row in rows_of(folder, *counts[folder]))])
    if config.picture:
        draw(counts, config.picture)


if __name__ == '__main__':
    run(main)
