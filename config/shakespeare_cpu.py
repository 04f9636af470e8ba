"""The quick start: four models on Shakespeare's works, in minutes on two cores of a CPU, in the
paper's proportions. aoe is the paper's, aoe whole has a gate that is not factorised."""
out_dir = 'out/shakespeare_cpu'
dataset = 'shakespeare'
runs = {
    'aoe': {'mlp': 'aoe'},
    'aoe whole': {'mlp': 'aoe', 'factorised': False},
    'moe': {'mlp': 'moe'},
    'dense': {'mlp': 'dense'},
}

n_layer = 3
n_head = 4
n_embd = 96
block_size = 64
n_expert = 8
top_k = 2
d_ffn = 4 * n_embd
aux_weight = 0.01                        # without it, a few experts take most of the tokens

batch_size = 16
max_iters = 2000
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 250
eval_iters = 50
