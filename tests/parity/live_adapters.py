"""Adapters of every kind, for live.py: one that PEFT wrote and one that fleet begins, each trained by fleet beside PEFT and PyTorch, and taken up by
PEFT and transformers again."""

import adapters
import families
import torch
from live_families import STEPS, WINDOW, WINDOWS, documents, draw, job
from program import apart, heard, logits_of, relative
from written import taken

# PEFT changes one use of a matrix that fleet has once, which fleet refuses.
CASES = {name: case for name, case in adapters.CASES.items() if name != "tied_embedding"}
BOUNDS = {"taken up": 1e-5, "losses": 1e-4, "norms": 1e-4, "own logits": 1e-5, "trained": 1e-3, "merged": 1e-5}


def compare(name, seed, fleet):
    """Two lines of the table."""
    family, settings = CASES[name]
    base, data = fleet.out / "model", fleet.out / "data.jsonl"
    draw(family, seed, base)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, families.VOCAB, (2, 24), generator=generator)
    batch = torch.tensor(documents(generator, data)).view(WINDOWS, WINDOW)

    given = fleet.out / "given"
    adapters.draw(base, settings, seed + 2, given)
    with heard() as of_peft:  # what it says of its own says nothing against fleet's
        adapters.loaded(base, given)
    # The model says itself how its matrices lie.
    asked = {key: value for key, value in settings.items() if key != "fan_in_fan_out"} | dict(lora_dropout=0)
    as_it_begins = dict(job(seed, base, data, steps=1, adapter=asked))
    # The first step of a warm-up changes nothing.
    as_it_begins["optimizer"] = dict(as_it_begins["optimizer"], warmup_steps=1)
    begun = fleet.launch(2, as_it_begins).checkpoint

    for line, start, adapter in [(name, given, dict(path=str(given), dropout=0)), (f"{name}, begun", begun, asked)]:
        far = {"taken up": apart(fleet.logits(base, ids, start), logits_of(adapters.loaded(base, start), ids))}
        run = fleet.launch(2, job(seed, base, data, adapter=adapter))
        model, losses, norms = adapters.train(base, start, [batch] * STEPS)
        far["losses"], far["norms"] = relative(run.losses, losses), relative(run.norms, norms)
        logits, more, said = taken(fleet, base, run.checkpoint, ids)
        far["trained"] = apart(logits, logits_of(model.eval(), ids))
        yield line, far | more, [text for text in said if text not in of_peft]
