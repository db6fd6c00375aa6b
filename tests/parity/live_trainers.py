"""SFT and preferences beside TRL's trainers, for live.py: twenty steps with the same rows, which are few enough that each step takes them all, and
what fleet wrote, taken up by PEFT and transformers."""

import json
import shutil

import datasets
import torch
import trainers
from program import heard, relative
from transformers import AutoConfig, AutoModelForCausalLM
from written import taken

datasets.disable_progress_bars()
ROWS, LONGEST = 8, 512
CASES = {
    **{name: ("sft", settings, of, job) for name, (settings, of, job) in trainers.SFT.items()},
    **{name: ("dpo", settings, "preferences", {}) for name, settings in trainers.DPO.items()},
    "orpo": ("orpo", dict(max_length=LONGEST), "preferences", {}),
}
# Weights of the golden model are large, and so is what rounding makes of them.
BOUNDS = {"losses": 1e-4, "norms": 1e-4, "metrics": 1e-4, "own logits": 5e-5, "merged": 5e-5}


def draw(seed, folder):
    """A model as the golden one, with its tokenizer."""
    shutil.copytree(trainers.MODEL, folder, ignore=shutil.ignore_patterns("model.safetensors", "expected.json"))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, max_position_embeddings=LONGEST)).save_pretrained(folder)


def compare(name, seed, fleet):
    """One line of the table."""
    kind, settings, of, in_job = CASES[name]
    base, start, file = fleet.out / "model", fleet.out / "start", fleet.out / "rows.json"
    draw(seed, base)
    trainers.adapter(base, seed + 1, start)
    rows = trainers.rows(seed + 2, ROWS)[of]
    if kind == "orpo":  # of TRL's the prompt's tokens count, too
        rows = [row | dict(prompt="") for row in rows]
    file.write_text(json.dumps(rows))
    trainer = lambda accumulate: trainers.trainer_of(kind, settings, rows, trainers.Place(base, start, fleet.out / "trl"), accumulate)
    with heard():  # what TRL says is not looked at
        of_step = len(trainer(1).train_dataset)
        logged = trainers.trained(trainer(of_step if "packing" in settings or kind == "orpo" else of_step // trainers.BATCH))

    ranks = 2 - of_step % 2
    job = dict(
        task_name=kind, model=dict(path=str(base)), adapter=dict(path=str(start), dropout=0), batch_size=of_step // ranks,
        max_seq_len=settings.get("max_length", LONGEST), max_steps=trainers.STEPS, seed=seed,
        data=dict(path=str(file), chat_template="chatml" if of == "messages" else "none", **in_job),
        optimizer=dict(learning_rate=5e-3, schedule="cosine", warmup_steps=3, weight_decay=0.01, beta2=0.999, max_grad_norm=1.0),
    )
    run = fleet.launch(ranks, job | (dict(dpo=settings) if kind == "dpo" else {}))
    # With ORPO the log-probabilities of TRL are those of a token; fleet's are always those of an answer.
    metrics = {key: values for key, values in logged.items() if "/" in key and (kind, key.split("/")[0]) != ("orpo", "logps")}
    of_fleet = lambda key: [values[key] for values in run.metrics if key in values]
    far = {"losses": relative(run.losses, logged["loss"]), "norms": relative(run.norms, logged["grad_norm"])}
    far["metrics"] = max((relative(of_fleet(key), values) for key, values in metrics.items()), default=0.0)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(seed))
    _, more, said = taken(fleet, base, run.checkpoint, ids)
    yield name, far | more, said
