"""convert: lstm_ext modules in place of every nn.LSTM and nn.LSTMCell of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .lstm_cell import LSTMCell
from .modules import LSTM


def convert(model: nn.Module) -> nn.Module:
    """Swap every nn.LSTM and nn.LSTMCell in model for its lstm_ext counterpart, in place.

    The new modules share the Parameters (an optimizer made before stays valid), hooks and training
    flags of the old ones; one that is registered in several places stays one. What
    `torch.compile(module)` wraps stays compiled; a module compiled in place (`module.compile()`)
    comes back uncompiled.

    Subclasses of the two, which parametrized modules are too, and modules whose forward was
    replaced are left alone, with one warning that names them: what they add would be lost.

    Args:
        model: any module.

    Returns:
        model, or, where model is itself an nn.LSTM or nn.LSTMCell, its replacement.

    Raises:
        TypeError: model is no nn.Module.
    """
    return replaced("convert", model, {nn.LSTM: LSTM.from_torch, nn.LSTMCell: LSTMCell.from_torch})


def replaced(
    name: str,
    model: nn.Module,
    makers: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
    done: type[nn.Module] | tuple[()] = (),
) -> nn.Module:
    """model with what the makers make of each module of exactly their types; see :func:`convert`.

    makers: may raise ValueError, and the module is left alone. done: what is there already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}
    others, refused = [], []
    for path, module in model.named_modules():
        make = makers.get(type(module))
        where = f"{path or 'the model itself'} ({type(module).__qualname__})"
        if make is not None and "forward" not in module.__dict__:
            try:
                swapped[module] = make(module)
            except ValueError as error:
                refused.append(f"{where}: {error}")
        elif isinstance(module, tuple(makers)) and not isinstance(module, done):
            others.append(where)
    for parent in list(model.modules()):
        # Not named_children(), which skips a module's second name.
        for child_name, child in list(parent._modules.items()):
            if child in swapped:
                parent.add_module(child_name, swapped[child])
                if child_name == "_orig_mod" and "dynamo_ctx" in parent.__dict__:
                    # Of torch.compile(module), which keeps that module's forward besides, compiled
                    # and, for another torch.compile, as it was.
                    parent.__setstate__(parent.__getstate__())
                    parent.__dict__["_torchdynamo_orig_callable"] = swapped[child].forward
    if others:
        refused.insert(
            0,
            "being subclasses of nn.LSTM or nn.LSTMCell or modules with a replaced forward: "
            + ", ".join(others),
        )
    if refused:
        warnings.warn(f"{name} left alone, {'; '.join(refused)}", stacklevel=3)
    return swapped.get(model, model)
