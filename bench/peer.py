"""The peer: the Llama of llama_13m.toml in plain PyTorch over gloo, with DistributedDataParallel or with FSDP2. Run by torchrun.

Rank 0 prints one JSON object per step, {"step": n, "loss": x, "time": seconds since 1970 at the end of the step}. With --share it computes the
model's largest product after each step too, and at the end prints what share of that product's speed the steps reach, by CPU time.
"""

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, SEQUENCE, BATCH = 4096, 384, 1024, 6, 6, 256, 4


def rotary(length, width, theta=10000.0):
    angle = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, width, 2).float() / width))
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, eps=1e-5), nn.RMSNorm(HIDDEN, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        normed = self.norm1(x)
        q, k, v = (f(normed).view(batch, length, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        cos, sin = rotary(SEQUENCE, HIDDEN // HEADS)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def ddp(model, _precision):
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp(model, precision):
    """Each block and the rest are a unit; gathered in the type of the precision, reduced in fp32."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def flops():
    """Of a step: 6 for each weight of a product and token, 12 for each layer, number of the queries, token, and key that the token sees."""
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) + HIDDEN * VOCABULARY
    return (6 * weights + 12 * LAYERS * HIDDEN * SEQUENCE / 2) * BATCH * SEQUENCE


def cpu_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    arguments.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--limit-s", type=float, default=float("inf"), help="stop after these seconds and at least 4 steps")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--share", action="store_true", help="compare the steps' speed with that of the largest product")
    arguments = arguments.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = Llama()
    parallel = {"ddp": ddp, "fsdp": fsdp}[arguments.strategy](model, arguments.precision)
    if arguments.compile:
        parallel = torch.compile(parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    kind = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    x, weight = torch.randn(BATCH * SEQUENCE, HIDDEN, dtype=kind), torch.randn(VOCABULARY, HIDDEN, dtype=kind)
    step_s, product_s = [], []
    start = time.monotonic()
    for step in range(1, arguments.steps + 1):
        cpu = time.process_time()
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.precision == "bf16"):
            logits = parallel(tokens)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if dist.get_rank() == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "time": time.time()}), flush=True)
        if arguments.share:
            step_s.append(time.process_time() - cpu)
            product_s.append(cpu_seconds(lambda: [F.linear(x, weight) for _ in range(3)]) / 3)
        over = torch.tensor(float(time.monotonic() - start > arguments.limit_s))
        if step >= 4 and arguments.limit_s < float("inf"):
            dist.broadcast(over, 0)
            if over:
                break
    if arguments.share:
        speed = flops() / statistics.median(step_s)
        of = 2 * BATCH * SEQUENCE * HIDDEN * VOCABULARY / statistics.median(product_s)
        print(json.dumps({"gflops": speed / 1e9, "product_gflops": of / 1e9, "share": speed / of}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
