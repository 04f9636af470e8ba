"""
What the scripts share, in three parts: keys and errors, files, the machine.

    python train.py config/shakespeare.py --max_iters=500 --learning_rate=1e-3

A dataclass says which keys a script has, of which type, with which default; the comment behind a
field is its help. Later wins: default, config file, command line. A config file is Python and is
run, so start only those that you trust. What it assigns are keys, except for names that begin
with _:

    _width = 64
    n_embd = 4 * _width
    runs = {f'aoe {d}': {'d_low': d} for d in (8, 16, 32)}
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import os
import platform
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
    for stream in filter(None, (sys.stdout, sys.stderr)):          # None: closed, as by >&-
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
    """Read command-line arguments against the dataclass cls. Returns (given, paths): the values
    given as --key=value, by key, each of its field's type; and the other arguments. --help prints
    usage and keys, and exits. Raises UserError for an unknown key or a wrong type."""
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
    """Print the usage, then the lines of cls that define keys, `    key: type = default  # help`,
    and the comments between them, which are headings."""
    print(usage.strip() + '\n\nKeys, with what they are by default; on the line as --key=value:\n')
    for parent in reversed(cls.__mro__[:-1]):
        print(*re.findall(r'^    ((?:# |\w+: ).+)', inspect.getsource(parent), re.M), sep='\n')


def typed(cls, key, value, where='--', note=''):
    """value as the type of key's field. A text is read as Python, unless the field is a text:

        int                  '3' -> 3              '3.5', 'x' and True are refused
        float | None         '1' or 1 -> 1.0       'None' -> None
        str                  '3' -> '3'            in a key that ends with _dir: '~' -> your home
        tuple                '1,2' -> (1, 2)       5 -> (5,); range(2) -> (0, 1)
        Literal['a', 'b']    'a' -> 'a'            'c' is refused

    Raises UserError; its text has `where` before the key, and `note` after an unknown one."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        raise UserError(f'{where}{key}: no such key; {hint}{note}')
    # int gives (int,), int | None gives (int, NoneType), a Literal its values
    options = typing.get_args(known[key]) or (known[key],)
    # a text such as '3' stays one where the field is a text; 'None' is None where it may be
    is_text = str in options and not (value == 'None' and type(None) in options)
    if type(value) is str and not is_text:
        text = value.strip()
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
        if type(value) is dict:
            refuse_a_key_twice(text, f'{where}{key}')
    if type(value) is str and key.endswith('_dir'):
        value = os.path.expanduser(value)
    if type(value) is int and float in options and abs(value) < 2**1000:   # larger: no float
        value = float(value)
    if type(value) in (int, list, range) and tuple in options:
        value = (value,) if type(value) is int else tuple(value)
    if type(value) in options or (type(value) is str and value in options):
        return value
    names = ' or '.join(getattr(option, '__name__', str(option)) for option in options)
    expected = names.replace('NoneType', 'None')
    raise UserError(f'{where}{key}: expected {expected}, got {value!r:.200}')


def refuse_a_key_twice(code, where):
    """Raise UserError where Python code has a {...} with a key twice. Python keeps the last without
    a word, and one of `runs` would be lost."""
    for node in ast.walk(ast.parse(code)):
        keys = [key.value for key in getattr(node, 'keys', ()) if isinstance(key, ast.Constant)]
        if len(set(keys)) < len(keys):
            raise UserError(f'{where}: expected each key once, got {keys}')


def read_config_file(cls, path):
    """Run a config file, which is Python. Returns what it assigned by key, each of its field's
    type; names that begin with _ are its own. Raises UserError; a mistake in its code raises what
    Python raises."""
    if not (path.endswith('.py') and os.path.isfile(path)):
        raise UserError('expected a config file such as config/quick_start.py, or --key=value, '
                        f'got {path!r}: there is no such .py file')
    assigned = runpy.run_path(path)
    with open(path, 'rb') as file:
        refuse_a_key_twice(file.read(), path)
    return {key: typed(cls, key, value, f'{path}: ', " (a config file's own names begin with _)")
            for key, value in assigned.items() if not key.startswith('_')}


def expect(config, keys, expected, fits):
    """Raise UserError for the first of keys, a name or a tuple of names, whose value is there (not
    None) and does not fit: fits(value) says so, and `expected` what would."""
    for key in (keys,) if isinstance(keys, str) else keys:
        value = getattr(config, key)
        if value is not None and not fits(value):
            raise UserError(f'{key}: expected {expected}, got {value!r}')


def is_folder_name(name):
    """Whether a folder can be made that is called so and lies in the folder where it is made."""
    return name.isprintable() and name not in ('', '.', '..') and os.path.basename(name) == name


# -----------------------------------------------------------------------------
# files

@contextlib.contextmanager
def replacing(path):
    """As a context, gives the name of a file to write, which then takes the place of path: whole,
    or not at all. (The process id in it keeps two writers apart.) Raises UserError."""
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
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError, KeyError) as error:  # it is not there
        raise UserError(f'device: expected auto or one of this machine, got {name!r}: '
                        f'{str(error).splitlines()[0]:.80}') from None
    return device


def processor_name(device):
    """What computes. It is part of a run's recipe: with equal settings and seed, runs end some
    0.006 nats per token apart on two kinds of CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = dict(re.findall(r'^([^\t\n]+)\t*: (.+)', cpu_info(), re.M))
    name = info.get('model name', platform.processor())
    kind = f' ({info.get("cpu family", "?")}/{info.get("model", "?")})' if info else ''
    return f'{name}{kind} {torch.backends.cpu.get_cpu_capability()}'


def cpu_info():
    """What Linux says of the CPU; elsewhere nothing."""
    return read_text('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else ''


def usable_cores():
    """How many cores this process may use; `taskset` may have allowed it fewer than there are."""
    if hasattr(os, 'sched_getaffinity'):                           # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def fast_dtype(device):
    """The name of the dtype of matmuls that auto stands for."""
    if device.type == 'cuda':            # T4 and V100 are fast in float16 alone
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16' if native else 'float16'
    # a CPU without instructions for bfloat16 is slow in it
    return 'bfloat16' if device.type == 'cpu' and 'avx512_bf16' in cpu_info() else 'float32'


def keep_freed_memory():
    """Let glibc, where there is one, keep large freed blocks. It would return them to the kernel,
    which clears them page by page when the next step asks again: a quarter of its time. (To be
    taken on trust.)"""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4           # from glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
