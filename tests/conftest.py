"""What the tests of the scripts share: a small corpus, and two ways to run a script."""

import contextlib
import io
import os
import signal
import subprocess
import sys

import pytest
import torch

import configurator
import prepare_data
import train
from sample import read_log

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ['--n_layer=2', '--n_embd=32', '--n_head=2', '--d_ffn=48', '--n_expert=4', '--dataset=code',
         '--block_size=16', '--batch_size=8', '--max_iters=20', '--eval_interval=10', '--jobs=1',
         '--eval_iters=2', '--warmup_iters=5', '--dtype=float32', '--threads=1']
torch.set_num_threads(1)                 # for matmuls as small as the tests' more are slower


def pytest_configure(config):
    """Tests marked slow run only when asked for: python -m pytest -m slow."""
    config.addinivalue_line('markers', 'slow: starts processes or takes long; runs with -m slow')
    config.option.markexpr = config.option.markexpr or 'not slow'


def start_script(script, *arguments, processes=1, torchrun=False, **more):
    """Start a script as a user does, several processes through torchrun. Its output is text."""
    words = [os.path.join(ROOT, script), *arguments]
    if torchrun or processes > 1:
        words[:0] = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding='utf-8', start_new_session=True,
                            env=os.environ | {'COLUMNS': '80', 'PYTHONIOENCODING': 'utf-8'}, **more)


def run_script(script, *arguments, check=True, **more):
    """The same until it has ended."""
    process = start_script(script, *arguments, **more)
    out, err = process.communicate()
    assert process.returncode == 0 or not check, err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run_here(main, *arguments, cwd='.', check=True):
    """The same in this process, a script's main, which saves the seconds of importing PyTorch."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8') for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}
    train.checked_meta.cache_clear()     # a test may have written other data to that folder
    status = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', ['script', *arguments])
        try:
            configurator.run(main)
        except SystemExit as exit:
            status = exit.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out, err = (stream.seek(0) or stream.read() for stream in (out, err))
    assert status == 0 or not check, err
    return subprocess.CompletedProcess(arguments, status, out, err)


def table_of(printed):
    """The rows of a Markdown table in what a script printed: first cell -> the others."""
    rows = ([cell.strip() for cell in line.strip('|').split('|')]
            for line in printed.splitlines() if line.startswith('| '))
    return {first: others for first, *others in rows if set(first) != {'-'}}


@pytest.fixture(scope='session')
def code_text():
    """A text that every clone has: this repository's own code."""
    return ''.join(open(os.path.join(ROOT, name), encoding='utf-8').read()
                   for name in ('model.py', 'train.py', 'prepare_data.py', 'configurator.py'))


@pytest.fixture(scope='session')
def workspace(tmp_path_factory, code_text):
    """A folder with data/code. Tests write to out/ in it."""
    folder = tmp_path_factory.mktemp('workspace')
    (folder / 'code.txt').write_text(code_text, encoding='utf-8', newline='')
    run_here(prepare_data.main, 'code.txt', cwd=folder)
    return folder


@pytest.fixture
def train_here(workspace, monkeypatch):
    """train_here(*arguments) runs train.py in this process, in the workspace, without pictures.
    Returns the run's log, but for its times."""
    def call(*arguments):
        run_here(train.main, *SMALL, *arguments)
        given = dict(argument.split('=', 1) for argument in arguments)
        log = read_log(f'{given["--out_dir"]}/{given["--mlp"]}')
        return [{key: entry[key] for key in entry if key != 'seconds'} for entry in log]
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, 'draw', lambda *arguments: None)
    return call


@pytest.fixture
def refuse():
    """refuse(main, *arguments) -> the one line that a script ends with; its status must be 2."""
    def call(main, *arguments):
        process = run_here(main, *arguments, check=False)
        line, *others = process.stderr.splitlines() or ['']
        assert line.startswith('error: ') and not others and process.returncode == 2, (line, others)
        return line
    return call
