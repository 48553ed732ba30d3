"""CNNLSTM: a network on every frame, then an LSTM over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM  # torch.nn.LSTM may be set to this package's
from torch.nn.utils.rnn import PackedSequence

from lstm_ext.compat import States
from lstm_ext.steps import Steps

__all__ = ["CNNLSTM"]


class CNNLSTM(nn.Module):
    """Runs ``cnn`` on every frame of every sequence at once, and ``lstm`` on what it makes.

    (Donahue et al. 2015, LRCN.)

    Args:
        cnn: maps frames (M, *frame) to (M, *feature); the features of a frame are flattened and
            must be ``lstm.input_size`` numbers.
        lstm: an :class:`lstm_ext.LSTM`, or nn.LSTM. Its ``batch_first`` holds for the input here.

    Raises:
        TypeError: cnn is no module, or lstm has no ``input_size`` or ``batch_first``.
    """

    def __init__(self, cnn: nn.Module, lstm: nn.Module) -> None:
        super().__init__()
        if not isinstance(cnn, nn.Module):
            raise TypeError(f"cnn should be a torch.nn.Module, got {type(cnn).__name__}")
        if not (hasattr(lstm, "input_size") and hasattr(lstm, "batch_first")):
            raise TypeError(
                f"lstm should be an lstm_ext.LSTM or torch.nn.LSTM, got {type(lstm).__name__}"
            )
        self.cnn, self.lstm = cnn, lstm

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Run the whole sequence.

        Args:
            input: (L, N, *frame), (N, L, *frame) if the lstm is batch_first, or a PackedSequence
                of frames.
            hx: the lstm's.
            lengths: (N,) as the lstm takes them. The cnn sees no frame past a length, so that
                batch norm does not count it; to find the others waits for the device.
            options: whatever else the lstm's forward takes, such as ``reset_mask``.

        Returns:
            What the lstm returns.

        Raises:
            ValueError: input of fewer than three dimensions, or not as many results as frames from
                the cnn. RuntimeError: not ``lstm.input_size`` features a frame. TypeError: lengths
                or options for an nn.LSTM, which takes none. And the lstm's own.
        """
        given = [*options] if lengths is None else ["lengths", *options]
        if given and type(self.lstm).forward is TorchLSTM.forward:
            raise TypeError(
                f"CNNLSTM: nn.LSTM takes no {', '.join(given)}: make it of an lstm_ext.LSTM"
            )
        if isinstance(input, PackedSequence):
            features = input._replace(data=self._features(input.data))
            if lengths is not None:
                options["lengths"] = lengths  # for the lstm to refuse
            return self.lstm(features, hx, **options)
        if input.dim() < 3:
            order = "(N, L, *frame)" if self.lstm.batch_first else "(L, N, *frame)"
            raise ValueError(f"CNNLSTM: Expected input {order}, got size {tuple(input.shape)}")
        first, second = input.shape[:2]
        frames = input.flatten(0, 1)
        if lengths is None:
            features = self._features(frames)
        else:
            batch_first = bool(self.lstm.batch_first)
            T, N = (second, first) if batch_first else (first, second)
            steps = Steps.padded(
                T, N, batch_first=batch_first, lengths=lengths, device=input.device
            )
            rows = steps.find_active_rows()
            made = self._features(frames.index_select(0, rows))
            features = made.new_zeros(frames.size(0), made.size(1)).index_copy(0, rows, made)
            options["lengths"] = lengths
        return self.lstm(features.view(first, second, features.size(1)), hx, **options)

    def _features(self, frames: Tensor) -> Tensor:
        """(M, input_size) from (M, *frame)."""
        features = self.cnn(frames)
        count = frames.size(0)  # not len(), which would be the export's for good
        if not isinstance(features, Tensor) or features.dim() < 1 or features.size(0) != count:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"CNNLSTM: Expected the cnn to return a tensor of {count} frames, got {got}"
            )
        features = features.flatten(1) if features.dim() > 1 else features.unsqueeze(1)
        if features.size(1) != self.lstm.input_size:
            raise RuntimeError(
                f"CNNLSTM: the cnn must make lstm.input_size features a frame. Expected "
                f"{self.lstm.input_size}, got {features.size(1)}"
            )
        return features
