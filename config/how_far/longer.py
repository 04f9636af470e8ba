"""
Does it last with three times the tokens, on another text (the source of Python's standard library),
and with twice as many experts, half as wide, of which four are chosen? The rest is as in small.py,
with L_aux:

    python prepare_data.py $(python -c "import os; print(os.__file__[:-5])")*.py --name=code
    python train.py config/small.py config/how_far/longer.py
"""

out_dir = 'out/longer'
aux_weight = 0.01
runs = {}
for _name, _change in {
    'long': {'max_iters': 4800, 'eval_interval': 1200},
    'code': {'dataset': 'code'},
    '4 of 16': {'d_ffn': 192, 'n_expert': 16, 'top_k': 4},
}.items():
    runs |= {
        f'moe {_name}': {'mlp': 'moe'} | _change,
        f'aoe_whole {_name}': {'mlp': 'aoe', 'factorised': False} | _change,
        f'aoe {_name}': {'mlp': 'aoe'} | _change,
    }
