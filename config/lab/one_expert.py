"""
Exercise 3 of the lab: one expert a token, weighed by a softmax over that one alone, or
as in Switch Transformers over all eight.

    python train.py config/lab/lab.py config/lab/one_expert.py
"""

top_k = 1
runs = {
    'aoe_k1': {'mlp': 'aoe'},
    'moe_k1': {'mlp': 'moe'},
    'aoe_k1_switch': {'mlp': 'aoe', 'weigh_among': 'all'},
    'moe_k1_switch': {'mlp': 'moe', 'weigh_among': 'all'},
}
