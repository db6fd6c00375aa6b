"""Fine-tuning with fleet and with TRL and PEFT in turn: LoRA and QLoRA on instructions, packed, and DPO. Prints medians and ratios.

Makes a Llama with random weights and rows of drawn words; `peer_tuning.py` is the other side. Only the standard library is used here.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import run

TOKENIZER = run.ROOT / "tests" / "parity" / "golden" / "foreign" / "byte_level"
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
    "initializer_range": 0.02,
}
SIZES = {
    "27m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 8},
    "92m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
}
SEQUENCE, BATCH, PAIRS, ROWS = 512, 2, 2, 4000
KINDS = ("lora", "qlora", "dpo")
UNSTEADY_STEPS = 3


def rows():
    """Instructions with answers of some 5 to 60 words, and pairs of answers."""
    draw = random.Random(1)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(1, 8))) for _ in range(500)]
    text = lambda most: " ".join(draw.choice(words) for _ in range(draw.randint(5, most)))
    pair = lambda: {"prompt": text(20) + ":", "chosen": " " + text(20), "rejected": " " + text(20)}
    return [{"prompt": text(20) + ":", "completion": " " + text(60)} for _ in range(ROWS)], [pair() for _ in range(ROWS)]


def job(arguments, work, kind):
    dpo = kind == "dpo"
    settings = {
        "run_name": f"bench-{time.time_ns()}", "output_dir": str(work / "output"), "device": "cpu", "threads_per_rank": arguments.threads,
        "precision": {"fp32": "32", "bf16": "bf16-mixed"}[arguments.precision], "max_seq_len": SEQUENCE, "batch_size": PAIRS if dpo else BATCH,
        "max_steps": arguments.steps, "logging_steps": 1, "task_name": "dpo" if dpo else "sft", "model": {"path": str(work / "base")},
        "adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {"path": str(work / f"{'pairs' if dpo else 'rows'}.json"), "validation_fraction": 0, "packing": not dpo, "chat_template": "none"},
        "optimizer": {"learning_rate": 2e-4}, "checkpoint": {"save_steps": 0}, "eval": {"eval_steps": 0},
    }
    if dpo:
        del settings["data"]["packing"]
    if kind == "qlora":
        settings["quantization"] = "nf4"
    file = work / f"{kind}.json"
    file.write_text(json.dumps(settings))
    return file


def fleet(arguments, work, kind):
    command = [str(arguments.bin / "fleet"), "launch", "-n", "1", str(job(arguments, work, kind)), "--json"]
    start, lines, memory = run.run(command, 1, "fleet-rank")
    ends = [line["time"] / 1000 for line in lines if line.get("event") == "step"]
    # Tokens of a step differ; those that the rank counts are the same ones that it computes.
    steps = [line["tokens_per_s"] for line in lines if line.get("event") == "step"][UNSTEADY_STEPS:]
    return {"tokens_per_s": statistics.median(steps), "startup_s": ends[0] - start, "rss_mib": memory.of(max, "rss")}


def peer(arguments, work, kind):
    command = [sys.executable, str(run.HERE / "peer_tuning.py"), kind, str(work), "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    command += ["--bf16"] if arguments.precision == "bf16" else []
    # The sampler looks at descendants of what it starts.
    start, lines, memory = run.run(["sh", "-c", '"$@"; exit $?', "sh", *command], 1, "peer_tuning.py", "exit")
    steps = [line for line in lines if "tokens" in line]
    gaps = [(b["time"] - a["time"], b["tokens"] - a["tokens"]) for a, b in zip(steps, steps[1:])][UNSTEADY_STEPS - 1:]
    speed = statistics.median(tokens / seconds for seconds, tokens in gaps)
    return {"tokens_per_s": speed, "startup_s": steps[0]["time"] - start, "rss_mib": memory.of(max, "rss")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bin", type=Path, nargs="?", default=run.ROOT / "target" / "debug")
    parser.add_argument("--size", choices=SIZES, default="92m")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"Llama of {arguments.size}, {arguments.precision}, {arguments.threads} threads, {arguments.runs} runs of {arguments.steps} steps\n")
    print("| | | tokens/s | start-up s | RSS MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as work:
        work = Path(work)
        make = [sys.executable, str(run.HERE / "peer_tuning.py"), "make", str(work), "--config", json.dumps(MODEL | SIZES[arguments.size])]
        subprocess.run([*make, "--tokenizer", str(TOKENIZER)], check=True, stdout=subprocess.DEVNULL)
        for name, data in zip(("rows", "pairs"), rows()):
            (work / f"{name}.json").write_text(json.dumps(data))
        for kind in arguments.kind:
            runs = {fleet: [], peer: []}
            for _ in range(arguments.runs):
                for side, those in runs.items():
                    those.append(side(arguments, work, kind))
                    print(f"{kind}, {side.__name__}: {those[-1]}", file=sys.stderr)
            median = {side: run.medians(those) for side, those in runs.items()}
            for side, name in ((fleet, "fleet"), (peer, "TRL + PEFT")):
                low, high = (pick(one["tokens_per_s"] for one in runs[side]) for pick in (min, max))
                it = median[side]
                print(f"| {kind} | {name} | {it['tokens_per_s']:.0f} ({low:.0f}-{high:.0f}) | {it['startup_s']:.2f} | {it['rss_mib']:.0f} |")
            cells = " | ".join(f"**{median[fleet][key] / median[peer][key]:.2f}**" for key in median[fleet])
            print(f"| {kind} | **fleet / TRL** | {cells} |", flush=True)


if __name__ == "__main__":
    main()
