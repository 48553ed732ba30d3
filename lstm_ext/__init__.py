"""LSTM for PyTorch on a native core: ``lstm_ext.LSTM`` in place of ``torch.nn.LSTM``."""

from lstm_ext._version import __version__
from lstm_ext.cnn import CNNLSTM
from lstm_ext.conv import (
    ConvLSTM1d,
    ConvLSTM1dCell,
    ConvLSTM2d,
    ConvLSTM2dCell,
    ConvLSTM3d,
    ConvLSTM3dCell,
)
from lstm_ext.convert import convert, to_torch
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM
from lstm_ext.quantized import QuantizedLSTM, QuantizedLSTMCell, quantize

__all__ = [
    "CNNLSTM",
    "LSTM",
    "ConvLSTM1d",
    "ConvLSTM1dCell",
    "ConvLSTM2d",
    "ConvLSTM2dCell",
    "ConvLSTM3d",
    "ConvLSTM3dCell",
    "LSTMCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "__version__",
    "convert",
    "quantize",
    "to_torch",
]
