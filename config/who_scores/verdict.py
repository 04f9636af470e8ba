"""The verdict: who should score, a router or the experts, and which gate? The 2 x 2, equal in
parameters to 1 %, and three more, on 20 seeds that no other file uses:

                     whole gate     factorised gate
    a router         moe            moe_factorised
    the experts      aoe_whole      aoe              the paper's AoE

    dense           one MLP, as large as the two experts that a token meets
    dense_longer    dense for the seconds that moe takes: 1.26 times as many iterations, by the
                    medians of rates.py's runs of each with seed 384, a core each
    aoe_narrow      aoe, but 8 of its 32 numbers score; it waits for its learning rate

Named before the first run:

- A loss is test_loss, of the last evaluation. Each seed gives one value of each effect; its mean
  has a 95 % interval by Student's t.
- Three effects are primary, with Holm's correction at 5 % (halves make each the mean of two
  differences, or half the difference of two):
    who scores    ((aoe_whole - moe) + (aoe - moe_factorised)) / 2
    which gate    ((moe_factorised - moe) + (aoe - aoe_whole)) / 2
    both          ((aoe - moe_factorised) - (aoe_whole - moe)) / 2, their interaction
  Secondary, without it: aoe_narrow minus aoe, and each of the others minus moe.
- Better or worse: the interval excludes 0. Level: all of it lies within 0.005 of 0. Otherwise we
  can't tell.
- Each variant has the learning rate that rates.py found by its rule. Nothing else is chosen. A run
  that diverges is reported.
- The 2 x 2 runs first, then dense_longer, dense and aoe_narrow. Nothing is looked at before all
  runs of such a block are done. (dense_longer was, after ten seeds.)
- A second scale, not run: 192 wide, the 2 x 2, seeds 521 to 528, rates found by the same rule on
  seeds 381 and 382.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/verdict.py
    python tests/tools/compare.py out/verdict --save=config/who_scores/verdict.jsonl

Or in blocks of seeds, on one machine and with one code: --seeds=501,502,503,504,505. Blocks add up:
compare.py out/verdict config/who_scores/verdict.jsonl --save=config/who_scores/verdict.jsonl
"""
out_dir = 'out/verdict'
dtype = 'float32'
aux_weight = 0.01
seeds = range(501, 521)
# learning rates by rates.py's rule; aoe_narrow's isn't bracketed yet
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 4e-3},
    'moe_factorised': {'mlp': 'moe', 'factorised': True, 'learning_rate': 2e-3},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'aoe': {'mlp': 'aoe', 'learning_rate': 2e-3},
    'dense': {'mlp': 'dense', 'learning_rate': 4e-3},
    'dense_longer': {'mlp': 'dense', 'max_iters': 2020, 'learning_rate': 4e-3},
}
