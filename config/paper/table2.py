"""
Table 2 of the paper, scaled down: is it the factorised gate, is it the larger
router, or is it that the experts choose themselves? Twelve variants, three seeds.

    python prepare_data.py shakespeare
    python train.py config/paper/table2.py

continues where it stopped and skips runs that are done. A run uses one thread:
start one process for each seed, with --seeds=1 and so on.
"""

out_dir = 'out/paper_table2'
init_from = 'auto'
threads = 1

# the paper's proportions: d_ffn = 4 D, by default; d_low = D/12, D/6, D/3, 2 D/3
n_layer = 3
n_head = 4
n_embd = 96

block_size = 64
batch_size = 16
max_iters = 1600
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 400
eval_iters = 50

seeds = [1, 2, 3]
runs = {
    'moe': {'mlp': 'moe'},
    'moe aux': {'mlp': 'moe', 'aux_weight': 0.01},
    'moe factorised aux': {'mlp': 'moe', 'aux_weight': 0.01, 'factorised': True},
    'moe large router aux': {'mlp': 'moe', 'aux_weight': 0.01, 'router': 'large'},
}
for _d_low in (8, 16, 32, 64):
    runs[f'aoe {_d_low}'] = {'mlp': 'aoe', 'd_low': _d_low}
    runs[f'aoe {_d_low} aux'] = {'mlp': 'aoe', 'd_low': _d_low, 'aux_weight': 0.01}
