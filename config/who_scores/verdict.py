"""The verdict: who should score, a router or the experts, and which gate? The 2 x 2, equal in
parameters to 1 %, and two more, on 20 seeds that no other file uses:

                     whole gate     factorised gate
    a router         moe            moe_factorised
    the experts      aoe_whole      aoe              the paper's AoE

    aoe_narrow   aoe, but 8 of its 32 numbers score
    dense        one MLP, as large as the two experts that a token meets

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
- Nothing is looked at before all runs of a block of seeds are done.

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
# not yet those of rates.py: they are filled in when it has ended, before the first run
_rates = dict.fromkeys(('moe', 'moe_factorised', 'aoe_whole', 'aoe', 'aoe_narrow', 'dense'), 2.8e-3)
runs = {
    'moe': {'mlp': 'moe'},
    'moe_factorised': {'mlp': 'moe', 'factorised': True},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False},
    'aoe': {'mlp': 'aoe'},
    'aoe_narrow': {'mlp': 'aoe', 'd_judge': 8},
    'dense': {'mlp': 'dense'},
}
for _name, _rate in _rates.items():
    runs[_name]['learning_rate'] = _rate
