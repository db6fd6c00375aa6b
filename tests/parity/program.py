"""Runs `fleet` for live.py, loads what it wrote, and says how far apart numbers are."""

import contextlib
import json
import logging
import pathlib
import subprocess
import sys
import warnings

import torch
import transformers
from safetensors.torch import load_file


class Run:
    """What `fleet launch --json` said."""

    def __init__(self, lines):
        events = [json.loads(line) for line in lines.splitlines()]
        of = lambda kind: [event for event in events if event["event"] == kind]
        self.losses = [step["loss"] for step in of("step")]
        self.norms = [step["grad_norm"] for step in of("step")]
        self.metrics = [event["values"] for event in of("metrics")]
        self.checkpoint = pathlib.Path(events[-1]["checkpoint"])


class Fleet:
    """The program, and a folder for its files."""

    def __init__(self, program, out):
        self.program, self.out, self.jobs = program, out, 0

    def __call__(self, *args):
        done = subprocess.run([self.program, *map(str, args)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"live.py: `fleet {' '.join(map(str, args))}` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def launch(self, ranks, job):
        """A job to its end; every step is reported, and nothing is held out."""
        self.jobs += 1
        job = dict(
            run_name=f"live-{self.jobs}", output_dir=str(self.out / "runs"), logging_steps=1, threads_per_rank=1, checkpoint=dict(save_steps=0),
            eval=dict(eval_steps=0), **job,
        )
        job["data"] = dict(job["data"], validation_fraction=0)
        file = self.out / "job.json"
        file.write_text(json.dumps(job))
        run = Run(self("launch", "-n", ranks, file, "--json"))
        assert len(run.losses) == job["max_steps"], len(run.losses)
        return run

    def logits(self, model, ids, adapter=None):
        file = self.out / "logits.safetensors"
        (self.out / "ids.json").write_text(json.dumps(ids.tolist()))
        beside = ["--adapter", adapter] if adapter else []
        self("logits", "--model", model, *beside, "--ids", self.out / "ids.json", "--out", file, "--device", "cpu")
        return load_file(file)["logits"].double()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def apart(got, want):
    """Of the largest of those that are wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


def relative(got, want):
    """Of each, or of 1."""
    assert len(got) == len(want), (len(got), len(want))
    return max(abs(g - w) / max(1, abs(w)) for g, w in zip(got, want))


@contextlib.contextmanager
def heard():
    """A list of all that transformers, PEFT and TRL say meanwhile."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "trl")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    for logger in loggers:
        logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught]


def model_in(folder):
    """The model, and what transformers says while it loads it."""
    with heard() as said:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    return model.double().eval(), said + [f"{key}: {value}" for key, value in info.items() if value]
