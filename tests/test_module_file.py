"""What the compiled module links, exports and includes."""

import json
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from interpreter import run

from lstm_ext import _C

pytestmark = pytest.mark.cpu_only(reason="the compiled module")
ROOT = Path(__file__).resolve().parent.parent


def binutil(name, *arguments):
    """What a tool of binutils says of the compiled module."""
    if shutil.which(name) is None or not sys.platform.startswith("linux"):
        pytest.skip(f"needs {name} and an ELF module")
    return subprocess.run(
        [name, *arguments, _C.__file__], capture_output=True, text=True, check=True
    ).stdout


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


def test_import_without_a_core_that_loads(tmp_path):
    """The sources alone, beside setup.py and installed, and a file that is no library."""
    package = tmp_path / "lstm_ext"
    package.mkdir()
    for source in Path(_C.__file__).parent.glob("*.py"):
        shutil.copy(source, package)

    # The finder of an editable install would bring its core in.
    finders = "[f for f in sys.meta_path if not f.__module__.startswith('__editable__')]"
    code = f"import sys; sys.meta_path[:] = {finders}; import lstm_ext"

    def error():
        done = run("-c", code, cwd=tmp_path)
        assert "circular" not in done.stderr
        return done.stderr

    missing = f"ImportError: there is no compiled core of lstm_ext in {package}: "
    assert f"{missing}`pip install .` in a checkout builds it" in error()
    (tmp_path / "setup.py").touch()
    assert f"{missing}these are the sources, which stand before an installed copy" in error()
    core = package / f"_C{EXTENSION_SUFFIXES[0]}"
    core.write_text("nothing")
    assert f"{core}, does not load here: {core}: " in error()


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a checkout")
def test_core_includes_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert ROOT / "csrc" / "bindings.cpp" in sources
    pattern = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)\b', re.MULTILINE)
    assert not [path for path in sources if pattern.search(path.read_text(encoding="utf-8"))]
