"""A fresh Python for a test."""

import os
import subprocess
import sys
from pathlib import Path

import lstm_ext


def run(*arguments, cwd, **environ):
    """A fresh interpreter that finds the same lstm_ext as this one."""
    environ = os.environ | {"PYTHONPATH": str(Path(lstm_ext.__file__).parent.parent)} | environ
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True
    )
