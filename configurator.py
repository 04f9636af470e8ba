"""
What the scripts share: errors, keys, files, and what is fast on this machine.

    python train.py config/shakespeare.py --max_iters=500 --learning_rate=1e-3

Each script has a dataclass of its keys, with their types and defaults; the comment behind a key is
its help. A config file replaces defaults, and the command line replaces both. A config file is
Python, and it is run, so use only files that you trust. It assigns keys; names that begin with _
are its own.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import os
import re
import runpy
import sys
import typing

import torch

# torchrun starts WORLD_SIZE processes of train.py and numbers them: RANK 0, RANK 1, ...
RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


# -----------------------------------------------------------------------------
# errors

class UserError(ValueError):
    """A mistake that the user can correct. One line says what was expected, and what to do."""


def run(main):
    """Call main with the arguments of the command line. A UserError ends the program with its line
    and status 2, Ctrl-C with 130, and a closed pipe, as after `| head`, quietly with 141."""
    # print each line at once, even into a pipe, and print ? where a terminal lacks a character
    sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, 'w')     # Python flushes it at exit, so give it a working one
        sys.exit(141)


def expect(config, keys, expected, fits):
    """Raise a UserError for the first key whose value is not None and fails fits(value). `keys` is
    a name or a tuple of names, and `expected` describes a good value."""
    for key in (keys,) if isinstance(keys, str) else keys:
        value = getattr(config, key)
        if value is not None and not fits(value):
            raise UserError(f'{key}: expected {expected}, got {value!r}')


@contextlib.contextmanager
def expecting(what):
    """A context in which any error becomes a UserError that begins with `what`. It is meant for
    files and devices, which can fail in more ways than one can list."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{what}; got {error!r:.90}') from None


# -----------------------------------------------------------------------------
# keys

def typed(cls, key, value, where='--'):
    """Convert a value to the type that its key has in the dataclass cls.

        type of the key      value     is returned as
        int                  '3'       3
        float                1         1.0
        float | None         'None'    None
        str                  '3'       '3'
        tuple                '1,2'     (1, 2)
        tuple                [1, 2]    (1, 2)
        tuple                5         (5,)
        Literal['a', 'b']    'a'       'a'

    In a str whose key ends with _dir, ~ becomes the user's home folder. A value that can't be
    converted, such as '3.5' or True for an int, raises a UserError. `where` says where the key is
    written, and the message begins with it."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in types:
        near = difflib.get_close_matches(str(key), types, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        if where.endswith('.py: '):
            hint += " (a config file's own names begin with _)"
        raise UserError(f'{where}{key}: no such key; {hint}')
    # int gives (int,), int | None gives (int, NoneType), Literal['a', 'b'] gives ('a', 'b')
    allowed = typing.get_args(types[key]) or (types[key],)

    # 1. Read a text as Python, unless the key may be a text.
    if type(value) is str and (str not in allowed or (value == 'None' and type(None) in allowed)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError):
            value = ast.literal_eval(value)
    # 2. Convert a value of another type that means the same.
    if type(value) is str and key.endswith('_dir'):
        value = os.path.expanduser(value)                # ~ is the user's home folder
    if type(value) is int and float in allowed:
        with contextlib.suppress(OverflowError):         # it has 309 digits or more
            value = float(value)
    if type(value) in (int, list, range) and tuple in allowed:
        value = (value,) if type(value) is int else tuple(value)
    # 3. Check it.
    if type(value) in allowed or (type(value) is str and value in allowed):
        return value
    expected = ' or '.join(getattr(option, '__name__', option) for option in allowed)
    raise UserError(f'{where}{key}: expected {expected.replace("NoneType", "None")}, '
                    f'got {value!r:.200}')


def parse(cls, arguments, usage):
    """Split the arguments into a dict of those that are --key=value, each of the type of its key in
    cls, and a list of the others. --help prints the usage and the keys, and exits."""
    if '-h' in arguments or '--help' in arguments:
        print_help(cls, usage)
        sys.exit(0)
    given, others = {}, []
    for argument in arguments:
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('-'):
            others.append(argument)
        elif argument.startswith('--') and equals:
            given[key] = typed(cls, key, text)
        else:
            raise UserError(f'expected --key=value, got {argument!r}; --help lists the keys')
    return given, others


def print_help(cls, usage):
    """Print the usage, then two kinds of lines from the source of cls and its parents: keys, such
    as `    n_layer: int = 4   # number of blocks`, and headings, such as `    # model`."""
    print(usage.strip() + '\n\nKeys and their defaults. Change them with --key=value:\n')
    for parent in reversed(cls.__mro__[:-1]):            # the last one is `object`
        print(*re.findall(r'^    ((?:# |\w+: ).+)', inspect.getsource(parent), re.M), sep='\n')


def read_config_files(cls, paths):
    """Run config files. Returns a dict of the keys that they assign, each of the type that it has
    in cls. Later files win. A mistake in their Python raises what Python raises."""
    keys = {}
    for path in paths:
        if not (path.endswith('.py') and os.path.isfile(path)):
            raise UserError('expected --key=value, or a config file such as config/quick_start.py, '
                            f'got {path!r}; there is no such .py file')
        keys |= {key: typed(cls, key, value, f'{path}: ')
                 for key, value in runpy.run_path(path).items() if not key.startswith('_')}
    return keys


def is_run_name(name):
    """Whether a run can have this name. It becomes the name of a folder, which excludes /, a cell
    of a table, which excludes |, a label, whose notes begin with (, and a line in a picture, where
    $ and a first _ are special."""
    return isinstance(name, str) and bool(re.fullmatch(r'[^\W_][\w .,=+%-]*', name))


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """A context that gives the name of a file to write. When it ends, this file replaces the one at
    path. After an error the old file stays as it was."""
    part = f'{path}.{os.getpid()}.part'                  # no other process writes to this one
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:             # a RuntimeError is torch.save's
        raise UserError(f'{path}: expected to write it, got {error!r:.90}; what was there is '
                        'untouched. Is the disk full? Make room and try again') from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path, text):
    with replacing(path) as part, open(part, 'w', encoding='utf-8') as file:
        file.write(text)


def read_text(path):
    """The text in a file. Bytes that are not UTF-8 become \ufffd."""
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def hash_of(code):
    """Eight digits of the sha256 of Python code. Comments and docstrings don't count."""
    tree = ast.parse(code)                               # holds no comments
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ''                        # it was a docstring
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


# -----------------------------------------------------------------------------
# the machine

def choose_device(name):
    """The torch.device of this name. 'auto' takes the fastest one, and under torchrun each process
    takes a GPU of its own. Raises a UserError if the device doesn't work."""
    if name == 'auto':
        # attention on mps is wrong before PyTorch 2.14 (its issues 174861 and 195910);
        # torch.__version__ compares as a version, so 2.9 is before 2.14
        mps = torch.backends.mps.is_available() and torch.__version__ >= '2.14'
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    with expecting(f'device: expected auto or a device of this machine, not {name!r}'):
        if name == 'cuda' and WORLD_SIZE > 1:
            name = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(name)
        torch.empty(1, device=name)
    return torch.device(name)


def usable_cores():
    """The number of cores that this process may use, which `taskset` or Slurm may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def fast_dtype(device):
    """The name of the dtype in which matrices are multiplied fast on this device."""
    if device.type == 'cuda':            # T4 and V100 are fast in float16, but not in bfloat16
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    # most CPUs are slow in bfloat16; Linux tells which ones have instructions for it
    cpuinfo = '/proc/cpuinfo'
    if device.type == 'cpu' and os.path.exists(cpuinfo) and 'avx512_bf16' in read_text(cpuinfo):
        return 'bfloat16'
    return 'float32'


def keep_freed_memory():
    """Let glibc, if there is one, keep large blocks that are freed. Otherwise the kernel gets them
    back, and clearing them again for each step takes a quarter of the step's time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt              # the numbers are from glibc's malloc.h
        mallopt(-4, 0)                                   # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)                           # M_TRIM_THRESHOLD
        mallopt(-2, 64 * 2**20)                          # M_TOP_PAD
