"""
The learning rate of norm.py's norm router, on two seeds that no table has:

    python train.py config/small.py config/who_scores/norm_rates.py
"""

out_dir = 'out/norm_rates'
aux_weight = 0.01
seeds = [26, 27]
_norm = {'mlp': 'moe', 'router': 'norm', 'd_low': 16, 'd_ffn': 376, 'dtype': 'bfloat16'}
runs = {f'moe norm router {_rate}': _norm | {'learning_rate': float(_rate)}
        for _rate in ('1.4e-3', '2e-3', '2.8e-3')}
