"""A few hundred drawn configurations against torch.nn.LSTM."""

import random

import pytest
import torch
from cases import HALF, Case, compare

DRAWS = 300
pytestmark = pytest.mark.tf32


def draw(seed: int) -> tuple[Case, int]:
    r = random.Random(seed)
    H = r.choice([1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 48, 64, 65, 100])
    T, B, layers = r.randint(1, 12), r.choice([1, 1, 2, 3, 6, 7, 13, 49]), r.choice([1, 1, 2, 3])
    bias, bidirectional = r.random() < 0.7, r.random() < 0.4
    proj = r.randint(1, H - 1) if H > 1 and r.random() < 0.25 else 0
    dtype = r.choice([torch.float64, torch.float32, torch.float32, *HALF])
    names = ["x", "h0", "c0"]
    for layer in range(layers):
        for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
            kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias
            kinds += ["weight_hr"] * (proj > 0)
            names += [f"{kind}_l{layer}{suffix}" for kind in kinds]
    grads = None if r.random() < 0.3 else r.sample(names, r.randint(0, len(names)))
    lengths = [r.randint(1, T) for _ in range(B)] if r.random() < 0.3 else None
    case = Case(
        T=T,
        B=B,
        I=r.randint(1, 20),
        H=H,
        layers=layers,
        bias=bias,
        bidirectional=bidirectional,
        proj=proj,
        batch_first=r.random() < 0.5,
        dtype=dtype,
        hx=r.random() < 0.6,
        lengths=lengths,
        memory="contiguous" if lengths else r.choice(["contiguous", "strided", "expanded"]),
        grads=grads,
        training=r.random() < 0.5,
        used=r.choice([("y",), ("y", "h_n", "c_n"), ("h_n",), ("c_n",)]),
        seed=seed,
    )
    return case, r.choice([1, 2])


@pytest.mark.parametrize("seed", range(DRAWS))
def test_drawn(seed):
    case, threads = draw(seed)
    torch.set_num_threads(threads)
    compare(case)
