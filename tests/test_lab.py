"""The lab: its notebook, its commands and its edits work; its numbers are those of its results."""

import json
import os
import re
import statistics
import sys
import types

import pytest
import torch

from conftest import ROOT
from configurator import parse, read_text
from sample import half_interval
from train import TrainConfig, keys_of, plan_runs

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))
from notebook import REPO, main, notebook, old_and_new

LAB = os.path.join(ROOT, 'config', 'lab')
PAGE, ANSWERS = (read_text(os.path.join(LAB, page)) for page in ('README.md', 'ANSWERS.md'))


def sources(text):
    """What is in the cells of a notebook."""
    return [''.join(cell['source']) for cell in json.loads(text)['cells']]


def test_the_notebook_is_the_page(tmp_path, refuse):
    assert read_text(os.path.join(LAB, 'lab.ipynb')) == notebook(), 'run tests/tools/notebook.py'
    starts = {'!pip install': 1, '!python train.py': 6, '!python tests/tools/compare.py': 2,
              "edit('''": 3, "show('out/lab/": 5, '> My prediction:': 6}
    cells = sources(notebook())
    assert {start: sum(cell.startswith(start) for cell in cells) for start in starts} == starts
    main([f'--to={tmp_path}/lab.ipynb', '--more=--seeds=7'])
    cells = '\n'.join(sources((tmp_path / 'lab.ipynb').read_text()))
    assert re.findall('^!python train.py .*( --seeds=7)$', cells, re.M) == [' --seeds=7'] * 9
    assert "got 'x'" in refuse(main, 'x')


@pytest.mark.slow
def test_the_notebook_runs_to_its_end_from_nothing(tmp_path):
    """In an empty folder: it clones what is committed here."""
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    text = notebook('--max_iters=4 --eval_interval=2 --eval_iters=1 --batch_size=2')
    nb = nbformat.reads(text.replace(REPO, ROOT), as_version=4)
    nbclient.NotebookClient(nb, timeout=1800, resources={'metadata': {'path': tmp_path}}).execute()
    outputs = [output for cell in nb.cells for output in cell.get('outputs', ())]
    printed = ''.join(output.get('text', '') for output in outputs)
    assert not re.search('error|Traceback', printed), printed
    for kind, number in (('image/png', 4), ('text/html', 1)):
        assert sum(kind in output.get('data', ()) for output in outputs) == number
    assert '| wrong ' in printed and '| aoe_0 ' in printed


def test_every_command_plans_three_seeds_of_runs_of_its_own():
    names = []
    for command in re.findall('^    python train.py (config/lab/lab.py.*)$', PAGE, re.M):
        values, files = parse(TrainConfig, command.split(), '')
        runs = plan_runs(keys_of([os.path.join(ROOT, file) for file in files]), values)
        assert {run.seed for run in runs} == {7, 8, 9}
        names += [run.name for run in runs] * (not runs[0].eval_only)
    assert len(names) == 3 * len(set(names)) > 50


def test_every_edit_fits_model_py_and_trains():
    assert PAGE.count('```diff') > 8
    for exercise in re.split('^## |git checkout model.py', PAGE, flags=re.M)[1:]:
        edited = read_text(os.path.join(ROOT, 'model.py'))
        for old, new in map(old_and_new, re.findall(r'```diff\n(.*?)```', exercise, re.S)):
            assert edited.count(old) == 1, old
            edited = edited.replace(old, new)
        module = sys.modules['edited'] = types.ModuleType('edited')        # for dataclasses
        exec(edited, module.__dict__)
        model = module.GPT(module.GPTConfig(vocab_size=8, n_layer=1, n_embd=32, n_head=2))
        tokens = torch.arange(16).view(2, 8) % 8
        loss = model(tokens, tokens)[1]
        loss.backward()
        assert loss.isfinite()


# numbers, told as 'aoe 1.808' and 'aoe minus moe +0.014 ± 0.016'

def losses_in(file):
    """Run -> the lowest losses of seeds 7, 8 and 9."""
    results = map(json.loads, read_text(os.path.join(LAB, file)).splitlines())
    loss = {(result['run'], result['seed']): result['lowest_val_loss'] for result in results}
    return {run: [loss[run, seed] for seed in (7, 8, 9)] for run, _ in loss}


RESULTS = losses_in('lab.jsonl') | losses_in('dense_longer.jsonl')
RUN = '|'.join(sorted(RESULTS, key=len, reverse=True))


def mean(losses):
    return f'{statistics.mean(losses):.3f}'


def minus(name, other):
    differences = [a - b for a, b in zip(RESULTS[name], RESULTS[other])]
    return f'{statistics.mean(differences):+.3f} ± {half_interval(differences):.3f}'


def test_losses_on_the_pages_are_those_of_the_results():
    text = ' '.join(f'{PAGE}\n{ANSWERS}'.split())
    losses = re.findall(rf'\b({RUN}) (1\.\d{{3}})\b', text)
    for name, loss in losses:
        assert loss == mean(RESULTS[name]), name
    differences = re.findall(rf'\b({RUN}) minus ({RUN}) ([+-]0\.\d+ ± 0\.\d+)', text)
    for name, other, told in differences:
        assert told == minus(name, other), (name, other)
    assert len(losses) + len(differences) > 12


def test_losses_without_training_are_those_that_were_printed():
    commands = re.split(r'^\$ ', read_text(os.path.join(LAB, 'eval_only.txt')), flags=re.M)[1:]
    means = {(mlp, mean(map(float, re.findall(rf'^{mlp}-\d .* val loss (\S+)', command, re.M))))
             for command in commands for mlp in ('aoe', 'moe')}
    told = [(mlp, loss) for mlp, cells in re.findall(r'^\| (aoe|moe) \|(.*)\|$', ANSWERS, re.M)
            for loss in re.findall(r'\b\d\.\d{3}\b', cells)]
    assert {*told} == means and len(told) == 16
