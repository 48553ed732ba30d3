"""A layer whose backward makes the gates again, a part of the steps at a time.

Training keeps 5H numbers of a step and sequence (the gates and c_t) until backward. Taken in parts
of ``every`` steps by torch.utils.checkpoint, only the states between the parts are kept, and one
part's gates at a time exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.utils.checkpoint import checkpoint

from lstm_ext.flat import flatten
from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, Masks, with_masks
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import LayerOutputs


def checkpointed_layer(
    x: Tensor, directions: Sequence[Direction], steps: Steps, *, cells: bool, every: int
) -> LayerOutputs:
    """:func:`layer.lstm_layer` in parts of ``every`` steps.

    Each direction is taken alone, for the two cut the sequence at different steps.

    Raises:
        RuntimeError: under torch.func.grad and what is made of it. In backward: a tensor that is
            read again then has been changed in place since.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and any(t.key() == TransformType.Grad for t in get_interpreter_stack() or []):
        raise RuntimeError(
            f"checkpoint_every={every}: torch.func.grad, vjp, jacrev and hessian know no "
            "checkpoints (hooks on saved tensors). Set it to None on the module, or use "
            "torch.autograd"
        )
    results = [_direction(x, d, steps, cells, every) for d in directions]
    y, h_n, c_n, all_cells = zip(*results, strict=True)
    D = len(directions)
    return LayerOutputs(
        y[0] if D == 1 else torch.cat(y, 1),
        list(h_n),
        list(c_n),
        None if not cells else all_cells[0] if D == 1 else torch.cat(all_cells, 1),
    )


def _direction(
    x: Tensor, direction: Direction, steps: Steps, cells: bool, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    h, c, w, reverse = direction
    parts: list[tuple[Tensor, Tensor | None]] = []
    starts = range(0, steps.T, every)
    for start in reversed(starts) if reverse else starts:
        part = steps.part(start, min(start + every, steps.T))
        B, w_part = part.steps.B, w
        if w.masks is not None:
            h_dropout, *keep = w.masks
            keep = [part.take(k) if isinstance(k, Tensor) else k for k in keep]
            h_dropout = None if h_dropout is None else h_dropout[:B]
            w_part = with_masks(w, Masks(h_dropout, *keep))
        taken = part.take(x), [Direction(h[:B], c[:B], w_part, reverse)]
        y, (h_part,), (c_part,), part_cells = checkpoint(
            _unchanged(*taken),
            *taken,
            part.steps,
            cells=cells,
            use_reentrant=False,
            preserve_rng_state=False,  # the masks are drawn already
        )
        # Of a packed sequence the others have ended, or not begun yet.
        h = h_part if B == steps.B else torch.cat((h_part, h[B:]))
        c = c_part if B == steps.B else torch.cat((c_part, c[B:]))
        parts.append((y, part_cells))
    y, all_cells = zip(*(reversed(parts) if reverse else parts), strict=True)
    return steps.joined(y), h, c, steps.joined(all_cells) if cells else None


def _unchanged(x: Tensor, directions: list[Direction]) -> Callable[..., LayerOutputs]:
    """:func:`layer.lstm_layer` for these tensors as they are now: torch.utils.checkpoint reads them
    again in backward, and does not ask whether they are still the same."""
    if torch.compiler.is_compiling():
        return lstm_layer  # a graph has no changes in place
    read = [t for t in (x, *flatten(directions)) if t is not None and not t.is_inference()]
    versions = [t._version for t in read]

    def run(*args, **options) -> LayerOutputs:
        for tensor, version in zip(read, versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: with checkpoint_every backward reads a tensor of size "
                    f"{tuple(tensor.shape)} again, expected its version {version}, got "
                    f"{tensor._version}"
                )
        return lstm_layer(*args, **options)

    return run
