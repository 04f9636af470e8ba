"""
moe, moe with a large router, and aoe_whole at half and at twice small.py's width, on seeds that no
other table has. The learning rates of moe and aoe_whole were the best in learning_rate.py of commit
eb42c98. That of a large router was the best on seed 21 (config/who_scores/rates.py of commit
b5d5aed):

    python train.py config/small.py config/how_far/new_sizes.py
"""

out_dir = 'out/new_sizes'
aux_weight = 0.01
seeds = [51, 52, 53, 54, 55]
runs = {}
for _width, _moe_rate, _large_rate, _whole_rate in (
        (48, 5.6e-3, 5.6e-3, 4e-3), (192, 1e-3, 5e-4, 7e-4)):
    _size = {'n_embd': _width, 'n_head': _width // 24}
    runs |= {
        f'moe {_width}': _size | {'mlp': 'moe', 'learning_rate': _moe_rate},
        f'moe large router {_width}': _size | {'mlp': 'moe', 'router': 'large',
                                               'd_low': _width // 6, 'learning_rate': _large_rate},
        f'aoe_whole {_width}': _size | {'mlp': 'aoe', 'factorised': False,
                                        'learning_rate': _whole_rate},
    }
