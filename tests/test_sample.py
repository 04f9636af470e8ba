"""sample.py: the text, which expert took which token in a terminal and in a file, and the page."""

import dataclasses
import html
import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch

import sample
from model import GPT, GPTConfig, Routing
from prepare_data import CharTokenizer
from sample import (PALETTE, color_text, experts_page, number_text, stand_outs, watch_experts,
                    without_controls)
from train import CLASSES

# what could steer a terminal, end a script or be taken for a tag is among the characters
VOCABULARY = '\x07\n\x1b !"&\'/<>abcdeiprst'
TINY = {'vocab_size': len(VOCABULARY), 'block_size': 8, 'n_layer': 2, 'n_embd': 16, 'n_head': 2,
        'n_expert': 5, 'd_ffn': 24}


def tiny_model(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def make_run(folder, log=(), dtype='float32', **changes):
    """A folder as train.py writes it, of a tiny model. Returns its path and the model."""
    model = tiny_model(**changes)
    meta = {'tokenizer': 'char', 'vocabulary': VOCABULARY, 'vocab_size': len(VOCABULARY)}
    torch.save({'model': model.state_dict(), 'meta': meta,
                'recipe': dataclasses.asdict(model.config) | {'dtype': dtype, 'seed': 1}},
               folder / 'best.pt')
    (folder / 'log.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in log))
    return str(folder), model


def data_of(page):
    """The data in a page of experts."""
    line, = re.findall('^const data = (.*)$', page, re.MULTILINE)
    return json.loads(line)


def in_terminal(monkeypatch, **environment):
    monkeypatch.setattr(sample.sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.delenv('NO_COLOR', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


# -----------------------------------------------------------------------------
# the text

def test_the_text_is_what_generate_draws_and_each_sample_has_a_seed(tmp_path, capsys):
    folder, model = make_run(tmp_path)
    tokenizer = CharTokenizer(VOCABULARY)
    sample.main([folder, '--prompt=abc', '--max_new_tokens=30', '--num_samples=2', '--seed=4',
                 '--vocab_top_k=7', '--temperature=1.5'])
    printed = capsys.readouterr().out
    expected = [tokenizer.decode(model.generate(torch.tensor([tokenizer.encode('abc')]), 30, 1.5, 7,
                                                seed=seed)[0].tolist()) for seed in (4, 5)]
    assert printed == f'{expected[0]}\n{"-" * 80}\n{expected[1]}\n' and expected[0] != expected[1]
    sample.main([folder, '--prompt=abc', '--max_new_tokens=30', '--seed=5', '--vocab_top_k=7',
                 '--temperature=1.5'])
    assert capsys.readouterr().out == expected[1] + '\n'


def test_no_token_beyond_the_tokenizer_is_drawn(tmp_path, capsys):
    folder, _ = make_run(tmp_path, vocab_size=200)
    sample.main([folder, '--temperature=90', '--max_new_tokens=100'])
    assert set(capsys.readouterr().out) <= set(VOCABULARY)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_sampling_multiplies_in_the_dtype_that_was_trained_in(tmp_path, monkeypatch, dtype):
    folder, _ = make_run(tmp_path, dtype=dtype)
    found, load_model = set(), sample.load_model

    def load_and_watch(folder, device):
        model, *others = load_model(folder, device)
        model.head.register_forward_hook(lambda _, x, logits: found.add(logits.dtype))
        return model, *others
    monkeypatch.setattr(sample, 'load_model', load_and_watch)
    sample.main([folder, '--max_new_tokens=2'])
    assert found == {getattr(torch, dtype)}


def test_expert_choice_is_told_and_samples_by_top_k(tmp_path, capsys):
    folder, model = make_run(tmp_path, mlp='moe', select='expert_choice')
    sample.main([folder, '--max_new_tokens=20', '--show_experts=True'])
    printed = capsys.readouterr()
    assert printed.err.count('\n') == 1 and 'experts are chosen by top_k here' in printed.err
    data = data_of((tmp_path / 'experts.html').read_text(encoding='utf-8'))
    assert '2 of 5 experts' in data['about']
    assert all(len(set(chosen)) == 2 and min(chosen) >= 0 for chosen in data['chosen'][0])


def test_a_terminal_gets_no_controls_and_a_file_all_of_the_text(tmp_path, monkeypatch, capsys):
    assert without_controls('a\x1b[31mb\x07\tc\n\r\x9b') == 'a\ufffd[31mb\ufffd\tc\n\ufffd\ufffd'
    folder, _ = make_run(tmp_path)
    arguments = [folder, '--temperature=90', '--max_new_tokens=100']
    sample.main(arguments)
    raw = capsys.readouterr().out
    assert {'\x07', '\x1b'} < set(raw)
    in_terminal(monkeypatch)
    sample.main(arguments)
    assert capsys.readouterr().out == without_controls(raw) != raw
    sample.main([*arguments, '--show_experts=True'])
    painted = capsys.readouterr().out
    assert '\x07' not in painted and '\x1b' not in re.sub('\x1b\\[[0-9;]*m', '', painted)


def test_refusals(tmp_path, refuse):
    folder, _ = make_run(tmp_path)
    show = '--show_experts=True'
    assert 'at most 2, got aoe and 3' in refuse(sample.main, folder, show, '--layer=3')
    assert 'expected the folder of one run' in refuse(sample.main)
    assert 'got 2' in refuse(sample.main, folder, folder)
    assert 'prompt: expected at least one' in refuse(sample.main, folder, '--prompt=')
    assert "got 'Z'" in refuse(sample.main, folder, '--prompt=Z')
    folder, _ = make_run(tmp_path, mlp='dense')
    assert 'expected a model with experts' in refuse(sample.main, folder, show)
    assert not os.path.exists(tmp_path / 'experts.html')


# -----------------------------------------------------------------------------
# which expert took which token

@pytest.mark.parametrize('changes', ({'mlp': 'moe'}, {'mlp': 'aoe'},
                                     {'mlp': 'aoe', 'select': 'top_p'}))
def test_what_is_shown_is_what_the_layers_did(changes):
    model = tiny_model(d_low=8, **changes)
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
    assert number_text(['ab', '\n', 'c', ' de'], [3, 0, 12, 1]) == 'ab\u00b6\n3 0\nc  de\n121  '
    assert number_text(['a', '\n', '\n'], [1, 2, 3]) == 'a\u00b6\n12\n\u00b6\n3'


def test_colours_of_tokens_by_hand():
    text = color_text(['ab', '\n', 'c'], [0, 1, 9])
    assert re.sub('\033\\[[0-9;]*m', '', text) == (
        'expert  0   1   9    \u00b6 line end\n\nab\u00b6\nc')
    assert '\033[48;2;119;170;221;30mab\033[0m' in text            # #77AADD
    assert '\033[48;2;238;136;102;30mc\033[0m' in text             # 9 is 1 again


def test_numbers_stand_where_there_is_no_terminal_or_no_colour(tmp_path, monkeypatch, capsys):
    folder, _ = make_run(tmp_path)
    arguments = [folder, '--prompt=abc', '--show_experts=True', '--max_new_tokens=30', '--layer=2']
    sample.main(arguments)
    printed = capsys.readouterr().out
    sample.main([folder, '--prompt=abc', '--max_new_tokens=30'])
    text = without_controls(capsys.readouterr().out)
    rows = printed.rpartition('\n\n')[0].split('\n')
    assert ''.join(rows[::2]).replace('\u00b6', '\n').rstrip() == text.rstrip()
    data = data_of((tmp_path / 'experts.html').read_text(encoding='utf-8'))
    assert ''.join(rows[1::2]) == ''.join(str(chosen[0]) for chosen in data['chosen'][1])
    assert printed.endswith(f'to open in a browser: {tmp_path / "experts.html"}\n')
    in_terminal(monkeypatch, NO_COLOR='1')
    sample.main(arguments)
    assert capsys.readouterr().out == printed
    in_terminal(monkeypatch)
    sample.main(arguments)
    assert capsys.readouterr().out.startswith('expert \033[48;2;')


# -----------------------------------------------------------------------------
# the page

def test_the_page_has_every_token_escaped_and_all_its_scores():
    I, w = torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    p = torch.tensor([[1.9, -2.00049, 3.0], [0.0, 5.0, 1.0]])
    routing = Routing(*(torch.stack([part, part]) for part in (p, I, w)), None)
    config = GPTConfig(vocab_size=2, n_expert=3, mlp='moe')
    page = experts_page('<a> run', ['</script>', '&\n'], routing, config, 2, [[], [(1, 'x')]])
    assert '\u00b6' not in page and '&para;&nbsp;line&nbsp;end' in page and 'DATA' not in page
    assert page.count('</script>') == 1 and not re.search('src=|href=|http|url', page)
    assert data_of(page) == {
        'about': '&lt;a&gt; run gives each token to 2 of 3 experts.', 'layer': 1,
        'notes': [[], [[1, 'x']]], 'palette': PALETTE,
        'texts': ['&lt;/script&gt;', '&amp;\u00b6\n'], 'chosen': 2 * [[[2, 0], [1, -1]]],
        'weights': 2 * [[[0.75, 0.25], [1.0, 0.0]]], 'score': 'score',
        'scores': 2 * [[[1.9, -2.0, 3.0], [0.0, 5.0, 1.0]]], 'low': -2.0, 'high': 5.0}


@pytest.mark.parametrize('changes', ({'mlp': 'aoe'}, {'mlp': 'moe', 'select': 'top_p'}))
def test_the_page_of_a_run(tmp_path, changes):
    folder, model = make_run(tmp_path, **changes)
    prompt = '</script><!"&\''
    sample.main([folder, f'--prompt={prompt}', '--temperature=2', '--show_experts=True',
                 '--max_new_tokens=100'])
    page = (tmp_path / 'experts.html').read_text(encoding='utf-8')
    data = data_of(page)
    text = ''.join(map(html.unescape, data['texts'])).replace('\u00b6', '')
    assert text.startswith(prompt) and len(data['texts']) == len(prompt) + 100
    assert '<' not in ''.join(data['texts']) and set(text) <= set(VOCABULARY) | {'\ufffd'}
    assert '\x07' not in text and page.count('</script>') == 1
    assert data['score'] == ('norm' if changes['mlp'] == 'aoe' else 'score')
    first = torch.tensor(CharTokenizer(VOCABULARY).encode(prompt[:8]))     # a window of them
    assert torch.allclose(torch.tensor(data['scores'])[:, :8], watch_experts(model, first).scores,
                          atol=6e-4)


def random_evaluation(val_loss, E=8, L=3, K=2):
    """Of random numbers, but for expert 0 of the first layer."""
    torch.manual_seed(int(val_loss))
    class_load = torch.rand(L, len(CLASSES), E)
    class_load = K * class_load / class_load.sum(2, keepdim=True)
    class_load[0, :, 0] = torch.tensor([0.1, 0.95, 0.1, 0.9, 0.1])
    return {'val_loss': val_loss, 'class_load': class_load.tolist(),
            'load': (class_load.mean(1) / K).tolist(), 'experts_per_token': L * [float(K)]}


def test_what_stands_out_by_a_loop(tmp_path):
    log = [random_evaluation(loss) for loss in (3.0, 1.0, 2.0)]
    expected, names = [], [*CLASSES[:4], 'digits and punctuation']
    for layer in range(3):
        lines = []
        for expert in range(8):
            share = 2 * log[1]['load'][layer][expert]
            above = {name: log[1]['class_load'][layer][i][expert] for i, name in enumerate(names)}
            above = {name: part for name, part in above.items() if part >= share + 0.25}
            if above:
                told = ', '.join(f'{round(100 * above[name])} % of the {name}'
                                 for name in sorted(above, key=above.get, reverse=True))
                lines.append([expert, f'{told} ({round(100 * share)} % of all)'])
        expected.append(lines)
    assert [list(map(list, lines)) for lines in stand_outs(log[1])] == expected
    assert expected[0][0] == [0, '95 % of the capitals, 90 % of the line ends (43 % of all)']
    assert len(expected[2]) == 2 and not expected[1]
    # the page tells those of the evaluation that best.pt is of, the lowest
    folder, _ = make_run(tmp_path, log, n_expert=8, n_layer=3)
    sample.main([folder, '--show_experts=True', '--max_new_tokens=2'])
    assert data_of((tmp_path / 'experts.html').read_text(encoding='utf-8'))['notes'] == expected


def test_nothing_stands_out_where_tokens_are_no_characters_or_no_log_is_there(tmp_path):
    entry = {'load': [[0.5, 0.5]], 'experts_per_token': [1.0], 'class_load': [[]]}
    assert stand_outs(entry) == [[]]
    folder, _ = make_run(tmp_path)
    os.remove(tmp_path / 'log.jsonl')
    sample.main([folder, '--show_experts=True', '--max_new_tokens=2'])
    assert data_of((tmp_path / 'experts.html').read_text(encoding='utf-8'))['notes'] == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='draws the page in chromium')
def test_a_browser_draws_all_tokens_and_bars(tmp_path):
    folder, _ = make_run(tmp_path, [random_evaluation(1.0, E=9, L=2)], n_expert=9)
    sample.main([folder, '--show_experts=True', '--prompt=<b>', '--max_new_tokens=97'])
    flags = ['headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'dump-dom',
             'disable-background-networking', 'disable-component-update', 'disable-sync',
             f'user-data-dir={tmp_path / "chrome"}']
    dom = subprocess.run(['chromium', *(f'--{flag}' for flag in flags),
                          f'file://{folder}/experts.html'], capture_output=True, encoding='utf-8',
                         timeout=60).stdout
    tokens = re.search('<pre id="text">(.*?)</pre>', dom, re.DOTALL)[1]
    assert tokens.count('<span') == 100 and '&lt;' in tokens
    assert dom.partition('<script>')[0].count('<i style') == 9       # a bar for each expert
    assert ' takes 95 % of the capitals, 90 % of the line ends (' in dom
