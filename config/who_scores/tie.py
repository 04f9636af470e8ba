"""Why does a factorised gate harm experts that score themselves more than it harms a router? The
verdict (verdict.py) found this harm and didn't explain it.

The tie: in aoe one narrow matrix, w_down, has two jobs. It is the first half of the gate, and the
norm of what it finds is the expert's score. What makes a good judge may make a bad gate. In untied,
experts score themselves by a matrix of their own, w_judge, and the gate is left alone.

    moe             a router scores; whole gates
    moe_factorised  a router scores; factorised gates
    aoe             the paper's: experts score by all 32 numbers x Wdown of their factorised gates
    untied          experts score by 32 numbers of their own, x Wjudge; factorised gates
    untied_whole    experts score by 16 numbers of their own; whole gates

All have as many parameters as moe, to 1 %.

Named before the first run:

- A loss is test_loss, of the last evaluation. Each seed gives one value of each effect, and its
  mean has a 95 % interval by Student's t. All 20 seeds are new.
- Three effects are primary, with Holm's correction at 5 %:
    tie           aoe - untied
    norm          untied - moe_factorised
    interaction   (untied - moe_factorised) - (untied_whole - moe)    without the tie, not halved
  If the tie is the cause, tie is above 0, and norm and interaction are near 0. If scoring by a norm
  is itself what costs where the gate is narrow, tie is near 0 and norm is above 0.
- Better or worse: the interval excludes 0. Level: all of it lies within 0.005 of 0. Otherwise we
  can't tell.
- moe, moe_factorised and aoe keep the rates that rates.py found; untied and untied_whole have those
  that tie_rates.py finds. A run that diverges is reported.
- The runs come in blocks of five seeds. Nothing is looked at before all 20 seeds are done; if the
  hours end sooner, the blocks done by then are looked at once, and the page says so.
- Secondary, on the same seeds, after the primary: aoe scored by the first 16 and by the first 8 of
  its 32 numbers, at aoe's rate; aoe_whole, at its rate; moe at 2e-3, the rate of moe_factorised.
  The tie predicts that loss rises with the number of numbers that judge: aoe 8, aoe 16, aoe.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/tie.py --seeds=541,542,543,544,545
"""
out_dir = 'out/tie'
dtype = 'float32'
aux_weight = 0.01
seeds = range(541, 561)
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 4e-3},
    'moe_factorised': {'mlp': 'moe', 'factorised': True, 'learning_rate': 2e-3},
    'aoe': {'mlp': 'aoe', 'learning_rate': 2e-3},
    # by tie_rates.py's rule
    'untied': {'mlp': 'aoe', 'tied': False, 'learning_rate': 1.4e-3},
    'untied_whole': {'mlp': 'aoe', 'tied': False, 'factorised': False, 'learning_rate': 2e-3},
}
