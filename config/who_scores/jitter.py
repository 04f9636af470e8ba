"""
aoe_whole leads moe by more in bfloat16 than in float32, in norm.py. Do its scores gain by being
rounded? In float32 they are multiplied, in training, by random numbers of 1 ± 0.005 (bfloat16
rounds by up to 0.002); on the seeds of norm.py, whose moe and aoe_whole they are compared with:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/jitter.py
    git apply --reverse config/who_scores/rivals.patch
"""

out_dir = 'out/jitter'
aux_weight = 0.01
dtype = 'float32'
seeds = [61, 62, 63, 64, 65, 66, 67, 68]
runs = {
    'moe jitter float32': {'mlp': 'moe', 'jitter': 0.005},
    'aoe_whole jitter float32': {'mlp': 'aoe', 'factorised': False, 'jitter': 0.005},
}
