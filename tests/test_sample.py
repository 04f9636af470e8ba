"""sample.py: the text, which expert took which token in a terminal, and the page."""

import dataclasses
import html
import math
import os
import re

import pytest
import torch

import sample
from configurator import hash_of, read_text
from conftest import ROOT
from model import GPT, GPTConfig
from prepare_data import CharTokenizer
from sample import PALETTE, color_text, experts_page, watch_experts

VOCABULARY = '\n !"&\'/<>abcdeiprst'                               # what could be taken for a tag
MODEL_PY = hash_of(read_text(os.path.join(ROOT, 'model.py')))


def make_run(folder, dtype='float32', **changes):
    """A folder as train.py writes it, of a tiny model. Returns its path and the model."""
    tiny = {'vocab_size': len(VOCABULARY), 'block_size': 8, 'n_layer': 2, 'n_embd': 16, 'n_head': 2,
            'n_expert': 5, 'd_ffn': 24}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**tiny | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    recipe = dataclasses.asdict(model.config) | {'dtype': dtype, 'seed': 1, 'model.py': MODEL_PY}
    meta = {'tokenizer': 'char', 'vocabulary': VOCABULARY, 'vocab_size': len(VOCABULARY)}
    torch.save({'model': model.state_dict(), 'meta': meta, 'recipe': recipe}, folder / 'best.pt')
    return str(folder), model


def layers_of(page):
    """The layers of a page of experts, each a list of (style, tip, text) of its tokens."""
    return [[tuple(map(html.unescape, token)) for token in re.findall(
        '<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', layer)]
            for layer in page.split('<h2>')[1:]]


def test_the_text_is_what_generate_draws_and_each_sample_has_a_seed(tmp_path, capsys):
    folder, model = make_run(tmp_path)
    sample.main([folder, '--prompt=abc', '--max_new_tokens=30', '--num_samples=2', '--seed=4',
                 '--vocab_top_k=7', '--temperature=1.5'])
    tokenizer = CharTokenizer(VOCABULARY)
    expected = [tokenizer.decode(model.generate(torch.tensor([tokenizer.encode('abc')]), 30, 1.5, 7,
                                                seed=seed)[0].tolist()) for seed in (4, 5)]
    assert capsys.readouterr().out == f'{expected[0]}\n{"-" * 80}\n{expected[1]}\n'
    assert expected[0] != expected[1]
    sample.main([make_run(tmp_path, vocab_size=200)[0], '--temperature=90', '--max_new_tokens=100'])
    assert set(capsys.readouterr().out) <= set(VOCABULARY)         # no token beyond the tokenizer


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_sampling_multiplies_in_the_dtype_that_was_trained_in(tmp_path, monkeypatch, dtype):
    folder, _ = make_run(tmp_path, dtype=dtype)
    found, forward = set(), GPT.forward

    def watched(*arguments):
        logits, *others = forward(*arguments)
        found.add(logits.dtype)
        return logits, *others
    monkeypatch.setattr(GPT, 'forward', watched)
    sample.main([folder, '--max_new_tokens=2'])
    assert found == {getattr(torch, dtype)}


def test_refusals(tmp_path, refuse):
    folder, _ = make_run(tmp_path)
    show, best = '--show_experts=True', torch.load(tmp_path / 'best.pt')
    assert 'got layer 3 of aoe' in refuse(sample.main, folder, show, '--layer=3')
    for key, value in (('model', {}), ('recipe', best['recipe'] | {'top_k': 'x'})):
        torch.save(best | {key: value}, tmp_path / 'best.pt')
        assert 'best.pt: expected ' in refuse(sample.main, folder), (key, value)
    folder, _ = make_run(tmp_path, mlp='dense')
    assert 'got layer 1 of dense' in refuse(sample.main, folder, show)


@pytest.mark.parametrize('trained_with, is_told', ((MODEL_PY, False), ('old', True), (None, True)))
def test_a_model_that_was_trained_with_another_model_py_is_told(
        tmp_path, capsys, trained_with, is_told):
    folder, _ = make_run(tmp_path)
    best = torch.load(tmp_path / 'best.pt')
    best['recipe']['model.py'] = trained_with
    torch.save(best, tmp_path / 'best.pt')
    sample.main([folder, '--max_new_tokens=2'])
    assert capsys.readouterr().err == is_told * (
        f'{folder} was trained with a different model.py; results may differ. '
        f'diff {folder}/model.py model.py shows how\n')


@pytest.mark.parametrize('changes', ({'mlp': 'moe'}, {'mlp': 'aoe'}, {'mlp': 'aoe', 'd_judge': 3},
                                     {'mlp': 'aoe', 'select': 'top_p'},
                                     {'mlp': 'moe', 'select': 'expert_choice'}))
def test_what_is_shown_is_what_the_layers_did(tmp_path, changes):
    (_, model), inputs = make_run(tmp_path, d_low=8, **changes), []
    tokens = torch.randint(11, (12,))                              # a whole window, and half of one
    scores, weights = watch_experts(model, tokens)
    model.blocks[0].mlp.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    for window in (slice(0, 8), slice(8, 12)):
        _, _, routing = model(tokens[None, window])
        for layer, t in ((0, 0), (1, 3)):
            shown = {i: w for i, w in enumerate(weights[layer, window][t].tolist()) if w}
            facts = zip(routing.chosen[layer, t].tolist(), routing.weights[layer, t].tolist())
            assert shown == {i: w for i, w in facts if i >= 0}
    m = model.blocks[0].mlp
    for t, x in enumerate(torch.cat(inputs)):
        if changes['mlp'] == 'aoe':
            expected = (x @ m.w_down)[:, :changes.get('d_judge', 8)].norm(dim=1)
        else:
            expected = x @ m.router
        torch.testing.assert_close(scores[0, t], expected, rtol=1e-3, atol=1e-5)
        if 'select' not in changes:
            a, b = scores[0, t].topk(2).values.tolist()
            assert weights[0, t].max().item() == pytest.approx(1 / (1 + math.exp(b - a)), rel=1e-4)


def test_colours_of_tokens_by_hand():
    weights = [[0.6, 0.4] + 8 * [0.0], [0.0, 1.0] + 8 * [0.0], 9 * [0.0] + [1.0], 10 * [0.0]]
    text = color_text(['ab', '\r\n', 'c', 'd'], weights)           # a \r would hide 'ab'
    assert re.sub('\033\\[[0-9;]*m', '', text) == (
        'expert  0   1   9    \u00b6 line end\n\nab \u00b6\ncd')
    assert '\033[48;2;119;170;221;30mab\033[0m' in text            # #77AADD
    assert text.endswith('\033[48;2;238;136;102;30mc\033[0md')     # 9 is 1 again; nobody's is plain


def test_the_page_by_hand():
    p = 2 * [[[1.9, -2.0049, 3.0], [0.0, 5.0, 1.0], [0.0, 0.0, 0.0]]]
    w = 2 * [[[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    assert layers_of(experts_page(['</pre>', '&\n', 'x'], p, w)) == 2 * [[
        ('color: black; background: #EEDD88', '0: 1.90, weight 0.25\n1: -2.00\n'
                                              '2: 3.00, weight 0.75', '</pre>'),
        ('color: black; background: #EE8866', '0: 0.00\n1: 5.00, weight 1.00\n2: 1.00',
         '&\u00b6\n'),
        ('', '0: 0.00\n1: 0.00\n2: 0.00', 'x')]]                   # nobody handles it


@pytest.mark.parametrize('changes', ({'mlp': 'aoe'}, {'mlp': 'aoe', 'select': 'expert_choice'}))
def test_the_page_of_a_run(tmp_path, capsys, changes):
    folder, model = make_run(tmp_path, **changes)
    prompt = '</script><!"&\''
    sample.main([folder, f'--prompt={prompt}', '--temperature=2', '--show_experts=True',
                 '--max_new_tokens=100', '--layer=2'])
    page = tmp_path / 'experts.html'
    layers = layers_of(page.read_text(encoding='utf-8'))
    text = ''.join(text for _, _, text in layers[0]).replace('\u00b6', '')
    assert text.startswith(prompt) and len(text) == len(prompt) + 100 and len(layers) == 2
    printed = re.sub('\033\\[[0-9;]*m', '', capsys.readouterr().out).split('\n\n', 1)[1]
    printed = printed.replace('\u00b6', '')
    assert printed == f'{text}\n\nopen {page} in a browser to see all layers\n'
    first = torch.tensor(CharTokenizer(VOCABULARY).encode(prompt[:8]))     # a window of them
    for layer, scores, weights in zip(layers, *watch_experts(model, first)):
        for (color, tip, _), p, w in zip(layer, scores.tolist(), weights.tolist()):
            assert tip == '\n'.join(f'{i}: {p[i]:.2f}' + (f', weight {w[i]:.2f}' if w[i] else '')
                                    for i in range(5))
            assert color.endswith(PALETTE[w.index(max(w))] if any(w) else '')
