"""
Is one learning rate fair to all? As many trials for MoE as for AoE, in the
shape of paper_table2.py:

    python train.py config/paper_table2.py config/paper_learning_rate.py
"""

out_dir = 'out/paper_learning_rate'
aux_weight = 0.01
runs = {
    'moe 1e-3': {'mlp': 'moe', 'learning_rate': 1e-3},
    'moe 2e-3': {'mlp': 'moe', 'learning_rate': 2e-3},
    'moe 4e-3': {'mlp': 'moe', 'learning_rate': 4e-3},
    'aoe whole 1e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 1e-3},
    'aoe whole 2e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'aoe whole 4e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 4e-3},
}
