"""convert: lstm_ext modules in place of each nn.LSTM and nn.LSTMCell of a model; to_torch: back."""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

# torch.nn's attributes of these names may have been set to this package's classes.
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell
from torch.nn.utils.parametrize import is_parametrized

from lstm_ext.compat import has_replaced_forward
from lstm_ext.lstm_cell import LSTMCell
from lstm_ext.modules import LSTM

Makers = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


def convert(model: nn.Module) -> nn.Module:
    """Swap every nn.LSTM and nn.LSTMCell in model for its lstm_ext counterpart, in place.

    The new modules share the Parameters (an optimizer made before stays valid), hooks and training
    flags of the old ones; one that is registered in several places stays one, and so it does in the
    lists, dicts and plain attributes of model's modules. What `torch.compile(module)` wraps stays
    compiled; a module compiled in place (`module.compile()`) comes back uncompiled.

    Subclasses of the two, which parametrized modules are too, and modules whose forward was
    replaced are left alone, with one warning that names them: what they add would be lost. It names
    also what these lists, dicts and attributes still hold of the old ones: in a tuple, as a bound
    method, or unregistered.

    Args:
        model: any module.

    Returns:
        model, or, where model is itself an nn.LSTM or nn.LSTMCell, its replacement.

    Raises:
        TypeError: model is no nn.Module.
    """
    makers = {TorchLSTM: LSTM.from_torch, TorchLSTMCell: LSTMCell.from_torch}
    return replaced("convert", model, makers)


def to_torch(model: nn.Module) -> nn.Module:
    """The inverse of :func:`convert`: an nn.LSTM or nn.LSTMCell in the place of every
    lstm_ext.LSTM and lstm_ext.LSTMCell of model, for a tool that knows only those.

    All that convert says holds here; modules with what torch.nn has not (variants,
    ``return_cell_sequence``, weights of 8 bits) are left alone too, with that warning.

    Args:
        model: any module.

    Returns:
        model, or, where model is itself an LSTM or LSTMCell, its replacement.

    Raises:
        TypeError: model is no nn.Module.
    """
    makers = {LSTM: LSTM.to_torch, LSTMCell: LSTMCell.to_torch}
    return replaced("to_torch", model, makers)


def replaced(
    name: str, model: nn.Module, makers: Makers, done: type[nn.Module] | tuple[()] = ()
) -> nn.Module:
    """model with what the makers make of each module of exactly their types; see :func:`convert`.

    makers: may raise ValueError, and the module is left alone. done: what is there already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, nn.Module] = {}
    others, parametrized, refused = [], [], []
    for path, module in model.named_modules():
        make = makers.get(type(module))
        where = f"{path or 'the model itself'} ({type(module).__qualname__})"
        if make is not None and not has_replaced_forward(module):
            try:
                swapped[module] = make(module)
            except ValueError as error:
                refused.append(f"{where}: {error}")
        elif isinstance(module, tuple(makers)) and not isinstance(module, done):
            (parametrized if is_parametrized(module) else others).append(where)
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
    for names, words in (
        (parametrized, f"being parametrized ({name} before that, or remove_parametrizations)"),
        (others, "being subclasses of an LSTM or LSTMCell or modules with a replaced forward"),
    ):
        if names:
            refused.insert(0, f"{words}: {', '.join(names)}")
    if places := _References(swapped, known, makers).follow(model):
        refused.append(f"held besides the registered modules: {', '.join(places)}")
    if refused:
        warnings.warn(f"{name} left alone, {'; '.join(refused)}", stacklevel=3)
    return swapped.get(model, model)


class _References:
    """Where the modules of a model hold swapped ones other than as registered modules.

    Values are told by their types alone: a proxy may raise at any question.
    """

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
        usual = vars(nn.Module()).keys()
        for path, module in model.named_modules():
            attributes, root = vars(module), (None, path) if path else None
            held = [(attributes, name, (root, name)) for name in attributes.keys() - usual]
            while held:
                held += self._look(*held.pop())
        return self.left

    def _look(self, holder: Any, key: Any, place: _Place) -> list[tuple[Any, Any, _Place]]:
        """Look at an item of a holder, and return those to look at next."""
        value = holder[key]
        kind = type(value)
        if issubclass(kind, nn.Module):
            if value in self.swapped:
                if isinstance(holder, (list, dict)):
                    holder[key] = self.swapped[value]
                else:
                    self.left.append(_name(place))
            elif kind in self.makers and value not in self.known:
                self.left.append(f"{_name(place)} ({kind.__qualname__}, unregistered)")
        elif kind is MethodType:
            if type(value.__self__) in self.makers and value.__self__ in self.swapped:
                self.left.append(f"{_name(place)} (a method of what was replaced)")
        elif kind in _CONTAINERS and id(value) not in self.seen:
            self.seen.add(id(value))
            keys = value if isinstance(value, dict) else range(len(value))
            return [(value, k, (place, k)) for k in keys]
        return []


_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)
_Place = tuple[Any, Any]  # the place of what holds it, or None, and its key there


def _name(place: _Place | None) -> str:
    names = []
    while place is not None:
        place, key = place
        names.append(str(key) if type(key) in (str, int) else f"<{type(key).__name__}>")
    return ".".join(reversed(names))
