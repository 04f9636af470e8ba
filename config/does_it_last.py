"""
Does it last? Three times the tokens; and another text, the sources of Python's
standard library as characters. The rest as in paper_table2.py, with L_aux:

    python prepare_data.py $(python -c "import os; print(os.__file__[:-5])")*.py --name=code
    python train.py config/paper_table2.py config/more_text.py
"""

out_dir = 'out/more_text'
aux_weight = 0.01
runs = {
    'moe long': {'mlp': 'moe', 'max_iters': 4800, 'eval_interval': 1200},
    'aoe whole long': {'mlp': 'aoe', 'factorised': False, 'd_low': 16,
                       'max_iters': 4800, 'eval_interval': 1200},
    'moe code': {'mlp': 'moe', 'dataset': 'code'},
    'aoe whole code': {'mlp': 'aoe', 'factorised': False, 'd_low': 16, 'dataset': 'code'},
    'aoe code': {'mlp': 'aoe', 'dataset': 'code'},
}
