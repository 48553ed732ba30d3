"""What the engines share: a layer's parts as tuples, dtypes, addresses, what surrounds a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from lstm_ext.native import _C

#: enum Dtype of csrc/params.h
DTYPE_CODE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

#: By which the core looks at tensors; older versions of torch have none.
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)

#: Of the layer norms: torch's own default, which Haste's formula uses.
LAYER_NORM_EPSILON = 1e-5


class Masks(NamedTuple):
    """What dropout and zoneout do to the state of one direction of one layer."""

    h_dropout: Tensor | None = None  # (B, P) acc dtype: factors of h_{t-1} in W_hh h_{t-1}
    # What part of the old state stays: a number everywhere, or 0 and 1, bool.
    keep_h: Tensor | float = 0.0  # (rows, P)
    keep_c: Tensor | float = 0.0  # (rows, H)


class LayerWeights(NamedTuple):
    """Weights of one direction of one layer, gates in the order i, f, g, o, and its masks."""

    w_ih: Tensor  # (4H, in)
    w_hh: Tensor  # (4H, P)
    b_ih: Tensor | None = None  # (4H)
    b_hh: Tensor | None = None  # (4H)
    w_hr: Tensor | None = None  # (P, H), then P < H
    w_ch: Tensor | None = None  # (3H) peepholes of i, f, o
    # Layer norm, all four or none:
    gamma_ih: Tensor | None = None  # (4H)
    gamma_hh: Tensor | None = None  # (4H)
    gamma_ch: Tensor | None = None  # (H)
    beta_ch: Tensor | None = None  # (H)
    masks: Masks | None = None

    @property
    def normed(self) -> bool:
        """Whether there is a layer norm."""
        return self.gamma_hh is not None

    @property
    def varied(self) -> bool:
        """Whether the recurrence has anything beside nn.LSTM's."""
        return self.w_ch is not None or self.gamma_hh is not None or self.masks is not None


# Not properties and _replace, which torch.compile does not trace in PyTorch 2.8, nor slices.


def tensors_of(w: LayerWeights) -> tuple[Tensor | None, ...]:
    """All but the masks; of an LSTM as nn.LSTM has it, only the five that it has too."""
    usual = w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr
    if w.w_ch is None and w.gamma_ih is None:
        return usual
    return *usual, w.w_ch, w.gamma_ih, w.gamma_hh, w.gamma_ch, w.beta_ch


def with_masks(w: LayerWeights, masks: Masks | None) -> LayerWeights:
    """w with these masks, or, for None, its own."""
    if masks is None:
        return w
    *tensors, _ = w
    return LayerWeights(*tensors, masks)


class Direction(NamedTuple):
    """One direction of a layer."""

    h0: Tensor  # (B, P)
    c0: Tensor  # (B, H)
    w: LayerWeights
    reverse: bool  # walks the steps from the last to the first


class LayerResult(NamedTuple):
    """What a layer returns; lists are over its directions."""

    y: Tensor  # (rows, D*P), the directions side by side; rows of padding are 0
    h_n: list[Tensor]  # (B, P)
    c_n: list[Tensor]  # (B, H)
    gates: list[Tensor | None]  # (rows, 4H) after activation, acc dtype; None: not asked for
    c_seq: list[Tensor | None]  # (rows, H) every c_t, acc dtype; None: not asked for
    # What backward needs besides, a tuple of tensors each; empty if nowhere anything.
    more: Sequence[tuple[Tensor, ...]] = ()


class DirectionGrads(NamedTuple):
    """Gradients, or flags of which are wanted, of one direction's inputs."""

    h0: Any
    c0: Any
    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    w_hr: Any
    w_ch: Any = None
    gamma_ih: Any = None
    gamma_hh: Any = None
    gamma_ch: Any = None
    beta_ch: Any = None


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, gates and cell states are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(tensor: Tensor | None) -> int:
    """The address that the core reads or writes; 0 for None.

    Raises:
        RuntimeError: the tensor has elements but no memory, as a fake or functionalized one.
    """
    return _C.address(tensor)


def is_lazy(tensor: Tensor) -> bool:
    """Whether memory does not hold the tensor's numbers: a lazily negated one's are the opposite,
    and forward mode's zeros have none."""
    return tensor.is_neg() or tensor._is_zerotensor()


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that :func:`is_lazy`."""
    if torch.compiler.is_compiling():
        return tensor.resolve_neg()  # the only question that goes into a graph
    return tensor.clone() if is_lazy(tensor) else tensor


def native_steps(core: Any, steps: Any, reverse: bool) -> Any:
    """The core's description of the steps, walked forwards or backwards."""
    key = (core, reverse)
    native = steps.native.get(key)
    if native is None:
        for tensor in (steps.offsets, steps.lengths, steps.reset_mask):
            if tensor is not None and not tensor.is_contiguous():
                raise RuntimeError(
                    "Expected contiguous offsets, lengths and reset_mask, got strides "
                    f"{tensor.stride()} of size {tuple(tensor.shape)}"
                )
        native = steps.native[key] = core.Steps(
            T=steps.T,
            B=steps.B,
            rows=steps.rows,
            stride_t=1 if steps.batch_first else steps.B,
            stride_b=steps.T if steps.batch_first else 1,
            offsets=address(steps.offsets),
            lengths=address(steps.lengths),
            reset=address(steps.reset_mask),
            reverse=reverse,
        )
    return native


def native_variants(core: Any, w: LayerWeights, dtype: torch.dtype) -> tuple[Any, Any]:
    """The core's description of what w has beside nn.LSTM's weights; and what to keep meanwhile.

    dtype: of the layer.
    """
    if not w.varied:
        plain = _plain_variants.get(core)
        if plain is None:
            plain = _plain_variants[core] = core.Variants()
        return plain, None
    h_dropout, keep_h, keep_c = w.masks or Masks()  # a mask may be empty, and its address null
    if h_dropout is not None:
        h_dropout = h_dropout.to(acc_dtype(dtype))
    tensors = [
        t.contiguous() if isinstance(t, Tensor) else None
        for t in (w.w_ch, w.gamma_hh, w.gamma_ch, w.beta_ch, h_dropout, keep_h, keep_c)
    ]
    peephole, gamma_hh, gamma_ch, beta_ch, h_dropout, mask_h, mask_c = map(address, tensors)
    native = core.Variants(
        peephole=peephole,
        gamma_hh=gamma_hh,
        gamma_ch=gamma_ch,
        beta_ch=beta_ch,
        epsilon=LAYER_NORM_EPSILON,
        h_dropout=h_dropout,
        keep_h=mask_h,
        keep_c=mask_c,
        keep_h_all=0.0 if isinstance(keep_h, Tensor) else keep_h,
        keep_c_all=0.0 if isinstance(keep_c, Tensor) else keep_c,
    )
    return native, tensors


_plain_variants: dict[Any, Any] = {}


def norm_input(
    product: Tensor, w: LayerWeights, bias: Tensor | None, steps: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layer norm of the input product over all steps.

    Args:
        product: (rows, 4H) acc, x W_ih^T. bias: (4H) acc, b_ih + b_hh, or None.

    Returns:
        gamma_ih * LN(product) + bias, and what :func:`norm_input_backward` needs.
    """
    if steps.has_padding:
        product.masked_fill_(steps.padding_rows, 0)  # whatever x holds there
    gamma = w.gamma_ih.to(product.dtype)
    gx, mean, rstd = torch.native_layer_norm(
        product, product.shape[1:], gamma, bias, LAYER_NORM_EPSILON
    )
    return gx, (product, mean, rstd)


def norm_input_backward(
    dgates: Tensor, w: LayerWeights, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients (rows, 4H) of the product x W_ih^T, and (4H) of gamma_ih; acc dtype."""
    product, mean, rstd = saved
    gamma = w.gamma_ih.to(product.dtype)
    dproduct, dgamma, _ = torch.ops.aten.native_layer_norm_backward(
        dgates, product, product.shape[1:], mean, rstd, gamma, None, (True, True, False)
    )
    return dproduct, dgamma


def rows_of(gradient: Tensor | None, start: int, size: int) -> Tensor | None:
    """Columns start.. of a gradient that may be None, its last dimension contiguous."""
    if gradient is None:
        return None
    part = gradient if gradient.size(1) == size else gradient[:, start : start + size]
    part = in_memory(part)
    return part if size <= 1 or part.stride(1) == 1 else part.contiguous()


def allocate(like: Tensor, *size: int, zero: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of padding are not touched by the core: then the tensor starts as zeros."""
    return (like.new_zeros if zero else like.new_empty)(size, dtype=dtype)


def of_direction(
    d: Sequence[Tensor | None], k: int, H: int, P: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The k-th direction's part of what there is of y, of the cells, of each h_n and each c_n."""
    half = len(d) // 2
    return rows_of(d[0], k * P, P), rows_of(d[1], k * H, H), d[2 + k], d[half + 1 + k]


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """None for zero."""
    return a if b is None else b if a is None else a + b


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is enabled for a device type; False for those that know no autocast."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, and much the cheapest question
        return False
    # torch.compile does not trace the next question in PyTorch 2.8.
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The products run in the dtype that was chosen for the layer, whatever autocast says."""
    if autocast_is_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def asked_once_a_graph(question: Callable[[], Any]) -> Callable[[], Any]:
    """A function that torch.compile calls when it traces, and takes the result for a constant: as
    torch.compiler.assume_constant_result marks it, which imports all of torch._dynamo."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


def is_recorded() -> bool:
    """Whether torch operations go into a graph (make_fx, export), run on tensors without data
    (FakeTensorMode), or are made free of mutation (functionalize)."""
    kinds = torch._C._TorchDispatchModeKey
    mode = torch._C._get_dispatch_mode
    if mode(kinds.PROXY) is not None or mode(kinds.FAKE) is not None:
        return True
    transform = peek_interpreter_stack()
    return transform is not None and transform.key() == TransformType.Functionalize


def transform_names() -> list[str]:
    """Of the transforms of torch.func around, but for functionalize. Not where they are traced."""
    stack = get_interpreter_stack() or []
    return [t.key().name for t in stack if t.key() != TransformType.Functionalize]


#: What the core asks torch for, in one call: see csrc/bind_surroundings.h. Not where operations
#: are traced.
SURROUNDINGS = _C.Surroundings(
    functions={
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "transforms": torch._C._are_functorch_transforms_active,
        "tracing": torch._C._is_tracing,
        "autocast": torch._C._is_any_autocast_enabled,
        "function_mode": torch._C._is_torch_function_mode_enabled,
        "grad": torch.is_grad_enabled,
        "inference": torch.is_inference_mode_enabled,
        "threads": torch.get_num_threads,
        "deterministic": torch._C._get_deterministic_algorithms,
    },
    forward_ad=forward_ad,
)


def is_watched() -> bool:
    """Whether operations are recorded or run otherwise: a tensor may have no memory."""
    # First whether they are traced: what does it reads no further.
    return torch.compiler.is_compiling() or SURROUNDINGS.watched()


def is_surrounded() -> bool:
    """Whether anything but autograd's recording has a say in what an operation does: what records
    operations or runs them otherwise, autocast, torch.func, forward mode."""
    return torch.compiler.is_compiling() or SURROUNDINGS.surrounded()


def is_recording() -> bool:
    """Whether autograd records what is made of tensors that require grad: never in inference mode,
    whatever torch.enable_grad says. A graph cannot ask."""
    return torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    )


def is_intercepted(input: Any) -> bool:
    """Whether a module's forward of ``input`` is for :func:`as_one_function`: torch.fx traces it,
    or there is a TorchFunctionMode, which sees every function of torch and every attribute of a
    tensor, and may change what they return, the memory that the core is to read and write too. A
    default device is one: asked about all that is within, a call of LSTMCell takes 85 us instead
    of 14."""
    return not torch.compiler.is_compiling() and (
        SURROUNDINGS.intercepted() or isinstance(input, Proxy)
    )


def as_one_function(
    forward: Callable[..., Any], module: nn.Module, input: Any, hx: Any, **more: Any
) -> Any:
    """forward(module, input, hx, ...), of nothing within which anybody knows.

    To torch.fx the module is a leaf, as torch.nn's are; to the modes forward is a function of
    torch's own: they see what it gets and may change what it returns.
    """
    if isinstance(input, Proxy):
        given = {name: value for name, value in more.items() if value is not None}
        path = input.tracer.path_of_module(module)
        # What runs around forward has been traced by now, and would run once more.
        if not path or module._forward_hooks or module._forward_pre_hooks:
            what = "with hooks" if path else "itself"
            raise RuntimeError(
                f"torch.fx cannot trace a {type(module).__name__} {what}: trace a module that "
                "holds it, by a Tracer whose is_leaf_module() says that it is a leaf"
            )
        return input.tracer.create_proxy("call_module", path, (input, hx), given)
    return handle_torch_function(forward, (), module, input, hx, **more)


def refuse_jit(module: nn.Module | None = None) -> NoReturn:
    """Raise RuntimeError with the ways that there are instead of torch.jit.trace and script."""
    raise RuntimeError(
        "lstm_ext cannot be traced by torch.jit.trace, which would record nothing of the native "
        "core, nor compiled by torch.jit.script. Use torch.export.export, or trace or script the "
        "module that an LSTM's to_torch() returns, of weights of 8 bits that of dequantize(); for "
        "ONNX there is lstm_ext.onnx.export."
    )
