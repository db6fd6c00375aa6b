"""The peer of checkpoints.py: torch.distributed.checkpoint on the state of a Llama and AdamW, sharded by FSDP2 over gloo. Run by torchrun.

Rank 0 prints one JSON object for each save and load, {"what": "save" | "async_save" | "load", "s": seconds}. Of async_save the time until it
returns is printed: for so long training stands still.
"""

import argparse
import json
import shutil
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard


class Block(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.o(self.q(y) + self.k(y) + self.v(y))
        y = self.norm2(x)
        return x + self.down(self.gate(y) * self.up(y))


class Llama(nn.Module):
    """With the tensors of one; what is computed of them does not matter here."""

    def __init__(self, vocabulary, hidden, inner, layers):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, inner) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embedding(ids))))


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", type=int, nargs=4, metavar=("VOCABULARY", "HIDDEN", "INNER", "LAYERS"), required=True)
    options.add_argument("--dir", required=True)
    options.add_argument("--saves", type=int, default=2)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    # async_save exchanges its plans on a thread of its own.
    dist.init_process_group("cpu:gloo")
    torch.manual_seed(0)
    model = Llama(*arguments.shape)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.arange(16)[None]).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

    def state():
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    def timed(what, call):
        dist.barrier()
        began = time.monotonic()
        result = call()
        dist.barrier()
        if dist.get_rank() == 0:
            print(json.dumps({"what": what, "s": time.monotonic() - began}), flush=True)
        return result

    def clear():
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(arguments.dir, ignore_errors=True)
        dist.barrier()

    for _ in range(arguments.saves):
        clear()
        timed("async_save", lambda: dcp.async_save(state(), checkpoint_id=arguments.dir)).result()
    for _ in range(arguments.saves):
        clear()
        timed("save", lambda: dcp.save(state(), checkpoint_id=arguments.dir))

    def load():
        wanted = state()
        dcp.load(wanted, checkpoint_id=arguments.dir)
        set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"])

    for _ in range(arguments.saves):
        timed("load", load)
    clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
