"""
Learning rates, on two seeds that no table has: of norm.py's norm router; of a linear router that is
drawn wide (by a patch); and of norm_factorised.py's norm router:

    git apply config/who_scores/rivals.patch
    python train.py config/small.py config/who_scores/norm_rates.py
    git apply --reverse config/who_scores/rivals.patch
"""

out_dir = 'out/norm_rates'
aux_weight = 0.01
dtype = 'bfloat16'
seeds = [26, 27]
_rivals = {
    'norm router': {'router': 'norm', 'd_low': 16, 'd_ffn': 376},
    'wide router': {'router_std': 96 ** -0.5},
    'factorised norm router': {'factorised': True, 'router': 'norm', 'd_ffn': 372},
}
runs = {f'moe {_name} {_rate}': {'mlp': 'moe', 'learning_rate': float(_rate)} | _rivals[_name]
        for _name, _rates in (('norm router', ('1.4e-3', '2e-3', '2.8e-3')),
                              ('wide router', ('1.4e-3', '2e-3', '2.8e-3')),
                              ('factorised norm router', ('1e-3', '1.4e-3', '2e-3')))
        for _rate in _rates}
