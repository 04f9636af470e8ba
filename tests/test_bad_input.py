"""Mistakes that a new user makes, at every script: one line that says what to do, exit status 2,
and nothing is changed."""

import json
import os
import pathlib
import shutil

import pytest
import torch

import prepare_data
import sample
import train
from conftest import SMALL, run_here

MISTAKES = {prepare_data: (
    (['shakespear'], "expected shakespeare, prose_and_code, tinyshakespeare, openwebtext"),
    (['one.txt'], 'expected at least two tokens, got 1'),
    (['binary.txt'], "expected a text in UTF-8, got 'binary.txt': 'utf-8' codec can't decode"),
    (['code.txt', '--max_docs=0'], 'max_docs: expected a positive number, got 0'),
    (['code.txt', '--name=a/b'], "name: expected the name of a folder in data_dir, got 'a/b'"),
    (['code.txt', '--tokenizer=word'], "--tokenizer: expected char or gpt2, got 'word'"),
    (['code.txt', '--tokeniser=gpt2'], '--tokeniser: no such key; did you mean tokenizer?'),
), train: (
    (['--dataset=nothing'], 'expected data in data/nothing, got no meta.json there'),
    (['--dataset='], "dataset: expected the name of a folder, got ''"),
    (['--dataset=cut'], 'data/cut/val.bin: expected the tokens that meta.json describes, got oth'),
    (['--dataset=lost'], 'data/lost/train.bin: expected the tokens that meta.json describes, got'),
    (['--dataset=changed'], 'data/changed/val.bin: expected the tokens that meta.json describes'),
    (['--dataset=older'], 'data/older/train.bin: expected the tokens that meta.json describes'),
    (['--dataset=no_json'], 'data/no_json'),
    (['--dataset=short'], 'block_size: expected less than the 5 tokens of short for validation'),
    (['--batch_size=99999999999999'], 'batch_size: expected a positive number, got 99999999999999'),
    (['--n_layer=two'], "--n_layer: expected int, got 'two'"),
    (['--n_embd=0'], 'n_embd: expected a positive number, got 0'),
    (['--top_k=5'], 'top_k: expected at most n_expert = 4, got 5'),
    (['--mlp=mix'], "mlp: expected one of aoe, moe, dense, got 'mix'"),
    (['--mlp=moe,moe'], 'mlp: expected each once, got moe,moe'),
    (['--select=best'], '--select: expected top_k or top_p or expert_choice'),
    (['--top_p=1e-300'], 'top_p: expected 0.001 to 1, got 1e-300'),
    (['--vocab_size=7'], 'vocab_size: expected at least the'),
    (['--learning_rate=-1'], 'learning_rate: expected a positive number, got -1'),
    (['--aux_weight=1e999'], 'aux_weight: expected 0 or more, got inf'),
    (['--warmup_iters=-1'], 'warmup_iters: expected 0 or more, below 2^63, got -1'),
    (['--seed=99999999999999999999'], 'seed: expected 0 or more, below 2^63'),
    (['--seeds=1,2,1'], 'seeds: expected each once, got two runs for out/new/aoe-1'),
    (["--seeds=1,'a'"], "expected int, got 'a'"),
    (['--seeds=1', '--seed=2'], 'seed: expected seed or seeds, got both'),
    (['--threads=100000'], 'threads: expected at most the'),
    (['--device=tpu'], 'device: expected auto or one of this machine, got'),
    (['--device=cpu:7'], "device: expected auto or one of this machine, got 'cpu:7'"),
    (['--device=cuda:99'], "device: expected auto or one of this machine, got 'cuda:99'"),
    (['--out_dir='], "out_dir: expected the name of a folder, got ''"),
    (['--out_dir=a\0b'], "out_dir: expected the name of a folder, got 'a\\x00b'"),
    (['--out_dir=a\udcff'], "out_dir: expected the name of a folder, got 'a\\udcff'"),
    (['--out_dir=code.txt'], "expected a folder to write to, got 'code.txt/aoe': Not a directory"),
    (['--out_dir=/dev/null/out'], "a folder to write to, got '/dev/null/out/aoe': Not a directory"),
    (['--out_dir=config/quick_start'], 'out_dir: expected a folder for runs alone, got config/qui'),
    (['--out_dir=out/trained'], 'out/trained/aoe: expected a new folder, got one that holds a run'),
    (['--out_dir=site', '--name=web'], 'site/web: expected a new folder, or a run and its ckpt.pt'),
    (['--out_dir=site', '--name=web', '--init_from=auto'], 'site/web: expected a new folder, or a'),
    (['--init_from=resume'], 'out/new/aoe/ckpt.pt: expected a checkpoint to go on from'),
    (['--eval_only=True'], 'out/new/aoe/ckpt.pt: expected a checkpoint to go on from'),
    (['--init_from=auto', '--out_dir=out/no_ckpt'], 'expected a new folder, or a run and its ckpt'),
    (['--init_from=resume', '--out_dir=out/damaged'],
     'out/damaged/aoe/ckpt.pt: expected a checkpoint of this train.py'),
    (['--init_from=resume', '--out_dir=out/spoilt'],
     'out/spoilt/aoe/ckpt.pt: expected a checkpoint of this train.py'),
    (['--init_from=resume', '--out_dir=out/trained', '--dataset=greek'],
     'expected what it was trained with, vocab_size = '),
    (['--name=x', '--mlp=aoe,moe'], 'and one alone with --name, got 2'),
    *(([f'--name={name}'], 'name: expected letters, digits, spaces and . , = + - %') for name in (
        'a|b', '$a', '_a', 'a/b', '..', 'a\x1b[2J', 'a\n', 'a\u202eb', 'x.png', 'results.jsonl')),
    (['--runs={}'], 'runs: expected one at least, and one alone with --name, got 0'),
    (["--runs={'a': {}}", '--mlp=moe'], 'mlp: expected mlp or runs, got both'),
    (["--runs={'a': {}, 'a': {}}"], "--runs: expected each key once, got ['a', 'a']"),
    (['--runs={None: {}}'], 'runs, None: expected a name and a dict of keys, got'),
    (["--runs={('a',): {}}"], "runs, ('a',): expected a name and a dict of keys, got"),
    (["--runs={'a': {1: 2}}"], 'runs, a: 1: no such key'),
    (["--runs={'a': {'n_layr': 2}}"], 'runs, a: n_layr: no such key; did you mean n_layer?'),
    (["--runs={'a': {'n_layer': 2}}"],
     'runs, a: expected keys of one run, got n_layer, which all share'),
    (["--runs={'a': {'mlp': 'moe'}, 'b': {'vocab_size': 10}}"], 'vocab_size: expected at least'),
    (['config/none.py'], "expected a config file such as config/quick_start.py"),
    (['own.py'], "(a config file's own names begin with _)"),
    (['--n_layer', '3'], "expected --key=value, got '--n_layer'"),
), sample: (
    ([], 'expected the folder of a run, as out/default/aoe, or of several, as out/default, got 0'),
    (['out/trained', 'site'], 'got 2'),
    (['out/none'], 'expected a folder that holds runs, got none in out/none'),
    (['out/damaged/aoe'], 'out/damaged/aoe/best.pt: expected a checkpoint of this train.py'),
    (['out/spoilt/aoe'], 'out/spoilt/aoe/best.pt: expected the model of a run with these keys'),
    (['out/trained/aoe', '--prompt=Ж'], "got 'Ж'"),
    (['out/trained/aoe', '--prompt='], 'prompt: expected at least one character'),
    (['out/trained/aoe', '--temperature=1e-320'], 'temperature: expected 0, or 0.001 or more'),
    (['out/trained/aoe', '--top_k=3'], '--top_k: no such key; did you mean vocab_top_k?'),
)}


@pytest.fixture(scope='module')
def spoilt(workspace):
    """The workspace with texts, data sets and runs that are not what they should be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        patch.setattr(train, 'draw', lambda *arguments: None)
        for folder in ('site/web', 'config/quick_start'):
            os.makedirs(folder)
        for name, content in (
                ('one.txt', b'a'), ('binary.txt', bytes(range(256))), ('own.py', b'import os\n'),
                ('greek.txt', 'αβγδ'.encode() * 500), ('config/quick_start/README.md', b'results'),
                ('short.txt', b'a short text, of which a tenth is too short for it'),
                ('site/web/config.json', b'{"of": "others"}'), ('site/web/x.part', b'theirs')):
            pathlib.Path(name).write_bytes(content)
        for name in ('short', 'greek'):
            run_here(prepare_data.main, f'{name}.txt')
        for name in ('cut', 'lost', 'changed', 'older', 'no_json'):
            shutil.copytree('data/code', f'data/{name}')
        val = pathlib.Path('data/code/val.bin').read_bytes()
        pathlib.Path('data/cut/val.bin').write_bytes(val[:-2])
        pathlib.Path('data/changed/val.bin').write_bytes(val[:100] + b'\5' + val[101:])
        os.remove('data/lost/train.bin')
        meta = json.loads(pathlib.Path('data/code/meta.json').read_text(encoding='utf-8'))
        del meta['train_sha256'], meta['val_sha256']     # an older prepare_data.py wrote none
        pathlib.Path('data/older/meta.json').write_text(json.dumps(meta))
        pathlib.Path('data/no_json/meta.json').write_text('{')
        run_here(train.main, *SMALL, '--max_iters=1', '--out_dir=out/trained')
        for name in ('damaged', 'spoilt', 'no_ckpt'):
            shutil.copytree('out/trained', f'out/{name}')
        os.truncate('out/damaged/aoe/ckpt.pt', 1000)
        os.truncate('out/damaged/aoe/best.pt', 1000)
        shutil.copy('out/trained/aoe/best.pt', 'out/spoilt/aoe/ckpt.pt')
        best = torch.load('out/spoilt/aoe/best.pt', weights_only=True)
        torch.save(best | {'recipe': best['recipe'] | {'n_embd': 64}}, 'out/spoilt/aoe/best.pt')
        os.remove('out/no_ckpt/aoe/ckpt.pt')
    return workspace


@pytest.mark.parametrize('script, arguments, says', [
    (script, *mistake) for script, mistakes in MISTAKES.items() for mistake in mistakes])
def test_a_mistake_gets_one_line_and_changes_nothing(
        spoilt, refuse, monkeypatch, script, arguments, says):
    def files():
        return {path: path.stat().st_mtime_ns for path in spoilt.rglob('*') if path.is_file()}
    monkeypatch.chdir(spoilt)
    before, shared = files(), [*SMALL, '--out_dir=out/new'] if script is train else []
    assert says in refuse(script.main, *shared, *arguments)
    assert files() == before
