"""The quick start: aoe, moe and dense on Shakespeare's works, in minutes on two cores of a CPU.
In the paper's proportions: an expert's hidden layer is 4 D wide, its self-evaluation D / 3."""
out_dir = 'out/shakespeare_cpu'
dataset = 'shakespeare'
mlp = 'aoe,moe,dense'

n_layer = 3
n_head = 4
n_embd = 96
block_size = 64
n_expert = 8
top_k = 2
d_ffn = 4 * n_embd
d_low = 32
aux_weight = 0.01                        # without it, a few experts take most of the tokens

batch_size = 16
max_iters = 2000
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 250
eval_iters = 50
