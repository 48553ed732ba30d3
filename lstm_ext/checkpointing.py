"""A layer whose backward makes the gates again, a part of the steps at a time.

Training keeps 5H numbers of a step and sequence (the gates and c_t) until backward. Taken in parts
of ``every`` steps by torch.utils.checkpoint, only the states between the parts are kept, and one
part's gates at a time exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, Masks, with_masks
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import LayerOutputs


def checkpointed_layer(
    x: Tensor, directions: Sequence[Direction], steps: Steps, *, cells: bool, every: int
) -> LayerOutputs:
    """:func:`layer.lstm_layer` in parts of ``every`` steps.

    Each direction is taken alone, for the two cut the sequence at different steps.
    """
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
        y, (h_part,), (c_part,), part_cells = checkpoint(
            lstm_layer,
            part.take(x),
            [Direction(h[:B], c[:B], w_part, reverse)],
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
