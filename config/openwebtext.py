"""The paper's small model on OpenWebText: 12 layers, 768 wide, 8 experts of 4 D, d_low = D / 3,
with L_aux. It is meant for GPUs of 80 GB. The paper trains it on 100 billion tokens, 4.2 million
in an iteration. Here it is 10 billion."""
out_dir = 'out/openwebtext'
dataset = 'openwebtext_gpt2'
mlp = 'aoe'
vocab_size = 50304                       # gpt2's 50,257, rounded up to a multiple of 64

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
n_expert = 8
top_k = 2
d_ffn = 3072
aux_weight = 0.01

batch_size = 16
gradient_accumulation_steps = 32         # 16 * 1,024 * 32 = 524,288 tokens an iteration
max_iters = 20_000
learning_rate = 2e-4
min_lr = 1.28e-5
warmup_iters = 1000
eval_interval = 500
eval_iters = 100
