"""The verdict: who should score, a router or the experts, and what does each part of the paper's
AoE cost or gain? Five variants, equal in parameters to 1 %, on 24 seeds that no other file uses:

    moe          a router scores
    moe wide     its first weights are five times as large
    aoe_whole    experts score themselves, by 16 of the 384 numbers of a whole gate
    aoe          the paper's: by the 32 numbers between the two matrices of a factorised gate
    aoe narrow   the same, by the first 8 of the 32

Named before the first run:

- The loss is test_loss, of the last evaluation, minus that of moe on the same seed. Its mean over
  seeds has a 95 % interval by Student's t.
- Four comparisons are primary: each variant minus moe, with Holm's correction at 5 %. Two are
  secondary, without it: aoe narrow minus aoe, and moe wide minus aoe_whole.
- Better or worse: the interval excludes 0; sure, if it also survives Holm's correction. Level: all
  of the interval lies within 0.005 of 0. Otherwise we can't tell.
- Each variant has the learning rate that verdict_rates.py found. Nothing else is chosen. A run that
  diverges is reported.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/verdict.py

Or in blocks of six seeds, on one machine and with one code (compare.py doesn't average over two):

    python train.py config/small.py config/who_scores/verdict.py --seeds=401,402,403,404,405,406
    cp out/verdict/results.jsonl config/who_scores/verdict.jsonl

Blocks add up: results.jsonl keeps the lines of runs whose folders are gone. If all of out/ is gone,
first copy verdict.jsonl back to out/verdict/results.jsonl.
"""
out_dir = 'out/verdict'
dtype = 'float32'
aux_weight = 0.01
seeds = range(401, 425)
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 2.8e-3},
    'moe wide': {'mlp': 'moe', 'router_std': 0.1, 'learning_rate': 2.8e-3},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2.8e-3},
    'aoe': {'mlp': 'aoe', 'learning_rate': 1.4e-3},
    'aoe narrow': {'mlp': 'aoe', 'd_judge': 8, 'learning_rate': 1.4e-3},
}
