"""
Does the gap close with size? The widths are 48, 96 and 192, with heads of 24 numbers, the same
tokens and L_aux. Each has the learning rate that was best in learning_rate.py of commit eb42c98:

    python train.py config/small.py config/how_far/sizes.py
"""

out_dir = 'out/sizes'
aux_weight = 0.01
runs = {}
for _width, _moe_rate, _aoe_rate, _whole_rate in (
        (48, 5.6e-3, 4e-3, 4e-3), (96, 2e-3, 1.4e-3, 2e-3), (192, 1e-3, 7e-4, 7e-4)):
    _size = {'n_embd': _width, 'n_head': _width // 24}
    runs |= {
        f'moe {_width}': _size | {'mlp': 'moe', 'learning_rate': _moe_rate},
        f'aoe {_width}': _size | {'mlp': 'aoe', 'learning_rate': _aoe_rate},
        f'aoe_whole {_width}': _size | {'mlp': 'aoe', 'factorised': False,
                                        'learning_rate': _whole_rate},
    }
