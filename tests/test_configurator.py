"""configurator.py: types, files, errors and help, on a dataclass of its own."""

import dataclasses
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import configurator
from configurator import (UserError, expect, is_folder_name, parse, print_help, read_config_file,
                          read_text, replacing, write_text)
from train import TrainConfig


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
    mode: Literal['auto', 'on'] = 'auto'          # one of two
    seeds: tuple | None = None                    # several numbers
    runs: dict | None = None                      # several variants


@pytest.mark.parametrize('argument, value', (
    ('--width=3', 3), ('--width= 3 ', 3), ('--rate=1', 1.0), ('--rate=1e-3', 0.001),
    ('--rate=-2', -2.0), ('--rate=None', None), ('--text=b=c', 'b=c'), ('--text=3', '3'),
    ('--text=', ''), ('--text=None', 'None'), ('--flag=True', True), ('--mode=auto', 'auto'),
    ('--seeds=1,2', (1, 2)), ('--seeds=5', (5,)), ('--seeds=[1]', (1,)),
    ("--runs={'a': {}, 'b': {'a': 1}}", {'a': {}, 'b': {'a': 1}}), ('--out_dir=None', None),
))
def test_a_value_gets_the_type_of_its_key(argument, value):
    values, rest = parse(Config, [argument, 'other'], '')
    got, = values.values()
    assert got == value and type(got) is type(value) and rest == ['other']


@pytest.mark.parametrize('argument, line', (
    ('--wdth=3', '--wdth: no such key; did you mean width?'),
    ('--width=3.5', '--width: expected int, got 3.5'),
    ('--width=wide', "--width: expected int, got 'wide'"),
    ('--width=True', '--width: expected int, got True'),
    ('--width=' + 5000 * '(', f"--width: expected int, got '{199 * '('}"),
    ('--rate=fast', "--rate: expected float or None, got 'fast'"),
    ('--rate=nan', "--rate: expected float or None, got 'nan'"),
    ('--rate=1' + 400 * '0', f'--rate: expected float or None, got 1{199 * "0"}'),
    ('--flag=1', '--flag: expected bool, got 1'),
    ('-width=3', "expected --key=value, got '-width=3'; --help lists the keys"),
    ('--width=__import__("os")', "--width: expected int, got '__import__(\"os\")'"),
    ("--runs={'a': {}, 'b': {}, 'a': {}}", "--runs: expected each key once, got ['a', 'b', 'a']"),
    ("--runs={'a': {'b': 1, 'b': 2}}", "--runs: expected each key once, got ['b', 'b']"),
))
def test_a_mistake_on_the_command_line_gets_one_line(argument, line):
    with pytest.raises(UserError) as error:
        parse(Config, [argument], '')
    assert str(error.value) == line


def test_home_may_be_written_as_a_tilde_in_paths_alone(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')                  # of Windows
    values, _ = parse(Config, ['--out_dir=~/out', '--text=~'], '')
    assert values == {'out_dir': '/home/me/out', 'text': '~'}


@pytest.mark.parametrize('keys', ('width', ('width',), ['width', 'rate'], ('rate', 'width')))
def test_expect_takes_one_name_or_several_and_passes_over_none(keys):
    expect(Config(), keys, 'less than 9', lambda n: n < 9)         # rate is None
    with pytest.raises(UserError, match='^width: expected less than 8, got 8$'):
        expect(Config(), keys, 'less than 8', lambda n: n < 8)


def test_the_name_of_a_folder():
    assert is_folder_name('a b.c') and is_folder_name('_')
    assert not any(map(is_folder_name, ('', '.', '..', 'a/b', '/a', 'a/', '\n', '\0', '\udcff')))


def test_a_config_file_is_python(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('''\ufeff"""A docstring."""
import math as _math
width = 2 * (8 + 4)      # a comment
rate = _math.sqrt(width + 1)
seeds = range(1, 3)
runs = {}
for _width in (3, 4):
    runs[f'a {_width}'] = {'width': _width}
width = 25
''', encoding='utf-8')
    assert read_config_file(Config, str(path)) == {
        'width': 25, 'rate': 5.0, 'seeds': (1, 2),
        'runs': {'a 3': {'width': 3}, 'a 4': {'width': 4}}}


@pytest.mark.parametrize('text, says', (
    ('wdth = 3', "config.py: wdth: no such key; did you mean width? (a config file's own names"),
    ('import os', "config.py: os: no such key; --help lists the keys (a config file's own names"),
    ('rate = "x"', "config.py: rate: expected float or None, got 'x'"),
    ('width = int', "config.py: width: expected int, got <class 'int'>"),
    ("runs = {'a': {},\n'b': {}, 'a': {}}", "expected each key once, got ['a', 'b', 'a']")))
def test_a_key_that_is_wrong_in_a_file_gets_one_line(tmp_path, text, says):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(UserError) as error:
        read_config_file(Config, str(tmp_path / 'config.py'))
    assert says in str(error.value) and '\n' not in str(error.value)


def test_what_is_no_config_file_is_refused_and_what_fails_in_one_says_where(tmp_path):
    (tmp_path / 'text.txt').write_text('width = 1')
    (tmp_path / 'folder.py').mkdir()
    for path in ('absent.py', 'text.txt', 'folder.py', '.'):
        with pytest.raises(UserError, match='^expected a config file .*: there is no such .py'):
            read_config_file(Config, str(tmp_path / path))
    (tmp_path / 'wrong.py').write_text('width = height')
    with pytest.raises(NameError, match='height'):                 # Python's, with its traceback
        read_config_file(Config, str(tmp_path / 'wrong.py'))


def test_help_lists_every_key_with_type_default_and_comment(capsys):
    print_help(Config, 'usage')
    printed = capsys.readouterr().out
    assert printed.startswith('usage\n')
    for line in ('# base', 'width: int = 8                                # how wide', '# more',
                 "mode: Literal['auto', 'on'] = 'auto'          # one of two"):
        assert f'\n{line}\n' in printed
    assert printed.index('rate: ') < printed.index('text: ') and 'child' not in printed
    print_help(TrainConfig, 'usage')                               # each of its keys has a comment
    keys = re.findall(r'^(\w+): .+ = .+  # .+', capsys.readouterr().out, re.M)
    assert keys == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize('act, code, line', (
    (UserError('a mistake'), 2, 'error: a mistake\n'), (KeyboardInterrupt, 130, 'interrupted\n'),
    (BrokenPipeError, 141, ''), (RuntimeError('shapes'), None, '')))
def test_how_a_script_ends(monkeypatch, capsys, act, code, line):
    def main(arguments):
        assert arguments == ['a', 'b']
        raise act
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'argv', ['script', 'a', 'b'])
    with pytest.raises(SystemExit if code else RuntimeError) as end:       # a bug: its traceback
        configurator.run(main)
    signal.signal(signal.SIGINT, before)
    assert getattr(end.value, 'code', None) == code and capsys.readouterr().err == line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    write_text(path, 'before')
    for error, told in ((OSError('disk full\nsecond line'), UserError), (OSError(), UserError),
                        (RuntimeError('of torch.save'), UserError),
                        (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(told) as raised, replacing(path) as part, open(part, 'w') as file:
            file.write('half')
            raise error
        assert '\n' not in str(raised.value)
        assert read_text(path) == 'before' and os.listdir(tmp_path) == ['file']
    with pytest.raises(UserError, match='file: expected to write it, got ".*No such file'):
        write_text(tmp_path / 'absent' / 'file', 'text')
    write_text(path, 'after')
    assert read_text(path) == 'after' and os.listdir(tmp_path) == ['file']


def test_a_file_that_is_no_text_is_read_all_the_same(tmp_path):
    (tmp_path / 'file').write_bytes(b'a\xffb')
    assert read_text(tmp_path / 'file') == 'a\ufffdb'
