"""tests/tools/pilot.py: experts are chosen by the norm of a node."""

import itertools
import math
import os
import sys

import torch

import train
from conftest import ROOT, SMALL, run_script, table_of
from model import MLPS, GPTConfig

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from pilot import CHOICES, NODES, ORDERS, choose_by, main


def test_experts_are_chosen_by_the_norm_of_a_node_and_weighted_by_the_router():
    for node, order, factorised in itertools.product(NODES, ORDERS, (False, True)):
        compare_with_a_loop(node, order, factorised)


def compare_with_a_loop(node, order, factorised):
    torch.manual_seed(0)
    m = MLPS['moe'](GPTConfig(mlp='moe', n_embd=16, n_head=1, n_expert=5, d_ffn=24,
                              factorised=factorised, d_low=8)).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(20, 16, dtype=torch.float64)
    choose_by(m, CHOICES[f'{node}.L{order:g}'])
    slow = []
    for token in x:
        outputs, found = [], []
        for i in range(5):
            w_g = m.w_down[:, 8 * i:8 * i + 8] @ m.w_up[i] if factorised else m.w_g[i]
            g, u = token @ w_g, token @ m.w_p[i]
            silu = g / (1 + (-g).exp())
            nodes = {'g': g, 'u': u, 'silu': silu, 'product': silu * u}
            nodes['output'] = nodes['product'] @ m.w_o[i]
            outputs.append(nodes['output'])
            found.append(max(abs(v) for v in nodes[node]) if order == math.inf else
                         sum(abs(v) ** order for v in nodes[node]) ** (1 / order))
        chosen = sorted(range(5), key=lambda i: -found[i].item())[:2]
        p = (token @ m.router).exp()
        slow.append(sum(p[i] * outputs[i] for i in chosen) / sum(p[i] for i in chosen))
    torch.testing.assert_close(m(x)[0], torch.stack(slow), rtol=1e-10, atol=1e-10)


def test_the_script_evaluates_every_choice_and_refuses_what_it_cannot_average(
        workspace, refuse, monkeypatch, capsys):
    for out_dir, *more in (('pilot', '--mlp=moe,aoe', '--seeds=1,2'),
                           ('rate', '--mlp=moe', '--seeds=3', '--learning_rate=1e-3'),
                           ('long', '--mlp=moe', '--seeds=3', '--max_iters=30',
                            '--lr_decay_iters=20')):
        run_script('train.py', *SMALL, f'--out_dir=out/{out_dir}', *more, cwd=workspace)
    monkeypatch.chdir(workspace)
    main(['out/pilot/moe-*'])
    table = table_of(capsys.readouterr().out)
    assert table.pop('chosen by') == ['moe']
    assert len(table) == 17 and len({loss for loss, in table.values()}) > 4
    lowest = [min(entry['val_loss'] for entry in train.read_log(f'out/pilot/moe-{seed}/log.jsonl'))
              for seed in (1, 2)]
    assert table['router'] == [train.mean_and_spread(lowest)]
    for folder, says in (('out/pilot/aoe-1', 'expected a run with --mlp=moe, got aoe'),
                         ('out/none', 'got no file out/none/best.pt'),
                         ('out/pilot/moe-[12]', 'moe-1: expected another seed of moe, got 1 again'),
                         ('out/rate/moe-3', 'got another learning_rate, min_lr'),
                         ('out/long/moe-3', 'got another iter')):
        assert says in refuse(main, 'out/pilot/moe-1', folder)
    main(['--help'])
    assert 'python tests/tools/pilot.py' in capsys.readouterr().out
