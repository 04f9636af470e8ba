"""
Rivals of today, and scorers that don't learn, which are no part of model.py but a
patch of it: a router, or judges, that stay as they were drawn; sigmoid scores
balanced by a bias and not by L_aux (DeepSeek-V3); all judges together as a virtual
shared expert (Union-of-Experts). On the seeds of large_router.py, whose moe they are
compared with, at its learning rate:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/rivals.py
    git apply --reverse config/who_scores/rivals.patch
"""

out_dir = 'out/rivals'
aux_weight = 0.01
seeds = [31, 32, 33, 34, 35, 36, 37, 38]
runs = {
    'moe frozen': {'mlp': 'moe', 'frozen': True},
    'moe sigmoid': {'mlp': 'moe', 'bias_step': 1e-3, 'aux_weight': 0},
    'moe factorised frozen': {'mlp': 'moe', 'factorised': True, 'frozen': True},
    'aoe_whole frozen': {'mlp': 'aoe', 'factorised': False, 'frozen': True},
    'aoe_whole virtual': {'mlp': 'aoe', 'factorised': False, 'virtual': True},
    'aoe frozen': {'mlp': 'aoe', 'frozen': True},
}
