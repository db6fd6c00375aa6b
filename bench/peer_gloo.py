"""Times gloo's collectives as worker/collectives/examples/collectives.rs times fleet's: one JSON object per line on rank 0.

Run by torchrun. Bytes are those of the whole buffer: the input of all_reduce and reduce_scatter, the output of all_gather.
"""

import json
import statistics
import time

import torch
import torch.distributed as dist

SIZES = [(4, 2000), (4 << 10, 2000), (64 << 10, 1000), (4 << 20, 100), (64 << 20, 15)]


def measure(name, size, calls, call):
    for _ in range(-(-calls // 10)):
        call()
    dist.barrier()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    dist.barrier()
    if dist.get_rank() == 0:
        median = statistics.median(times)
        print(json.dumps({"library": "gloo", "operation": name, "memory": "copies", "ranks": dist.get_world_size(), "bytes": size,
                          "median_us": round(median, 2), "best_us": round(min(times), 2), "gb_per_s": round(size / median / 1e3, 2)}), flush=True)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    for size, calls in SIZES:
        share = max(size // 4 // world, 1)
        data = torch.zeros(max(size // 4, 1))
        whole, one = torch.zeros(share * world), torch.zeros(share)
        measure("all_reduce", size, calls, lambda: dist.all_reduce(data))
        measure("reduce_scatter", size, calls, lambda: dist.reduce_scatter_tensor(one, whole))
        measure("all_gather", size, calls, lambda: dist.all_gather_into_tensor(whole, one))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
