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
    small = ["--film", "I3 C8", "--repeats", "1", "--min-sample", "0", "--out", str(out)]
    assert conv.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 5 and len(lines) == 4
    assert lines[2].startswith("| T10 N1 I3 C8 k3 16x16 | inference |")
    report = json.loads(out.read_text())
    assert [row["mode"] for row in report["rows"]] == ["inference", "training"]


def test_what_cannot_be_is_said_before_anything_is_timed(tmp_path, capsys):
    for more, words in (
        (["--repeats", "0"], "invalid positive integer value: '0'"),
        (["--threads", "-1"], "invalid positive integer value: '-1'"),
        (["--out", str(tmp_path / "none" / "f.json")], "expected a file in a folder that is there"),
        (["--device", "cuda"], "sees no usable CUDA GPU here"),
    ):
        with pytest.raises(SystemExit) as exit:
            conv.main(["--film", "I3 C8", *more])
        assert exit.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_every_dtype(capsys, dtype):
    small = ["--film", "N2 I16", "--repeats", "1", "--min-sample", "0", "--dtype", dtype]
    assert conv.main(small) == 0 and "training" in capsys.readouterr().out


def test_a_problem_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit:
        conv.main(["--film", "C7"])
    assert exit.value.code == 2 and "T10 N1 I3 C8 k3 16x16" in capsys.readouterr().err
