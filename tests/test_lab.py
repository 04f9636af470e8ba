"""
The lab of config/lab/README.md: its edits fit model.py, and its notebook is its core.

    python tests/test_lab.py

writes config/lab/lab.ipynb, the core of the exercises cell by cell and what we measured:
text as it stands, commands to be run, edits of model.py as an edit, and the pictures
that a text names.
"""

import json
import os
import re
import sys
import types

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import parse, read_config_file, read_text, write_text
from train import TrainConfig, plan_runs

NOTEBOOK = os.path.join(ROOT, 'config', 'lab.ipynb')
# an edit, or commands
BLOCK = re.compile(r'```diff\n(.*?)```\n|((?:^    [^\n]+\n)+)', re.S | re.M)


def exercises():
    return read_text(os.path.join(ROOT, 'config', 'EXERCISES.md'))


def old_and_new(diff):
    """What the lines of a diff were, and what they become."""
    lines = diff.splitlines(keepends=True)
    return (''.join(line[1:] for line in lines if line[0] != '+'),
            ''.join(line[1:] for line in lines if line[0] != '-'))


def cells_of(text):
    """The cells of a piece of the page, as (kind, source)."""
    end = 0
    for block in BLOCK.finditer(text):
        yield 'markdown', text[end:block.start()]
        end = block.end()
        if block[1]:
            old, new = old_and_new(block[1])
            yield 'code', (f"old = '''{old}'''\nnew = '''{new}'''\ncode = open('model.py').read()\n"
                           "assert old in code and new not in code, 'take the last edit back'\n"
                           "open('model.py', 'w').write(code.replace(old, new))")
        else:
            yield 'code', re.sub('^    ', '!', block[2], flags=re.M)
    yield 'markdown', text[end:]


def notebook():
    """config/lab/lab.ipynb, as text: how to start, and the core."""
    _, core, measured, _ = exercises().split('\n# ')
    assert core.startswith('The core')
    pieces = [
        ('markdown', 'Made from EXERCISES.md by `python tests/test_lab.py`; it runs in a clone of '
         'the repository.'),
        ('code', "import os\nfrom IPython.display import Image, display\n"
         "os.chdir('..' if os.path.basename(os.getcwd()) == 'config' else '.')"),
        ('code', '!pip install -q -r requirements.txt\n!python prepare_data.py shakespeare\n'
         '!python train.py config/lab/lab.py')]
    for kind, source in [*cells_of('# ' + core), ('markdown', '# ' + measured)]:
        pieces.append((kind, source))
        for picture in re.findall(r'(\w+\.png)`', source) if kind == 'markdown' else ():
            pieces.append(('code', f"display(Image('out/lab/{picture}'))"))
    cells = []
    for i, (kind, source) in enumerate((kind, source.strip()) for kind, source in pieces):
        cell = {'cell_type': kind, 'id': f'cell-{i}', 'metadata': {},
                'source': source.splitlines(keepends=True)}
        cells += [cell | ({'execution_count': None, 'outputs': []} if kind == 'code' else {})
                  ] * bool(source)
    return json.dumps({'cells': cells, 'metadata': {'language_info': {'name': 'python'}},
                       'nbformat': 4, 'nbformat_minor': 5}, indent=1) + '\n'


def main(arguments):
    if arguments:
        return print(__doc__.strip())
    write_text(NOTEBOOK, notebook())


def test_the_notebook_is_the_core():
    assert read_text(NOTEBOOK) == notebook()
    sources = [''.join(cell['source']) for cell in json.loads(notebook())['cells']]
    assert sum(source.startswith('!python train.py') for source in sources) >= 5
    assert sum('assert old in code' in source for source in sources) == 3
    assert sum('display(Image' in source for source in sources) >= 2


def test_every_command_of_the_lab_plans_three_seeds_of_a_run_of_its_own():
    lab = read_config_file(TrainConfig, os.path.join(ROOT, 'config', 'lab.py'))
    commands = re.findall('^    python train.py config/lab/lab.py (.*--name=.*)$', exercises(), re.M)
    names = set()
    for command in commands:
        values, _ = parse(TrainConfig, command.split(), '')
        runs = plan_runs(lab, values)
        assert len(runs) == 3
        names.add(runs[0].name)
    assert len(names) == len(commands) > 10


def test_every_edit_fits_model_py_and_trains():
    code, edits = read_text(os.path.join(ROOT, 'model.py')), 0
    for exercise in re.split('^## |git checkout model.py', exercises(), flags=re.M)[1:]:
        edited = code
        for diff in re.findall(r'```diff\n(.*?)```', exercise, flags=re.S):
            old, new = old_and_new(diff)
            assert edited.count(old) == 1, old
            edited = edited.replace(old, new)
            edits += 1
        module = sys.modules['edited'] = types.ModuleType('edited')        # for dataclasses
        exec(edited, module.__dict__)
        model = module.GPT(module.GPTConfig(mlp='aoe', factorised='virtual' not in exercise,
                                            vocab_size=8, n_layer=1, n_embd=32, n_head=2))
        tokens = torch.arange(16).view(2, 8) % 8
        _, loss, _ = model(tokens, tokens)
        loss.backward()
        assert loss.isfinite()
    assert edits >= 8


if __name__ == '__main__':
    configurator.run(main)
