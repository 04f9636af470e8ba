"""
Who scores, among rivals that are as able: a linear router, a router with as many
parameters as the judges, one that stays as it was drawn, the norm of an expert's
own activation, and that norm with judges that stay as they were drawn; with both
gates. And two rivals of today: sigmoid scores balanced by a bias (DeepSeek-V3),
and the judges as a virtual shared expert (Union-of-Experts). What is not in
model.py is a patch of 22 lines. In the shape of paper_table2.py, with L_aux, on
eight seeds that no other table has, a process a core:

    git apply config/rivals.patch
    python train.py config/paper_table2.py config/who_scores.py --seeds=31,32,33,34
    python train.py config/paper_table2.py config/who_scores.py --seeds=35,36,37,38
    git apply --reverse config/rivals.patch

Each has the best of three learning rates: those of moe, aoe and aoe whole are from
learning_rate.py (seeds 1 to 3), the others from who_scores_rates.py (seed 21).
"""

out_dir = 'out/who_scores'
aux_weight = 0.01
_whole_gate = {
    'moe': (2e-3, {'mlp': 'moe'}),
    'moe large router': (1.4e-3, {'mlp': 'moe', 'router': 'large', 'd_low': 16}),
    'moe frozen': (2e-3, {'mlp': 'moe', 'frozen': True}),
    'aoe whole': (2e-3, {'mlp': 'aoe', 'factorised': False}),
    'aoe whole frozen': (2e-3, {'mlp': 'aoe', 'factorised': False, 'frozen': True}),
    'moe sigmoid': (2e-3, {'mlp': 'moe', 'bias_step': 1e-3, 'aux_weight': 0}),
    'aoe whole virtual': (2e-3, {'mlp': 'aoe', 'factorised': False, 'virtual': True}),
}
_factorised_gate = {
    'moe factorised': (2e-3, {'mlp': 'moe', 'factorised': True}),
    'moe factorised large router': (2e-3, {'mlp': 'moe', 'factorised': True, 'router': 'large'}),
    'moe factorised frozen': (2e-3, {'mlp': 'moe', 'factorised': True, 'frozen': True}),
    'aoe': (1.4e-3, {'mlp': 'aoe'}),
    'aoe frozen': (2e-3, {'mlp': 'aoe', 'frozen': True}),
}
runs = {}
for _name, (_rate, _variant) in (_whole_gate | _factorised_gate).items():
    runs[_name] = _variant | {'learning_rate': _rate}
