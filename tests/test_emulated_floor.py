"""bench/floor.cu on the emulator: every exchange brings what was sent."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator.build import build, environment

from bench import floor

pytestmark = pytest.mark.cpu_only(reason="runs on the emulator")


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_every_exchange_is_complete(mode):
    program = build("floor", ["bench/floor.cu"], mode)
    done = subprocess.run(
        [program], env=environment(mode), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["what"] for entry in entries} == {
        "launch",
        "barrier through L2",
        "exchange through L2",
        "exchange, words with their step",
        "barrier of a cluster",
        "exchange through a cluster",
        "exchange through a cluster, copies",
    }
    assert all(entry["us"] is not None and entry["blocks"] > 0 for entry in entries)


def test_it_compiles_for_a_gpu(tmp_path):
    toolkit = floor._build.find_toolkit({"CUDA_HOME": "/usr/local/cuda"})
    if toolkit is None or shutil.which("g++") is None:
        pytest.skip("needs a CUDA toolkit and g++")
    program = tmp_path / "floor"
    subprocess.run(floor.command(Path(toolkit), (9, 0), program), check=True)
    assert program.exists()


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert floor.main(["--out", str(tmp_path / "floor.jsonl")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
