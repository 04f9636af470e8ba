"""
Does it last? Three times the tokens; another text, the sources of Python's standard
library as characters; and twice as many experts, half as wide, four of them chosen.
The rest as in paper_table2.py, with L_aux:

    python prepare_data.py $(python -c "import os; print(os.__file__[:-5])")*.py --name=code
    python train.py config/paper_table2.py config/does_it_last.py
"""

out_dir = 'out/does_it_last'
aux_weight = 0.01
runs = {
    'moe long': {'mlp': 'moe', 'max_iters': 4800, 'eval_interval': 1200},
    'aoe whole long': {'mlp': 'aoe', 'factorised': False, 'max_iters': 4800, 'eval_interval': 1200},
    'aoe long': {'mlp': 'aoe', 'max_iters': 4800, 'eval_interval': 1200},
    'moe code': {'mlp': 'moe', 'dataset': 'code'},
    'aoe whole code': {'mlp': 'aoe', 'factorised': False, 'dataset': 'code'},
    'aoe code': {'mlp': 'aoe', 'dataset': 'code'},
    'moe 4 of 16': {'mlp': 'moe', 'd_ffn': 192, 'n_expert': 16, 'top_k': 4},
    'aoe whole 4 of 16': {'mlp': 'aoe', 'factorised': False, 'd_ffn': 192, 'n_expert': 16,
                          'top_k': 4},
    'aoe 4 of 16': {'mlp': 'aoe', 'd_ffn': 192, 'n_expert': 16, 'top_k': 4},
}
