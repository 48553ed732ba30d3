"""Names in torch.profiler for what runs outside of torch: the calls of the native core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler


def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
    """``recorded(call)(...)`` shows in a profile as lstm_ext::<name of call>.

    Without a profiler it is the call itself: one comparison.
    """
    return _ranged(call) if profiler._is_profiler_enabled else call


def _ranged(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._profiler._RecordFunctionFast(f"lstm_ext::{call.__name__}"):
            return call(*args, **kwargs)

    return run
