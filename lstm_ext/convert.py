"""convert: lstm_ext modules in place of every nn.LSTM and nn.LSTMCell of a model."""

from __future__ import annotations

import warnings

from torch import nn

from .lstm_cell import LSTMCell
from .modules import LSTM

_REPLACEMENTS = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}


def convert(model: nn.Module) -> nn.Module:
    """Swap every nn.LSTM and nn.LSTMCell in model for its lstm_ext counterpart, in place.

    The new modules share the Parameters (an optimizer made before stays valid), hooks and training
    flags of the old ones; one that is registered in several places stays one. A module compiled on
    its own (`module.compile()`) comes back uncompiled.

    Subclasses of the two, which parametrized modules are too, and modules whose forward was
    replaced are left alone, with one warning that names them: what they add would be lost.

    Args:
        model: any module.

    Returns:
        model, or, where model is itself an nn.LSTM or nn.LSTMCell, its replacement.

    Raises:
        TypeError: model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}
    left_alone = []
    for name, module in model.named_modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None and "forward" not in module.__dict__:
            swapped[module] = replacement.from_torch(module)
        elif isinstance(module, tuple(_REPLACEMENTS)):
            left_alone.append(f"{name or 'the model itself'} ({type(module).__qualname__})")
    for parent in list(model.modules()):
        # Not named_children(), which skips a module's second name.
        for name, child in list(parent._modules.items()):
            if child in swapped:
                parent.add_module(name, swapped[child])
    if left_alone:
        warnings.warn(
            "convert left alone, being subclasses of nn.LSTM or nn.LSTMCell or modules with a "
            f"replaced forward: {', '.join(left_alone)}",
            stacklevel=2,
        )
    return swapped.get(model, model)
