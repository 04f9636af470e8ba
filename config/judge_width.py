"""
How wide should a judge be? An expert with a whole gate judges by the first d_low
neurons of it: from 4 (D/24) to 64 (2 D/3). As in two_questions.py, with L_aux:

    python train.py config/paper_table2.py config/judge_width.py --seeds=1,3,5
    python train.py config/paper_table2.py config/judge_width.py --seeds=2,4
"""

out_dir = 'out/judge_width'
factorised = False
aux_weight = 0.01
seeds = [1, 2, 3, 4, 5]
runs = {
    'moe': {'mlp': 'moe'},
    'aoe whole 4': {'mlp': 'aoe', 'd_low': 4},
    'aoe whole 8': {'mlp': 'aoe', 'd_low': 8},
    'aoe whole 16': {'mlp': 'aoe', 'd_low': 16},
    'aoe whole 32': {'mlp': 'aoe', 'd_low': 32},
    'aoe whole 64': {'mlp': 'aoe', 'd_low': 64},
}
