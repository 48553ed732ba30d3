"""tools/toolkit.py: when make demo installs the package index's CUDA toolkit."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.cpu_only(reason="a tool of the build")


@pytest.fixture
def toolkit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import toolkit

    monkeypatch.setitem(toolkit.RULES, "find_toolkit", lambda environ: None)
    return toolkit


@pytest.mark.parametrize(
    "environ, driver, installs",
    [
        ({}, "580.159.04", True),
        ({"LSTM_EXT_CUDA": "1"}, "595.10", True),
        ({}, "", False),
        ({}, "575.57.08", False),
        ({"LSTM_EXT_CUDA": "0"}, "580.159.04", False),
    ],
)
def test_rule(toolkit, environ, driver, installs):
    wheels = toolkit.wheels_to_install(environ, driver)
    assert wheels == (toolkit.RULES["TOOLKIT_WHEELS"] if installs else ())


def test_no_second_toolkit(toolkit, monkeypatch):
    monkeypatch.setitem(toolkit.RULES, "find_toolkit", lambda environ: Path("/usr/local/cuda"))
    assert toolkit.wheels_to_install({}, "580.159.04") == ()


def test_driver_of_proc_or_of_nvidia_smi(toolkit, monkeypatch, tmp_path):
    monkeypatch.setattr(toolkit, "PROC", tmp_path / "version")
    answers = SimpleNamespace(returncode=0, stdout="580.159.04\n")
    monkeypatch.setattr(toolkit.subprocess, "run", lambda *_, **__: answers)
    assert toolkit.nvidia_driver() == "580.159.04"
    answers.returncode = 9  # it is installed, but there is no driver
    assert toolkit.nvidia_driver() == ""
    toolkit.PROC.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (x)\n"
        "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
    )
    assert toolkit.nvidia_driver() == "580.82.07"
    toolkit.PROC.unlink()

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(toolkit.subprocess, "run", missing)
    assert toolkit.nvidia_driver() == ""


@pytest.mark.parametrize("version, installs", [("2.13.0", True), ("2.13.0+cpu", False)])
def test_what_is_installed(toolkit, monkeypatch, capsys, version, installs):
    calls = []
    monkeypatch.setattr(toolkit, "nvidia_driver", lambda: "580.159.04")
    monkeypatch.setattr(toolkit.importlib.metadata, "version", lambda name: version)
    monkeypatch.delenv("LSTM_EXT_CUDA", raising=False)

    def run(command):
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(toolkit.subprocess, "run", run)
    assert toolkit.main() == 0
    assert (
        calls == [["-m", "pip", "install", "--quiet", *toolkit.RULES["TOOLKIT_WHEELS"]]] * installs
    )
    assert ("cannot use the GPU" in capsys.readouterr().out) == (not installs)
