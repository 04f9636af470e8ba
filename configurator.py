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
import math
import os
import re
import signal
import sys
import textwrap
import traceback
import types
import typing


class UserError(ValueError):
    """A mistake that the user can mend, in one line: what was expected, what came, what to do."""


def run(main):
    """Call main(arguments of the command line). What a user can mend ends the program with one line
    and exit status 2: a UserError, too little memory, no room for the output. Ctrl-C ends it with
    130; that nobody reads its output any more, as after `| head`, with 141 and no line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)       # as scripts import, it is off
    sys.stdout = sys.stdout or open(os.devnull, 'w')     # None: closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):              # a terminal may lack a character; a line
        stream.reconfigure(errors='replace', line_buffering=True)  # is written, or fails, at once
    try:
        main(sys.argv[1:])
    except UserError as error:
        end(f'error: {error}', 2)
    except KeyboardInterrupt:
        end('interrupted', 130)
    except (MemoryError, RuntimeError) as error:         # PyTorch's are RuntimeErrors
        if not re.search('MemoryError|out of memory|allocate memory', repr(error)):
            raise
        end(f'error: expected enough memory, got {error!r:.100}; try a smaller --batch_size', 2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        sys.stdout = None                # or Python would flush it once more
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
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('-'):
            rest.append(argument)
        elif argument.startswith('--') and equals:
            values[key] = check_type(cls, key, text)
        else:
            raise UserError(f'expected --key=value, got {argument!r}; --help lists the keys')
    return values, rest


def expect(config, keys, expected, fits):
    """Raise UserError for the first of keys, a name or a tuple of names, whose value is there (not
    None) and does not fit: fits(value) says so, and `expected` what would."""
    for key in (keys,) if isinstance(keys, str) else keys:
        value = getattr(config, key)
        if value is not None and not fits(value):
            raise UserError(f'{key}: expected {expected}, got {value!r}')


def is_folder_name(name):
    """Whether a folder can be made that is called so and lies in the folder where it is made."""
    return (isinstance(name, str) and name not in ('', '.', '..')
            and os.path.basename(name) == name)


def check_type(cls, key, value, where='--', note=''):
    """value as the type of key's field. A text is read as Python, unless the field is a text:

        int                  '3' -> 3              '3.5', 'x' and True are refused
        float | None         '1' or 1 -> 1.0       'None' -> None; '1e999' is refused: infinite
        str                  '3' -> '3'            in a key that ends with _dir: '~' -> your home
        tuple                '1,2' -> (1, 2)       5 -> (5,); range(2) -> (0, 1)
        Literal['a', True]   'True' -> True        'b' and 1 are refused

    Raises UserError; in its text `where` precedes the key, `note` ends that for an unknown key."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        raise UserError(f'{where}{key}: no such key; {hint}{note}')
    options = typing.get_args(known[key]) or (known[key],)
    is_text = str in options and not (value == 'None' and types.NoneType in options)
    if type(value) is str and not is_text:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if type(value) is str and key.endswith('_dir'):
        value = os.path.expanduser(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f'{where}{key}: expected a finite number, got {value}')
    if type(value) is int and value.bit_length() > 10_000:         # Python won't print it
        raise UserError(f'{where}{key}: expected a smaller number, got one of thousands of digits')
    for option in options:               # types, or of a Literal the values
        if isinstance(option, type):
            fits = type(value) is option
        else:
            fits = repr(value) == repr(option)
        if fits:
            return value
        if option is float and type(value) is int and abs(value) < 1e308:
            return float(value)
        if option is tuple and type(value) in (int, list, range):
            return (value,) if type(value) is int else tuple(value)
    raise UserError(f'{where}{key}: expected {type_name(known[key])}, got {value!r}')


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
    names, folder = {'__file__': path}, os.getcwd()
    try:
        with open(path, 'rb') as file:
            tree = ast.parse(file.read())
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', None) or 1     # of a SyntaxError
        got = textwrap.shorten(f'{type(error).__name__}: {error}', 100)
        raise UserError(f'{path}, line {line}: expected it to run, got {got}') from None
    finally:
        os.chdir(folder)                 # the other paths are meant from here
    # Of two equal keys in {...} Python keeps the last without a word: one of `runs` would be lost.
    for node in ast.walk(tree):
        keys = [key.value for key in getattr(node, 'keys', ()) if isinstance(key, ast.Constant)]
        if len(set(keys)) < len(keys):
            raise UserError(f'{path}, line {node.lineno}: expected each key once, got {keys}')
    note = " (a config file's own names begin with _)"
    return {key: check_type(cls, key, value, f'{path}: ', note) for key, value in names.items()
            if not key.startswith('_')}


def print_help(cls, usage):
    """The usage; then each key with default, type and comment, and the headings between them, as
    they stand in the source of cls and its parents. A key's comment needs two spaces before #; a
    line that is a comment, indented as the keys are, is a heading."""
    print(usage.strip())
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for parent in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            if heading := re.fullmatch('    # (.+)', line):
                print(f'\n{heading[1]}:')
            elif field := re.fullmatch(r'    (\w+): .+?  # (.+)', line):
                key, comment = field.groups()
                default = str(fields[key].default).replace('\n', r'\n')
                print(f'  --{key}={default}  ({type_name(fields[key].type)})')
                print(f'      {comment}')


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
    except (OSError, RuntimeError) as error:             # RuntimeError: of torch.save
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
    """The text of a file, '' where there is none; bytes that are not UTF-8 become \ufffd."""
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()
