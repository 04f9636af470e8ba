"""
Once more, on eight seeds that did not help to find it: is aoe_whole better than moe, and does a
linear router that is drawn wide do as well?

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/again.py
    git apply --reverse config/who_scores/rivals.patch

Named before the runs: by test_loss, seed by seed averaged over the two dtypes, aoe_whole minus moe,
the wide router minus moe, and the wide router minus aoe_whole, level if its interval lies within
± 0.005. And is aoe_whole minus moe lower in bfloat16 than in float32?
"""

out_dir = 'out/again'
aux_weight = 0.01
seeds = [69, 70, 71, 72, 73, 74, 75, 76]
runs = {}
for _dtype in ('float32', 'bfloat16'):
    runs |= {
        f'moe {_dtype}': {'mlp': 'moe', 'dtype': _dtype},
        f'moe wide router {_dtype}': {'mlp': 'moe', 'router_std': 96 ** -0.5, 'dtype': _dtype},
        f'aoe_whole {_dtype}': {'mlp': 'aoe', 'factorised': False, 'dtype': _dtype},
    }
