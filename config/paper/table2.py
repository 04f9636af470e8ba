"""
Table 2 of the paper, scaled down. If AoE differs from MoE, is it by its factorised gate, by scoring
with more weights (as a large router does), or because experts choose themselves? There are twelve
variants, three seeds, and d_low from D/12 to 2 D/3:

    python train.py config/small.py config/paper/table2.py
"""

out_dir = 'out/table2'
runs = {
    'moe': {'mlp': 'moe'},
    'moe aux': {'mlp': 'moe', 'aux_weight': 0.01},
    'moe factorised aux': {'mlp': 'moe', 'aux_weight': 0.01, 'factorised': True},
    'moe large router aux': {'mlp': 'moe', 'aux_weight': 0.01, 'router': 'large'},
}
for _d_low in (8, 16, 32, 64):
    runs[f'aoe {_d_low}'] = {'mlp': 'aoe', 'd_low': _d_low}
    runs[f'aoe {_d_low} aux'] = {'mlp': 'aoe', 'd_low': _d_low, 'aux_weight': 0.01}
