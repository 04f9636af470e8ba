"""configurator.py: types, files, errors and help, on a dataclass of its own."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from configurator import UserError, parse, print_help, read_config_file, read_text
from conftest import ROOT


@dataclass
class Base:
    """A parent, whose keys come first."""
    # base
    width: int = 8                                # how wide
    rate: float | None = None                     # how fast; None: as it likes


@dataclass
class Config(Base):
    """Its child."""
    # more
    text: str = 'a'                               # some text
    out_dir: str | None = None                    # some folder
    flag: bool = False                            # on or off
    mode: Literal['auto', True, False] = 'auto'   # one of three
    seeds: tuple | None = None                    # several numbers
    runs: dict | None = None                      # several variants


@pytest.mark.parametrize('argument, value', (
    ('--width=3', 3), ('--rate=1', 1.0), ('--rate=1e-3', 0.001), ('--rate=-2', -2.0),
    ('--rate=None', None),
    ('--text=b=c', 'b=c'), ('--text=3', '3'), ('--text=', ''), ('--flag=True', True),
    ('--mode=auto', 'auto'),
    ('--mode=False', False), ('--seeds=1,2', (1, 2)), ('--seeds=5', (5,)),
    ("--runs={'a': {}}", {'a': {}}),
))
def test_a_value_gets_the_type_of_its_key(argument, value):
    values, rest = parse(Config, [argument, 'other'], '')
    got, = values.values()
    assert got == value and type(got) is type(value) and rest == ['other']


@pytest.mark.parametrize('argument, line', (
    ('--wdth=3', '--wdth: no such key; did you mean width?'),
    ('--zzz=3', '--zzz: no such key; --help lists the keys'),
    ('--width=3.5', '--width: expected int, got 3.5'),
    ('--width=wide', "--width: expected int, got 'wide'"),
    ('--width=True', '--width: expected int, got True'),
    ('--width=', "--width: expected int, got ''"),
    ('--rate=fast', "--rate: expected float or None, got 'fast'"),
    ('--rate=1' + 400 * '0', '--rate: expected float or None, got 1' + 400 * '0'),
    ('--flag=1', '--flag: expected bool, got 1'),
    ('--flag=yes', "--flag: expected bool, got 'yes'"),
    ('--mode=1', '--mode: expected auto or True or False, got 1'),
    ('--width', "expected --key=value, got '--width'; --help lists the keys"),
    ('-width=3', "expected --key=value, got '-width=3'; --help lists the keys"),
    ('--width=__import__("os")', "--width: expected int, got '__import__(\"os\")'"),
))
def test_a_mistake_on_the_command_line_gets_one_line(argument, line):
    with pytest.raises(UserError) as error:
        parse(Config, [argument], '')
    assert str(error.value) == line


def test_home_may_be_written_as_a_tilde_in_paths_alone(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')                  # of Windows
    values, rest = parse(Config, ['--out_dir=~/out', '--text=~', '~/a.py'], '')
    assert values == {'out_dir': '/home/me/out', 'text': '~'} and rest == ['/home/me/a.py']
    assert parse(Config, ['--out_dir=None'], '') == ({'out_dir': None}, [])


def write(folder, text):
    path = folder / 'config.py'
    path.write_text(text, encoding='utf-8')
    return str(path)


@pytest.mark.parametrize('mark', ('', '\ufeff'))
def test_a_config_file_is_python(tmp_path, mark):
    path = write(tmp_path, mark + '''"""A docstring."""
import math as _math
width = 2 * (8 + 4)      # a comment
rate = _math.sqrt(width + 1)
text = 'x # y'
seeds = range(1, 3)
runs = {}
for _width in (3, 4):
    runs[f'a {_width}'] = {'width': _width}
width = 25
''')
    assert read_config_file(Config, path) == {
        'width': 25, 'rate': 5.0, 'text': 'x # y', 'seeds': (1, 2),
        'runs': {'a 3': {'width': 3}, 'a 4': {'width': 4}}}


@pytest.mark.parametrize('text, says', (
    ('wdth = 3', "config.py: wdth: no such key; did you mean width? (a config file's own names"),
    ('import os', "config.py: os: no such key; --help lists the keys (a config file's own names"),
    ('rate = "x"', "config.py: rate: expected float or None, got 'x'"),
    ('width = int', "config.py: width: expected int, got <class 'int'>"),
    ('width = 1\nrate = height', "line 2: expected it to run, got NameError: name 'height' is not"),
    ('def _f():\n  1 / 0\n_f()', 'line 2: expected it to run, got ZeroDivisionError: division'),
    ('import json as _j\n_j.loads("")', 'line 2: expected it to run, got JSONDecodeError: '),
    ('open("absent")', 'line 1: expected it to run, got FileNotFoundError: '),
    ('raise ValueError("a\\nb")', 'line 1: expected it to run, got ValueError: a b'),
    ('width = 1\nrate =', 'line 2: expected it to run, got SyntaxError: invalid syntax'),
    ('width = 1\0', 'line 1: expected it to run, got '),
    ("width = 1\nruns = {'a': {},\n'b': {}, 'a': {'width': 2}}",
     "config.py, line 2: expected each key once, got ['a', 'b', 'a']"),
))
def test_a_mistake_in_a_file_gets_one_line(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read_config_file(Config, write(tmp_path, text))
    line = str(error.value)
    assert says in line and '\n' not in line and 'config.py' in line


def test_what_is_no_config_file_is_refused(tmp_path):
    (tmp_path / 'text.txt').write_text('width = 1')
    (tmp_path / 'folder.py').mkdir()
    for path in ('absent.py', 'text.txt', 'folder.py', '.'):
        with pytest.raises(UserError, match='^expected a config file .*: there is no such .py'):
            read_config_file(Config, str(tmp_path / path))


def test_help_lists_every_key_with_type_default_and_comment(capsys):
    print_help(Config, 'usage')
    out = capsys.readouterr().out
    for part in ('usage\n', '\nbase:\n', '--width=8  (int)\n      how wide\n', '\nmore:\n',
                 '--rate=None  (float or None)\n',
                 '--mode=auto  (auto or True or False)\n      one of three',
                 '--runs=None  (dict or None)\n'):
        assert part in out
    assert out.index('--rate') < out.index('--text')


def run_main(body, **streams):
    """A script whose main does body, run on its own. Returns what is finished."""
    script = f'import configurator\ndef main(_):\n    {body}\nconfigurator.run(main)\n'
    return subprocess.run([sys.executable, '-c', script], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True, **streams)


@pytest.mark.parametrize('body', (
    "raise MemoryError",
    "bytearray(2**62)",
    "import numpy; numpy.ones(2**58)",
    "import torch; torch.ones(2**58)",
    "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to\\nallocate')",
))
def test_too_little_memory_is_told_in_one_line(body):
    process = run_main(body)
    line, = process.stderr.splitlines()
    assert process.returncode == 2 and line.startswith('error: expected enough memory, got ')
    assert line.endswith('try less at once, such as a smaller --batch_size or --block_size')


@pytest.mark.parametrize('body', ("raise RuntimeError('shapes')", "open('absent')"))
def test_what_no_user_can_mend_keeps_its_traceback(body):
    process = run_main(body)
    assert process.returncode == 1 and process.stderr.startswith('Traceback')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has it')
@pytest.mark.parametrize('body', ("print('few')", "print('many' * 10**6)"))
def test_no_room_for_the_output_is_told_in_one_line(body):
    with open('/dev/full', 'w') as full:
        process = run_main(body, stdout=full)
    assert (process.returncode, process.stderr) == (
        2, f'error: expected room for the output, got "{os.strerror(errno.ENOSPC)}"; make some\n')


def test_a_file_that_is_no_text_is_read_all_the_same(tmp_path):
    (tmp_path / 'file').write_bytes(b'a\xffb')
    assert read_text(tmp_path / 'file') == 'a\ufffdb' and read_text(tmp_path / 'none') == ''
