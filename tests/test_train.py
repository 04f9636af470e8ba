"""train.py and sample.py: the whole way through the command line; parts of the loop by hand."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch

import sample
import train
from configurator import read_config_file
from conftest import ROOT, SMALL, run_script, table_of
from model import GPT
from train import Data, TrainConfig, learning_rate_at, make_optimizer, plan_runs

VARIANTS = ('aoe', 'moe', 'dense')
PICTURES = ('expert_class.png', 'expert_load.png', 'final_loss.png', 'loss.png')
CONFIGS = sorted(name for name in os.listdir(os.path.join(ROOT, 'config'))
                 if name.endswith('.py') and name != 'rivals.py')  # test_rivals.py has that


def log_of(folder):
    text = (folder / 'log.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope='module')
def trained(workspace):
    """Three variants, trained through the command line: (workspace, what it printed)."""
    process = run_script('train.py', *SMALL, '--mlp=aoe,moe,dense', '--out_dir=out/three',
                         cwd=workspace)
    return workspace, process.stdout


def test_three_variants_leave_logs_checkpoints_pictures_and_a_table(trained):
    workspace, printed = trained
    out = workspace / 'out/three'
    assert sorted(os.listdir(out)) == sorted([*VARIANTS, *PICTURES, 'norm.png', 'results.jsonl'])
    table = table_of(printed)
    assert list(table) == ['run', *sorted(VARIANTS)]
    for mlp in VARIANTS:
        assert sorted(os.listdir(out / mlp)) == [
            '.lock', 'best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
        log = log_of(out / mlp)
        assert [entry['iter'] for entry in log] == [0, 10, 20]
        assert [entry['tokens'] for entry in log] == [0, 1280, 2560]
        assert log[0]['val_loss'] > log[1]['val_loss'] > log[2]['val_loss']
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
    for name in (*PICTURES, 'norm.png'):
        picture = matplotlib.image.imread(out / name)
        assert picture.shape[1] >= 600 and picture[..., :3].std() > 0.05
        assert os.path.getsize(out / name) < 100_000
        if name in ('loss.png', 'final_loss.png'):                 # every run's own colour is there
            pixels = np.unique((255 * picture[..., :3]).round().reshape(-1, 3), axis=0)
            for color in train.COLORS[:3]:
                rgb = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
                assert np.abs(pixels - rgb).max(1).min() < 20


def test_an_untrained_model_knows_nothing(trained):
    meta = json.loads((trained[0] / 'data/code/meta.json').read_text(encoding='utf-8'))
    for mlp in VARIANTS:
        first = log_of(trained[0] / 'out/three' / mlp)[0]
        assert first['val_loss'] == pytest.approx(math.log(meta['vocab_size']), abs=0.3)


def test_classes_of_characters():
    assert [train.CLASSES[train.class_of(c)] for c in 'aZé \t\n\r.7中'] == [
        'letters', 'capitals', 'letters', 'spaces', 'spaces', 'line ends', 'line ends', 'other',
        'other', 'letters']


@pytest.mark.parametrize('mlp', ('aoe', 'moe'))
def test_which_expert_takes_which_class_by_a_loop(trained, mlp):
    model, meta, _ = sample.load_model(str(trained[0] / 'out/three' / mlp), torch.device('cpu'))
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
    run_script('train.py', *common, cwd=workspace)
    printed = run_script('train.py', *common, '--name=few', '--top_k=1', cwd=workspace).stdout
    assert list(table_of(printed)) == ['run', 'few', 'moe']
    assert json.loads((workspace / 'out/named/few/config.json').read_text())['name'] == 'few'
    losses = [run_script('train.py', *common, '--eval_only=True', f'--top_k={k}',
                         cwd=workspace).stdout.split()[-3] for k in (1, 2, 4)]
    assert len(set(losses)) == 3
    narrow = run_script('train.py', *SMALL, '--mlp=dense', '--out_dir=out/three',
                        '--eval_only=True', '--top_k=1', cwd=workspace, check=False)
    assert 'expected weights of a model of these settings' in narrow.stderr   # K experts wide


def test_ctrl_c_saves_and_says_how_to_go_on(workspace):
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL, '--mlp=moe,dense',
               '--max_iters=100000',
               '--eval_interval=50000', '--out_dir=out/stopped']
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not (workspace / 'out/stopped/moe/ckpt.pt').exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in errors
    assert printed.splitlines()[-1].endswith('--out_dir=out/stopped --init_from=resume')
    reached = train.load_checkpoint(workspace / 'out/stopped/moe/ckpt.pt', 'cpu')['at']['iter']
    assert reached > 0
    again = [f'--max_iters={reached + 1}' if argument.startswith('--max_iters') else argument
             for argument in command[2:]]
    run_script('train.py', *again, '--init_from=resume', cwd=workspace)
    assert [entry['iter'] for entry in log_of(workspace / 'out/stopped/moe')] == [0, reached + 1]


def test_eval_only_repeats_the_last_evaluation_and_writes_nothing(trained):
    workspace = trained[0]
    before = {path: path.stat().st_mtime_ns for path in (workspace / 'out/three').rglob('*')}
    printed = run_script('train.py', *SMALL, '--mlp=aoe', '--out_dir=out/three',
                         '--eval_only=True', cwd=workspace).stdout
    last = log_of(workspace / 'out/three/aoe')[-1]
    assert f'train loss {last["train_loss"]:.4f}   val loss {last["val_loss"]:.4f}' in printed
    after = {path: path.stat().st_mtime_ns for path in (workspace / 'out/three').rglob('*')}
    assert after == before


def test_a_config_file_may_name_runs_and_seeds(workspace):
    (workspace / 'two.py').write_text(
        "runs = {'small': {'d_ffn': 16}, 'balanced': {'mlp': 'moe', 'aux_weight': 0.01}}\n"
        "seeds = [1, 2]\nout_dir = 'out/two'\n")
    small = [argument for argument in SMALL if not argument.startswith('--d_ffn')]
    printed = run_script('train.py', 'two.py', *small, '--max_iters=4', cwd=workspace).stdout
    assert sorted(os.listdir(workspace / 'out/two')) == sorted([
        'balanced-1', 'balanced-2', 'small-1', 'small-2', *PICTURES, 'norm.png', 'results.jsonl'])
    losses = [[log_of(workspace / f'out/two/small-{seed}')[i]['val_loss'] for seed in (1, 2)]
              for i in (0, 1)]
    assert losses[0][0] != losses[0][1]
    mean, spread = np.mean(losses[1]), np.std(losses[1], ddof=1)
    assert f'{mean:.4f} ± {spread:.4f}' in printed
    config = json.loads((workspace / 'out/two/balanced-2/config.json').read_text())
    assert (config['name'], config['seed'], config['iter']) == ('balanced', 2, 4)
    assert (config['shape']['mlp'], config['shape']['aux_weight']) == ('moe', 0.01)


def test_a_process_for_each_seed_gives_what_one_gives_and_auto_skips_what_is_done(workspace):
    command = [*SMALL, '--mlp=moe,dense', '--threads=1', '--init_from=auto']
    script = [sys.executable, os.path.join(ROOT, 'train.py'), *command, '--out_dir=out/shared']
    both = [subprocess.Popen([*script, f'--seeds={seed}'], cwd=workspace) for seed in (1, 2)]
    assert [process.wait(timeout=160) for process in both] == [0, 0]
    run_script('train.py', *command, '--seeds=1,2', '--out_dir=out/alone', cwd=workspace)
    runs = ('moe-1', 'moe-2', 'dense-1', 'dense-2')
    shared, alone = ({run: log_of(workspace / out / run) for run in runs}
                     for out in ('out/shared', 'out/alone'))
    for run in runs:
        assert [e['val_loss'] for e in shared[run]] == [e['val_loss'] for e in alone[run]]
    again = run_script('train.py', *command, '--seeds=1,2', '--out_dir=out/shared', cwd=workspace)
    assert {run: log_of(workspace / 'out/shared' / run) for run in runs} == shared
    assert table_of(again.stdout)['moe'][2].count('±') == 1


@pytest.mark.parametrize('mlp', ('moe', 'aoe'))
@pytest.mark.parametrize('select', ('top_p', 'expert_choice'))
def test_other_selection_rules_train_and_log_how_many_experts_a_token_has(workspace, mlp, select):
    out = f'out/{select}'
    run_script('train.py', *SMALL, f'--mlp={mlp}', f'--select={select}', '--capacity_factor=1.5',
               '--conf_weight=1e-4', f'--out_dir={out}', cwd=workspace)
    log = log_of(workspace / out / mlp)
    assert log[-1]['val_loss'] < log[0]['val_loss']
    counts = log[-1]['experts_per_token']
    assert counts == [1.5, 1.5] if select == 'expert_choice' else all(1 <= n <= 4 for n in counts)
    sampled = run_script('sample.py', f'{out}/{mlp}', '--prompt=import', '--max_new_tokens=5',
                         cwd=workspace)
    assert ('top_k' in sampled.stderr) == (select == 'expert_choice')


def test_sampling(trained):
    workspace = trained[0]
    first, again, other = (
        run_script('sample.py', 'out/three/aoe', '--prompt=import', '--max_new_tokens=20',
                   f'--seed={seed}', cwd=workspace).stdout for seed in (1, 1, 2))
    assert first == again != other and first.startswith('import')
    assert len(first) == len('import') + 20 + 1
    two = run_script('sample.py', 'out/three/dense', '--num_samples=2', '--max_new_tokens=5',
                     '--temperature=0', cwd=workspace).stdout
    one, same = two.split('-' * 80 + '\n')
    assert one == same


def test_a_script_ends_with_one_line_and_status_2(workspace):
    process = run_script('train.py', '--n_lyer=3', cwd=workspace, check=False)
    assert (process.returncode, process.stdout) == (2, '')
    assert process.stderr == 'error: --n_lyer: no such key; did you mean n_layer?\n'


@pytest.mark.parametrize('file', CONFIGS)
def test_every_config_trains_models_of_one_size(file):
    with open(os.path.join(ROOT, 'config', file), encoding='utf-8') as text:
        shape = 'paper_table2.py' if 'config/paper/table2.py' in text.read() else file
    values = {}
    for name in (shape, file):
        values |= read_config_file(TrainConfig, os.path.join(ROOT, 'config', name))
    assert all(run.eval_only or run.out_dir == f'out/{file.removesuffix(".py")}'
               for run in plan_runs(dict(values), {}))
    values = {key: value for key, value in values.items() if key not in ('runs', 'seeds')}
    sizes = {}
    for run in plan_runs(values, {'mlp': 'aoe,moe,dense'}):
        run.vocab_size = run.vocab_size or 84
        with torch.device('meta'):
            sizes[run.name] = GPT(run).total_parameters()
    assert abs(sizes['aoe'] / sizes['moe'] - 1) < 0.01 and sizes['dense'] < sizes['moe']


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
