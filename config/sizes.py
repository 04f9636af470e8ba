"""
Does the gap close with size? Width D 48, 96 and 192, with heads of 24 numbers, the
same tokens, L_aux, and the learning rate that was best of those in learning_rate_48.py,
learning_rate_96.py and learning_rate_192.py:

    python train.py config/paper_table2.py config/sizes.py
"""

out_dir = 'out/sizes'
aux_weight = 0.01
runs = {
    'moe 48': {'mlp': 'moe', 'n_embd': 48, 'n_head': 2, 'learning_rate': 5.6e-3},
    'aoe 48': {'mlp': 'aoe', 'n_embd': 48, 'n_head': 2, 'learning_rate': 4e-3},
    'aoe whole 48': {'mlp': 'aoe', 'factorised': False, 'n_embd': 48, 'n_head': 2,
                     'learning_rate': 4e-3},
    'moe 96': {'mlp': 'moe', 'learning_rate': 2e-3},
    'aoe 96': {'mlp': 'aoe', 'learning_rate': 1.4e-3},
    'aoe whole 96': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'moe 192': {'mlp': 'moe', 'n_embd': 192, 'n_head': 8, 'learning_rate': 1e-3},
    'aoe 192': {'mlp': 'aoe', 'n_embd': 192, 'n_head': 8, 'learning_rate': 7e-4},
    'aoe whole 192': {'mlp': 'aoe', 'factorised': False, 'n_embd': 192, 'n_head': 8,
                      'learning_rate': 7e-4},
}
