"""The one table of tolerances. Looser values elsewhere carry their measured reason."""

import device
import torch
from torch import Tensor

# Absolute and relative, as torch.testing.assert_close takes them. Measured over the suite: the
# largest error is below 2e-14 in float64 and 2e-6 in float32 relative to the tensor's largest
# element, for values and gradients alike.
_TABLE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


# One rounding to TF32, relative: 10 bits of fraction besides the leading one.
TF32_EPS = 2.0**-11


def tol(dtype: torch.dtype) -> dict[str, float]:
    """rtol and atol for a comparison in ``dtype``; half types are judged by assert_as_good."""
    return dict(_TABLE[dtype])


def across_ways(dtype: torch.dtype) -> dict[str, float]:
    """For gradients of one call that went two ways through the package, such as eager and compiled:
    the same bits. On a GPU one way leaves a first h of zeros out of W_hh's gradient, and cuBLASLt
    chooses the order of sums for each length of a product."""
    if device.DEVICE.type != "cuda":
        return {"rtol": 0, "atol": 0}
    near = 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
    return {"rtol": near, "atol": near}


def assert_as_good(
    ours: Tensor,
    peer: Tensor,
    truth: Tensor,
    name: str = "",
    eps: float | None = None,
    factor: float = 2,
) -> None:
    """Half types: our error against the truth is at most twice (factor) the peer's in the same
    dtype.

    One rounding of the largest element, ``eps`` times it (None: of the dtype), is allowed in any
    case: the peer may be exact by luck.
    """
    assert ours.dtype == peer.dtype and ours.shape == peer.shape == truth.shape, name
    if not truth.numel():
        return
    truth = truth.double()
    our_error = (ours.double() - truth).abs().max().item()
    peer_error = (peer.double() - truth).abs().max().item()
    eps = torch.finfo(ours.dtype).eps if eps is None else eps
    rounding = eps * truth.abs().max().item()
    assert our_error <= factor * peer_error + rounding, (
        f"{name}: error {our_error:.3g}, peer's {peer_error:.3g}, one rounding {rounding:.3g}"
    )
