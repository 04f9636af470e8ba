"""sample.py --show_experts: who took which token, in a terminal, without one, and on the page."""

import math
import os
import re
from html.parser import HTMLParser

import pytest
import torch

import sample
from conftest import SMALL, run_script
from model import GPT, GPTConfig, Routing
from sample import color_text, experts_page, number_text, watch_experts, without_controls


@pytest.mark.parametrize('changes', ({'mlp': 'moe'}, {'mlp': 'aoe'},
                                     {'mlp': 'aoe', 'select': 'top_p'}))
def test_what_is_shown_is_what_the_layers_did(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_embd': 16,
                             'n_head': 2, 'n_expert': 5, 'd_ffn': 24, 'd_low': 8} | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.eval()
    tokens = torch.randint(11, (12,))                              # a whole window, and half of one
    scores, experts, weights, _ = watch_experts(model, tokens)
    inputs = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    for window in (slice(0, 8), slice(8, 12)):
        _, _, routing = model(tokens[None, window])
        assert torch.equal(scores[:, window], routing.scores)
        for layer, t in ((0, 0), (1, 3)):
            shown, facts = ({i: w for i, w in zip(I.tolist(), w.tolist()) if i >= 0}
                            for I, w in ((experts[layer, window][t], weights[layer, window][t]),
                                         (routing.chosen[layer, t], routing.weights[layer, t])))
            assert shown == facts and sum(shown.values()) == pytest.approx(1)
    assert (weights.diff(dim=2) <= 0).all()                        # the heaviest first
    m = model.blocks[0].mlp
    for t, x in enumerate(torch.cat(inputs)):
        for i in range(5):
            if changes['mlp'] == 'aoe':
                expected = (x @ m.w_down[:, 8 * i:8 * i + 8]).norm().item()
            else:
                expected = (x @ m.router[:, i]).item()
            assert scores[0, t, i].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        if 'select' not in changes:
            a, b = scores[0, t, experts[0, t]].tolist()
            assert weights[0, t, 0].item() == pytest.approx(1 / (1 + math.exp(b - a)), rel=1e-4)


def test_numbers_under_tokens_by_hand():
    assert number_text(['ab', '\n', 'c', ' de'], [3, 0, 12, 1], width=80) == (
        'ab\u00b6\n3 0\nc  de\n121  ')
    lines = number_text(['abc'] * 5, [1] * 5, width=8).split('\n')
    assert lines == ['abcabc', '1  1  ', 'abcabc', '1  1  ', 'abc', '1  ']


def test_colours_of_tokens():
    text = color_text(['ab', '\n', 'c'], [0, 1, 9])
    assert re.sub('\033\\[[0-9;]*m', '', text) == 'experts  0   1   9 \nab\u00b6\nc'
    assert '\033[48;2;119;170;221;30mab\033[0m' in text             # #77AADD
    assert '\033[48;2;238;136;102;30mc\033[0m' in text             # 9 is 1 again


def test_nothing_of_a_text_rings_or_steers_a_terminal():
    assert without_controls('a\x1b[31mb\x07\tc\n\r\x9b') == 'a\ufffd[31mb\ufffd\tc\n\ufffd\ufffd'


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
    I, w = torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    p = torch.tensor([[1.9, 0.0, 3.0], [0.0, 5.0, 1.0]])
    routing = Routing(*(torch.stack([part, part]) for part in (p, I, w)), None)
    parser = Spans()
    parser.feed(experts_page('a run', ['<b>', '\n'], routing, 'norm'))
    assert parser.spans == 2 * [
        ["'<b>' expert 2: weight 0.75, norm 3.00, expert 0: weight 0.25, norm 1.90", '<b>'],
        ["'\\n' expert 1: weight 1.00, norm 5.00", '\u00b6\n']]


def test_show_experts_on_the_command_line(workspace, refuse, monkeypatch):
    run_script('train.py', *SMALL, '--mlp=moe,dense', '--max_iters=2', '--out_dir=out/shown',
               cwd=workspace)
    arguments = ['--show_experts=True', '--prompt=import', '--max_new_tokens=30']
    shown = run_script('sample.py', 'out/shown/moe', *arguments, '--layer=2', cwd=workspace)
    printed = shown.stdout.splitlines()
    plain = run_script('sample.py', 'out/shown/moe', *arguments[1:], cwd=workspace).stdout
    text = ''.join(printed[:-2:2]).replace('\u00b6', '\n')
    assert text.split() == plain.split() and max(map(len, printed)) <= 80
    assert all(set(line) <= set('0123 ') for line in printed[1:-2:2])
    assert printed[-1] == 'all layers of the last text: out/shown/moe/experts.html'
    parser = Spans()
    parser.feed((workspace / 'out/shown/moe/experts.html').read_text(encoding='utf-8'))
    assert len(parser.spans) == 2 * (len('import') + 30)
    monkeypatch.chdir(workspace)
    show = '--show_experts=True'
    assert 'at most 2, got moe and 3' in refuse(sample.main, 'out/shown/moe', show, '--layer=3')
    assert 'expected a model with experts' in refuse(sample.main, 'out/shown/dense', show)
    assert not os.path.exists('out/shown/dense/experts.html')


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_sampling_multiplies_in_the_dtype_that_was_trained_in(workspace, monkeypatch, dtype):
    run_script('train.py', *SMALL, '--mlp=aoe', '--max_iters=2', f'--dtype={dtype}',
               f'--out_dir=out/{dtype}', cwd=workspace)
    found, load_model = set(), sample.load_model

    def load_and_watch(folder, device):
        model, *others = load_model(folder, device)
        model.head.register_forward_hook(lambda _, x, logits: found.add(logits.dtype))
        return model, *others
    monkeypatch.setattr(sample, 'load_model', load_and_watch)
    sample.main([str(workspace / f'out/{dtype}/aoe'), '--max_new_tokens=2'])
    assert found == {getattr(torch, dtype)}
