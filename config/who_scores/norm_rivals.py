"""
What else could it be? On the first four seeds of norm.py, in bfloat16, whose moe and norm router
they are compared with: scores four times as large; a large router with its last matrix wide;
without L_aux; and, beside norm_factorised.py's aoe, aoe with scores twice as large:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/norm_rivals.py
    git apply --reverse config/who_scores/rivals.patch
"""

out_dir = 'out/norm_rivals'
aux_weight = 0.01
dtype = 'bfloat16'
seeds = [61, 62, 63, 64]
_norm = {'mlp': 'moe', 'router': 'norm', 'd_low': 16, 'd_ffn': 376, 'learning_rate': 1.4e-3}
runs = {
    'moe x4': {'mlp': 'moe', 'score_scale': 4.0},
    'moe large router wide router': {'mlp': 'moe', 'router': 'large', 'd_low': 16, 'd_ffn': 376,
                                     'learning_rate': 1.4e-3, 'router_std': 96 ** -0.5},
    'moe without L_aux': {'mlp': 'moe', 'aux_weight': 0.0},
    'moe wide router without L_aux': {'mlp': 'moe', 'router_std': 96 ** -0.5, 'aux_weight': 0.0},
    'moe norm router without L_aux': _norm | {'aux_weight': 0.0},
    'aoe_whole without L_aux': {'mlp': 'aoe', 'factorised': False, 'aux_weight': 0.0},
    'aoe x2': {'mlp': 'aoe', 'score_scale': 2.0, 'learning_rate': 1.4e-3},
}
