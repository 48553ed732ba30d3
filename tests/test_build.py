"""The build's rules, the report of ``python -m lstm_ext``, and what the binary links."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lstm_ext
from lstm_ext import _C, _build
from lstm_ext import __main__ as report

pytestmark = pytest.mark.cpu_only(reason="the build, its report and the CPU module")
ROOT = Path(__file__).resolve().parent.parent
NVCC_13 = frozenset({75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121})


def run(*arguments, cwd, **environ):
    """A fresh interpreter that finds the same lstm_ext as this one."""
    environ = os.environ | {"PYTHONPATH": str(Path(lstm_ext.__file__).parent.parent)} | environ
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True
    )


def binutil(name, *arguments):
    """What a tool of binutils says of the compiled module."""
    if shutil.which(name) is None or not sys.platform.startswith("linux"):
        pytest.skip(f"needs {name} and an ELF module")
    return subprocess.run(
        [name, *arguments, _C.__file__], capture_output=True, text=True, check=True
    ).stdout


# -- the report ----------------------------------------------------------------------------------


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


def fake_core(monkeypatch, *, features=(), isas=("portable",), **cuda):
    """Replaces the compiled module by one on another machine."""
    monkeypatch.delenv("LSTM_EXT_CPU_ISA", raising=False)
    build = _C.build_info() | {"cuda": bool(cuda), "cuda_reason": "LSTM_EXT_CUDA=0 was set"}
    build |= {"architecture": "x86_64", "cuda_version": "13.0.88", "cuda_archs": "80-real;120"}
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


# -- the binary ----------------------------------------------------------------------------------


def test_module_links_no_torch():
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", binutil("readelf", "--dynamic", "--wide"))
    assert any(name.startswith("libstdc++") for name in needed)  # the pattern still finds names
    assert not [name for name in needed if re.match(r"lib(torch|c10|aten|cudart|cuda)", name)]


def test_module_has_no_run_path():
    """A run path could bring in another OpenMP runtime than torch's."""
    assert not re.search(r"\((RPATH|RUNPATH)\)", binutil("readelf", "--dynamic", "--wide"))


def test_module_exports_its_entry_only():
    """torch's cudart and this one must not see each other's symbols."""
    lines = binutil("nm", "--dynamic", "--defined-only", "--format=posix").splitlines()
    symbols = {name: kind for name, kind, *_ in map(str.split, lines)}
    # Weak ones are what headers instantiate of the C++ library.
    assert [name for name, kind in symbols.items() if kind not in "WVu"] == ["PyInit__C"]
    assert not [name for name in symbols if "cuda" in name.lower() or "lstm_ext" in name]


@pytest.mark.parametrize("variant", ["avx2", "avx512", "avx512_bf16"])
def test_kernels_share_no_code_between_instruction_sets(variant):
    """The linker keeps one copy of a weak symbol: it must not be one that needs this variant."""
    commands = ROOT / "build" / "compile_commands.json"
    if not commands.exists() or shutil.which("nm") is None:
        pytest.skip("needs nm and the build folder of a checkout")
    for command in json.loads(commands.read_text()):
        if command["file"].endswith(f"/kernels_{variant}.cpp"):
            assert f"-m{variant.replace('_', '')}" in command["command"]
            objects = Path(command["directory"], command["output"])
            break
    else:
        pytest.skip(f"this build has no {variant} kernels")
    done = subprocess.run(
        ["nm", "--defined-only", "--format=posix", objects],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split()[:2] for line in done.stdout.splitlines()]
    weak = {name for name, kind in symbols if kind in "WVu" and not name.startswith("DW.ref.")}
    assert symbols
    assert not [name for name in weak if f"{len(variant)}{variant}" not in name]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime(tmp_path):
    """The module shares torch's thread pool; a second runtime would fight for the cores."""
    code = "import lstm_ext; print(open('/proc/self/maps').read())"
    done = run("-c", code, cwd=tmp_path)
    assert "_C.c" in done.stdout, done.stderr
    assert len(set(re.findall(r"/\S*/lib[gi]?omp\S*", done.stdout))) <= 1


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a checkout")
def test_core_includes_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert ROOT / "csrc" / "bindings.cpp" in sources
    pattern = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)\b', re.MULTILINE)
    assert not [path for path in sources if pattern.search(path.read_text(encoding="utf-8"))]


# -- LSTM_EXT_CUDA and the toolkit ---------------------------------------------------------------


def make_toolkit(root, version="13.0.88", archs=NVCC_13):
    """A folder with an nvcc that answers the questions the build asks."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    known = " ".join(f"compute_{arch}" for arch in sorted(archs))
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case $1 in --version) echo "Cuda compilation tools, release 13.0, V{version}" ;;\n'
        f"--list-gpu-arch) echo {known} ;; *) exit 1 ;; esac\n"
    )
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    """A machine without a toolkit of its own: only what the environment names is found."""
    places = _build.toolkit_places

    def named_only(environ):
        return [place for place in places(environ) if place[0] in ("CUDA_HOME", "CUDA_PATH")]

    monkeypatch.setattr(_build, "toolkit_places", named_only)


@pytest.mark.parametrize(
    "environ, mode",
    [({}, "auto"), ({"LSTM_EXT_CUDA": ""}, "auto")]
    + [({"LSTM_EXT_CUDA": value}, value) for value in ("0", "1", "auto")],
)
def test_cuda_mode(environ, mode):
    assert _build.cuda_mode(environ) == mode


def test_cuda_mode_refuses_other_values():
    with pytest.raises(_build.BuildError, match="must be 0, 1 or auto, got 'bogus'"):
        _build.plan_cuda({"LSTM_EXT_CUDA": "bogus"})


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
def test_setup_fails_with_one_message(tmp_path):
    pytest.importorskip("setuptools")
    done = run("setup.py", "--quiet", "build_ext", cwd=ROOT, LSTM_EXT_CUDA="bogus")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "lstm_ext: LSTM_EXT_CUDA must be 0, 1 or auto, got 'bogus'"


def test_required_toolkit_missing(no_toolkit, tmp_path):
    with pytest.raises(_build.BuildError) as caught:
        _build.plan_cuda({"LSTM_EXT_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    message = str(caught.value)
    assert (
        f"no CUDA toolkit was found: there is no bin/nvcc under CUDA_HOME ({tmp_path})" in message
    )
    assert (
        "pip install nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "
        "nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
    ) in message
    assert "\n" not in message


def test_auto_without_toolkit_tells_why(no_toolkit):
    plan = _build.plan_cuda({})
    assert plan.toolkit is None
    assert "CUDA_HOME (not set), CUDA_PATH (not set)" in plan.reason


def test_cuda_off(tmp_path):
    home = make_toolkit(tmp_path)
    plan = _build.plan_cuda({"LSTM_EXT_CUDA": "0", "CUDA_HOME": str(home)})
    assert plan == _build.CudaPlan(reason="LSTM_EXT_CUDA=0 was set")


def test_toolkit_order(monkeypatch, tmp_path):
    wheel = make_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    home, path = make_toolkit(tmp_path / "home"), make_toolkit(tmp_path / "path")
    empty = tmp_path / "empty"
    monkeypatch.setattr(_build, "site_folders", lambda environ: [empty, tmp_path / "site"])
    # An nvcc on PATH is never the one.
    monkeypatch.setenv("PATH", str(make_toolkit(tmp_path / "on_path") / "bin"))

    def find(**environ):
        return _build.find_toolkit({name: str(value) for name, value in environ.items()})

    assert find(CUDA_HOME=home, CUDA_PATH=path) == home
    assert find(CUDA_PATH=path) == path
    assert find(CUDA_HOME=empty, CUDA_PATH=path) == path
    assert find() == wheel
    assert _build.toolkit_places({})[-1] == ("system", Path("/usr/local/cuda"))


def test_site_folders_of_the_environment(tmp_path):
    """An isolated build has another sys.path, but still this prefix."""
    prefix = tmp_path / "env"
    folders = _build.site_folders({"VIRTUAL_ENV": str(prefix)})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert prefix / "lib" / version / "site-packages" in folders
    assert any(Path(torch.__file__).is_relative_to(folder) for folder in folders)


def test_plan_asks_the_toolkit(tmp_path):
    home = make_toolkit(tmp_path, archs={75, 80, 90})
    plan = _build.plan_cuda({"CUDA_HOME": str(home)})
    assert plan == _build.CudaPlan(home, "13.0.88", ("75-real", "80", "90a-real"))


def test_old_toolkit_is_refused(tmp_path):
    home = make_toolkit(tmp_path, version="11.8.89")
    with pytest.raises(_build.BuildError, match="is 11.8.89; 12.0 or newer is needed"):
        _build.plan_cuda({"CUDA_HOME": str(home)})


def test_broken_toolkit_is_named(tmp_path):
    home = make_toolkit(tmp_path)
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence >&2; exit 3\n")
    with pytest.raises(_build.BuildError, match="nvcc --version failed: no licence"):
        _build.plan_cuda({"CUDA_HOME": str(home)})


@pytest.mark.parametrize(
    "asked, result",
    [
        ("", ("75-real", "80-real", "86-real", "89-real", "90a-real", "100-real", "120")),
        ("80;90a;120", ("80-real", "90a-real", "120")),
        (" 120, 80 ,80", ("80-real", "120")),
        ("8.0 9.0a 12.0", ("80-real", "90a-real", "120")),
        ("90a", ("90a-real",)),
        ("90 90a", ("90", "90a-real")),
    ],
)
def test_architectures(asked, result):
    assert _build.architectures(asked, NVCC_13) == result


@pytest.mark.parametrize(
    "asked, message",
    [
        ("hopper", "'hopper' is no architecture"),
        ("80;sm_90", "'sm_90' is no architecture"),
        ("70", "the kernels need 75 or newer, got 70"),
        ("80a", "does not compile for 80a"),
    ],
)
def test_architectures_refused(asked, message):
    with pytest.raises(_build.BuildError, match=message):
        _build.architectures(asked, NVCC_13)


# -- setup.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_py():
    """setup.py as a module, without a build."""
    pytest.importorskip("setuptools")
    path = ROOT / "setup.py"
    if not path.exists():
        pytest.skip("needs a checkout")
    spec = importlib.util.spec_from_file_location("lstm_ext_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pybind11_headers_of_torch_serve(setup_py, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pybind11" else find_spec(name)
    )
    include, version = setup_py.find_pybind11()
    assert include == Path(torch.__file__).parent / "include"
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", version)
    copied = setup_py.copy_pybind11(include, tmp_path)
    assert [path.name for path in copied.iterdir()] == ["pybind11"]
    assert (copied / "pybind11" / "pybind11.h").exists()


def test_pybind11_missing_is_named(setup_py, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup_py.rules.BuildError, match="pip install pybind11"):
        setup_py.find_pybind11()


def test_headers_are_copied_only_when_they_differ(setup_py, tmp_path):
    source = tmp_path / "from" / "pybind11"
    source.mkdir(parents=True)
    for name in ("same.h", "changed.h"):
        (source / name).write_text(name)
    target = setup_py.copy_pybind11(source.parent, tmp_path / "to") / "pybind11"
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    (source / "same.h").touch()
    (source / "changed.h").write_text("new text")
    setup_py.copy_pybind11(source.parent, tmp_path / "to")
    after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert after["same.h"] == before["same.h"]
    assert after["changed.h"] > before["changed.h"]


def test_moved_build_folder_is_stale(setup_py, tmp_path):
    entries = {
        "CMAKE_CACHEFILE_DIR": tmp_path,
        "CMAKE_HOME_DIRECTORY": ROOT / "csrc",
        "CMAKE_CXX_COMPILER": sys.executable,
    }

    def stale(**changes):
        cache = entries | changes
        text = "".join(f"{name}:INTERNAL={value}\n" for name, value in cache.items())
        (tmp_path / "CMakeCache.txt").write_text(text)
        return setup_py.is_stale(tmp_path)

    assert not setup_py.is_stale(tmp_path)  # nothing there yet
    assert not stale()
    assert stale(CMAKE_CACHEFILE_DIR="/elsewhere")
    assert stale(CMAKE_HOME_DIRECTORY="/elsewhere")
    assert stale(CMAKE_CXX_COMPILER=tmp_path / "gone")
