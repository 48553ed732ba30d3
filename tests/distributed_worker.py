"""What each of the two processes of test_distributed.py does; imported by them, with no pytest."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext

WORLD, STEPS, MORE_STEPS = 2, 3, 2
SECONDS = 60  # that a process waits for the other


class Model(nn.Module):
    """Two layers, both directions; the projection's three rows do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True, proj_size=3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (_, c_n) = self.lstm(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.size(1))
        return self.head(y) + c_n.sum(dim=(0, 2))[:, None, None]  # of each sequence


def make_model() -> Model:
    """The same for every caller, in float64."""
    torch.manual_seed(3)
    return Model().double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int | None = None,
) -> None:
    """Steps on batches numbered by ``steps``: a rank's half of each, or the whole for None."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
        target = torch.randn(4, 7, 4, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, 8, (4,), generator=generator)
        if rank is not None:
            x, target, lengths = (t.chunk(WORLD)[rank] for t in (x, target, lengths))
        optimizer.zero_grad()
        (model(x, lengths) - target).square().mean().backward()
        optimizer.step()


def sharded() -> nn.Module:
    """The model with each process holding its part of every parameter."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = lstm_ext.convert(make_model())
    fully_shard(model.lstm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def ddp(rank: int, folder: Path) -> dict[str, Tensor]:
    model = lstm_ext.convert(make_model())
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    train(model, make_optimizer(model), range(STEPS), rank)
    return model.module.state_dict()


def fsdp(rank: int, folder: Path) -> dict[str, Tensor]:
    model = sharded()
    assert isinstance(model.lstm, FSDPModule) and isinstance(model.lstm, lstm_ext.LSTM)
    train(model, make_optimizer(model), range(STEPS), rank)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < sum(p.numel() for p in model.parameters())
    return whole(model)


def fsdp_mixed_precision(rank: int, folder: Path) -> dict[str, Tensor]:
    """Parameters float32, bfloat16 compute: the bits of a module that is bfloat16."""
    torch.manual_seed(3)
    lstm = lstm_ext.LSTM(5, 6, 2, bidirectional=True)
    half = copy.deepcopy(lstm).bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(lstm, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    x = torch.randn(7, 4, 5)
    y, expected = lstm(x)[0], half(x.bfloat16())[0]
    y.sum().backward()
    expected.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lstm.parameters())
    grads = {f"grad of {n}": p.grad.full_tensor() for n, p in lstm.named_parameters()}
    halves = {f"expected of {n}": p.grad.float() for n, p in half.named_parameters()}
    return {"y": y.detach(), "expected": expected.detach(), **grads, **halves}


def checkpoint(rank: int, folder: Path) -> dict[str, Tensor]:
    """Trains, saves, and goes on in another model that was filled from the checkpoint."""
    model = sharded()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(STEPS), rank)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")

    other = sharded()
    other_optimizer = make_optimizer(other)
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train(other, other_optimizer, range(STEPS, STEPS + MORE_STEPS), rank)
    return whole(other)


TASKS = (ddp, fsdp, fsdp_mixed_precision, checkpoint)


def run(rank: int, folder: Path) -> None:
    """All tasks in turn; what each returns goes to ``<task>.<rank>.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        for task in TASKS:
            torch.save(task(rank, folder), folder / f"{task.__name__}.{rank}.pt")
        dist.barrier()  # nobody closes while the other still talks to it
    finally:
        dist.destroy_process_group()
