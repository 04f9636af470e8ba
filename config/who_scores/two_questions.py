"""
Two questions, independent of each other: who scores, a router or the norm of the
expert's own activation; and how the gate is made, x Wg_i or x Wdown_i Wup_i. With
and without L_aux, five seeds, in the shape of small.py:

    python train.py config/small.py config/who_scores/two_questions.py

By default, d_low is 32, D/3, where the gate is factorised, and 16 neurons, D/6, where not.
"""

out_dir = 'out/two_questions'
seeds = [1, 2, 3, 4, 5]
runs = {
    'moe': {'mlp': 'moe'},
    'moe aux': {'mlp': 'moe', 'aux_weight': 0.01},
    'moe factorised': {'mlp': 'moe', 'factorised': True},
    'moe factorised aux': {'mlp': 'moe', 'factorised': True, 'aux_weight': 0.01},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe_whole aux': {'mlp': 'aoe', 'factorised': False, 'aux_weight': 0.01},
    'aoe': {'mlp': 'aoe'},
    'aoe aux': {'mlp': 'aoe', 'aux_weight': 0.01},
}
