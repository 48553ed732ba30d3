"""Trains the character model of char_lm.py in several processes, each on its share of the text.

    torchrun --standalone --nproc-per-node=2 examples/distributed.py           # whole copies
    torchrun --standalone --nproc-per-node=2 examples/distributed.py --shard   # parts (FSDP2)

Afterwards the first process trains the same model alone, with nn.LSTM, on whole batches: the
losses must agree. Exit status: 0 if they do, 1 if not, 2 for a bad argument. Uses the GPUs, one a
process, where each has one that lstm_ext has kernels for; else the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from char_lm import CharModel, lanes, loss_of, read_library, runs_natively
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lstm_ext

LIMIT = 1e-4  # nats; sums in another order part the losses by about 1e-6 in 30 steps


def train(model: nn.Module, text: Tensor, steps: int, length: int) -> list[Tensor]:
    """The loss of every step, of the lanes of text that are given."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    state = None
    for number in range(steps):
        start = number * length % (len(text) - length)
        batch = text[start : start + length + 1]
        logits, state = model(batch[:-1], state)
        state = tuple(s.detach() for s in state)
        loss = loss_of(logits, batch[1:])
        optimizer.zero_grad()
        loss.backward()  # the gradients become the mean over the processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Data-parallel training; start it with torchrun.")
    parser.add_argument("--shard", action="store_true", help="fully_shard, not whole copies (DDP)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="stretches of text, of all processes")
    parser.add_argument("--length", type=int, default=48, help="characters a step")
    parser.add_argument("--hidden", type=int, default=128)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: see the first lines of the file")
    for name in ("steps", "batch", "length", "hidden"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.batch % int(os.environ["WORLD_SIZE"]):
        parser.error(
            f"--batch {args.batch} does not divide by {os.environ['WORLD_SIZE']} processes"
        )
    return args


def main() -> int:
    args = parse()
    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if enough and runs_natively("cuda"):
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # it rounds by more than the limit
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = dist.get_rank() == 0

    text = lanes(read_library()[0], args.batch).to(device)
    torch.manual_seed(0)
    alone = CharModel(nn.LSTM, args.hidden, layers=2).to(device)
    model = CharModel(lstm_ext.LSTM, args.hidden, layers=2).to(device)
    model.load_state_dict(alone.state_dict())
    if args.shard:
        mesh = init_device_mesh(device.type, (world,))
        for part in (model.lstm, model):
            fully_shard(part, mesh=mesh)
    else:
        model = DistributedDataParallel(model)

    share = text.chunk(world, dim=1)[dist.get_rank()]
    losses = torch.stack(train(model, share, args.steps, args.length))
    dist.all_reduce(losses)
    losses /= world  # equal shares: the mean of the whole batch
    gap = torch.zeros((), device=device)
    if first:
        expected = torch.stack(train(alone, text, args.steps, args.length))
        gap = (losses - expected).abs().max()
        for step in sorted({1, (args.steps + 1) // 2, args.steps}):
            pair = f"{world} processes {losses[step - 1]:.5f}, one {expected[step - 1]:.5f}"
            print(f"step {step:>4}: loss of {pair}")
        agree = bool(gap <= LIMIT)  # a NaN does not
        words = "agree" if agree else "DO NOT AGREE"
        print(f"the losses {words}: largest difference {gap:.1e}, limit {LIMIT:g}")
    dist.broadcast(gap, 0)
    # Before the group: as its last owner DistributedDataParallel would wait for gloo's threads
    # while it holds the interpreter's lock, which one of them may wait for (PyTorch 2.13.0).
    del model
    dist.barrier()  # nobody closes its connections while another still uses them
    dist.destroy_process_group()
    return 0 if gap <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
