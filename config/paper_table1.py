"""
The pilot of the paper's Tables 1, 6 and 7: a trained MoE chooses its experts by
the norm of an inner node instead of its router. No weight changes.

    python train.py config/paper_table2.py                           # trains it
    python train.py config/paper_table2.py config/paper_table1.py
"""

eval_only = True
choose_by = 'all'
runs = {'moe aux': {'mlp': 'moe', 'aux_weight': 0.01}}
