"""
Learning rates of the large router of who_scores.py, on a seed of their own:

    python train.py config/paper_table2.py config/who_scores_rates.py
"""

out_dir = 'out/who_scores_rates'
aux_weight = 0.01
seeds = [21]
runs = {}
for _rate in ('7e-4', '1e-3', '1.4e-3', '2e-3', '2.8e-3'):
    runs[f'moe large router {_rate}'] = {'mlp': 'moe', 'router': 'large', 'd_low': 16,
                                         'learning_rate': float(_rate)}
