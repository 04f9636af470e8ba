"""
Today's shapes, on three seeds that no other table has. One is 4 of 32 experts, a quarter as wide,
with L_aux. A judge of D/6 costs more there, so narrower ones are tried, too. The other is that of
Routing-Free MoE (2604.00801), 3 of 12 experts as wide as D/4, without L_aux. The rest is as in
small.py:

    python train.py config/small.py config/how_far/todays_shapes.py
"""

out_dir = 'out/todays_shapes'
seeds = [41, 42, 43]
_many = {'n_expert': 32, 'top_k': 4, 'd_ffn': 96, 'aux_weight': 0.01}
_free = {'n_expert': 12, 'top_k': 3, 'd_ffn': 24}
runs = {
    'moe 4 of 32': {'mlp': 'moe'} | _many,
    'moe large router 4 of 32': {'mlp': 'moe', 'router': 'large', 'd_low': 16} | _many,
    'aoe_whole 4 of 32': {'mlp': 'aoe', 'factorised': False} | _many,
    'aoe_whole narrow 4 of 32': {'mlp': 'aoe', 'factorised': False, 'd_judge': 4} | _many,
    'aoe 4 of 32': {'mlp': 'aoe', 'd_low': 48} | _many,
    'moe 3 of 12': {'mlp': 'moe'} | _free,
    'aoe_whole 3 of 12': {'mlp': 'aoe', 'factorised': False} | _free,
    'aoe 3 of 12': {'mlp': 'aoe', 'd_low': 32} | _free,            # D/3, more than d_ffn
    'aoe 3 of 12 narrow': {'mlp': 'aoe', 'd_low': 8} | _free,
}
