"""tests/tools/pilot.py: experts are chosen by the norm of a node."""

import itertools
import math
import os
import sys

import pytest
import torch

import train
from conftest import ROOT, SMALL, run_here, table_of
from model import GPTConfig, mlp_of
from sample import mean_and_spread, read_result

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from pilot import CHOICES, NODES, ORDERS, choose_by, main


@pytest.mark.parametrize('factorised', (False, True))
def test_experts_are_chosen_by_the_norm_of_a_node_and_weighted_by_the_router(factorised):
    torch.manual_seed(0)
    m = mlp_of(GPTConfig(mlp='moe', n_embd=16, n_head=1, n_expert=5, d_ffn=24,
                         factorised=factorised, d_low=8)).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(20, 16, dtype=torch.float64)
    nodes = []                                                     # of each expert and token
    for i in range(5):
        g = x @ (m.w_down[i] @ m.w_up[i] if factorised else m.w_g[i])
        u, silu = x @ m.w_p[i], g / (1 + (-g).exp())
        nodes.append({'g': g, 'u': u, 'silu': silu, 'product': silu * u,
                      'output': silu * u @ m.w_o[i]})
    for node, order in itertools.product(NODES, ORDERS):
        choose_by(m, CHOICES[f'{node}.L{order:g}'])
        slow = []
        for t, token in enumerate(x):
            found = [max(abs(v) for v in its[node][t]) if order == math.inf else
                     sum(abs(v) ** order for v in its[node][t]) ** (1 / order) for its in nodes]
            chosen = sorted(range(5), key=lambda i: -found[i].item())[:2]
            p = (token @ m.router).exp()
            slow.append(sum(p[i] * nodes[i]['output'][t] for i in chosen)
                        / sum(p[i] for i in chosen))
        torch.testing.assert_close(m(x)[0], torch.stack(slow), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_every_choice_is_evaluated_and_what_cannot_be_averaged_is_apart(
        workspace, refuse, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(train, 'draw', lambda *_: None)            # which takes seconds
    for keys in (['--mlp=moe', '--seeds=1,2'], ['--mlp=aoe', '--seeds=1'],
                 ['--mlp=moe', '--seeds=3', '--learning_rate=1e-3']):
        run_here(train.main, *SMALL, '--out_dir=out/pilot', *keys)
    main(['out/pilot/moe-*'])
    table = table_of(capsys.readouterr().out)
    two, one = table.pop('chosen by')
    assert (two[:24], one[:24]) == ('moe (learning_rate 0.002', 'moe (learning_rate 0.001')
    assert len(table) == 17 and len({tuple(losses) for losses in table.values()}) > 4
    lowest = [read_result(f'out/pilot/moe-{seed}')['lowest_val_loss'] for seed in (1, 2, 3)]
    assert table['router'] == [mean_and_spread(lowest[:2]), mean_and_spread(lowest[2:])]
    for arguments, says in ((['out/pilot/aoe-1'], 'expected a run with --mlp=moe, got aoe'),
                            (['out/none'], 'out/none: expected the folder of a run'),
                            (['--seeds=1'], "such as out/table2/moe-1, got --seeds=1"),
                            ([], 'such as out/table2/moe-1, got none')):
        assert says in refuse(main, *arguments)
