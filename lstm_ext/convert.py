"""convert: lstm_ext modules in place of every nn.LSTM and nn.LSTMCell of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# torch.nn's attributes of these names may have been set to this package's classes.
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell

from .compat import has_replaced_forward
from .lstm_cell import LSTMCell
from .modules import LSTM

Makers = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


def convert(model: nn.Module) -> nn.Module:
    """Swap every nn.LSTM and nn.LSTMCell in model for its lstm_ext counterpart, in place.

    The new modules share the Parameters (an optimizer made before stays valid), hooks and training
    flags of the old ones; one that is registered in several places stays one, and so it does in the
    lists, dicts and plain attributes of model's modules. What `torch.compile(module)` wraps stays
    compiled; a module compiled in place (`module.compile()`) comes back uncompiled.

    Subclasses of the two, which parametrized modules are too, and modules whose forward was
    replaced are left alone, with one warning that names them: what they add would be lost. It names
    also where model still holds an old one: in a tuple, as a bound method, or unregistered.

    Args:
        model: any module.

    Returns:
        model, or, where model is itself an nn.LSTM or nn.LSTMCell, its replacement.

    Raises:
        TypeError: model is no nn.Module.
    """
    makers = {TorchLSTM: LSTM.from_torch, TorchLSTMCell: LSTMCell.from_torch}
    return replaced("convert", model, makers)


def replaced(
    name: str, model: nn.Module, makers: Makers, done: type[nn.Module] | tuple[()] = ()
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
        if make is not None and not has_replaced_forward(module):
            try:
                swapped[module] = make(module)
            except ValueError as error:
                refused.append(f"{where}: {error}")
        elif isinstance(module, tuple(makers)) and not isinstance(module, done):
            others.append(where)
    known = set(model.modules())
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
    if places := _References(swapped, known, makers).follow(model):
        refused.append(f"held besides the registered modules: {', '.join(places)}")
    if refused:
        warnings.warn(f"{name} left alone, {'; '.join(refused)}", stacklevel=3)
    return swapped.get(model, model)


class _References:
    """Where the modules of a model hold swapped ones other than as registered modules."""

    def __init__(
        self, swapped: Mapping[nn.Module, nn.Module], known: set[nn.Module], makers: Makers
    ) -> None:
        self.swapped, self.known, self.makers = swapped, known, makers
        self.left: list[str] = []
        self.seen: set[int] = set()

    def follow(self, model: nn.Module) -> list[str]:
        """Puts the new ones there; returns the places where that cannot be done."""
        if model in self.swapped:
            return []
        for path, module in model.named_modules():
            attributes = vars(module)
            for name in attributes.keys() - vars(nn.Module()).keys():
                where = f"{path}.{name}" if path else name
                attributes[name] = self._followed(attributes[name], where)
        return self.left

    def _followed(self, value: Any, where: str) -> Any:
        if isinstance(value, nn.Module):
            if value in self.swapped:
                return self.swapped[value]
            if type(value) in self.makers and value not in self.known:
                self.left.append(f"{where} ({type(value).__qualname__}, unregistered)")
        elif isinstance(owner := getattr(value, "__self__", None), nn.Module):
            if owner in self.swapped:
                self.left.append(f"{where} (a method of what was replaced)")
        elif type(value) in (list, dict, tuple) and id(value) not in self.seen:
            self.seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(items):
                new = self._followed(item, f"{where}[{key!r}]")
                if new is not item and isinstance(value, tuple):
                    self.left.append(f"{where}[{key!r}]")
                elif new is not item:
                    value[key] = new
        return value
