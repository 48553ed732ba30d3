"""Compiles CUDA sources for the emulator, as ordinary C++.

``build("test_primitives", ["tests/emulator/test_primitives.cu"])`` returns the path of a program;
``kind="shared"`` makes a shared library. What is up to date is left alone: objects and results
carry a digest of the command, the source and all headers. Everything goes to build/emulator/.
"""

import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*kernels_*.cu"))

FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-DLSTM_EXT_EMULATED", f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"),
]
# For all objects, and for those that are not the emulator's own.
MODES = {
    "plain": (["-O2"], []),
    "tsan": (["-O1", "-DEMU_TSAN"], ["-fsanitize=thread"]),
    "asan": (["-O1", "-DEMU_ASAN"], ["-fsanitize=address", "-fno-omit-frame-pointer"]),
}
OPTIONS = {
    "plain": {},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1"},
    "asan": {"ASAN_OPTIONS": "detect_leaks=0"},
}


def build(name, sources, mode="plain", kind="program", extra_flags=(), kernels=()):
    """The path of a program or shared library made of ``sources`` and the emulator.

    name: the file's name. sources: paths, relative ones from the repository's root; a .cu is
    compiled as C++. mode: "plain", "tsan", "asan". kind: "program", "shared". extra_flags: given
    to the compiler for each of the sources, and at the end to the linker. kernels: sources that
    need no such flags, compiled once for all results.

    Raises RuntimeError with the compiler's messages. At most two compilers run at a time; two
    processes that build for one mode take turns.
    """
    common, instrumented = MODES[mode]
    command = [*compiler(), *FLAGS, *common]
    folder = CACHE / mode
    folder.mkdir(parents=True, exist_ok=True)
    own = [*command, *instrumented, *extra_flags]
    jobs = [
        (folder / "emulator", path, [*command, "-O2"]) for path in sorted(HERE.glob("emu*.cpp"))
    ]
    jobs += [(folder / f"{name}.objects", ROOT / path, own) for path in sources]
    hidden = [*command, *instrumented, "-fvisibility=hidden"]
    jobs += [(folder / "kernels", ROOT / path, hidden) for path in kernels]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = _digest_of_headers()
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: _compile(*job, headers), jobs))
        link = [*own, *(["-shared"] if kind == "shared" else []), *map(str, objects), *extra_flags]
        result = folder / name
        _run(link, result, _digest(*(_stamp(path).read_text() for path in objects)))
    return result


def compiler():
    """$CXX, else g++, as a list of words."""
    return shlex.split(os.environ.get("CXX", "g++"))


def environment(mode, preload=False):
    """What to run a result in. ``preload``: a shared library that a program loads which was built
    without the sanitizer, such as Python."""
    environ = os.environ | OPTIONS[mode]
    if preload and mode != "plain":
        library = f"lib{mode}.so"
        command = [*compiler(), f"-print-file-name={library}"]
        environ["LD_PRELOAD"] = subprocess.check_output(command, text=True).strip()
    return environ


def _compile(folder, source, command, headers):
    folder.mkdir(exist_ok=True)
    path = source.resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.relative_to("/")
    result = folder / ("-".join(shown.parts) + ".o")
    language = ["-x", "c++"] if path.suffix == ".cu" else []
    _run([*command, "-c", *language, str(path)], result, _digest(headers, path.read_bytes()))
    return result


def _run(command, result, inputs):
    """Makes ``result`` unless the same command made it from the same inputs."""
    stamp = _digest(_version(command[0]), *command, inputs)
    if result.exists() and _stamp(result).exists() and _stamp(result).read_text() == stamp:
        return
    made = result.with_name(result.name + ".new")
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)  # warnings
    made.replace(result)  # whoever runs the old one keeps it
    _stamp(result).write_text(stamp)


def _stamp(path):
    return path.with_name(path.name + ".stamp")


@functools.cache
def _version(program):
    return subprocess.check_output([program, "--version"], text=True)


def _digest_of_headers():
    files = [*HERE.glob("*.h"), *(HERE / "include").glob("*.h")]
    files += [path for suffix in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    return _digest(*(part for path in sorted(files) for part in (str(path), path.read_bytes())))


def _digest(*parts):
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()
