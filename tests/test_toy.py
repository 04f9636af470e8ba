"""tests/tools/toy.py: which expert handles which class."""

import os
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from toy import main, shares


@pytest.mark.parametrize('mlp, of_minus', (('moe', 0.06), ('aoe', 1.0)))
def test_moe_gives_opposite_classes_to_opposite_experts_and_aoe_to_the_same(mlp, of_minus):
    (_, accuracy_1), ((plus, minus, zero), accuracy_2) = shares(mlp, seed=1)
    assert accuracy_1 > 0.98 and accuracy_2 > 0.98
    assert plus > 0.9 and abs(minus - of_minus) < 0.05
    assert mlp == 'aoe' or abs(zero - 0.5) < 0.05


def test_help_is_printed_and_a_wrong_argument_refused(refuse, capsys):
    main(['--help'])
    assert 'python tests/tools/toy.py' in capsys.readouterr().out
    assert "the path of a picture, got '--seeds=3'" in refuse(main, '--seeds=3')
