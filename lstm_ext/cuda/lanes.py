"""Streams side by side: the lanes of a wavefront, and why memory is safe on them.

The caching allocator gives freed memory to the next tensor of the same stream, and knows nothing of
the other streams that may still read it. So whatever two streams touch is allocated before the
lanes are forked, on the caller's stream, and referenced until that stream has joined them: what it
allocates later comes after all that the lanes do, and the lanes begin after all that it did before.
What is allocated on a lane is used on this lane alone; what a lane makes for the caller is told to
the allocator (`hand_over`). Forward and backward of a stack are alike: each forks from the stream
that it is called on, and joins before it returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


class Lanes:
    """Streams beside the caller's, which they follow on entry, and which waits for all at exit."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._main = torch.cuda.current_stream(device)
        self._lanes = _streams(device, count)
        self._done: dict[tuple[int, int], torch.cuda.Event] = {}

    def __enter__(self) -> Lanes:
        for lane in self._lanes:
            lane.wait_stream(self._main)
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes:
            self._main.wait_stream(lane)

    @contextlib.contextmanager
    def cell(self, lane: int, part: int, below: bool) -> Iterator[None]:
        """Work on a lane; ``below``: after the same part of the lane before it."""
        stream = self._lanes[lane]
        if below:
            stream.wait_event(self._done.pop((lane - 1, part)))
        with torch.cuda.stream(stream):
            yield
        if lane + 1 < len(self._lanes):
            self._done[lane, part] = stream.record_event()

    def hand_over(self, tensor: Tensor) -> None:
        """The current lane made it, and the caller's stream is to use and to free it."""
        tensor.record_stream(self._main)


class NoLanes:
    """Everything on the caller's stream."""

    def __enter__(self) -> NoLanes:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cell(self, lane: int, part: int, below: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def hand_over(self, tensor: Tensor) -> None:
        pass


@functools.cache
def _kept_streams(device: torch.device) -> list[torch.cuda.Stream]:
    return []


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """The device's lanes, the same at every call. They come from torch's pool, which exists since
    the first stream of the device that is not the default one: a capture makes none."""
    kept = _kept_streams(device)
    while len(kept) < count:
        kept.append(torch.cuda.Stream(device))
    return kept[:count]
