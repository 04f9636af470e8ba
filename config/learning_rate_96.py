"""
Is one learning rate fair to all? As many trials for MoE as for AoE, in the shape
of paper_table2.py, with L_aux:

    python train.py config/paper_table2.py config/learning_rate_96.py
"""

out_dir = 'out/learning_rate_96'
aux_weight = 0.01
runs = {
    'moe 1e-3': {'mlp': 'moe', 'learning_rate': 1e-3},
    'moe 1.4e-3': {'mlp': 'moe', 'learning_rate': 1.4e-3},
    'moe 2e-3': {'mlp': 'moe', 'learning_rate': 2e-3},
    'moe 2.8e-3': {'mlp': 'moe', 'learning_rate': 2.8e-3},
    'moe 4e-3': {'mlp': 'moe', 'learning_rate': 4e-3},
    'aoe whole 1e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 1e-3},
    'aoe whole 1.4e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 1.4e-3},
    'aoe whole 2e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'aoe whole 2.8e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2.8e-3},
    'aoe whole 4e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 4e-3},
    'aoe 1e-3': {'mlp': 'aoe', 'learning_rate': 1e-3},
    'aoe 1.4e-3': {'mlp': 'aoe', 'learning_rate': 1.4e-3},
    'aoe 2e-3': {'mlp': 'aoe', 'learning_rate': 2e-3},
    'aoe 2.8e-3': {'mlp': 'aoe', 'learning_rate': 2.8e-3},
    'aoe 4e-3': {'mlp': 'aoe', 'learning_rate': 4e-3},
}
