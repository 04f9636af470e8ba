"""
Is it the tie to their own gate that makes experts score worse where the gate is factorised? On the
seeds of norm.py, in bfloat16: a linear router; a router that scores by norms of matrices of its
own, as wide as Wdown; and aoe, which scores by x Wdown:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/norm_factorised.py
    git apply --reverse config/who_scores/rivals.patch

Seen on the first four seeds, and run on four more to check: aoe is worse than the norm router.
"""

out_dir = 'out/norm_factorised'
aux_weight = 0.01
dtype = 'bfloat16'
learning_rate = 1.4e-3
seeds = [61, 62, 63, 64, 65, 66, 67, 68]
runs = {
    'moe factorised': {'mlp': 'moe', 'factorised': True},
    'moe factorised norm router': {'mlp': 'moe', 'factorised': True, 'router': 'norm',
                                   'd_ffn': 372},
    'aoe': {'mlp': 'aoe'},
}
