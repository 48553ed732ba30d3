"""A configuration of an LSTM, run by any implementation, compared tensor by tensor."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import device
import torch
from device import here
from tolerances import TF32_EPS, assert_as_good, tol
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Case:
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 7
    layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj: int = 0
    batch_first: bool = False
    dtype: torch.dtype = torch.float64
    hx: bool = True
    lengths: list[int] | None = None  # given to both as a PackedSequence
    memory: str = "contiguous"  # of the input: contiguous, strided, expanded
    grads: list[str] | None = None  # names that require grad; None: all
    training: bool = True
    used: tuple[str, ...] = ("y", "h_n", "c_n")  # outputs that the loss sees
    seed: int = 0

    def module(self) -> nn.LSTM:
        torch.manual_seed(self.seed)
        module = nn.LSTM(
            self.I,
            self.H,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            proj_size=self.proj,
            dtype=torch.float64,
        )
        return here(module.to(self.dtype)).train(self.training)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(*size: int) -> Tensor:
            # Moved before it is cut into views: a copy to a device makes strides its own.
            value = torch.randn(*size, generator=generator, dtype=torch.float64)
            return here(value.to(self.dtype))

        shape = (self.B, self.T, self.I) if self.batch_first else (self.T, self.B, self.I)
        if self.memory == "strided":
            x = draw(*(2 * n for n in shape))[::2, 1::2, ::2]
        elif self.memory == "expanded":
            x = draw(shape[0], 1, shape[2]).expand(shape)
        else:
            x = draw(*shape)
        inputs = {"x": x}
        if self.hx:
            count = self.layers * (2 if self.bidirectional else 1)
            inputs["h0"] = draw(count, self.B, self.proj or self.H)
            inputs["c0"] = draw(count, self.B, self.H)
        return inputs

    def run(self, module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients by name; the cotangents are the same for every implementation.

        dtype: what to run in, module and inputs converted; None: the case's own.
        """
        module = copy.deepcopy(module)
        inputs = self.inputs()
        if dtype is not None:
            module, inputs = module.to(dtype), {k: v.to(dtype) for k, v in inputs.items()}
        module.flatten_parameters()  # a copy of an nn.LSTM has lost cuDNN's buffer
        if isinstance(module, nn.LSTM) and device.DEVICE.type == "cuda":
            module.train()  # cuDNN has no backward in eval mode; without dropout it is the same
        leaves = {**inputs, **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(self.grads is None or name in self.grads)
        x: Tensor | PackedSequence = inputs["x"]
        if self.lengths is not None:
            x = pack_padded_sequence(
                inputs["x"],
                torch.tensor(self.lengths),
                batch_first=self.batch_first,
                enforce_sorted=False,
            )
        hx = (inputs["h0"], inputs["c0"]) if self.hx else None
        y, (h_n, c_n) = module(x, hx)
        results = {"y": y.data if isinstance(y, PackedSequence) else y, "h_n": h_n, "c_n": c_n}
        generator = torch.Generator().manual_seed(self.seed + 2)
        loss = here(torch.zeros((), dtype=torch.float64))
        for name in ("y", "h_n", "c_n"):
            value = results[name]
            cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name in self.used:
                cotangent = here(cotangent.to(self.dtype).to(value.dtype))
                loss = loss + (value * cotangent).sum().double()
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if wanted and loss.requires_grad:
            # A weight that the loss does not depend on has no gradient or a zero one, depending on
            # where an implementation cuts its graph; both are right, and both become zero here.
            grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
            results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return {name: value.detach() for name, value in results.items()}


def compare(case: Case) -> None:
    """lstm_ext.LSTM against nn.LSTM: values, final states and every gradient."""
    peer = case.module()
    ours = case.run(lstm_ext.LSTM.from_torch(peer))
    theirs = case.run(peer)
    assert ours.keys() == theirs.keys()
    as_tf32 = case.dtype == torch.float32 and device.tf32()
    if case.dtype in HALF or as_tf32:
        truth = case.run(peer, torch.float64)
        eps = TF32_EPS if as_tf32 else None
        for name in theirs:
            assert_as_good(ours[name], theirs[name], truth[name], name, eps)
    else:
        for name in theirs:
            scale = max(1.0, theirs[name].abs().max().item()) if theirs[name].numel() else 1.0
            limits = tol(case.dtype)
            torch.testing.assert_close(
                ours[name],
                theirs[name],
                rtol=limits["rtol"],
                atol=limits["atol"] * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
