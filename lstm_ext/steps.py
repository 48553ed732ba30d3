"""Where the rows of a batch of sequences lie in time and batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from lstm_ext.engine import address, is_recorded, is_watched
from lstm_ext.native import _C
from lstm_ext.tensors import check_dense


class Steps:
    """Where the rows of a layer's input lie in time and batch; shared by all layers.

    Built by :meth:`padded` or :meth:`packed`. ``lengths`` (B) int64, ``offsets`` (T) int64 and
    ``reset_mask`` (T, B) bool are held on the layer's device, or are None.
    """

    def __init__(
        self,
        T: int,
        B: int,
        *,
        rows: int,
        batch_first: bool = False,
        offsets: Tensor | None = None,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
    ) -> None:
        self.T, self.B, self.rows = T, B, rows
        self.batch_first, self.offsets = batch_first, offsets
        self.lengths, self.reset_mask = lengths, reset_mask
        self.batch_sizes: Tensor | None = None  # (T) of a packed sequence, on the CPU
        self.native: dict[Any, Any] = {}  # what the engines derive from it and want again

    @property
    def layout(self) -> tuple[int, int, int, bool]:
        """T, B, rows and batch_first: all that is no tensor."""
        return self.T, self.B, self.rows, self.batch_first

    @staticmethod
    def of(
        layout: tuple[int, int, int, bool],
        offsets: Tensor | None,
        lengths: Tensor | None,
        reset_mask: Tensor | None,
    ) -> Steps:
        """With a layout, and tensors as another Steps holds them."""
        T, B, rows, batch_first = layout
        return Steps(
            T,
            B,
            rows=rows,
            batch_first=batch_first,
            offsets=offsets,
            lengths=lengths,
            reset_mask=reset_mask,
        )

    @staticmethod
    def padded(
        T: int,
        B: int,
        *,
        batch_first: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Steps:
        """Every sequence has room for T steps: row (t, b) is t * B + b, or b * T + t.

        Args:
            lengths: (B), an integer dtype, any device, 0 <= length <= T, any order. Values on
                a CUDA device are checked there: one out of range fails an assertion of the device.
            reset_mask: bool, (T, B), or (B, T) with ``batch_first``; any device.
            device: of the layer.

        Raises:
            TypeError: a dtype other than those.
            ValueError: another shape, or a length outside 0..T.
        """
        if lengths is not None:
            lengths = _checked_lengths(lengths, T, B, device)
        if reset_mask is not None:
            reset_mask = _checked_reset_mask(reset_mask, T, B, batch_first, device)
        plain = lengths is None and reset_mask is None and not torch.compiler.is_compiling()
        if plain and isinstance(T, int) and isinstance(B, int):  # else symbols of a graph
            # The same for every call of a shape, with what the engines keep there.
            key = (T, B, batch_first)
            steps = _plain.get(key)
            if steps is None:
                if len(_plain) >= _PLAIN_KEPT:
                    _plain.clear()
                steps = _plain[key] = Steps(T, B, rows=T * B, batch_first=batch_first)
            return steps
        return Steps(
            T,
            B,
            rows=T * B,
            batch_first=batch_first,
            lengths=lengths,
            reset_mask=reset_mask,
        )

    @staticmethod
    def packed(
        batch_sizes: Tensor,
        rows: int,
        device: torch.device | str = "cpu",
        sequences: int | None = None,
    ) -> Steps:
        """The rows of a PackedSequence: batch_sizes[t] sequences take step t, longest first.

        rows: their sum, as :func:`is_packed` has found. device: of the layer. sequences:
        batch_sizes[0], where it is known.
        """
        T, has_values = batch_sizes.numel(), _has_values(batch_sizes)
        B = int(batch_sizes[0]) if has_values or sequences is None else sequences
        if has_values:
            to_gpu = torch.device(device).type == "cuda"
            _refuse_capture(device)
            table = torch.empty(T + B, dtype=torch.int64, device="cpu", pin_memory=to_gpu)
            _C.packed_rows(address(batch_sizes), T, address(table))
        else:
            ends = batch_sizes.cumsum(0)
            # Sequence b is as long as there are steps with more than b sequences.
            lengths = T - torch.searchsorted(
                batch_sizes.flip(0), torch.arange(B, device="cpu"), right=True
            )
            table = torch.cat([ends - batch_sizes, lengths])
        on_device = _moved(table, device)
        offsets, lengths = on_device[:T], on_device[T:]
        steps = Steps(T, B, rows=rows, offsets=offsets, lengths=lengths)
        steps.batch_sizes = batch_sizes
        return steps

    @property
    def is_whole(self) -> bool:
        """Whether every sequence takes all steps, and starts at none anew."""
        return self.lengths is None and self.reset_mask is None

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Of the rows, unless they are packed."""
        return (self.B, self.T) if self.batch_first else (self.T, self.B)

    @property
    def has_padding(self) -> bool:
        """Whether there are rows past the end of a sequence."""
        return self.lengths is not None and self.offsets is None

    def active(self) -> Tensor:
        """bool (T, B): which sequences take which step."""
        if self.lengths is None:
            device = "cpu" if self.reset_mask is None else self.reset_mask.device
            return torch.ones(self.T, self.B, dtype=torch.bool, device=device)
        return torch.arange(self.T, device=self.lengths.device).unsqueeze(1) < self.lengths

    def _by_rows(self) -> Tensor:
        """active(), in the order of the rows."""
        active = self.active()
        return (active.T if self.batch_first else active).reshape(-1)

    def find_active_rows(self) -> Tensor:
        """int64: the rows that are not padding, ascending."""
        return self._by_rows().nonzero().squeeze(1)

    # No graph enters a cached_property, which is locked before Python 3.12.
    active_rows = functools.cached_property(find_active_rows)

    @functools.cached_property
    def padding_rows(self) -> Tensor:
        """bool (rows, 1): the rows that are padding."""
        return self._by_rows().logical_not().unsqueeze(1)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The row at which each step of a packed sequence starts, and at last their number."""
        if self.batch_sizes is None:
            return [*self.offsets.tolist(), self.rows]
        return [0, *self.batch_sizes.cumsum(0).tolist()]

    def part(self, start: int, stop: int) -> StepsPart:
        """The steps start..stop-1 as steps of their own; packed, of the sequences that take any."""
        T = stop - start
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, T)
        if self.offsets is None:
            mask = None if self.reset_mask is None else self.reset_mask[start:stop]
            shape = {"rows": T * self.B, "batch_first": self.batch_first}
            steps = Steps(T, self.B, lengths=lengths, reset_mask=mask, **shape)
            return StepsPart(self, steps, start, stop)
        first, last = self._starts[start], self._starts[stop]
        offsets = self.offsets[start:stop] - first
        B = self._starts[start + 1] - first
        steps = Steps(T, B, rows=last - first, offsets=offsets, lengths=lengths[:B])
        return StepsPart(self, steps, first, last)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all steps, from the parts' in the order of time."""
        if not self.batch_first or self.offsets is not None or self.B == 0:
            return torch.cat(list(parts))
        whole = torch.cat([part.view(self.B, -1, part.size(1)) for part in parts], 1)
        return whole.view(self.rows, whole.size(2))

    def to_time_major(self, rows: Tensor) -> Tensor:
        """(rows, n) as (T, B, n), differentiably; what a packed sequence lacks is arbitrary."""
        if self.offsets is not None:
            index = self.offsets.unsqueeze(1) + torch.arange(self.B, device=self.offsets.device)
            return rows[index.where(self.active(), 0).to(rows.device)]
        if self.batch_first:
            return rows.view(self.B, self.T, rows.size(1)).transpose(0, 1)
        return rows.view(self.T, self.B, rows.size(1))

    def from_time_major(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_time_major`."""
        if self.offsets is not None:
            return x[self.active().to(x.device)]
        return (x.transpose(0, 1) if self.batch_first else x).reshape(self.rows, x.size(2))


class StepsPart(NamedTuple):
    """Some steps of ``whole``."""

    whole: Steps
    steps: Steps
    start: int  # step, or row of a packed sequence
    stop: int

    def take(self, rows: Tensor) -> Tensor:
        """The part of (whole.rows, n)."""
        return self._of(rows).reshape(self.steps.rows, rows.size(1))

    def put(self, rows: Tensor, part: Tensor, add: bool = False) -> None:
        """Writes the part of (whole.rows, n), or adds to it."""
        written = self._of(rows)
        part = part.view(written.shape)
        if add:
            written += part
        else:
            written.copy_(part)

    def _of(self, rows: Tensor) -> Tensor:
        """A view of the part of (whole.rows, n): (steps.rows, n), or (B, steps.T, n)."""
        whole = self.whole
        if whole.offsets is not None:
            return rows[self.start : self.stop]
        if whole.batch_first:
            sequences = rows.view(whole.B, whole.T, rows.size(1))
            return sequences[:, self.start : self.stop]
        return rows[self.start * whole.B : self.stop * whole.B]


def is_packed(batch_sizes: Tensor, rows: int) -> Tensor | bool:
    """Whether batch_sizes (T), int64, T >= 1, do not increase, are 0 or more and sum to rows."""
    if _has_values(batch_sizes):
        return _C.is_packed(address(batch_sizes), batch_sizes.numel(), rows)
    last, sums = batch_sizes[-1] >= 0, batch_sizes.sum() == rows
    return last & (batch_sizes.diff() <= 0).all() & sums


def _has_values(batch_sizes: Tensor) -> bool:
    """Whether the core can read them: torch, asked for each of a dozen facts, takes longer than a
    short layer."""
    return (
        not is_watched()
        and type(batch_sizes) is Tensor
        and batch_sizes.device.type == "cpu"
        and batch_sizes.dtype == torch.int64
        and batch_sizes.is_contiguous()
        and not batch_sizes.is_neg()
    )


_plain: dict[tuple[int, int, bool], Steps] = {}
_PLAIN_KEPT = 1024


def _check_values(name: str, tensor: Tensor, device: torch.device | str) -> None:
    if tensor.is_meta and torch.device(device).type != "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device; from the CPU to CUDA without waiting for what runs there.

    Raises:
        RuntimeError: a CUDA graph is being captured: its replays would not see another value.
    """
    if (
        torch.device(device).type != "cuda"
        or tensor.is_cuda
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return tensor.to(device)
    _refuse_capture(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _refuse_capture(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lengths, reset_mask or batch sizes on the CPU cannot be captured in a CUDA graph, got "
            "them during a capture: give lengths= and reset_mask= on the device"
        )


_LENGTH_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def lengths_tensor(lengths: Any, B: int) -> Tensor:
    """lengths, a tensor or a list, as a tensor; raises if they are no integers or not B."""
    if isinstance(lengths, (list, tuple)):
        if any(isinstance(length, bool) for length in lengths):
            raise TypeError(f"lengths should be integers, got {lengths!r}")
        try:
            lengths = torch.tensor(lengths, dtype=None if lengths else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths should be integers of 64 bits, got {lengths!r}") from None
    if not isinstance(lengths, Tensor):
        got = type(lengths).__name__
        raise TypeError(f"lengths should be a tensor or a list of integers, got {got}")
    check_dense("lengths", lengths)
    if lengths.dtype not in _LENGTH_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _LENGTH_DTYPES)
        raise TypeError(f"lengths should have an integer dtype ({names}), got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"Expected lengths of size {(B,)}, got {tuple(lengths.shape)}")
    return lengths


def _checked_lengths(lengths: Any, T: int, B: int, device: torch.device | str) -> Tensor | None:
    """None where all are known to be T: whole sequences take less time."""
    lengths = lengths_tensor(lengths, B)
    _check_values("lengths", lengths, device)
    # A copy: backward reads it again, whatever the caller does to the tensor meanwhile.
    copy = lengths.detach().to(torch.int64, copy=True).contiguous()
    if torch.device(device).type == "cpu":
        copy = copy.cpu()
    if not (torch.compiler.is_compiling() or is_recorded()):  # else the operator's kernel does
        if check_lengths(copy, T) and not is_watched():
            _refuse_capture(device)
            return None
    return _moved(copy, device)


def check_steps(steps: Steps) -> None:
    """Refuses what an operator was given and no module has checked.

    Raises:
        RuntimeError: rows that are not all those of the steps, a tensor of another size or dtype.
            The rest: see below.
    """
    if steps.offsets is None and steps.rows != steps.T * steps.B:
        raise RuntimeError(f"Expected input of {steps.T * steps.B} rows, got {steps.rows}")
    for name, size, dtype in (
        ("offsets", (steps.T,), torch.int64),
        ("lengths", (steps.B,), torch.int64),
        ("reset_mask", (steps.T, steps.B), torch.bool),
    ):
        tensor = getattr(steps, name)
        if tensor is not None and (tensor.shape != size or tensor.dtype != dtype):
            got = f"{tensor.dtype} of size {tuple(tensor.shape)}"
            raise RuntimeError(f"Expected {name} to be {dtype} of size {size}, got {got}")
    if steps.lengths is not None:
        check_lengths(steps.lengths, steps.T)
    if steps.offsets is not None:
        if steps.lengths is None or steps.batch_first:
            got = "no lengths" if steps.lengths is None else "batch_first"
            raise RuntimeError(f"Expected offsets of steps, one after the other, got {got} with it")
        check_packed(steps)


def check_packed(steps: Steps) -> None:
    """Refuses offsets and lengths that are not those of a PackedSequence of ``steps.rows``.

    Raises:
        ValueError: on the CPU. On CUDA an assertion of the device fails.
    """
    sizes = steps.active().sum(1)
    right = (
        (steps.offsets == sizes.cumsum(0) - sizes).all()
        & (sizes.sum() == steps.rows)
        & (steps.lengths.diff() <= 0).all()
        & (steps.lengths > 0).all()
    )
    if right.is_cuda:
        torch._assert_async(right, "lstm_ext: batch_sizes do not fit a packed sequence's data")
    elif not right:
        raise ValueError(
            "batch_sizes: expected numbers that do not increase and sum to the rows of data, "
            f"{steps.rows}, got steps that start at rows {steps.offsets.tolist()} and sequences of "
            f"lengths {steps.lengths.tolist()}, with states of {steps.B} sequences"
        )


def check_lengths(lengths: Tensor, T: int) -> bool:
    """Refuses lengths (B), int64, that are not all in 0..T.

    Returns:
        Whether they are known to be T, all of them.

    Raises:
        ValueError: on the CPU. On CUDA an assertion of the device fails.
    """
    while is_functorch_wrapped_tensor(lengths):
        lengths = get_unwrapped(lengths)
    if not lengths.numel() or lengths.is_meta:
        return False
    if lengths.is_cuda:
        # Reading the values would wait for the device.
        torch._assert_async(
            ((lengths < 0) | (lengths > T)).any().logical_not(),
            f"lstm_ext: lengths must lie between 0 and the number of steps, {T}",
        )
        return False
    low, high = (int(v) for v in lengths.aminmax())
    if low < 0 or high > T:
        raise ValueError(
            f"Expected lengths between 0 and the number of steps, {T}, got values from "
            f"{low} to {high}"
        )
    return low == T


def _checked_reset_mask(
    reset_mask: Tensor, T: int, B: int, batch_first: bool, device: torch.device | str
) -> Tensor | None:
    """None where nothing is known to be reset."""
    if not isinstance(reset_mask, Tensor):
        raise TypeError(f"reset_mask should be a bool tensor, got {type(reset_mask).__name__}")
    if reset_mask.dtype != torch.bool:
        raise TypeError(f"reset_mask should have dtype torch.bool, got {reset_mask.dtype}")
    expected = (B, T) if batch_first else (T, B)
    if reset_mask.shape != expected:
        raise ValueError(f"Expected reset_mask of size {expected}, got {tuple(reset_mask.shape)}")
    check_dense("reset_mask", reset_mask)
    _check_values("reset_mask", reset_mask, device)
    if reset_mask.device.type == "cpu" and not is_watched() and not reset_mask.any():
        _refuse_capture(device)
        return None
    mask = (reset_mask.T if batch_first else reset_mask).detach()
    return _moved(mask.to(copy=True, memory_format=torch.contiguous_format), device)
