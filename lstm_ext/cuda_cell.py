"""The LSTM cell alone on the native core's CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lstm_ext.cuda_engine import CudaEngine
from lstm_ext.engine import DTYPE_CODE, address, in_memory
from lstm_ext.profiling import recorded
from lstm_ext.steps import Steps


class CudaCells:
    """The cell on an engine's device; see :class:`pointwise.Cells`."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine

    def _cell(self, steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None) -> Any:
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
        self, steps: Steps, a: Tensor, h: Tensor, c: Tensor, w_ch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h_new, c_new = torch.empty_like(h), torch.empty_like(c)
        with self.engine.guard(a.device):
            run = recorded(self.engine.core.cuda_cell_forward)
            run(self._cell(steps, a, h, c, w_ch), address(h_new), address(c_new))
        return h_new, c_new

    def cell_backward(
        self,
        steps: Steps,
        grads: tuple[Tensor | None, ...],
        a: Tensor,
        h: Tensor,
        c: Tensor,
        w_ch: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        dh, dc = (None if g is None else in_memory(g).contiguous() for g in grads)
        da, dh0, dc0 = torch.empty_like(a), torch.empty_like(h), torch.empty_like(c)
        dw_ch = None if w_ch is None else a.new_empty(c.size(0), 3 * c.size(1))
        with self.engine.guard(a.device):
            recorded(self.engine.core.cuda_cell_backward)(
                self._cell(steps, a, h, c, w_ch),
                dh=address(dh),
                dc=address(dc),
                da=address(da),
                dh0=address(dh0),
                dc0=address(dc0),
                dpeephole=address(dw_ch),
            )
        return da, dh0, dc0, None if dw_ch is None else dw_ch.sum(0)
