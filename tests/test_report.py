"""The report of ``python -m lstm_ext``."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from interpreter import run

import lstm_ext
from lstm_ext import _C, _build
from lstm_ext import __main__ as report

pytestmark = pytest.mark.cpu_only(reason="the build's report")


def test_report_from_another_directory(tmp_path):
    done = run("-m", "lstm_ext", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"lstm_ext {lstm_ext.__version__}" in done.stdout
    assert torch.__version__ in done.stdout
    assert re.search(rf"^  {_C.cpu_isa()} +yes \(selected.*\)$", done.stdout, re.MULTILINE)
    cuda = done.stdout.split("\nCUDA\n")[1]
    if not _C.build_info()["cuda"]:
        assert "not in this build" in cuda
        assert "LSTM_EXT_CUDA=1 pip install" in cuda
    elif not torch.cuda.is_available():
        assert "not usable" in cuda


def test_report_as_json(tmp_path):
    done = run("-m", "lstm_ext", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["version"] == found["build"]["version"] == lstm_ext.__version__
    assert found["cpu"]["selected"] == _C.cpu_isa()
    assert found["cpu"]["variants"]["portable"]["runs"]
    assert found["cuda"]["built"] == _C.build_info()["cuda"]


def test_report_of_an_unknown_kernel_set(tmp_path):
    done = run("-m", "lstm_ext", cwd=tmp_path, LSTM_EXT_CPU_ISA="sse9")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "NOT USABLE importing lstm_ext fails: LSTM_EXT_CPU_ISA: CPU kernels that" in text
    assert "got 'sse9'" in text and "(selected)" in text


def fake_core(monkeypatch, *, features=(), isas=("portable",), architecture="x86_64", **cuda):
    """Replaces the compiled module by one on another machine."""
    monkeypatch.delenv("LSTM_EXT_CPU_ISA", raising=False)
    build = _C.build_info() | {"cuda": bool(cuda), "cuda_reason": "LSTM_EXT_CUDA=0 was set"}
    build |= {"architecture": architecture, "cuda_version": "13.0.88", "cuda_archs": "80-real;120"}
    core = SimpleNamespace(
        __file__="_C.so",
        build_info=lambda: build,
        cpu_features=lambda: {name: name in features for name in _C.cpu_features()},
        cpu_isas=lambda: list(isas),
        cpu_isa=lambda: isas[0],
        cuda_report=lambda: {"runtime_version": 13000, "devices": []} | cuda,
        cuda_open_vendor=lambda name: "" if name == "libcublasLt.so.13" else "no such file",
        cuda_vendor_version=lambda: 131002,
    )
    monkeypatch.setattr(report, "_C", core)


def printed():
    """The report with the line breaks inside its entries taken out."""
    return re.sub(r"\n {14}(?=\S)", " ", "\n".join(report.lines(report.collect())))


def test_report_names_missing_instructions(monkeypatch):
    features = ("avx2", "fma", "f16c", "avx512f")
    fake_core(monkeypatch, features=features, isas=("avx2", "portable"))
    text = printed()
    assert (
        "avx512      no: this processor or system lacks avx512bw, avx512dq, avx512vl, avx512cd\n"
    ) in text
    assert "avx2        yes (selected)\n" in text
    assert "portable    yes\n" in text


def test_report_of_an_arm_processor(monkeypatch):
    fake_core(
        monkeypatch,
        features=("neon_dot", "sve"),
        isas=("neon_dot", "portable"),
        architecture="aarch64",
    )
    text = printed()
    assert "neon_bf16   no: this processor or system lacks neon_bf16\n" in text
    assert "neon_dot    yes (selected)\n" in text
    assert "portable    yes\n" in text
    assert "not used    SVE yes\n" in text
    assert "avx" not in text and "AMX" not in text


def test_report_of_another_architecture(monkeypatch):
    fake_core(monkeypatch, architecture="riscv64")
    text = printed()
    assert "portable    yes (selected)\n" in text
    assert "avx" not in text and "neon" not in text and "not used" not in text


def test_report_without_cuda_build(monkeypatch):
    fake_core(monkeypatch)
    monkeypatch.setattr(_build, "find_toolkit", lambda environ: None)
    text = printed()
    assert "not usable  not in this build: LSTM_EXT_CUDA=0 was set" in text
    assert _build.TOOLKIT_COMMAND in text
    assert _build.CUDA_BUILD_COMMAND in text


def test_report_without_driver(monkeypatch):
    words = "CUDA driver version is insufficient for CUDA runtime version"
    fake_core(monkeypatch, driver_version=0, error=35, error_text=words)
    text = printed()
    assert f"not usable  {words} (error 35)" in text
    assert "no NVIDIA driver was found; one that supports CUDA 13.0 is needed" in text
    assert "toolkit 13.0.88, for 80, 120 and PTX of 120" in text


@pytest.mark.parametrize(
    "version, said",
    [
        ("13.0", "by cuBLASLt 13.10.2"),
        ("12.8", "by torch, because cuBLASLt cannot be used: no such file"),
        (None, "is built without CUDA"),
    ],
)
def test_report_of_products(version, said, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    fake_core(monkeypatch, driver_version=13000, error=0, error_text="no error")
    (line,) = (line for line in printed().splitlines() if line.startswith("  products"))
    assert said in line


def test_report_of_devices(monkeypatch):
    device = {
        "name": "NVIDIA H100",
        "major": 9,
        "minor": 0,
        "sm_count": 132,
        "shared_memory_optin": 232448,
        "l2_bytes": 50 << 20,
        "memory_bytes": 80 << 30,
        "binary_version": 90,
        "ptx_version": 90,
        "error": 0,
        "error_text": "no error",
    }
    no_code = {
        "binary_version": 0,
        "ptx_version": 0,
        "error": 209,
        "error_text": "no kernel image is available for execution on the device",
    }
    devices = [device, device | {"ptx_version": 80}, device | no_code]
    monkeypatch.setattr(torch.version, "cuda", None)
    fake_core(monkeypatch, driver_version=13000, error=0, error_text="no error", devices=devices)
    text = printed()
    assert "device 0    NVIDIA H100, compute capability 9.0; 132 multiprocessors" in text
    assert "227 KiB of shared memory a block, 50 MiB L2, 80.0 GiB; runs code for 90\n" in text
    assert "runs code for 90, made from PTX of 80\n" in text
    assert "no kernel image is available for execution on the device (error 209)" in text
    assert "LSTM_EXT_CUDA_ARCHS=90 LSTM_EXT_CUDA=1 pip install" in text
    assert "is built without CUDA" in text
