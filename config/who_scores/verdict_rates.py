"""Which learning rate each variant of verdict.py gets: the one of three with the lowest mean
validation loss (`val loss` in the table) over three seeds that no other file uses. It is chosen by
this table alone, and nothing else is chosen.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/verdict_rates.py
"""
out_dir = 'out/verdict_rates'
dtype = 'float32'
aux_weight = 0.01
seeds = (391, 392, 393)
_variants = {
    'moe': {'mlp': 'moe'},
    'moe wide': {'mlp': 'moe', 'router_std': 0.1},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe': {'mlp': 'aoe'},
    'aoe narrow': {'mlp': 'aoe', 'd_judge': 8},
}
runs = {f'{name} {rate:.1e}': {**keys, 'learning_rate': rate}
        for rate in (1.4e-3, 2e-3, 2.8e-3) for name, keys in _variants.items()}
