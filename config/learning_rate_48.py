"""
As learning_rate_96.py, at D 48:

    python train.py config/paper_table2.py config/learning_rate_48.py
"""

out_dir = 'out/learning_rate_48'
aux_weight = 0.01
n_embd = 48
n_head = 2
runs = {
    'moe 2e-3': {'mlp': 'moe', 'learning_rate': 2e-3},
    'moe 2.8e-3': {'mlp': 'moe', 'learning_rate': 2.8e-3},
    'moe 4e-3': {'mlp': 'moe', 'learning_rate': 4e-3},
    'moe 5.6e-3': {'mlp': 'moe', 'learning_rate': 5.6e-3},
    'moe 8e-3': {'mlp': 'moe', 'learning_rate': 8e-3},
    'aoe whole 2e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'aoe whole 2.8e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2.8e-3},
    'aoe whole 4e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 4e-3},
    'aoe whole 5.6e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 5.6e-3},
    'aoe whole 8e-3': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 8e-3},
    'aoe 2e-3': {'mlp': 'aoe', 'learning_rate': 2e-3},
    'aoe 2.8e-3': {'mlp': 'aoe', 'learning_rate': 2.8e-3},
    'aoe 4e-3': {'mlp': 'aoe', 'learning_rate': 4e-3},
    'aoe 5.6e-3': {'mlp': 'aoe', 'learning_rate': 5.6e-3},
    'aoe 8e-3': {'mlp': 'aoe', 'learning_rate': 8e-3},
}
