"""Tokenises the same rows with fleet and with `datasets` and `tokenizers`, in turn, and prints times, their ratio and both peaks of memory.

    cargo build -p fleet-data --example tokenise
    bench/.venv/bin/pip install datasets tokenizers
    bench/.venv/bin/python bench/tokenising.py [--mb 300] [--runs 3] [--processes 2]

Both begin with a file of JSON Lines and end with tokens on disk, without anything cached. Memory is what all processes of a side have together,
each page that several share once (PSS), sampled twenty times a second. `--only fleet` runs that side alone, with files of any size.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE.parent / "target" / "debug" / "examples" / "tokenise"
VOCABULARY = 16384


def words(count=60000):
    """Words whose lengths and frequencies are about those of English."""
    draw = random.Random(1)
    parts = ["ba", "con", "der", "ing", "tion", "re", "st", "al", "ment", "er", "lo", "mi", "un", "ple", "qua", "sha", "ve", "ness", "o", "i"]
    return list(dict.fromkeys("".join(draw.choices(parts, k=draw.choice([1, 1, 2, 2, 3, 4]))) for _ in range(count)))


def write_rows(path, megabytes):
    draw = random.Random(2)
    all_words = words()
    weights = [1 / (rank + 3) for rank in range(len(all_words))]
    size = 0
    with open(path, "w") as file:
        while size < megabytes << 20:
            picked = draw.choices(all_words, weights, k=4000)
            for at in range(0, 4000, 200):
                text = " ".join(picked[at : at + draw.randrange(40, 200)]) + "."
                line = json.dumps({"id": size, "text": text.capitalize()}) + "\n"
                size += len(line)
                file.write(line)


def train_tokenizer(rows, path):
    from tokenizers import ByteLevelBPETokenizer

    with open(rows) as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(20000))]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(path))


PEER = """
import json, sys, time
from datasets import load_dataset
from tokenizers import Tokenizer
rows, tokenizer, out, processes = sys.argv[1:5]
started = time.time()
tokenizer = Tokenizer.from_file(tokenizer)
end = tokenizer.token_to_id("<|endoftext|>")
def encode(batch):
    return {"input_ids": [encoding.ids + [end] for encoding in tokenizer.encode_batch(batch["text"])]}
data = load_dataset("json", data_files=rows, split="train", cache_dir=out + "/cache")
data = data.map(encode, batched=True, num_proc=int(processes), remove_columns=data.column_names)
data.save_to_disk(out + "/tokens")
seconds = time.time() - started
print(json.dumps({"seconds": seconds, "tokens": sum(map(len, data["input_ids"][:1000]))}))
"""


def children(pid):
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found


def pss(pid):
    total = 0
    for process in children(pid):
        try:
            for line in open(f"/proc/{process}/smaps_rollup"):
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            pass  # it has just ended
    return total / 1024


def measured(command):
    """What a command prints, and the most memory that it and its children had, in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, pss(process.pid))
            except OSError:
                pass
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.stdout.read()
    watcher.join()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return json.loads(out.strip().splitlines()[-1]), peak


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=["fleet", "datasets"])
    args = parser.parse_args()
    sides = [args.only] if args.only else ["fleet", "datasets"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = pathlib.Path(folder)
        rows, tokenizer, out = folder / "rows.jsonl", folder / "tokenizer.json", folder / "out"
        write_rows(rows, args.mb)
        train_tokenizer(rows, tokenizer)
        size = len(json.loads(tokenizer.read_text())["model"]["vocab"])
        job = folder / "job.toml"
        job.write_text(
            f'output_dir = "{out}"\nmax_seq_len = 256\n'
            f"model = {{ vocab_size = {size}, hidden_size = 8, num_hidden_layers = 1, num_attention_heads = 1 }}\n"
            f'tokenizer = {{ path = "{tokenizer}" }}\ndata = {{ path = "{rows}" }}\n'
        )
        commands = {
            "fleet": [str(PROGRAM), str(job)],
            "datasets": [sys.executable, "-c", PEER, str(rows), str(tokenizer), str(out), str(args.processes)],
        }
        times, peaks = {side: [] for side in sides}, {side: [] for side in sides}
        for _ in range(args.runs):
            for side in sides:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                said, peak = measured(commands[side])
                times[side].append(said["seconds"])
                peaks[side].append(peak)
        print(f"{args.mb} MiB of JSON Lines, {os.cpu_count()} cores, medians of {args.runs}")
        middle = lambda values: sorted(values)[len(values) // 2]
        for side in sides:
            seconds = middle(times[side])
            print(f"{side:9} {seconds:7.1f} s  {args.mb / seconds:6.1f} MiB/s  peak {max(peaks[side]):7.0f} MiB")
        if len(sides) == 2:
            print(f"fleet is {middle(times['datasets']) / middle(times['fleet']):.2f} times as fast, in "
                  f"{max(peaks['fleet']) / max(peaks['datasets']):.2f} of the memory")


main()
