"""Holds fleet to PyTorch and transformers on fresh random models of every family: `make parity PYTHON=PROGRAM`.

    python live.py [--seed N] [--bin DIR] [NAME ...]

For each model of families.py: `fleet logits` (the torch executor) and `fleet eval` (the CPU executor) of what transformers wrote, twenty steps of
`fleet launch` on two ranks beside a loop of PyTorch, and the checkpoint that fleet wrote, which has to load without a word and compute the same.
PyTorch computes in fp64, so that the differences are fleet's own. Prints the largest differences, and ends with 1 where one is beyond its bound.
"""

import argparse
import json
import logging
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

try:
    import torch
    import transformers
    from safetensors.torch import load_file
except ImportError as error:
    sys.exit(f"live.py: {sys.executable} has no {error.name}; name a Python that has torch, transformers and safetensors: make parity PYTHON=PROGRAM")

if int(transformers.__version__.split(".")[0]) < 5:
    sys.exit(f"live.py: {sys.executable} has transformers {transformers.__version__}, and the models of families.py are written for 5; name another Python")

import families
from eval import score

STEPS, WINDOWS, WINDOW = 20, 4, 24
# Logits against the largest of them, losses and norms against themselves or 1.
BOUNDS = {"logits": 1e-5, "eval loss": 1e-5, "losses": 1e-4, "norms": 1e-4, "own logits": 1e-5, "trained": 1e-3}


def fleet(program, *args):
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"live.py: `fleet {' '.join(map(str, args))}` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def logits_of_fleet(program, folder, ids, out):
    (out / "ids.json").write_text(json.dumps(ids.tolist()))
    fleet(program, "logits", "--model", folder, "--ids", out / "ids.json", "--out", out / "logits.safetensors", "--device", "cpu")
    return load_file(out / "logits.safetensors")["logits"].double()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def apart(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def tokenizer_json():
    """A word for each token; the last one ends a text."""
    vocab = {f"w{i}": i for i in range(families.VOCAB - 1)} | {"</s>": families.VOCAB - 1}
    end = dict(id=families.VOCAB - 1, content="</s>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None, added_tokens=[end], normalizer=None, pre_tokenizer=dict(type="WhitespaceSplit"),
        post_processor=None, decoder=None, model=dict(type="WordLevel", vocab=vocab, unk_token="</s>"),
    ))


def quietly_loaded(folder):
    """The model, and whatever transformers says while it loads it."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught] + [f"{key}: {value}" for key, value in info.items() if value]
    return model.double().eval(), said


def compare(name, seed, program, out):
    """Name of a measure -> the largest difference, and what transformers said of the checkpoint."""
    folder = out / "model"
    model = families.model_of(name, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, families.VOCAB, (2, 40), generator=generator)
    far = {"logits": apart(logits_of_fleet(program, folder, ids, out), logits_of(model, ids))}

    # Forty documents of different lengths, which together fill the windows of one batch: the order of a batch says nothing.
    end, total = families.VOCAB - 1, WINDOWS * WINDOW
    stream, documents = [], []
    while len(stream) < total:
        length = min(1 + (len(documents) * 7) % 4, total - len(stream) - 1)
        if total - len(stream) - 1 - length == 1:
            length += 1
        words = torch.randint(0, end, (length,), generator=generator).tolist()
        documents.append(words)
        stream += [*words, end]
    rows = [json.dumps({"text": " ".join(f"w{word}" for word in words)}) for words in documents]
    (out / "data.jsonl").write_text("\n".join(rows) + "\n")
    assert len(documents) >= 20 and len(stream) == total, (len(documents), len(stream))

    args = ["eval", "--model", folder, "--data", out / "data.jsonl", "--max-seq-len", WINDOW, "--device", "cpu", "--json"]
    # A new one: transformers' dynamic rotary embeddings remember the longest sequence.
    found, want = json.loads(fleet(program, *args)), score(families.model_of(name, seed).double().eval(), stream, WINDOW)
    far["eval loss"] = abs(found["loss"] - want["loss"])
    if (found["tokens"], round(found["accuracy"] * found["tokens"])) != (want["tokens"], round(want["accuracy"] * want["tokens"])):
        far["eval loss"] = float("inf")

    hyper = families.HYPER
    job = dict(
        run_name="live", output_dir=str(out / "runs"), batch_size=WINDOWS // 2, max_seq_len=WINDOW, max_steps=STEPS, logging_steps=1, seed=seed,
        threads_per_rank=1, model=dict(path=str(folder)), data=dict(path=str(out / "data.jsonl"), validation_fraction=0),
        optimizer=dict(
            learning_rate=hyper["learning_rate"], schedule="constant", warmup_steps=0, weight_decay=hyper["weight_decay"], beta1=hyper["beta1"],
            beta2=hyper["beta2"], eps=hyper["eps"], max_grad_norm=hyper["max_grad_norm"],
        ),
        checkpoint=dict(save_steps=0), eval=dict(eval_steps=0),
    )
    (out / "job.json").write_text(json.dumps(job))
    events = [json.loads(line) for line in fleet(program, "launch", "-n", 2, out / "job.json", "--json").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == STEPS, len(steps)
    batch = torch.tensor(stream).view(WINDOWS, WINDOW)
    trained = families.model_of(name, seed).double()
    losses, norms = families.train(trained, [batch] * STEPS)
    relative = lambda got, want: max(abs(g - w) / max(1, abs(w)) for g, w in zip(got, want))
    far["losses"] = relative([step["loss"] for step in steps], losses)
    far["norms"] = relative([step["grad_norm"] for step in steps], norms)

    checkpoint = events[-1]["checkpoint"]
    loaded, said = quietly_loaded(checkpoint)
    own = logits_of(loaded, ids)
    far["own logits"] = apart(logits_of_fleet(program, checkpoint, ids, out), own)
    far["trained"] = apart(own, logits_of(trained.eval(), ids))
    return far, said


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "target" / "debug")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(families.MODELS))
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in families.MODELS]
    if unknown:
        sys.exit(f"live.py: there is no {unknown[0]}; there are {', '.join(families.MODELS)}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(f"seed {args.seed}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    print(f"{'':14}" + "".join(f"{name:>13}" for name in BOUNDS) + "  checkpoint", flush=True)
    wrong = 0
    for name in args.names or families.MODELS:
        with tempfile.TemporaryDirectory(prefix="fleet-parity-") as out:
            far, said = compare(name, args.seed, args.bin / "fleet", pathlib.Path(out))
        cells = [f"{far[key]:.1e}{' ' if far[key] <= bound else '!'}" for key, bound in BOUNDS.items()]
        wrong += bool(said) + sum(not far[key] <= bound for key, bound in BOUNDS.items())
        print(f"{name:14}" + "".join(f"{cell:>13}" for cell in cells) + "  " + ("; ".join(said)[:300] or "loads"), flush=True)
    print(f"{'bound':14}" + "".join(f"{bound:>12.0e} " for bound in BOUNDS.values()))
    sys.exit(1 if wrong else 0)


main()
