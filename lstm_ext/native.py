"""The compiled core, or an ImportError that says how to get it."""

from importlib.util import find_spec
from pathlib import Path

try:
    from lstm_ext import _C
except ImportError as error:
    folder, spec = Path(__file__).resolve().parent, find_spec("lstm_ext._C")
    if spec is not None:
        raise ImportError(
            f"the compiled core of lstm_ext, {spec.origin}, does not load here: {error}; "
            "`pip install .` in a checkout builds it anew"
        ) from error
    words = "`pip install .` in a checkout builds it"
    if (folder.parent / "setup.py").is_file():
        words = (
            "these are the sources, which stand before an installed copy: run from another folder "
            "after `pip install .`, or `pip install -e .` builds it here"
        )
    # Python's own error speaks of a circular import, which there is none of.
    raise ImportError(f"there is no compiled core of lstm_ext in {folder}: {words}") from None

__all__ = ["_C"]
