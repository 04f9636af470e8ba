"""
Is it only the scale of the first scores? A linear router whose first weights are as wide as those
of the judges (1 / sqrt(D), not 0.02), in two dtypes; and a norm router that stays as it was drawn.
On the seeds of norm.py, whose moe they are compared with:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/wide_router.py
    git apply --reverse config/who_scores/rivals.patch
"""

out_dir = 'out/wide_router'
aux_weight = 0.01
seeds = [61, 62, 63, 64, 65, 66, 67, 68]
_norm = {'mlp': 'moe', 'router': 'norm', 'd_low': 16, 'd_ffn': 376, 'learning_rate': 1.4e-3}
runs = {
    'moe wide router bfloat16': {'mlp': 'moe', 'router_std': 96 ** -0.5, 'dtype': 'bfloat16'},
    'moe wide router float32': {'mlp': 'moe', 'router_std': 96 ** -0.5, 'dtype': 'float32'},
    'moe norm router frozen bfloat16': _norm | {'frozen': True, 'dtype': 'bfloat16'},
}
