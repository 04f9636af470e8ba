"""
As learning_rate_96.py, at D 192:

    python train.py config/paper_table2.py config/learning_rate_192.py
"""

out_dir = 'out/learning_rate_192'
aux_weight = 0.01
n_embd = 192
n_head = 8
runs = {
    'moe 5e-4': {'mlp': 'moe', 'learning_rate': 5e-4},
    'moe 7e-4': {'mlp': 'moe', 'learning_rate': 7e-4},
    'moe 1e-3': {'mlp': 'moe', 'learning_rate': 1e-3},
    'moe 1.4e-3': {'mlp': 'moe', 'learning_rate': 1.4e-3},
    'aoe whole 5e-4': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 5e-4},
    'aoe whole 7e-4': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 7e-4},
    'aoe whole 1e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 1e-3},
    'aoe whole 1.4e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 1.4e-3},
    'aoe 5e-4': {'mlp': 'aoe', 'learning_rate': 5e-4},
    'aoe 7e-4': {'mlp': 'aoe', 'learning_rate': 7e-4},
    'aoe 1e-3': {'mlp': 'aoe', 'learning_rate': 1e-3},
    'aoe 1.4e-3': {'mlp': 'aoe', 'learning_rate': 1.4e-3},
}
