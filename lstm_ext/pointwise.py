"""The LSTM cell alone, on pre-activations that somebody else made: a convolution, for one.

The native core's cell (:mod:`cpu.cell`, :mod:`cuda.cell`), and the formula in torch operations.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lstm_ext import ops, reference
from lstm_ext.cpu import cell as cpu_cell
from lstm_ext.cuda.cell import CudaCells
from lstm_ext.cuda.engine import CudaEngine
from lstm_ext.steps import Steps


class Cells(Protocol):
    """What runs the cell on one kind of device.

    The tensors are those of :func:`lstm_cell`, contiguous, w_ch too.
    """

    def cell_forward(
        self,
        steps: Steps,
        a: Tensor,
        h: Tensor,
        c: Tensor,
        w_ch: Tensor | None,
        h_new: Tensor,
        c_new: Tensor,
        keep: bool,
    ) -> None:
        """Write the states after the step. keep: leave in ``a`` what backward reads there."""
        ...

    def cell_backward(
        self,
        steps: Steps,
        dh: Tensor | None,
        dc: Tensor | None,
        kept: Tensor,
        c: Tensor,
        c_new: Tensor,
        w_ch: Tensor | None,
        da: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the gradient of a, 0 in rows that take no step; return those of h, which only such
        rows pass on, of c and of w_ch.

        dh, dc: of the states after the step, None for zero. kept: what forward left in a.
        """
        ...


def cells_of(device: torch.device) -> Cells:
    """What runs the cell on ``device``, which has native kernels."""
    engine = ops.engine_of(device)
    return CudaCells(engine) if isinstance(engine, CudaEngine) else cpu_cell


def lstm_cell(
    a: Tensor, h: Tensor, c: Tensor, steps: Steps, w_ch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of ``rows`` cells in torch operations.

    Args:
        a: (rows, 4C) pre-activations, gates i, f, g, o, without the peepholes.
        h, c: (rows, C) states before the step, of a's dtype, float64 or float32.
        steps: ``Steps.padded(1, rows)``, with lengths where some rows take no step.
        w_ch: (3C,) peepholes of i, f, o, or None. i and f see c before the step, o after it
            (Gers et al. 2002; ONNX LSTM).

    Returns:
        The states after it, (rows, C) each; those of a row that takes no step are as before.
    """
    h_new, c_new = reference.lstm_cell(a, c, w_ch)
    if steps.lengths is None:
        return h_new, c_new
    on = steps.active().T  # (rows, 1)
    return torch.where(on, h_new, h), torch.where(on, c_new, c)
