"""train.py: the whole way through; parts of the loop by hand; runs side by side."""

import contextlib
import glob
import json
import math
import os
import re
import signal
import struct
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch

import sample
import train
from configurator import read_config_file
from conftest import ROOT, SMALL, run_here, start_script, table_of
from model import GPT
from train import Data, TrainConfig, learning_rate_at, make_optimizer, plan_runs, read_log

VARIANTS = ('aoe', 'moe', 'dense')
PICTURES = ('expert_class.png', 'expert_load.png', 'loss.png', 'norm.png')
CONFIGS = sorted(os.path.relpath(path, ROOT)
                 for path in glob.glob(f'{ROOT}/config/**/*.py', recursive=True)
                 if 'git apply' not in train.read_text(path))      # test_rivals.py has those


@pytest.fixture(scope='module')
def trained(workspace):
    """Three variants, trained through the command line: (workspace, what it printed)."""
    process = run_here(train.main, *SMALL, '--mlp=aoe,moe,dense', '--out_dir=out/three',
                       cwd=workspace)
    return workspace, process.stdout


def test_three_variants_leave_logs_checkpoints_pictures_and_a_table(trained):
    workspace, printed = trained
    out = workspace / 'out/three'
    vocab_size = train.load_meta(str(workspace / 'data/code'))['vocab_size']
    assert sorted(os.listdir(out)) == sorted([*VARIANTS, *PICTURES, 'results.jsonl'])
    table = table_of(printed)
    assert list(table) == ['run', *sorted(VARIANTS)]
    for mlp in VARIANTS:
        assert sorted(os.listdir(out / mlp)) == [
            '.lock', 'best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
        log = read_log(out / mlp / 'log.jsonl')
        assert [entry['iter'] for entry in log] == [0, 10, 20]
        assert [entry['tokens'] for entry in log] == [0, 1280, 2560]
        assert log[0]['val_loss'] > log[1]['val_loss'] > log[2]['val_loss']
        assert log[0]['val_loss'] == pytest.approx(math.log(vocab_size), abs=0.3)
        assert ['test_loss' in entry for entry in log] == [False, False, True]
        told = re.findall(f'^{mlp} +iter +(\\d+) .* val loss ([0-9.]+)', printed, re.M)
        assert told == [(str(e['iter']), f'{e["val_loss"]:.4f}') for e in log]
        last = log[-1]
        assert last['seconds'] > 0
        shape = (0,) if mlp == 'dense' else (2, 4)
        assert np.shape(last['load']) == shape
        assert len(last['ent_load']) == len(last['ent_conf']) == shape[0]
        if mlp != 'dense':
            for load, ent in zip(last['load'], last['ent_load']):
                assert sum(load) == pytest.approx(1)
                assert ent == pytest.approx(-sum(f * math.log(f) for f in load if f))
        assert np.shape(last['norm']) == {'aoe': (2, 4), 'moe': (2, 0), 'dense': (0,)}[mlp]
        config = json.loads((out / mlp / 'config.json').read_text())
        assert table[mlp][0] == f'{config["total_parameters"]:,}'
        assert table[mlp][2] == f'{min(entry["val_loss"] for entry in log):.4f}'
    assert all(len(line) <= 80 for line in printed.splitlines())
    for name in PICTURES:
        picture = matplotlib.image.imread(out / name)
        assert picture.shape[1] >= 600 and picture[..., :3].std() > 0.05
        assert os.path.getsize(out / name) < 100_000
    picture = matplotlib.image.imread(out / 'loss.png')            # every run's own colour is there
    pixels = np.unique((255 * picture[..., :3]).round().reshape(-1, 3), axis=0)
    for mlp in VARIANTS:
        rgb = [int(train.COLOR_OF[mlp][i:i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(pixels - rgb).max(1).min() < 20


def test_classes_of_characters():
    assert [train.CLASSES[train.class_of(c)] for c in 'aZé \t\n\r.7中'] == [
        'letters', 'capitals', 'letters', 'spaces', 'spaces', 'line ends', 'line ends', 'other',
        'other', 'letters']


@pytest.mark.parametrize('mlp', ('aoe', 'moe'))
def test_which_expert_takes_which_class_by_a_loop(trained, mlp):
    model, meta, _ = train.load_model(str(trained[0] / 'out/three' / mlp), torch.device('cpu'))
    config = TrainConfig(dataset='code', data_dir=str(trained[0] / 'data'), block_size=16,
                         batch_size=8, eval_iters=2)
    data = Data(config, torch.device('cpu'))
    found = train.evaluate(model, data, contextlib.nullcontext())
    inputs, tokens = [], []
    counts, there = np.zeros((2, len(train.CLASSES), 4)), np.zeros((2, len(train.CLASSES), 1))
    norms, confidences = np.zeros((2, 4)), np.zeros(2)
    hooks = [block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
             for block in model.blocks]
    with torch.no_grad():
        for idx, _ in data.eval_batches('val'):
            model(idx)
            tokens.append(idx)
    for i, x in enumerate(inputs):                                 # layer 0, layer 1, layer 0, ...
        layer = model.blocks[i % 2].mlp
        for token, vector in zip(tokens[i // 2].flatten().tolist(), x):
            if mlp == 'aoe':
                parts = layer.w_down.detach().chunk(4, dim=1)
                scores = [(vector @ w).norm().item() for w in parts]
            else:
                scores = (vector @ layer.router.detach()).tolist()
            kind = train.class_of(meta['vocabulary'][token])
            there[i % 2, kind] += 1
            for expert in sorted(range(4), key=scores.__getitem__)[-2:]:
                counts[i % 2, kind, expert] += 1
            norms[i % 2] += np.array(scores) / (2 * 8 * 16)
            q = np.exp(scores) / np.exp(scores).sum()
            confidences[i % 2] -= (q * np.log(q)).sum() / (2 * 8 * 16)
    close = {'atol': 0.002}                                        # two equal scores may differ
    assert np.allclose(found['class_load'], counts / np.maximum(there, 1), **close)
    assert np.allclose(found['load'], counts.sum(1) / counts.sum((1, 2))[0], **close)
    assert np.allclose(found['ent_conf'], confidences, **close)
    assert found['experts_per_token'] == [2, 2]
    assert np.allclose(found['norm'], norms, **close) if mlp == 'aoe' else found['norm'] == [[], []]
    for hook in hooks:
        hook.remove()


def test_a_named_run_joins_the_others_and_k_can_change_on_the_way(trained):
    workspace = trained[0]
    common = [*SMALL, '--mlp=moe', '--max_iters=2', '--out_dir=out/named']
    run_here(train.main, *common, cwd=workspace)
    named = run_here(train.main, *common, '--name=few', '--top_k=1', cwd=workspace)
    assert list(table_of(named.stdout)) == ['run', 'few', 'moe']
    assert json.loads((workspace / 'out/named/few/config.json').read_text())['name'] == 'few'
    printed = [run_here(train.main, *common, '--eval_only=True', f'--top_k={k}',
                        cwd=workspace).stdout for k in (1, 2, 4)]
    assert len({text.split('val loss ')[1].split()[0] for text in printed}) == 3
    assert 'evaluated with top_k = 1, trained with 2' in printed[0]
    assert 'evaluated with' not in printed[1]
    narrow = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/three', '--eval_only=True',
                      '--top_k=1', cwd=workspace, check=False)
    assert 'expected weights of a model of these settings' in narrow.stderr   # K experts wide


def test_eval_only_repeats_the_last_evaluation_and_writes_nothing(trained):
    workspace = trained[0]
    before = {path: path.stat().st_mtime_ns for path in (workspace / 'out/three').rglob('*')}
    printed = run_here(train.main, *SMALL, '--mlp=aoe', '--out_dir=out/three', '--eval_only=True',
                       cwd=workspace).stdout
    last = read_log(workspace / 'out/three/aoe/log.jsonl')[-1]
    assert f'train loss {last["train_loss"]:.4f}   val loss {last["val_loss"]:.4f}' in printed
    after = {path: path.stat().st_mtime_ns for path in (workspace / 'out/three').rglob('*')}
    assert after == before


def test_a_config_file_may_name_runs_and_seeds(workspace):
    (workspace / 'two.py').write_text(
        "runs = {'small': {'d_ffn': 16}, 'balanced': {'mlp': 'moe', 'aux_weight': 0.01}}\n"
        "seeds = [1, 2]\nout_dir = 'out/two'\n")
    small = [argument for argument in SMALL if not argument.startswith('--d_ffn')]
    printed = run_here(train.main, 'two.py', *small, '--max_iters=4', cwd=workspace).stdout
    assert sorted(os.listdir(workspace / 'out/two')) == sorted([
        'balanced-1', 'balanced-2', 'small-1', 'small-2', *PICTURES, 'results.jsonl'])
    losses = [[read_log(workspace / f'out/two/small-{seed}/log.jsonl')[i]['val_loss']
               for seed in (1, 2)] for i in (0, 1)]
    assert losses[0][0] != losses[0][1]
    mean, spread = np.mean(losses[1]), np.std(losses[1], ddof=1)
    assert f'{mean:.4f} ± {spread:.4f}' in printed
    config = json.loads((workspace / 'out/two/balanced-2/config.json').read_text())
    assert (config['name'], config['seed'], config['iter']) == ('balanced', 2, 4)
    assert (config['recipe']['mlp'], config['recipe']['aux_weight']) == ('moe', 0.01)


@pytest.mark.parametrize('mlp', ('moe', 'aoe'))
@pytest.mark.parametrize('select', ('top_p', 'expert_choice'))
def test_other_selection_rules_train_and_log_how_many_experts_a_token_has(train_here, mlp, select):
    log = train_here(f'--mlp={mlp}', f'--select={select}', '--capacity_factor=1.5',
                     '--conf_weight=1e-4', f'--out_dir=out/{select}')
    assert log[-1]['val_loss'] < log[0]['val_loss']
    counts = log[-1]['experts_per_token']
    assert counts == [1.5, 1.5] if select == 'expert_choice' else all(1 <= n <= 4 for n in counts)
    sampled = run_here(sample.main, f'out/{select}/{mlp}', '--prompt=import',
                       '--max_new_tokens=5')
    assert ('top_k' in sampled.stderr) == (select == 'expert_choice')


def test_sampling(trained):
    def text(run, *arguments):
        return run_here(sample.main, f'out/three/{run}', *arguments, cwd=trained[0]).stdout
    first, again, other = (text('aoe', '--prompt=import', '--max_new_tokens=20', f'--seed={seed}')
                           for seed in (1, 1, 2))
    assert first == again != other and first.startswith('import')
    assert len(first) == len('import') + 20 + 1
    two = text('dense', '--num_samples=2', '--max_new_tokens=5', '--temperature=0')
    one, same = two.split('-' * 80 + '\n')
    assert one == same


@pytest.mark.parametrize('file', CONFIGS)
def test_every_config_trains_models_of_one_size(file):
    text, values = train.read_text(os.path.join(ROOT, file)), {}
    files = re.search(rf'train\.py ((?:config/\S+ )*){file}', text)
    for name in (*(files[1].split() if files else ()), file):      # those that its page names first
        values |= read_config_file(TrainConfig, os.path.join(ROOT, name))
    assert all(run.out_dir.startswith('out/') for run in plan_runs(dict(values), {}))
    values = {key: value for key, value in values.items() if key not in ('runs', 'seeds')}
    sizes = {}
    for run in plan_runs(values, {'mlp': 'aoe,moe,dense'}):
        run.vocab_size = run.vocab_size or 84
        with torch.device('meta'):
            sizes[run.name] = GPT(run).total_parameters()
    assert abs(sizes['aoe'] / sizes['moe'] - 1) < 0.01 and sizes['dense'] < sizes['moe']


def test_every_config_has_a_folder_of_its_own_and_says_nothing_of_the_machine():
    values = {file: read_config_file(TrainConfig, os.path.join(ROOT, file)) for file in CONFIGS}
    folders = [own['out_dir'] for own in values.values() if 'out_dir' in own]
    assert len(set(folders)) == len(folders) > 5
    assert not [file for file, own in values.items() if {'threads', 'jobs'} & own.keys()]


def test_the_schedule_by_hand():
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=3, lr_decay_iters=13,
                         max_iters=20)
    rates = [learning_rate_at(i, config) for i in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.6)                          # half way down
    assert rates[13:] == [0.2] * 7
    assert all(a > b for a, b in zip(rates[3:13], rates[4:14]))


def test_only_matrices_decay():
    config = TrainConfig(vocab_size=11, n_embd=32, weight_decay=0.5, learning_rate=0.1)
    model = GPT(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(model, config, torch.device('cpu')).step()
    for name, p in model.named_parameters():
        shrink = 1 - 0.1 * 0.5 if p.dim() >= 2 else 1
        torch.testing.assert_close(p.detach(), before[name] * shrink, msg=name)


def test_batches_depend_on_seed_and_iteration_and_evaluation_batches_on_neither(workspace):
    def data(**changes):
        config = TrainConfig(dataset='code', data_dir=str(workspace / 'data'), block_size=16,
                             batch_size=4, eval_iters=3, **changes)
        return Data(config, torch.device('cpu'))
    one, same, other = data(seed=1), data(seed=1), data(seed=2)
    idx, targets = one.train_batch(5, 0)
    assert idx.shape == targets.shape == (4, 16) and torch.equal(idx[:, 1:], targets[:, :-1])
    assert torch.equal(idx, same.train_batch(5, 0)[0])
    for different in (one.train_batch(6, 0), one.train_batch(5, 1), other.train_batch(5, 0)):
        assert not torch.equal(idx, different[0])
    batches = list(one.eval_batches('val'))
    assert len(batches) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, other.eval_batches('val')))
    tokens = np.fromfile(workspace / 'data/code/val.bin', dtype=np.uint16)
    assert batches[0][0][0].tolist() == tokens[:16].tolist()       # from the first token
    assert batches[2][1][3].tolist() == tokens[-16:].tolist()      # to the last


def test_an_evaluation_sees_no_token_many_times(workspace):
    config = TrainConfig(dataset='code', data_dir=str(workspace / 'data'), block_size=64,
                         batch_size=8, eval_iters=10_000)
    data = Data(config, torch.device('cpu'))
    for split in ('train', 'val'):
        seen = sum(idx.numel() for idx, _ in data.eval_batches(split))
        assert len(data.tokens[split]) <= seen <= len(data.tokens[split]) + 64 * 8


def test_windows_of_test_loss_share_no_token_with_those_of_val_loss(workspace, monkeypatch):
    """In texts of 18 to 2,000 tokens, each its own place in the text."""
    data = Data(TrainConfig(dataset='code', data_dir=str(workspace / 'data'), block_size=16),
                torch.device('cpu'))
    monkeypatch.setattr(Data, 'batch', lambda self, split, starts: starts)
    some = {False: 0, True: 0}
    for n in range(18, 2000, 3):
        data.tokens['val'] = range(n)
        for size, block, iters in ((1, 2, 3), (2, 16, 2), (2, 5, 9), (8, 4, 1), (3, 7, 50)):
            data.config.batch_size, data.config.block_size = size, block
            data.config.eval_iters = iters
            val, test = (
                [{*range(start, start + block + 1)} for starts in data.eval_batches(split)
                 for start in starts] for split in ('val', 'test'))
            assert not set().union(*val) & set().union(*test)
            assert not test or max(map(max, test)) < n
            assert sum(map(len, test)) == len(set().union(*test))  # nor with one another
            some[bool(test)] += 1
            assert test or n < 2 * iters * size * (block + 2) or iters == 1
    assert min(some.values()) > 500


def test_runs_with_the_same_seed_share_their_batches():
    runs = plan_runs({'mlp': 'aoe,moe', 'out_dir': 'o'}, {'seeds': (3, 4)})
    assert [(run.name, run.mlp, run.seed, run.folder) for run in runs] == [
        ('aoe', 'aoe', 3, 'o/aoe-3'), ('moe', 'moe', 3, 'o/moe-3'),
        ('aoe', 'aoe', 4, 'o/aoe-4'), ('moe', 'moe', 4, 'o/moe-4')]
    assert [run.folder for run in plan_runs({'out_dir': 'o'}, {'seeds': (3,)})] == ['o/aoe-3']
    assert plan_runs({}, {'mlp': 'dense'})[0].folder == 'out/default/dense'
    run, = plan_runs({'n_layer': 2, 'runs': {'deep': {'n_layer': 6}}}, {'max_iters': 5})
    assert (run.name, run.n_layer, run.max_iters) == ('deep', 6, 5)


def test_mlp_on_the_command_line_takes_the_place_of_a_files_runs():
    file = {'runs': {'aoe whole': {'mlp': 'aoe', 'factorised': False}, 'moe': {'mlp': 'moe'}}}
    assert [run.name for run in plan_runs(dict(file), {})] == ['aoe whole', 'moe']
    run, = plan_runs(dict(file), {'mlp': 'dense', 'name': 'x'})
    assert (run.name, run.mlp, run.factorised) == ('x', 'dense', False)


# -----------------------------------------------------------------------------
# side by side

@pytest.mark.parametrize('affinity, quota, expected', (
    (8, '', 8), (8, 'max 100000\n', 8), (8, '150000 100000\n', 2), (8, '20000 100000\n', 1),
    (1, '400000 100000\n', 1)))
def test_cores_are_those_that_taskset_and_a_container_grant(monkeypatch, affinity, quota, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {*range(affinity)}, raising=False)
    monkeypatch.setattr(train, 'read_text', {'/sys/fs/cgroup/cpu.max': quota}.__getitem__)
    assert train.cores() == expected


def test_cores_where_the_system_grants_all(monkeypatch):           # macOS, Windows
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    monkeypatch.setattr(train, 'read_text', lambda path: '')
    assert train.cores() == 6 and train.free_memory() == math.inf


def test_free_memory_is_what_the_machine_and_a_container_leave(monkeypatch):
    files = {'/proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable: 7000 kB\n',
             '/sys/fs/cgroup/memory.max': 'max\n'}
    monkeypatch.setattr(train, 'read_text', files.__getitem__)
    assert train.free_memory() == 7000 * 1024
    files['/sys/fs/cgroup/memory.max'] = '5000\n'
    assert train.free_memory() == 5000


def test_how_many_runs_share_the_machine(monkeypatch):
    def shared(n, **keys):
        runs = plan_runs({'seeds': tuple(range(n)), 'device': 'cpu', 'dtype': 'float32'} | keys, {})
        return train.share_the_machine(runs), runs[0].threads
    monkeypatch.setattr(train, 'cores', lambda: 8)
    monkeypatch.setattr(train, 'free_memory', lambda: math.inf)
    assert shared(12) == (8, 1)
    assert shared(3) == (3, 2)
    assert shared(1) == shared(12, jobs=1) == (1, None)            # one run has all that there is
    assert shared(12, jobs=2) == (2, 4)
    assert shared(12, jobs=4, threads=1) == (4, 1)
    assert shared(12, eval_only=True) == (1, None)
    monkeypatch.setattr(train, 'free_memory', lambda: 3.5 * train.memory_of(TrainConfig()))
    assert shared(12) == (3, 2)
    monkeypatch.setattr(train, 'free_memory', lambda: 0)
    assert shared(12) == (1, None)
    monkeypatch.setattr(train, 'cores', lambda: 8)
    monkeypatch.setattr(train, 'choose_device', lambda name: torch.device('cuda'))
    assert shared(12)[0] == 1 and shared(12, jobs=2)[0] == 2


def test_longer_runs_start_first():
    runs = plan_runs({'runs': {'dense': {'mlp': 'dense'}, 'moe': {'mlp': 'moe'}, 'aoe': {},
                               'longer': {'mlp': 'dense', 'max_iters': 9000}}}, {})
    assert [run.name for run in sorted(runs, key=train.length_of)] == [
        'dense', 'moe', 'aoe', 'longer']


def start(out_dir, *arguments, cwd, **more):
    return start_script('train.py', *SMALL, '--jobs=2', f'--out_dir=out/{out_dir}', *arguments,
                        cwd=cwd, **more)


def wait_until(fact, process):
    while not fact():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def workers(process):
    """The ids of the processes that train runs for it, on Linux."""
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
        children = file.read().split()
    return [int(pid) for pid in children if 'spawn_main' in command_of(pid)]


def command_of(pid):
    """Of a process that lives; '' for another, and for one that has ended."""
    try:
        with open(f'/proc/{pid}/cmdline') as file:
            return file.read()
    except OSError:
        return ''


LINUX = pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='needs Linux')


@pytest.mark.slow
def test_side_by_side_runs_are_those_in_turn_to_the_last_bit(workspace):
    more = ['--mlp=dense,moe,aoe', '--seeds=1', '--dropout=0.1', '--lr_decay_iters=20']
    names = [f'{mlp}-1' for mlp in VARIANTS]

    def states(out):
        return [train.load_checkpoint(workspace / 'out' / out / name / 'ckpt.pt', 'cpu')
                for name in names]
    process = start('beside', *more, cwd=workspace)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, '')                 # and no bars in a pipe
    assert '\r' not in printed and all(len(line) <= 80 for line in printed.splitlines())
    assert sorted(re.findall('in out/beside/(.+)', printed)[:2]) == ['aoe-1', 'moe-1']
    assert sorted(os.listdir(workspace / 'out/beside')) == sorted(
        [*names, *PICTURES, 'results.jsonl'])
    run_here(train.main, *SMALL, *more, '--out_dir=out/in_turn', cwd=workspace)
    for name, beside, in_turn in zip(names, states('beside'), states('in_turn')):
        assert len(re.findall(f'^{name} +iter ', printed, re.M)) == len(beside['log']) == 3
        for entry in (*beside['log'], *in_turn['log']):
            del entry['seconds']
        assert beside['log'] == in_turn['log'] and beside['recipe'] == in_turn['recipe']
    # and go on, in turn and side by side
    more += ['--init_from=resume', '--max_iters=30']
    run_here(train.main, *SMALL, *more, '--out_dir=out/beside', cwd=workspace)
    assert start('in_turn', *more, cwd=workspace).wait() == 0
    for beside, in_turn in zip(states('beside'), states('in_turn')):
        assert beside['iter'] == in_turn['iter'] == 30
        assert all(map(torch.equal, beside['model'].values(), in_turn['model'].values()))


@pytest.mark.slow
@pytest.mark.parametrize('number, status', ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_saves_all_runs_and_says_once_how_to_go_on(workspace, number, status):
    """To all processes of the terminal, as Ctrl-C, and to the first alone, as kill."""
    name = number.name
    process = start(name, '--mlp=moe,dense', '--max_iters=100000', '--eval_interval=50000',
                    cwd=workspace)
    files = [workspace / 'out' / name / mlp / 'best.pt' for mlp in ('moe', 'dense')]
    wait_until(lambda: all(file.exists() for file in files), process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (status, '')
    assert printed.count('--init_from=resume') == 1
    assert printed.splitlines()[-1].endswith('--eval_interval=50000 --init_from=resume')
    reached = [train.load_checkpoint(file.parent / 'ckpt.pt', 'cpu')['iter'] for file in files]
    assert max(reached) > 0
    again = start(name, '--mlp=moe,dense', f'--max_iters={max(reached) + 1}',
                  '--eval_interval=50000', '--lr_decay_iters=100000', '--init_from=resume',
                  cwd=workspace)
    assert again.wait() == 0
    for file in files:
        log = read_log(file.parent / 'log.jsonl')
        assert [entry['iter'] for entry in log] == [0, max(reached) + 1]


@LINUX
@pytest.mark.slow
def test_where_one_process_is_killed_the_others_go_on(workspace):
    process = start('one', '--mlp=moe,dense', '--max_iters=600', '--eval_interval=300',
                    cwd=workspace)
    wait_until(lambda: (workspace / 'out/one/moe/best.pt').exists(), process)
    os.kill(workers(process)[0], signal.SIGKILL)                   # the longest run began first
    printed, errors = process.communicate()
    assert process.returncode == 1
    assert errors == ('error: out/one/moe: its process ended with exit code -9; '
                      '--init_from=resume goes on with it\n')
    assert read_log(workspace / 'out/one/dense/log.jsonl')[-1]['iter'] == 600
    assert start('one', '--mlp=moe,dense', '--max_iters=600', '--eval_interval=300',
                 '--init_from=resume', cwd=workspace).wait() == 0
    assert read_log(workspace / 'out/one/moe/log.jsonl')[-1]['iter'] == 600


@LINUX
@pytest.mark.slow
def test_where_the_first_process_is_killed_the_others_save_and_end(workspace):
    process = start('first', '--mlp=moe,dense', '--max_iters=100000', cwd=workspace)
    wait_until(lambda: all((workspace / 'out/first' / mlp / 'best.pt').exists()
                           for mlp in ('moe', 'dense')), process)
    left, before = workers(process), read_log(workspace / 'out/first/moe/log.jsonl')[-1]['iter']
    process.kill()
    _, errors = process.communicate()                              # until all have closed them
    assert not any(map(command_of, left)) and errors == ''
    for mlp in ('moe', 'dense'):
        checkpoint = train.load_checkpoint(workspace / 'out/first' / mlp / 'ckpt.pt', 'cpu')
        assert checkpoint['iter'] >= before
        assert not [f for f in os.listdir(workspace / 'out/first' / mlp) if f.endswith('.part')]


@pytest.mark.slow
def test_where_one_run_diverges_or_has_no_room_beside_others(workspace):
    (workspace / 'high.py').write_text(
        "runs = {'dense': {'mlp': 'dense'}, 'high': {'learning_rate': 1e9, 'grad_clip': 0.0}}\n")
    process = start('high', 'high.py', cwd=workspace)
    printed, errors = process.communicate()
    assert process.returncode == 1 and errors.count('\n') == 1, errors
    assert errors.startswith('error: out/high/high: expected finite losses and weights, got others')
    table = {run: cells[2] for run, cells in table_of(printed).items()}
    assert len(table) == 3 and 'diverged' in table.values()
    assert read_log(workspace / 'out/high/dense/log.jsonl')[-1]['iter'] == 20

    resource = pytest.importorskip('resource')                     # Windows has none
    full = start('beside_full', '--mlp=moe,dense', '--max_iters=100', cwd=workspace,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    printed, errors = full.communicate()
    assert full.returncode == 2 and errors.count('\n') == 1, errors
    assert re.match('error: out/beside_full/.*expected to write it.*Is the disk full', errors)
    assert not list((workspace / 'out/beside_full').rglob('*.pt*'))
    assert start('beside_full', '--mlp=moe,dense', cwd=workspace).wait() == 0


@LINUX
@pytest.mark.slow
def test_too_little_memory_is_one_line(workspace):
    resource = pytest.importorskip('resource')
    process = start('memory', '--mlp=moe,dense', '--batch_size=90000', cwd=workspace,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2))
    printed, errors = process.communicate()
    assert process.returncode == 2 and errors.count('\n') == 1, errors
    assert 'expected enough memory, got ' in errors and '--batch_size' in errors


@LINUX
@pytest.mark.slow
def test_a_terminal_of_80_columns_shows_a_bar_for_each_run(workspace):
    import fcntl                                                   # Windows has none of them
    import pty
    import termios
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(workspace)
        os.execv(sys.executable, [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL,
                                  '--jobs=2', '--mlp=moe', '--seeds=1,2', '--max_iters=300',
                                  '--eval_interval=100', '--out_dir=out/terminal'])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    shown = b''
    with contextlib.suppress(OSError):                             # its end
        while chunk := os.read(terminal, 2**16):
            shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    lines = re.split('[\r\n]+', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown.decode()))
    assert max(map(len, lines)) <= 80
    for seed in (1, 2):
        assert any(re.match(rf'moe-{seed}: .*tok/s, loss \d', line) for line in lines)
        assert sum(bool(re.match(rf'moe-{seed} +iter ', line)) for line in lines) == 4
