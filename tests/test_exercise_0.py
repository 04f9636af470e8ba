"""tests/tools/exercise_0.py is red until MoE and AoE are the paper's."""

import os
import sys

import pytest

from configurator import read_text, write_text
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from exercise_0 import YOURS, emptied, judge, main

WHOLE = read_text(os.path.join(ROOT, 'model.py'))


@pytest.mark.parametrize('right, wrong, reds', (
    ('', '', 0),
    ('I = self.choose(p)', 'I = self.choose(-p)', 3),
    ('w = self.weigh(p, I)', 'w = p.softmax(-1).gather(1, I)', 3),
    ('d_judge])', 'd_judge]) ** 2', 1),
    ('experts(x, I, w, C)', 'experts(x, I, w.detach(), C)', 1),
    ('auxiliary_loss(p, I)', 'auxiliary_loss(p, I) * 0', 3),
    ('auxiliary_loss(p, I)', 'auxiliary_loss(p.detach(), I)', 3),
    ('Routing(p.detach(), I,', 'Routing(p.detach(), I * 0,', 3),
    ('import math', 'import maths', 3), ('import math', 'import math (', 3)))
def test_an_edit_that_is_not_the_papers_is_red(right, wrong, reds, tmp_path):
    assert right in WHOLE
    yours = tmp_path / 'model.py'
    yours.write_text(WHOLE.replace(right, wrong) if right else WHOLE, encoding='utf-8')
    assert len(judge(yours)) == reds


def test_the_command_makes_the_copy_and_keeps_what_is_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for printed in ('made out/exercise_0/model.py', 'red    moe, whole gate: NotImpl', 'green'):
        with pytest.raises(SystemExit) as end:
            main([])
        assert printed in capsys.readouterr().out and end.value.code == (printed != 'green')
        empty = read_text(YOURS)
        if 'red' in printed:
            assert empty == emptied(WHOLE) and empty.count('yours to write: Algorithm') == 2
            assert 'class JudgedAoE' in WHOLE and 'class JudgedAoE' not in empty
            write_text(YOURS, WHOLE)
