"""Holds fleet to PyTorch, transformers, PEFT and TRL on fresh random models, adapters and rows: `make parity PYTHON=PROGRAM`.

    python live.py [--seed N] [--bin DIR] [NAME ...]

What is compared is in live_families.py, live_adapters.py and live_trainers.py. PyTorch and TRL compute in fp64, so that the differences are fleet's
own. Whatever fleet wrote has to load without a word. Prints the largest differences, and ends with 1 where one is beyond its bound.
"""

import argparse
import importlib
import importlib.util
import logging
import pathlib
import random
import sys
import tempfile
import warnings

NEEDED = ("torch", "transformers", "safetensors", "peft")
missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"live.py: {sys.executable} has no {missing[0]}; name a Python that has {', '.join(NEEDED)}: make parity PYTHON=PROGRAM")

import peft
import torch
import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    sys.exit(f"live.py: {sys.executable} has transformers {transformers.__version__}, and the models of families.py are written for 5; name another Python")

from program import Fleet

PARTS = ["families", "adapters", "trainers"]


def lines_of(part, names, args):
    """Prints a table of what is named; how much of it is wrong."""
    print(f"\n{part.NAME:22}" + "".join(f"{name:>13}" for name in part.BOUNDS) + "  checkpoint", flush=True)
    wrong = 0
    for name in names:
        with tempfile.TemporaryDirectory(prefix="fleet-parity-") as out:
            for line, far, said in part.compare(name, args.seed, Fleet(args.bin / "fleet", pathlib.Path(out))):
                cells = [f"{far[key]:.1e}{' ' if far[key] <= bound else '!'}" for key, bound in part.BOUNDS.items()]
                wrong += bool(said) + sum(not far[key] <= bound for key, bound in part.BOUNDS.items())
                print(f"{line:22}" + "".join(f"{cell:>13}" for cell in cells) + "  " + ("; ".join(said)[:300] or "loads"), flush=True)
    print(f"{'bound':22}" + "".join(f"{bound:>12.0e} " for bound in part.BOUNDS.values()), flush=True)
    return wrong


def parts():
    """Each part that this Python has what it takes for."""
    for name in PARTS:
        if name == "trainers" and not importlib.util.find_spec("trl"):
            print(f"trainers are skipped: {sys.executable} has no trl", flush=True)
            continue
        part = importlib.import_module(f"live_{name}")
        part.NAME = name
        yield part


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "target" / "debug")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a part ({', '.join(PARTS)}), or a line of one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # What is said is heard where it counts, and else no matter.
    transformers.utils.logging.disable_default_handler()
    logging.getLogger("transformers").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    print(f"seed {args.seed}, torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}", flush=True)
    found = list(parts())
    known = {name for part in found for name in [part.NAME, *part.CASES]}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        sys.exit(f"live.py: there is no {unknown[0]}; there are {', '.join(sorted(known))}")
    wrong = 0
    for part in found:
        names = [name for name in part.CASES if not args.names or name in args.names or part.NAME in args.names]
        if names:
            wrong += lines_of(part, names, args)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
