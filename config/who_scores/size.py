"""Does what tie.py and verdict.py found at 96 wide hold at 48 wide, with a quarter of the weights?

Named before the first run:

- A loss is test_loss, of the last evaluation, with a 95 % interval by Student's t over eight new
  seeds. All models have as many parameters as moe, to 1 %.
- Two effects are primary, with Holm's correction at 5 %:
    tie           aoe - untied
    interaction   (aoe - aoe_whole) - (moe_factorised - moe)    not halved
  Secondary: moe_factorised - moe, aoe - aoe_whole, untied - moe_factorised, and aoe - moe.
- Nothing is looked at before all eight seeds are done.
- Rates are those with the lowest mean validation loss (val_loss, of the last evaluation) on seeds
  389 and 390. They are a factor of sqrt 2 apart, and begin with 2.8e-3, 4e-3 and 5.7e-3. While a
  variant's lowest is at an end, the next rate beyond that end is added.
- Eight seeds would show a tie of 0.0164, as at 96 wide. They can't tell half of it from none.

    python prepare_data.py shakespeare
    python train.py config/small.py config/who_scores/size.py --learning_rate=4e-3 \\
        --seeds=389,390 --out_dir=out/size_4e-3
    python train.py config/small.py config/who_scores/size.py
"""
out_dir = 'out/size'
dtype = 'float32'
aux_weight = 0.01
seeds = range(571, 579)
n_embd = 48
n_head = 2
# by the rule
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 4e-3},
    'moe_factorised': {'mlp': 'moe', 'factorised': True, 'learning_rate': 5.7e-3},
    'aoe': {'mlp': 'aoe', 'learning_rate': 4e-3},
    'untied': {'mlp': 'aoe', 'tied': False, 'learning_rate': 4e-3},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2.8e-3},
}
