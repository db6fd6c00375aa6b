#!/usr/bin/env python3
"""How long training stands still for a checkpoint, and how long a load takes: fleet beside torch.distributed.checkpoint (save and async_save),
two ranks, the same tensors (13.8 M and 105 M parameters with AdamW's state), in turn; prints medians and ratios. Some three minutes.

fleet's pause is what a run itself tells of the step after which it saved: the copy, and waiting for an earlier save. Its load is a resumed
launch's time from its start to the first step that it could take, less that of a launch that begins anew: with reading, verifying every byte,
and filling all ranks. The peer's are the calls themselves, with the state dictionaries that they take. What is read lies in the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import run

RANKS = 2
# Vocabulary, hidden and inner size, layers; steps between two saves, so that each is written before the next; tokens of a sequence.
MODELS = {
    "13.8 M": ((4096, 384, 1024, 6), 12, 256),
    "105 M": ((4096, 768, 2048, 14), 8, 32),
}


def launch(arguments, work, shape, settings):
    vocabulary, hidden, inner, layers = shape
    settings = {
        "model.vocab_size": vocabulary,
        "model.hidden_size": hidden,
        "model.intermediate_size": inner,
        "model.num_hidden_layers": layers,
        "strategy": "fsdp",
        "batch_size": 1,
        "output_dir": work / "output",
        "save_total_limit": 1,
        **settings,
    }
    command = [str(arguments.bin / "fleet"), "launch", "-n", str(RANKS), str(run.HERE / "llama_13m.toml"), "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return run.run(command, RANKS, None)


def started(start, lines):
    return next(line["time"] for line in lines if line.get("event") == "started") / 1000 - start


def fleet(arguments, work, model):
    """The pauses of a run's saves, and what a load takes."""
    shape, every, tokens = MODELS[model]
    settings = {"run_name": f"bench-{time.time_ns()}", "max_seq_len": tokens, "save_steps": every}
    begun, lines, _ = launch(arguments, work, shape, {**settings, "max_steps": 2 * every})
    saved = {line["step"] for line in lines if line.get("event") == "checkpoint" and line.get("path")}
    times = [line for line in lines if line.get("event") == "times" and line["step"] in saved]
    if len(times) < 2:
        raise run.Failed(f"{len(saved)} checkpoints and {len(times)} of their steps were told of, not two")
    more = {**settings, "max_steps": 2 * every + 1, "save_steps": 0, "resume_from_checkpoint": "latest"}
    resumed, again, _ = launch(arguments, work, shape, more)
    fresh, anew, _ = launch(arguments, work, shape, {**settings, "run_name": "anew", "max_steps": 1, "save_steps": 0})
    shutil.rmtree(work / "output" / "checkpoints", ignore_errors=True)
    load = started(resumed, again) - started(fresh, anew)
    return {"pause": [line["checkpoint_s"] * line["steps"] for line in times], "load": [load]}


def peer(arguments, work, model):
    shape, _, _ = MODELS[model]
    words = run.torchrun(RANKS, run.HERE / "peer_checkpoint.py", "--dir", work / "peer", "--shape", *shape)
    words[0] = arguments.python
    _, lines, _ = run.run(words, RANKS, None)
    of = lambda what: [line["s"] for line in lines if line.get("what") == what]
    return {"save": of("save"), "async_save": of("async_save"), "load": of("load")}


def compare(arguments, work):
    rows = ["| parameters | fleet stands still | dcp.save | share | dcp.async_save | share | fleet loads | dcp.load | share |",
            "|---|---|---|---|---|---|---|---|---|"]
    for model in MODELS:
        ours, theirs = {}, {}
        for number in range(arguments.runs):
            for side, table in ((fleet, ours), (peer, theirs)):
                for what, seconds in side(arguments, work, model).items():
                    table.setdefault(what, []).extend(seconds)
            run.tell(f"{model}: {number + 1} of {arguments.runs}: {json.dumps([ours, theirs])}")
        pause, load = statistics.median(ours["pause"]), statistics.median(ours["load"])
        save, later, their_load = (statistics.median(theirs[what]) for what in ("save", "async_save", "load"))
        rows.append(f"| {model} | {pause:.4f} s | {save:.3f} s | **{pause / save:.3f}** | {later:.3f} s | **{pause / later:.3f}** "
                    f"| {load:.2f} s | {their_load:.2f} s | **{load / their_load:.2f}** |")
    return rows


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", type=Path, default=run.ROOT / "target/debug", help="folder of fleet's programs")
    options.add_argument("--python", default=os.environ.get("FLEET_BENCH_PYTHON", sys.executable), help="one that has torch 2.11")
    options.add_argument("--runs", type=int, default=3)
    arguments = options.parse_args()
    arguments.bin = arguments.bin.resolve()
    # On a disk: the system's temporary directory may be memory.
    with tempfile.TemporaryDirectory(prefix="fleet-checkpoint-", dir=arguments.bin) as work:
        rows = compare(arguments, Path(work))
    machine = f"{run.cpu()}; fleet {run.output('git', 'rev-parse', '--short', 'HEAD')}"
    print("\n".join([f"# Checkpoints beside torch.distributed.checkpoint, {time.strftime('%Y-%m-%d')}", "", f"- {machine}", "", *rows]))


if __name__ == "__main__":
    try:
        main()
    except run.Failed as why:
        sys.exit(f"error: {why}")
