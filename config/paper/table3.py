"""
The paper's Table 3: other ways to choose experts, for MoE and AoE alike. A token takes its K best
(top-k), or as many as reach a probability together (top-p). Without a penalty on Ent_conf, top-p
would take everyone. In expert-choice each expert takes its best tokens. The shape and the schedule
are those of small.py:

    python train.py config/small.py config/paper/table3.py

Expert-choice sees the tokens of the whole batch, later ones among them. So its validation loss is
not that of a language model, and can only compare MoE with AoE.
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
