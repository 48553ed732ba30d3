"""The compiled core, or an ImportError that says how to get it."""

try:
    from lstm_ext import _C
except ImportError as error:
    raise ImportError(
        "the compiled core of lstm_ext is missing or does not load here; "
        f"`pip install .` in a checkout builds it ({error})"
    ) from error

__all__ = ["_C"]
