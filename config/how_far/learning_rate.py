"""
Is one learning rate fair to all? At each width as many trials for MoE as for AoE,
in the shape of small.py, with L_aux. A run takes 45, 85 and 220 seconds at
D 48, 96 and 192:

    python train.py config/small.py config/how_far/learning_rate.py
"""

out_dir = 'out/learning_rate'
aux_weight = 0.01
runs = {}
_variants = {
    'moe': {'mlp': 'moe'},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe': {'mlp': 'aoe'},
}
_rates = {
    48: ('2e-3', '2.8e-3', '4e-3', '5.6e-3', '8e-3'),
    96: ('1e-3', '1.4e-3', '2e-3', '2.8e-3', '4e-3'),
    192: ('5e-4', '7e-4', '1e-3', '1.4e-3'),
}

for _width in _rates:
    for _name, _variant in _variants.items():
        for _rate in _rates[_width]:                     # heads of 24 numbers, whatever the width
            runs[f'{_name} {_width} {_rate}'] = _variant | {
                'n_embd': _width, 'n_head': _width // 24, 'learning_rate': float(_rate)}
