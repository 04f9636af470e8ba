"""The learning rates of the two variants of tie.py that have none yet. The rule, named before the
first run, is that of rates.py but for its beginning: rates are a factor of sqrt 2 apart. Begin with
1.4e-3, 2e-3 and 2.8e-3. While the lowest mean validation loss (val_loss, of the last evaluation,
over four seeds that no other file uses) is at an end of a variant's rates, add the next rate beyond
that end. Nothing else is chosen, and test_loss isn't looked at.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/tie_rates.py
"""
out_dir = 'out/tie_rates'
dtype = 'float32'
aux_weight = 0.01
seeds = (385, 386, 387, 388)
_variants = {
    'untied': {'mlp': 'aoe', 'tied': False},
    'untied_whole': {'mlp': 'aoe', 'tied': False, 'factorised': False},
}
runs = {f'{name} {rate:.1e}': {**keys, 'learning_rate': rate}
        for rate in (1.4e-3, 2e-3, 2.8e-3) for name, keys in _variants.items()}
