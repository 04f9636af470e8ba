"""The quick start trains four models on a text that is half Shakespeare and half Python, in minutes
on two cores of a CPU. aoe is the paper's AoE, and in aoe_whole the gates are not factorised."""
out_dir = 'out/quick_start'
dataset = 'prose_and_code'
runs = {
    'dense': {'mlp': 'dense'},
    'moe': {'mlp': 'moe'},
    'aoe': {'mlp': 'aoe'},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
}

n_layer = 3
n_head = 4
n_embd = 96
block_size = 64
n_expert = 8
top_k = 2
d_ffn = 4 * n_embd
aux_weight = 0.01                        # without it some experts handle several times as much

batch_size = 16
max_iters = 1200
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 200
eval_iters = 50
