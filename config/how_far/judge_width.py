"""
How wide should a judge be? An expert with a whole gate judges by the first d_judge
neurons of it: from 4 (D/24) to 64 (2 D/3). As in ../who_scores/two_questions.py, with L_aux:

    python train.py config/small.py config/how_far/judge_width.py
"""

out_dir = 'out/judge_width'
factorised = False
aux_weight = 0.01
seeds = [1, 2, 3, 4, 5]
runs = {'moe': {'mlp': 'moe'}}
for _width in (4, 8, 16, 32, 64):
    runs[f'aoe_whole {_width}'] = {'mlp': 'aoe', 'd_judge': _width}
