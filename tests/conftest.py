"""What the tests of the scripts share: a small corpus, and a way to run a script."""

import os
import subprocess
import sys

import pytest

import configurator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ['--n_layer=2', '--n_embd=32', '--n_head=2', '--d_ffn=48', '--n_expert=4',
         '--block_size=16', '--batch_size=8', '--max_iters=20', '--eval_interval=10',
         '--eval_iters=2', '--warmup_iters=5', '--dataset=code', '--dtype=float32']


def pytest_configure(config):
    """Tests marked slow run only when asked for: python -m pytest -m slow."""
    config.addinivalue_line('markers', 'slow: more than half a minute; runs with -m slow')
    config.option.markexpr = config.option.markexpr or 'not slow'


def run_script(script, *arguments, cwd, check=True, processes=1, torchrun=False):
    """Run a script as a user does, with several processes through torchrun. Returns what is
    finished, its output as text."""
    command = [sys.executable]
    if processes > 1 or torchrun:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    environment = os.environ | {'MPLBACKEND': 'Agg', 'COLUMNS': '80', 'PYTHONIOENCODING': 'utf-8'}
    process = subprocess.run([*command, os.path.join(ROOT, script), *arguments], cwd=cwd,
                             capture_output=True, encoding='utf-8', env=environment, timeout=170)
    if check:
        assert process.returncode == 0, process.stderr
    return process


def table_of(printed):
    """The rows of a Markdown table in what a script printed: first cell -> the others."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in printed.splitlines() if line.startswith('| ')]
    return {first: others for first, *others in rows if set(first) != {'-'}}


@pytest.fixture(scope='session')
def code_text():
    """A text that every clone has: this repository's own code."""
    return ''.join(open(os.path.join(ROOT, name), encoding='utf-8').read()
                   for name in ('model.py', 'train.py', 'prepare_data.py', 'configurator.py'))


@pytest.fixture(scope='session')
def workspace(tmp_path_factory, code_text):
    """A folder with data/code, prepared through the command line. Tests write to out/ in it."""
    folder = tmp_path_factory.mktemp('workspace')
    (folder / 'code.txt').write_text(code_text, encoding='utf-8', newline='')
    run_script('prepare_data.py', 'code.txt', cwd=folder)
    return folder


@pytest.fixture
def refuse(monkeypatch, capsys):
    """refuse(main, *arguments) -> the one line that a script ends with; its status must be 2."""
    def call(main, *arguments):
        monkeypatch.setattr(sys, 'argv', ['script', *arguments])
        with pytest.raises(SystemExit) as exit:
            configurator.run(main)
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), lines
        return lines[0]
    return call
