"""Holds what `fleet plan` says of six jobs against what is measured when they run. Only the standard library is used.

Memory is the sum of the ranks' proportional sets at their highest, with a checkpoint in the middle of the run; speed the median of steps.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import run

JOB = run.HERE / "llama_13m.toml"
WIDE = {"model.hidden_size": 768, "model.intermediate_size": 2048, "model.num_hidden_layers": 4, "model.num_attention_heads": 12}
DEEP = {"model.hidden_size": 256, "model.intermediate_size": 768, "model.num_hidden_layers": 16, "model.num_attention_heads": 8}
JOBS = [
    ("13 M", 1, {}),
    ("13 M", 2, {"precision": "bf16-mixed"}),
    ("13 M, 2 micro-batches", 2, {"strategy": "fsdp", "accumulate_grad_batches": 2}),
    ("wide", 2, {**WIDE, "batch_size": 2}),
    ("wide", 2, {**WIDE, "batch_size": 2, "strategy": "fsdp", "precision": "bf16-mixed"}),
    ("deep, blocks computed again", 2, {**DEEP, "model.model_type": "qwen3", "batch_size": 8, "activation_checkpointing": "blocks"}),
]
UNSTEADY_STEPS = 3


def words(settings):
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def plan(arguments, ranks, settings):
    command = [arguments.bin / "fleet", "plan", JOB, "-n", str(ranks), "--json", *words(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.ROOT, check=False)
    if done.returncode != 0:
        raise run.Failed(f"fleet plan ended with {done.returncode}: {done.stderr}")
    choice = next(choice for choice in json.loads(done.stdout)["choices"] if choice["is_job"])
    return ranks * choice["peak_mib"], choice["tokens_per_s"]


def measure(arguments, work, ranks, settings):
    more = {
        "output_dir": work / "output",
        "run_name": f"plan-{time.time_ns()}",
        "max_steps": arguments.steps,
        "save_steps": arguments.steps // 2,
    }
    command = [str(arguments.bin / "fleet"), "launch", "-n", str(ranks), str(JOB), "--json", *words({**settings, **more})]
    _, lines, memory = run.run(command, ranks, "fleet-rank")
    shutil.rmtree(work / "output" / "checkpoints", ignore_errors=True)
    ends = [line["time"] / 1000 for line in lines if line.get("event") == "step"]
    gaps = [b - a for a, b in zip(ends, ends[1:])][UNSTEADY_STEPS:]
    sequences = ranks * settings.get("batch_size", run.BATCH) * settings.get("accumulate_grad_batches", 1)
    return ranks * memory.of(max, "pss"), sequences * run.SEQUENCE / statistics.median(gaps)


def compare(arguments, work):
    rows = ["| model | ranks | strategy | precision | MiB planned | measured | planned / measured | tokens/s planned | measured | planned / measured |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for name, ranks, settings in JOBS:
        turns = [(plan(arguments, ranks, settings), measure(arguments, work, ranks, settings)) for _ in range(arguments.runs)]
        planned, measured = ([statistics.median(numbers) for numbers in zip(*side)] for side in zip(*turns))
        how = settings.get("strategy", "ddp" if ranks > 1 else "-"), settings.get("precision", "32")
        rows.append(f"| {name} | {ranks} | {' | '.join(how)} | {planned[0]:.0f} | {measured[0]:.0f} | **{planned[0] / measured[0]:.2f}** "
                    f"| {planned[1]:.0f} | {measured[1]:.0f} | **{planned[1] / measured[1]:.2f}** |")
        run.tell(rows[-1])
    return rows


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", type=Path, default=run.ROOT / "target/debug", help="folder of fleet's programs")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--runs", type=int, default=3, help="plans and runs, in turn; medians count")
    options.add_argument("--results", type=Path, default=run.HERE / "results", help="folder for the table")
    arguments = options.parse_args()
    arguments.bin = arguments.bin.resolve()
    with tempfile.TemporaryDirectory(prefix="fleet-plan-") as work:
        rows = compare(arguments, Path(work))
    machine = f"{run.cpu()}; fleet {run.output('git', 'rev-parse', '--short', 'HEAD')}"
    text = "\n".join([f"# fleet plan beside what is measured, {time.strftime('%Y-%m-%d')}", "", f"- {machine}", "", *rows]) + "\n"
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"plan-{time.strftime('%Y-%m-%d')}-{run.cpu()}".lower()).strip("-")
    (arguments.results / f"{name}.md").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except run.Failed as why:
        sys.exit(f"error: {why}")
