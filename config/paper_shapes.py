"""
Where is AoE at its best? With more and smaller experts, or with three times the
tokens, each beside MoE; the rest as in paper_table2.py:

    python train.py config/paper_table2.py config/paper_shapes.py
"""

out_dir = 'out/paper_shapes'
aux_weight = 0.01
runs = {
    'moe 4 of 16': {'mlp': 'moe', 'd_ffn': 192, 'n_expert': 16, 'top_k': 4},
    'aoe 4 of 16': {'mlp': 'aoe', 'd_ffn': 192, 'n_expert': 16, 'top_k': 4},
    'moe long': {'mlp': 'moe', 'max_iters': 4800, 'eval_interval': 1200},
    'aoe long': {'mlp': 'aoe', 'max_iters': 4800, 'eval_interval': 1200},
}
