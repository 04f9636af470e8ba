"""
Our dense model ends far below nanoGPT's on the same text, at its size and on its schedule. Which of
the differences brings that? One taken back at a time, and all three: learned positions, GELU, the
first weights. A patch of model.py has the keys:

    git apply config/how_far/nanogpt_parts.patch
    python train.py config/nanogpt_cpu.py config/how_far/nanogpt_parts.py
    git apply --reverse config/how_far/nanogpt_parts.patch
"""
out_dir = 'out/nanogpt_parts'
mlp = 'dense'
seeds = [1, 2, 3]
runs = {
    'dense': {},
    'dense learned positions': {'learned': True},
    'dense gelu': {'gelu': True},
    'dense first weights': {'gpt2_init': True},
    'dense all three': {'learned': True, 'gelu': True, 'gpt2_init': True},
}
