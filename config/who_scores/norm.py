"""
Norm, scale or self? Experts that score themselves differ from a router in three things at once:
their score is a norm of several numbers, its scale is wider at the start, and the matrix that
scores is their own gate. Between the two stands a router that scores by norms, p_i = ||x A_i||, of
matrices A_i (D, 16) that do nothing else. In float32 and in bfloat16, on eight seeds that no other
table has, with L_aux, at equal size (d_ffn gives way to the A_i):

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/norm.py
    git apply --reverse config/who_scores/rivals.patch

Named before the runs: the primary comparisons are the norm router minus moe, and minus aoe_whole,
by test_loss, on windows of the text that no choice has seen. Rates: moe's and aoe_whole's are of
../how_far/learning_rate.py, the norm router's of norm_rates.py.
"""

out_dir = 'out/norm'
aux_weight = 0.01
seeds = [61, 62, 63, 64, 65, 66, 67, 68]
runs = {}
for _dtype in ('float32', 'bfloat16'):
    runs |= {
        f'moe {_dtype}': {'mlp': 'moe', 'dtype': _dtype},
        f'moe norm router {_dtype}': {'mlp': 'moe', 'router': 'norm', 'd_low': 16, 'd_ffn': 376,
                                      'learning_rate': 1.4e-3, 'dtype': _dtype},
        f'aoe_whole {_dtype}': {'mlp': 'aoe', 'factorised': False, 'dtype': _dtype},
    }
