"""What a block costs each rank in memory that lasts, by strategy and number of ranks, beside what its numbers take.

Two models that differ in blocks alone are trained; the difference of their ranks' PSS is what the blocks between them cost: weights, gradients and
moments. Rooms and the program itself are the same in both, and activations are small by short sequences.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from run import HERE, ROOT, Failed, run

SHALLOW, DEEP = 6, 18
HIDDEN, INNER = 384, 1024
NUMBERS = (DEEP - SHALLOW) * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)


def held(arguments, work, strategy, ranks, layers):
    """PSS of a rank in MiB, most of the time: a checkpoint takes a copy for a moment."""
    settings = {
        "strategy": strategy, "max_steps": 150, "batch_size": 1, "max_seq_len": 16, "activation_checkpointing": "blocks", "output_dir": work, "run_name": f"{strategy}-{ranks}-{layers}",
        "model.num_hidden_layers": layers,
    }
    command = [str(arguments.bin / "fleet"), "launch", "-n", str(ranks), str(HERE / "llama_13m.toml"), "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return run(command, ranks, "fleet-rank")[2].of(statistics.median, "pss")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", type=Path, default=ROOT / "target/debug", help="folder of fleet's programs")
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    arguments = options.parse_args()
    arguments.bin = arguments.bin.resolve()
    print(f"| strategy | ranks | MiB per rank for {DEEP - SHALLOW} blocks | their numbers, cut as the strategy cuts them | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as work:
        for strategy in ("ddp", "fsdp"):
            for ranks in arguments.ranks:
                measured = held(arguments, work, strategy, ranks, DEEP) - held(arguments, work, strategy, ranks, SHALLOW)
                # weights and both moments, and gradients: of ddp whole in each rank
                bytes_each = 12 / ranks + (4 if strategy == "ddp" else 4 / ranks)
                wanted = NUMBERS * bytes_each / 2**20
                print(f"| {strategy} | {ranks} | {measured:.1f} | {wanted:.1f} | {measured / wanted:.3f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as why:
        sys.exit(f"error: {why}")
