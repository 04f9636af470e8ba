"""A run that can be trusted: the same from the same seed, exact after a stop, never written over,
averaged with its like alone, and it says what broke."""

import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import configurator
import prepare_data
import sample
import train
from conftest import ROOT, SMALL, run_here, run_script, table_of
from sample import as_lines, group, load_checkpoint, read_log

FILES = ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']


def weights(folder):
    return load_checkpoint(f'{folder}/ckpt.pt', 'cpu')['model']


def equal(a, b):
    """Whether two dicts of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def losses(log):
    return [(entry['iter'], entry['train_loss'], entry['val_loss']) for entry in log]


def at_the_step_of(monkeypatch, iterations, act):
    """Call act(parameters) in these iterations, between their gradients and their steps."""
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count()

    @torch.no_grad()
    def act_and_clip(parameters, limit):
        parameters = list(parameters)
        if next(calls) in iterations:
            act(parameters)
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', act_and_clip)


# -----------------------------------------------------------------------------
# the same, and whole

@pytest.mark.parametrize('mlp, more', (
    ('dense', []), ('moe', []), ('aoe', []), ('aoe', ['--factorised=False', '--select=top_p']),
    ('moe', ['--select=expert_choice', '--conf_weight=1e-3'])))
def test_stopping_evaluating_and_recomputing_change_nothing(train_here, mlp, more):
    out = f'out/halves-{mlp}{len(more)}'
    more = [f'--mlp={mlp}', *more, '--aux_weight=0.01', '--dropout=0.1', '--lr_decay_iters=20',
            '--gradient_accumulation_steps=2']
    whole = train_here(*more, f'--out_dir={out}-whole', '--eval_interval=5')
    first = train_here(*more, f'--out_dir={out}', '--max_iters=10', '--recompute=True')
    assert read_log(f'{out}/{mlp}')[-1]['tokens'] == 10 * 2 * 8 * 16
    both = train_here(*more, f'--out_dir={out}', '--init_from=resume')
    assert [entry['iter'] for entry in whole] == [0, 5, 10, 15, 20]
    assert first == both[:2] and losses(both) == losses(whole)[::2] and both[-1] == whole[-1]
    assert equal(weights(f'{out}/{mlp}'), weights(f'{out}-whole/{mlp}'))


@pytest.mark.parametrize('mlp', ('aoe', 'moe', 'dense'))
def test_two_hundred_iterations_teach_something(train_here, mlp):
    """From 4.5 nats a character, ln of the vocabulary, to 2.9; by their frequency alone: 3.4."""
    log = train_here(f'--mlp={mlp}', f'--out_dir=out/taught-{mlp}', '--max_iters=200',
                     '--eval_interval=200', '--eval_iters=20')
    assert log[0]['val_loss'] > 4 and log[1]['val_loss'] < 3.1


def test_a_stop_before_the_first_evaluation_loses_nothing(train_here):
    arguments = ['--mlp=moe', '--out_dir=out/at_once']
    run, = train.plan_runs({}, configurator.parse(train.TrainConfig, [*SMALL, *arguments], '')[0])
    train.settle(run, 1)
    os.makedirs(run.folder)
    train.train(run, SimpleNamespace(value=signal.SIGINT), lambda *_: None)
    assert sorted(os.listdir(run.folder)) == ['ckpt.pt', 'config.json', 'log.jsonl']
    assert [entry['iter'] for entry in train_here(*arguments, '--init_from=resume')] == [0, 10, 20]


def test_a_full_disk_leaves_the_last_checkpoint_whole(train_here, monkeypatch, refuse):
    more = ['--mlp=moe', '--out_dir=out/full', '--lr_decay_iters=20']
    train_here(*more, '--max_iters=10')
    before, write = weights('out/full/moe'), torch.save

    def half(content, path):
        write(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', half)
        line = refuse(train.main, *SMALL, *more, '--init_from=resume')
    assert line.startswith('error: out/full/moe/ckpt.pt: expected to write it')
    assert equal(weights('out/full/moe'), before) and sorted(os.listdir('out/full/moe')) == FILES
    pathlib.Path('out/full/moe/ckpt.pt.12.part').write_bytes(b'half')      # left by a kill -9
    assert [entry['iter'] for entry in train_here(*more, '--init_from=resume')] == [0, 10, 20]
    assert sorted(os.listdir('out/full/moe')) == FILES


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_a_foreign_checkpoint_is_refused_and_nothing_in_it_is_run(train_here, refuse):
    more = ['--mlp=moe', '--out_dir=out/bomb', '--init_from=auto', '--max_iters=20']
    train_here(*more, '--max_iters=10', '--lr_decay_iters=20')
    whole = torch.load('out/bomb/moe/ckpt.pt')
    for key, value in (
            ('model', Bomb()), ('model', {}), ('meta', 3), ('recipe', {}), ('recipe', {'mlp': 5}),
            ('optimizer', {}), ('optimizer', {'state': {}, 'param_groups': []}), ('iter', 'x'),
            ('seconds', 'x'), ('log', [3]), ('log', [{'iter': 0, 'val_loss': 'low'}])):
        torch.save(whole | {key: value}, 'out/bomb/moe/ckpt.pt')
        before = snapshot('out/bomb')
        line = refuse(train.main, *SMALL, *more)
        assert 'out/bomb/moe/ckpt.pt: expected ' in line and '--name=' in line, (key, value)
        assert snapshot('out/bomb') == before
    torch.save({'model': Bomb(), 'recipe': {}, 'meta': {}}, 'out/bomb/moe/best.pt')
    assert 'expected a checkpoint of this train.py' in refuse(sample.main, 'out/bomb/moe')
    assert not os.path.exists('exploded')


# -----------------------------------------------------------------------------
# what is not finite

def test_where_one_run_diverges_the_others_go_on_and_it_never_does(train_here, monkeypatch):
    both = [*SMALL, '--mlp=moe,dense', '--out_dir=out/broken', '--log_interval=4']
    with monkeypatch.context() as patch:
        at_the_step_of(patch, [12], lambda parameters: parameters[0].fill_(math.inf))
        process = run_here(train.main, *both, check=False)
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert process.stderr.startswith('error: out/broken/moe: expected finite losses and weights, '
                                     'got others by iteration 16. ')
    assert '--name=' in process.stderr and '--learning_rate=0.002\n' in process.stderr
    assert load_checkpoint('out/broken/moe/ckpt.pt', 'cpu')['iter'] == 10
    assert [entry['iter'] for entry in read_log('out/broken/moe')] == [0, 10]
    assert [entry['iter'] for entry in read_log('out/broken/dense')] == [0, 10, 20]
    before = snapshot('out/broken')
    for init_from in ('auto', 'resume'):                           # it isn't tried again
        again = run_here(train.main, *both, f'--init_from={init_from}', check=False)
        assert again.returncode == 1 and again.stderr == (
            'error: out/broken/moe: has diverged; --name= trains anew\n')
        assert snapshot('out/broken') == before
    for printed in (process.stdout, again.stdout, run_here(sample.main, 'out/broken').stdout):
        assert {name: row[1] for name, row in table_of(printed).items()} == {
            'run': 'val loss', 'dense': f'{read_log("out/broken/dense")[-1]["val_loss"]:.4f}',
            'moe (diverged at 16)': 'diverged'}
    lines = map(json.loads, pathlib.Path('out/broken/results.jsonl').read_text().splitlines())
    assert {line['run']: line.get('diverged') for line in lines} == {'moe': 16, 'dense': None}


@pytest.mark.parametrize('at', (0, 1))
def test_an_evaluation_that_is_not_finite_is_no_result(train_here, monkeypatch, at):
    """Weights are finite, but what they compute is not. Before the first step there is no result
    at all, and no noise about it."""
    entries, evaluate = [], train.evaluate

    def wrong(*arguments):
        entries.append(evaluate(*arguments))
        return entries[-1] | ({'val_loss': math.nan} if len(entries) == at + 1 else {})
    monkeypatch.setattr(train, 'evaluate', wrong)
    process = run_here(train.main, *SMALL, '--mlp=moe', f'--out_dir=out/unfit{at}', check=False)
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert f'got others by iteration {10 * at}' in process.stderr
    assert not re.search('left out|nan|not drawn', process.stdout)
    assert os.path.exists(f'out/unfit{at}/moe/ckpt.pt') == bool(at)


# -----------------------------------------------------------------------------
# going on

def test_a_result_never_stands_under_settings_that_did_not_make_it(train_here, refuse):
    more = ['--mlp=moe', '--out_dir=out/settings']
    train_here(*more)
    checkpoint = torch.load('out/settings/moe/ckpt.pt')
    checkpoint['recipe']['processor'] = 'another'
    torch.save(checkpoint, 'out/settings/moe/ckpt.pt')
    before = snapshot('out/settings')
    for init in ('auto', 'resume'):
        line = refuse(train.main, *SMALL, *more, f'--init_from={init}', '--learning_rate=9e-3',
                      '--batch_size=64', '--dropout=0.5', '--weight_decay=0.3', '--beta1=0.5',
                      '--eval_interval=5', '--seed=7', '--n_layer=3')
        for told in ('learning_rate = 0.002 and not 0.009', 'batch_size = 8 and not 64', '--name=',
                     'dropout = 0.0 and not 0.5', 'weight_decay = 0.1 and not 0.3', 'beta1 = 0.9',
                     'eval_interval = 10 and not 5', 'seed = 1337 and not 7', 'n_layer = 2 and'):
            assert told in line
    train_here(*more, '--init_from=auto')                          # nothing left to do
    assert 'max_iters: expected at least the 20 iterations' in refuse(
        train.main, *SMALL, *more, '--init_from=resume', '--max_iters=5')
    assert snapshot('out/settings') == before
    # but it may go on for longer, with the same schedule, on another machine; and says so
    printed = run_here(train.main, *SMALL, *more, '--init_from=resume', '--max_iters=30').stdout
    assert 'the learning rate falls to 0.0002 at iteration 20 ' in printed
    assert ' now, and was another' in printed
    assert [entry['lr'] for entry in read_log('out/settings/moe')][2:] == [0.0002, 0.0002]


def test_a_run_keeps_the_dtype_that_auto_has_taken(train_here, monkeypatch):
    auto = ['--mlp=dense', '--dtype=auto', '--lr_decay_iters=20']
    for flags, out, kept in (('avx512_bf16', 'kept', 'bfloat16'), ('avx2', 'kept', 'bfloat16'),
                             ('avx2', 'other', 'float32')):
        monkeypatch.setattr(configurator, 'cpu_info', lambda flags=flags: flags)
        log = train_here(*auto, f'--out_dir=out/{out}', '--init_from=auto',
                         f'--max_iters={10 if "bf16" in flags else 20}')
        assert load_checkpoint(f'out/{out}/dense/ckpt.pt', 'cpu')['recipe']['dtype'] == kept
    assert log[-1]['iter'] == 20


@pytest.mark.parametrize('key', ('model.py', 'train.py', 'processor'))
def test_other_code_and_another_processor_are_told_and_not_averaged(train_here, monkeypatch, key):
    def here(text):
        if key == 'processor':
            monkeypatch.setattr(train, 'processor_name', lambda device: text)
        else:
            monkeypatch.setitem(train.HASHES, key, text)

    def rows(*arguments):
        process = run_here(train.main, *SMALL, '--mlp=dense', f'--out_dir=out/edited_{key}',
                           '--lr_decay_iters=20', *arguments)
        return process.stdout, sorted(table_of(process.stdout))
    here('one')
    rows('--seeds=1,2', '--max_iters=10')
    here('two')
    printed, found = rows('--seeds=1', '--init_from=resume')
    expected = [f'dense ({key} one, then two)', f'dense ({key} one, to 10)', 'run']
    assert f'{key} is two now, and was one' in printed and found == expected
    assert rows('--seeds=3')[1] == [*expected[:2], f'dense ({key} two)', 'run']


def test_a_run_that_is_stopped_in_its_last_iteration_is_evaluated_when_it_goes_on(
        train_here, monkeypatch):
    def last(state, iterate=train.one_iteration):
        if state.iteration == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(state)
    more = ['--mlp=moe', '--out_dir=out/last']
    with monkeypatch.context() as patch:
        patch.setattr(train, 'one_iteration', last)
        assert run_here(train.main, *SMALL, *more, check=False).returncode == 128 + signal.SIGTERM
    log = train_here(*more, '--init_from=resume')
    assert log[-1]['iter'] == 20 and 'test_loss' in log[-1] and log[-2]['iter'] == 10


def test_a_table_tells_what_differs_and_over_which_seeds_it_compares(train_here):
    more = [*SMALL, '--out_dir=out/unlike']
    run_here(train.main, *more, '--mlp=moe', '--seeds=1,2')
    printed = run_here(train.main, *more, '--mlp=aoe', '--seeds=2,3').stdout
    assert 'aoe: minus moe over the seeds 2 alone' in printed and 'these runs differ' not in printed
    printed = run_here(train.main, *more, '--mlp=dense', '--seeds=2', '--eval_iters=1').stdout
    assert 'these runs differ in eval_iters\n' in printed


# -----------------------------------------------------------------------------
# results

@pytest.fixture
def rows(train_here):
    """rows(out_dir, *arguments) trains there; returns the table's first column and its losses."""
    def call(out_dir, *arguments):
        table = table_of(run_here(train.main, *SMALL, '--mlp=dense', f'--out_dir={out_dir}',
                                  '--max_iters=4', *arguments).stdout)
        return {run: others[1] for run, others in table.items() if run != 'run'}
    return call


def test_only_what_is_alike_and_equally_far_is_averaged(rows, refuse, monkeypatch, code_text):
    assert list(rows('out/alike', '--seeds=1')) == ['dense']
    assert '±' in rows('out/alike', '--seeds=1,2', '--init_from=auto')['dense']
    # the same characters in another order, or split elsewhere
    for name, text, fraction, key in (('turned', code_text[::-1], 0.1, 'sha256'),
                                      ('split', code_text, 0.2, 'train_tokens')):
        pathlib.Path(f'{name}.txt').write_text(text, encoding='utf-8', newline='')
        monkeypatch.setattr(prepare_data, 'VAL_FRACTION', fraction)
        run_here(prepare_data.main, f'{name}.txt')
        other = [*SMALL, '--mlp=dense', '--out_dir=out/alike', '--seeds=1', f'--dataset={name}']
        line = refuse(train.main, *other, '--init_from=resume')
        assert f'expected what it was trained with, {key} = ' in line
        printed = run_here(train.main, *other, '--eval_only=True').stdout
        assert f'out/alike/dense-1: evaluated with {key} = ' in printed
    for more, one, other in ((['--dataset=turned'], 'sha256 ', 'sha256 '),
                             (['--dataset=split'], 'train_tokens ', 'train_tokens '),
                             (['--max_iters=2', '--lr_decay_iters=4'], 'to 2)', ''),
                             (['--eval_interval=5'], 'eval_interval 10', 'eval_interval 5'),
                             (['--dtype=bfloat16'], 'dtype bfloat16', 'dtype float32')):
        found = rows('out/alike', '--seeds=3', *more)
        assert sorted('±' in loss for loss in found.values()) == [False, True]
        assert len(found) == 2 and one in ' '.join(found) and other in ' '.join(found)
        shutil.rmtree('out/alike/dense-3')


def test_a_run_in_two_folders_counts_once_and_different_results_of_one_are_an_error(rows, refuse):
    assert list(rows('out/twice', '--seed=1')) == ['dense']
    both = rows('out/twice', '--seeds=1,2')
    assert both == rows('out/once', '--seeds=1,2') and '±' in both['dense']
    log = read_log('out/twice/dense')
    log[-1]['val_loss'] -= 0.5
    pathlib.Path('out/twice/dense/log.jsonl').write_text(as_lines(log))
    line = refuse(sample.main, 'out/twice')
    assert 'out/twice/dense-1: expected what out/twice/dense has' in line and 'remove one' in line


def test_results_jsonl_keeps_the_lines_of_runs_whose_folders_are_gone(rows):
    path = pathlib.Path('out/gone/results.jsonl')
    rows('out/gone', '--seeds=1,2,3')
    lines = path.read_text().splitlines()
    for seed, result in enumerate(map(json.loads, lines), 1):
        losses = [entry['val_loss'] for entry in read_log(f'out/gone/dense-{seed}')]
        assert (result['seed'], result['val_loss']) == (seed, losses[-1])
        assert result['lowest_val_loss'] == min(losses)
    shutil.rmtree('out/gone/dense-1')
    shutil.rmtree('out/gone/dense-2')
    path.write_text(path.read_text() + 'a line of another program\n')
    assert rows('out/gone', '--seeds=2', '--eval_interval=5').keys() == {
        'dense (eval_interval 10)', 'dense (eval_interval 5)'}     # those that are there
    run_here(sample.main, 'out/gone')
    now = path.read_text().splitlines()
    assert {*lines, 'a line of another program'} < {*now} and len(now) == 5


def result(run='moe', seed=1, iter=20, diverged=None, loss=1.0, **recipe):
    return {'run': run, 'seed': seed, 'iter': iter, 'recipe': {'mlp': 'moe', 'seed': seed} | recipe,
            'val_loss': loss, 'lowest_val_loss': loss, 'from': f'out/{run}-{seed}'} | (
                {'diverged': diverged} if diverged else {})


@pytest.mark.parametrize('results, expected', (
    ([result(), result(seed=2), result('aoe')], {'moe': [1, 2], 'aoe': [1]}),
    ([result(top_k=2), result(seed=2, top_k=1), result('aoe', top_k=4)],
     {'moe (top_k 2)': [1], 'moe (top_k 1)': [2], 'aoe': [1]}),
    ([result(a=1, b=2), result(a=1, b=3), result(a=2, b=2)],
     {'moe (a 1, b 2)': [1], 'moe (a 1, b 3)': [1], 'moe (a 2, b 2)': [1]}),
    ([result(), result('aoe', iter=30)], {'moe (to 20)': [1], 'aoe': [1]}),
    ([result(), result(seed=2, diverged=7)], {'moe': [1], 'moe (diverged at 7)': [2]}),
    ([result(a=0.0), result(seed=2, a=-0.0)], {'moe': [1, 2]}),    # equal, but not as text
    ([result(a=[1]), result(a=[2])], {'moe (a [1])': [1], 'moe (a [2])': [1]}),   # a tuple of yours
    ([result()], {'moe': [1]})))
def test_a_label_says_what_differs(results, expected):
    assert {name: list(seeds) for name, seeds in group(results).items()} == expected


@pytest.mark.parametrize('one, other, rows', (
    ({'key': None}, {}, 1), ({}, {'key': None}, 1),                # of before there was that key
    ({'processor': 50 * 'x' + '1'}, {'processor': 50 * 'x' + '2'}, 2)))
def test_no_result_is_lost_where_labels_are_alike(one, other, rows):
    runs = group([result(**one), result(seed=2, **other)])
    assert sorted(seed for seeds in runs.values() for seed in seeds) == [1, 2] and len(runs) == rows
    # both diverged at 30, but were evaluated last at different iterations
    runs = group([result(**one) | {'iter': 25, 'diverged': 30},
                  result(seed=2, **one) | {'iter': 20, 'diverged': 30}])
    assert [sorted(seeds) for seeds in runs.values()] == [[1, 2]]


def test_what_cannot_be_read_is_left_out_of_the_table(rows):
    rows('out/odd', '--seed=1')
    good = json.loads(pathlib.Path('out/odd/dense/config.json').read_text())
    log = pathlib.Path('out/odd/dense/log.jsonl').read_text()
    config = json.dumps(good)
    odd = {'cut': ('{"run": "cu', log), 'list': ('[]', log), 'strange': ('{}', log),
           'empty': (config, ''), 'number': (config, '[3]'),
           'text': (config, log.replace('"val_loss": ', '"val_loss": "low", "x": ')),
           'control': (json.dumps(good | {'run': 'a\x1b[2J'}), log),
           'pipe': (json.dumps(good | {'run': 'a | b'}), log), 'esc\x1b[2J': ('', '')}
    for folder, texts in odd.items():
        os.makedirs(f'out/odd/{folder}')
        pathlib.Path(f'out/odd/{folder}/config.json').write_text(texts[0])
        pathlib.Path(f'out/odd/{folder}/log.jsonl').write_text(texts[1])
    printed = run_here(sample.main, 'out/odd').stdout
    assert list(table_of(printed)) == ['run', 'dense'] and '\x1b' not in printed
    assert printed.count(' is left out: ') == len(odd)


def test_a_run_that_ends_above_its_lowest_loss_says_so(train_here, monkeypatch):
    at_the_step_of(monkeypatch, [15], lambda parameters: parameters[0].mul_(-1))
    printed = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/worse').stdout
    log = read_log('out/worse/dense')
    assert f'dense ended at {log[-1]["val_loss"]:.4f}, above its lowest' in printed
    assert table_of(printed)['dense'][1] == f'{log[1]["val_loss"]:.4f}'
    assert not equal(weights('out/worse/dense'), torch.load('out/worse/dense/best.pt')['model'])


def test_loss_is_averaged_where_all_seeds_were_evaluated():
    seeds = {pace: {'log': [{'iter': i, 'val_loss': loss, 'seconds': pace * i} for i, loss in log],
                    'val_loss': log[-1][1], 'lowest_val_loss': log[-1][1]}
             for pace, log in ((1, ((0, 4.0), (10, 3.0), (20, 2.0))),
                               (3, ((0, 4.2), (20, 2.4), (30, 1.0))))}
    figure = sample.draw_loss({'moe': seeds}, {'moe': 'black'})
    for axes, x in zip(figure.axes, ([0, 20], [0, 40])):
        line, = axes.lines
        assert line.get_xdata().tolist() == x and line.get_color() == 'black'
        assert line.get_ydata().tolist() == pytest.approx([4.1, 2.2])
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == 'moe 1.5000, 2 seeds'


@pytest.mark.filterwarnings('ignore:Glyph')
def test_any_name_can_be_drawn_and_a_picture_that_cannot_be_is_told(workspace):
    name = '1e-3, ä中 50 %'
    os.makedirs(workspace / 'out/open/norm.png')                   # as if another program had it
    printed = run_here(train.main, *SMALL, '--max_iters=1', '--out_dir=out/open', f'--name={name}',
                       cwd=workspace).stdout
    assert [line for line in printed.splitlines() if 'not drawn' in line] == [
        line for line in printed.splitlines() if line.startswith('norm.png is not drawn: out/open')]
    assert (workspace / 'out/open/expert_load.png').exists() and name in table_of(printed)


# -----------------------------------------------------------------------------
# dtypes and devices

def scale(monkeypatch, init_scale):
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: torch.GradScaler(
        device, enabled=enabled, init_scale=init_scale))


@pytest.mark.slow
def test_float16_ends_near_float32_also_when_it_was_stopped(train_here, monkeypatch):
    more = ['--mlp=aoe', '--aux_weight=0.01', '--gradient_accumulation_steps=2', '--dropout=0.1',
            '--lr_decay_iters=20']
    scale(monkeypatch, 1024.0)           # nothing overflows by itself, whatever the text
    exact = train_here(*more, '--out_dir=out/fp32')
    whole = train_here(*more, '--out_dir=out/fp16', '--dtype=float16')
    for a, b in zip(exact, whole):
        assert a['val_loss'] != b['val_loss'] == pytest.approx(a['val_loss'], abs=0.02)
    train_here(*more, '--out_dir=out/half', '--dtype=float16', '--max_iters=10')
    halves = train_here(*more, '--out_dir=out/half', '--dtype=float16', '--init_from=resume')
    assert losses(halves) == losses(whole)
    for out in ('half', 'fp16'):
        saved = load_checkpoint(f'out/{out}/aoe/ckpt.pt', 'cpu')['scaler']
        assert (saved['scale'], saved['_growth_tracker']) == (1024.0, 20)


def test_float16_skips_what_overflows_and_shows_at_an_evaluation_what_diverges(
        train_here, monkeypatch):
    before, more = [], [*SMALL, '--mlp=dense', '--dtype=float16', '--log_interval=1']
    scale(monkeypatch, 2.0 ** 26)
    at_the_step_of(monkeypatch, range(30), lambda parameters: before.append(
        torch.cat([p.flatten() for p in parameters])))
    run_here(train.main, *more, '--max_iters=30', '--out_dir=out/skipped')
    unchanged = [torch.equal(a, b) for a, b in zip(before, before[1:])]
    assert unchanged[:2] == [True, True] and not all(unchanged[20:])
    scale(monkeypatch, 1.0)
    diverged = run_here(train.main, *more, '--out_dir=out/high16', '--learning_rate=1e6',
                        '--grad_clip=0', check=False)
    assert re.search('got others by iteration [12]0. ', diverged.stderr)   # and not between them


def test_what_auto_takes(monkeypatch):
    def dtype(kind):
        return configurator.fast_dtype(torch.device(kind))

    for flags, expected in (('flags\t\t: fpu avx512_bf16 amx_tile', 'bfloat16'),
                            ('flags\t\t: fpu avx512f', 'float32'), ('', 'float32')):
        monkeypatch.setattr(configurator, 'cpu_info', lambda flags=flags: flags)
        assert dtype('cpu') == expected
    for native, expected in ((True, 'bfloat16'), (False, 'float16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                            lambda including_emulation, native=native: native)
        assert dtype('cuda') == expected and dtype('mps') == 'float32'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch, 'empty', lambda *size, device: None)        # as if it were there
    for version, expected in (('2.14.0', 'mps'), ('2.13.1+x', 'cpu')):     # right from 2.14 on
        monkeypatch.setattr(torch, '__version__', version)
        assert configurator.choose_device('auto').type == expected


# -----------------------------------------------------------------------------
# as programs

@pytest.mark.slow
@pytest.mark.parametrize('line, statuses', (
    ('train.py --help | true', {141}), ('sample.py out/piped | head -1', {0, 141}),
    ('train.py --help >&-', {0}), ('sample.py out/piped/aoe --show_experts=True 2>&-', {0}),
    ('train.py SMALL --mlp=moe,aoe --jobs=2 --out_dir=out/head | head -1', {141}),
    ('train.py SMALL --max_iters=1 --out_dir=out/closed 2>&-', {0})))
def test_a_reader_that_goes_away_and_a_poor_terminal_are_no_traceback(train_here, line, statuses):
    if not os.path.exists('out/piped'):
        train_here('--mlp=aoe', '--out_dir=out/piped', '--max_iters=1')
    line = line.replace('SMALL', ' '.join(SMALL))
    line = f"PYTHONIOENCODING=ascii '{sys.executable}' {ROOT}/{line}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
    assert process.returncode in statuses and process.stderr == ''


@pytest.mark.slow
@pytest.mark.parametrize('mlp', ('aoe', 'dense'))
def test_two_processes_train_like_one(workspace, mlp):
    """The same batches, dropout and mean of the gradients: equal but for the order of additions."""
    command = [*SMALL, f'--mlp={mlp}', '--aux_weight=0.01', '--dropout=0.1',
               '--gradient_accumulation_steps=4']
    run_here(train.main, *command, f'--out_dir=out/one-{mlp}', cwd=workspace)
    process = run_script('train.py', *command, f'--out_dir=out/two-{mlp}', cwd=workspace,
                         processes=2)
    one, two = (read_log(workspace / f'out/{name}-{mlp}/{mlp}') for name in ('one', 'two'))
    for a, b, tokens in zip(one, two, (0, 5120, 10240), strict=True):
        assert a['tokens'] == b['tokens'] == tokens
        for key in ('train_loss', 'val_loss', *['test_loss'] * ('test_loss' in a)):
            assert b[key] == pytest.approx(a[key], abs=1e-4)
    assert process.stdout.count(' iter ') == 3                     # one of the two prints


@pytest.mark.slow
def test_a_run_that_diverges_in_two_processes_ends_them(workspace):
    """What the first finds at an evaluation, the other doesn't look for."""
    process = run_script('train.py', *SMALL, '--mlp=moe,dense', '--learning_rate=1e9',
                         '--grad_clip=0', '--eval_interval=3', '--log_interval=1000',
                         '--gradient_accumulation_steps=2', '--out_dir=out/two-high',
                         cwd=workspace, processes=2, check=False)
    assert process.returncode and 'expected finite losses and weights' in process.stderr
