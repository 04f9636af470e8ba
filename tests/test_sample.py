"""sample.py --show_experts: who took which token, in a terminal, without one, and on the page."""

import math
import os
import re
from html.parser import HTMLParser

import pytest
import torch

import sample
from conftest import SMALL, run_script
from model import GPT, Choice, GPTConfig
from sample import color_text, experts_page, number_text, watch_experts


@pytest.mark.parametrize('changes', ({'mlp': 'moe'}, {'mlp': 'aoe'}, {'mlp': 'aoe', 'select': 'top_p'}))
def test_what_is_shown_is_what_the_layers_did(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'n_expert': 5,
                             'd_ffn': 24, 'd_low': 8} | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.eval()
    tokens = torch.randint(11, (12,))                                         # a whole window, and half of one
    layers = watch_experts(model, tokens)
    for window in (slice(0, 8), slice(8, 12)):
        _, _, routing = model(tokens[None, window])
        for layer, chosen in enumerate(layers):
            experts, weights = chosen.experts[window], chosen.weights[window]
            counts = torch.stack([(weights[experts == i] > 0).sum() for i in range(5)])
            assert torch.allclose(routing.load[layer], counts / counts.sum())
            assert torch.allclose(weights.sum(1), torch.ones(len(weights))) and (weights.diff(dim=1) <= 0).all()
    inputs = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda layer, args: inputs.append(args[0][0]))
    model(tokens[None, :8])
    m, x = model.blocks[0].mlp, inputs[0]
    for t in range(8):
        for expert, weight, score in zip(layers[0].experts[t], layers[0].weights[t], layers[0].scores[t]):
            if changes['mlp'] == 'aoe':
                assert score.item() == pytest.approx((x[t] @ m.w_down[:, 8 * expert:8 * expert + 8]).norm().item(), rel=1e-4)
            else:
                assert score.item() == pytest.approx((x[t] @ m.router[:, expert]).item(), rel=1e-3, abs=1e-5)
        if 'select' not in changes:
            a, b = layers[0].scores[t].tolist()
            assert layers[0].weights[t, 0].item() == pytest.approx(1 / (1 + math.exp(b - a)), rel=1e-4)


def test_numbers_under_tokens_by_hand():
    assert number_text(['ab', '\n', 'c', ' de'], [3, 0, 12, 1], width=80) == 'ab\u21b5\n3 0\nc  de\n121  '
    lines = number_text(['abc'] * 5, [1] * 5, width=8).split('\n')
    assert lines == ['abcabc', '1  1  ', 'abcabc', '1  1  ', 'abc', '1  ']


def test_colours_of_tokens():
    text = color_text(['ab', '\n', 'c'], [0, 1, 9])
    assert re.sub('\033\\[[0-9;]*m', '', text) == 'experts  0   1   9 \nab\u21b5\nc'
    assert '\033[48;2;230;159;0;30mab\033[0m' in text and '\033[48;2;86;180;233;30mc\033[0m' in text   # 9 is 1 again


class Spans(HTMLParser):
    """The coloured spans of a page: [title, text]."""

    def __init__(self):
        super().__init__()
        self.spans, self.inside = [], False

    def handle_starttag(self, tag, attributes):
        if tag == 'span' and 'title' in dict(attributes):
            self.spans.append([dict(attributes)['title'], ''])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.spans[-1][1] += data


def test_the_page_tells_every_token_of_every_layer():
    chosen = Choice(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([[3.0, 1.9], [5.0, 1.0]]))
    parser = Spans()
    parser.feed(experts_page('a run', ['<b>', '\n'], [chosen, chosen], 'norm'))
    assert parser.spans == 2 * [["'<b>' expert 2: weight 0.75, norm 3.00, expert 0: weight 0.25, norm 1.90", '<b>'],
                                ["'\\n' expert 1: weight 1.00, norm 5.00", '\u21b5\n']]


def test_show_experts_on_the_command_line(workspace, refuse, monkeypatch):
    run_script('train.py', *SMALL, '--mlp=moe,dense', '--max_iters=2', '--out_dir=out/shown', cwd=workspace)
    arguments = ['--show_experts=True', '--prompt=import', '--max_new_tokens=30']
    printed = run_script('sample.py', 'out/shown/moe', *arguments, '--layer=2', cwd=workspace).stdout.splitlines()
    text, plain = ''.join(printed[:-2:2]), run_script('sample.py', 'out/shown/moe', *arguments[1:], cwd=workspace).stdout
    assert text.replace('\u21b5', '\n').split() == plain.split() and max(map(len, printed)) <= 80
    assert all(set(line) <= set('0123 ') for line in printed[1:-2:2])
    assert printed[-1] == 'all layers: out/shown/moe/experts.html'
    parser = Spans()
    parser.feed((workspace / 'out/shown/moe/experts.html').read_text(encoding='utf-8'))
    assert len(parser.spans) == 2 * (len('import') + 30)
    monkeypatch.chdir(workspace)
    assert 'of at most 2, got moe and 3' in refuse(sample.main, 'out/shown/moe', '--show_experts=True', '--layer=3')
    assert 'expected a model with experts' in refuse(sample.main, 'out/shown/dense', '--show_experts=True')
    assert not os.path.exists('out/shown/dense/experts.html')
