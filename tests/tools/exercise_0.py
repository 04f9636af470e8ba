"""
Exercise 0: write MoE and AoE yourself.

    python tests/tools/exercise_0.py

makes out/exercise_0/model.py, a copy of model.py in which MoE.forward and AoE.forward are empty and
JudgedAoE, which looks like AoE, is left out. Fill them in from Algorithms 1 and 2 of the paper. Use
route, of_all, norm, choose, weigh, experts, auxiliary_loss and Routing. The same command then
compares them with a loop over tokens and experts, written from the paper.
"""

import ast
import os
import sys
import types

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, expecting, read_text, run, write_text

YOURS = 'out/exercise_0/model.py'
ALGORITHM = {'MoE': 'Algorithm 1', 'AoE': 'Algorithm 2'}


def emptied(source):
    """The source of model.py without the two bodies and without JudgedAoE."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):        # from the end, so line numbers stay right
        name = getattr(node, 'name', None)
        if name == 'JudgedAoE':
            del lines[node.lineno - 1:node.end_lineno + 2]         # and two blank lines
        elif name in ALGORITHM:
            forward, = (f for f in node.body if getattr(f, 'name', None) == 'forward')
            lines[forward.body[0].lineno - 1:forward.end_lineno] = [
                f"        raise NotImplementedError('yours to write: {ALGORITHM[name]}')\n"]
    return ''.join(lines)


def by_the_paper(m, x):
    """h (T, D), the scores and the weights (T, E), and L_aux of a layer, by a loop."""
    c, E = m.config, m.config.n_expert
    h, p, weights = [], [], []                                     # of each token

    def score(x, i):
        return x @ m.router[:, i] if c.mlp == 'moe' else (x @ m.w_down[i]).square().sum().sqrt()

    for token in x:
        scores = [score(token, i) for i in range(E)]
        best = torch.stack(scores).topk(c.top_k).indices.tolist()
        total = sum(scores[i].exp() for i in best)
        w = [scores[i].exp() / total if i in best else torch.zeros(()) for i in range(E)]
        y = []
        for i in best:
            gate = token @ m.w_down[i] @ m.w_up[i] if c.factorised else token @ m.w_g[i]
            y.append(w[i] * ((gate * torch.sigmoid(gate) * (token @ m.w_p[i])) @ m.w_o[i]))
        h.append(sum(y))
        p.append(torch.stack(scores))
        weights.append(torch.stack(w))
    h, p, weights = torch.stack(h), torch.stack(p), torch.stack(weights)
    f = (weights > 0).float().mean(0)
    mean_p = (p.exp() / p.exp().sum(1, keepdim=True)).mean(0)
    return h, p, weights, c.aux_weight * E * (f * mean_p).sum()


def by_the_layer(m, x):
    """The same four, as the layer computes them."""
    h, (p, I, w, aux_loss) = m(x)
    return h, p, torch.zeros_like(p).scatter(1, I, w), aux_loss


def judge(path):
    """A line for each layer of the model.py at path that is not the paper's."""
    wrong = []
    for mlp, factorised in (('moe', False), ('moe', True), ('aoe', True)):
        name = f'{mlp}, {"factorised" if factorised else "whole"} gate'
        try:
            module = sys.modules['yours'] = types.ModuleType('yours')          # for dataclasses
            exec(read_text(path), module.__dict__)
            torch.manual_seed(0)
            m = module.mlp_of(module.GPTConfig(
                mlp=mlp, factorised=factorised, n_embd=16, n_head=2, d_ffn=24, n_expert=5, top_k=2,
                aux_weight=0.01))
            for parameter in m.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            x = torch.randn(12, 16, requires_grad=True)
            names = ['h', 'the scores', 'the weights', 'L_aux', 'the gradient of x',
                     *(f'the gradient of {key}' for key, _ in m.named_parameters())]
            results = []
            for compute in (by_the_paper, by_the_layer):
                h, p, weights, aux_loss = compute(m, x)
                gradients = torch.autograd.grad(h.sin().sum() + 100 * aux_loss,
                                                [x, *m.parameters()], materialize_grads=True)
                results.append([h, p, weights, aux_loss, *gradients])
            different = [what for what, a, b in zip(names, *results)
                         if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-4)]
            if different:
                wrong.append(f'{name}: not the paper\'s are {", ".join(different)}')
        except Exception as error:       # a student's code may raise any
            said = (str(error).splitlines() or [''])[0]
            wrong.append(f'{name}: {type(error).__name__}: {said}')
    return wrong


def main(arguments):
    if {'-h', '--help'} & {*arguments}:
        return print(__doc__.strip())
    if arguments:
        raise UserError(f'expected no arguments, got {arguments[0]!r}')
    if not os.path.exists(YOURS):
        with expecting(f'expected to make {YOURS}'):
            os.makedirs(os.path.dirname(YOURS), exist_ok=True)
        write_text(YOURS, emptied(read_text(os.path.join(ROOT, 'model.py'))))
        print(f'made {YOURS}: fill in MoE.forward and AoE.forward, then run this again')
    wrong = judge(YOURS)
    print('\n'.join(f'red    {line}' for line in wrong) or 'green  MoE and AoE are the paper\'s')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    run(main)
