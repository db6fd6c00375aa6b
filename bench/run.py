"""Runs fleet and PyTorch in turn and prints medians and ratios; the README beside it says what is measured and how.

Only the standard library is used here; PyTorch is in the peers that it starts.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEQUENCE, BATCH = 256, 4
UNSTEADY_STEPS = 5
STEPS_MIN = 4
SAMPLE_S = 1.0


class Failed(Exception):
    pass


# ---- one run ------------------------------------------------------------------------------------------------------------


class MemorySampler(threading.Thread):
    """RSS and PSS, in MiB, of `count` descendants of a process whose command line has `wanted` and not
    `unwanted`: means over the ranks at moments when all of them are there, since one that is alone is charged for what was shared."""

    def __init__(self, root, count, wanted, unwanted=None):
        super().__init__(daemon=True)
        self.root, self.count, self.wanted, self.unwanted = root, count, wanted, unwanted
        self.samples, self.ended = [], threading.Event()

    def run(self):
        ranks = []
        while not self.ended.wait(SAMPLE_S):
            ranks = ranks if len(ranks) == self.count else list(self.ranks())
            try:
                sample = [self.look(pid) for pid in ranks]
            except OSError:
                return  # a rank has ended
            if len(sample) == self.count:
                self.samples.append({key: statistics.mean(one[key] for one in sample) for key in sample[0]})

    def of(self, which, key):
        return which(sample[key] for sample in self.samples) if self.samples else float("nan")

    def look(self, pid):
        text = "".join(Path(f"/proc/{pid}/{file}").read_text() for file in ("status", "smaps_rollup"))
        found = {key: re.search(rf"^{field}:\s+(\d+) kB", text, re.M) for key, field in (("rss", "VmHWM"), ("pss", "Pss"))}
        return {key: int(match.group(1)) / 1024 if match else 0 for key, match in found.items()}

    def ranks(self):
        parents = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    pass
        for pid in parents:
            ancestor = parents[pid]
            while ancestor > 1 and ancestor != self.root:
                ancestor = parents.get(ancestor, 0)
            if ancestor == self.root:
                try:
                    line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                except OSError:
                    continue
                if self.wanted in line and not (self.unwanted and self.unwanted in line):
                    yield pid


def run(command, ranks, wanted, unwanted=None):
    """Runs a command to its end: (start in seconds since 1970, the JSON objects of its stdout, the sampler of its ranks' memory).

    `wanted` and `unwanted` tell its `ranks` by their command lines; without `wanted` no memory is looked at.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment)
        memory = MemorySampler(process.pid, ranks, wanted, unwanted)
        if wanted:
            memory.start()
        lines = [json.loads(line) for line in process.stdout if line.startswith("{")]
        code = process.wait()
        memory.ended.set()
        if wanted:
            memory.join()
        if code != 0:
            errors.seek(0)
            last = lines[-1].get("error") if lines else None
            raise Failed(f"{' '.join(command)} ended with {code}: {last or errors.read()[-2000:]}")
    return start, lines, memory


def summarise(start, step_ends, ranks, memory):
    if len(step_ends) < STEPS_MIN:
        raise Failed(f"only {len(step_ends)} steps were seen; at least {STEPS_MIN} are needed")
    gaps = [b - a for a, b in zip(step_ends, step_ends[1:])]
    gaps = gaps[min(UNSTEADY_STEPS, len(gaps) - 2):]
    step_s = statistics.median(gaps)
    return {
        "tokens_per_s": ranks * BATCH * SEQUENCE / step_s,
        "startup_s": step_ends[0] - start - step_s,
        "rss_mib": memory.of(max, "rss"),
        "pss_mib": memory.of(max, "pss"),
    }


def run_fleet(arguments, work, ranks, strategy, precision):
    settings = {
        "strategy": strategy,
        "precision": {"fp32": "32", "bf16": "bf16-mixed"}[precision],
        "output_dir": work / "output",
        "run_name": f"bench-{time.time_ns()}",
        "max_steps": arguments.steps,
    }
    command = [str(arguments.bin / "fleet"), "launch", "-n", str(ranks), str(HERE / "llama_13m.toml"), "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    start, lines, memory = run(command, ranks, "fleet-rank")
    ends = [line["time"] / 1000 for line in lines if line.get("event") == "step"]
    shutil.rmtree(work / "output" / "checkpoints", ignore_errors=True)
    times = lines[-1]["times"]
    return summarise(start, ends, ranks, memory) | {what: times[what]["share"] for what in ("communication", "waiting")}


def torchrun(ranks, *words):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *map(str, words)]


def run_peer(arguments, _work, ranks, strategy, precision):
    command = torchrun(ranks, HERE / "peer.py", "--strategy", strategy, "--precision", precision, "--steps", arguments.steps,
                       "--limit-s", arguments.limit)
    command += ["--compile"] if arguments.compile else []
    start, lines, memory = run(command, ranks, "peer.py", "torch.distributed.run")
    return summarise(start, [line["time"] for line in lines if "step" in line], ranks, memory)


NAMES = {(run_fleet, "ddp"): "fleet", (run_fleet, "fsdp"): "fleet", (run_peer, "ddp"): "PyTorch DDP", (run_peer, "fsdp"): "PyTorch FSDP2"}


# ---- the tables ---------------------------------------------------------------------------------------------------------


def training(arguments, work):
    """Rows of the table, and of a second one that holds fleet's strategies and numbers of ranks against each other."""
    rows = ["| ranks | strategy | precision | | tokens/s | start-up s | RSS MiB | PSS MiB | communication | waiting |", "|---|---|---|---|---|---|---|---|---|---|"]
    speed = {}
    for ranks in arguments.ranks:
        for precision in arguments.precision:
            sides = [(strategy, runner) for strategy in (arguments.strategy if ranks > 1 else ["ddp"]) for runner in (run_fleet, run_peer)]
            runs = {side: [] for side in sides}
            for turn in range(arguments.runs):
                for strategy, runner in sides:
                    runs[strategy, runner].append(runner(arguments, work, ranks, strategy, precision))
                    tell(f"{ranks} ranks, {precision}, run {turn + 1}, {NAMES[runner, strategy]}: {shown(runs[strategy, runner][-1])}")
            median = {side: medians(those) for side, those in runs.items()}
            for strategy, runner in sides:
                low, high = (pick(run["tokens_per_s"] for run in runs[strategy, runner]) for pick in (min, max))
                it = median[strategy, runner]
                exposed = f"{it['communication']:.1%} | {it['waiting']:.1%}" if "communication" in it else "- | -"
                rows.append(f"| {ranks} | {strategy} | {precision} | {NAMES[runner, strategy]} | {it['tokens_per_s']:.0f} ({low:.0f}-{high:.0f}) "
                            f"| {it['startup_s']:.2f} | {it['rss_mib']:.0f} | {it['pss_mib']:.0f} | {exposed} |")
                if runner is run_peer:
                    fleet = median[strategy, run_fleet]
                    ratio = {key: f"**{fleet[key] / it[key]:.2f}**" for key in it}
                    rows.append(f"| {ranks} | {strategy} | {precision} | **fleet / PyTorch** | {ratio['tokens_per_s']} | {ratio['startup_s']} "
                                f"| {ratio['rss_mib']} | {ratio['pss_mib']} | | |")
                else:
                    speed[ranks, strategy, precision] = it
    return rows + ["", *against_each_other(speed)]


def against_each_other(speed):
    rows = ["| fleet | precision | ratio of tokens/s |", "|---|---|---|"]
    for (ranks, strategy, precision), it in speed.items():
        for name, other in ((f"{strategy}, {ranks} ranks / 1 rank", (1, "ddp", precision)), (f"{strategy} / ddp, {ranks} ranks", (ranks, "ddp", precision))):
            if other in speed and other != (ranks, strategy, precision) and not (other[0] == 1 and ranks > os.cpu_count()):
                rows.append(f"| {name} | {precision} | **{it['tokens_per_s'] / speed[other]['tokens_per_s']:.2f}** |")
    return rows


def shares(arguments):
    rows = ["| precision | | GFLOP/s | of the largest product's | share |", "|---|---|---|---|---|"]
    for precision in arguments.precision:
        fleet = [str(arguments.bin / "fleet-rank"), "bench", "--json", "--steps", str(arguments.steps)]
        fleet += ["--bf16"] if precision == "bf16" else []
        peer = torchrun(1, HERE / "peer.py", "--share", "--precision", precision, "--steps", arguments.steps,
                        "--limit-s", arguments.limit)
        for name, command in (("fleet", fleet), ("PyTorch", peer)):
            ends = [run(command, 1, None)[1][-1] for _ in range(arguments.runs)]
            it = medians([{key: end[key] for key in ("gflops", "product_gflops", "share")} for end in ends])
            rows.append(f"| {precision} | {name} | {it['gflops']:.1f} | {it['product_gflops']:.1f} | **{it['share']:.2f}** |")
            tell(rows[-1])
    return rows


def collectives(arguments):
    found = {}
    for ranks in arguments.ranks:
        for command in ([str(arguments.bin / "examples" / "collectives"), str(ranks)], torchrun(ranks, HERE / "peer_gloo.py")):
            for line in run(command, ranks, None)[1]:
                side = line["memory"] if line["library"] == "fleet shm" else "gloo"
                found[(ranks, line["operation"], line["bytes"], side)] = (line["median_us"], line["gb_per_s"])
    rows = ["| ranks | operation | bytes | gloo | fleet, copies | fleet, in place | gloo / in place |", "|---|---|---|---|---|---|---|"]
    for ranks, operation, size in sorted({key[:3] for key in found}):
        cells = [found.get((ranks, operation, size, side)) for side in ("gloo", "copies", "in place")]
        text = ["-" if cell is None else f"{cell[0]:.1f} us, {cell[1]:.1f} GB/s" for cell in cells]
        ratio = "-" if None in (cells[0], cells[2]) else f"**{cells[0][0] / cells[2][0]:.1f}**"
        rows.append(f"| {ranks} | {operation} | {size} | {' | '.join(text)} | {ratio} |")
    return rows


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def shown(run):
    return f"{run['tokens_per_s']:.0f} tokens/s, start-up {run['startup_s']:.2f} s, RSS {run['rss_mib']:.0f}, PSS {run['pss_mib']:.0f} MiB"


def tell(text):
    print(text, file=sys.stderr, flush=True)


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def cpu():
    fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    numbers = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', 'unknown CPU').strip()} ({numbers})"


def conditions(arguments):
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = output(sys.executable, "-c", "import torch; print(torch.__version__)")
    busy = os.getloadavg()[0]
    bf16 = [word for word in ("avx512_bf16", "amx_bf16") if word in Path("/proc/cpuinfo").read_text()]
    return [
        f"- {cpu()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {os.uname().release}; load average at the start {busy:.1f}",
        f"- bf16 instructions: {', '.join(bf16) or 'none; PyTorch does bf16 products by a slow fallback on such a CPU'}",
        f"- fleet {output('git', 'rev-parse', '--short', 'HEAD')} ({output('rustc', '--version')}), torch {torch}, Python {sys.version.split()[0]}",
        f"- one thread per rank, {BATCH} sequences of {SEQUENCE} tokens per rank and step, {arguments.steps} steps, {arguments.runs} runs of each "
        "in turn; medians, tokens/s with the range of the runs"
        + ("; PyTorch with torch.compile" if arguments.compile else ""),
    ]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", type=Path, default=ROOT / "target/debug", help="folder of fleet's programs")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--strategy", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    options.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--steps", type=int, default=25)
    options.add_argument("--limit", type=float, default=90, help="seconds after which a run of the peer stops (at least 4 steps)")
    options.add_argument("--compile", action="store_true", help="torch.compile in the peer")
    options.add_argument("--only", choices=["training", "shares", "collectives"])
    options.add_argument("--results", type=Path, default=HERE / "results", help="folder for the table")
    arguments = options.parse_args()
    arguments.bin = arguments.bin.resolve()

    date = datetime.date.today().isoformat()
    report = [f"# fleet beside PyTorch, {date}", "", *conditions(arguments)]
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as work:
        if arguments.only in (None, "training"):
            tell("the first launch builds the token cache")
            cold = run_fleet(arguments, Path(work), arguments.ranks[0], "ddp", arguments.precision[0])
            report += ["", "## Training: Llama of 13.8 M parameters", "", *training(arguments, Path(work)), ""]
            report += [f"The first launch, which also trained the tokenizer and built the token cache: start-up {cold['startup_s']:.2f} s."]
        if arguments.only in (None, "shares"):
            report += ["", "## A step's speed beside that of the model's largest product, one rank, by CPU time", "", *shares(arguments)]
        if arguments.only in (None, "collectives"):
            report += ["", "## Collectives between processes, medians", "", *collectives(arguments)]
    text = "\n".join(report) + "\n"
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{date}-{cpu()}".lower()).strip("-")
    (arguments.results / f"{name}.md").write_text(text)
    tell(f"written to {arguments.results / name}.md")


if __name__ == "__main__":
    try:
        main()
    except Failed as why:
        sys.exit(f"error: {why}")
