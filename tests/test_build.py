"""The build's rules: LSTM_EXT_CUDA, the toolkit, the architectures, setup.py."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from interpreter import run

from lstm_ext import _build

pytestmark = pytest.mark.cpu_only(reason="the build")
ROOT = Path(__file__).resolve().parent.parent
NVCC_13 = frozenset({75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121})


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


def test_a_home_that_does_not_exist_is_named(tmp_path):
    path, home = make_toolkit(tmp_path / "path"), tmp_path / "home"
    environ = {"CUDA_HOME": str(home), "CUDA_PATH": str(path)}
    words = f"CUDA_HOME ({home}) does not exist"
    with pytest.raises(_build.BuildError, match=re.escape(f"LSTM_EXT_CUDA=1, but {words}: ")):
        _build.plan_cuda(environ | {"LSTM_EXT_CUDA": "1"})
    plan = _build.plan_cuda(environ)
    line = _build.plan_line(plan, environ)
    assert line.startswith(f"lstm_ext: CUDA 13.0.88 at {path} for 75") and line.endswith(words)
    home.mkdir()
    assert _build.plan_line(plan, environ).endswith("-real, 120")


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
