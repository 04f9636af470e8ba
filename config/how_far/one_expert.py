"""
With one expert per token, K = 1, the softmax over the chosen is 1 and gives a router no gradient.
Switch Transformers weigh the expert by its probability among all E, which gives one. The shape is
that of small.py, with L_aux:

    python train.py config/small.py config/how_far/one_expert.py
"""

out_dir = 'out/one_expert'
top_k = 1
aux_weight = 0.01
runs = {
    'moe': {'mlp': 'moe'},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe': {'mlp': 'aoe'},
    'moe switch': {'mlp': 'moe', 'weigh_among': 'all'},
    'aoe_whole switch': {'mlp': 'aoe', 'factorised': False, 'weigh_among': 'all'},
    'aoe switch': {'mlp': 'aoe', 'weigh_among': 'all'},
}
