"""LSTM: layers, directions, packing and errors, as torch.nn has them.

The weights are read from the module at every forward and never kept, so that everything that
replaces a parameter (functional_call, parametrizations, weight_norm, pruning, tying, .to()) works.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM  # torch.nn.LSTM may be set to this one
from torch.nn.utils.rnn import PackedSequence

from lstm_ext import wavefront
from lstm_ext.compat import (
    LSTMBase,
    States,
    adopt,
    as_batch,
    check_batch_sizes,
    check_match,
    check_none,
    check_pair,
    check_weights,
    forget,
)
from lstm_ext.engine import as_one_function, is_intercepted, is_recording, is_watched
from lstm_ext.layer import lstm_layer
from lstm_ext.ops import Direction, LayerWeights
from lstm_ext.plain_module import plain_module
from lstm_ext.steps import Steps
from lstm_ext.tensors import check_dense
from lstm_ext.variants import merged

__all__ = ["LSTM"]


class LSTM(LSTMBase):
    r"""A drop-in replacement for :class:`torch.nn.LSTM`.

    Every layer and direction computes, with the rows of the weights in the order i, f, g, o::

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh   (W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)              W_hr (o_t * tanh(c_t)) with proj_size

    (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000; projection: Sak et al. 2014.)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
        device, dtype: as :class:`torch.nn.LSTM`.
        merge_mode: what becomes of the two directions' outputs, in every layer: "concat", as
            nn.LSTM; "sum", "mul" or "ave" (mean), then a deeper layer's input has P features;
            None: a pair of outputs, of a single layer (Keras' Bidirectional).
        peephole: the gates see the cell, by ``weight_ch_l{k}`` (3H,), rows i, f, o (ONNX LSTM,
            after Gers et al. 2002): a_i += p_i c_{t-1}, a_f += p_f c_{t-1}, a_o += p_o c_t.
        layer_norm: with LN(v) = (v - mean(v)) / sqrt(var(v) + 1e-5) over all rows (Haste's
            LayerNormLSTM, after Ba et al. 2016),
            a_t = gamma_ih LN(W_ih x_t) + gamma_hh LN(W_hh h_{t-1}) + b_ih + b_hh and
            h_t = o_t * tanh(gamma_ch LN(c_t) + beta_ch), by ``gamma_ih_l{k}`` and
            ``gamma_hh_l{k}`` (4H,), ``gamma_ch_l{k}`` and ``beta_ch_l{k}`` (H,).
        recurrent_dropout: while training, the probability that an element of h_{t-1} is zero in
            W_hh h_{t-1}, the others scaled by 1/(1-p); one mask for all steps of a sequence (Gal
            & Ghahramani 2016).
        weight_dropout: while training, the same of an element of W_hh, for the whole call
            (DropConnect, Wan et al. 2013).
        zoneout: the probability that a unit keeps its old value at a step, a number for h and c
            or a pair (h, c); while not training its expectation, z old + (1-z) new (Krueger et al.
            2017; Haste's zoneout=z is (z, 0)). h_t is made of c_t before zoneout. Rounded to a
            multiple of 2**-16.
        forget_bias: initial value of the forget gate's bias, b_if + b_hf; None: as the others.
        return_cell_sequence: return every c_t of the last layer as a third result.
        checkpoint_every: take the sequence in parts of so many steps while gradients are recorded,
            and make each part's gates again in backward: of the gates and c_t of every step, 5H
            numbers a sequence, only one part's exist at a time, for the time of a second forward
            pass and some 0.2 ms a part; h and c of each part's end are kept. Half types round c,
            and its gradient, between two parts, as between two calls. In graphs of torch.compile
            and programs of torch.export too. A second derivative, forward mode with variants, and
            devices without kernels keep all. None: keep all.

    The masks of dropout and zoneout come from torch's generator, layer by layer, the same for a
    batch-first layout: torch.manual_seed repeats them bit for bit.

    Parameters and their names are nn.LSTM's: per layer k and direction (``_reverse`` for the
    second) ``weight_ih_l{k}`` (4H, in), ``weight_hh_l{k}`` (4H, P), ``bias_ih_l{k}`` and
    ``bias_hh_l{k}`` (4H,), ``weight_hr_l{k}`` (P, H) with proj_size; in is input_size for k = 0,
    else D*P. All, ``weight_ch`` too, are drawn from U(-1/sqrt(H), 1/sqrt(H)); gammas start at 1,
    beta at 0.

    Raises:
        TypeError, ValueError: nn.LSTM's own for what it refuses; ValueError for a probability
            outside of 0..1, an unknown merge_mode, one but "concat" with a single direction, None
            with several layers, a forget_bias without bias, or a checkpoint_every below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        merge_mode: str | None = "concat",
        peephole: bool = False,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        forget_bias: float | None = None,
        return_cell_sequence: bool = False,
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._set_variants(
            peephole, layer_norm, recurrent_dropout, weight_dropout, zoneout, forget_bias
        )
        self.merge_mode, self.return_cell_sequence = merge_mode, return_cell_sequence
        self.checkpoint_every = checkpoint_every
        for k, suffix in enumerate(self._suffixes()):
            w_ih, w_hh = (getattr(self, name) for name in self._all_weights[k][:2])
            if merge_mode not in ("concat", None) and w_ih.size(1) != w_hh.size(1) and k > 1:
                size = (w_ih.size(0), w_hh.size(1))
                setattr(self, self._all_weights[k][0], self._new_parameter(w_ih, *size))
            self._add_parameters(suffix, w_hh)
            self._all_weights[k] += self._variant_names(suffix)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._reset_variants()

    # --- forward ---------------------------------------------------------------------------------

    _run_layer = staticmethod(lstm_layer)
    _short_way = plain_module

    # As nn.LSTM's; with return_cell_sequence there is a third result.
    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None
    ) -> tuple[PackedSequence, States]: ...

    def forward(self, input, hx=None, *, lengths=None, reset_mask=None):
        """Run the whole sequence.

        With N sequences of L steps, D directions, H = hidden_size and P = proj_size or H:

        Args:
            input: (L, N, input_size), (N, L, input_size) with batch_first, (L, input_size)
                unbatched, or a PackedSequence. L and N may be 0.
            hx: (h_0, c_0) of shapes (D*num_layers, N, P) and (D*num_layers, N, H), without N for
                an unbatched input; None: zeros.
            lengths: (N,) integers in 0..L in any order, a tensor on any device ((1,) or 0-d
                unbatched) or a list. Outputs past a length are 0 and what the input holds there
                does not matter; h_n and c_n are those of each sequence's last step; the reverse
                direction starts there; a zero length returns the initial state.
            reset_mask: bool, (L, N), (N, L) with batch_first, (L,) unbatched: where true, the
                state is zero before that step (in each direction's own order), in every layer.

        Returns:
            output, (h_n, c_n), exactly as nn.LSTM: output shaped as the input with D*P features (a
            PackedSequence for one), the states shaped as hx. With return_cell_sequence also cells:
            c_t of the last layer, shaped as output with D*H features. merge_mode "sum", "mul" and
            "ave" give an output of P features, and the same states and cells; None gives pairs,
            one of each direction, for output and cells. Under autocast all of it in autocast's
            dtype, c too, as nn.LSTM on CUDA.

        Raises:
            ValueError, RuntimeError, TypeError: nn.LSTM's own for what it refuses.
            ValueError: lengths or reset_mask of another size, or beside a PackedSequence; lengths
                out of range (on a CUDA device an assertion of the device fails instead).
            TypeError: lengths that are no integers, a reset_mask that is not bool, an input of
                another dtype than float64, float32, bfloat16 and float16, an hx that is no tuple
                or list of tensors.
            RuntimeError: an hx that is not two, sparse and nested tensors, a CUDA device and a
                build without CUDA, and num_layers, bias, bidirectional or proj_size changed after
                construction.
        """
        if is_intercepted(input):
            given = {"lengths": lengths, "reset_mask": reset_mask}
            return as_one_function(LSTM.forward, self, input, hx, **given)
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence already holds its lengths; got both")
            if reset_mask is not None:
                raise ValueError("reset_mask is not supported with a PackedSequence; use lengths=")
            return self._forward_packed(input, hx)
        if lengths is None and reset_mask is None and not getattr(input, "is_nested", False):
            made = self._short_way(input, hx)
            if made is not None:
                return made
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        check_dense("input", input)
        batched = input.dim() == 3
        if not batched:
            given = lengths, reset_mask
            lengths, reset_mask = as_batch(*given, input.size(0), self.batch_first)
            input = input.unsqueeze(0 if self.batch_first else 1)
        if hx is None:
            self.check_input(input, None)
        else:
            check_pair(hx)
            dims = 3 if batched else 2
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {'batched' if batched else 'unbatched'} {dims}-D input, hx and cx should "
                    f"also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            if not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            self.check_forward_args(input, hx, None)
            check_match("hidden", hx, input)
        if self.batch_first:
            batch, length, _ = input.shape
        else:
            length, batch, _ = input.shape
        steps = Steps.padded(
            length,
            batch,
            batch_first=self.batch_first,
            lengths=lengths,
            reset_mask=reset_mask,
            device=input.device,
        )
        # Rows in the order of the user's own layout: neither input nor output is transposed.
        x = input.reshape(length * batch, self.input_size)
        y, h_n, c_n, cells = self._layers(x, hx, steps)
        shape = input.shape[:2] if batched else (length,)
        y = y.view(*shape, y.size(1))
        if not batched:
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        if cells is not None:
            cells = cells.view(*shape, cells.size(1))
        if self.merge_mode is None:
            y = y.chunk(2, dim=-1)
            cells = None if cells is None else cells.chunk(2, dim=-1)
        return (y, (h_n, c_n)) if cells is None else (y, (h_n, c_n), cells)

    def _forward_packed(self, input: PackedSequence, hx: States | None):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        check_batch_sizes(batch_sizes, data)
        sequences: int | None = None
        if hx is None:
            self.check_input(data, batch_sizes)
        else:
            check_pair(hx)
            if torch.compiler.is_compiling():
                sequences = self.check_packed_in_a_graph(input, hx)
            else:
                self.check_forward_args(data, hx, batch_sizes)
            check_match("hidden", hx, data)
            hx = self.permute_hidden(hx, sorted_indices)
        T, rows = batch_sizes.numel(), data.size(0)
        if not is_watched() and rows == T * int(batch_sizes[0]):
            steps = Steps.padded(T, rows // T)  # all of one length, or one sequence
        else:
            steps = Steps.packed(batch_sizes, rows, data.device, sequences)
        y, h_n, c_n, cells = self._layers(data, hx, steps, packed=True)

        def pack(rows: Tensor) -> PackedSequence | tuple[PackedSequence, ...]:
            parts = (rows,) if self.merge_mode is not None else rows.chunk(2, dim=1)
            packed = [
                PackedSequence(part, batch_sizes, sorted_indices, unsorted_indices)
                for part in parts
            ]
            return packed[0] if self.merge_mode is not None else tuple(packed)

        states = self.permute_hidden((h_n, c_n), unsorted_indices)
        return (pack(y), states) if cells is None else (pack(y), states, pack(cells))

    def _layers(
        self, x: Tensor, hx: States | None, steps: Steps, packed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All layers on the rows of x (rows, in): y (rows, D*P) or, merged, (rows, P); h_n, c_n,
        cells (rows, D*H)."""
        directions = 2 if self.bidirectional else 1
        count = self.num_layers * directions
        if len(self._all_weights) != count or len(self._all_weights[0]) != self._weight_count():
            self._check_attributes()
        if hx is None:
            c = x.new_zeros(steps.B, self.hidden_size)
            h = x.new_zeros(steps.B, self.proj_size) if self.proj_size else c
            h0, c0 = [h] * count, [c] * count
        else:
            h0, c0 = hx[0].unbind(0), hx[1].unbind(0)
        if self.num_layers > 1 and wavefront.applies(self, x, steps):
            return wavefront.run(self, x, h0, c0, steps)
        run, every = self._run_layer, self.checkpoint_every
        if every is not None and is_recording():
            run = functools.partial(run, every=every)
        h_n, c_n = [], []
        cells: Tensor | None = None
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            indices = range(layer * directions, (layer + 1) * directions)
            x, h, c, cells = run(
                x,
                [
                    Direction(
                        h0[i],
                        c0[i],
                        self._layer_weights(i, x, steps, h0[i], c0[i]),
                        directions == 2 and i % 2 == 1,
                    )
                    for i in indices
                ],
                steps,
                cells=last and self.return_cell_sequence,
            )
            h_n += h
            c_n += c
            if self.merge_mode not in ("concat", None):
                x = merged(x, self.merge_mode)
            if self.dropout and self.training and not last:
                rows, n = x.shape
                dropped = self._drop(x if packed else x.view(*steps.padded_shape, n))
                x = dropped.reshape(rows, n)
        # No views, so that a state may be detached in place on its way to the next sequence.
        return x, torch.stack(h_n), torch.stack(c_n), cells

    def _weight_count(self) -> int:
        """Of a layer and direction, as the attributes are now."""
        return 2 + 2 * self.bias + bool(self.proj_size) + self.peephole + 4 * self.layer_norm

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout between two layers, of rows or of x as a module has it; on the CPU the mask
        nn.LSTM draws from the same seed."""
        if x.dim() == 2 or not self.batch_first:
            return F.dropout(x, self.dropout)
        # nn.LSTM works time-first inside, so its mask is drawn in that order.
        mask = F.dropout(x.new_ones(x.size(1), x.size(0), x.size(2)), self.dropout)
        return x * mask.transpose(0, 1)

    def _layer_weights(
        self, index: int, x: Tensor, steps: Steps, h0: Tensor, c0: Tensor
    ) -> LayerWeights:
        """The tensors of one layer and direction, as they are now, and masks drawn for a call."""
        names, parameters = self._all_weights[index], self._parameters
        # getattr finds every kind of replaced weight, but is slow for a plain parameter.
        weights = [parameters[n] if n in parameters else getattr(self, n) for n in names]
        dtype, device = x.dtype, x.device
        for weight in weights:
            if weight is None or weight.dtype != dtype or weight.device != device:
                check_weights(names, weights, x)
        return self._arranged(weights, self.bias, self.proj_size > 0, steps, h0, c0)

    # --- conversion ------------------------------------------------------------------------------

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> LSTM:
        """An LSTM that shares the Parameters, hooks and training flag of an nn.LSTM.

        Raises:
            TypeError: module is not exactly an nn.LSTM (what a subclass, a parametrization or a
                replaced forward adds would be lost).
        """
        return adopt(cls.__new__(cls), module, TorchLSTM)

    def to_torch(self) -> nn.LSTM:
        """An nn.LSTM that shares the Parameters, hooks and training flag of this module.

        Raises:
            ValueError: nn.LSTM has no return_cell_sequence, merge_mode and no variant that is in
                use here. (forget_bias is none: what it did is in the parameters.)
            TypeError: this is a subclass, is parametrized, or its forward was replaced.
        """
        own = {} if self.merge_mode == "concat" else {"merge_mode": self.merge_mode}
        own |= self._variants()
        if self.return_cell_sequence:
            own["return_cell_sequence"] = True
        check_none("nn.LSTM", own)
        module = TorchLSTM.__new__(TorchLSTM)
        module = adopt(module, self, LSTM, _flat_weights=list(self._flat_weights))
        forget(module, "merge_mode", "return_cell_sequence", "checkpoint_every")
        module.flatten_parameters()
        return module
