"""LSTM for PyTorch on a native core: ``lstm_ext.LSTM`` in place of ``torch.nn.LSTM``."""

from lstm_ext._version import __version__
from lstm_ext.convert import convert
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM

__all__ = ["LSTM", "LSTMCell", "__version__", "convert"]
