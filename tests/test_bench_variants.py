"""``python -m bench.variants``: the loops compute the variants; the table and its file."""

import json

import pytest
import torch
from tolerances import tol

import lstm_ext
from bench import variants

pytestmark = pytest.mark.cpu_only(reason="the command line on the CPU")


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_loop_is_the_variant(name):
    """Without masks; with them, up to chance."""
    kwargs = {**variants.BASES.get(name, {}), **variants.VARIANTS[name]}
    module = lstm_ext.LSTM(4, 6, dtype=torch.float64, **kwargs).eval()
    loop = variants.Loop(module).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(loop(x)[0], module(x)[0], **tol(torch.float64))
    random = {"zoneout", "recurrent_dropout", "weight_dropout"}
    first, second = loop.train()(x)[0], loop(x)[0]
    assert torch.equal(first, second) == (name not in random)


def test_table_and_file(capsys, tmp_path):
    out = tmp_path / "variants.json"
    small = ["--steps", "3", "--batch", "2", "--hidden", "4", "--repeats", "1", "--min-sample", "0"]
    assert variants.main([*small, "--variant", "zoneout", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 6
    assert lines[2].startswith("| zoneout | inference |") and len(lines) == 4
    report = json.loads(out.read_text())
    assert [row["mode"] for row in report["rows"]] == ["inference", "training"]
    assert report["settings"]["size"] == [3, 2, 4] and report["environment"]["torch"]
