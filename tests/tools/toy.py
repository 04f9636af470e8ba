"""
The toy experiment of the paper's appendix B. Two experts, one of which handles each token, classify
Gaussian vectors. Stage one has two classes whose means are opposite, and stage two adds a third
around zero. Which expert handles which class?

    python tests/tools/toy.py             # some seconds; draws out/toy.png

The scores of a linear router change their sign with x. The share of one class that moe sends to one
expert is therefore the share of the opposite class that it sends to the other. A norm is the same
for x and -x, so one expert of aoe takes both classes. With one expert for each token the softmax
over the chosen is 1. The router then has no gradient and stays as it was drawn, while Wdown learns
through the gate.
"""

import os
import sys

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, run
from model import GPTConfig, mlp_of
from sample import COLOR_OF, save_figure

D, SIGMAS, STEPS = 64, 3.0, 300          # SIGMAS: each number of a mean is this far from 0
SIGN = torch.tensor([1.0, -1.0, 0.0])    # the mean of each class, in units of SIGMAS


def draw_tokens(n, classes):
    """n vectors (n, D) from the first `classes` classes, and the class of each (n,)."""
    label = torch.randint(classes, (n,))
    return torch.randn(n, D) + SIGMAS * SIGN[label, None], label


def shares(mlp, seed):
    """Train a layer and a linear head on both stages. Returns two numbers after each: the share of
    each class that goes to the main expert of the first, and the accuracy on the classes so far."""
    torch.manual_seed(seed)
    layer = mlp_of(GPTConfig(mlp=mlp, n_embd=D, n_head=1, n_expert=2, top_k=1, d_ffn=D, d_low=8))
    head = torch.nn.Linear(D, 3, bias=False)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[-2] ** -0.5)
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], lr=3e-3)
    results = []
    for classes in (2, 3):
        for _ in range(STEPS):
            x, label = draw_tokens(256, classes)
            F.cross_entropy(head(layer(x)[0]), label).backward()
            optimizer.step()
            optimizer.zero_grad()
        x, label = draw_tokens(3000, 3)
        with torch.no_grad():
            h, routing = layer(x)
            expert, right = routing.chosen[:, 0], head(h).argmax(1) == label
        main_expert = expert[label == 0].mode().values
        share = [(expert[label == k] == main_expert).float().mean().item() for k in range(3)]
        results.append((share, right[label < classes].float().mean().item()))
    return results


def main(arguments):
    path, *more = arguments or ['out/toy.png']
    if path in ('-h', '--help'):
        return print(__doc__.strip())
    if more or path.startswith('-'):
        raise UserError(f'expected the path of a picture, got {" ".join(arguments)!r}')
    figure = Figure(figsize=(7, 5), layout='constrained')
    for row, mlp in zip(figure.subplots(2, 2, sharey=True), ('moe', 'aoe')):
        seeds = [shares(mlp, seed) for seed in range(3)]
        for stage, axes in enumerate(row):
            classes = stage + 2
            for seed, results in enumerate(seeds):
                share, accuracy = results[stage]
                handled = ', '.join(f'{s:.2f}' for s in share[:classes])
                print(f'{mlp}, seed {seed}, stage {stage + 1}: the first class\'s expert handles '
                      f'{handled}; accuracy {accuracy:.3f}')
                axes.bar([k + (seed - 1) * 0.25 for k in range(classes)], share[:classes], 0.22,
                         color=COLOR_OF[mlp])
            axes.set_xticks(range(classes), [f'mean {sign * SIGMAS:g}' for sign in SIGN[:classes]])
            axes.set(title=f'{mlp}, stage {stage + 1}', ylim=(0, 1))
    figure.supylabel('share of a class that goes to the first class\'s expert')
    figure.supxlabel('each bar is a seed', fontsize=9)
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    save_figure(figure, path)
    print(f'drawn: {path}')


if __name__ == '__main__':
    run(main)
