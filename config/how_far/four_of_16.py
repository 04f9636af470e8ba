"""
The verdict's five variants with 4 of 16 experts, half as wide, on six new seeds; as there in
float32, with L_aux, at its learning rates. Named before the first run, by the rules of
../who_scores/verdict.py: test_loss minus moe's, four comparisons, Holm's correction, level within
0.005:

    python train.py config/small.py config/who_scores/verdict.py config/how_far/four_of_16.py
"""

out_dir = 'out/four_of_16'
seeds = range(425, 431)
n_expert = 16
top_k = 4
d_ffn = 192
