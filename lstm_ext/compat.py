"""What nn.LSTM is besides its forward: checks, attributes, pickles, and moving to and from it.

nn.RNNBase supplies the parameters' names, the constructor's checks, the state dict and most error
messages. nn.LSTM itself is no base class here: torch.compile refuses its subclasses by type.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from lstm_ext.engine import autocast_is_on
from lstm_ext.steps import is_packed
from lstm_ext.tensors import is_autocast
from lstm_ext.variants import Variants, check_bool, check_merge_mode

States = tuple[Tensor, Tensor]
_Module = TypeVar("_Module", bound=nn.Module)


class LSTMBase(Variants, nn.RNNBase):
    """nn.LSTM's methods and attributes other than forward, without its flat list of weights."""

    # On the class for what was made from an nn.LSTM.
    merge_mode: str | None = "concat"
    return_cell_sequence: bool = False
    checkpoint_every: int | None = None

    # --- nn.LSTM's checks, callable on their own as there ----------------------------------------

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise nn.LSTM's error for an input of a wrong dtype, rank or feature size."""
        # The usual case in three comparisons; the base class finds the words for the others. A
        # parametrized weight is not looked at, for each look computes it: forward checks it later.
        first = self._parameters.get("weight_ih_l0")
        if (
            (first is not None and input.dtype != first.dtype)
            or input.dim() != (3 if batch_sizes is None else 2)
            or input.size(-1) != self.input_size
        ):
            super().check_input(input, batch_sizes)

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """(D*num_layers, N, H), the shape c_0 must have for this input."""
        count, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return count, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: States, batch_sizes: Tensor | None) -> None:
        """Raise nn.LSTM's error for a wrong input, or states of another shape than expected."""
        self.check_input(input, batch_sizes)
        size = self.get_expected_hidden_size(input, batch_sizes)
        if hidden[0].shape != size:
            self.check_hidden_size(hidden[0], size, "Expected hidden[0] size {}, got {}")
        size = self.get_expected_cell_size(input, batch_sizes)
        if hidden[1].shape != size:
            self.check_hidden_size(hidden[1], size, "Expected hidden[1] size {}, got {}")

    def check_packed_in_a_graph(self, packed: PackedSequence, hidden: States) -> int:
        """:meth:`check_forward_args` where the number of sequences is data that a graph has not.

        Returns the number that the order of the sequences has, or else the states: the operator
        compares it with the data when it runs.
        """
        self.check_input(packed.data, packed.batch_sizes)
        count = self.num_layers * (2 if self.bidirectional else 1)
        N = hidden[0].size(1) if hidden[0].dim() > 1 else 1
        if packed.sorted_indices is not None:
            N = packed.sorted_indices.size(0)
        for k, width in enumerate((self.proj_size or self.hidden_size, self.hidden_size)):
            words = f"Expected hidden[{k}] size {{}}, got {{}}"
            self.check_hidden_size(hidden[k], (count, N, width), words)
        return N

    def permute_hidden(self, hx: States, permutation: Tensor | None) -> States:
        """The states with their sequences in the order of permutation (N,); None: as they are."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        merge = "" if self.merge_mode == "concat" else f", merge_mode={self.merge_mode!r}"
        cells = ", return_cell_sequence=True" if self.return_cell_sequence else ""
        every = (
            "" if self.checkpoint_every is None else f", checkpoint_every={self.checkpoint_every}"
        )
        return super().extra_repr() + merge + self._variants_repr() + cells + every

    def _named_weights(self) -> list[list[str]]:
        """The names, a list a layer and direction, that the attributes as they are now ask for."""
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size else []
        kinds += self._variant_names()
        return [[kind + suffix for kind in kinds] for suffix in self._suffixes()]

    def _check_attributes(self) -> None:
        """Refuse attributes set after construction that the parameters were not made for."""
        if self._all_weights == self._named_weights():
            return
        names = ("num_layers", "bias", "bidirectional", "proj_size", "peephole", "layer_norm")
        raise RuntimeError(
            f"got {', '.join(f'{name}={getattr(self, name)}' for name in names)}, expected what "
            f"the module was constructed with, having {', '.join(self._flat_weights_names)}: "
            "these attributes cannot be changed afterwards"
        )

    # --- what nn.RNNBase keeps beside the parameters, and this class does not ---------------------

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:
        # No list, as nn.RNNBase's: what is put in its place would be lost.
        return tuple(getattr(self, name, None) for name in self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        # Code for nn.LSTM rebuilds the list after it replaced a parameter: nothing to do here.
        current = self._flat_weights
        if len(weights) != len(current) or any(
            a is not b for a, b in zip(weights, current, strict=True)
        ):
            raise AttributeError(
                "_flat_weights only mirrors the module's attributes here; expected the tensors of "
                f"{', '.join(self._flat_weights_names)}: set those attributes instead"
            )

    def flatten_parameters(self) -> None:
        """Do nothing: there is no flat buffer. Here for code written for nn.LSTM."""

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    # Past nn.RNNBase's own, which keep a flat buffer, but not past what a user mixes in behind it.

    def __setattr__(self, name: str, value: Any) -> None:
        super(nn.RNNBase, self).__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        if name == "merge_mode":
            # What is set before the others counts with those that it needs.
            own = self.__dict__
            check_merge_mode(value, own.get("bidirectional", True), own.get("num_layers", 1))
        elif name in ("return_cell_sequence", "bidirectional"):
            check_bool(name, value)  # nn.LSTM asks about its own only when it runs
        elif name == "checkpoint_every":
            check_every(value)
        return super()._checked(name, value)

    def _replicate_for_data_parallel(self) -> LSTMBase:
        return super(nn.RNNBase, self)._replicate_for_data_parallel()

    def __getstate__(self) -> dict[str, Any]:
        state = super(nn.RNNBase, self).__getstate__()
        state.pop("_flat_weight_refs", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take nn.LSTM's attributes of any age: names are made anew, kept weights are dropped."""
        state = {"proj_size": 0, **state}
        for name in ("all_weights", "_flat_weights", "_flat_weight_refs"):
            state.pop(name, None)
        super(nn.RNNBase, self).__setstate__(state)
        self._all_weights = self._named_weights()
        self._flat_weights_names = list(itertools.chain.from_iterable(self._all_weights))

    def _suffixes(self) -> list[str]:
        """Of the names of parameters, an entry a layer and direction."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]


def check_pair(hx: Any, op: str = "lstm") -> None:
    if not isinstance(hx, (tuple, list)) or not all(isinstance(state, Tensor) for state in hx):
        inside = f" of {[type(s).__name__ for s in hx]}" if isinstance(hx, (tuple, list)) else ""
        got = type(hx).__name__ + inside
        raise TypeError(f"{op}: hx should be a pair of Tensors (h_0, c_0), got {got}")
    if len(hx) != 2:
        raise RuntimeError(f"{op} expects two hidden states")


def as_batch(lengths: Any, reset_mask: Any, T: int, batch_first: bool) -> tuple[Any, Any]:
    """What forward takes beside an unbatched sequence of T steps, as beside a batch of it."""
    if isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if isinstance(reset_mask, Tensor):
        if reset_mask.dim() != 1:
            raise ValueError(f"Expected reset_mask of size {(T,)}, got {tuple(reset_mask.shape)}")
        reset_mask = reset_mask.unsqueeze(0 if batch_first else 1)
    return lengths, reset_mask


def check_every(every: int | None) -> None:
    """Raise for a number of steps that is none."""
    if every is not None and (not isinstance(every, int) or isinstance(every, bool)):
        got = type(every).__name__
        raise TypeError(f"checkpoint_every should be a number of steps or None, got: {got}")
    if every is not None and every < 1:
        raise ValueError(f"checkpoint_every should be at least 1, got {every}")


def check_batch_sizes(batch_sizes: Tensor, data: Tensor) -> None:
    """Refuse a PackedSequence made by hand whose batch_sizes point to rows that are not there."""
    rows = data.size(0)
    words = (
        "batch_sizes: expected a 1-D torch.int64 tensor of one or more numbers that do not "
        "increase and sum to"
    )
    if batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1 and batch_sizes.numel():
        right = is_packed(batch_sizes, rows)
        if torch.compiler.is_compiling():
            # The number itself in the message would make a graph for it alone.
            torch._assert_async(right, f"{words} the rows of data")
            return
        if right:
            return
    raise ValueError(f"{words} {rows}, got {batch_sizes.tolist()} of {batch_sizes.dtype}")


def check_match(name: str, tensors: Iterable[Tensor], input: Tensor) -> None:
    """Raise, in ATen's words, where a tensor is on another device or of another dtype than input.

    Where autocast is on for that device, those that it casts may differ.
    """
    dtype, device = input.dtype, input.device
    for tensor in tensors:
        if tensor.dtype == dtype and tensor.device == device:
            continue
        if tensor.device != device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at "
                f"{device} and {name} tensor at {tensor.device}"
            )
        cast = is_autocast(dtype) and is_autocast(tensor.dtype)
        if not (cast and autocast_is_on(device.type)):
            raise RuntimeError(
                f"Input and {name} tensors are not the same dtype, found input tensor with "
                f"{dtype} and {name} tensor with {tensor.dtype}"
            )


def check_weights(names: Iterable[str], weights: Iterable[Tensor | None], input: Tensor) -> None:
    """As check_match for parameters, any of which a user may also have set to None."""
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
        check_match("parameter", [weight], input)


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether module runs another forward than its class's. Who takes a replaced one back may leave
    the class's own, bound to module, among its attributes."""
    forward = module.__dict__.get("forward")
    if type(forward) is MethodType and forward.__self__ is module:
        return forward.__func__ is not type(module).forward
    return forward is not None


def adopt(new: _Module, module: nn.Module, expected: type[nn.Module], **extra: Any) -> _Module:
    """Give new, bare from __new__, the attributes of module; the Parameters themselves are shared.

    The dicts of hooks are shared too, so that handles given out by module still remove its hooks.
    """
    if type(module) is not expected or is_parametrized(module):
        want = f"{expected.__module__}.{expected.__qualname__}"
        got = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"expected a {want} and no subclass or parametrization of it, got {got}")
    if has_replaced_forward(module):
        raise TypeError(
            f"the forward of this {type(module).__qualname__} was replaced; got {module}"
        )
    state = module.__getstate__()
    for name in ("_compiled_call_impl", "forward"):
        state.pop(name, None)  # bound to the old module
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    new.__setstate__({**state, **extra})
    # A hook registered "with module" holds a weak reference to the module it was registered on.
    new._load_state_dict_pre_hooks = type(new._load_state_dict_pre_hooks)(
        (key, type(hook)(hook.hook, new) if getattr(hook, "with_module", False) else hook)
        for key, hook in new._load_state_dict_pre_hooks.items()
    )
    return new


def check_none(peer: str, own: dict[str, Any]) -> None:
    """Raise ValueError if there is anything that peer, a class of torch.nn, has not."""
    for name, value in own.items():
        raise ValueError(f"to_torch: {peer} has no {name}; got {value!r}")


def forget(module: _Module, *names: str) -> _Module:
    """module, a torch.nn one that was adopted, without the attributes it would not have."""
    for name in (*names, *Variants.__annotations__):
        module.__dict__.pop(name, None)
    return module
