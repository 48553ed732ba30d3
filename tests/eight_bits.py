"""What tests of weights of 8 bits share. The fixture ``inference`` is in conftest.py.

The LSTM whose weights the codes stand for, dequantize(), computes in float64 here. Against it only
inputs and states are rounded, to 16 bits: some 1e-5 at these sizes. Without their lower byte it
would be some 1e-3.
"""

import pytest
import torch
from torch import nn

from lstm_ext import ops

ISAS = ops.cpu_isas()  # all of them
MARKS = [
    pytest.mark.cpu_only(reason="weights of 8 bits are for the CPU"),
    pytest.mark.usefixtures("inference"),
]


def flat(result):
    """The tensors of what a module returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def in_float64(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.double()
    return tuple(map(in_float64, value))


def check(quantized, *args, atol=1e-4, **kwargs):
    """quantized computes what the LSTM of its weights does. atol: inputs and states are rounded to
    16 bits at every step; 4.3e-5 at most, measured."""
    made = quantized(*args, **kwargs)
    args = [None if arg is None else in_float64(arg) for arg in args]
    expected = quantized.dequantize().double()(*args, **kwargs)
    for a, b in zip(flat(made), flat(expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)
