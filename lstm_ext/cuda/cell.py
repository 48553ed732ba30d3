"""The LSTM cell alone on the native core's CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_ext.cuda.engine import CudaEngine
from lstm_ext.engine import DTYPE_CODE, address
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


class CudaCells:
    """The cell on an engine's device; see :class:`pointwise.Cells`."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine

    def _cell(
        self, steps: Steps, a: Tensor, h: Tensor | None, c: Tensor, w_ch: Tensor | None
    ) -> Any:
        return self.engine.core.CudaCell(
            dtype=DTYPE_CODE[a.dtype],
            rows=c.size(0),
            width=c.size(1),
            a=address(a),
            h=address(h),
            c=address(c),
            peephole=address(w_ch),
            lengths=address(steps.lengths),
            stream=self.engine.stream(a.device),
        )

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
        """See :meth:`pointwise.Cells.cell_forward`: ``a`` stays, backward makes the gates again."""
        with self.engine.guard(a.device):
            run = recorded(self.engine.core.cuda_cell_forward)
            run(self._cell(steps, a, h, c, w_ch), address(h_new), address(c_new))

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
        """See :meth:`pointwise.Cells.cell_backward`."""
        dh0, dc0 = torch.empty_like(c), torch.empty_like(c)
        dw_ch = None if w_ch is None else c.new_empty(c.size(0), 3 * c.size(1))
        with self.engine.guard(c.device):
            recorded(self.engine.core.cuda_cell_backward)(
                self._cell(steps, kept, None, c, w_ch),
                dh=address(dh),
                dc=address(dc),
                da=address(da),
                dh0=address(dh0),
                dc0=address(dc0),
                dpeephole=address(dw_ch),
            )
        return dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
