"""
Other ways to choose experts, the paper's Table 3, for MoE and AoE alike: the K
best of a token; as many as reach a probability together (top-p, with a penalty
on Ent_conf, or a token would take everyone); or each expert takes its best
tokens (expert-choice). In the shape and with the schedule of small.py:

    python train.py config/small.py config/paper/table3.py

Expert-choice sees the tokens of the whole batch, later ones among them, so its
validation loss is not one of a language model, and tells only MoE from AoE.
"""

out_dir = 'out/table3'
runs = {
    'moe top_k': {'mlp': 'moe', 'aux_weight': 0.01},
    'aoe top_k': {'mlp': 'aoe', 'aux_weight': 0.01},
    'moe top_p': {'mlp': 'moe', 'select': 'top_p', 'top_p': 0.6, 'conf_weight': 1e-4,
                  'aux_weight': 0.01},
    'aoe top_p': {'mlp': 'aoe', 'select': 'top_p', 'top_p': 0.6, 'conf_weight': 1e-4,
                  'aux_weight': 0.01},
    'moe expert_choice': {'mlp': 'moe', 'select': 'expert_choice', 'capacity_factor': 2.0},
    'aoe expert_choice': {'mlp': 'aoe', 'select': 'expert_choice', 'capacity_factor': 2.0},
}
