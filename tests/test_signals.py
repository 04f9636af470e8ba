"""train.py as a user starts, stops and kills it. The same command resumes, and ends like a run that
was never stopped, to the last bit."""

import contextlib
import os
import pathlib
import signal
import time

import pytest
import torch

from conftest import SMALL, run_here, start_script, table_of
from train import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.exists('/proc/self/task'),
                                                   reason='needs Linux')]
TWO = [*SMALL, '--mlp=aoe,moe', '--max_iters=300', '--eval_interval=50', '--dropout=0.1',
       '--aux_weight=0.01']


def wait_until(fact, seconds=300):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.01)


def is_alive(pid):
    """Whether a process runs. One that has ended has no command line."""
    with contextlib.suppress(OSError):
        return bool(pathlib.Path(f'/proc/{pid}/cmdline').read_bytes())
    return False


def children_of(process):
    """The ids of the processes that train side by side. Threads start them."""
    files = pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')
    return [int(pid) for file in files for pid in file.read_text().split()]


def checkpoint(folder):
    return torch.load(folder / 'ckpt.pt', map_location='cpu', weights_only=True)


@pytest.fixture(scope='module')
def whole(workspace):
    """The folder of TWO, trained without a stop, one after the other."""
    run_here(main, *TWO, '--out_dir=out/whole', cwd=workspace)
    return workspace / 'out/whole'


def assert_equal_runs(out, whole):
    for mlp in ('aoe', 'moe'):
        found, expected = checkpoint(out / mlp), checkpoint(whole / mlp)
        for entry in found['log'] + expected['log']:
            del entry['seconds']
        assert [entry['iter'] for entry in expected['log']] == list(range(0, 301, 50))
        assert found['log'] == expected['log'] and found['recipe'] == expected['recipe']
        assert all(map(torch.equal, found['model'].values(), expected['model'].values()))


def to_group(number):
    return lambda process, children: os.killpg(process.pid, number)


def to_parent(number):
    return lambda process, children: os.kill(process.pid, number)


@pytest.mark.parametrize('jobs, act, status, both_end', (
    (1, to_group(signal.SIGINT), 130, False), (2, to_group(signal.SIGINT), 130, False),
    (2, to_group(signal.SIGTERM), 130, False),
    (2, to_parent(signal.SIGINT), 130, False), (2, to_parent(signal.SIGKILL), -9, True),
    (2, lambda process, children: os.kill(children[0], signal.SIGKILL), 1, False)), ids=(
    'Ctrl-C one job', 'Ctrl-C', 'SIGTERM to all', 'SIGINT to the parent', 'kill -9 of the parent',
    'kill -9 of a child'))
def test_runs_that_are_stopped_end_like_those_that_are_not(
        workspace, whole, request, jobs, act, status, both_end):
    out = workspace / 'out' / request.node.callspec.id.replace(' ', '_')
    command = ['train.py', *TWO, f'--jobs={jobs}', f'--out_dir={out}']
    process = start_script(*command, cwd=workspace)

    def evaluations():
        return [path.read_text().count('\n') for path in out.glob('*/log.jsonl')]
    wait_until(lambda: len(evaluations()) == jobs and max(evaluations()) >= 2)
    children = children_of(process)
    act(process, children)
    printed, errors = process.communicate()
    assert process.returncode == status and len(children) == (2 if jobs == 2 else 0)
    wait_until(lambda: not any(map(is_alive, children)))           # nobody is left
    reached = [checkpoint(path.parent)['iter'] for path in out.glob('*/ckpt.pt')]
    assert (reached == [300, 300]) == both_end
    assert printed.count('stopped; the same command resumes') == (status == 130)
    if status == 130:
        assert any(iteration % 50 for iteration in reached)        # it saved when it was told to
    if status == 1:
        assert errors.count(': its process was killed; the same command resumes it\n') == 1
        assert len(table_of(printed)) == 3                         # both runs are shown
    again = start_script(*command, cwd=workspace)
    assert again.wait() == 0, again.stderr.read()
    assert_equal_runs(out, whole)


@pytest.mark.parametrize('jobs', (1, 2))
def test_a_second_ctrl_c_ends_at_once(workspace, jobs):
    """A first signal waits for an evaluation of minutes."""
    process = start_script('train.py', *TWO, '--eval_iters=1000000', '--batch_size=1',
                           '--block_size=1', f'--jobs={jobs}', f'--out_dir=out/twice{jobs}',
                           cwd=workspace)
    lines = 0
    while lines < jobs:                  # a run describes itself, then it evaluates
        lines += ' iterations of ' in process.stdout.readline()
    children = children_of(process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None and all(map(is_alive, children))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    wait_until(lambda: not any(map(is_alive, children)), seconds=10)
