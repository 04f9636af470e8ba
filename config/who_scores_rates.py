"""
The learning rates of who_scores.py, three for each variant, on a seed of their own:

    git apply config/rivals.patch
    python train.py config/paper_table2.py config/who_scores_rates.py
    git apply --reverse config/rivals.patch
"""

from runpy import run_path as _run_path

out_dir = 'out/who_scores_rates'
aux_weight = 0.01
seeds = [21]
runs = {}
for _name, _variant in _run_path(__file__.replace('_rates', ''))['runs'].items():
    if _name not in ('moe', 'aoe', 'aoe whole'):         # learning_rate.py has theirs
        for _rate in ('1.4e-3', '2e-3', '2.8e-3'):
            runs[f'{_name} {_rate}'] = _variant | {'learning_rate': float(_rate)}
