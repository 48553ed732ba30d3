"""ConvLSTM1d, 2d, 3d and their cells: the LSTM with convolutions in place of its products."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lstm_ext.compat import States, as_batch, check_pair
from lstm_ext.conv_base import ConvLSTMBase, Size
from lstm_ext.conv_cell import short_step
from lstm_ext.engine import as_one_function, is_intercepted, is_recorded
from lstm_ext.steps import Steps
from lstm_ext.variants import check_bool, check_probability

__all__ = [
    "ConvLSTM1d",
    "ConvLSTM1dCell",
    "ConvLSTM2d",
    "ConvLSTM2dCell",
    "ConvLSTM3d",
    "ConvLSTM3dCell",
]


class ConvLSTM(ConvLSTMBase):
    """A sequence; the classes below say of how many dimensions."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Size,
        num_layers: int = 1,
        *,
        stride: Size = 1,
        padding: Size | str = "same",
        dilation: Size = 1,
        bias: bool = True,
        batch_first: bool = False,
        peephole: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        bidirectional: bool = False,
        merge_mode: str | None = "concat",
        dropout: float = 0.0,
    ) -> None:
        check_bool("batch_first", batch_first)
        shared = (num_layers, stride, padding, dilation, bias, peephole, "_l{}", device, dtype)
        directions = (bidirectional, merge_mode)
        super().__init__(in_channels, hidden_channels, kernel_size, *shared, *directions)
        self.batch_first, self.dropout = batch_first, dropout
        if dropout and num_layers == 1:
            warnings.warn(
                "dropout is applied to the output of every layer but the last, expected num_layers "
                f"of at least 2, got dropout={dropout} and num_layers=1",
                stacklevel=2,
            )

    # With a flag beside it: torch.compile(dynamic=True) makes a graph twice if forward looks at a
    # number of floating point.
    _dropout: float = 0.0

    @property
    def dropout(self) -> float:
        """The probability; may be set after construction, as nn.LSTM's."""
        return self._dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        check_probability("dropout", p)
        self._dropout, self._drops = float(p), p > 0

    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """Run the whole sequence of L steps, in D directions.

        Args:
            input: (L, N, in_channels, *size), (N, L, ...) with batch_first, or without N; L and N
                may be 0. *size: one, two or three numbers.
            hx: (h_0, c_0), each (D*num_layers, N, hidden_channels, *output), without N for an
                unbatched input; None: zeros. *output is the size that the first layer's input
                convolution leaves.
            lengths: (N,) integers in 0..L in any order, a tensor on any device or a list. Outputs
                past a length are 0 and what the input holds there does not matter; h_n and c_n are
                those of each sequence's last step; the reverse direction starts there; a zero
                length returns the initial state.
            reset_mask: bool, (L, N), (N, L) with batch_first, (L,) unbatched: where true, the
                state is zero before that step (in each direction's own order), in every layer.

        Returns:
            output, (h_n, c_n): the last layer's h of every step, (L, N, D*hidden_channels,
            *output) or as the input has it, and the states shaped as hx. merge_mode "sum", "mul"
            and "ave" give an output of hidden_channels, None a pair, one of each direction. In
            memory they lie channels last. Under autocast all are of its dtype.

        Raises:
            ValueError: an input of another rank; lengths or reset_mask of another shape, lengths
                out of range (in a graph RuntimeError). TypeError: an input that is no Tensor,
                lengths that are no integers, a reset_mask that is not bool, an hx that is no tuple
                or list of tensors; a dtype without kernels.
                RuntimeError: an input of another dtype than the parameters', of another number of
                channels, or smaller than the kernel; an hx that is not two, or of another size or
                dtype; what is sparse; attributes changed after construction; a CUDA tensor and a
                build without CUDA.
        """
        if is_intercepted(input):
            given = {"lengths": lengths, "reset_mask": reset_mask}
            return as_one_function(ConvLSTM.forward, self, input, hx, **given)
        batched = self._is_batched(input, self._dims + 2)
        if hx is not None:
            check_pair(hx, type(self).__name__)
        N = (input.size(0 if self.batch_first else 1),) if batched else ()
        self._check(input, hx, (self.num_layers * self._directions, *N))
        if not batched:
            lengths, reset_mask = as_batch(lengths, reset_mask, input.size(0), self.batch_first)
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = hx and (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        T, N = input.shape[:2][:: -1 if self.batch_first else 1]
        # The layout is that of reset_mask; the layers take x time-first.
        given = {"lengths": lengths, "reset_mask": reset_mask, "batch_first": self.batch_first}
        steps = Steps.padded(T, N, **given, device=input.device)
        if steps.lengths is not None and (torch.compiler.is_compiling() or is_recorded()):
            right = ((steps.lengths >= 0) & (steps.lengths <= T)).all()
            torch._assert_async(right, "lengths: expected 0 to as many as there are steps")
        outputs, h, c = self._run(input.transpose(0, 1) if self.batch_first else input, hx, steps)
        h_n, c_n = torch.stack(h), torch.stack(c)
        if self.batch_first:  # in memory too: whoever takes all frames as one batch copies nothing
            outputs = [y.movedim((0, 2), (1, -1)).contiguous().movedim(-1, 2) for y in outputs]
        if not batched:
            outputs = [y.squeeze(0 if self.batch_first else 1) for y in outputs]
            h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
        return outputs[0] if len(outputs) == 1 else tuple(outputs), (h_n, c_n)


class ConvLSTMCell(ConvLSTMBase):
    """A step, likewise."""

    _is_cell = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size | str = "same",
        dilation: Size = 1,
        bias: bool = True,
        peephole: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shared = (1, stride, padding, dilation, bias, peephole)
        super().__init__(in_channels, hidden_channels, kernel_size, *shared, "", device, dtype)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Take one step.

        Args:
            input: (N, in_channels, *size), or (in_channels, *size) unbatched.
            hx: (h_0, c_0), each (N, hidden_channels, *output), or without N; None: zeros.

        Returns:
            (h_1, c_1), shaped as hx.

        Raises:
            As the sequence's forward.
        """
        if not torch.compiler.is_compiling() and self._attributes() == self._made_as:
            states = short_step(self._parameters, input, hx, self._made_as)
            if states is not None:
                return states
        if is_intercepted(input):
            return as_one_function(ConvLSTMCell.forward, self, input, hx)
        batched = self._is_batched(input, self._dims + 1)
        if hx is not None:
            check_pair(hx, type(self).__name__)
        self._check(input, hx, (input.size(0),) if batched else ())
        if not batched:
            input = input.unsqueeze(0)
            hx = hx and (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        hx = hx and (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        steps = Steps.padded(1, input.size(0))
        _, (h,), (c,) = self._run(input.unsqueeze(0), hx, steps)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


_SEQUENCE_DOC = """A stateful convolutional LSTM over sequences of {what}.

    Every layer computes, with * a convolution and the rows of the weights in the order i, f, g, o::

        i_t = sigmoid(W_ii * x_t + b_ii + W_hi * h_{{t-1}} + b_hi  [+ w_ci c_{{t-1}}])
        f_t = sigmoid(W_if * x_t + b_if + W_hf * h_{{t-1}} + b_hf  [+ w_cf c_{{t-1}}])
        g_t = tanh   (W_ig * x_t + b_ig + W_hg * h_{{t-1}} + b_hg)
        o_t = sigmoid(W_io * x_t + b_io + W_ho * h_{{t-1}} + b_ho  [+ w_co c_t])
        c_t = f_t c_{{t-1}} + i_t g_t
        h_t = o_t tanh(c_t)

    (Shi et al. 2015; in brackets: with peephole, a weight a channel where the paper, whose images
    are of one size, has one a pixel.) All input convolutions of a layer are made at once.

    Args:
        in_channels, hidden_channels: of the input, and of h and c (C below).
        kernel_size: of every convolution; an integer or one a dimension, as are all sizes.
        num_layers: each takes the h of the one below.
        stride, padding: of the first layer's input convolution. padding: integers, "valid" (none),
            or "same": an output of ceil(size / stride), with the odd zero at the end. The input
            convolutions of deeper layers keep the size.
        dilation: of every input convolution.
        bias: whether the convolutions have biases.
        batch_first: sequences are (N, L, ...), not (L, N, ...). Never the states.
        peephole: whether the gates see the cell.
        device, dtype: of the parameters.
        bidirectional: a second direction takes the steps from the last to the first; the next layer
            takes both directions' outputs.
        merge_mode: what becomes of the two outputs, in every layer: "concat", channels side by
            side; "sum", "mul" or "ave" (mean), then a deeper layer's input has C channels; None: a
            pair of outputs, of a single layer.
        dropout: while training, the probability that an element of the output of a layer but the
            last is zero for the next layer, the others scaled by 1/(1-p): element by element, not
            whole channels or images, and anew at every step.

    The recurrent convolution has stride 1, dilation 1 and keeps the size.

    Parameters of layer k and direction (``_reverse`` for the second), with in = in_channels for
    k = 0, else the channels of the output below: ``weight_ih_l{{k}}`` (4C, in, *kernel_size),
    ``weight_hh_l{{k}}`` (4C, C, *kernel_size), ``bias_ih_l{{k}}`` and ``bias_hh_l{{k}}`` (4C,),
    with peephole ``weight_ch_l{{k}}`` (3C,), rows i, f, o. All are drawn from U(-1/sqrt(n),
    1/sqrt(n)), n = C times the number of the kernel's pixels.

    Raises:
        ValueError: a size that is no integer or too small; an unknown merge_mode, one but "concat"
            with a single direction, None with several layers; a probability outside of 0..1.
            TypeError: a flag that is no bool.
    """

_CELL_DOC = """One step of :class:`{sequence}`.

    Args:
        in_channels, hidden_channels, kernel_size, stride, padding, dilation, bias, peephole,
        device, dtype: as :class:`{sequence}`.

    Parameters: those of its layer 0, without the ``_l0``.
    """


class ConvLSTM1d(ConvLSTM):
    __doc__ = _SEQUENCE_DOC.format(what="lines, (L, N, in_channels, width)")
    _dims = 1


class ConvLSTM2d(ConvLSTM):
    __doc__ = _SEQUENCE_DOC.format(what="images, (L, N, in_channels, height, width)")
    _dims = 2


class ConvLSTM3d(ConvLSTM):
    __doc__ = _SEQUENCE_DOC.format(what="volumes, (L, N, in_channels, depth, height, width)")
    _dims = 3


class ConvLSTM1dCell(ConvLSTMCell):
    __doc__ = _CELL_DOC.format(sequence="ConvLSTM1d")
    _dims = 1


class ConvLSTM2dCell(ConvLSTMCell):
    __doc__ = _CELL_DOC.format(sequence="ConvLSTM2d")
    _dims = 2


class ConvLSTM3dCell(ConvLSTMCell):
    __doc__ = _CELL_DOC.format(sequence="ConvLSTM3d")
    _dims = 3
