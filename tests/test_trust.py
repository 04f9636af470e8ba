"""A run that can be trusted: the same from the same seed, exact after a stop, whole after a kill,
averaged with its like alone, and it says what broke."""

import contextlib
import functools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import configurator
import prepare_data
import sample
import train
from configurator import UserError
from conftest import ROOT, SMALL, run_here, run_script, start_script, table_of
from train import Stop, group, load_checkpoint, read_log, read_results

FILES = ['.lock', 'best.pt', 'ckpt.pt', 'config.json', 'log.jsonl']
RULES = {'top_k': [], 'top_p': ['--select=top_p', '--conf_weight=1e-3'],
         'expert_choice': ['--select=expert_choice']}


def weights(path):
    return load_checkpoint(path, 'cpu')['model']


def equal(a, b):
    """Whether two dicts of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def losses(log):
    return [(entry['iter'], entry['train_loss'], entry['val_loss']) for entry in log]


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


# -----------------------------------------------------------------------------
# the same, and whole

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
    assert first == both[:2] and losses(both) == losses(whole)[::2]
    assert both[-1] == whole[-1]
    assert equal(weights(f'{halves}/{mlp}/ckpt.pt'), weights(f'{halves}-whole/{mlp}/ckpt.pt'))
    tokens = [entry['tokens'] for entry in read_log(f'{halves}/{mlp}/log.jsonl')]
    assert tokens == [0, 10 * 2 * 8 * 16, 20 * 2 * 8 * 16]


def test_the_seed_decides_and_what_saves_memory_does_not(train_here):
    logs = [train_here('--mlp=aoe', f'--out_dir=out/seed{i}', f'--seed={seed}', '--dropout=0.1',
                       '--max_iters=5', f'--recompute={recompute}')
            for i, (seed, recompute) in enumerate(((1, False), (1, True), (2, False)))]
    assert logs[0] == logs[1]
    assert all(a['val_loss'] != b['val_loss'] for a, b in zip(logs[0], logs[2]))


@pytest.mark.parametrize('mlp', ('aoe', 'moe', 'dense'))
def test_two_hundred_iterations_teach_something(train_here, mlp):
    """From 4.6 nats a character, ln of the vocabulary, to 2.76 to 2.78 with three seeds."""
    log = train_here(f'--mlp={mlp}', f'--out_dir=out/taught-{mlp}', '--max_iters=200',
                     '--eval_interval=200', '--eval_iters=20')
    assert log[0]['val_loss'] > 4 and log[1]['val_loss'] < 2.9


def test_a_stop_before_the_first_evaluation_loses_nothing(train_here):
    stop = Stop()
    stop.set()
    arguments = ['--mlp=moe', '--out_dir=out/at_once']
    values, _ = configurator.parse(train.TrainConfig, [*SMALL, *arguments], '')
    train.train(train.plan_runs({}, values)[0], stop)
    other = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/at_once')
    assert 'left out' not in other.stdout and list(table_of(other.stdout)) == ['run', 'dense']
    assert [entry['iter'] for entry in train_here(*arguments, '--init_from=resume')] == [0, 10, 20]


def test_a_full_disk_leaves_the_last_checkpoint_whole(train_here, monkeypatch):
    train_here('--mlp=moe', '--out_dir=out/full', '--max_iters=10', '--lr_decay_iters=20')
    before = weights('out/full/moe/ckpt.pt')
    write = torch.save

    def half(content, path):
        write(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', half)
        process = run_here(train.main, *SMALL, '--mlp=moe', '--out_dir=out/full',
                           '--init_from=resume', check=False)
    assert process.returncode == 2 and process.stderr.count('\n') == 1
    assert process.stderr.startswith('error: out/full/moe/ckpt.pt: expected to write it')
    assert equal(weights('out/full/moe/ckpt.pt'), before)
    assert sorted(os.listdir('out/full/moe')) == FILES
    log = train_here('--mlp=moe', '--out_dir=out/full', '--init_from=resume')
    assert [entry['iter'] for entry in log] == [0, 10, 20]


def test_a_run_without_its_checkpoint_is_never_written_over(train_here, refuse):
    train_here('--mlp=dense', '--out_dir=out/lost')
    os.remove('out/lost/dense/ckpt.pt')
    before = snapshot('out/lost/dense')
    for init_from in ('scratch', 'auto', 'resume'):
        line = refuse(train.main, *SMALL, '--mlp=dense', '--out_dir=out/lost',
                      f'--init_from={init_from}')
        assert 'out/lost/dense: expected ' in line and '--name=' in line
    assert snapshot('out/lost/dense') == before


def test_two_processes_never_train_one_run_and_each_goes_on_with_the_next(train_here):
    """As if another process trained aoe, and had trained moe while this one was on its way."""
    lock = train.make_folder(train.TrainConfig(out_dir='out/both'))
    refuse_to_overwrite = train.refuse_to_overwrite

    def and_then(runs):
        refuse_to_overwrite(runs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, 'refuse_to_overwrite', refuse_to_overwrite)
            run_here(train.main, *SMALL, '--mlp=moe', '--out_dir=out/both', '--max_iters=7')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'refuse_to_overwrite', and_then)
        process = run_here(train.main, *SMALL, '--mlp=aoe,moe,dense', '--out_dir=out/both')
    assert 'out/both/aoe: another process trains it; left to that' in process.stdout
    assert 'out/both/moe: another process has trained it; left as it is' in process.stdout
    assert os.listdir('out/both/aoe') == ['.lock']
    assert [entry['iter'] for entry in read_log('out/both/moe/log.jsonl')] == [0, 7]
    assert [entry['iter'] for entry in read_log('out/both/dense/log.jsonl')] == [0, 10, 20]
    lock.close()
    train_here('--mlp=aoe', '--out_dir=out/both', '--max_iters=1')


def test_what_another_process_ended_in_the_meantime_is_not_written_over(train_here, monkeypatch):
    """After this one has looked for a checkpoint, and before it has the folder for itself."""
    make_folder = train.make_folder

    def and_before(config):
        monkeypatch.setattr(train, 'make_folder', make_folder)
        train_here('--mlp=moe', '--out_dir=out/meantime', '--learning_rate=1e-3')
        return make_folder(config)
    monkeypatch.setattr(train, 'make_folder', and_before)
    printed = run_here(train.main, *SMALL, '--mlp=moe', '--out_dir=out/meantime').stdout
    assert 'out/meantime/moe: another process ' in printed
    recipe = load_checkpoint('out/meantime/moe/ckpt.pt', 'cpu')['recipe']
    assert recipe['learning_rate'] == 1e-3


class Bomb:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch exploded',)


def test_nothing_in_a_checkpoint_is_run(train_here, refuse):
    train_here('--mlp=moe', '--out_dir=out/bomb', '--max_iters=1')
    for file in ('ckpt.pt', 'best.pt'):
        torch.save({'model': Bomb(), 'recipe': {}, 'meta': {}}, f'out/bomb/moe/{file}')
    for line in (refuse(train.main, *SMALL, '--mlp=moe', '--out_dir=out/bomb',
                        '--init_from=resume'), refuse(sample.main, 'out/bomb/moe')):
        assert 'expected a checkpoint of this train.py, got a damaged or foreign file' in line
    assert not os.path.exists('exploded')


# -----------------------------------------------------------------------------
# what is not finite

def test_where_one_run_diverges_the_others_go_on(train_here, monkeypatch):
    both = [*SMALL, '--mlp=moe,dense', '--out_dir=out/broken', '--log_interval=4']
    with monkeypatch.context() as patch:
        at_the_step_of(patch, [12], lambda parameters: parameters[0].fill_(math.inf))
        process = run_here(train.main, *both, check=False)
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert process.stderr.startswith('error: out/broken/moe: expected finite losses and weights, '
                                     'got others by iteration 16. ')
    assert '--name=' in process.stderr and '--learning_rate=0.002' in process.stderr
    assert load_checkpoint('out/broken/moe/ckpt.pt', 'cpu')['iter'] == 10
    assert [entry['iter'] for entry in read_log('out/broken/moe/log.jsonl')] == [0, 10]
    assert [entry['iter'] for entry in read_log('out/broken/dense/log.jsonl')] == [0, 10, 20]
    table = table_of(process.stdout)
    assert [row[2] for run, row in table.items() if run.startswith('moe (')] == ['diverged']
    for path in ('out/broken', 'out/broken/results.jsonl'):        # it is told everywhere
        found = {result['run']: result.get('diverged') for result in read_results(path)}
        assert found == {'moe': 16, 'dense': None}
        assert [name for name in group(read_results(path)) if 'diverged at 16' in name]
    again = run_here(train.main, *both, '--init_from=auto')        # the cause is gone: it goes on
    assert list(table_of(again.stdout)) == ['run', 'dense', 'moe']
    assert 'diverged' not in again.stdout


def test_an_evaluation_that_is_not_finite_is_no_result(train_here, monkeypatch):
    """Weights are finite, but what they compute is not. Before the first step there is no result
    at all, and no noise about it."""
    evaluate = train.evaluate
    for at in (1, 0):
        entries = []

        def wrong(*arguments, at=at, entries=entries):
            entries.append(evaluate(*arguments))
            return entries[-1] | ({'val_loss': math.nan} if len(entries) == at + 1 else {})
        monkeypatch.setattr(train, 'evaluate', wrong)
        process = run_here(train.main, *SMALL, '--mlp=moe', f'--out_dir=out/unfit{at}', check=False)
        assert process.returncode == 1 and process.stderr.count('\n') == 1
        assert f'got others by iteration {10 * at}' in process.stderr
        assert not re.search('left out|nan|not drawn', process.stdout)
        assert len(read_log(f'out/unfit{at}/moe/log.jsonl')) == at
    assert load_checkpoint('out/unfit1/moe/ckpt.pt', 'cpu')['iter'] == 0


def test_weights_that_are_not_finite_are_not_saved(train_here, monkeypatch):
    at_the_step_of(monkeypatch, [9], lambda parameters: parameters[0].fill_(math.nan))
    process = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/not_saved', check=False)
    assert process.returncode == 1 and 'got others by iteration 10. ' in process.stderr
    assert load_checkpoint('out/not_saved/dense/ckpt.pt', 'cpu')['iter'] == 0


# -----------------------------------------------------------------------------
# going on

def test_a_result_never_stands_under_settings_that_did_not_make_it(train_here, refuse):
    out, mlp = '--out_dir=out/settings', '--mlp=moe'
    train_here(mlp, out)
    before = snapshot('out/settings')
    for init in ('auto', 'resume'):
        line = refuse(train.main, *SMALL, mlp, out, f'--init_from={init}', '--learning_rate=9e-3',
                      '--batch_size=64', '--dropout=0.5', '--weight_decay=0.3', '--beta1=0.5',
                      '--eval_interval=5')
        for told in ('learning_rate = 0.002 and not 0.009', 'batch_size = 8 and not 64', '--name=',
                     'dropout = 0.0 and not 0.5', 'weight_decay = 0.1 and not 0.3', 'beta1 = 0.9',
                     'eval_interval = 10 and not 5'):
            assert told in line
        assert 'seed = 1337 and not 7' in refuse(train.main, *SMALL, mlp, out, '--seed=7',
                                                 f'--init_from={init}')
    train_here(mlp, out, '--init_from=auto')                       # nothing left to do
    assert 'max_iters: expected at least the 20 iterations' in refuse(
        train.main, *SMALL, mlp, out, '--init_from=resume', '--max_iters=5')
    del before[pathlib.Path('out/settings/results.jsonl')]         # it is written anew
    assert {path: content for path, content in snapshot('out/settings').items()
            if path in before} == before


def test_going_on_for_longer_keeps_the_schedule_and_says_so(train_here):
    train_here('--mlp=dense', '--out_dir=out/longer')
    checkpoint = torch.load('out/longer/dense/ckpt.pt')
    del checkpoint['recipe']['processor']                          # an older train.py wrote none
    torch.save(checkpoint, 'out/longer/dense/ckpt.pt')
    process = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/longer',
                       '--init_from=resume', '--max_iters=30')
    assert 'the learning rate falls to 0.0002 at iteration 20:' in process.stdout
    assert 'now, and was unknown' in process.stdout
    rates = [entry['lr'] for entry in read_log('out/longer/dense/log.jsonl')]
    assert rates[0] < 0.002 and rates[2:] == [0.0002, 0.0002]


@pytest.fixture
def texts(train_here, code_text):
    """Data sets beside code: of the same characters in another order; split elsewhere."""
    for name, text, fraction in (('turned', code_text[::-1], 0.1), ('split', code_text, 0.2)):
        pathlib.Path(f'{name}.txt').write_text(text, encoding='utf-8', newline='')
        shutil.rmtree(f'data/{name}', ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_data, 'VAL_FRACTION', fraction)
            run_here(prepare_data.main, f'{name}.txt')


def test_resuming_on_another_text_of_the_same_characters_is_refused(train_here, refuse, texts):
    train_here('--mlp=dense', '--out_dir=out/text', '--max_iters=1')
    common = [*SMALL, '--mlp=dense', '--out_dir=out/text']
    for dataset, told in (('turned', 'sha256 = '), ('split', 'train_tokens = ')):
        line = refuse(train.main, *common, f'--dataset={dataset}', '--init_from=resume')
        assert f'expected what it was trained with, {told}' in line
        told = run_here(train.main, *common, f'--dataset={dataset}', '--eval_only=True').stdout
        assert 'out/text/dense: evaluated with ' in told           # which writes nothing


def test_a_run_keeps_the_dtype_that_auto_has_taken(train_here, monkeypatch):
    auto = ['--mlp=dense', '--dtype=auto']
    monkeypatch.setattr(train, 'bfloat16_gain', lambda *shape: 2.0)
    train_here(*auto, '--out_dir=out/kept', '--max_iters=10', '--lr_decay_iters=20')
    monkeypatch.setattr(train, 'bfloat16_gain', lambda *shape: 0.5)
    train_here(*auto, '--out_dir=out/kept', '--init_from=resume')
    assert load_checkpoint('out/kept/dense/ckpt.pt', 'cpu')['recipe']['dtype'] == 'bfloat16'
    train_here(*auto, '--out_dir=out/other_side')
    assert load_checkpoint('out/other_side/dense/ckpt.pt', 'cpu')['recipe']['dtype'] == 'float32'


@pytest.mark.parametrize('key', ('model.py', 'train.py', 'processor'))
def test_other_code_and_another_processor_are_told_and_not_averaged(train_here, monkeypatch, key):
    def here(text):
        if key == 'processor':
            monkeypatch.setattr(train, 'processor_name', lambda device: text)
        else:
            monkeypatch.setattr(train, 'HASHES', train.HASHES | {key: text})

    def rows(*arguments):
        process = run_here(train.main, *SMALL, '--mlp=dense', f'--out_dir=out/edited_{key}',
                           '--lr_decay_iters=20', *arguments)
        return process.stdout, list(table_of(process.stdout))[1:]
    here('one')
    rows('--seeds=1', '--max_iters=10')
    here('two')
    printed, found = rows('--seeds=1', '--init_from=resume')
    assert f'{key} is two now, and was one' in printed and found == ['dense']
    _, found = rows('--seeds=2')
    assert sorted(found) == [f'dense ({key} one then two)', f'dense ({key} two)']


@pytest.mark.parametrize('other', (
    lambda model, *_: torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, *_: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)),
    ids=('SGD', 'one group'))
def test_the_state_of_another_optimizer_is_refused(train_here, refuse, monkeypatch, other):
    """As if train.py had been edited."""
    arguments = ['--mlp=dense', '--out_dir=out/optimizer', '--lr_decay_iters=20']
    train_here(*arguments, '--max_iters=10', '--init_from=auto')
    before = snapshot('out/optimizer')
    monkeypatch.setattr(train, 'make_optimizer', other)
    line = refuse(train.main, *SMALL, *arguments, '--init_from=resume')
    assert 'ckpt.pt: expected the state of the optimizer that train.py has now' in line
    assert snapshot('out/optimizer') == before


def test_a_key_that_an_older_run_lacks_has_its_default(train_here, refuse):
    train_here('--mlp=dense', '--out_dir=out/older', '--max_iters=10', '--lr_decay_iters=20')
    for path in ('out/older/dense/ckpt.pt', 'out/older/dense/best.pt'):
        checkpoint = load_checkpoint(path, 'cpu')
        del checkpoint['recipe']['weigh_among']
        torch.save(checkpoint, path)
    resume = ['--mlp=dense', '--out_dir=out/older', '--lr_decay_iters=20', '--init_from=resume']
    assert 'weigh_among = chosen and not all' in refuse(train.main, *SMALL, *resume,
                                                        '--weigh_among=all')
    assert [entry['iter'] for entry in train_here(*resume)] == [0, 10, 20]
    run_here(sample.main, 'out/older/dense', '--max_new_tokens=2')


# -----------------------------------------------------------------------------
# results

@pytest.fixture
def rows(train_here):
    """rows(out_dir, *arguments) trains there; returns the table's first column and its losses."""
    def call(out_dir, *arguments):
        table = table_of(run_here(train.main, *SMALL, '--mlp=dense', f'--out_dir={out_dir}',
                                  *arguments).stdout)
        return {run: others[2] for run, others in table.items() if run != 'run'}
    return call


def test_only_what_is_alike_and_equally_far_is_averaged(rows, texts):
    assert list(rows('out/alike', '--seeds=1')) == ['dense']
    both = rows('out/alike', '--seeds=1,2', '--init_from=auto')
    assert list(both) == ['dense'] and '±' in both['dense']
    for dataset, key in (('turned', 'sha256'), ('split', 'train_tokens')):
        found = rows('out/alike', '--seeds=3', f'--dataset={dataset}')
        assert len(found) == 2 and all(run.startswith(f'dense ({key} ') for run in found)
        assert sorted('±' in loss for loss in found.values()) == [False, True]
        shutil.rmtree('out/alike/dense-3')
    rows('out/far', '--seeds=1')
    found = rows('out/far', '--seeds=1,2', '--init_from=auto', '--max_iters=30')
    assert sorted(found) == ['dense (lr_decay_iters 20)', 'dense (lr_decay_iters 30)']
    rows('out/half', '--seeds=1', '--lr_decay_iters=20', '--max_iters=10')
    found = rows('out/half', '--seeds=2', '--lr_decay_iters=20')
    assert sorted(found) == ['dense (iter 10)', 'dense (iter 20)']
    rows('out/often', '--seeds=1')
    found = rows('out/often', '--seeds=2', '--eval_interval=5')
    assert sorted(found) == ['dense (eval_interval 10)', 'dense (eval_interval 5)']
    rows('out/dtypes', '--seeds=1')
    found = rows('out/dtypes', '--seeds=2', '--dtype=bfloat16')
    assert sorted(found) == ['dense (dtype bfloat16)', 'dense (dtype float32)']
    dtypes = {result['recipe']['dtype'] for result in read_results('out/dtypes/results.jsonl')}
    assert dtypes == {'float32', 'bfloat16'}


def test_a_results_jsonl_says_what_the_runs_say(rows):
    rows('out/read', '--seeds=1,2')
    rows('out/read', '--seeds=1,2', '--name=wide', '--d_ffn=64')
    folders, lines = group(read_results('out/read')), group(read_results('out/read/results.jsonl'))
    assert folders.keys() == lines.keys() == {'dense', 'wide'}
    for name, seeds in folders.items():
        assert seeds.keys() == lines[name].keys() == {1, 2}
        for seed, result in seeds.items():
            assert {**result, 'log': None, 'class_load': None, 'name': None} == {
                'log': None, 'class_load': None, 'name': None} | lines[name][seed]


def result(run='moe', seed=1, iter=20, diverged=None, **recipe):
    return {'run': run, 'seed': seed, 'iter': iter, 'recipe': {'mlp': 'moe', 'seed': seed} | recipe
            } | ({'diverged': diverged} if diverged else {})


def names_and_seeds(*results):
    return {name: list(seeds) for name, seeds in group(results).items()}


def test_a_label_says_what_differs_and_no_result_is_lost():
    assert names_and_seeds(result(), result(seed=2), result('aoe')) == {'moe': [1, 2], 'aoe': [1]}
    assert names_and_seeds(result(top_k=2), result(seed=2, top_k=1), result('aoe', top_k=4)) == {
        'moe (top_k 2)': [1], 'moe (top_k 1)': [2], 'aoe': [1]}
    assert names_and_seeds(result(a=1, b=2), result(a=1, b=3), result(a=2, b=2)) == {
        'moe (a 1, b 2)': [1], 'moe (a 1, b 3)': [1], 'moe (a 2, b 2)': [1]}
    assert names_and_seeds(result(), result(seed=2, iter=30)) == {
        'moe (iter 20)': [1], 'moe (iter 30)': [2]}
    assert names_and_seeds(result(), result(seed=2, diverged=7)).keys() == {
        'moe', 'moe (diverged at 7)'}
    assert names_and_seeds(result(diverged=7)) == {'moe (diverged at 7)': [1]}
    for many in ((result(a=0.0), result(seed=2, a=-0.0)),          # equal, but not as text
                 (result(a=None), result(seed=2)),                 # of before the key was there
                 (result(top_k=2), result(seed=2, top_k=1),
                  result('moe (top_k 1)', seed=3, top_k=1))):
        assert sorted(seed for seeds in group(many).values() for seed in seeds) == [
            one['seed'] for one in many]
    with pytest.raises(UserError, match="each run once, got 'moe', seed 1, again"):
        group([result(), result()])


def test_a_run_in_two_folders_counts_once(rows):
    assert list(rows('out/twice', '--seed=1')) == ['dense']
    both = rows('out/twice', '--seeds=1,2')
    alone = rows('out/once', '--seeds=1,2')
    assert both == alone and '±' in both['dense']


def test_what_cannot_be_read_is_left_out_of_the_table(train_here):
    for folder, config, log in (
            ('cut', '{"name": "cu', '{"iter": 0}'), ('strange', '{}', '{"val_loss": 1}'),
            ('odd', '{"name": "odd", "seed": 1, "recipe": {}}', '[3]'), ('list', '[]', '{}')):
        os.makedirs(f'out/odd/{folder}')
        for file, text in (('config.json', config), ('log.jsonl', log)):
            pathlib.Path(f'out/odd/{folder}/{file}').write_text(text)
    printed = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/odd').stdout
    assert list(table_of(printed)) == ['run', 'dense']
    for folder in ('cut', 'strange', 'odd', 'list'):
        assert f'out/odd/{folder} is left out: ' in printed


def test_a_foreign_results_jsonl_is_named(rows):
    rows('out/foreign')
    good = pathlib.Path('out/foreign/results.jsonl').read_text()
    changes = ({'val_loss': math.nan}, {'lowest_val_loss': None}, {'seconds': 'long'},
               {'norm': None}, {'recipe': {}}, {'recipe': 3}, {'seed': 'one'})
    for line in ('{"run": "moe"}', '3', '[]', '{', 'NaN', '"moe"', 'null',
                 *(json.dumps(json.loads(good) | change) for change in changes)):
        for text, number in ((line, 1), (good + line, 2)):
            pathlib.Path('foreign.jsonl').write_text(text)
            with pytest.raises(UserError, match=f'foreign.jsonl, line {number}: expected a line'):
                read_results('foreign.jsonl')
    for path in ('out', 'out/nowhere', 'out/nowhere.jsonl'):
        with pytest.raises(UserError, match='expected an out_dir with runs, or a results.jsonl'):
            read_results(path)


def test_a_run_that_ends_above_its_lowest_loss_says_so(train_here, monkeypatch):
    at_the_step_of(monkeypatch, [15], lambda parameters: parameters[0].mul_(-1))
    printed = run_here(train.main, *SMALL, '--mlp=dense', '--out_dir=out/worse').stdout
    log = read_log('out/worse/dense/log.jsonl')
    assert f'dense ended at {log[-1]["val_loss"]:.4f}, above its lowest' in printed
    assert table_of(printed)['dense'][2] == f'{log[1]["val_loss"]:.4f}'
    assert equal(weights('out/worse/dense/ckpt.pt'), weights('out/worse/dense/best.pt')) is False


def test_loss_is_averaged_where_all_seeds_were_evaluated():
    import matplotlib.pyplot as plt
    logs = [[{'iter': i, 'val_loss': loss, 'seconds': pace * i} for i, loss in log]
            for pace, log in ((1, ((0, 4.0), (10, 3.0), (20, 2.0))),
                              (3, ((0, 4.2), (20, 2.4), (30, 1.0))))]
    seeds = {seed: {'log': log, 'lowest_val_loss': min(entry['val_loss'] for entry in log)}
             for seed, log in enumerate(logs)}
    figure = train.draw_loss(plt, {'moe': seeds}, {'moe': 'black'})
    for axes, x in zip(figure.axes, ([0, 20], [0, 40])):
        line, = axes.lines
        assert line.get_xdata().tolist() == x
        assert line.get_ydata().tolist() == pytest.approx([4.1, 2.2])
    assert figure.axes[0].texts[0].get_text() == 'moe 1.5000, 2 seeds'
    plt.close(figure)


@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('name', ('a & b', 'ä中', '1e-3'))
def test_any_name_can_be_drawn(train_here, name):
    run_here(train.main, *SMALL, '--mlp=aoe', '--max_iters=1', '--out_dir=out/names',
             f'--name={name}')
    runs = group(read_results('out/names'))
    figure = train.draw_loss(train.pyplot(), runs, train.colors_of(runs))
    assert any(text.get_text().startswith(name) for text in figure.axes[0].texts)
    figure.savefig(os.devnull, format='png')
    train.pyplot().close(figure)


def test_a_picture_that_cannot_be_made_is_told_and_stops_nothing(workspace):
    os.makedirs(workspace / 'out/open/loss.png')                   # as if another program had it
    printed = run_here(train.main, *SMALL, '--mlp=moe', '--out_dir=out/open', cwd=workspace).stdout
    assert 'loss.png is not drawn: out/open/loss.png: expected to write it' in printed
    assert (workspace / 'out/open/norm.png').exists() is False     # moe has no norms
    assert (workspace / 'out/open/expert_load.png').exists()


# -----------------------------------------------------------------------------
# sizes, dtypes, devices

def test_a_model_with_more_tokens_than_its_text_never_writes_them(train_here):
    train_here('--mlp=aoe', '--out_dir=out/padded', '--max_iters=1', '--vocab_size=300')
    printed = run_here(sample.main, 'out/padded/aoe', '--temperature=90').stdout
    assert len(printed) == 502


@pytest.mark.parametrize('width', ('--d_low=1', '--d_ffn=1'))
@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_experts_of_width_1_train(train_here, width, dtype):
    arguments = [width, f'--dtype={dtype}', '--mlp=moe' if 'ffn' in width else '--mlp=aoe']
    train_here(*arguments, f'--out_dir=out/thin{width}{dtype}', '--max_iters=2')


def test_active_experts_follow_the_rule():
    def active(*arguments):
        config = train.plan_runs({'vocab_size': 84, 'n_embd': 64}, configurator.parse(
            train.TrainConfig, ['--mlp=moe', *arguments], '')[0])[0]
        return train.GPT(config).active_parameters()
    everything = active('--top_k=8')
    assert active('--select=expert_choice', '--capacity_factor=8') == everything
    assert active('--select=expert_choice', '--capacity_factor=99') == everything
    assert active('--select=expert_choice', '--capacity_factor=2') == active('--top_k=2')
    assert active('--select=top_p') == everything


@pytest.fixture
def low_scale(monkeypatch):
    """A loss scale at which nothing overflows by itself, whatever the text."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=1024.0)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)


def test_float16_ends_near_float32_and_skips_what_overflows(train_here, low_scale, monkeypatch):
    arguments = ['--mlp=aoe', '--aux_weight=0.01', '--gradient_accumulation_steps=2']
    exact = train_here(*arguments, '--out_dir=out/fp32', '--dtype=float32')
    half = train_here(*arguments, '--out_dir=out/fp16', '--dtype=float16')
    for a, b in zip(exact, half):
        assert b['val_loss'] == pytest.approx(a['val_loss'], abs=0.02)
    snapshots = []
    monkeypatch.setattr(torch.amp, 'GradScaler', functools.partial(torch.amp.GradScaler.func,
                                                                   init_scale=2.0 ** 26))
    at_the_step_of(monkeypatch, range(30), lambda parameters: snapshots.append(
        torch.cat([p.flatten() for p in parameters])))
    skipping = train_here(*arguments, '--out_dir=out/skipped', '--dtype=float16', '--max_iters=30')
    unchanged = [torch.equal(a, b) for a, b in zip(snapshots, snapshots[1:])]
    assert unchanged[:2] == [True, True] and not any(unchanged[20:])
    assert skipping[-1]['val_loss'] < skipping[0]['val_loss'] - 0.3


def test_float16_stopped_and_resumed_is_the_same(train_here, low_scale):
    more = ['--mlp=moe', '--dtype=float16', '--dropout=0.1', '--lr_decay_iters=20']
    whole = train_here(*more, '--out_dir=out/half-whole')
    train_here(*more, '--out_dir=out/half', '--max_iters=10')
    assert losses(train_here(*more, '--out_dir=out/half', '--init_from=resume')) == losses(whole)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'empty', lambda *size, device: None)  # as if it were there
        assert train.choose_device('auto').type == 'mps'
    monkeypatch.setattr(torch, '__version__', '2.13.1+x')
    assert train.choose_device('auto').type == 'cpu'
    with pytest.raises(UserError, match='device: expected auto or one of this machi'):
        train.choose_device('mps')


def test_the_gain_of_bfloat16_is_measured(monkeypatch):
    """On a clock by which a matmul in bfloat16 takes a third of the time, or five times as long."""
    class Timer:
        def __init__(self, statement, globals, num_threads):
            self.dtypes = {tensor.dtype for tensor in globals.values()}
            exec(statement, globals)                               # its shapes fit

        def blocked_autorange(self, min_run_time):
            dtype, = self.dtypes
            self.median = 0.01 * (factor if dtype == torch.bfloat16 else 1)
            return self
    monkeypatch.setattr(train, 'Timer', Timer)
    for factor, name in ((1 / 3, 'bfloat16'), (5.0, 'float32')):
        train.bfloat16_gain.cache_clear()
        assert train.fast_dtype(train.TrainConfig(), torch.device('cpu')) == name
        assert train.bfloat16_gain(256, 128, 512) == pytest.approx(1 / factor)
    train.bfloat16_gain.cache_clear()


# -----------------------------------------------------------------------------
# as programs

@pytest.mark.slow
@pytest.mark.parametrize('command', (['train.py', '--help'], ['sample.py', 'out/piped/aoe'],
                                     ['prepare_data.py', '--help']))
def test_a_reader_that_goes_away_ends_a_script_quietly(train_here, command):
    if not os.path.exists('out/piped'):
        train_here('--mlp=aoe', '--out_dir=out/piped', '--max_iters=1')
    process = start_script(*command, cwd='.')
    process.stdout.close()                                         # as `| head -c 0` does
    assert process.stderr.read() == '' and process.wait() in (0, 141)


@pytest.mark.slow
def test_closed_streams_and_configs_that_change_folder_are_no_traceback(workspace):
    (workspace / 'elsewhere.py').write_text('import os as _os\n_os.chdir("/")\n')
    command = [sys.executable, os.path.join(ROOT, 'train.py'), 'elsewhere.py', *SMALL]
    for i, closed in enumerate(('>&-', '2>&-', '>&- 2>&-')):
        process = subprocess.run(['bash', '-c', f'exec "$@" {closed}', 'bash', *command,
                                  '--mlp=dense', f'--out_dir=out/closed{i}'], cwd=workspace,
                                 capture_output=True)
        assert (process.returncode, process.stderr) == (0, b'')
        assert len(read_log(workspace / f'out/closed{i}/dense/log.jsonl')) == 3


@pytest.mark.slow
def test_ctrl_c_while_pytorch_is_imported_ends_without_a_word(workspace):
    process = start_script('train.py', *SMALL, '--out_dir=out/import', cwd=workspace)
    maps = pathlib.Path(f'/proc/{process.pid}/maps')
    while maps.exists() and 'torch' not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ('', '') and process.returncode in (-signal.SIGINT, 130)
    assert not (workspace / 'out/import').exists()


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ('cp1252', 'ascii'))
def test_a_terminal_that_lacks_characters_gets_others(train_here, encoding):
    train_here('--mlp=aoe', f'--out_dir=out/{encoding}', '--max_iters=1')
    environment = os.environ | {'PYTHONIOENCODING': encoding}
    process = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'sample.py'), f'out/{encoding}/aoe', '--temperature=9',
         '--show_experts=True'], env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize('mlp', ('aoe', 'dense'))
def test_two_processes_train_like_one(workspace, mlp):
    """The same batches, dropout and mean of the gradients: equal but for the order of additions."""
    command = [*SMALL, f'--mlp={mlp}', '--aux_weight=0.01', '--dropout=0.1',
               '--gradient_accumulation_steps=4']
    run_here(train.main, *command, f'--out_dir=out/one-{mlp}', cwd=workspace)
    process = run_script('train.py', *command, f'--out_dir=out/two-{mlp}', cwd=workspace,
                         processes=2)
    one, two = (read_log(workspace / f'out/{name}-{mlp}/{mlp}/log.jsonl')
                for name in ('one', 'two'))
    for log in one, two:
        assert [entry['tokens'] for entry in log] == [0, 5120, 10240]
    for a, b in zip(one, two):
        for key in ('train_loss', 'val_loss', *['test_loss'] * ('test_loss' in a)):
            assert b[key] == pytest.approx(a[key], abs=1e-4)
    evaluations = [line for line in process.stdout.splitlines() if 'val loss' in line]
    assert sum(' iter ' in line for line in evaluations) == 3      # one of the two prints


@pytest.mark.slow
def test_a_run_that_diverges_in_two_processes_ends_them(workspace):
    """What the first finds at an evaluation, the other doesn't look for."""
    process = run_script('train.py', *SMALL, '--mlp=moe,dense', '--learning_rate=1e9',
                         '--grad_clip=0', '--eval_interval=3', '--log_interval=1000',
                         '--gradient_accumulation_steps=2', '--out_dir=out/two-high',
                         cwd=workspace, processes=2, check=False)
    assert process.returncode and 'expected finite losses and weights' in process.stderr


@pytest.mark.slow
def test_runs_that_are_killed_again_and_again_end_like_those_that_are_not(workspace):
    """Two runs side by side; the first process, all at once while one writes a file, or a signal.
    Seconds differ, nothing else may."""
    moments, out, while_writing = random.Random(1), workspace / 'out/killed', 0
    command = [*SMALL, '--jobs=2', '--mlp=aoe,moe', '--max_iters=400', '--eval_interval=20',
               '--dropout=0.1', '--init_from=auto']

    def writing():
        return any(out.rglob('*.part'))
    for kill in ('first', 'all', signal.SIGINT, 'all', signal.SIGTERM, 'all'):
        process, began = start_script('train.py', *command, '--out_dir=out/killed',
                                      cwd=workspace), time.time()
        while process.poll() is None and not any(
                log.stat().st_mtime > began for log in out.rglob('log.jsonl')):
            time.sleep(0.05)                                       # until one has evaluated
        time.sleep(moments.uniform(0, 1))
        while kill == 'all' and process.poll() is None and not writing():
            pass
        while_writing += writing()
        with contextlib.suppress(ProcessLookupError):              # it has ended
            if kill == 'all':
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.send_signal(signal.SIGKILL if kill == 'first' else kill)
        process.communicate()                                      # until all have ended
        for path in out.rglob('ckpt.pt'):
            load_checkpoint(path, 'cpu')                           # raises if it is damaged
    assert while_writing > 0
    run_script('train.py', *command, '--out_dir=out/killed', cwd=workspace)
    run_here(train.main, *command, '--jobs=1', '--out_dir=out/undisturbed', cwd=workspace)
    for mlp in ('aoe', 'moe'):
        killed, whole = ([{key: value for key, value in entry.items() if key != 'seconds'}
                          for entry in read_log(workspace / f'out/{name}/{mlp}/log.jsonl')]
                         for name in ('killed', 'undisturbed'))
        assert [entry['iter'] for entry in whole] == list(range(0, 401, 20))
        assert killed == whole
        assert equal(weights(out / mlp / 'ckpt.pt'),
                     weights(workspace / f'out/undisturbed/{mlp}/ckpt.pt'))
        assert sorted(os.listdir(out / mlp)) == FILES
