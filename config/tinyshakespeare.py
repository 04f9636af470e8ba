"""Comparable to nanoGPT's baby GPT, whose published validation loss on this text is 1.4697. Data,
depth, width, context, batch, dropout and schedule are the same. With d_ffn = 512 two active experts
take as many multiply-adds as its GELU MLP of 4 * 384, since 3 * 2 * 512 = 2 * 4 * 384."""
out_dir = 'out/tinyshakespeare'
dataset = 'tinyshakespeare'
mlp = 'aoe,moe,dense'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
n_expert = 8
top_k = 2
d_ffn = 512

batch_size = 32
gradient_accumulation_steps = 2          # 64 sequences in two halves, since the M1 and M2 multiply
                                         # matrices of 32,767 rows or more wrongly (PyTorch issue
                                         # 195163), and each token makes K = 2 rows
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
eval_iters = 20
