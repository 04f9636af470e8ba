"""sample.py: the text, which expert took which token in a terminal, and the page."""

import dataclasses
import math
import os
import re
from html.parser import HTMLParser

import pytest
import torch

import sample
from configurator import as_lines, hash_of
from conftest import ROOT
from model import GPT, GPTConfig
from prepare_data import CharTokenizer
from sample import PALETTE, color_text, experts_page, stand_outs, watch_experts

VOCABULARY = '\n !"&\'/<>abcdeiprst'                               # what could be taken for a tag
# experts 0 to 2 of two layers, each token with two of them: expert 2 handles 30 % of the tokens
LOAD = [[0.45, 0.4, 0.15], [0.4, 0.3, 0.3]]
OF_CLASS = [[0.9, 0.8, 0.3], [0.45, 0.6, 0.95], [0.9, 0.8, 0.3], [0.9, 0.8, 0.3], [0.7, 0.74, 0.56]]
TEXT = '95 % of the capitals, 56 % of the digits and punctuation (30 % of all characters)'
NOTES = [['', '', TEXT], ['', '', '']]
MODEL_PY = hash_of(os.path.join(ROOT, 'model.py'))


def evaluation(val_loss):
    return {'val_loss': val_loss, 'load': LOAD, 'experts_per_token': [2.0, 2.0],
            'class_load': [OF_CLASS, 5 * [[0.8, 0.6, 0.6]]]}


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
    (folder / 'log.jsonl').write_text(as_lines([evaluation(1.0)]))
    return str(folder), model


class Page(HTMLParser):
    """What a page of experts shows: layers, each a list of (text, colour, tip) of its tokens, and
    notes, the lines above them."""

    def __init__(self, folder):
        super().__init__()
        self.layers, self.notes, self.tags = [], [], []
        self.feed((folder / 'experts.html').read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'h2':
            self.notes.append('')
        elif tag == 'pre':
            self.layers.append([])

    def handle_endtag(self, tag):
        self.tags.append((f'/{tag}', {}))

    def handle_data(self, text):
        if len(self.notes) > len(self.layers):                     # between <h2> and <pre>
            self.notes[-1] += text
        elif self.tags[-1][0] == 'span':
            self.layers[-1].append((text, self.tags[-1][1]['style'], self.tags[-1][1]['title']))


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
    for key, value in (('meta', {}), ('meta', {'tokenizer': 'char', 'vocabulary': 5}), ('model', 3),
                       ('model', {}), ('recipe', {}), ('recipe', best['recipe'] | {'top_k': 'x'})):
        torch.save(best | {key: value}, tmp_path / 'best.pt')
        assert 'best.pt: expected ' in refuse(sample.main, folder), (key, value)
    folder, _ = make_run(tmp_path, mlp='dense')
    assert 'got layer 1 of dense' in refuse(sample.main, folder, show)


@pytest.mark.parametrize('trained_with, is_told', (
    (MODEL_PY, False), (f'old, then {MODEL_PY}', False),
    ('old', True), (f'{MODEL_PY}, then old', True), (None, True)))
def test_a_model_that_was_trained_with_another_model_py_is_told(
        tmp_path, capsys, trained_with, is_told):
    folder, _ = make_run(tmp_path)
    best = torch.load(tmp_path / 'best.pt')
    best['recipe']['model.py'] = trained_with
    torch.save(best, tmp_path / 'best.pt')
    sample.main([folder, '--max_new_tokens=2'])
    assert capsys.readouterr().err == is_told * (
        f'{folder}: trained with another model.py than this, which may compute other things\n')


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
    text = color_text(['ab', '\r\n', 'c', 'd'], [0, 1, 9, None])  # a \r would hide 'ab'
    assert re.sub('\033\\[[0-9;]*m', '', text) == (
        'expert  0   1   9    \u00b6 line end\n\nab \u00b6\ncd')
    assert '\033[48;2;119;170;221;30mab\033[0m' in text            # #77AADD
    assert text.endswith('\033[48;2;238;136;102;30mc\033[0md')     # 9 is 1 again; nobody's is plain


def test_the_page_by_hand(tmp_path):
    p = 2 * [[[1.9, -2.0049, 3.0], [0.0, 5.0, 1.0], [0.0, 0.0, 0.0]]]
    w = 2 * [[[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    page = experts_page(['</pre>', '&\n', 'x'], torch.tensor(p), torch.tensor(w),
                        [['', '', ''], ['', 'all', '']])
    assert ('Each token goes to 1 experts, so the shares of a class sum to 100 %; an even one is '
            '33 %.') in page
    (tmp_path / 'experts.html').write_text(page, encoding='utf-8')
    page = Page(tmp_path)
    assert [' '.join(note.split()) for note in page.notes] == [
        'Layer 1 expert 0 expert 1 expert 2', 'Layer 2 expert 1 takes all expert 0 expert 2']
    assert page.layers == 2 * [[
        ('</pre>', 'color: black; background: #EEDD88', '0: 1.90, weight 0.25\n1: -2.00\n'
                                                        '2: 3.00, weight 0.75'),
        ('&\u00b6\n', 'color: black; background: #EE8866', '0: 0.00\n1: 5.00, weight 1.00\n'
                                                            '2: 1.00'),
        ('x', '', '0: 0.00\n1: 0.00\n2: 0.00')]]                   # nobody handles it


@pytest.mark.parametrize('changes', ({'mlp': 'aoe'}, {'mlp': 'moe', 'select': 'top_p'},
                                     {'mlp': 'aoe', 'select': 'expert_choice'}))
def test_the_page_of_a_run(tmp_path, capsys, changes):
    folder, model = make_run(tmp_path, **changes)
    prompt = '</script><!"&\''
    sample.main([folder, f'--prompt={prompt}', '--temperature=2', '--show_experts=True',
                 '--max_new_tokens=100', '--layer=2'])
    printed, layers = capsys.readouterr().out, Page(tmp_path).layers
    texts = [text for text, _, _ in layers[0]]
    text = ''.join(texts).replace('\u00b6', '')
    assert text.startswith(prompt) and len(texts) == len(prompt) + 100 and len(layers) == 2
    plain = re.sub('\033\\[[0-9;]*m', '', printed).split('\n\n', 1)[1].replace('\u00b6', '')
    assert plain == f'{text}\n\nto open in a browser: {tmp_path / "experts.html"}\n'
    first = torch.tensor(CharTokenizer(VOCABULARY).encode(prompt[:8]))     # a window of them
    for layer, scores, weights in zip(layers, *watch_experts(model, first)):
        for (_, color, tip), p, w in zip(layer, scores, weights):
            told = [re.match(r'\d: (\S+?)(?:, weight (.*))?$', line) for line in tip.split('\n')]
            assert [float(line[1]) for line in told] == pytest.approx(p.tolist(), abs=6e-3)
            assert [float(line[2] or 0) for line in told] == pytest.approx(w.tolist(), abs=6e-3)
            assert color.endswith(PALETTE[w.argmax()] if w.any() else '')


def test_what_stands_out(tmp_path):
    assert stand_outs(evaluation(1.0)) == NOTES
    arguments = [make_run(tmp_path, n_expert=3)[0], '--show_experts=True', '--max_new_tokens=2']
    # the page tells those of the evaluation that best.pt is of, the lowest
    log = [evaluation(loss) | {'load': load} for loss, load in ((3.0, []), (1.0, LOAD), (2.0, []))]
    (tmp_path / 'log.jsonl').write_text(as_lines(log))
    sample.main(arguments)
    assert [' '.join(note.split()) for note in Page(tmp_path).notes] == [
        f'Layer 1 expert 2 takes {TEXT} expert 0 expert 1', 'Layer 2 expert 0 expert 1 expert 2']
    for text in ('{', '3\n', '{}\n', '{"val_loss": 1}\n', ''):
        (tmp_path / 'log.jsonl').write_text(text)
        sample.main(arguments)
        assert 'takes' not in ''.join(Page(tmp_path).notes)
