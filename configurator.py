"""
What the scripts share: from a dataclass of defaults, config files and --key=value
arguments to one typed configuration; errors in one line; files that are whole.

    python train.py config/shakespeare.py --max_iters=500 --learning_rate=1e-3

The dataclass says which keys exist, of which type, with which default; the comment
behind a field is its help. Later wins: default, config file, command line. A config
file is Python and is run, so start only those that you trust. What it assigns are
keys, except for names that begin with _:

    n_embd = 64 * 4
    runs = {f'aoe {_d}': {'d_low': _d} for _d in (8, 16, 32)}
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import runpy
import sys
import textwrap
import traceback
import types
import typing


class UserError(Exception):
    """A mistake that the user can mend, in one line: what was expected, what came, what to do."""


def run(main):
    """Call main(arguments of the command line). What a user can mend ends the program with one line
    and exit status 2: a UserError, too little memory, no room for the output. Ctrl-C ends it with
    130, and a reader of its output that is gone, as of `| head`, with 141."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')             # a terminal may lack a character
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        end(f'error: {error}', 2)
    except KeyboardInterrupt:
        end('interrupted', 130)
    except (MemoryError, RuntimeError) as error:         # PyTorch's are RuntimeErrors
        got = f'{type(error).__name__}: {error}'
        if not re.search('MemoryError|out of memory|DefaultCPUAllocator', got):
            raise
        end(f'error: expected enough memory, got "{textwrap.shorten(got, 100)}"; try less at once, '
            'such as a smaller --batch_size or --block_size', 2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for the flush at the end
        if error.errno == errno.EPIPE:
            sys.exit(141)
        end(f'error: expected room for the output, got "{error.strerror}"; make some', 2)


def end(line, status):
    print(line, file=sys.stderr)
    sys.exit(status)


def parse(cls, arguments, usage):
    """Read command-line arguments against the dataclass cls.

    Returns (values, rest): the values given as --key=value, by key, each of its field's type;
    and the other arguments, paths. --help prints usage and keys, and exits. Raises UserError for
    an unknown key or a wrong type.
    """
    if '-h' in arguments or '--help' in arguments:
        print_help(cls, usage)
        sys.exit(0)
    values, rest = {}, []
    for argument in arguments:
        if not argument.startswith('-'):
            rest.append(os.path.expanduser(argument))
            continue
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('--') or not equals:
            raise UserError(f'expected --key=value, got {argument!r}; --help lists the keys')
        values[key] = check_type(cls, key, text)
    return values, rest


def build(cls, values):
    """cls(**values), where a ValueError of its checks becomes a UserError."""
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def expect(config, keys, expected, fits):
    """Raise ValueError for the first of keys, names in one text, whose value is there and does
    not fit: fits(value) says so, and `expected` what would."""
    for key in keys.split():
        value = getattr(config, key)
        if value is not None and not fits(value):
            raise ValueError(f'{key}: expected {expected}, got {value!r}')


def is_folder_name(name):
    """Whether a folder can be made that is called so and lies in the folder where it is made."""
    return (isinstance(name, str) and name not in ('', '.', '..')
            and os.path.basename(name) == name)


def check_type(cls, key, value, where='--'):
    """value as the type of key's field: of a text the literal in it, unless a text is expected; an
    int will do for a float or a tuple, and ~ for the home folder in a path. Raises UserError."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        if where.endswith('.py: '):
            hint += " (a config file's own names begin with _)"
        raise UserError(f'{where}{key}: no such key; {hint}')

    expected = known[key]
    options = typing.get_args(expected) or (expected,)
    is_text = str in options and not (value == 'None' and types.NoneType in options)
    if type(value) is str and not is_text:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if type(value) is str and (key == 'input' or key.endswith('_dir')):
        value = os.path.expanduser(value)
    is_literal = typing.get_origin(expected) is typing.Literal
    for option in options:
        same = type(value) is type(option) and value == option
        if type(value) is option or is_literal and same:
            return value
        if option is float and type(value) is int and abs(value) < 1e308:
            return float(value)
        if option is tuple and type(value) in (int, list, range):
            return (value,) if type(value) is int else tuple(value)
    raise UserError(f'{where}{key}: expected {type_name(expected)}, got {value!r}')


def type_name(annotation):
    """An annotation as a reader would say it: 'int or None'."""
    options = typing.get_args(annotation) or (annotation,)
    names = [getattr(option, '__name__', str(option)) for option in options]
    return ' or '.join(names).replace('NoneType', 'None')


def read_config_file(cls, path):
    """Run a config file, which is Python. Returns what it assigned by key, each of its field's
    type; names that begin with _ are its own. Raises UserError, also for any error in it."""
    if not (path.endswith('.py') and os.path.isfile(path)):
        raise UserError('expected a config file such as config/quick_start.py, or --key=value, '
                        f'got {path!r}: there is no such .py file')
    try:
        names = runpy.run_path(path)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', None) or 1     # of a SyntaxError
        got = textwrap.shorten(f'{type(error).__name__}: {error}', 100)
        raise UserError(f'{path}, line {line}: expected it to run, got {got}') from None
    with open(path, 'rb') as file:
        dicts = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Dict)]
    for node in dicts:                   # Python would keep the last of two equal keys
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if len(set(keys)) < len(keys):
            raise UserError(f'{path}, line {node.lineno}: expected each key once, got {keys}')
    return {key: check_type(cls, key, value, f'{path}: ') for key, value in names.items()
            if not key.startswith('_')}


def print_help(cls, usage):
    """The usage; then each key with default, type and comment, and the headings between them, as
    they stand in the source of cls and its parents."""
    print(usage.strip())
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for parent in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            if heading := re.fullmatch('    # (.+)', line):
                print(f'\n{heading[1]}:')
            elif field := re.fullmatch(r'    (\w+): .+?  # (.+)', line):
                key, comment = field.groups()
                print(f'  --{key}={fields[key].default}  ({type_name(fields[key].type)})')
                print(f'      {comment}')


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """As a context, gives the name of a file to write, which then takes the place of path: whole,
    or not at all. The name holds the process: another may write the same. Raises UserError."""
    part = f'{path}.{os.getpid()}.part'
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:             # RuntimeError: of torch.save
        got = str(error).splitlines()[0]
        raise UserError(f'{path}: expected to write it, got "{got}"; what was there is untouched. '
                        'Is the disk full? Make room and try again') from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path, text):
    with replacing(path) as part, open(part, 'w', encoding='utf-8') as file:
        file.write(text)


def read_text(path):
    """The text of a file, '' where there is none; bytes that are not UTF-8 become \ufffd."""
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()
