"""
The lab of README.md: the quick start's proportions, smaller, with three seeds. A run
takes a minute or so on one core; one that is there already is not trained again.

    python train.py config/lab/lab.py
"""

out_dir = 'out/lab'
dataset = 'shakespeare'
mlp = 'aoe,moe,dense'
seeds = [7, 8, 9]

n_layer = 3
n_head = 4
n_embd = 64
block_size = 64
n_expert = 8
top_k = 2
d_ffn = 4 * n_embd
aux_weight = 0.01

batch_size = 16
max_iters = 800
learning_rate = 3e-3
warmup_iters = 50
eval_interval = 200
eval_iters = 50
