"""configurator.py: types, files, errors and help, on a dataclass of its own."""

from dataclasses import dataclass
from typing import Literal

import pytest

from configurator import UserError, parse, print_help, read_config_file


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


def write(folder, text):
    path = folder / 'config.py'
    path.write_text(text, encoding='utf-8')
    return str(path)


def test_a_file_of_literals_and_arithmetic(tmp_path):
    path = write(tmp_path, '''"""A docstring."""
width = 2 * (8 + 4)      # a comment
rate = width / 5 - 1
text = 'x # y'
seeds = [1, 2]
runs = {'a': {'width': width // 7}, 'b': {'rate': -1e-3}}
''')
    assert read_config_file(Config, path) == {
        'width': 24, 'rate': 3.8, 'text': 'x # y', 'seeds': (1, 2),
        'runs': {'a': {'width': 3}, 'b': {'rate': -0.001}}}


@pytest.mark.parametrize('text, says', (
    ('wdth = 3', 'line 1: wdth: no such key; did you mean width?'),
    ('width = 3\nrate = "x"', "line 2: rate: expected float or None, got 'x'"),
    ('import os', "line 1: expected key = value, got 'import os'"),
    ('width = __import__("os").system("touch harm")', 'line 1: expected a literal'),
    ('width = height', 'line 1: expected a literal'),
    ('text = "a" * 999999999', "expected a number, got 'a'"),
    ('width = 1 // 0', 'line 1: expected a literal'),
    ('width = 9 ** 9', 'line 1: expected a literal'),
    ('width += 1', "expected key = value, got 'width += 1'"),
    ('width =', 'expected lines of key = value'),
    ('for width in [3]:\n  pass', "expected key = value, got 'for width in [3]:'"),
))
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read_config_file(Config, write(tmp_path, text))
    line = str(error.value)
    assert says in line and '\n' not in line and 'config.py' in line


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / 'binary.py').write_bytes(b'\xff\xfe\x00')
    for path in ('absent.py', 'binary.py', '.'):
        with pytest.raises(UserError, match='^expected a config file .*, got '):
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
