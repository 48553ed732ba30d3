"""ConvLSTM1d, 2d, 3d and their cells, beside Keras and a loop over torch's convolutions."""

import os

import pytest
import torch
import torch.nn.functional as F
from device import here, leaf
from tolerances import assert_as_good, tol
from torch import nn

import lstm_ext
from lstm_ext.convolutions import Window

F64 = {"dtype": torch.float64}
SEQUENCES = {1: lstm_ext.ConvLSTM1d, 2: lstm_ext.ConvLSTM2d, 3: lstm_ext.ConvLSTM3d}
CELLS = {1: lstm_ext.ConvLSTM1dCell, 2: lstm_ext.ConvLSTM2dCell, 3: lstm_ext.ConvLSTM3dCell}
SIZES = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
MERGES = {
    "concat": lambda a, b: torch.cat([a, b], 2),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
    None: lambda a, b: (a, b),
}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
L, N, IN, C = 4, 3, 2, 5


def _close(got, expected):
    torch.testing.assert_close(got, expected, **tol(expected.dtype))


def _near(got, expected):
    """As near as roundings to bfloat16 leave sums that are added in another order: 0.8 % of the
    largest at most, measured here and in the emulator."""
    if expected.dtype != torch.bfloat16:
        return _close(got, expected)
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * scale)


def _loop(module, x, hx=None, lengths=None, reset_mask=None):
    """output and states of every layer, step by step; x (L, N, in, *size). torch's own "same".

    What is written here is the formula of the paper, so that nothing of the package checks itself.
    """
    dims, N, C = len(module.kernel_size), x.size(1), module.hidden_channels
    conv, ends = CONVOLUTIONS[dims], ("", "_reverse") if module.bidirectional else ("",)
    states, both, parameters = [[], []], [], dict(module.named_parameters())
    for index, suffix in enumerate(f"_l{k}{end}" for k in range(module.num_layers) for end in ends):
        weight = {
            name.removesuffix(suffix): p for name, p in parameters.items() if name.endswith(suffix)
        }
        how = {"padding": "same", "dilation": module.dilation}
        if "_l0" in suffix:
            how |= {"padding": module.padding, "stride": module.stride}
        gx = [conv(step, weight["weight_ih"], weight.get("bias_ih"), **how) for step in x]
        h, c = (s[index] for s in hx) if hx else [gx[0].new_zeros(N, C, *gx[0].shape[2:])] * 2
        outputs, steps = [None] * len(gx), range(len(gx))
        for t in reversed(steps) if "_reverse" in suffix else steps:
            on = torch.full((N,), True, device=x.device) if lengths is None else t < lengths
            on = on.view(N, *[1] * (dims + 1))
            if reset_mask is not None:
                reset = on & reset_mask[t].view(on.shape)
                h, c = torch.where(reset, 0, h), torch.where(reset, 0, c)
            a = gx[t] + conv(h, weight["weight_hh"], weight.get("bias_hh"), padding="same")
            i, f, g, o = a.chunk(4, 1)
            peep = weight.get("weight_ch", a.new_zeros(3 * C)).view(3, C, *[1] * dims)
            i, f, g = (i + peep[0] * c).sigmoid(), (f + peep[1] * c).sigmoid(), g.tanh()
            c_new = f * c + i * g
            h_new = (o + peep[2] * c_new).sigmoid() * c_new.tanh()
            h, c = torch.where(on, h_new, h), torch.where(on, c_new, c)
            outputs[t] = torch.where(on, h_new, 0)
        states[0].append(h)
        states[1].append(c)
        both.append(torch.stack(outputs))
        if len(both) == len(ends):
            x, both = MERGES[module.merge_mode](*both) if both[1:] else both[0], []
    return x, (torch.stack(states[0]), torch.stack(states[1]))


def _same_with_gradients(module, run, expected, inputs):
    """Values of two functions of the inputs and gradients of those and of the parameters."""
    leaves = [*inputs, *module.parameters()]
    results = []
    for function in (run, expected):
        y, (h, c) = function(*inputs)
        torch.manual_seed(1)
        loss = sum((part * torch.randn(part.shape, **F64)).sum() for part in (y, h, c))
        results.append([y, h, c, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        _close(got, want)


# --- values and gradients -----------------------------------------------------------------------

CASES = {
    "plain": {},
    "layers": {"num_layers": 3},
    "peephole": {"peephole": True, "num_layers": 2},
    "no_bias": {"bias": False},
    "strided": {"stride": 2, "padding": 1, "num_layers": 2},
    "valid": {"padding": "valid"},
    "dilated": {"dilation": 2, "num_layers": 2},
    "even_kernel": {"kernel_size": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", SEQUENCES)
def test_matches_a_loop_over_convolutions(dims, case):
    options = {"kernel_size": 3, **CASES[case]}
    module = here(SEQUENCES[dims](IN, C, **options, **F64))
    x = leaf(torch.randn(L, N, IN, *SIZES[dims], **F64))
    size = module(x)[0].shape[3:]
    hx = [leaf(torch.randn(module.num_layers, N, C, *size, **F64)) for _ in range(2)]
    _same_with_gradients(
        module,
        lambda x, h, c: module(x, (h, c)),
        lambda x, h, c: _loop(module, x, (h, c)),
        [x, *hx],
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("peephole", [False, True])
def test_lengths(batch_first, peephole):
    module = SEQUENCES[2](IN, C, 3, 2, peephole=peephole, batch_first=batch_first, **F64)
    module = here(module)
    lengths = torch.tensor([2, 0, L])
    x = torch.randn(L, N, IN, *SIZES[2], **F64)
    for n, length in enumerate(lengths):
        x[length:, n] = float("nan")
    x = leaf(x)
    hx = [leaf(torch.randn(2, N, C, *SIZES[2], **F64)) for _ in range(2)]

    def run(x, h, c):
        y, states = module(x.transpose(0, 1) if batch_first else x, (h, c), lengths=lengths)
        return y.transpose(0, 1) if batch_first else y, states

    def expected(x, h, c):
        return _loop(module, x.nan_to_num(), (h, c), here(lengths))

    _same_with_gradients(module, run, expected, [x, *hx])
    y, (h, c) = run(x, *hx)
    assert not y[2:, 0].any() and not y[:, 1].any()
    _close(h[:, 1], hx[0][:, 1])
    _close(c[:, 1], hx[1][:, 1])


def test_one_pixel_is_an_lstm():
    ours, peer = SEQUENCES[1](7, 6, 1, 2, **F64), nn.LSTM(7, 6, 2, **F64)
    state = {k: v.unsqueeze(2) if v.dim() == 2 else v for k, v in peer.state_dict().items()}
    ours.load_state_dict(state)
    ours, peer = here(ours), here(peer)
    x = here(torch.randn(5, 3, 7, **F64))
    y, (h, c) = ours(x.unsqueeze(3))
    for got, want in zip((y, h, c), (peer(x)[0], *peer(x)[1]), strict=True):
        _close(got.squeeze(3), want)


@pytest.mark.cpu_only(reason="Keras chooses its own device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": "same"},
        {"strides": 2},
        {"strides": 3, "padding": "same"},
        {"dilation_rate": 2, "padding": "same"},
        {"use_bias": False, "padding": "same", "kernel_size": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "valid",
)
@pytest.mark.parametrize("dims", SEQUENCES)
def test_matches_keras(dims, options):
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras", reason="compares with Keras")
    assert keras.backend.backend() == "torch"
    options = {"kernel_size": 3, "padding": "valid", "strides": 1, **options}
    layer = getattr(keras.layers, f"ConvLSTM{dims}D")(
        filters=C,
        return_sequences=True,
        return_state=True,
        data_format="channels_last",
        recurrent_activation="sigmoid",
        bias_initializer="random_normal",
        dtype="float32",
        **options,
    )
    x = torch.randn(N, L, IN, *SIZES[dims])
    theirs = x.movedim(2, -1).contiguous().requires_grad_()
    y, h, c = layer(theirs)
    module = SEQUENCES[dims](
        IN,
        C,
        options["kernel_size"],
        stride=options["strides"],
        padding=options["padding"],
        dilation=options.get("dilation_rate", 1),
        bias=options.get("use_bias", True),
        batch_first=True,
    )
    weights = [w.value.detach() for w in layer.weights]
    with torch.no_grad():
        for parameter, kernel in zip(
            (module.weight_ih_l0, module.weight_hh_l0), weights[:2], strict=True
        ):
            parameter.copy_(kernel.movedim((-1, -2), (0, 1)))
        if module.bias:
            module.bias_ih_l0.copy_(weights[2])
            module.bias_hh_l0.zero_()
    ours = x.requires_grad_()
    our_y, (our_h, our_c) = module(ours)
    _close(our_y.movedim(2, -1), y)
    _close(our_h[0].movedim(1, -1), h)
    _close(our_c[0].movedim(1, -1), c)
    cotangent = torch.randn(y.shape)
    kernels = [w.value for w in layer.weights]
    expected = torch.autograd.grad((y * cotangent).sum(), [theirs, *kernels])
    parameters = [p for n, p in module.named_parameters() if n != "bias_hh_l0"]
    got = torch.autograd.grad((our_y * cotangent.movedim(-1, 2)).sum(), [ours, *parameters])
    _close(got[0].movedim(2, -1), expected[0])
    for gradient, want in zip(got[1:], expected[1:], strict=True):
        flat = gradient.dim() == 1
        scale = want.abs().max().item()  # sums over all pixels and steps
        torch.testing.assert_close(
            gradient if flat else gradient.movedim((0, 1), (-1, -2)),
            want,
            rtol=1e-5,
            atol=1e-5 * max(scale, 1),
        )


@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 3])], ids=["whole", "lengths"])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_gradcheck_and_gradgradcheck(peephole, lengths):
    module = here(SEQUENCES[1](2, 2, 3, 2, stride=2, padding=1, peephole=peephole, **F64))
    names = [name for name, _ in module.named_parameters()]

    def run(x, h, c, *parameters):
        replaced = dict(zip(names, parameters, strict=True))
        call = (module, replaced, (x, (h, c)), {"lengths": lengths})
        y, states = torch.func.functional_call(*call)
        return y, *states

    inputs = [leaf(torch.randn(3, 2, 2, 4, **F64))]
    inputs += [leaf(torch.randn(2, 2, 2, 2, **F64)) for _ in range(2)]
    inputs += [leaf(p) for p in module.parameters()]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(isa, dtype):
    torch.set_num_threads(2)
    truth = SEQUENCES[2](IN, 16, 3, 2)
    module = SEQUENCES[2](IN, 16, 3, 2, dtype=dtype)
    module.load_state_dict(truth.state_dict())
    truth.double().load_state_dict(module.state_dict())
    module, truth = here(module), here(truth)
    x = here(torch.randn(8, 2, IN, 9, 6)).to(dtype)
    y, (h, c) = module(x)
    assert y.dtype == h.dtype == c.dtype == dtype
    expected, (h_n, c_n) = truth(x.double())
    if dtype == torch.float32:
        for got, want in ((y, expected), (h, h_n), (c, c_n)):
            _close(got, want.float())
        return
    # The peer: torch's own operations in the same dtype, step by step.
    peer, (peer_h, peer_c) = _loop(module, x)
    for got, theirs, want in ((y, peer, expected), (h, peer_h, h_n), (c, peer_c, c_n)):
        assert_as_good(got, theirs, want)


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_stream_in_parts_is_the_whole(batch_first):
    module = here(
        SEQUENCES[2](IN, C, 3, 2, stride=2, batch_first=batch_first, peephole=True, **F64)
    )
    x = here(torch.randn(6, 6, IN, 5, 4, **F64))
    whole, states = module(x)
    time = 1 if batch_first else 0
    hx, parts = None, []
    for part in x.split([1, 3, 2], dim=time):
        y, hx = module(part, hx)
        parts.append(y)
    _close(torch.cat(parts, time), whole)
    for got, want in zip(hx, states, strict=True):
        assert got.shape == (2, 6, C, 3, 2)
        _close(got, want)


@pytest.mark.parametrize("dims", CELLS)
def test_cell_is_a_step(dims):
    cell = here(CELLS[dims](IN, C, 3, stride=2, peephole=True, **F64))
    module = here(SEQUENCES[dims](IN, C, 3, stride=2, peephole=True, **F64))
    module.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x = here(torch.randn(L, N, IN, *SIZES[dims], **F64))
    y, (h_n, c_n) = module(x)
    state = None
    for t in range(L):
        state = cell(x[t], state)
        _close(state[0], y[t])
    _close(state[0], h_n[0])
    _close(state[1], c_n[0])
    h, c = cell(x[0, 0], (h_n[0, 0], c_n[0, 0]))
    batched = cell(x[0], (h_n[0], c_n[0]))
    _close(h, batched[0][0])
    _close(c, batched[1][0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first):
    module = here(SEQUENCES[2](IN, C, 3, 2, batch_first=batch_first, **F64))
    x = here(torch.randn(L, IN, *SIZES[2], **F64))
    hx = [here(torch.randn(2, C, *SIZES[2], **F64)) for _ in range(2)]
    y, states = module(x, hx, lengths=torch.tensor(3))
    time = 1 if batch_first else 0
    batched = [s.unsqueeze(1) for s in hx]
    expected = module(x.unsqueeze(1 - time), batched, lengths=torch.tensor([3]))
    _close(y, expected[0].squeeze(1 - time))
    for got, want in zip(states, expected[1], strict=True):
        _close(got, want.squeeze(1))


def test_no_steps_and_no_sequences():
    module = here(SEQUENCES[2](IN, C, 3, 2, **F64))
    hx = [here(torch.randn(2, N, C, 4, 4, **F64)) for _ in range(2)]
    y, (h, c) = module(here(torch.randn(0, N, IN, 4, 4, **F64)), hx)
    assert y.shape == (0, N, C, 4, 4)
    assert torch.equal(h, hx[0]) and torch.equal(c, hx[1])
    y, (h, c) = module(here(torch.randn(L, 0, IN, 4, 4, **F64)))
    assert y.shape == (L, 0, C, 4, 4) and h.shape == c.shape == (2, 0, C, 4, 4)


@pytest.mark.parametrize("channels, kernel", [(8, 3), (1, 3), (8, 1)])
@pytest.mark.parametrize("dims", [1, 2])
def test_gates_lie_channels_last(dims, channels, kernel):
    """Of the step's convolution, no element is moved: the cell reads its memory as it is."""
    ones = (1,) * dims
    x = torch.randn(4, channels, *[16] * dims)  # of the user: channels first
    window = Window((kernel,) * dims, ones, "same", ones)
    w = torch.randn(32, channels, *[kernel] * dims)
    y = window.convolution(w, x.shape[2:])(x)
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.cpu_only(reason="cuDNN's convolutions may add in any order")
@pytest.mark.parametrize("dims", SEQUENCES)
def test_same_bits_at_every_run(dims):
    torch.set_num_threads(2)
    module = here(SEQUENCES[dims](IN, 8, 3, 2, peephole=True))
    x = here(torch.randn(L, N, IN, *SIZES[dims])).requires_grad_()
    runs = []
    for _ in range(3):
        y, (h, c) = module(x)
        gradients = torch.autograd.grad((y.sum() + c.sum()), [x, *module.parameters()])
        runs.append([y, h, c, *gradients])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
