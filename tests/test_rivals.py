"""config/who_scores/rivals.patch: it fits model.py, its keys do what the configs beside it say of
them, and those run."""

import dataclasses
import glob
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from configurator import UserError, read_config_file, read_text
from conftest import ROOT, SMALL
from train import TrainConfig, plan_runs


@pytest.fixture(scope='module')
def patched(tmp_path_factory):
    """A folder with the scripts, in which the patch is applied."""
    folder = tmp_path_factory.mktemp('patched')
    for file in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(file, folder)
    patch = os.path.join(ROOT, 'config', 'who_scores', 'rivals.patch')
    subprocess.run(['git', 'apply', patch], cwd=folder, check=True)
    return folder


@pytest.fixture(scope='module')
def module(patched):
    """The patched model.py."""
    spec = importlib.util.spec_from_file_location('patched', patched / 'model.py')
    module = sys.modules['patched'] = importlib.util.module_from_spec(spec)    # for dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def layer(module):
    """layer(mlp, **keys) of the patched model.py, with numbers in its parameters."""
    def make(mlp, **keys):
        torch.manual_seed(0)
        config = module.GPTConfig(mlp=mlp, n_embd=32, n_head=2, d_ffn=48, n_expert=4, **keys)
        m = module.MLPS[mlp](config)
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return m
    return make


@pytest.mark.parametrize('mlp, keys, scorer', (
    ('moe', {'factorised': False}, 'router'), ('moe', {'factorised': True}, 'router'),
    ('moe', {'router': 'norm', 'd_low': 8}, 'router_in'),
    ('aoe', {'factorised': True}, 'w_down'), ('aoe', {'factorised': False}, 'w_g')))
def test_frozen_scorers_stay_as_they_were_drawn(layer, mlp, keys, scorer):
    m, x = layer(mlp, frozen=True, aux_weight=0.1, **keys), torch.randn(64, 32)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    optimizer = torch.optim.AdamW(m.parameters(), weight_decay=0.1)
    for _ in range(2):
        h, routing = m(x)
        (h.square().sum() + routing.aux_loss).backward()
        optimizer.step()
    m.eval()(x)
    change = {name: p.detach() - before[name] for name, p in m.named_parameters()}
    judges = change.pop(scorer)
    if scorer == 'w_g':                                            # the other neurons learn
        judges, change['w_g'] = judges.split([m.config.d_judge, 48 - m.config.d_judge], dim=2)
    assert not judges.any() and change and all(c.any() for c in change.values())


def test_a_norm_router_scores_by_norms_of_matrices_of_its_own(layer):
    m, x = layer('moe', router='norm', d_low=8), torch.randn(64, 32)
    p = m.route(x)
    for i, A in enumerate(m.router_in.split(8, dim=1)):
        for t in range(64):
            torch.testing.assert_close(p[t, i], (x[t] @ A).square().sum().sqrt())
    m(x)[0].sum().backward()
    assert m.router_in.grad.abs().sum() > 0
    assert m.active_parameters() == layer('moe').active_parameters() + 32 * 4 * (8 - 1)


def test_sigmoid_scores_are_balanced_by_a_bias(layer):
    m, x = layer('moe', bias_step=0.5), torch.randn(64, 32)
    p, bias = m.route(x), torch.tensor([0.0, 9.0, 0.0, 9.0])
    m.bias.copy_(bias)
    h, routing = m(x)
    h.sum().backward()                                             # which must not count again
    assert (routing.chosen.sort().values == torch.tensor([1, 3])).all()        # as biased
    assert m.bias.tolist() == [0.5, 8.5, 0.5, 8.5]                 # 0, 64, 0, 64 of 32 each
    m.eval()(x)
    assert m.bias.tolist() == [0.5, 8.5, 0.5, 8.5]
    s = 1 / (1 + (-p).exp())
    expected = torch.stack([s[:, 1], s[:, 3]], dim=1) / (s[:, 1] + s[:, 3]).unsqueeze(1)
    torch.testing.assert_close(routing.weights.gather(1, routing.chosen.argsort()), expected)


def test_the_virtual_expert_is_all_that_the_judges_make(layer):
    keys, x = {'factorised': False, 'd_judge': 8}, torch.randn(64, 32)
    m = layer('aoe', virtual=True, **keys)
    expected, _ = layer('aoe', **keys)(x)
    for e in range(4):
        for n in range(8):
            neuron = F.silu(x @ m.w_g[e, :, n]) * (x @ m.w_p[e, :, n])
            expected = expected + neuron.unsqueeze(1) * m.w_o[e, n]
    torch.testing.assert_close(m(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mlp', ('moe', 'aoe'))
def test_scores_are_multiplied_and_in_training_jitter(layer, mlp):
    x = torch.randn(64, 32)
    p = layer(mlp)(x)[1].scores
    torch.testing.assert_close(layer(mlp, score_scale=4.0)(x)[1].scores, 4 * p)
    m = layer(mlp, jitter=0.25)
    ratio = m(x)[1].scores / p
    assert 0.75 <= ratio.min() < 0.78 and 1.22 < ratio.max() <= 1.25
    torch.testing.assert_close(m.eval()(x)[1].scores, p)


def test_router_std_is_of_a_routers_last_matrix(module):
    def spread(**keys):
        torch.manual_seed(0)
        gpt = module.GPT(module.GPTConfig(mlp='moe', n_embd=96, n_expert=16, vocab_size=9, **keys))
        return {name: p.std().item() for name, p in gpt.named_parameters() if p.dim() > 1}
    for keys in ({}, {'router': 'large'}):
        before, wide = spread(**keys), spread(router_std=0.3, **keys)
        changed = {name for name in wide if abs(wide[name] / before[name] - 1) > 0.1}
        assert changed == {f'blocks.{i}.mlp.router' for i in range(4)}
        assert all(0.27 < wide[name] < 0.33 and before[name] < 0.03 for name in changed)


@pytest.mark.parametrize('mlp, key, value', (
    ('aoe', 'virtual', True), ('moe', 'virtual', True), ('dense', 'frozen', True),
    ('aoe', 'bias_step', 0.1), ('moe', 'bias_step', -1)))
def test_what_is_no_rival_is_refused(module, mlp, key, value):
    with pytest.raises(ValueError, match=f'^{key}: expected'):
        module.GPTConfig(mlp=mlp, **{key: value})


@pytest.mark.parametrize('config', [
    path for path in glob.glob(f'{ROOT}/config/who_scores/*.py')
    if 'git apply config/who_scores/rivals.patch' in read_text(path)])
def test_configs_are_of_keys_that_the_patch_knows_and_refused_without_it(config, module):
    runs = runpy.run_path(config)['runs']
    rivals = {field.name for field in dataclasses.fields(module.GPTConfig)}
    for keys in runs.values():
        module.GPTConfig(n_embd=96, **{key: value for key, value in keys.items() if key in rivals})
        assert keys.keys() <= rivals | {'learning_rate', 'dtype'}
    with pytest.raises(UserError, match='no such key|router: expected linear or large'):
        plan_runs(read_config_file(TrainConfig, config), {})


@pytest.mark.slow
def test_the_experiment_runs_with_the_patch(patched, workspace):
    configs = [f'{ROOT}/config/{name}.py' for name in ('small', 'who_scores/rivals')]
    subprocess.run([sys.executable, 'train.py', *configs, *SMALL, '--max_iters=1', '--seeds=1',
                    '--jobs=1', f'--data_dir={workspace}/data', f'--out_dir={patched}/out'],
                   cwd=patched, check=True)


@pytest.mark.parametrize('file', glob.glob(os.path.join(ROOT, 'config/*/*.patch')),
                         ids=os.path.basename)
def test_every_patch_fits(tmp_path, file):
    shutil.copy(os.path.join(ROOT, 'model.py'), tmp_path)
    subprocess.run(['git', 'apply', file], cwd=tmp_path, check=True)
    compile((tmp_path / 'model.py').read_text(encoding='utf-8'), 'model.py', 'exec')
