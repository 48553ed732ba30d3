"""``python -m bench.floor``: what a time step costs at least on this GPU.

Builds ``floor.cu`` with the toolkit that the package's build would take and runs it: launches,
barriers and exchanges of h between blocks, each alone. One JSON line a measurement, the
environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.machine import ROOT, environment
from lstm_ext import _build


def command(toolkit: Path, capability: tuple[int, int], program: Path) -> list[str]:
    """The call of nvcc; clusters need the architecture's own instructions."""
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")
    return [
        str(toolkit / "bin" / "nvcc"),
        *("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"),
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        str(ROOT / "bench" / "floor.cu"),
        *("-o", str(program)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if an exchange lost something, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench.floor", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    options = parser.parse_args(argv)
    toolkit = _build.find_toolkit(os.environ)
    if not torch.cuda.is_available() or toolkit is None:
        print("bench.floor needs a GPU and a CUDA toolkit", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        subprocess.run(command(toolkit, torch.cuda.get_device_capability(), program), check=True)
        device = torch.empty(0, device="cuda").device
        with options.out.open("w") as out:
            out.write(json.dumps({"environment": environment(device)}) + "\n")
            with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    entry = json.loads(line)
                    out.write(line)
                    print(
                        f"{entry['us']:9.3f} us  {entry['what']}: {entry['blocks']} blocks in "
                        f"groups of {entry['per_group']}, {entry['bytes']} bytes"
                    )
    return 1 if process.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
