"""
What the scripts share, in three parts: keys and errors, files, the machine.

    python train.py config/shakespeare.py --max_iters=500 --learning_rate=1e-3

A dataclass says which keys a script has, of which type, with which default; the comment behind a
field is its help. Later wins: default, config file, command line. A config file is Python and is
run, so start only those that you trust. It assigns keys; names that begin with _ are its own.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
import runpy
import sys
import typing

import torch

# torchrun starts WORLD_SIZE processes of train.py, each with a RANK from 0 on
RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


# -----------------------------------------------------------------------------
# keys and errors

class UserError(ValueError):
    """A mistake that the user can mend, in one line: what was expected, what came, what to do."""


def run(main):
    """Call main(arguments of the command line). A UserError ends the program with its one line and
    exit status 2, Ctrl-C with 130. Where nobody reads its output any more it ends quietly: 141."""
    for stream in filter(None, (sys.stdout, sys.stderr)):          # None was closed, as by >&-
        stream.reconfigure(errors='replace', line_buffering=True)  # a terminal may lack a character
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                              # as in `python train.py --help | head`
        sys.stdout = open(os.devnull, 'w')               # Python flushes it once more at the end
        sys.exit(141)


def parse(cls, arguments, usage):
    """Returns the values given as --key=value, by key, each of the type of its field in cls, and
    the other arguments. --help prints usage and keys, and exits. Raises UserError."""
    if '-h' in arguments or '--help' in arguments:
        print_help(cls, usage)
        sys.exit(0)
    given, paths = {}, []
    for argument in arguments:
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('-'):
            paths.append(argument)
        elif argument.startswith('--') and equals:
            given[key] = typed(cls, key, text)
        else:
            raise UserError(f'expected --key=value, got {argument!r}; --help lists the keys')
    return given, paths


def print_help(cls, usage):
    """Print the usage, then the lines of cls and its parents that define a key or are a heading, as
    `    n_layer: int = 4   # number of blocks` and `    # model` do."""
    print(usage.strip() + '\n\nKeys, with what they are by default; on the line as --key=value:\n')
    for parent in reversed(cls.__mro__[:-1]):            # the last is `object`
        for line in re.findall(r'^    ((?:# |\w+: ).+)', inspect.getsource(parent), re.M):
            line = re.sub(' +# ', '   # ', line)
            print(line if len(line) <= 80 else line.replace('   # ', '\n    # '))


def typed(cls, key, value, where='--'):
    """value as the type of key's field. A text is read as Python, unless the field is a text:

        int                  '3' -> 3              '3.5', 'x' and True are refused
        float | None         '1' or 1 -> 1.0       'None' -> None
        str                  '3' -> '3'            in a key that ends with _dir: '~' -> your home
        tuple                '1,2' -> (1, 2)       5 -> (5,); range(2) -> (0, 1)
        Literal['a', 'b']    'a' -> 'a'            'c' is refused

    Raises UserError; its text has `where` before the key."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in types:
        near = difflib.get_close_matches(str(key), types, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        if str(value).endswith('.py'):
            hint = f'a config file stands alone: python train.py {value}'
        raise UserError(f'{where}{key}: no such key; {hint}')
    # int gives (int,), int | None gives (int, NoneType), Literal['a', 'b'] gives ('a', 'b')
    allowed = typing.get_args(types[key]) or (types[key],)
    if type(value) is str:
        value = from_text(value, allowed)
    if type(value) is str and key.endswith('_dir'):
        value = os.path.expanduser(value)
    if type(value) is int and float in allowed:
        value = float(value)
    if type(value) in (int, list, range) and tuple in allowed:
        value = (value,) if type(value) is int else tuple(value)
    if type(value) in allowed or (type(value) is str and value in allowed):
        return value
    names = (getattr(option, '__name__', option) for option in allowed)
    expected = ' or '.join(names).replace('NoneType', 'None')
    raise UserError(f'{where}{key}: expected {expected}, got {value!r:.200}')


def from_text(text, allowed):
    """The text as it is where a text is allowed; else what it is in Python, if it is Python."""
    if str in allowed and not (text == 'None' and type(None) in allowed):
        return text
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text.strip())
    return text


def read_config_files(cls, paths):
    """Run config files, which are Python. Returns what they assigned, by key, each value of its
    field's type; a later file wins. Raises UserError, and for a mistake in a file what Python does.
    """
    keys = {}
    for path in paths:
        if not (path.endswith('.py') and os.path.isfile(path)):
            raise UserError('expected a config file such as config/quick_start.py, or --key=value, '
                            f'got {path!r}: there is no such .py file')
        keys |= {key: typed(cls, key, value, f'{path}: ')
                 for key, value in runpy.run_path(path).items() if not key.startswith('_')}
    return keys


def is_run_name(name):
    """Whether a run can be called so. Its name is that of a folder in out_dir; of a row in tables,
    where | ends a cell and (...) says what differs; and of a line in matplotlib's legend, where $
    begins mathematics and a first _ hides it."""
    return (isinstance(name, str) and re.fullmatch(r'(?!_)\w[\w .,=+%-]*', name) is not None
            and not name.endswith((' ', '.', '.jsonl', '.png')))


def expect(config, keys, expected, fits):
    """Raise UserError for the first of keys, a name or a tuple of names, whose value is there (not
    None) and does not fit: fits(value) says so, and `expected` what would."""
    for key in (keys,) if isinstance(keys, str) else keys:
        value = getattr(config, key)
        if value is not None and not fits(value):
            raise UserError(f'{key}: expected {expected}, got {value!r}')


@contextlib.contextmanager
def expecting(what):
    """As a context, turns whatever goes wrong in it into a UserError that begins with `what`: for
    files, which can be missing, damaged or foreign in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{what}; got {error!r:.90}') from None


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """As a context, gives the name of a file to write, which then takes the place of path: whole,
    or not at all. (Runs side by side draw one picture: the process id keeps them apart.)"""
    part = f'{path}.{os.getpid()}.part'
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:             # torch.save raises RuntimeError
        got = str(error).partition('\n')[0]
        raise UserError(f'{path}: expected to write it, got "{got}"; what was there is untouched. '
                        'Is the disk full? Make room and try again') from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path, text):
    with replacing(path) as part, open(part, 'w', encoding='utf-8') as file:
        file.write(text)


def read_text(path):
    """The text of a file; bytes that are not UTF-8 become \ufffd. Raises OSError."""
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def hash_of(code):
    """Eight digits of the sha256 of Python code; comments and docstrings don't count."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ''                                  # a docstring
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


# -----------------------------------------------------------------------------
# the machine: what `auto` means here

def choose_device(name):
    """A torch.device that is there; 'auto' takes the fastest. Under torchrun it is this process's
    own GPU, which becomes the current one. Raises UserError."""
    if name == 'auto':
        version = tuple(int(part) for part in torch.__version__.split('.')[:2])
        # attention on mps is wrong before 2.14: PyTorch issues 174861, 195910
        mps = torch.backends.mps.is_available() and version >= (2, 14)
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        if name == 'cuda' and WORLD_SIZE > 1:
            name = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(name)
        if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', name):
            raise RuntimeError('known are cuda, cuda:1, mps, cpu')
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, AttributeError, KeyError) as error:  # it is not there
        raise UserError(f'device: expected auto or one of this machine, got {name!r}: '
                        f'{str(error).splitlines()[0]:.80}') from None
    return torch.device(name)


def cpu_info():
    """What Linux says of the CPU; elsewhere nothing."""
    return read_text('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else ''


def usable_cores():
    """How many cores this process may use; `taskset` may have allowed it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def fast_dtype(device):
    """The name of the dtype of matmuls that auto stands for."""
    if device.type == 'cuda':            # T4 and V100 are fast in float16 alone
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    # a CPU without instructions for bfloat16 is slow in it
    return 'bfloat16' if device.type == 'cpu' and 'avx512_bf16' in cpu_info() else 'float32'


def keep_freed_memory():
    """Let glibc, where there is one, keep large freed blocks. It would return them to the kernel,
    which clears them page by page when the next step asks again: a quarter of its time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt              # take its numbers on trust: malloc.h's
        mallopt(-4, 0)                                   # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)                           # M_TRIM_THRESHOLD
        mallopt(-2, 64 * 2**20)                          # M_TOP_PAD
