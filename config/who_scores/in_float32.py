"""
Does a rounding decide? moe and aoe_whole on the seeds of large_router.py, in float32:

    python train.py config/small.py config/who_scores/in_float32.py
"""

out_dir = 'out/in_float32'
aux_weight = 0.01
dtype = 'float32'
seeds = [31, 32, 33, 34, 35, 36, 37, 38]
runs = {'moe': {'mlp': 'moe'}, 'aoe_whole': {'mlp': 'aoe', 'factorised': False}}
