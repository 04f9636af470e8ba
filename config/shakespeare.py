"""For one GPU: aoe, moe and dense on Shakespeare, with 6 layers, 384 wide, and 8 experts."""
out_dir = 'out/shakespeare'
dataset = 'shakespeare'
mlp = 'aoe,moe,dense'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.1
n_expert = 8
top_k = 2
d_ffn = 1024

batch_size = 32
gradient_accumulation_steps = 2          # 64 sequences in two halves, since the M1 and M2 multiply
                                         # matrices of 32,767 rows or more wrongly (PyTorch issue
                                         # 195163), and each token makes K = 2 rows
max_iters = 5000
learning_rate = 1e-3
warmup_iters = 100
eval_interval = 250
eval_iters = 50
