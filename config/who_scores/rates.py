"""The learning rate of each variant of verdict.py: the one with the lowest mean validation loss
(val_loss, of the last evaluation) over four seeds that no other file uses.

The rule, named before the first run: rates are a factor of sqrt 2 apart, to two digits. Begin with
1.4e-3, 2e-3, 2.8e-3, 4e-3, for every variant. While a variant's lowest mean is at an end of its
rates, add the next rate beyond that end, for it alone; a rate at which a run diverges is an end
that is higher. Nothing else is chosen, and test_loss isn't looked at.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/rates.py
"""
out_dir = 'out/rates'
dtype = 'float32'
aux_weight = 0.01
seeds = (381, 382, 383, 384)
_variants = {
    'moe': {'mlp': 'moe'},
    'moe_factorised': {'mlp': 'moe', 'factorised': True},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe': {'mlp': 'aoe'},
    'aoe_narrow': {'mlp': 'aoe', 'd_judge': 8},
    'dense': {'mlp': 'dense'},
}
_rates = [1.4e-3, 2e-3, 2.8e-3, 4e-3]
runs = {f'{name} {rate:.1e}': {**keys, 'learning_rate': rate}
        for rate in _rates for name, keys in _variants.items()}
