"""
The shape and the schedule of most experiments in these folders: 3 layers, 96 wide, in the paper's
proportions. A run takes two minutes on one core, and the same command resumes what was stopped:

    python prepare_data.py shakespeare
    python train.py config/small.py config/paper/table2.py
"""

seeds = [1, 2, 3]

# d_ffn is 4 D by default, and experiments set d_low to D/12, D/6, D/3 or 2 D/3
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
