"""
Write the lab's notebook: the core of config/lab/README.md, cell by cell.

    python tests/tools/notebook.py

Commands, edits of model.py and config files become cells to run. Pictures and pages of out/lab are
shown below the paragraph that names them. The output of a comparison is what it prints for our
results, config/lab/lab.jsonl.
"""

import contextlib
import io
import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import compare
from configurator import UserError, read_text, write_text

LAB = os.path.join(ROOT, 'config', 'lab')
# of the page: a block of code, commands, or a paragraph
BLOCK = re.compile(r'```(?P<language>\w+)\n(?P<code>(?s:.*?))```\n|(?P<commands>(?:^    .+\n)+)|'
                   r'(?P<text>(?:^(?!```|    ).+\n)+)', re.M)
BEFORE = """\
Made by `python tests/tools/notebook.py` from config/lab/README.md. The next cell clones the
repository, unless it lies in a clone: put the address of yours in the place of OWNER. On a slow
machine make MORE '--seeds=7'. The outputs of comparisons are ours, of three seeds, and folded away:
make your prediction first."""
SETUP = """\
REPO = 'https://github.com/OWNER/nanoAoE'
MORE = ''                                                 # is added to commands that train

import html, os, sys
from IPython.display import HTML, Image

if os.path.exists('../../train.py'):                      # it is opened where it lies
    os.chdir('../..')
if not os.path.exists('train.py'):
    !git clone {REPO} nanoaoe
    os.chdir('nanoaoe')
# !python is the one that runs this
os.environ['PATH'] = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']

def show(path):
    if path.endswith('.png'):
        return Image(path)
    page = html.escape(open(path, encoding='utf-8').read())
    return HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700"></iframe></div>')

def edit(old, new):
    code = open('model.py', encoding='utf-8').read()
    assert code.count(old) == 1, 'take the last edit back: !git checkout model.py'
    open('model.py', 'w', encoding='utf-8').write(code.replace(old, new))
"""


def old_and_new(diff):
    """What the lines of a diff were, and what they become."""
    return (re.sub(r'^\+.*\n|^.', '', diff, flags=re.M), re.sub(r'^-.*\n|^.', '', diff, flags=re.M))


def cells_of(page):
    """The cells of a page, as (kind, source)."""
    for block in BLOCK.finditer(page):
        if block['language'] == 'diff':
            old, new = old_and_new(block['code'])
            yield 'code', f"edit('''{old}''', '''{new}''')"
        elif block['code']:              # the page calls a config file mine.py
            yield 'code', f'%%writefile mine.py\n{block["code"]}'
        elif block['commands']:
            for command in block['commands'].splitlines():
                more = ' {MORE}' if 'train.py' in command else ''
                yield 'code', f'!{command.strip()}{more}'
        else:
            yield 'markdown', block['text']
            for shown in re.findall(r'`(out/lab/\S+\.(?:png|html))`', block['text']):
                yield 'code', f"show('{shown}')"


def outputs_of(source):
    """What a cell prints for our results if it compares named runs that they have."""
    command = re.fullmatch('!python tests/tools/compare.py out/lab --effect="(.+)"', source)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(UserError):
        if command:
            compare.main([os.path.join(LAB, 'lab.jsonl'), f'--effect={command[1]}'])
    text = printed.getvalue().splitlines(keepends=True)
    return [{'output_type': 'stream', 'name': 'stdout', 'text': text}] if text else []


def notebook():
    """The notebook as text: how to start, and the core."""
    start, core, _ = read_text(os.path.join(LAB, 'README.md')).split('\n# ')
    start = start.partition('\n## ')[0]                            # without exercise 0
    cells = []
    for kind, source in [('markdown', BEFORE), ('code', SETUP), *cells_of(f'{start}\n# {core}')]:
        cell = {'cell_type': kind, 'id': f'cell-{len(cells)}', 'metadata': {},
                'source': source.strip().splitlines(keepends=True)}
        if kind == 'code':
            cell |= {'execution_count': None, 'outputs': outputs_of(source)}
            cell['metadata'] = {'jupyter': {'outputs_hidden': bool(cell['outputs'])}}
        cells.append(cell)
    return json.dumps({'cells': cells, 'metadata': {'language_info': {'name': 'python'}},
                       'nbformat': 4, 'nbformat_minor': 5}, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    write_text(os.path.join(LAB, 'lab.ipynb'), notebook())
