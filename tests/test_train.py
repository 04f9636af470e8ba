"""train.py: the whole way through; parts of it by hand; runs side by side."""

import contextlib
import glob
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch

import sample
import train
from configurator import read_config_file
from conftest import ROOT, SMALL, run_here, start_script, table_of
from model import GPT
from sample import CLASSES, class_of, load_checkpoint, load_model, read_log
from train import Data, TrainConfig, hash_of, learning_rate_at, make_optimizer, plan_runs

VARIANTS = ('aoe', 'moe', 'dense')
PICTURES = ('expert_class.png', 'expert_load.png', 'loss.png', 'norm.png')
CONFIGS = sorted(os.path.relpath(path, ROOT)
                 for path in glob.glob(f'{ROOT}/config/**/*.py', recursive=True)
                 if 'git apply' not in train.read_text(path))      # test_rivals.py has those


@pytest.fixture(scope='module')
def trained(workspace):
    """Three variants, trained through the command line: (workspace, what it printed)."""
    process = run_here(train.main, *SMALL, '--mlp=aoe,moe,dense', '--out_dir=out/three',
                       cwd=workspace)
    return workspace, process.stdout


def test_three_variants_leave_logs_checkpoints_pictures_and_a_table(trained):
    workspace, printed = trained
    out = workspace / 'out/three'
    vocab_size = train.load_meta(str(workspace / 'data/code'))['vocab_size']
    assert sorted(os.listdir(out)) == sorted([*VARIANTS, *PICTURES, 'results.jsonl'])
    table = table_of(printed)
    assert list(table) == ['run', *sorted(VARIANTS)] and 'minus moe' not in printed    # one seed
    for mlp in VARIANTS:
        assert sorted(os.listdir(out / mlp)) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
        log = read_log(out / mlp)
        assert [entry['iter'] for entry in log] == [0, 10, 20]
        assert [entry['tokens'] for entry in log] == [0, 1280, 2560]
        assert log[0]['val_loss'] > log[1]['val_loss'] > log[2]['val_loss']
        assert log[0]['val_loss'] == pytest.approx(math.log(vocab_size), abs=0.3)
        assert ['test_loss' in entry for entry in log] == [False, False, True]
        told = re.findall(f'^{mlp} +iter +(\\d+) .* val loss ([0-9.]+)', printed, re.M)
        assert told == [(str(e['iter']), f'{e["val_loss"]:.4f}') for e in log]
        assert (log[-1]['load'] == []) == (mlp == 'dense') and log[-1]['seconds'] > 0
        config = json.loads((out / mlp / 'config.json').read_text())
        assert table[mlp][0] == f'{config["total_parameters"]:,}'
        assert table[mlp][1] == f'{min(entry["val_loss"] for entry in log):.4f}'
    # as wide as Eq. 5 makes it at this small D, an expert of aoe is larger than one of moe
    size = 8 * 32 + 8 * 64 + 2 * 32 * 64, 3 * 32 * 48
    told = re.findall(r'^(\w+): .* parameters \(an expert has ([\d.]+) times moe', printed, re.M)
    assert told == [('aoe', f'{size[0] / size[1]:.3f}')]
    for name in PICTURES:
        picture = matplotlib.image.imread(out / name)
        assert picture.shape[1] >= 600 and picture[..., :3].std() > 0.05
        assert os.path.getsize(out / name) < 100_000


@pytest.mark.parametrize('mlp, top_p', (('aoe', None), ('moe', None), ('moe', 0.6)))
def test_an_evaluation_by_a_loop(trained, mlp, top_p):
    """Loads, both entropies, norms, who takes which class, and how many experts a token has."""
    model, *_ = load_model(str(trained[0] / 'out/three' / mlp), torch.device('cpu'))
    if top_p:
        model.config.select, model.config.top_p = 'top_p', top_p
    data = Data(TrainConfig(dataset='code', data_dir=str(trained[0] / 'data'), block_size=16,
                            batch_size=8, eval_iters=2), torch.device('cpu'))
    found = train.evaluate(model, data, contextlib.nullcontext())
    inputs, tokens, losses = [], [], []
    counts, there = np.zeros((2, len(CLASSES), 4)), np.zeros((2, len(CLASSES), 1))
    norms, confidences = np.zeros((2, 4)), np.zeros(2)
    hooks = [block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
             for block in model.blocks]
    with torch.no_grad():
        for idx, targets in data.eval_batches('val'):
            p = model(idx)[0].double().softmax(-1)
            losses += [-math.log(p[b, s, targets[b, s]]) for b in range(8) for s in range(16)]
            tokens.append(idx)
    for i, x in enumerate(inputs):                                 # layer 0, layer 1, layer 0, ...
        layer = model.blocks[i % 2].mlp
        for token, vector in zip(tokens[i // 2].flatten().tolist(), x):
            if mlp == 'aoe':
                scores = [(vector @ w).norm().item() for w in layer.w_down.detach()]
            else:
                scores = (vector @ layer.router.detach()).tolist()
            kind = class_of(data.meta['vocabulary'][token])
            there[i % 2, kind] += 1
            q, order = np.exp(scores) / np.exp(scores).sum(), np.argsort(scores)[::-1]
            enough = int((np.cumsum(q[order]) < top_p).sum()) + 1 if top_p else 2
            for expert in order[:enough]:
                counts[i % 2, kind, expert] += 1
            norms[i % 2] += np.array(scores) / (2 * 8 * 16)
            confidences[i % 2] -= (q * np.log(q)).sum() / (2 * 8 * 16)
    close = {'atol': 0.002}                                        # two equal scores may differ
    load = counts.sum(1) / counts.sum((1, 2))[:, None]
    assert found['val_loss'] == pytest.approx(np.mean(losses), abs=1e-4)
    assert np.allclose(found['class_load'], counts / np.maximum(there, 1), **close)
    assert np.allclose(found['load'], load, **close)
    assert np.allclose(found['ent_load'], [-sum(f * math.log(f) for f in l if f) for l in load],
                       **close)
    assert np.allclose(found['ent_conf'], confidences, **close)
    assert np.allclose(found['experts_per_token'], counts.sum((1, 2)) / (2 * 8 * 16), atol=0.01)
    assert np.allclose(found['norm'], norms, **close) if mlp == 'aoe' else found['norm'] == []
    for hook in hooks:
        hook.remove()


def test_eval_only_repeats_the_last_evaluation_or_takes_another_k_and_writes_nothing(
        trained, refuse, monkeypatch):
    monkeypatch.chdir(trained[0])
    common = [*SMALL, '--mlp=moe', '--out_dir=out/three', '--eval_only=True']
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path('out/three').rglob('*')}
    printed = [run_here(train.main, *common, f'--top_k={k}').stdout for k in (1, 2, 4)]
    last = read_log('out/three/moe')[-1]
    assert f'train loss {last["train_loss"]:.4f}   val loss {last["val_loss"]:.4f}' in printed[1]
    assert len({text.split('val loss ')[1].split()[0] for text in printed}) == 3
    assert 'evaluated with top_k = 1, trained with 2' in printed[0]
    assert 'evaluated with' not in printed[1]
    assert 'expected the model of a run with these keys' in refuse(        # K experts wide
        train.main, *common, '--mlp=dense', '--top_k=1')
    after = {path: path.stat().st_mtime_ns for path in pathlib.Path('out/three').rglob('*')}
    assert after == before


def test_a_config_file_may_name_runs_and_seeds_and_the_table_has_the_verdict(
        workspace, monkeypatch):
    monkeypatch.setattr(train, 'draw', lambda *arguments: None)
    (workspace / 'two.py').write_text(
        "runs = {'few': {'top_k': 1}, 'base': {'mlp': 'moe'}, 'balanced': {'aux_weight': 0.01},\n"
        "        'dense': {'mlp': 'dense'}}\nseeds = [1, 2]\nout_dir = 'out/two'\n")
    printed = run_here(train.main, 'two.py', *SMALL, '--max_iters=4', cwd=workspace).stdout
    losses = {name: [read_log(workspace / f'out/two/{name}-{seed}')[-1]['val_loss']
                     for seed in (1, 2)] for name in ('balanced', 'base', 'dense', 'few')}
    head, *rows = table_of(printed).items()
    assert head[1][:3] == ['parameters', 'val loss', 'minus moe']
    assert [name for name, _ in rows] == sorted(losses)
    for name, (_, loss, minus, *_) in rows:
        one, two = losses[name]
        assert loss == f'{(one + two) / 2:.4f} ± {abs(one - two) / math.sqrt(2):.4f}' and one != two
        first, second = one - losses['base'][0], two - losses['base'][1]
        mean, half = (first + second) / 2, 12.7062 * abs(first - second) / 2     # t at 1 degree
        text = f'{mean:+.4f} ± {half:.4f}'
        assert minus == ('-' if name == 'base' else f'**{text}**' if abs(mean) > half else text)
    notes = re.findall('(.+) differs from base in (.+), too', printed)
    assert notes == [('balanced', 'aux_weight'), ('few', 'top_k')]
    config = json.loads((workspace / 'out/two/balanced-2/config.json').read_text())
    assert (config['run'], config['seed'], config['iter']) == ('balanced', 2, 4)
    assert (config['recipe']['mlp'], config['recipe']['aux_weight']) == ('aoe', 0.01)
    # sample.py shows the same, and draws the pictures
    assert printed.endswith(run_here(sample.main, 'out/two', cwd=workspace).stdout)
    assert all((workspace / 'out/two' / picture).exists() for picture in PICTURES)


@pytest.mark.parametrize('select, top_p, experts', (
    ('top_p', 0.6, None), ('top_p', 0.001, [1, 1]), ('expert_choice', 0.6, [1.5, 1.5])))
def test_other_selection_rules(train_here, select, top_p, experts):
    out = f'out/{select}{top_p}'
    log = train_here('--mlp=aoe', f'--select={select}', f'--top_p={top_p}', '--conf_weight=1e-4',
                     '--capacity_factor=1.5', f'--out_dir={out}')
    assert log[-1]['val_loss'] < log[0]['val_loss']
    found = log[-1]['experts_per_token']
    assert found == experts or (experts is None and all(1 < n < 4 for n in found))
    texts = {run_here(sample.main, f'{out}/aoe', '--prompt=import', '--max_new_tokens=20',
                      f'--seed={seed}').stdout for seed in (1, 1, 2)}
    assert len(texts) == 2 and all(re.fullmatch(r'import[\s\S]{20}\n', text) for text in texts)


@pytest.mark.parametrize('file', CONFIGS)
def test_every_config_trains_models_of_one_size(file):
    text, values = train.read_text(os.path.join(ROOT, file)), {}
    files = re.search(rf'train\.py ((?:config/\S+ )*){file}', text)
    for name in (*(files[1].split() if files else ()), file):      # those that its page names first
        values |= read_config_file(TrainConfig, os.path.join(ROOT, name))
    assert all(run.out_dir.startswith('out/') for run in plan_runs(dict(values), {}))
    values = {key: value for key, value in values.items() if key not in ('runs', 'seeds')}
    assert not {'threads', 'jobs'} & values.keys()                 # they are of the machine
    sizes = {}
    for run in plan_runs(values, {'mlp': 'aoe,moe,dense'}):
        run.vocab_size = run.vocab_size or 84
        with torch.device('meta'):
            sizes[run.name] = GPT(run).total_parameters()
    assert abs(sizes['aoe'] / sizes['moe'] - 1) < 0.01 and sizes['dense'] < sizes['moe']


def test_every_config_has_a_folder_of_its_own():
    folders = [folder for file in CONFIGS if (folder := read_config_file(
        TrainConfig, os.path.join(ROOT, file)).get('out_dir'))]
    assert len(set(folders)) == len(folders) > 5


# -----------------------------------------------------------------------------
# parts

def test_the_schedule_by_hand():
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=3, lr_decay_iters=13,
                         max_iters=20)
    rates = [learning_rate_at(i, config) for i in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.6)                          # half way down
    assert rates[13:] == [0.2] * 7
    assert all(a > b for a, b in zip(rates[3:13], rates[4:14]))
    assert TrainConfig(learning_rate=1.0).min_lr == 0.1


def test_only_matrices_decay():
    config = TrainConfig(vocab_size=11, n_embd=32, weight_decay=0.5, learning_rate=0.1)
    model = GPT(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(model, config, torch.device('cpu'))
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(before)
    optimizer.step()
    for name, p in model.named_parameters():
        shrink = 1 - 0.1 * 0.5 if p.dim() >= 2 else 1
        torch.testing.assert_close(p.detach(), before[name] * shrink, msg=name)


def test_the_hash_of_a_file_is_of_what_runs(tmp_path):
    def of(text):
        (tmp_path / 'file.py').write_text(text)
        return hash_of(tmp_path / 'file.py')
    text = '"""A page."""\nclass A:\n    """Of A."""\n    def f(self):\n        return 1  # one\n'
    same = text.replace('# one', '# 1').replace('Of A.', 'Of an A.').replace('A page', 'The page')
    assert of(text) == of(same.replace('\n    def', '\n\n\n    def'))
    assert len({*map(of, (text, text.replace('1  #', '2  #'), text.replace('f(', 'g('),
                          text + 'b = "x"', text + 'b = "y"'))}) == 5


def test_batches_depend_on_seed_and_iteration_and_evaluation_batches_on_neither(workspace):
    def data(**changes):
        config = TrainConfig(dataset='code', data_dir=str(workspace / 'data'), block_size=16,
                             batch_size=4, eval_iters=3, **changes)
        return Data(config, torch.device('cpu'))
    one, same, other = data(seed=1), data(seed=1, mlp='dense'), data(seed=2)
    idx, targets = one.train_batch(5, 0)
    assert idx.shape == targets.shape == (4, 16) and torch.equal(idx[:, 1:], targets[:, :-1])
    assert torch.equal(idx, same.train_batch(5, 0)[0])
    for different in (one.train_batch(6, 0), one.train_batch(5, 1), other.train_batch(5, 0)):
        assert not torch.equal(idx, different[0])
    batches = list(one.eval_batches('val'))
    assert len(batches) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, other.eval_batches('val')))
    tokens = np.fromfile(workspace / 'data/code/val.bin', dtype=np.uint16)
    assert batches[0][0][0].tolist() == tokens[:16].tolist()       # from the first token
    assert batches[2][1][3].tolist() == tokens[-16:].tolist()      # to the last
    one.config.eval_iters = 10_000                                 # no token is seen many times
    for split in ('train', 'val'):
        seen = sum(idx.numel() for idx, _ in one.eval_batches(split))
        assert len(one.tokens[split]) <= seen <= len(one.tokens[split]) + 64


def test_windows_of_test_loss_lie_halfway_between_those_of_val_loss(workspace, monkeypatch):
    """In 3,000 random shapes, in texts in which each token is its own place."""
    data, random = Data(TrainConfig(dataset='code', data_dir=str(workspace / 'data')),
                        torch.device('cpu')), np.random.default_rng(1)
    monkeypatch.setattr(Data, 'batch', lambda self, split, starts: starts.tolist())
    some = {False: 0, True: 0}
    for _ in range(3000):
        size, S, iters = (int(random.integers(1, most)) for most in (9, 20, 12))
        n = S + 1 + int(random.integers(1, 5 * size * S * iters))
        data.config.batch_size, data.config.block_size, data.config.eval_iters = size, S, iters
        data.tokens['val'] = range(n)
        val, test = (sum(data.eval_batches(split), []) for split in ('val', 'test'))
        assert val == sorted(val) and val[0] == 0 and val[-1] + S + 1 <= n
        assert not {*test} - {(a + b) // 2 for a, b in itertools.pairwise(val)}
        seen, held_out = ({token for start in starts for token in range(start, start + S + 1)}
                          for starts in (val, test))
        assert not seen & held_out and len(held_out) == (S + 1) * len(test)
        room = (n - S - 1) / max(1, len(val) - 1) >= 2 * (S + 1)
        assert len(test) == (len(val) - size if room else 0)
        some[bool(test)] += 1
    assert min(some.values()) > 500


def test_runs_of_files_and_of_the_command_line():
    runs = plan_runs({'mlp': 'aoe,moe', 'out_dir': 'o'}, {'seeds': (3, 4)})
    assert [(run.name, run.mlp, run.seed, run.folder) for run in runs] == [
        ('aoe', 'aoe', 3, 'o/aoe-3'), ('moe', 'moe', 3, 'o/moe-3'),
        ('aoe', 'aoe', 4, 'o/aoe-4'), ('moe', 'moe', 4, 'o/moe-4')]
    assert plan_runs({}, {'mlp': 'dense'})[0].folder == 'out/default/dense'
    run, = plan_runs({'n_layer': 2, 'runs': {'deep': {'n_layer': 6}}}, {'max_iters': 5})
    assert (run.name, run.n_layer, run.max_iters) == ('deep', 6, 5)
    # --mlp takes the place of a file's runs
    file = {'runs': {'aoe whole': {'mlp': 'aoe', 'factorised': False}, 'moe': {'mlp': 'moe'}}}
    assert [run.name for run in plan_runs(dict(file), {})] == ['aoe whole', 'moe']
    run, = plan_runs(dict(file), {'mlp': 'dense', 'name': 'x'})
    assert (run.name, run.mlp, run.factorised) == ('x', 'dense', False)


# -----------------------------------------------------------------------------
# side by side

@pytest.mark.parametrize('arguments, shares', (
    (['--seeds=1,2,3'], (3, 2)), (['--seeds=1,2,3,4,5,6,7,8,9'], (8, 1)), ([], (1, 8)),
    (['--seeds=1,2,3', '--jobs=2'], (2, 4)), (['--seeds=1,2,3', '--jobs=1'], (1, 8)),
    (['--seeds=1,2,3', '--threads=1'], (3, 1))))
def test_how_many_runs_share_eight_cores(workspace, monkeypatch, arguments, shares):
    found = []
    monkeypatch.setattr(train, 'usable_cores', lambda: 8)
    monkeypatch.setattr(train, 'train_side_by_side',
                        lambda runs, jobs, *_: found.append((jobs, runs[0].threads)) or 0)
    monkeypatch.setattr(train, 'train_one_by_one',
                        lambda runs, *_: found.append((1, runs[0].threads)) or 0)
    small = [argument for argument in SMALL if argument not in ('--jobs=1', '--threads=1')]
    run_here(train.main, *small, *arguments, '--out_dir=out/shares', '--init_from=auto',
             cwd=workspace, check=False)
    assert found == [shares]


LINUX = pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs Linux')


def wait_until(fact, process):
    """Until fact() is true of a process that runs."""
    end = time.monotonic() + 300
    while not fact():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.01)


def workers(process):
    """The ids of the processes that train runs for it."""
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
        return [pid for pid in file.read().split() if 'spawn_main' in command_of(pid)]


def command_of(pid):
    """Of a process that lives; '' of one that has ended."""
    with contextlib.suppress(OSError):
        return pathlib.Path('/proc', pid, 'cmdline').read_text()
    return ''


@LINUX
@pytest.mark.slow
def test_runs_that_are_stopped_again_and_again_end_like_those_that_are_not(workspace, monkeypatch):
    """Two runs, side by side and one by one by turns, are stopped by a signal, or by kill -9: of
    the first process, or of all while one writes a file. Seconds differ, nothing else may."""
    moments, out, saved_between, while_writing = random.Random(1), workspace / 'out/killed', 0, 0
    more = [*SMALL, '--mlp=aoe,moe', '--max_iters=300', '--eval_interval=20', '--dropout=0.1',
            '--gradient_accumulation_steps=2', '--aux_weight=0.01', '--init_from=auto']
    hang_up = signal.SIGHUP if signal.SIGHUP in train.SIGNALS else signal.SIGINT   # under nohup
    for jobs, kill in ((2, 'first'), (2, 'all'), (2, signal.SIGINT), (1, 'all'), (1, hang_up),
                       (2, signal.SIGTERM)):
        began = time.time()
        process = start_script('train.py', *more, f'--jobs={jobs}', '--out_dir=out/killed',
                               cwd=workspace)
        wait_until(lambda began=began: any(log.stat().st_mtime > began
                                           for log in out.rglob('log.jsonl')), process)
        time.sleep(moments.uniform(0, 1))
        while kill == 'all' and process.poll() is None and not any(out.rglob('*.part')):
            pass
        left = workers(process)
        while_writing += any(out.rglob('*.part'))
        if kill == 'all':
            os.killpg(process.pid, signal.SIGKILL)
        elif kill == signal.SIGINT:
            os.killpg(process.pid, kill)                           # as Ctrl-C in a terminal
        else:
            process.send_signal(signal.SIGKILL if kill == 'first' else kill)
        printed, errors = process.communicate()                    # until all have closed them
        assert len(left) == (jobs if jobs > 1 else 0) and not any(map(command_of, left))
        reached = [load_checkpoint(path, 'cpu')['iter'] for path in out.rglob('ckpt.pt')]
        if kill not in ('first', 'all'):
            saved_between += any(iteration % 20 for iteration in reached)
            assert (process.returncode, errors) == (128 + kill, '')
            assert printed.count('--init_from=resume') == (kill != signal.SIGHUP)
    assert while_writing and saved_between and max(reached) < 300
    assert start_script('train.py', *more, '--out_dir=out/killed', cwd=workspace).wait() == 0
    monkeypatch.setattr(train, 'draw', lambda *arguments: None)
    run_here(train.main, *more, '--out_dir=out/whole', cwd=workspace)
    for mlp in ('aoe', 'moe'):
        killed, whole = (load_checkpoint(workspace / f'out/{name}/{mlp}/ckpt.pt', 'cpu')
                         for name in ('killed', 'whole'))
        for entry in killed['log'] + whole['log']:
            del entry['seconds']
        assert [entry['iter'] for entry in whole['log']] == list(range(0, 301, 20))
        assert killed['log'] == whole['log'] and killed['recipe'] == whole['recipe']
        assert all(map(torch.equal, killed['model'].values(), whole['model'].values()))
        assert sorted(os.listdir(out / mlp)) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


@LINUX
@pytest.mark.slow
def test_where_one_process_is_killed_or_finds_other_code_the_others_go_on(workspace):
    """Three runs, two side by side: the first is killed, and model.py edited before the third."""
    scripts = workspace / 'scripts'
    scripts.mkdir()
    for name in ('model', 'train', 'sample', 'prepare_data', 'configurator'):
        shutil.copy(f'{ROOT}/{name}.py', scripts)
    process = start_script(scripts / 'train.py', *SMALL, '--mlp=moe,aoe,dense', '--max_iters=600',
                           '--eval_interval=200', '--jobs=2', '--out_dir=out/edited', cwd=workspace)
    wait_until(lambda: all((workspace / f'out/edited/{mlp}/best.pt').exists()
                           for mlp in ('moe', 'aoe')), process)
    (scripts / 'model.py').write_text((scripts / 'model.py').read_text() + '\nEDITED = True\n')
    os.kill(int(workers(process)[0]), signal.SIGKILL)
    printed, errors = process.communicate()
    assert process.returncode == 1 and sorted(errors.splitlines()) == [
        'error: out/edited/dense: expected the code of the start, got another model.py; '
        'start anew', 'error: out/edited/moe: its process ended with exit code -9; '
        '--init_from=resume goes on with it']
    reached = read_log(workspace / 'out/edited/moe')[-1]['iter']   # before it was killed
    assert list(table_of(printed)) == ['run', 'aoe', f'moe (to {reached})'] and reached < 600
    assert '\r' not in printed
    assert [line['iter'] for line in read_log(workspace / 'out/edited/aoe')] == [0, 200, 400, 600]


@pytest.mark.slow
def test_where_one_run_has_no_room_the_others_save_and_end(workspace):
    """With its optimizer's state moe takes more than 450,000 bytes, and dense fewer."""
    resource = pytest.importorskip('resource')                     # Windows has none
    process = start_script('train.py', *SMALL, '--mlp=dense,moe', '--jobs=2', '--out_dir=out/room',
                           '--max_iters=1000000', cwd=workspace, preexec_fn=lambda:
                           resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, 450_000)))
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.count('\n') == 1, errors
    assert re.match('error: out/room/moe.*expected to write it.*Is the disk full', errors)
    assert not list((workspace / 'out/room').rglob('*.part'))
    assert load_checkpoint(workspace / 'out/room/dense/ckpt.pt', 'cpu')['iter'] < 1000000


@LINUX
@pytest.mark.slow
def test_a_terminal_of_80_columns_shows_one_bar_for_all_runs(workspace):
    import fcntl                                                   # Windows has none of them
    import pty
    import termios
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(workspace)
        os.execv(sys.executable, [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL,
                                  '--jobs=2', '--mlp=moe', '--seeds=1,2', '--max_iters=90',
                                  '--eval_interval=30', '--out_dir=out/terminal'])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    shown = b''
    with contextlib.suppress(OSError):                             # its end
        while chunk := os.read(terminal, 2**16):
            shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    lines = re.split('[\r\n]+', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown.decode()))
    assert max(map(len, lines)) <= 80
    # of 2 x 90 iterations of 128 tokens, and with both losses
    assert any(re.match(r' *\d+%\|.*k/23\.0k \[.*tok/s, loss \d\.\d+ \d\.\d+\]$', line)
               for line in lines)
    for seed in (1, 2):
        assert sum(bool(re.match(rf'moe-{seed} +iter ', line)) for line in lines) == 4
