"""train.py as a user starts, stops and kills it: what is saved, what is left, how it goes on."""

import contextlib
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

import sample
from conftest import ROOT, SMALL, run_here, run_script, start_script, table_of
from sample import read_log
from train import main

LINUX = pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs Linux')
STOPPING = 'stopping after this iteration; Ctrl-C again ends at once'
TWO = [*SMALL, '--mlp=aoe,moe', '--max_iters=700', '--eval_interval=50', '--dropout=0.1',
       '--gradient_accumulation_steps=2', '--aux_weight=0.01']

pytestmark = pytest.mark.slow


def wait_until(fact, process=None, seconds=300):
    """Until fact() is true, of a process that runs."""
    end = time.monotonic() + seconds
    while not fact():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.001)


def command_of(pid):
    """Of a process that lives; '' of one that has ended."""
    with contextlib.suppress(OSError):
        return pathlib.Path('/proc', str(pid), 'cmdline').read_text()
    return ''


def workers(process):
    """The ids of the processes that train runs for it."""
    files = pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')       # of its threads
    return [int(pid) for file in files for pid in file.read_text().split()
            if '--train_one' in command_of(pid)]


def checkpoint(folder):
    return torch.load(folder / 'ckpt.pt', map_location='cpu', weights_only=True)


@pytest.fixture(scope='module')
def whole(workspace):
    """The folder of TWO, trained without a stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, 'draw', lambda *_: None)             # it would take longer
        run_here(main, *TWO, '--out_dir=out/whole', cwd=workspace)
    return workspace / 'out/whole'


def assert_equal_runs(out, whole):
    """All but seconds, to the last bit; and nothing else is left."""
    for mlp in ('aoe', 'moe'):
        found, expected = checkpoint(out / mlp), checkpoint(whole / mlp)
        for entry in found['log'] + expected['log']:
            del entry['seconds']
        assert [entry['iter'] for entry in expected['log']] == list(range(0, 701, 50))
        assert found['log'] == expected['log'] and found['recipe'] == expected['recipe']
        assert all(map(torch.equal, found['model'].values(), expected['model'].values()))
        assert sorted(file for file in os.listdir(out / mlp) if not file.endswith('.part')) == [
            'best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


@LINUX
def test_runs_that_are_stopped_again_and_again_end_like_those_that_are_not(workspace, whole):
    """Two runs, side by side and one by one by turns. kill -9 is of the first process, whose
    children then end, or of all while one writes a file."""
    moments, out, saved_between = random.Random(1), workspace / 'out/killed', False
    for jobs, kill in ((2, 'first'), (2, 'all'), (2, signal.SIGINT), (1, 'all'), (1, signal.SIGINT),
                       (2, signal.SIGTERM), (1, signal.SIGTERM)):
        for part in out.rglob('*.part'):                           # they stay, and hinder nothing
            part.unlink()
        began = time.time()
        process = start_script('train.py', *TWO, f'--jobs={jobs}', '--out_dir=out/killed',
                               cwd=workspace)
        wait_until(lambda began=began: any(picture.stat().st_mtime > began
                                           for picture in out.glob('loss.png')), process)
        children = workers(process)
        assert len(children) == (jobs if jobs > 1 else 0)
        time.sleep(moments.uniform(0, 0.2))
        if kill == 'all':
            wait_until(lambda: any(out.rglob('*.part')), process)
        for pid in (process.pid, *children) if kill == 'all' else (process.pid,):
            os.kill(pid, signal.SIGKILL if type(kill) is str else kill)
        process.wait()
        wait_until(lambda children=children: not any(map(command_of, children)), seconds=30)
        printed, errors = process.communicate()
        reached = [checkpoint(path.parent)['iter'] for path in out.rglob('ckpt.pt')]
        if type(kill) is not str:
            saved_between = saved_between or any(iteration % 50 for iteration in reached)
            told = f'\n{STOPPING}\n' if kill == signal.SIGINT else ''
            assert (process.returncode, errors) == (128 + kill, told)
            assert printed.count('stopped and saved; the same command goes on') == 1
    assert saved_between and max(reached) < 700
    run_script('train.py', *TWO, '--jobs=2', '--out_dir=out/killed', cwd=workspace)
    assert_equal_runs(out, whole)


@LINUX
def test_where_one_of_the_processes_is_killed_the_others_go_on(workspace, whole):
    out = workspace / 'out/one_killed'
    process = start_script('train.py', *TWO, '--jobs=2', '--out_dir=out/one_killed', cwd=workspace)
    wait_until(lambda: all((out / mlp / 'best.pt').exists() for mlp in ('moe', 'aoe')), process)
    os.kill(next(pid for pid in workers(process) if '"mlp": "moe"' in command_of(pid)),
            signal.SIGKILL)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (1, 'error: out/one_killed/moe: its process was killed; '
                                               'the same command goes on with it\n')
    reached = read_log(out / 'moe')[-1]['iter']                    # before it was killed
    assert list(table_of(printed)) == ['run', 'aoe', f'moe (iter {reached})'] and reached < 700
    assert '\r' not in printed
    run_script('train.py', *TWO, '--jobs=2', '--out_dir=out/one_killed', cwd=workspace)
    assert_equal_runs(out, whole)


@LINUX
@pytest.mark.parametrize('jobs, first', ((1, signal.SIGINT), (2, signal.SIGINT),
                                         (2, signal.SIGTERM)))
def test_a_second_ctrl_c_ends_at_once(workspace, jobs, first):
    """An evaluation of hours is under way. (A second SIGTERM changes nothing.)"""
    out = f'out/twice{jobs}{first}'
    process = start_script('train.py', *TWO, '--eval_iters=1000000', '--batch_size=1',
                           '--block_size=1', f'--jobs={jobs}', f'--out_dir={out}', cwd=workspace)
    described = 0
    while described < jobs:              # a run describes itself, and begins to evaluate
        described += ' parameters, ' in process.stdout.readline()
    time.sleep(1)
    process.send_signal(first)
    if first == signal.SIGINT:
        assert [process.stderr.readline() for _ in range(2)] == ['\n', f'{STOPPING}\n']
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    children = workers(process)
    assert process.poll() is None and len(children) == (jobs if jobs > 1 else 0)
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.readlines()[-1]) == (130, 'interrupted\n')
    assert not any(map(command_of, children))


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
    assert checkpoint(workspace / 'out/room/dense')['iter'] < 1000000


@LINUX
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
    # of 2 x 90 iterations of 128 tokens, and with the loss of one of the two
    assert any(re.match(r' *\d+%\|.*k/23\.0k \[.*tok/s, loss \d\.\d+\]$', line)
               for line in lines)
    for seed in (1, 2):
        assert sum(bool(re.match(rf'moe-{seed} +iter ', line)) for line in lines) == 4


@pytest.mark.parametrize('line, statuses', (
    ('train.py --help | true', {141}), ('sample.py out/piped | head -1', {0, 141}),
    ('train.py --help >&-', {0}), ('sample.py out/piped/aoe --show_experts=True 2>&-', {0}),
    ('train.py SMALL --mlp=moe,aoe --jobs=2 --out_dir=out/head | head -1', {141}),
    ('train.py SMALL --max_iters=1 --out_dir=out/closed 2>&-', {0})))
def test_a_reader_that_goes_away_and_a_poor_terminal_are_no_traceback(train_here, line, statuses):
    if not os.path.exists('out/piped'):
        train_here('--mlp=aoe', '--out_dir=out/piped', '--max_iters=1')
    line = line.replace('SMALL', ' '.join(SMALL))
    line = f"PYTHONIOENCODING=ascii '{sys.executable}' {ROOT}/{line}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
    assert process.returncode in statuses and process.stderr == ''
