"""
nanoGPT's own recipe for a laptop's CPU, on its text: 4 layers, 128 wide, and 2,000 iterations of 12
times 64 characters. Our dense MLP is as large as nanoGPT's, and so are the two experts that handle
a token in moe and aoe:

    python prepare_data.py tinyshakespeare
    python train.py config/nanogpt_cpu.py
"""
out_dir = 'out/nanogpt_cpu'
dataset = 'tinyshakespeare'
mlp = 'dense,moe,aoe'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
d_ffn = 168                              # two experts: 336 of SwiGLU, for its 512 of GELU

batch_size = 12
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
eval_interval = 250
eval_iters = 200
dtype = 'float32'                        # as nanoGPT's on a CPU
