"""Mistakes that a new user makes, at every script: one line that says what to do, exit status 2,
and nothing is changed."""

import json
import os
import shutil

import pytest
import torch

import prepare_data
import sample
import train
from conftest import SMALL, run_here
from tools import bench

MODEL = 'out/spoilt/aoe'

MISTAKES = {prepare_data: (
    (['shakespear'], 'expected shakespeare, prose_and_code, tinyshakespeare, openwebtext or a '
     'text in UTF-8'),
    (['nothing.txt'], "got 'nothing.txt': [Errno 2] No such file or directory"),
    ([''], "got '': [Errno 2] No such file or directory"),
    (['data'], 'expected at least two tokens, got 0; of a folder, only .txt and .jsonl files are'),
    (['lines.jsonl', '--field=body'],
     "lines.jsonl, line 2: expected JSON with a text under 'body' (another --field=?), got '{}"),
    (['code.txt', '--max_docs=0'], 'max_docs: expected a positive number, got 0'),
    (['empty.txt'], 'expected at least two tokens, got 0'),
    (['one.txt'], 'expected at least two tokens, got 1'),
    (['binary.txt'], "or a text in UTF-8, got 'binary.txt': 'utf-8' codec can't decode"),
    (['many.txt'], 'expected at most 65,536 distinct characters, got 75,039; use'),
    (['code.txt', 'one.txt'], 'expected --name= for several files, got none: code.txt one.txt'),
    (['one.txt', 'one.txt', '--name=x'], 'one.txt'),
    (['greek.txt', '--name=code'], 'another text or tokenizer there, code.txt as char; choose'),
    (['code.txt', '--name=code', '--tokenizer=gpt2'],
     'expected code.txt as gpt2, got another text or tokenizer there, code.txt as char; choose'),
    (['code.txt', '--name='], "name: expected the name of a folder in data_dir, got ''"),
    (['code.txt', '--name=..'], "name: expected the name of a folder in data_dir, got '..'"),
    (['code.txt', '--name=a/b'], "name: expected the name of a folder in data_dir, got 'a/b'"),
    (['code.txt', '--data_dir=code.txt'], 'code.txt/code: expected to write it, got "[Errno '),
    (['code.txt', '--tokenizer=word'], "--tokenizer: expected char or gpt2, got 'word'"),
    (['code.txt', '--tokeniser=gpt2'], '--tokeniser: no such key; did you mean tokenizer?'),
    (['tinyshakespeare', '--input=code.txt'], '--input: no such key'),
    (['numbers.jsonl'], "line 1: expected JSON with a text under 'text' (another --field=?), got"),
), train: (
    (['--dataset=nothing'], 'got no meta.json there; run `python prepare_data.py FILE` first'),
    (['--dataset=shakespeare_gpt2'], 'run `python prepare_data.py shakespeare --tokenizer=gpt2`'),
    (['--dataset='], 'expected data in data/, got no meta.json there'),
    (['--dataset=cut'], 'data/cut/val.bin: expected'),
    (['--dataset=lost'], 'data/lost/train.bin: expected'),
    (['--dataset=foreign'], 'train.bin of foreign: expected tokens below vocab_size ='),
    (['--dataset=no_json'], 'data/no_json/meta.json: expected what prepare_data.py writes, got'),
    (['--dataset=no_size'], "expected what prepare_data.py writes, got vocab_size = 'many'"),
    (['--dataset=no_words'], "got vocab_size = 3 and not"),
    (['--dataset=short'], 'expected more than block_size = 16 tokens, got 5; lower it or'),
    (['--block_size=9999999'], 'expected more than block_size = 9999999 tokens'),
    (['--block_size=0'], 'block_size: expected a positive number, got 0'),
    (['--batch_size=-1'], 'batch_size: expected a positive number, got -1'),
    (['--n_layer=two'], "--n_layer: expected int, got 'two'"),
    (['--n_layer=0'], 'n_layer: expected a positive number, got 0'),
    (['--n_embd=33'], 'n_embd: expected a multiple of 2 * n_head = 4'),
    (['--n_expert=0'], 'n_expert: expected a positive number, got 0'),
    (['--top_k=0'], 'top_k: expected a positive number, got 0'),
    (['--top_k=5'], 'top_k: expected at most n_expert = 4, got 5'),
    (['--d_low=33'], 'd_low: expected at most n_embd = 32, got 33'),
    (['--d_ffn=-4'], 'd_ffn: expected a positive number, got -4'),
    (['--dropout=1'], 'dropout: expected a probability below 1, got 1.0'),
    (['--mlp=mix'], "mlp: expected one of aoe, moe, dense, got 'mix'"),
    (['--mlp=aoe,'], "mlp: expected one of aoe, moe, dense, got ''"),
    (['--router=big'], "router: expected linear or large, got 'big'"),
    (['--select=best'], '--select: expected top_k or top_p or expert_choice'),
    (['--top_p=1.1'], 'top_p: expected more than 0 and at most 1, got 1.1'),
    (['--capacity_factor=0'], 'capacity_factor: expected a positive number, got 0.0'),
    (['--aux_weight=nan'], "--aux_weight: expected float, got 'nan'"),
    (['--conf_weight=-1'], 'conf_weight: expected 0 or more, got -1.0'),
    (['--vocab_size=7'], 'vocab_size: expected at least the'),
    (['--learning_rate=-1'], 'learning_rate: expected a positive number, got -1'),
    (['--learning_rate=fast'], "--learning_rate: expected float, got 'fast'"),
    (['--lr_decay_iters=0'], 'lr_decay_iters: expected a positive number, got 0'),
    (['--warmup_iters=-1'], 'warmup_iters: expected 0 or more, below 2^63, got -1'),
    (['--beta2=1'], 'beta2: expected at least 0 and below 1, got 1.0'),
    (['--eval_iters=0'], 'eval_iters: expected a positive number, got 0'),
    (['--max_iters=0'], 'max_iters: expected a positive number, got 0'),
    (['--seed=-1'], 'seed: expected 0 or more, below 2^63, got -1'),
    (['--seeds=12345678901234567890123'], 'below 2^6'),
    (['--seed=99999999999999999999'], 'seed: expected 0 or more, below 2^63'),
    (['--seeds=a'], "--seeds: expected tuple or None, got 'a'"),
    (['--seeds=1,1'], 'seeds: expected each once'),
    (['--threads=0'], 'threads: expected a positive number'),
    (['--jobs=0'], 'jobs: expected a positive number, got 0'),
    (['--jobs=two'], "--jobs: expected int or None, got 'two'"),
    (["--runs={'a': {'jobs': 2}}"], 'runs, a: expected keys of one run, got jobs, which all share'),
    (['--threads=100000'], 'threads: expected at most the'),
    (['--device=tpu'], 'device: expected auto or one of'),
    (['--device=cuda:99'], 'device: expected auto or one of'),
    (['--dtype=float8'], '--dtype: expected auto or float32 or bfloat16 or float16'),
    (['--compile=yes'], "--compile: expected bool, got 'yes'"),
    (['--out_dir='], "out_dir: expected a folder to write to, got ''"),
    (['--out_dir=code.txt'], "expected a folder to write to, got 'code.txt': Not a directory"),
    (['--out_dir=/dev/null/out'], "expected a folder to write to, got '/dev/null/out': Not a"),
    (['--out_dir=out/trained'], 'out/trained/aoe: expected a new folder, got one that holds a run'),
    (['--init_from=gpt2'], "--init_from: expected scratch or resume or auto, got 'gpt2'"),
    (['--init_from=resume'], 'out/new/aoe/ckpt.pt: expected a checkpoint to go on from'),
    (['--init_from=resume', '--out_dir=out/damaged'],
     'out/damaged/aoe/ckpt.pt: expected a checkpoint of this train.py'),
    (['--init_from=resume', '--out_dir=out/spoilt'],
     'out/spoilt/aoe/ckpt.pt: expected a checkpoint of this train.py'),
    (['--capacity_factor=1e999'], '--capacity_factor: expected a finite number, got inf'),
    (['--aux_weight=1e400'], '--aux_weight: expected a finite number, got inf'),
    (['infinite.py'], 'infinite.py: aux_weight: expected a finite number, got inf'),
    (['--batch_size=999999'], 'batch_size: expected at most as many sequences as data/code has'),
    (["--runs={'a': {}}", '--mlp=moe'], 'mlp: expected mlp or runs, got both'),
    (['--batch_size=99999999999999'], 'batch_size: expected a positive number, got 99999999999999'),
    (["--runs={None: {}, 'aoe': {}}"], 'expected each once, got two runs for out/new/aoe'),
    (['--name=a|b'], "without $ or | and no _ first, got 'a|b'"),
    (['--init_from=resume', '--out_dir=out/trained', '--dataset=greek'],
     'expected what it was trained with, vocab_size = '),
    (['--init_from=resume', '--out_dir=out/trained', '--n_layer=3'], 'n_layer = 2 and not 3'),
    (['--eval_only=True'], 'out/new/aoe/ckpt.pt: expected a checkpoint to go on from'),
    (['--runs={}'], 'runs: expected one at least, and one alone with --name, got 0'),
    (['--seeds=1,2,1'], 'expected each once, got two runs for out/new/aoe-1'),
    (['--seeds=1', '--seed=2'], 'seed: expected seed or seeds, got both'),
    (["--runs={'a': {'n_layr': 2}}"], 'runs, a: n_layr: no such key; did you mean n_layer?'),
    (["--runs={'a': {'n_layer': 2}}"],
     'runs, a: expected keys of one run, got n_layer, which all share'),
    (["--runs={'a': {'seed': 2}}"], 'runs, a: expected keys of one run, got seed, which all share'),
    (["--runs={'a': 2}"], 'runs, a: expected a dict of keys, got 2'),
    (["--runs={1: {}}"], 'name: expected the name of a folder in out_dir, without $ or | and'),
    (["--runs={'../a': {}}"], "no _ first, got '../a'"),
    (['--name=x', '--mlp=aoe,moe'], 'and one alone with --name, got 2'),
    (['--name=results.jsonl'], 'name: expected the name of a folder in out_dir'),
    (['--name=_x'], "without $ or | and no _ first, got '_x'"),
    (['--init_from=auto', '--out_dir=out/no_ckpt'], 'expected its ckpt.pt to go on from'),
    (['--name=a/b'], "no _ first, got 'a/b'"),
    (['config/none.py'], "expected a config file such as config/quick_start.py"),
    (['binary.txt'], "got 'binary.txt': there is no such .py file"),
    (['binary.py'], 'binary.py, line 1: expected it to run, got '),
    (['wrong.py'], "wrong.py, line 2: expected it to run, got NameError: name 'n_hed' is"),
    (['own.py'], 'own.py: os: no such key; '),
    (['own.py'], " (a config file's own names begin with _)"),
    (['twice.py'], "twice.py, line 1: expected each key once, got ['moe', 'moe']"),
    (['--n_layer', '3'], "expected --key=value, got '--n_layer'"),
    (['--n_lyer=3'], '--n_lyer: no such key; did you mean n_layer?'),
), sample: (
    ([], 'expected the folder of one run, such as out/quick_start/aoe, got 0'),
    (['out/trained/aoe', 'out/trained/moe'],
     'expected the folder of one run, such as out/quick_start/aoe, got 2'),
    (['out/none'], 'got no file out/none/best.pt'),
    (['out/damaged/aoe'], 'out/damaged/aoe/best.pt: expected a checkpoint of this train.py'),
    ([MODEL], 'best.pt: expected weights of '),
    (['out/trained/aoe', '--prompt=Ж'], "got 'Ж'"),
    (['out/trained/aoe', '--prompt='], 'prompt: expected at least one character'),
    (['out/trained/aoe', '--temperature=-1'], 'temperature: expected 0, or 0.001 or more, got -1'),
    (['out/trained/aoe', '--temperature=1e-320'], 'temperature: expected 0, or 0.001 or more'),
    (['out/trained/aoe', '--temperature=hot'], "--temperature: expected float, got 'hot'"),
    (['out/trained/aoe', '--max_new_tokens=0'], 'max_new_tokens: expected a positive number'),
    (['out/trained/aoe', '--num_samples=1.5'], '--num_samples: expected int, got 1.5'),
    (['out/trained/aoe', '--seed=-1'], 'seed: expected 0 or more and below 2^62, got -1'),
    (['out/trained/aoe', '--top_k=3'], '--top_k: no such key; did you mean vocab_top_k?'),
    (['out/trained/aoe', '--device=tpu'], 'device: expected auto or one of'),
), bench: (
    (['--only=everything'], "only: expected some of layer, step, memory, cost, experts, fake, got"),
    (['--rounds=0'], 'rounds: expected a positive number, got 0'),
    (['--warmup=x'], "--warmup: expected int, got 'x'"),
)}


@pytest.fixture(scope='module')
def spoilt(workspace):
    """The workspace with texts, data sets and runs that are not what they should be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        many = ''.join(map(chr, (*range(0x100, 0xd7ff), *range(0x10000, 0x14e20))))
        for name, content in (('empty', b''), ('one', b'a'), ('binary', bytes(range(256))),
                              ('greek', 'αβγδ'.encode() * 500), ('many', many.encode()),
                              ('short', b'a short text, of which a tenth is too short for it')):
            with open(f'{name}.txt', 'wb') as file:
                file.write(content)
        with open('lines.jsonl', 'w', encoding='utf-8') as file:
            file.write('{"body": "a text"}\n{}\n')
        with open('numbers.jsonl', 'w', encoding='utf-8') as file:
            file.write('{"text": 5}\n')
        for name, content in (('binary', '\0'), ('wrong', 'n_head = 2\nn_embd = 16 * n_hed\n'),
                              ('own', 'import os\n'), ('infinite', 'aux_weight = 1e400\n'),
                              ('twice', "runs = {'moe': {'mlp': 'moe'}, 'moe': {'top_k': 1}}\n")):
            with open(f'{name}.py', 'w', encoding='utf-8') as file:
                file.write(content)
        for name in ('short', 'greek'):
            run_here(prepare_data.main, f'{name}.txt')
        with open('data/code/meta.json', encoding='utf-8') as file:
            meta = json.load(file)
        for name, change in (('no_json', None), ('no_size', {'vocab_size': 'many'}),
                             ('no_words', {'vocab_size': 3})):
            shutil.copytree('data/code', f'data/{name}')
            with open(f'data/{name}/meta.json', 'w', encoding='utf-8') as file:
                file.write(json.dumps(meta | change) if change else '{')
        foreign = b'\xff' * 2 * meta['train_tokens']
        for name, file, content in (('cut', 'val.bin', b'1234'), ('lost', 'train.bin', None),
                                    ('foreign', 'train.bin', foreign)):
            shutil.copytree('data/code', f'data/{name}')
            os.remove(f'data/{name}/{file}')
            if content:
                with open(f'data/{name}/{file}', 'wb') as written:
                    written.write(content)
        run_here(train.main, *SMALL, '--max_iters=1', '--out_dir=out/trained')
        for name in ('damaged', 'spoilt', 'no_ckpt'):
            shutil.copytree('out/trained', f'out/{name}')
        for file in ('ckpt.pt', 'best.pt'):
            os.truncate(f'out/damaged/aoe/{file}', 1000)
        shutil.copy('out/trained/aoe/best.pt', f'{MODEL}/ckpt.pt')
        best = torch.load(f'{MODEL}/best.pt', weights_only=True)
        torch.save(best | {'recipe': best['recipe'] | {'n_embd': 64}}, f'{MODEL}/best.pt')
        os.remove('out/no_ckpt/aoe/ckpt.pt')
    return workspace


def test_there_are_many_mistakes():
    assert sum(map(len, MISTAKES.values())) >= 60


@pytest.mark.parametrize('script', MISTAKES, ids=lambda script: script.__name__)
def test_a_mistake_gets_one_line_and_changes_nothing(spoilt, refuse, monkeypatch, script):
    monkeypatch.chdir(spoilt)
    before = {path: path.stat().st_mtime_ns for path in spoilt.rglob('*') if path.is_file()}
    for arguments, says in MISTAKES[script]:
        shared = [*SMALL, '--out_dir=out/new'] if script is train else []
        line = refuse(script.main, *shared, *arguments)
        assert says in line, arguments
        assert all(path.stat().st_mtime_ns == time for path, time in before.items()), arguments
