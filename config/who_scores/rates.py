"""
Learning rates of large_router.py and ../how_far/new_sizes.py that ../how_far/learning_rate.py
doesn't have, on a seed of their own: of large routers, and of moe with a factorised gate:

    python train.py config/small.py config/who_scores/rates.py
"""

out_dir = 'out/rates'
aux_weight = 0.01
seeds = [21]
_large = {'mlp': 'moe', 'router': 'large'}               # as many parameters as the experts' judges
_rates = {
    'moe large router': (_large | {'d_low': 16}, ('7e-4', '1e-3', '1.4e-3', '2e-3', '2.8e-3')),
    'moe factorised': ({'mlp': 'moe', 'factorised': True}, ('1e-3', '1.4e-3', '2e-3')),
    'moe factorised large router': (_large | {'factorised': True},
                                    ('1e-3', '1.4e-3', '2e-3', '2.8e-3')),
    'moe large router 48': (_large | {'d_low': 8, 'n_embd': 48, 'n_head': 2},
                            ('2.8e-3', '4e-3', '5.6e-3', '8e-3')),
    'moe large router 192': (_large | {'d_low': 32, 'n_embd': 192, 'n_head': 8},
                             ('3.5e-4', '5e-4', '7e-4', '1e-3')),
}
runs = {}
for _name, (_variant, _tried) in _rates.items():
    for _rate in _tried:
        runs[f'{_name} {_rate}'] = _variant | {'learning_rate': float(_rate)}
