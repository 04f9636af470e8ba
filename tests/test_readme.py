"""README.md and all pages of config/: every command in them runs, every link leads somewhere, and
what they quote is what the code says."""

import glob
import os
import re
import shlex
import shutil

import pytest
import torch

from configurator import read_text
from conftest import ROOT, run_script

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


def commands():
    """The commands of the pages that start a script, in their order, each once."""
    found = [match for page in PAGES                     # what is inline may go on in the next line
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
        if any('git apply' in text_of(file) for file in arguments if file.endswith('.py')):
            continue                                     # test_rivals.py
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
        if alone == ['config/openwebtext.py']:
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


def test_the_readme_quotes_the_code():
    model = text_of('model.py')
    quotes = re.findall(r'```python\n(.*?)```', text_of('README.md'), flags=re.S)
    for quoted in quotes:
        for line in quoted.splitlines():
            code = line.partition('#')[0].strip()
            assert code in model, line
        assert not quoted.startswith('class') or quoted.strip() in model
    assert quotes


def test_the_map_tells_how_long_the_files_are():
    readme, loop = text_of('README.md'), text_of('train.py').split("\n# a run's files")[0]
    rows = re.findall(r'^\| \[(\w+\.py)\]\(\1\) \| ([\d,]+) \|', readme, re.M)
    assert len(rows) == 5
    for file, lines in rows:
        assert abs(text_of(file).count('\n') - int(lines.replace(',', ''))) <= 10, file
    parts = [part.count('\n') for part in re.split('# Part [123]:', text_of('model.py'))]
    told = [int(n) for n in re.findall(r'(?:part \d|first half) \((\d+)', readme)]
    for lines, expected in zip((parts[0] + parts[1], parts[2], loop.count('\n')), told,
                               strict=True):
        assert abs(lines - expected) <= 10


def test_no_line_is_wider_than_100_columns():
    """Tables, links, commands and marks aside."""
    for number, line in enumerate(text_of('README.md').splitlines(), 1):
        if not re.match(r'\||!\[|    |\s+python', line) and '](' not in line and '<!--' not in line:
            assert len(line) <= 100, f'README.md:{number}'
