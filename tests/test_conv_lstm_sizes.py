"""ConvLSTM where images are small, odd or not there at all: what torch's convolutions read beyond
an image, and gradients of nothing."""

import pytest
import torch
from device import here, leaf
from test_conv_lstm import CELLS, IN, SEQUENCES, C, L
from tolerances import tol

import lstm_ext
from lstm_ext import conv_layer

SMALL = {
    # oneDNN's convolution of one channel that lies channels last, strided, to a width of 1.
    "one channel": ((2, 1, 16, 3), {"stride": (1, 2)}, (5, 2)),
    "one channel, wide kernel": ((2, 1, 8, (3, 5)), {"stride": (1, 3)}, (9, 1)),
    # Its crashes where an output sees nothing but padding.
    "one wide": ((2, 2, 8, (4, 1)), {"stride": (2, 3), "padding": (0, 2), "dilation": 2}, (9, 1)),
    "much padding": (
        (2, 16, 16, (5, 2)),
        {"stride": 2, "padding": (1, 3), "dilation": (1, 2)},
        (6, 1),
    ),
    "a padded volume": (
        (3, 16, 16, (1, 3, 2)),
        {"stride": (1, 2, 2), "padding": (2, 1, 3), "dilation": 2},
        (3, 4, 1),
    ),
    "one pixel": ((2, 2, 2, 1), {"stride": 2, "padding": 1, "dilation": 2}, (5, 1)),
    "one pixel of a row": ((1, 2, 2, 1), {"stride": 2, "padding": 1, "dilation": 2}, (1,)),
    # Its gradients of bfloat16 weights larger than the image.
    "flat volumes": ((3, 4, 8, 3), {}, (2, 4, 4)),
    "small volumes": ((3, 3, 16, 5), {}, (4, 4, 4)),
    "volumes of one channel": ((3, 1, 4, 3), {}, (1, 8, 8)),
    "volumes of one hidden channel": ((3, 3, 1, 3), {}, (1, 8, 8)),
    # Its gradients of strided volumes, padded, with few pixels beside the kernel's.
    "a strided volume": ((3, 16, 8, 6), {"stride": 2, "padding": 3}, (4, 4, 4)),
    "a deep kernel": (
        (3, 16, 8, (4, 1, 1)),
        {"stride": (2, 1, 1), "padding": (3, 0, 0)},
        (2, 4, 4),
    ),
    "a volume as the kernel": (
        (3, 8, 1, (5, 3, 4)),
        {"stride": (3, 2, 1), "padding": (4, 1, 0)},
        (5, 3, 4),
    ),
    "a narrow image": ((2, 8, 8, 3), {"stride": 2}, (3, 1)),
    "a short row": ((1, 16, 8, 4), {"stride": 3, "padding": 1}, (2,)),
    "a row of one": ((1, 3, 8, 3), {"stride": 2, "padding": 1}, (1,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL)
def test_small_images(case, dtype):
    (dims, *sizes), options, size = SMALL[case]
    module = here(SEQUENCES[dims](*sizes, **options, dtype=dtype))
    truth = here(SEQUENCES[dims](*sizes, **options, dtype=torch.float64))
    truth.load_state_dict(module.state_dict())
    x = torch.randn(4, 4, sizes[0], *size).to(dtype)
    for _ in range(5):  # what lies beyond may be right by chance
        results = []
        for one, dtype_of in ((module, dtype), (truth, torch.float64)):
            inputs = [leaf(x.to(dtype_of)), *one.parameters()]
            y, _ = one(inputs[0])
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for got, want in zip(*results, strict=True):
            scale = want.abs().max().item()
            part = 1e-4 if dtype == torch.float32 else 2e-2  # at most 6e-3 measured
            torch.testing.assert_close(got.double(), want, rtol=0, atol=part * scale)


@pytest.mark.parametrize("case", SMALL)
def test_an_input_that_lies_channels_last(case):
    (dims, *sizes), options, size = SMALL[case]
    module = here(SEQUENCES[dims](*sizes, **options))
    x = here(torch.randn(4, 4, sizes[0], *size))
    order = (0, 1, *range(3, x.dim()), 2)
    last = torch.empty_permuted(x.shape, order, device=x.device).copy_(x)
    for _ in range(20):
        torch.testing.assert_close(module(last)[0], module(x)[0], **tol(torch.float32))


@pytest.mark.parametrize("dims", SEQUENCES)
def test_no_sequences_can_be_trained(dims):
    for cls, lead in ((SEQUENCES[dims], (L, 0)), (CELLS[dims], (0,))):
        module, x = here(cls(IN, C, 3, peephole=True)), leaf(torch.randn(*lead, IN, *[4] * dims))
        first, second = module(x)
        states = second if isinstance(second, tuple) else (second,)
        sum(t.sum() for t in (first, *states)).backward()
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.cpu_only(reason="rounding of a CPU's half types")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_recurrence_goes_on_with_what_the_user_sees(dtype, monkeypatch):
    """h is rounded to the dtype between the steps, where the convolutions are in float32 too."""
    monkeypatch.setattr(conv_layer, "_has_bf16_convolutions", lambda: False)
    module = lstm_ext.ConvLSTM1d(IN, C, 3, dtype=dtype)
    x = torch.randn(6, 2, IN, 7, dtype=dtype)
    w = {name: p.float() for name, p in module.named_parameters()}
    h = c = torch.zeros(2, C, 7)
    expected = []
    for step in x.float():
        a = torch.conv1d(step, w["weight_ih_l0"], padding=1)
        a = a + torch.conv1d(h, w["weight_hh_l0"], padding=1)
        a = a + (w["bias_ih_l0"] + w["bias_hh_l0"]).view(-1, 1)
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        expected.append((o.sigmoid() * c.tanh()).to(dtype))
        h = expected[-1].float()
    y = module(x)[0]
    assert (y == torch.stack(expected)).float().mean() > 0.99


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("dims", [1, 2])
def test_compiled_with_one_channel(dims, kernel):
    module = here(SEQUENCES[dims](IN, 1, kernel, 2))
    x = here(torch.randn(L, 2, IN, *[5] * dims))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], module(x)[0], **tol(torch.float32))


@pytest.mark.parametrize("dims", CELLS)
def test_a_cells_states_keep_no_more_memory_than_theirs(dims):
    cell = here(CELLS[dims](IN, C, 3))
    with torch.no_grad():
        for state in cell(here(torch.randn(2, IN, *[6] * dims))):
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.cpu_only(reason="CPU autocast, and lazily negated gradients")
def test_backward_inside_autocast_and_of_negated_gradients():
    module, x = lstm_ext.ConvLSTM1d(IN, C, 3), torch.randn(L, 2, IN, 6)
    inputs = [leaf(x), *module.parameters()]
    y, _ = module(inputs[0])
    v = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, v, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, inputs, v, retain_graph=True)
        create = torch.autograd.grad(y, inputs, v, retain_graph=True, create_graph=True)
    negated = torch.autograd.grad(y, inputs, torch._neg_view(-v))
    for others in (inside, create, negated):
        for one, other in zip(others, expected, strict=True):
            torch.testing.assert_close(one, other)
