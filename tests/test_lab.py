"""The lab: its commands and its edits work as they stand on its page; its numbers are those of its
results."""

import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import types

import pytest
import torch

from configurator import parse, read_config_files, read_text
from conftest import ROOT, run_script
from sample import interval, read_result
from train import TrainConfig, plan_runs

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))
import notebook

LAB = os.path.join(ROOT, 'config', 'lab')
PAGE, ANSWERS = (read_text(os.path.join(LAB, page)) for page in ('README.md', 'ANSWERS.md'))


def test_the_notebook_is_the_page():
    path = os.path.join(LAB, 'lab.ipynb')
    assert read_text(path) == notebook.notebook(), 'run python tests/tools/notebook.py'


@pytest.mark.slow
def test_the_page_can_be_done_from_its_text_with_seed_7(tmp_path, code_text, monkeypatch):
    """Every cell that the whole page gives, in its order, shortened, in a copy of what it needs."""
    for path in glob.glob('*.py', root_dir=ROOT):
        shutil.copy(os.path.join(ROOT, path), tmp_path)
    for folder in ('config/lab', 'tests/tools'):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'shakespeare.txt').write_text(code_text, encoding='utf-8')
    run_script('prepare_data.py', 'shakespeare.txt')
    # the notebook's own edit and show; what it shows has to be there
    ipython = types.SimpleNamespace(Image=os.stat, HTML=str)
    monkeypatch.setitem(sys.modules, 'IPython.display', ipython)
    names = {}
    exec(re.sub('!git clone.*', 'pass', notebook.SETUP), names)
    more = '--seeds=7 --max_iters=4 --eval_interval=2 --eval_iters=1 --batch_size=2 --jobs=1'
    printed = {}                         # command: what it printed last
    for kind, source in notebook.cells_of(PAGE):
        if kind == 'markdown' or re.match('!pip|!python prepare_data', source):
            continue
        if source.startswith('%%writefile mine.py\n'):
            (tmp_path / 'mine.py').write_text(source.partition('\n')[2])
        elif not source.startswith('!'):
            exec(source, names)
        elif source == '!git checkout model.py':
            shutil.copy(os.path.join(ROOT, 'model.py'), 'model.py')
        else:
            command = source[1:].replace('{MORE}', more)
            process = subprocess.run(command, shell=True, capture_output=True, text=True)
            printed[source[1:]] = text = process.stdout + process.stderr
            print(f'$ {command}\n{text}')                          # pytest -s shows it
            assert process.returncode == ('exercise_0' in source)  # red until it is done
    assert '| sum_scaled ' in printed['python tests/tools/compare.py out/lab --minus=aoe']
    # evaluate.py told of the edited model.py; with the plain one it repeats the last evaluation
    evaluate = 'python tests/tools/evaluate.py out/lab/aoe out/lab/moe'
    assert 'trained with a different model.py' in printed[evaluate]
    loss = f'{read_result("out/lab/aoe-seed7")["val_loss"]:.4f}'
    plain = run_script(*evaluate.split()[1:]).stdout
    assert plain.startswith(f'out/lab/aoe: val loss {loss} mean {loss}\n')
    assert plain != printed[f'{evaluate} --top_k=1']


def test_every_command_plans_three_seeds_of_runs_of_its_own(tmp_path):
    """Also those that train an edited model.py. The names that comparisons need are among them."""
    block, = re.findall('```python\n(.*?)```', PAGE, re.S)
    (tmp_path / 'mine.py').write_text(block)
    names = []
    for command in re.findall('^    python train.py (config/lab/lab.py.*)$', PAGE, re.M):
        from_line, files = parse(TrainConfig, command.split(), '')
        files = [os.path.join(tmp_path if file == 'mine.py' else ROOT, file) for file in files]
        runs = plan_runs(read_config_files(TrainConfig, files), from_line)
        assert {run.seed for run in runs} == {7, 8, 9}
        names += [run.name for run in runs]
    assert len(names) == 3 * len(set(names)) > 40
    for effect in re.findall('--effect="(.+)"', PAGE):
        assert {*re.findall(r'\w+', effect)} <= {*names}


def test_every_edit_fits_model_py_and_trains():
    edits = 0
    for exercise in re.split('^## |git checkout model.py', PAGE, flags=re.M)[1:]:
        edited = read_text(os.path.join(ROOT, 'model.py'))
        diffs = re.findall(r'```diff\n(.*?)```', exercise, re.S)
        for old, new in map(notebook.old_and_new, diffs):
            assert edited.count(old) == 1, old
            edited, edits = edited.replace(old, new), edits + 1
        module = sys.modules['edited'] = types.ModuleType('edited')        # for dataclasses
        exec(edited, module.__dict__)
        model = module.GPT(module.GPTConfig(vocab_size=8, n_layer=1, n_embd=32, n_head=2))
        tokens = torch.arange(16).view(2, 8) % 8
        loss = model(tokens, tokens)[1]
        loss.backward()
        assert loss.isfinite()
    assert edits == 7


# numbers, told as 'aoe 1.808' and 'aoe minus moe +0.014 ± 0.016'

LOSSES = {}                              # run -> seed -> its lowest loss
for result in map(json.loads, read_text(os.path.join(LAB, 'lab.jsonl')).splitlines()):
    LOSSES.setdefault(result['run'], {})[result['seed']] = result['lowest_val_loss']
RUN = '|'.join(sorted(LOSSES, key=len, reverse=True))


def test_losses_in_the_answers_are_those_of_the_results():
    text = ' '.join(ANSWERS.split())
    told = re.findall(rf'\b({RUN}) (1\.\d{{3}})\b', text)
    for name, loss in told:
        assert loss == f'{statistics.mean(LOSSES[name].values()):.3f}', name
    differences = re.findall(rf'\b({RUN}) minus ({RUN}) ([+-]0\.\d+ ± 0\.\d+)', text)
    for name, other, difference in differences:
        mean, half = interval([LOSSES[name][seed] - LOSSES[other][seed] for seed in (7, 8, 9)])
        assert difference == f'{mean:+.3f} ± {half:.3f}', (name, other)
    assert len(told) + len(differences) > 12
