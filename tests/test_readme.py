"""README.md and all pages of config/: every command in them runs, every link leads somewhere, and
what they quote is what the code says."""

import ast
import glob
import importlib
import os
import re
import shlex
import shutil
import sys
import textwrap

import pytest
import torch

import train
from configurator import parse, read_config_file, read_text
from conftest import ROOT, SMALL, run_here, run_script

PAGES = ['README.md', *sorted(os.path.relpath(path, ROOT) for path in
                              glob.glob(f'{ROOT}/config/**/*.md', recursive=True))]
TOOLS = sorted(os.path.basename(path) for path in glob.glob(f'{ROOT}/tests/tools/*.py'))


def text_of(page):
    return read_text(os.path.join(ROOT, page))


# What is added to a command, so that it ends soon.
SHORT = {
    'train.py': ['--max_iters=1', '--eval_iters=1', '--batch_size=2', '--n_layer=3', '--threads=1',
                 '--jobs=1', '--dtype=float32'],
    'sample.py': ['--max_new_tokens=20', '--layer=2'],
    'tests/tools/bench.py': ['--rounds=1', '--warmup=1', '--shapes=small', '--threads=1'],
}
TINY = ['--dataset=shakespeare_gpt2', '--n_embd=48', '--n_head=2', '--d_ffn=64', '--d_low=16',
        '--block_size=16', '--gradient_accumulation_steps=2']


def commands(pages=PAGES):
    """The commands of the pages that start a script, in their order, each once."""
    found = [match for page in pages                     # what is inline may go on in the next line
             for match in re.findall(r'^ {4,}(.+)$|`([^`\n]+(?:\n[^`\n]+)?)`', text_of(page), re.M)]
    parts = [part for indented, inline in found
             for part in re.split('&&|; (?!print)', indented or inline)]
    parts = [' '.join(part.split()) for part in parts]
    parts = [re.sub(r'--seeds=\S+', '--seeds=1', part) for part in parts]      # one is enough here
    parts = [part for part in parts if '-m pytest' not in part]    # this is it
    return [part for part in dict.fromkeys(parts) if re.match(r'(python|torchrun) .*\.py', part)]


@pytest.mark.slow
def test_every_command_runs_shortened(tmp_path, code_text):
    """In their order, in one folder, since some go on from what others made. What is the same when
    shortened runs once. Of experiments that differ in their file alone one runs, and test_train.py
    plans the others."""
    shutil.copytree(os.path.join(ROOT, 'config'), tmp_path / 'config')
    shutil.copy(os.path.join(ROOT, 'README.md'), tmp_path)         # its numbers are written anew
    (tmp_path / 'my.txt').write_text(code_text, encoding='utf-8', newline='')
    (tmp_path / 'mine.py').write_text(own_experiment())
    ran, seen = set(), set()
    for command in commands():
        if '$(' in command:                              # what a shell makes of it, two files of it
            library = os.path.dirname(os.__file__)
            command = f'python prepare_data.py {library}/ast.py {library}/os.py --name=code'
        if 'prepare_data.py tinyshakespeare' in command:           # its server isn't always reached
            command = 'python prepare_data.py my.txt --name=tinyshakespeare'
        program, *arguments = shlex.split(command)
        if 'openwebtext' in arguments or '--compile=True' in arguments:      # the slow tests below
            continue
        if 'config/small.py config/' in command and 'config/paper/table2.py' not in command:
            continue
        if 'config/lab/lab.py' in command and '--name=' in command:    # many alike: test_lab.py
            continue
        if command == 'python tests/tools/bench.py':
            continue                                     # its parts have commands of their own
        if '--only=fake' in arguments and not hasattr(torch.nn.functional, 'grouped_mm'):
            continue                                     # as the page says
        script = next(argument for argument in arguments if argument.endswith('.py'))
        arguments = arguments[arguments.index(script) + 1:] + SHORT.get(script, [])
        if script == 'train.py':
            arguments += ['--init_from=auto'] * ('eval_only' not in command)
            if re.search('paper|lab', command) and '--seeds' not in command:
                # a page goes on with out/lab/aoe-7
                arguments += ['--seeds=7' if 'lab' in command else '--seeds=1']
        if 'pilot' in script:
            arguments = [folder for folder in arguments if list(tmp_path.glob(folder))]
        arguments = list({argument.partition('=')[0]: argument for argument in arguments}.values())
        if (script, *sorted(arguments)) in seen:         # the last of a key's values counts
            continue
        seen.add((script, *sorted(arguments)))
        processes = 2 if program == 'torchrun' else 1
        alone = [argument for argument in arguments if argument.startswith('config/')]
        if script == 'train.py' and alone == ['config/openwebtext.py']:
            run_script('prepare_data.py', 'shakespeare', '--tokenizer=gpt2', cwd=tmp_path)
            arguments += TINY
        process = run_script(script, *arguments, cwd=tmp_path, check=False, processes=processes)
        red = 'exercise_0' in script                     # until it is done
        assert process.returncode == red, f'{command}\n{process.stderr}'
        ran.add(os.path.basename(script))
    assert ran == {'train.py', 'sample.py', 'prepare_data.py', *TOOLS} - {'notebook.py'}


@pytest.mark.parametrize('tool', TOOLS)
def test_what_the_pages_start_needs_no_pytest(tool):
    assert not re.search('^ *(import|from) pytest', text_of(f'tests/tools/{tool}'), flags=re.M)


@pytest.mark.slow
def test_the_command_for_openwebtext_runs_on_a_parquet_folder(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'text': ['one', 'two', 'three']})
    rows.to_parquet(tmp_path / 'rows/train-0.parquet')
    command, = (command for command in commands() if 'openwebtext ' in command)
    run_script(*shlex.split(command)[1:], '--hub=rows', cwd=tmp_path)
    assert (tmp_path / 'data/openwebtext_gpt2/train.bin').exists()


@pytest.mark.slow
def test_the_command_that_compiles_runs(tmp_path):
    command, = (command for command in commands() if '--compile=True' in command)
    run_script(*shlex.split(command)[1:], *SHORT['tests/tools/bench.py'], cwd=tmp_path)


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall('^#+ (.+)$', text_of(page), flags=re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_and_pictures_are_there(page):
    prose = re.sub('```.*?```', '', text_of(page), flags=re.S)
    for target in re.findall(r'(?:\]\(|src(?:set)?=")([^)"]+)[)"]', prose):
        if target.startswith('http'):
            continue
        file, _, anchor = target.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
        assert os.path.exists(os.path.join(ROOT, path)), target
        assert not anchor or anchor in anchors(path), target


def test_pictures_are_small_and_used():
    pictures = glob.glob(f'{ROOT}/config/**/*.png', recursive=True)
    text = ''.join(map(text_of, PAGES))
    for path in pictures:
        assert os.path.getsize(path) < 100_000 and os.path.basename(path) in text, path


def fenced(page, language):
    """The blocks of code in a page, without their indentation."""
    blocks = re.findall(rf'^( *)```{language}\n(.*?)^\1```$', text_of(page), flags=re.S | re.M)
    return [textwrap.dedent(block) for _, block in blocks]


def own_experiment():
    """mine.py, as config/README.md has it."""
    block, = (block for block in fenced('config/README.md', 'python') if 'out_dir' in block)
    return block


@pytest.mark.parametrize('page', PAGES)
def test_every_fence_stands_alone_and_python_in_it_compiles(page):
    for line in text_of(page).splitlines():
        if '```' in line:                # a re-wrapped block has code behind its fence
            assert re.fullmatch(r' *```(python|sh|text|diff)?', line), line
    assert text_of(page).count('```') % 2 == 0
    for block in fenced(page, 'python'):
        ast.parse(block)


@pytest.mark.parametrize('page', PAGES)
def test_every_command_has_keys_of_its_script(page, monkeypatch):
    """Against the dataclass of each script's keys, from which --help is printed."""
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'tests', 'tools'))
    for command in commands([page]):
        program, *arguments = shlex.split(command, comments=True)
        script = next(argument for argument in arguments if argument.endswith('.py'))
        module = importlib.import_module(os.path.basename(script)[:-3])
        configs = [value for name, value in vars(module).items() if name.endswith('Config')
                   and value.__module__ == module.__name__]
        keys = [argument for argument in arguments if argument.startswith('--')
                and not argument.startswith(('--nproc', '--standalone', '--help'))]
        assert configs or not keys, command
        for config in configs:
            parse(config, keys, '')


@pytest.mark.slow
def test_the_experiment_of_ones_own_is_what_the_page_says(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (workspace / 'mine.py').write_text(own_experiment())
    quick = read_config_file(train.TrainConfig, os.path.join(ROOT, 'config/quick_start.py'))
    runs = train.plan_runs(quick | read_config_file(train.TrainConfig, 'mine.py'), {})
    assert [run.folder for run in runs[:3]] == [f'out/mine/{name}-1'
                                                for name in ('moe', 'aoe 16', 'aoe 64')]
    assert len(runs) == 9 and {run.dataset for run in runs} == {'prose_and_code'}
    shared = {'--seeds=1,2', '--d_ffn=128', '--n_embd=64'}         # d_low of 64 fits
    printed = run_here(train.main, 'mine.py', *[key for key in SMALL if not any(
        key.startswith(other.partition('=')[0] + '=') for other in shared)], *shared).stdout
    assert '| aoe 16 |' in printed and 'minus moe' in printed


def test_the_idea_of_the_readme_is_one_line_and_takes_effect(monkeypatch):
    excerpt, idea = (block for block in fenced('README.md', 'python')[::-1])
    for line in excerpt.splitlines():
        assert line.partition('#')[0].strip() in text_of('model.py'), line
    line, = re.findall(r'^        p = norm\(C.*\n', text_of('model.py'), re.M)
    changed = text_of('model.py').replace(line, textwrap.indent(idea, '        '))
    module = type(sys)('changed')
    monkeypatch.setitem(sys.modules, 'changed', module)
    exec(compile(changed, 'changed', 'exec'), module.__dict__)
    layer = module.AoE(module.GPTConfig(n_embd=16, d_low=8))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(5, 16)
    p = torch.stack([(x @ w_down).abs().sum(1) for w_down in layer.w_down], dim=1)
    assert torch.allclose(layer(x)[1].scores, p, atol=1e-4)


def test_no_line_is_wider_than_100_columns():
    """Tables, links, commands and marks aside."""
    for number, line in enumerate(text_of('README.md').splitlines(), 1):
        if not re.match(r'\||!\[|    |\s+python', line) and '](' not in line and '<!--' not in line:
            assert len(line) <= 100, f'README.md:{number}'
