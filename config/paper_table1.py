"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE chooses its experts by
the norm of an inner node instead of its router. No weight changes.

    python train.py config/paper_table2.py        # trains it
    python train.py config/paper_table1.py
"""

out_dir = 'out/paper_table2'
eval_only = True
choose_by = 'all'

n_layer = 3
n_head = 4
n_embd = 96
d_ffn = 384
d_low = 32
block_size = 64
batch_size = 16
eval_iters = 50

seeds = [1, 2, 3]
runs = {'moe aux': {'mlp': 'moe', 'aux_weight': 0.01}}
