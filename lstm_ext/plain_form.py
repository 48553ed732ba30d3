"""What the short way of :mod:`plain` has saved, in the form that the layer's own way takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_ext.engine import without_autocast
from lstm_ext.flat import grouped
from lstm_ext.steps import Steps
from lstm_ext.torch_engine import side_by_side

_INPUTS = 7  # of a direction: h_0, c_0, four weights and that of a projection


class LayerForm:
    """What PlainLayer has saved and the gradients of its outputs, as LSTMLayerBackward takes them:
    rows, and states of each direction."""

    def __init__(
        self,
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
        steps: int | Steps,
        batch_first: bool,
    ) -> None:
        x, *flat, gates, c_seq, y = saved
        self.D, states = len(flat) // _INPUTS, len(gradients) // 2
        self.together = self.D // states  # directions of a tensor of states: a module's has all
        self.H, self.has_y = c_seq.size(-1), len(gradients) % 2 == 1
        w_hr = flat[_INPUTS - 1]
        self.P = self.H if w_hr is None else w_hr.size(0)
        self.kinds = ((False, None), (True, None))[: self.D]
        self.given, self.gradients = (x, *flat), gradients
        inputs = self.inputs(self.given)
        if inputs[1] is None:
            B = math.prod(x.shape[:-1]) // (steps or 1)
            zeros = [x.new_zeros(B, width) for width in (self.P, self.H)]
            for at in range(1, len(inputs), _INPUTS):
                inputs[at : at + 2] = zeros
        h0 = inputs[1::_INPUTS]
        self.steps = steps
        if not isinstance(steps, Steps):
            self.steps = Steps.padded(steps or 1, h0[0].size(0), batch_first=batch_first)
        # The output is read only at a step before another.
        y = side_by_side(h0, x.dtype) if y is None else _rows(y, self.D * self.P)
        parts = [(t,) if self.D == 1 else t.tensor_split(self.D) for t in (gates, c_seq)]
        self.tensors = (*self.of_outputs(gradients), *inputs, y, *parts[0], *parts[1])

    def inputs(self, plain: Sequence[Any]) -> list[Any]:
        """Of x and of each direction's h_0, c_0 and weights, of PlainLayer's inputs; tensors, or
        flags."""
        x, *flat = plain
        groups = grouped(flat, self.D)
        listed = [_rows(x, x.size(-1)) if isinstance(x, Tensor) else x]
        for k in range(self.D):
            h, c = groups[k // self.together * self.together][:2]
            listed += [self._part(h, k, self.P), self._part(c, k, self.H), *groups[k][2:]]
        return listed

    def of_outputs(self, plain: Sequence[Any]) -> list[Any]:
        """Of the outputs: of y, of cells, which there are none, and of each h_n and each c_n."""
        y = plain[0] if self.has_y else None
        last = plain[1:] if self.has_y else plain
        half = len(last) // 2
        listed = [_rows(y, self.D * self.P) if isinstance(y, Tensor) else y, None]
        for states, width in ((last[:half], self.P), (last[half:], self.H)):
            listed += [self._part(states[k // self.together], k, width) for k in range(self.D)]
        return listed

    def _part(self, states: Any, k: int, width: int) -> Any:
        if not isinstance(states, Tensor):
            return states
        rows = _rows(states, width)
        return rows if self.together == 1 else rows.tensor_split(self.together)[k % self.together]

    def as_inputs(self, made: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The inverse of :meth:`inputs`."""
        x, *flat = made
        groups, given = grouped(flat, self.D), grouped(self.given[1:], self.D)
        results = [x if x is None else x.view(self.given[0].shape)]
        for k, (group, own) in enumerate(zip(groups, given, strict=True)):
            for i in range(2):
                parts = [g[i] for g in groups[k : k + self.together]]
                results.append(None if k % self.together else _joined(parts, own[i]))
            results += group[2:]
        return tuple(results)

    def as_outputs(self, made: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The inverse of :meth:`of_outputs`."""
        results = []
        if self.has_y:
            results.append(None if made[0] is None else made[0].view(self.gradients[0].shape))
        for start in (2, 2 + self.D):
            for k in range(start, start + self.D, self.together):
                like = self.gradients[len(results)]
                results.append(_joined(made[k : k + self.together], like))
        return tuple(results)


def _joined(parts: Sequence[Tensor | None], like: Tensor | None) -> Tensor | None:
    """The states of several directions, in the shape of those of a caller."""
    if parts[0] is None:
        return None
    if len(parts) == 1:
        return parts[0].view(like.shape)
    with without_autocast(like.device):
        return torch.cat(list(parts)).view(like.shape)


def _rows(tensor: Tensor | None, width: int) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 2 else tensor.reshape(-1, width)
