"""Few rows in few steps, for which the CPU's kernels read weights as they lie, whatever the length
of their rows."""

import pytest
import torch
from tolerances import assert_as_good, tol

import lstm_ext
from lstm_ext import native

pytestmark = pytest.mark.cpu_only(reason="the CPU kernels' own way")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 17, 50, 96, 100, 200, 257, 300])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_width(steps, width, dtype, isa):
    """Nothing beside a tensor is read: NaN lie around all."""
    if dtype == torch.bfloat16 and not native._C.cpu_bf16_products():
        pytest.skip("these kernels do not multiply bf16")

    def within(tensor):
        around = torch.full((tensor.numel() + 64,), torch.nan, dtype=dtype)
        around[32:-32] = tensor.flatten()
        return around[32:-32].view(tensor.shape)

    module = lstm_ext.LSTM(width, width, dtype=dtype)
    for parameter in module.parameters():
        parameter.data = within(parameter.data)
    peer, exact = torch.nn.LSTM(width, width, dtype=dtype), torch.nn.LSTM(width, width).double()
    for other in (peer, exact):
        other.load_state_dict(module.state_dict())
    for batch in (1, 2, 3, 5, 9):
        x = within(torch.randn(steps, batch, width, dtype=dtype))
        hx = tuple(within(torch.randn(1, batch, width, dtype=dtype)) for _ in range(2))
        with torch.no_grad():
            y, states = module(x, hx)
            theirs, their_states = peer(x, hx)
            expected, last = exact(x.double(), tuple(t.double() for t in hx))
        results = zip((y, *states), (theirs, *their_states), (expected, *last), strict=True)
        for ours, others, truth in results:
            if dtype == torch.bfloat16:
                assert_as_good(ours, others, truth)
            else:
                torch.testing.assert_close(ours.double(), truth, **tol(dtype))


@pytest.mark.parametrize("width", [50, 96, 300])
def test_a_sequence_in_parts(width, isa):
    """Under deterministic algorithms, of the bits of the whole: no part is of few rows then."""
    module, x = lstm_ext.LSTM(width, width), torch.randn(7, 3, width)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            whole, _ = module(x)
            state, parts = None, []
            for part in x.split([1, 2, 4]):
                y, state = module(part, state)
                parts.append(y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.cat(parts), whole)
