"""Is AoE better than MoE if its experts have judges of their own and whole gates? On the tie's
first 15 seeds untied_whole was 0.6 % better than moe (tie.py), but we hadn't named that comparison.

Named before the first run:

- Seeds 556 to 570, of which 556 to 560 are also tie.py's last block. Nothing is looked at before
  all 15 are done; if the hours end sooner, the seeds done by then are looked at once, and the page
  says so.
- A loss is test_loss, of the last evaluation, with a 95 % interval by Student's t over seeds.
- One effect is primary: untied_whole - moe, each at the rate that its rule found.
- Secondary: untied_whole - moe_slow, in which moe has untied_whole's rate; and, if the hours reach,
  untied_whole - aoe_whole, which scores by 16 numbers of its own gate.

    python train.py config/small.py config/who_scores/own_judge.py
"""
out_dir = 'out/own_judge'
dtype = 'float32'
aux_weight = 0.01
seeds = range(556, 571)
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 4e-3},
    'untied_whole': {'mlp': 'aoe', 'tied': False, 'factorised': False, 'learning_rate': 2e-3},
    'moe_slow': {'mlp': 'moe', 'learning_rate': 2e-3},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
}
