"""config/who_scores/rivals.patch: it fits model.py, its keys do what config/who_scores/rivals.py says of them, and that
experiment runs."""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, SMALL


@pytest.fixture(scope='module')
def patched(tmp_path_factory):
    """A folder with the scripts, in which the patch is applied."""
    folder = tmp_path_factory.mktemp('patched')
    for file in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(file, folder)
    shutil.copytree(os.path.join(ROOT, 'config'), folder / 'config')
    subprocess.run(['git', 'apply', 'config/who_scores/rivals.patch'], cwd=folder, check=True)
    return folder


@pytest.fixture
def layer(patched):
    """layer(mlp, **keys) of the patched model.py, with numbers in its parameters."""
    spec = importlib.util.spec_from_file_location('patched', patched / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['patched'] = module                                # where dataclasses look it up
    spec.loader.exec_module(module)

    def make(mlp, **keys):
        torch.manual_seed(0)
        config = module.GPTConfig(mlp=mlp, n_embd=32, n_head=2, d_ffn=48, n_expert=4, **keys)
        m = module.MLPS[mlp](config)
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.2)
        return m
    return make


@pytest.mark.parametrize('mlp, factorised', (('moe', False), ('moe', True), ('aoe', True),
                                             ('aoe', False)))
def test_frozen_scorers_stay_as_they_were_drawn(layer, mlp, factorised):
    m, x = layer(mlp, factorised=factorised, frozen=True, aux_weight=0.1), torch.randn(64, 32)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    optimizer = torch.optim.AdamW(m.parameters(), weight_decay=0.1)
    for _ in range(2):
        h, routing = m(x)
        (h.square().sum() + routing.aux_loss).backward()
        optimizer.step()
    m.eval()(x)
    change = {name: p.detach() - before[name] for name, p in m.named_parameters()}
    judges = change.pop('router' if mlp == 'moe' else 'w_down' if factorised else 'w_g')
    if mlp == 'aoe' and not factorised:
        judges, change['w_g'] = judges.split([m.config.d_judge, 48 - m.config.d_judge], dim=2)
    assert not judges.any() and all(c.any() for c in change.values())


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


@pytest.mark.parametrize('refused', ('--mlp=aoe --virtual=True', '--mlp=moe --virtual=True',
                                     '--mlp=dense --frozen=True', '--mlp=aoe --bias_step=0.1',
                                     '--mlp=moe --bias_step=-1'))
def test_what_is_no_rival_is_refused(refused, patched):
    process = subprocess.run([sys.executable, 'train.py', *refused.split()], cwd=patched,
                             capture_output=True, text=True, timeout=100)
    key = refused.split('--')[-1].partition('=')[0]
    assert process.returncode == 2 and process.stderr.startswith(f'error: {key}: expected')


def test_the_experiment_runs_when_patched_and_is_refused_when_not(patched, workspace):
    command = ['config/paper/table2.py', 'config/who_scores/rivals.py', *SMALL, '--max_iters=1',
               '--data_dir=' + str(workspace / 'data'), '--seeds=1', f'--out_dir={patched}/out']
    for folder, status in ((patched, 0), (ROOT, 2)):
        process = subprocess.run([sys.executable, 'train.py', *command], cwd=folder,
                                 capture_output=True, text=True, timeout=170)
        assert process.returncode == status, process.stderr
    assert len(process.stderr.splitlines()) == 1 and 'frozen' in process.stderr
