"""README.md: every command in it runs, every link leads to what it says, every picture is there."""

import os
import re

import pytest

from conftest import ROOT, run_script

README = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
# Commands as they stand there; long ones are cut short by what is added to them here.
SHORT = {
    'train.py': ['--max_iters=2', '--eval_interval=1', '--eval_iters=1', '--batch_size=2', '--n_layer=2'],
    'sample.py': ['--max_new_tokens=20'],
    'prepare_data.py': [],
    'tests/bench.py': ['--rounds=1', '--warmup=1', '--shapes=small'],
    'tests/test_toy.py': ['--steps=3'],
}


def commands():
    """The python and torchrun commands of the README, in its order, each once; `&&` parts two."""
    code = re.findall(r'^    (.*)$|(?<!`)`([^`]+)`', README, flags=re.M)
    parts = [' '.join(part.split()) for indented, inline in code for part in (indented or inline).split('&&')]
    return list(dict.fromkeys(part for part in parts if part.startswith(('python ', 'torchrun '))))
