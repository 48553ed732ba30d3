"""``python -m bench.conv``: the loop computes a ConvLSTM; the table and its file."""

import json

import pytest
import torch
from tolerances import tol

import lstm_ext
from bench import conv

pytestmark = pytest.mark.cpu_only(reason="the command line on the CPU")


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_loop_is_the_module(kernel):
    module = lstm_ext.ConvLSTM2d(2, 3, kernel).double()
    loop, x = conv.Loop(module), torch.randn(4, 2, 2, 5, 6, dtype=torch.double)
    for found, expected in zip(*(m(x)[1] for m in (loop, module)), strict=True):
        torch.testing.assert_close(found, expected[0], **tol(torch.float64))


def test_table_and_file(capsys, tmp_path):
    out = tmp_path / "conv.json"
    small = ["--film", "C8", "--repeats", "1", "--min-sample", "0", "--out", str(out)]
    assert conv.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 5 and len(lines) == 4
    assert lines[2].startswith("| T10 N1 I3 C8 k3 16x16 | inference |")
    report = json.loads(out.read_text())
    assert [row["mode"] for row in report["rows"]] == ["inference", "training"]


def test_a_problem_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit:
        conv.main(["--film", "C7"])
    assert exit.value.code == 2 and "T10 N1 I3 C8 k3 16x16" in capsys.readouterr().err
