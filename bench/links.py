"""Times collectives between two hosts over a link of a known rate: fleet over TCP, with and without encryption, and over QUIC, beside gloo.

The hosts are network namespaces of this machine, one rank in each, joined by a pair of virtual Ethernet devices of which tc limits both
directions. Needs the right to make namespaces, `ip`, `tc`, and PyTorch (`FLEET_BENCH_PYTHON`, else this Python).

All sides are run in turn, several times; the tables have the median of the runs' medians. A share is the rate at which the bytes that an
operation has to move leave a rank, beside that of the link: all of an all_reduce, half of a reduce_scatter or all_gather. Headers count
nothing, so that 0.96 is the most that packets of 1500 bytes can give to TCP and 0.94 to QUIC.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = (4, 64 << 10, 4 << 20, 64 << 20)
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather")
PYTHON = os.environ.get("FLEET_BENCH_PYTHON", sys.executable)
SIDES = {"gloo": None, "fleet, plain": "plain", "fleet, tcp": "tcp", "fleet, quic": "quic"}


def sh(*words):
    subprocess.run(words, check=True)


class Hosts:
    """Two namespaces, until the end of a `with`."""

    def __init__(self):
        self.names = [f"fb{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.251.0.1", "10.251.0.2"]

    def __enter__(self):
        for name in self.names:
            sh("ip", "netns", "add", name)
        one, other = self.names
        sh("ip", "link", "add", "e0", "netns", one, "type", "veth", "peer", "name", "e0", "netns", other)
        for name, address in zip(self.names, self.addresses):
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "e0")
            for device in ("e0", "lo"):
                sh("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def limit(self, gbit):
        for name in self.names:
            sh("tc", "-n", name, "qdisc", "replace", "dev", "e0", "root", "tbf", "rate", f"{gbit}gbit", "burst", "256kb", "latency", "20ms")

    def gloo(self):
        ranks = []
        for rank, name in enumerate(self.names):
            environment = dict(os.environ, OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="e0",
                               MASTER_ADDR=self.addresses[0], MASTER_PORT="29500")
            ranks.append(subprocess.Popen(["ip", "netns", "exec", name, PYTHON, str(HERE / "peer_gloo.py")], env=environment,
                                          stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True))
        said = ranks[0].communicate()[0]
        if any(rank.wait() != 0 for rank in ranks):
            sys.exit("error: gloo's ranks failed")
        return said

    def fleet(self, program, transport):
        places = [f"{name}={address}" for name, address in zip(self.names, self.addresses)]
        return subprocess.run([program, transport, "2", *places], check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(self, program, transport):
        """(operation, bytes) to microseconds; of fleet's two ways the better one, in place or with copies, as gloo has its one."""
        found = {}
        for line in (self.fleet(program, transport) if transport else self.gloo()).splitlines():
            if line.startswith("{"):
                line = json.loads(line)
                key = (line["operation"], line["bytes"])
                found[key] = min(line["median_us"], found.get(key, float("inf")))
        return found


def share(operation, size, microseconds, gbit):
    return size * (1 if operation == "all_reduce" else 0.5) * 8 / microseconds / 1e3 / gbit


def table(hosts, arguments, gbit):
    hosts.limit(gbit)
    runs = {side: [] for side in SIDES}
    for turn in range(arguments.runs):
        for side, transport in SIDES.items():
            print(f"{gbit} Gbit/s, run {turn + 1}, {side}", file=sys.stderr, flush=True)
            runs[side].append(hosts.run(arguments.program, transport))
    head = "".join(f" {side} |" for side in SIDES) + "".join(f" gloo / {side} |" for side in list(SIDES)[1:])
    rows = [f"| operation | bytes |{head}", "|---|---|" + "---|" * (2 * len(SIDES) - 1)]
    for operation in OPERATIONS:
        for size in SIZES:
            time = {side: statistics.median(run[(operation, size)] for run in runs[side]) for side in SIDES}
            cells = [f"{time[side]:.0f} us" + (f", {share(operation, size, time[side], gbit):.2f}" if size >= 4 << 20 else "") for side in SIDES]
            cells += [f"**{time['gloo'] / time[side]:.2f}**" for side in list(SIDES)[1:]]
            rows.append(f"| {operation} | {size} | {' | '.join(cells)} |")
    return rows


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("program", nargs="?", default=HERE.parent / "target/debug/examples/collectives",
                         help="what `cargo build -p fleet-collectives --example collectives` made")
    options.add_argument("--gbit", type=float, nargs="+", default=[1, 10])
    options.add_argument("--runs", type=int, default=3)
    arguments = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    with Hosts() as hosts:
        for gbit in arguments.gbit:
            gbit = int(gbit) if gbit == int(gbit) else gbit
            print("\n".join(["", f"Two hosts, {gbit} Gbit/s each way, medians of {arguments.runs} runs, share of the link", "",
                             *table(hosts, arguments, gbit)]), flush=True)


if __name__ == "__main__":
    main()
