"""
What the scripts share: from a dataclass of defaults, a config file and --key=value
arguments to one typed configuration; errors in one line; files that are whole.

    python train.py config/shakespeare.py --max_iters=500 --learning_rate=1e-3

The dataclass says which keys exist, of which type, with which default; the comment
behind a field is its help. Later wins: default, config file, command line. A config
file is a list of assignments, read and never executed:

    n_embd = 64 * 4          # literals, and arithmetic on them and on names assigned above
    lr_decay_iters = max_iters
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import operator
import os
import re
import sys
import textwrap
import types
import typing

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


class UserError(Exception):
    """A mistake that the user can mend, in one line: what was expected, what came, what to do."""


def run(main):
    """Call main(arguments of the command line). A UserError ends the program with its line and exit
    status 2, Ctrl-C with 130; a reader of its output that is gone, as of `| head`, ends it too."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')             # a terminal may lack a character
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for the flush at the end
        sys.exit(141)


def parse(cls, arguments, usage):
    """Read command-line arguments against the dataclass cls.

    Returns (values, rest): the values given as --key=value, by key, each of its field's type;
    and the other arguments. --help prints usage and keys, and exits. Raises UserError for an
    unknown key or a wrong type.
    """
    if '-h' in arguments or '--help' in arguments:
        print_help(cls, usage)
        sys.exit(0)
    values, rest = {}, []
    for argument in arguments:
        if not argument.startswith('-'):
            rest.append(argument)
            continue
        key, equals, text = argument.removeprefix('--').partition('=')
        if not argument.startswith('--') or not equals:
            raise UserError(f'expected --key=value, got {argument!r}; --help lists the keys')
        values[key] = from_text(cls, key, text)
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


def field_types(cls):
    """The annotation of each key, by name."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


def type_of(cls, key, where='--'):
    """The annotation of key, or a UserError that suggests the nearest key there is."""
    known = field_types(cls)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean {near[0]}?' if near else '--help lists the keys'
        raise UserError(f'{where}{key}: no such key; {hint}')
    return known[key]


def from_text(cls, key, text):
    """The value that the text behind --key= stands for."""
    expected = type_of(cls, key)
    options = typing.get_args(expected) or (expected,)
    if str in options:                                   # any text is a string, '3' as well
        return None if text == 'None' and types.NoneType in options else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return check_type(cls, key, value)


def check_type(cls, key, value, where='--'):
    """value as the type of key's field: an int will do for a float, one int for a tuple."""
    expected = type_of(cls, key, where)
    is_literal = typing.get_origin(expected) is typing.Literal
    for option in typing.get_args(expected) or (expected,):
        if type(value) is option:
            return value
        if is_literal and value == option and type(value) is type(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if option is tuple and type(value) in (int, list):
            return tuple(value) if type(value) is list else (value,)
    raise UserError(f'{where}{key}: expected {type_name(expected)}, got {value!r}')


def type_name(annotation):
    """An annotation as a reader would say it: 'int or None'."""
    options = typing.get_args(annotation) or (annotation,)
    names = {types.NoneType: 'None'}
    return ' or '.join(names.get(option, getattr(option, '__name__', str(option)))
                       for option in options)


def read_config_file(cls, path):
    """The assignments of a config file, by key, each of its field's type. Nothing in it is run."""
    try:
        with open(path, encoding='utf-8') as file:
            statements = ast.parse(file.read()).body
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is no UTF-8 text'
        raise UserError(f'expected a config file such as config/shakespeare_cpu.py, or '
                        f'--key=value, got {path!r}: {reason}') from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f'{path}: expected lines of key = value, got {error}') from None

    values = {}
    for statement in statements:
        where = f'{path}, line {statement.lineno}: '
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue                                     # a docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            got = ast.unparse(statement).splitlines()[0]
            raise UserError(f'{where}expected key = value, got {got!r}')
        key = statement.targets[0].id
        values[key] = check_type(cls, key, evaluate(statement.value, values, where), where)
    return values


def evaluate(node, names, where):
    """The value of a syntax tree of literals, names assigned above, and arithmetic on numbers."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in names:
            return names[node.id]
        case ast.List() | ast.Tuple():
            return [evaluate(item, names, where) for item in node.elts]
        case ast.Dict() if None not in node.keys:
            return {evaluate(key, names, where): evaluate(value, names, where)
                    for key, value in zip(node.keys, node.values)}
        case ast.UnaryOp(op=ast.USub()):
            return -number(node.operand, names, where)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            left = number(node.left, names, where)
            right = number(node.right, names, where)
            if not (right == 0 and isinstance(node.op, (ast.Div, ast.FloorDiv))):
                return ARITHMETIC[type(node.op)](left, right)
    raise UserError(f'{where}expected a literal, or arithmetic on literals and names assigned '
                    f'above, got {ast.unparse(node)!r}')


def number(node, names, where):
    value = evaluate(node, names, where)
    if type(value) not in (int, float):
        raise UserError(f'{where}expected a number, got {value!r}')
    return value


def print_help(cls, usage):
    """The usage, then every key with default, type and comment, under its group's heading."""
    print(usage.strip())
    for line in field_lines(cls):
        if isinstance(line, str):
            print(f'\n{line}:')
            continue
        key, comment = line
        field = next(field for field in dataclasses.fields(cls) if field.name == key)
        print(f'  --{key}={field.default}  ({type_name(field.type)})')
        print(textwrap.fill(comment, 80, initial_indent=' ' * 6, subsequent_indent=' ' * 6))


def field_lines(cls):
    """From the source of cls and its parents, in order: headings (str), and (key, comment) for
    each field."""
    for parent in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            if heading := re.fullmatch(r'    # (.+)', line):
                yield heading[1]
            elif field := re.fullmatch(r'    (\w+): .+ = .+?  # (.+)', line):
                yield field[1], field[2]


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
    """The text of a file, '' where there is none."""
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8') as file:
        return file.read()
