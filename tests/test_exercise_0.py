"""tests/tools/exercise_0.py: it is red until MoE and AoE are the paper's."""

import os
import sys

from configurator import read_text
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'tests', 'tools'))

from exercise_0 import YOURS, emptied, judge, main


def test_the_copy_is_red_until_it_is_filled_in(tmp_path):
    whole, yours = read_text(os.path.join(ROOT, 'model.py')), tmp_path / 'model.py'
    for source, reds in ((emptied(whole), 4), (whole, 0)):
        yours.write_text(source, encoding='utf-8')
        assert len(judge(yours)) == reds
    for right, wrong, reds in (
            ('choose(p.detach())', 'choose(-p)', 4),
            ('w = self.weigh(p, I)', 'w = p.softmax(-1).gather(1, I)', 4),
            ('return C, norm(C)', 'return C, norm(C) ** 2', 2),
            ('experts(x, I, w, C)', 'experts(x, I, w.detach(), C)', 2),
            ('return h, self.routing(p, I, w)', 'return h, Routing(p, I, w, p.new_zeros(()))', 4),
            ('return h, self.routing(p, I, w)', 'return h, self.routing(p.detach(), I, w)', 4),
            ('return h, self.routing(p, I, w)', 'return h, self.routing(p, I * 0, w)', 4),
            ('import math', 'import maths', 4), ('import math', 'import math (', 4)):
        yours.write_text(whole.replace(right, wrong), encoding='utf-8')
        assert len(judge(yours)) == reds, wrong


def test_the_command_makes_the_copy_and_keeps_what_is_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for printed in ('made out/exercise_0/model.py', 'red    moe, whole gate: NotImpl'):
        try:
            main([])
        except SystemExit as end:
            assert end.code
        assert printed in capsys.readouterr().out
    with open(YOURS, 'w', encoding='utf-8') as file:
        file.write(read_text(os.path.join(ROOT, 'model.py')))
    try:
        main([])
    except SystemExit as end:
        assert not end.code
    assert 'green' in capsys.readouterr().out
