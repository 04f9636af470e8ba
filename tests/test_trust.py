"""A run that can be trusted: the same from the same seed, exact after a stop, whole after a kill,
and it says what broke."""

import functools
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import configurator
import sample
import train
from conftest import ROOT, SMALL, run_script, table_of
from model import MLPS, GPTConfig
from train import load_checkpoint, read_log

FILES = ['.lock', 'best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
RULES = {'top_k': [], 'top_p': ['--select=top_p', '--conf_weight=1e-3'],
         'expert_choice': ['--select=expert_choice']}


@pytest.fixture
def train_here(workspace, monkeypatch):
    """train_here(*arguments) runs train.py in this process, in the workspace, without drawing.
    Returns the run's log."""
    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            train.main([*SMALL, *arguments])
        assert not exit.value.code
        out_dir, mlp = (next(a.partition('=')[2] for a in arguments if a.startswith(key))
                        for key in ('--out_dir', '--mlp'))
        return [{key: entry[key] for key in ('iter', 'train_loss', 'val_loss', 'load', 'norm')}
                for entry in read_log(f'{out_dir}/{mlp}/log.jsonl')]
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, 'draw', lambda *arguments: None)
    handler = signal.getsignal(signal.SIGINT)
    call.workspace = workspace
    yield call
    signal.signal(signal.SIGINT, handler)


def weights(path):
    return load_checkpoint(path, 'cpu')['model']


def equal(a, b):
    """Whether two dicts of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('mlp, rule', (
    ('dense', 'top_k'), *((mlp, rule) for mlp in ('moe', 'aoe') for rule in RULES)))
def test_stopping_and_evaluating_change_nothing(train_here, mlp, rule):
    more = [f'--mlp={mlp}', *RULES[rule], '--aux_weight=0.01', '--dropout=0.1',
            '--gradient_accumulation_steps=2', '--lr_decay_iters=20']
    halves = f'out/halves-{mlp}-{rule}'
    whole = train_here(*more, f'--out_dir={halves}-whole', '--eval_interval=5')
    first = train_here(*more, f'--out_dir={halves}', '--max_iters=10')
    both = train_here(*more, f'--out_dir={halves}', '--init_from=resume')
    assert [entry['iter'] for entry in whole] == [0, 5, 10, 15, 20]
    assert first == both[:2] and both == whole[::2]
    assert equal(weights(f'{halves}/{mlp}/ckpt.pt'), weights(f'{halves}-whole/{mlp}/ckpt.pt'))
    tokens = [entry['tokens'] for entry in read_log(f'{halves}/{mlp}/log.jsonl')]
    assert tokens == [0, 10 * 2 * 8 * 16, 20 * 2 * 8 * 16]


def test_the_seed_decides(train_here):
    logs = [train_here('--mlp=aoe', f'--out_dir=out/seed{i}', f'--seed={seed}', '--dropout=0.1',
                       '--max_iters=5')
            for i, seed in enumerate((1, 1, 2))]
    assert logs[0] == logs[1]
    assert all(a['val_loss'] != b['val_loss'] for a, b in zip(logs[0], logs[2]))


@pytest.mark.parametrize('mlp', ('aoe', 'moe', 'dense'))
def test_three_hundred_iterations_teach_something(train_here, mlp):
    """From 4.5 nats a character, ln of the vocabulary, to 2.60 to 2.63 with three seeds."""
    log = train_here(f'--mlp={mlp}', f'--out_dir=out/taught-{mlp}', '--max_iters=300',
                     '--eval_interval=300', '--eval_iters=20')
    assert log[0]['val_loss'] > 4 and log[1]['val_loss'] < 2.75


def at_the_step_of(monkeypatch, iterations, act):
    """Call act(parameters) in these iterations, between their gradients and their steps."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def act_and_clip(parameters, limit):
        parameters = list(parameters)
        if len(calls) in iterations:
            with torch.no_grad():
                act(parameters)
        calls.append(1)
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', act_and_clip)


def test_where_one_run_diverges_the_others_go_on(train_here, monkeypatch, capsys):
    at_the_step_of(monkeypatch, [12], lambda parameters: parameters[0].fill_(math.inf))
    both = [*SMALL, '--mlp=moe,dense', '--out_dir=out/broken', '--log_interval=4']
    with pytest.raises(SystemExit) as exit:
        train.main(both)
    printed = capsys.readouterr()
    assert exit.value.code == 1
    assert 'out/broken/moe: expected finite numbers, got others by iteration 16' in printed.err
    assert '--name=' in printed.err and '--learning_rate=0.002' in printed.err
    assert load_checkpoint('out/broken/moe/ckpt.pt', 'cpu')['at']['iter'] == 10
    assert [entry['iter'] for entry in read_log('out/broken/moe/log.jsonl')] == [0, 10]
    assert [entry['iter'] for entry in read_log('out/broken/dense/log.jsonl')] == [0, 10, 20]
    assert table_of(printed.out)['moe'][2] == 'diverged at 16'
    with pytest.raises(SystemExit) as exit:                        # the cause is gone: it goes on
        train.main([*both, '--init_from=auto'])
    assert exit.value.code == 0
    assert 'diverged' not in table_of(capsys.readouterr().out)['moe'][2]


def test_weights_that_are_not_finite_are_not_saved(train_here, monkeypatch, capsys):
    at_the_step_of(monkeypatch, [9], lambda parameters: parameters[0].fill_(math.nan))
    with pytest.raises(SystemExit) as exit:
        train.main([*SMALL, '--mlp=dense', '--out_dir=out/not_saved'])
    assert exit.value.code == 1
    assert 'got others by iteration 10, ' in capsys.readouterr().err
    assert load_checkpoint('out/not_saved/dense/ckpt.pt', 'cpu')['at']['iter'] == 0


def test_a_full_disk_leaves_the_last_checkpoint_whole(train_here, workspace):
    """The disk is played by a limit on the size of a file, between a log's and a checkpoint's."""
    resource = pytest.importorskip('resource')                     # Windows has none
    train_here('--mlp=moe', '--out_dir=out/full', '--max_iters=10')
    before = weights('out/full/moe/ckpt.pt')
    process = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'train.py'), *SMALL, '--mlp=moe', '--out_dir=out/full',
         '--init_from=resume'], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    line = process.stderr.splitlines()[-1]
    assert process.returncode == 2 and 'Traceback' not in process.stderr
    assert line.startswith('error: out/full/moe/') and 'Is the disk full?' in line
    assert equal(weights('out/full/moe/ckpt.pt'), before)
    assert sorted(os.listdir('out/full/moe')) == FILES
    log = train_here('--mlp=moe', '--out_dir=out/full', '--init_from=resume')
    assert [entry['iter'] for entry in log] == [0, 10, 20]


def test_a_result_never_stands_under_settings_that_did_not_make_it(train_here, refuse):
    out, mlp = '--out_dir=out/settings', '--mlp=moe'
    train_here(mlp, out)
    before = snapshot('out/settings')
    for init in ('auto', 'resume'):
        line = refuse(train.main, *SMALL, mlp, out, f'--init_from={init}', '--learning_rate=9e-3',
                      '--batch_size=64', '--dropout=0.5', '--weight_decay=0.3', '--beta1=0.5')
        for told in ('learning_rate = 0.002 and not 0.009', 'batch_size = 8 and not 64', '--name=',
                     'dropout = 0.0 and not 0.5', 'weight_decay = 0.1 and not 0.3', 'beta1 = 0.9'):
            assert told in line
        assert 'seed = 1337 and not 7' in refuse(train.main, *SMALL, mlp, out, '--seed=7',
                                                 f'--init_from={init}')
    train_here(mlp, out, '--init_from=auto')                       # nothing left to do
    assert 'max_iters: expected at least the 20 iterations' in refuse(
        train.main, *SMALL, mlp, out, '--init_from=resume', '--max_iters=5')
    del before[pathlib.Path('out/settings/results.jsonl')]         # it is written anew
    assert {path: content for path, content in snapshot('out/settings').items()
            if path in before} == before


def snapshot(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def test_going_on_for_longer_keeps_the_schedule_and_says_so(train_here, capsys):
    train_here('--mlp=dense', '--out_dir=out/longer')
    train_here('--mlp=dense', '--out_dir=out/longer', '--init_from=resume', '--max_iters=30')
    assert 'the learning rate falls to 0.0002 at iteration 20:' in capsys.readouterr().out
    rates = [entry['lr'] for entry in read_log('out/longer/dense/log.jsonl')]
    assert rates[0] < 0.002 and rates[2:] == [0.0002, 0.0002]


def test_resuming_on_another_text_of_the_same_characters_is_refused(train_here, refuse, code_text):
    train_here('--mlp=dense', '--out_dir=out/text', '--max_iters=1')
    with open('turned.txt', 'w', encoding='utf-8', newline='') as file:
        file.write(code_text[::-1])
    run_script('prepare_data.py', 'turned.txt', cwd='.')
    resume = [*SMALL, '--mlp=dense', '--out_dir=out/text', '--dataset=turned']
    line = refuse(train.main, *resume, '--init_from=resume')
    assert 'expected what it was trained with, sha256 = ' in line
    with pytest.raises(SystemExit) as exit:                        # which writes nothing
        train.main([*resume, '--eval_only=True'])
    assert exit.value.code == 0


def test_a_run_that_another_process_has_trained_is_left_as_it_is(train_here, monkeypatch, capsys):
    """The other process trains dense while this one is at moe."""
    train_one = train.train
    monkeypatch.setattr(train, 'train', lambda run, stop: (
        train_one(run, stop), run.name == 'moe' and run_script(
            'train.py', *SMALL, '--mlp=dense', '--out_dir=out/other', '--max_iters=7', cwd='.')))
    with pytest.raises(SystemExit):
        train.main([*SMALL, '--mlp=moe,dense', '--out_dir=out/other'])
    assert 'another process trains it, or has; left as it is' in capsys.readouterr().out
    assert [entry['iter'] for entry in read_log('out/other/dense/log.jsonl')] == [0, 7]


def test_a_stop_before_the_first_evaluation_loses_nothing(train_here):
    stop = threading.Event()
    stop.set()
    arguments = ['--mlp=moe', '--out_dir=out/at_once']
    values, _ = configurator.parse(train.TrainConfig, [*SMALL, *arguments], '')
    train.train(train.plan_runs({}, values)[0], stop)
    assert [entry['iter'] for entry in train_here(*arguments, '--init_from=resume')] == [0, 10, 20]


def test_two_processes_never_train_one_run(train_here, refuse):
    os.makedirs('out/both/aoe')
    lock = train.make_folder(train.TrainConfig(out_dir='out/both'))
    line = refuse(train.main, *SMALL, '--mlp=aoe', '--out_dir=out/both')
    assert 'out/both/aoe: expected to be alone with this run' in line
    lock.close()
    train_here('--mlp=aoe', '--out_dir=out/both', '--max_iters=1')


@pytest.fixture
def rows(train_here, capsys):
    """rows(out_dir, *arguments) trains there; returns the table's first column and its losses."""
    def call(out_dir, *arguments):
        with pytest.raises(SystemExit) as exit:
            train.main([*SMALL, '--mlp=dense', f'--out_dir={out_dir}', *arguments])
        assert exit.value.code == 0
        table = table_of(capsys.readouterr().out)
        return {run: others[2] for run, others in table.items() if run != 'run'}
    return call


def test_only_what_is_alike_and_equally_far_is_averaged(rows, code_text):
    with open('other.txt', 'w', encoding='utf-8', newline='') as file:
        file.write(code_text[::-1])
    run_script('prepare_data.py', 'other.txt', cwd='.')
    assert list(rows('out/alike', '--seeds=1')) == ['dense']
    both = rows('out/alike', '--seeds=1,2', '--init_from=auto')
    assert list(both) == ['dense'] and '±' in both['dense']
    once_more = rows('out/alike', '--seed=1', '--eval_interval=5')
    assert '±' in once_more['dense']                               # seed 1 counts once
    found = rows('out/alike', '--seeds=3', '--dataset=other')
    assert len(found) == 2 and all(run.startswith('dense (sha256 ') for run in found)
    assert sorted('±' in loss for loss in found.values()) == [False, True]
    found = rows('out/far', '--seeds=1')
    found = rows('out/far', '--seeds=1,2', '--init_from=auto', '--max_iters=30')
    assert sorted(found) == ['dense (lr_decay_iters 20)', 'dense (lr_decay_iters 30)']
    found = rows('out/half', '--seeds=1', '--lr_decay_iters=20', '--max_iters=10')
    found = rows('out/half', '--seeds=2', '--lr_decay_iters=20')
    assert sorted(found) == ['dense (iter 10)', 'dense (iter 20)']
    found = rows('out/dtypes', '--seeds=1', '--dtype=float32')
    found = rows('out/dtypes', '--seeds=2', '--dtype=bfloat16')
    assert sorted(found) == ['dense (dtype bfloat16)', 'dense (dtype float32)']
    with open('out/dtypes/results.jsonl') as file:
        results = [json.loads(line) for line in file]
    assert {result['shape']['dtype'] for result in results} == {'float32', 'bfloat16'}


def test_a_run_keeps_the_dtype_that_auto_has_taken(train_here, monkeypatch):
    auto = ['--mlp=dense', '--dtype=auto']
    monkeypatch.setattr(train, 'bfloat16_gain', lambda *shape: 2.0)
    train_here(*auto, '--out_dir=out/kept', '--max_iters=10', '--lr_decay_iters=20')
    monkeypatch.setattr(train, 'bfloat16_gain', lambda *shape: 0.5)
    train_here(*auto, '--out_dir=out/kept', '--init_from=resume')
    assert load_checkpoint('out/kept/dense/ckpt.pt', 'cpu')['shape']['dtype'] == 'bfloat16'
    train_here(*auto, '--out_dir=out/other_side')
    assert load_checkpoint('out/other_side/dense/ckpt.pt', 'cpu')['shape']['dtype'] == 'float32'


def test_other_code_is_told_of_and_not_averaged(rows, train_here, monkeypatch, capsys):
    def code(text):
        monkeypatch.setattr(train, 'MODEL_HASH', text)
    code('one')
    rows('out/edited', '--seeds=1', '--max_iters=10', '--lr_decay_iters=20')
    code('two')
    with pytest.raises(SystemExit) as exit:
        train.main([*SMALL, '--mlp=dense', '--out_dir=out/edited', '--seeds=1',
                    '--max_iters=10', '--lr_decay_iters=20', '--init_from=auto'])
    assert exit.value.code == 0 and 'model.py is ' in capsys.readouterr().out
    found = rows('out/edited', '--seeds=1', '--lr_decay_iters=20', '--init_from=resume')
    assert list(found) == ['dense']
    found = rows('out/edited', '--seeds=2', '--lr_decay_iters=20')
    assert len(found) == 2 and all('(model.py ' in run for run in found)
    assert sum(' then ' in run for run in found) == 1


def test_a_key_that_an_older_run_lacks_has_its_default(train_here, refuse):
    train_here('--mlp=dense', '--out_dir=out/older', '--max_iters=10', '--lr_decay_iters=20')
    for path in ('out/older/dense/ckpt.pt', 'out/older/dense/best.pt'):
        checkpoint = load_checkpoint(path, 'cpu')
        del checkpoint['shape']['weigh_among']
        torch.save(checkpoint, path)
    resume = ['--mlp=dense', '--out_dir=out/older', '--lr_decay_iters=20', '--init_from=resume']
    assert 'weigh_among = chosen and not all' in refuse(train.main, *SMALL, *resume,
                                                        '--weigh_among=all')
    assert [entry['iter'] for entry in train_here(*resume)] == [0, 10, 20]
    run_script('sample.py', 'out/older/dense', '--max_new_tokens=2', cwd='.')


def test_a_run_without_its_checkpoint_is_never_written_over(train_here, refuse):
    train_here('--mlp=dense', '--out_dir=out/lost')
    os.remove('out/lost/dense/ckpt.pt')
    before = snapshot('out/lost/dense')
    for init_from in ('scratch', 'auto', 'resume'):
        line = refuse(train.main, *SMALL, '--mlp=dense', '--out_dir=out/lost',
                      f'--init_from={init_from}')
        assert 'out/lost/dense: expected ' in line and '--name=' in line
    assert snapshot('out/lost/dense') == before


def test_what_cannot_be_read_is_left_out_of_the_table(rows):
    for folder, config, log in (('cut', '{"name": "cu', '{"iter": 0}'), ('strange', '{}', ''),
                                ('odd', '{"name": "odd", "seed": 1, "shape": {}}', '[3]')):
        os.makedirs(f'out/odd/{folder}')
        for file, text in (('config.json', config), ('log.jsonl', log)):
            with open(f'out/odd/{folder}/{file}', 'w') as handle:
                handle.write(text)
    assert list(rows('out/odd')) == ['dense']


def test_loss_is_averaged_where_all_seeds_were_evaluated():
    import matplotlib.pyplot as plt
    logs = [[{'iter': i, 'val_loss': loss, 'seconds': pace * i} for i, loss in log]
            for pace, log in ((1, ((0, 4.0), (10, 3.0), (20, 2.0))),
                              (3, ((0, 4.2), (20, 2.4), (30, 1.0))))]
    figure = train.draw_loss(plt, {'moe': [({}, log) for log in logs]}, {'moe': 'black'})
    for axes, x in zip(figure.axes, ([0, 20], [0, 40])):
        line, = axes.lines
        assert line.get_xdata().tolist() == x
        assert line.get_ydata().tolist() == pytest.approx([4.1, 2.2])
        assert line.get_label() == 'moe 1.5000, mean of 2 seeds'
    plt.close(figure)


@pytest.mark.parametrize('name', ('a & b', 'ä中', '1e-3'))
def test_any_name_can_be_drawn(train_here, name, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train.main([*SMALL, '--mlp=aoe', '--max_iters=1', '--out_dir=out/names', f'--name={name}'])
    assert not exit.value.code
    import matplotlib.pyplot as plt
    figure = train.draw_loss(plt, train.find_runs('out/names'), dict.fromkeys(
        train.find_runs('out/names'), 'black'))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(name in label for label in labels)
    plt.close(figure)


def test_a_picture_that_cannot_be_made_is_told_and_stops_nothing(train_here, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(train_here.workspace)
    os.makedirs('out/open/loss.png')                               # as if another program had it
    with pytest.raises(SystemExit) as exit:
        train.main([*SMALL, '--mlp=moe', '--out_dir=out/open'])
    assert not exit.value.code
    printed = capsys.readouterr().out
    assert 'loss.png is not drawn: out/open/loss.png: expected to write it' in printed
    assert os.path.exists('out/open/final_loss.png')


def test_a_model_with_more_tokens_than_its_text_never_writes_them(train_here):
    train_here('--mlp=aoe', '--out_dir=out/padded', '--max_iters=1', '--vocab_size=300')
    printed = run_script('sample.py', 'out/padded/aoe', '--temperature=90', cwd='.').stdout
    assert len(printed) == 502


@pytest.mark.parametrize('width', ('--d_low=1', '--d_ffn=1'))
@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_experts_of_width_1_train(train_here, width, dtype):
    arguments = [width, f'--dtype={dtype}', '--mlp=moe' if 'ffn' in width else '--mlp=aoe']
    train_here(*arguments, f'--out_dir=out/thin{width}{dtype}', '--max_iters=2')


def test_sizes_that_cannot_be_are_refused(train_here, refuse):
    assert 'd_low: expected less, since Eq. 5 leaves no d_wide' in refuse(
        train.main, *SMALL, '--n_embd=64', '--mlp=aoe', '--d_ffn=8', '--d_low=64')
    assert 'd_low: expected None' in refuse(
        train.main, *SMALL, '--mlp=aoe', '--factorised=False', '--d_low=8')


def test_an_edit_of_the_experts_that_part_3_lacks_is_refused(train_here, refuse, monkeypatch):
    monkeypatch.setattr(train.model_file.F, 'silu', torch.relu)    # part 3's backward has its own
    line = refuse(train.main, *SMALL, '--mlp=aoe', '--out_dir=out/formula')
    assert 'expected part 3 to compute what SparseMLP.experts does' in line
    train_here('--mlp=aoe', '--out_dir=out/formula', '--plain=True', '--max_iters=2')


def test_active_experts_follow_the_rule(train_here, capsys):
    def active(*arguments):
        config = train.plan_runs({'vocab_size': 84, 'n_embd': 64}, configurator.parse(
            train.TrainConfig, ['--mlp=moe', *arguments], '')[0])[0]
        return train.GPT(config).active_parameters()
    everything = active('--top_k=8')
    assert active('--select=expert_choice', '--capacity_factor=8') == everything
    assert active('--select=expert_choice', '--capacity_factor=99') == everything
    assert active('--select=expert_choice', '--capacity_factor=2') == active('--top_k=2')
    assert active('--select=top_p') == everything


def test_second_derivatives_are_refused():
    layer = MLPS['aoe'](GPTConfig(n_embd=16, n_head=1, d_ffn=24, d_low=8))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(6, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match='plain=True has second ones'):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize('command', (['train.py', '--help'], ['sample.py', 'out/piped/aoe'],
                                     ['prepare_data.py', '--help']))
def test_a_reader_that_goes_away_ends_a_script_quietly(train_here, command):
    if not os.path.exists('out/piped'):
        train_here('--mlp=aoe', '--out_dir=out/piped', '--max_iters=1')
    script = [sys.executable, os.path.join(ROOT, command[0]), *command[1:]]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()                                         # as `| head -c 0` does
    assert process.stderr.read() == b'' and process.wait() in (0, 141)


@pytest.mark.parametrize('encoding', ('cp1252', 'ascii'))
def test_a_terminal_that_lacks_characters_gets_others(train_here, encoding):
    train_here('--mlp=aoe', f'--out_dir=out/{encoding}', '--max_iters=1')
    environment = os.environ | {'PYTHONIOENCODING': encoding}
    process = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'sample.py'), f'out/{encoding}/aoe', '--temperature=9',
         '--show_experts=True'], env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr


def test_an_evaluation_sees_no_token_many_times(train_here, workspace):
    config = train.TrainConfig(dataset='code', data_dir=str(workspace / 'data'), block_size=64,
                               batch_size=8, eval_iters=10_000)
    data = train.Data(config, torch.device('cpu'))
    for split in ('train', 'val'):
        seen = sum(idx.numel() for idx, _ in data.eval_batches(split))
        assert len(data.tokens[split]) <= seen <= len(data.tokens[split]) + 64 * 8


@pytest.fixture
def low_scale(monkeypatch):
    """A loss scale at which nothing overflows by itself, whatever the text."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=1024.0)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)


def test_float16_ends_near_float32_and_skips_what_overflows(train_here, low_scale, monkeypatch):
    arguments = ['--mlp=aoe', '--aux_weight=0.01', '--gradient_accumulation_steps=2',
                 '--max_iters=40']
    exact = train_here(*arguments, '--out_dir=out/fp32', '--dtype=float32')
    half = train_here(*arguments, '--out_dir=out/fp16', '--dtype=float16')
    for a, b in zip(exact, half):
        assert b['val_loss'] == pytest.approx(a['val_loss'], abs=0.02)
    snapshots = []
    monkeypatch.setattr(torch.amp, 'GradScaler', functools.partial(torch.amp.GradScaler.func,
                                                                   init_scale=2.0 ** 26))
    at_the_step_of(monkeypatch, range(40), lambda parameters: snapshots.append(
        torch.cat([p.flatten() for p in parameters])))
    skipping = train_here(*arguments, '--out_dir=out/skipped', '--dtype=float16')
    unchanged = [torch.equal(a, b) for a, b in zip(snapshots, snapshots[1:])]
    assert unchanged[:2] == [True, True] and not any(unchanged[30:])
    assert skipping[-1]['val_loss'] < skipping[0]['val_loss'] - 0.3


def test_float16_stopped_and_resumed_is_the_same(train_here, low_scale):
    more = ['--mlp=moe', '--dtype=float16', '--dropout=0.1', '--lr_decay_iters=20']
    whole = train_here(*more, '--out_dir=out/half-whole')
    train_here(*more, '--out_dir=out/half', '--max_iters=10')
    assert train_here(*more, '--out_dir=out/half', '--init_from=resume') == whole
    scales = [load_checkpoint(f'out/half{end}/moe/ckpt.pt', 'cpu')['scaler']
              for end in ('', '-whole')]
    assert scales[0] == scales[1] and scales[0]['_growth_tracker'] == 20


@pytest.mark.parametrize('kind, capable, expected', (
    ('cuda', True, 'bfloat16'), ('cuda', False, 'float16'), ('mps', True, 'float32')))
def test_auto_takes_the_dtype_that_is_native(monkeypatch, kind, capable, expected):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: capable)
    assert train.fast_dtype(train.TrainConfig(), torch.device(kind)) == expected


def test_mps_is_taken_from_the_version_on_that_is_right(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch, '__version__', '2.14.0')
    assert train.choose_device('auto').type == 'mps'
    monkeypatch.setattr(torch, '__version__', '2.13.1+x')
    assert train.choose_device('auto').type == 'cpu'
    with pytest.raises(configurator.UserError, match='device: expected auto or one of cpu'):
        train.choose_device('mps')


def test_the_gain_of_bfloat16_is_measured(monkeypatch):
    """On a clock by which a matmul in bfloat16 takes a third of the time, or five times as long."""
    for factor, name in ((1 / 3, 'bfloat16'), (5.0, 'float32')):
        now, matmul = [0.0], torch.Tensor.__matmul__

        def slow(a, b, factor=factor, now=now, matmul=matmul):
            now[0] += 0.01 * (factor if a.dtype == torch.bfloat16 else 1)
            return matmul(a, b)
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, '__matmul__', slow)
            m.setattr(train.time, 'perf_counter', lambda now=now: now[0])
            train.bfloat16_gain.cache_clear()
            assert train.fast_dtype(train.TrainConfig(), torch.device('cpu')) == name
            assert train.bfloat16_gain(256, 128, 512) == pytest.approx(1 / factor)
    train.bfloat16_gain.cache_clear()


def test_a_busy_machine_is_told_of_in_one_line(monkeypatch, capsys):
    for load, told in ((0.5, False), (os.cpu_count() + 1.5, True)):
        monkeypatch.setattr(os, 'getloadavg', lambda load=load: (load, 0, 0), raising=False)
        train.tell_if_busy([{}, {}])
        line = capsys.readouterr().out
        assert ('a process a core, --threads=1' in line) == told and len(line) <= 81
    monkeypatch.delattr(os, 'getloadavg')                          # as on Windows
    train.tell_if_busy([{}, {}])


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_nothing_in_a_checkpoint_is_run(train_here, refuse):
    train_here('--mlp=moe', '--out_dir=out/bomb', '--max_iters=1')
    for file in ('ckpt.pt', 'best.pt'):
        torch.save({'model': Bomb(), 'shape': {}, 'meta': {}}, f'out/bomb/moe/{file}')
    for line in (refuse(train.main, *SMALL, '--mlp=moe', '--out_dir=out/bomb',
                        '--init_from=resume'), refuse(sample.main, 'out/bomb/moe')):
        assert 'expected a checkpoint of this train.py, got a damaged or foreign file' in line
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('mlp', ('aoe', 'dense'))
def test_two_processes_train_like_one(workspace, mlp):
    """The same batches, dropout and mean of the gradients: equal but for the order of additions."""
    command = [*SMALL, f'--mlp={mlp}', '--aux_weight=0.01', '--dropout=0.1',
               '--gradient_accumulation_steps=4', '--dtype=float32']
    run_script('train.py', *command, f'--out_dir=out/one-{mlp}', cwd=workspace)
    process = run_script('train.py', *command, f'--out_dir=out/two-{mlp}', cwd=workspace,
                         processes=2)
    one, two = (read_log(workspace / f'out/{name}-{mlp}/{mlp}/log.jsonl')
                for name in ('one', 'two'))
    for log in one, two:
        assert [entry['tokens'] for entry in log] == [0, 5120, 10240]
    for a, b in zip(one, two):
        assert b['train_loss'] == pytest.approx(a['train_loss'], abs=1e-4)
        assert b['val_loss'] == pytest.approx(a['val_loss'], abs=1e-4)
    evaluations = [line for line in process.stdout.splitlines() if 'val loss' in line]
    assert sum('iteration' in line for line in evaluations) == 3   # one of the two prints


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_like_one_that_is_not(workspace):
    """Every second kill comes while a file is being written, the others at any time. Seconds
    differ, nothing else may."""
    moments = random.Random(1)
    command = [*SMALL, '--mlp=aoe', '--max_iters=600', '--eval_interval=20', '--dropout=0.1',
               '--init_from=auto']
    run_script('train.py', *command, '--out_dir=out/undisturbed', cwd=workspace)
    folder = workspace / 'out/killed/aoe'
    while_writing = 0
    for attempt in range(20):
        script = [sys.executable, os.path.join(ROOT, 'train.py'), *command, '--out_dir=out/killed']
        process = subprocess.Popen(script, cwd=workspace, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(3, 6))
        if attempt % 2:
            until = time.monotonic() + 20
            while time.monotonic() < until and not while_writing_a_file(folder):
                pass
        process.kill()
        process.wait()
        while_writing += bool(folder.exists() and while_writing_a_file(folder))
        if (folder / 'ckpt.pt').exists():
            load_checkpoint(folder / 'ckpt.pt', 'cpu')             # raises if it is damaged
    assert while_writing > 0
    run_script('train.py', *command, '--out_dir=out/killed', cwd=workspace)
    timed = ('seconds',)
    killed, whole = ([{key: value for key, value in entry.items() if key not in timed}
                      for entry in read_log(workspace / f'out/{name}/aoe/log.jsonl')]
                     for name in ('killed', 'undisturbed'))
    assert [entry['iter'] for entry in whole] == list(range(0, 601, 20))
    assert killed == whole
    assert equal(weights(folder / 'ckpt.pt'), weights(workspace / 'out/undisturbed/aoe/ckpt.pt'))
    assert sorted(os.listdir(folder)) == FILES


def while_writing_a_file(folder):
    return folder.exists() and any(name.endswith('.part') for name in os.listdir(folder))
