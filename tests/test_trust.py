"""A run that can be trusted: the same from the same seed, exact after a stop, whole after a kill,
and it says what broke."""

import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import sample
import train
from conftest import ROOT, SMALL, run_script
from train import load_checkpoint, read_log

RULES = {'top_k': [], 'top_p': ['--select=top_p', '--conf_weight=1e-3'],
         'expert_choice': ['--select=expert_choice']}


@pytest.fixture
def train_here(workspace, monkeypatch):
    """train_here(*arguments) runs train.py in this process, in the workspace, without drawing.
    Returns the run's log."""
    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            train.main([*SMALL, *arguments])
        assert not exit.value.code
        out_dir, mlp = (next(a.partition('=')[2] for a in arguments if a.startswith(key))
                        for key in ('--out_dir', '--mlp'))
        return [{key: entry[key] for key in ('iter', 'train_loss', 'val_loss', 'load', 'norm')}
                for entry in read_log(f'{out_dir}/{mlp}/log.jsonl')]
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, 'draw', lambda *arguments: None)
    handler = signal.getsignal(signal.SIGINT)
    yield call
    signal.signal(signal.SIGINT, handler)


def weights(path):
    return load_checkpoint(path, 'cpu')['model']


def equal(a, b):
    """Whether two dicts of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('mlp, rule', (
    ('dense', 'top_k'), *((mlp, rule) for mlp in ('moe', 'aoe') for rule in RULES)))
def test_stopping_and_evaluating_change_nothing(train_here, mlp, rule):
    more = [f'--mlp={mlp}', *RULES[rule], '--aux_weight=0.01', '--dropout=0.1',
            '--gradient_accumulation_steps=2', '--lr_decay_iters=20']
    halves = f'out/halves-{mlp}-{rule}'
    whole = train_here(*more, f'--out_dir={halves}-whole', '--eval_interval=5')
    first = train_here(*more, f'--out_dir={halves}', '--max_iters=10')
    both = train_here(*more, f'--out_dir={halves}', '--init_from=resume')
    assert [entry['iter'] for entry in whole] == [0, 5, 10, 15, 20]
    assert first == both[:2] and both == whole[::2]
    assert equal(weights(f'{halves}/{mlp}/ckpt.pt'), weights(f'{halves}-whole/{mlp}/ckpt.pt'))
    tokens = [entry['tokens'] for entry in read_log(f'{halves}/{mlp}/log.jsonl')]
    assert tokens == [0, 10 * 2 * 8 * 16, 20 * 2 * 8 * 16]


def test_the_seed_decides(train_here):
    logs = [train_here('--mlp=aoe', f'--out_dir=out/seed{i}', f'--seed={seed}', '--dropout=0.1',
                       '--max_iters=5')
            for i, seed in enumerate((1, 1, 2))]
    assert logs[0] == logs[1]
    assert all(a['val_loss'] != b['val_loss'] for a, b in zip(logs[0], logs[2]))


@pytest.mark.parametrize('mlp', ('aoe', 'moe', 'dense'))
def test_three_hundred_iterations_teach_something(train_here, mlp):
    """From 4.5 nats a character, ln of the vocabulary, to 2.60 to 2.63 with three seeds."""
    log = train_here(f'--mlp={mlp}', f'--out_dir=out/taught-{mlp}', '--max_iters=300',
                     '--eval_interval=300', '--eval_iters=20')
    assert log[0]['val_loss'] > 4 and log[1]['val_loss'] < 2.75


def break_at(monkeypatch, iteration, number, before):
    """Put a number into a weight, before or after the step of an iteration."""
    step = train.Training.step

    def broken(self):
        if not before:
            step(self)
        if self.iteration == iteration:
            with torch.no_grad():
                self.model.head.weight[0, 0] = number
        if before:
            step(self)
    monkeypatch.setattr(train.Training, 'step', broken)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train_here, refuse,
                                                                          monkeypatch):
    break_at(monkeypatch, 13, math.inf, before=True)
    line = refuse(train.main, *SMALL, '--mlp=moe,dense', '--out_dir=out/broken', '--log_interval=4')
    assert 'out/broken/moe: iteration 13: expected a finite loss, got nan; the last was ' in line
    assert '--name=' in line and '--learning_rate=0.002' in line
    assert load_checkpoint('out/broken/moe/ckpt.pt', 'cpu')['iter'] == 10
    assert [entry['iter'] for entry in read_log('out/broken/moe/log.jsonl')] == [0, 10]


def test_weights_that_are_not_finite_are_not_saved(train_here, refuse, monkeypatch):
    break_at(monkeypatch, 10, math.nan, before=False)              # the loss before was finite
    assert 'iteration 10: expected a finite loss, got weights' in refuse(
        train.main, *SMALL, '--mlp=dense', '--out_dir=out/not_saved')
    assert load_checkpoint('out/not_saved/dense/ckpt.pt', 'cpu')['iter'] == 0


def test_a_full_disk_leaves_the_last_checkpoint_whole(train_here, workspace):
    """The disk is played by a limit on the size of a file, between a log's and a checkpoint's."""
    train_here('--mlp=moe', '--out_dir=out/full', '--max_iters=10')
    before = weights('out/full/moe/ckpt.pt')
    process = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL, '--mlp=moe', '--out_dir=out/full',
         '--init_from=resume'], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    line = process.stderr.splitlines()[-1]
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    assert line.startswith('error: out/full/moe/') and 'Is the disk full?' in line
    assert equal(weights('out/full/moe/ckpt.pt'), before)
    assert sorted(os.listdir('out/full/moe')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
    log = train_here('--mlp=moe', '--out_dir=out/full', '--init_from=resume')
    assert [entry['iter'] for entry in log] == [0, 10, 20]


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_nothing_in_a_file_is_run(train_here, refuse):
    train_here('--mlp=moe', '--out_dir=out/bomb', '--max_iters=1')
    for file in ('ckpt.pt', 'best.pt'):
        torch.save({'model': Bomb(), 'config': {}, 'meta': {}}, f'out/bomb/moe/{file}')
    resume = refuse(train.main, *SMALL, '--mlp=moe', '--out_dir=out/bomb', '--init_from=resume')
    assert 'expected a checkpoint of train.py, got a damaged or foreign file' in resume
    sampled = refuse(sample.main, 'out/bomb/moe')
    assert 'expected a checkpoint of train.py, got a damaged or foreign file' in sampled
    for text in ("import os\nos.system('touch exploded')",
                 "n_layer = __import__('os').system('touch exploded')"):
        with open('evil.py', 'w', encoding='utf-8') as file:
            file.write(text)
        assert 'evil.py, line 1' in refuse(train.main, 'evil.py')
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('mlp', ('aoe', 'dense'))
def test_two_processes_train_like_one(workspace, mlp):
    """The same batches, dropout and mean of the gradients: equal but for the order of additions."""
    command = [*SMALL, f'--mlp={mlp}', '--aux_weight=0.01', '--dropout=0.1',
               '--gradient_accumulation_steps=4', '--dtype=float32']
    run_script('train.py', *command, f'--out_dir=out/one-{mlp}', cwd=workspace)
    process = run_script('train.py', *command, f'--out_dir=out/two-{mlp}', cwd=workspace,
                         processes=2)
    one, two = (read_log(workspace / f'out/{name}-{mlp}/{mlp}/log.jsonl')
                for name in ('one', 'two'))
    for log in one, two:
        assert [entry['tokens'] for entry in log] == [0, 5120, 10240]
    for a, b in zip(one, two):
        assert b['train_loss'] == pytest.approx(a['train_loss'], abs=1e-4)
        assert b['val_loss'] == pytest.approx(a['val_loss'], abs=1e-4)
    evaluations = [line for line in process.stdout.splitlines() if 'val loss' in line]
    assert sum('iteration' in line for line in evaluations) == 3   # one of the two prints


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_like_one_that_is_not(workspace):
    """Every second kill comes while a file is being written, the others at any time. Seconds
    differ, nothing else may."""
    moments = random.Random(1)
    command = [*SMALL, '--mlp=aoe', '--max_iters=600', '--eval_interval=20', '--dropout=0.1',
               '--init_from=auto']
    run_script('train.py', *command, '--out_dir=out/undisturbed', cwd=workspace)
    folder = workspace / 'out/killed/aoe'
    while_writing = 0
    for attempt in range(20):
        script = [sys.executable, os.path.join(ROOT, 'train.py'), *command, '--out_dir=out/killed']
        process = subprocess.Popen(script, cwd=workspace, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(3, 6))
        if attempt % 2:
            until = time.monotonic() + 20
            while time.monotonic() < until and not while_writing_a_file(folder):
                pass
        process.kill()
        process.wait()
        while_writing += bool(folder.exists() and while_writing_a_file(folder))
        if (folder / 'ckpt.pt').exists():
            load_checkpoint(folder / 'ckpt.pt', 'cpu')             # raises if it is damaged
    assert while_writing > 0
    run_script('train.py', *command, '--out_dir=out/killed', cwd=workspace)
    timed = ('seconds', 'tokens_per_second', 'peak_memory')
    killed, whole = ([{key: value for key, value in entry.items() if key not in timed}
                      for entry in read_log(workspace / f'out/{name}/aoe/log.jsonl')]
                     for name in ('killed', 'undisturbed'))
    assert [entry['iter'] for entry in whole] == list(range(0, 601, 20))
    assert killed == whole
    assert equal(weights(folder / 'ckpt.pt'), weights(workspace / 'out/undisturbed/aoe/ckpt.pt'))
    assert sorted(os.listdir(folder)) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


def while_writing_a_file(folder):
    return folder.exists() and any(name.endswith('.part') for name in os.listdir(folder))
