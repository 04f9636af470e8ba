"""configurator.py: types, files, errors and help, on a dataclass of its own."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

import configurator
from configurator import (UserError, expect, is_folder_name, parse, print_help, read_config_file,
                          read_text, replacing, write_text)
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
    ('--rate=1e400', '--rate: expected a finite number, got inf'),
    ('--rate=-1e400', '--rate: expected a finite number, got -inf'),
    ('--rate=nan', "--rate: expected float or None, got 'nan'"),
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
    values, rest = parse(Config, ['--out_dir=~/out', '--text=~'], '')
    assert values == {'out_dir': '/home/me/out', 'text': '~'} and rest == []
    assert parse(Config, ['--out_dir=None'], '') == ({'out_dir': None}, [])


@pytest.mark.parametrize('keys', ('width', ('width',), ['width', 'rate'], ('rate', 'width')))
def test_expect_takes_one_name_or_several_and_passes_over_none(keys):
    expect(Config(), keys, 'less than 9', lambda n: n < 9)         # rate is None
    with pytest.raises(ValueError, match='^width: expected less than 8, got 8$') as error:
        expect(Config(), keys, 'less than 8', lambda n: n < 8)
    assert type(error.value) is UserError


def test_the_name_of_a_folder():
    assert is_folder_name('a b.c') and is_folder_name('_')
    assert not any(map(is_folder_name, ('', '.', '..', 'a/b', '/a', 'a/', 1, None)))


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
    ('width = 1\nraise SystemExit', 'line 2: expected it to run, got SystemExit:'),
    ('rate = 1e400', 'config.py: rate: expected a finite number, got inf'),
    ("rate = float('nan')", 'config.py: rate: expected a finite number, got nan'),
    ("width = 1\nruns = {'a': {},\n'b': {}, 'a': {'width': 2}}",
     "config.py, line 2: expected each key once, got ['a', 'b', 'a']"),
))
def test_a_mistake_in_a_file_gets_one_line(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read_config_file(Config, write(tmp_path, text))
    line = str(error.value)
    assert says in line and '\n' not in line and 'config.py' in line and 'line None' not in line
    assert len(line) < len(str(tmp_path)) + 250


@pytest.mark.parametrize('last', ('', '\n1 / 0'))
def test_a_config_file_that_goes_elsewhere_leaves_us_here(tmp_path, monkeypatch, last):
    monkeypatch.chdir(tmp_path)
    os.mkdir('elsewhere')
    write(tmp_path, 'import os as _os\n_os.chdir("elsewhere")\nwidth = 3' + last)
    try:
        assert read_config_file(Config, 'config.py') == {'width': 3} and not last
    except UserError as error:
        assert last and 'line 4: expected it to run, got ZeroDivisionError' in str(error)
    assert os.getcwd() == str(tmp_path)


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


def raises(error):
    def main(_):
        raise error
    return main


@pytest.mark.parametrize('main', (
    raises(MemoryError()), lambda _: bytearray(2**62), lambda _: np.ones(2**58),
    lambda _: torch.ones(2**58),
    raises(torch.OutOfMemoryError('CUDA out of memory. Tried to\nallocate')),
))
def test_too_little_memory_is_told_in_one_line(refuse, main):
    line = refuse(main)
    assert line.startswith('error: expected enough memory, got ')
    assert line.endswith('; try a smaller --batch_size')


@pytest.mark.parametrize('error', (RuntimeError('shapes'), FileNotFoundError('absent'),
                                   ValueError('too many values to unpack')))
def test_what_no_user_can_mend_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        configurator.run(raises(error))


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def main(_):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(sys, 'argv', ['script'])
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)          # as scripts do while they import
    try:
        with pytest.raises(SystemExit) as exit:
            configurator.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.value.code == 130 and capsys.readouterr().err == 'interrupted\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has it')
@pytest.mark.parametrize('text', ('few', 'many' * 10**6))
def test_no_room_for_the_output_is_told_in_one_line(refuse, monkeypatch, text):
    def main(_):
        monkeypatch.setattr(sys, 'stdout', open('/dev/full', 'w'))
        sys.stdout.reconfigure(line_buffering=True)                # as run's is
        print(text)
    line = refuse(main)
    assert line == (f'error: expected room for the output, got "{os.strerror(errno.ENOSPC)}"; '
                    'make some')


def test_streams_that_are_closed_are_no_error(monkeypatch):
    said = []

    def main(_):
        print('few')
        print('few', file=sys.stderr)
        said.append('all')
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, None)             # as Python has it after >&- and 2>&-
    configurator.run(main)
    assert said == ['all']
    with pytest.raises(SystemExit) as exit:
        configurator.run(raises(UserError('a mistake')))
    assert exit.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has it')
@pytest.mark.parametrize('redirected, status, told', (
    ('>&-', 0, ''), ('2>&-', 0, ''), ('>&- 2>&-', 0, ''), ('| true', 141, ''),
    ('>/dev/full', 2, 'error: expected room for the output, got "No space left on device"'),
))
@pytest.mark.parametrize('many', (1, 10**5))
def test_streams_of_a_process(redirected, status, told, many):
    script = ('import configurator, time\ndef main(_):\n    time.sleep(0.5)\n'
              f'    for i in range({many}): print("line", i)\nconfigurator.run(main)')
    command = f"'{sys.executable}' -c '{script}' {redirected}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(['bash', '-c', command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.returncode == status and process.stderr.startswith(told)
    assert len(process.stderr.splitlines()) == bool(told)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    write_text(path, 'before')
    for error in (OSError('disk full\nsecond line'), OSError(), RuntimeError('of torch.save')):
        with pytest.raises(UserError, match='file: expected to write it, got "') as told:
            with replacing(path) as part, open(part, 'w') as file:
                file.write('half')
                raise error
        assert '\n' not in str(told.value)
        assert read_text(path) == 'before' and os.listdir(tmp_path) == ['file']
    with pytest.raises(KeyboardInterrupt), replacing(path) as part, open(part, 'w') as file:
        raise KeyboardInterrupt
    assert read_text(path) == 'before' and os.listdir(tmp_path) == ['file']
    with pytest.raises(UserError, match='No such file or directory'):
        write_text(tmp_path / 'absent' / 'file', 'text')
    write_text(path, 'after')
    assert read_text(path) == 'after' and os.listdir(tmp_path) == ['file']


def test_a_file_that_is_no_text_is_read_all_the_same(tmp_path):
    (tmp_path / 'file').write_bytes(b'a\xffb')
    assert read_text(tmp_path / 'file') == 'a\ufffdb' and read_text(tmp_path / 'none') == ''
