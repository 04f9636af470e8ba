"""
The shape and the schedule of the experiments in the folders here: 3 layers, 96 wide, the paper's
proportions. A run takes two minutes on one core; the same command goes on where it stopped:

    python prepare_data.py shakespeare
    python train.py config/small.py config/paper/table2.py
"""

seeds = [1, 2, 3]

# d_ffn = 4 D, by default; d_low = D/12, D/6, D/3, 2 D/3
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
