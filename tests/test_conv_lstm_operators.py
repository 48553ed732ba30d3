"""The operators that a graph with ConvLSTMs calls (torch.library)."""

import device
import pytest
import torch
from device import here
from test_conv_lstm import IN, C, L, N
from test_conv_lstm_compile import BACKWARD, FORWARD, _lengths
from torch.library import opcheck

import lstm_ext


def operands(
    dtype=torch.float32,
    lengths=False,
    resets=False,
    reverse=False,
    bias=True,
    stride=(1, 2),
    padding=None,
    T=L,
):
    """Of a layer without peepholes where it has no bias."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    convolved = dtype if device.DEVICE.type != "cpu" else acc
    module = lstm_ext.ConvLSTM2d(
        IN, C, 3, stride=stride, padding="same" if padding is None else padding
    )
    size = module._window(0).output((6, 5))
    shapes = [(T, N, IN, 6, 5), (4 * C, IN, 3, 3), (4 * C,), (4 * C, C, 3, 3)]
    tensors = [torch.randn(shape).to(convolved) / 2 for shape in shapes]
    tensors += [torch.randn(shape).to(acc) / 2 for shape in [(N, *size, C)] * 2 + [(3 * C,)]]
    if not bias:
        tensors[2] = tensors[6] = None
    tensors = [None if t is None else here(t) for t in tensors]
    ends = _lengths(T, N) if lengths else None
    mask = here(torch.rand(T, N) < 0.4) if resets else None
    return (*tensors, ends, mask, reverse, list(stride), padding and list(padding), [1, 1], dtype)


CALLS = {
    "plain": {"bias": False, "padding": (0, 2)},
    "peephole": {},
    "lengths": {"lengths": True},
    "resets": {"lengths": True, "resets": True},
    "double": {"dtype": torch.float64, "stride": (1, 1)},
    "half": {"dtype": torch.float16, "lengths": True},
    "reverse": {"lengths": True, "resets": True, "reverse": True},
    "one_step": {"T": 1},
    "no_steps": {"T": 0},
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    arguments = operands(**CALLS[name])
    trained = [
        t.clone().requires_grad_() if k < 7 and t is not None else t
        for k, t in enumerate(arguments)
    ]
    opcheck(FORWARD, (*trained, False))
    opcheck(FORWARD, (*arguments, False))
    opcheck(FORWARD, (*arguments, True))
    results = FORWARD(*arguments, True)
    grads = [torch.randn_like(t) for t in results[:3]]
    wanted = [t is not None for t in arguments[:7]]
    opcheck(BACKWARD, (*arguments, *grads, *results[3:], wanted))
    opcheck(BACKWARD, (*arguments, None, grads[1], None, *results[3:], wanted))
    made = BACKWARD(*arguments, *grads, *results[3:], wanted)
    (dh0,) = BACKWARD(*arguments, *grads, *results[3:], [k == 4 for k in range(7)])
    assert torch.equal(dh0, made[-3 if wanted[6] else -2])


#: What stands where in the operator's arguments, and the words of the error.
REFUSED = {
    "no_image": ({0: lambda x: x.flatten(3)}, "of 2 dimensions of images"),
    "channels": ({0: lambda x: x[:, :, :1]}, r"of size \(20, 1, 3, 3\), got .* \(20, 2, 3, 3\)"),
    "size": ({0: lambda x: x[..., :3]}, r"of size \(3, 6, 2, 5\), got .* \(3, 6, 3, 5\)"),
    "batch": ({0: lambda x: x[:, :2]}, r"of size \(2, 6, 3, 5\), got"),
    "dtype": ({4: lambda h: h.double()}, "Expected torch.float32 of size .* got torch.float64"),
    "unknown_dtype": ({13: lambda _: torch.int64}, "no kernel for torch.int64"),
    "peephole": ({6: lambda w: w[1:]}, r"of size \(15,\), got"),
    "lengths": ({7: lambda t: t[:2]}, r"lengths to be torch.int64 of size \(3,\)"),
    "a_length": ({7: lambda t: t + L}, "between 0 and the number of steps"),
    "reset_mask": ({8: lambda t: t.T}, r"reset_mask to be torch.bool of size \(4, 3\)"),
    "stride": ({10: lambda _: [1, 0]}, "Expected a stride, padding and dilation of 2 numbers"),
    "padding": ({11: lambda _: [0]}, "Expected a stride, padding and dilation of 2 numbers"),
    "small": ({11: lambda _: [0, 0], 12: lambda _: [3, 3]}, "too small for kernel size"),
}


@pytest.mark.cpu_only(reason="on CUDA a wrong length fails an assertion of the device")
@pytest.mark.parametrize("name", REFUSED)
def test_operators_check_what_they_get(name):
    changes, words = REFUSED[name]
    arguments = list(operands(lengths=True, resets=True))
    saved = FORWARD(*arguments, True)[3:]
    for place, change in changes.items():
        arguments[place] = change(arguments[place])
    for run, rest in ((FORWARD, [False]), (BACKWARD, [None] * 3 + saved + [[True] * 7])):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
            run(*arguments, *rest)


def test_backward_checks_gradients_and_what_was_saved():
    arguments, wanted = operands(), [True] * 7
    y, h, c, *saved = FORWARD(*arguments, True)
    for grads in ((y[:-1], h, c), (y, h.double(), c), (y, h, c[..., :1])):
        with pytest.raises(RuntimeError, match="Expected a gradient of size"):
            BACKWARD(*arguments, *grads, *saved, wanted)
    for flags in ([True] * 6, [True] * 8):
        with pytest.raises(RuntimeError, match="Expected wanted to be among the tensors"):
            BACKWARD(*arguments, y, h, c, *saved, flags)
    absent = (*arguments[:6], None, *arguments[7:])
    with pytest.raises(RuntimeError, match=r"among the tensors \[True.* False\], got"):
        BACKWARD(*absent, y, h, c, *saved, wanted)
    for k in range(3):
        less = [t[:-1] if at == k else t for at, t in enumerate(saved)]
        with pytest.raises(RuntimeError, match="Expected a result saved for backward"):
            BACKWARD(*arguments, y, h, c, *less, wanted)
