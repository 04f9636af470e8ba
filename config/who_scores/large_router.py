"""
Who scores, a router or the expert itself, if the router is as able? A linear router
has D E numbers; a large one as many as the judges, so that both have a judge with
capacity. With whole and with factorised gates, in the shape of small.py, with
L_aux, on eight seeds that no other table has:

    python train.py config/small.py config/who_scores/large_router.py

Each has the best of its learning rates on other seeds: moe, aoe and aoe_whole in
../how_far/learning_rate.py (seeds 1 to 3), the others in rates.py (seed 21).
"""

out_dir = 'out/large_router'
aux_weight = 0.01
seeds = [31, 32, 33, 34, 35, 36, 37, 38]
runs = {
    'moe': {'mlp': 'moe', 'learning_rate': 2e-3},
    'moe large router': {'mlp': 'moe', 'router': 'large', 'd_low': 16, 'learning_rate': 1.4e-3},
    'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'learning_rate': 2e-3},
    'moe factorised': {'mlp': 'moe', 'factorised': True, 'learning_rate': 1.4e-3},
    'moe factorised large router': {'mlp': 'moe', 'factorised': True, 'router': 'large',
                                    'learning_rate': 1.4e-3},
    'aoe': {'mlp': 'aoe', 'learning_rate': 1.4e-3},
}
