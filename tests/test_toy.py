"""tests/tools/toy.py: who handles which class."""

import itertools
import os
import sys

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from toy import main, shares


def test_moe_gives_opposite_classes_to_opposite_experts_and_aoe_to_the_same():
    for mlp, seed in itertools.product(('moe', 'aoe'), range(3)):
        (_, accuracy_1), ((plus, minus, zero), accuracy_2) = shares(mlp, seed)
        assert accuracy_1 > 0.98 and accuracy_2 > 0.98
        if mlp == 'moe':
            assert abs(plus - minus) > 0.2 and abs(plus + minus - 1) < 0.05
            assert abs(zero - 0.5) < 0.05
        else:
            assert abs(plus - minus) < 0.05 and max(plus, 1 - plus) > 0.9


def test_help_is_printed_and_a_wrong_argument_refused(refuse, capsys):
    main(['--help'])
    assert 'python tests/tools/toy.py' in capsys.readouterr().out
    assert "the path of a picture, got '--seeds=3'" in refuse(main, '--seeds=3')
