"""README.md: every command in it runs, every link leads to what it says."""

import os
import re
import shlex
import shutil

import pytest

from conftest import ROOT, run_script

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
    README = file.read()

# What is added to a command, so that it ends soon.
SHORT = {
    'train.py': ['--max_iters=1', '--eval_iters=1', '--batch_size=2', '--n_layer=2', '--threads=1'],
    'sample.py': ['--max_new_tokens=20'],
    'tests/bench.py': ['--rounds=1', '--warmup=1', '--shapes=small'],
}


def commands():
    """The commands of the README that start a script, in its order, each once."""
    found = re.findall(r'^ {4,}(.+)$|`([^`]+)`', README, flags=re.M)
    parts = [' '.join(part.split()) for indented, inline in found for part in (indented or inline).split('&&')]
    return [part for part in dict.fromkeys(parts) if re.match(r'(python|torchrun) .*\.py', part)]


def test_every_command_runs_shortened(tmp_path, code_text):
    """In their order, in one folder, since some go on from what others made."""
    shutil.copytree(os.path.join(ROOT, 'config'), tmp_path / 'config')
    shapes = tmp_path / 'config/paper_shapes.py'                               # whose runs say themselves how long they are
    shapes.write_text(re.sub("'max_iters': [0-9]+, ", '', shapes.read_text(encoding='utf-8')), encoding='utf-8')
    (tmp_path / 'my.txt').write_text(code_text, encoding='utf-8', newline='')
    ran = set()
    for command in commands():
        program, *arguments = shlex.split(command)
        if 'openwebtext' in arguments:                                        # needs datasets: the slow test below
            continue
        script = next(argument for argument in arguments if argument.endswith('.py'))
        arguments = arguments[arguments.index(script) + 1:] + SHORT.get(script, [])
        if script == 'train.py' and re.search('paper|lab|seeds', command):
            arguments += ['--seeds=1,2' if 'lab' in command else '--seeds=1']
        if program == 'torchrun':
            arguments += ['--dataset=shakespeare_gpt2', '--n_embd=48', '--n_head=2', '--d_ffn=64', '--d_low=16', '--block_size=16',
                          '--gradient_accumulation_steps=2']
        process = run_script(script, *arguments, cwd=tmp_path, check=False, processes=2 if program == 'torchrun' else 1)
        assert process.returncode == 0, f'{command}\n{process.stderr}'
        ran.add(script)
    assert ran == {'train.py', 'sample.py', 'prepare_data.py', 'tests/bench.py', 'tests/test_toy.py'}


@pytest.mark.slow
def test_the_command_for_openwebtext_runs_on_a_parquet_folder(tmp_path):
    import datasets
    datasets.Dataset.from_dict({'text': ['one', 'two', 'three']}).to_parquet(tmp_path / 'rows/train-0.parquet')
    command, = (command for command in commands() if 'openwebtext ' in command)
    run_script(*shlex.split(command)[1:], '--hub=rows', cwd=tmp_path)
    assert (tmp_path / 'data/openwebtext_gpt2/train.bin').exists()


@pytest.mark.parametrize('label, file, line', re.findall(r'\[([^]]+)\]\((\w+\.py)#L(\d+)\)', README))
def test_equations_stand_where_the_links_lead(label, file, line):
    with open(os.path.join(ROOT, file), encoding='utf-8') as code:
        there = [number for number, text in enumerate(code, 1) if re.search(rf'{label}\b', text)]
    assert int(line) in there, f'{label} is on the lines {there} of {file}: mend the link'


def test_links_and_pictures_are_there():
    headings = {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in re.findall('^#+ (.+)$', README, flags=re.M)}
    for target in re.findall(r'\]\(([^)]+)\)', README):
        if target.startswith('#'):
            assert target[1:] in headings, target
        elif not target.startswith('http'):
            assert os.path.exists(os.path.join(ROOT, target.partition('#')[0])), target
