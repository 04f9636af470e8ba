"""
Write the lab's notebook: the core of config/lab/README.md, cell by cell.

    python tests/tools/notebook.py
    python tests/tools/notebook.py --to=slow_machine.ipynb --more=--seeds=7

Commands and edits of model.py become cells to run; pictures and pages of out/lab are shown below
the paragraph that names them. --more is added to each command that trains.
"""

import json
import os
import re
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from configurator import UserError, parse, read_text, run, write_text

LAB = os.path.join(ROOT, 'config', 'lab')
# of the page: an edit, commands, an answer that is folded away, or a paragraph
BLOCK = re.compile(r'```diff\n(?P<edit>(?s:.*?))```\n|(?P<commands>(?:^    .+\n)+)|'
                   r'(?P<text><details>(?s:.*?)</details>\n|(?:^(?!```|    ).+\n)+)', re.M)
BEFORE = """\
Made by `python tests/tools/notebook.py` from config/lab/README.md. The next cell clones the
repository, unless it lies in a clone: put the address of yours in the place of OWNER. Where
training is too slow, let somebody run the first commands and `python -m tarfile -c lab.tar.gz
out/lab`, and make CHECKPOINTS the address of that archive: 'file:///content/lab.tar.gz', say."""
REPO = 'https://github.com/OWNER/nanoAoE'
SETUP = f"REPO = '{REPO}'\n" """\
CHECKPOINTS = None

import html, os, shutil, sys, urllib.request
from IPython.display import HTML, Image

if os.path.exists('../../train.py'):                      # it is opened where it lies
    os.chdir('../..')
if not os.path.exists('train.py'):
    !git clone {REPO} nanoaoe
    os.chdir('nanoaoe')
if CHECKPOINTS:
    shutil.unpack_archive(urllib.request.urlretrieve(CHECKPOINTS)[0], format='gztar')
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


@dataclass
class NotebookConfig:
    """The keys of this script."""
    to: str = os.path.join(LAB, 'lab.ipynb')   # the notebook to write
    more: str = ''                       # added to each command that trains


def old_and_new(diff):
    """What the lines of a diff were, and what they become."""
    return (re.sub(r'^\+.*\n|^.', '', diff, flags=re.M), re.sub(r'^-.*\n|^.', '', diff, flags=re.M))


def cells_of(page, more):
    """The cells of a page, as (kind, source)."""
    for block in BLOCK.finditer(page):
        if block['edit']:
            old, new = old_and_new(block['edit'])
            yield 'code', f"edit('''{old}''', '''{new}''')"
        elif block['commands']:
            commands = re.sub('^    ', '!', block['commands'], flags=re.M)
            yield 'code', re.sub(r'(train\.py .+)', rf'\1 {more}' if more else r'\1', commands)
        else:
            yield 'markdown', block['text']
            for shown in re.findall(r'`(out/lab/\S+\.(?:png|html))`', block['text']):
                yield 'code', f"show('{shown}')"


def notebook(more=''):
    """The notebook as text: how to start, and the core."""
    start, core, _ = read_text(os.path.join(LAB, 'README.md')).split('\n# ')
    start = start.partition('\n## ')[0]                            # without exercise 0
    pieces = [('markdown', BEFORE), ('code', SETUP)]
    for kind, source in cells_of(f'{start}\n# {core}', more):
        before, text = pieces[-1]
        if 'code' in (kind, before) or source[0] in '#<>' or text[0] == '>':
            pieces.append((kind, source))
        else:                            # paragraphs share a cell
            pieces[-1] = kind, f'{text}\n{source}'
    more_of = {'markdown': {}, 'code': {'execution_count': None, 'outputs': []}}
    cells = [{'cell_type': kind, 'id': f'cell-{i}', 'metadata': {}, **more_of[kind],
              'source': source.strip().splitlines(keepends=True)}
             for i, (kind, source) in enumerate(pieces)]
    return json.dumps({'cells': cells, 'metadata': {'language_info': {'name': 'python'}},
                       'nbformat': 4, 'nbformat_minor': 5}, indent=1) + '\n'


def main(arguments):
    values, rest = parse(NotebookConfig, arguments, __doc__)
    if rest:
        raise UserError(f'expected --key=value, got {rest[0]!r}')
    config = NotebookConfig(**values)
    write_text(config.to, notebook(config.more))


if __name__ == '__main__':
    run(main)
