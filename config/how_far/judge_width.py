"""
How many numbers should score? An expert with a whole gate scores itself by the norm of the first
d_judge numbers of x Wg: from 4 (D/24) to 64 (2 D/3). In the shape of small.py, with L_aux:

    python train.py config/small.py config/how_far/judge_width.py
"""

out_dir = 'out/judge_width'
factorised = False
aux_weight = 0.01
seeds = [1, 2, 3, 4, 5]
runs = {'moe': {'mlp': 'moe'}}
for _width in (4, 8, 16, 32, 64):
    runs[f'aoe_whole {_width}'] = {'mlp': 'aoe', 'd_judge': _width}
