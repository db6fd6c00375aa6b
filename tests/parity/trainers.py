"""Trains adapters with TRL's trainers, for worker/rank/tests/trl.rs. See README.md.

    python trainers.py           writes golden/trl anew
    python trainers.py check     trains again and compares

Needs TRL (1.16), transformers (5), PEFT (0.18) and torch. Rows are taken in their order.
"""

import collections
import json
import pathlib
import random
import shutil
import sys
import tempfile

import torch
import trl
from adapters import name_base
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden" / "trl"
MODEL = HERE / "golden" / "foreign" / "byte_level"
CHATML = HERE.parent.parent / "worker" / "data" / "src" / "chat" / "templates" / "chatml.jinja"
STEPS, BATCH, ACCUMULATE = 20, 2, 2
WORDS = "the a river stone, bird sings; blue wind over far hills 12 and (never) cold night? Light falls. caf\u00e9".split()
# What the trainers are asked for, and the same in a job of fleet's.
SFT = {
    "sft_answers": (dict(assistant_only_loss=True), "messages", {}),
    "sft_completions": (dict(), "pairs", {}),
    "sft_packed": (dict(packing=True, max_length=288, assistant_only_loss=True), "messages", {"packing": True}),
}
DPO = {
    "dpo_sigmoid": dict(loss_type="sigmoid"),
    "dpo_hinge": dict(loss_type="hinge"),
    "dpo_ipo": dict(loss_type="ipo"),
    "dpo_robust": dict(loss_type="robust", label_smoothing=0.1),
    "dpo_sigmoid_norm": dict(loss_type="sigmoid_norm"),
}


class InOrder:
    """Rows as they stand."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class Sft(InOrder, SFTTrainer):
    pass


class Dpo(InOrder, DPOTrainer):
    pass


class Orpo(InOrder, ORPOTrainer):
    pass


TRAINERS = {"sft": (Sft, SFTConfig), "dpo": (Dpo, DPOConfig), "orpo": (Orpo, ORPOConfig)}


def rows(seed, count):
    """Talks, and pairs of answers, of different lengths."""
    draw = random.Random(seed)
    text = lambda most: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))
    talk = lambda turns: [{"role": ("user", "assistant")[turn % 2], "content": text(5)} for turn in range(turns)]
    return {
        # A pack takes several.
        "messages": [{"messages": talk(2 if n % 3 else 4)} for n in range(3 * count)],
        "pairs": [{"prompt": text(9) + ":", "completion": " " + text(9)} for _ in range(count)],
        "preferences": [{"prompt": text(9) + ":", "chosen": " " + text(7), "rejected": " no " + text(7)} for _ in range(count)],
    }


def adapter(model, seed, out):
    """As it begins: it changes nothing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(out)
    (out / "README.md").unlink()


# Directories of a model, of the adapter with which it begins, and for whatever a trainer leaves.
Place = collections.namedtuple("Place", "model adapter out")


def trainer_of(kind, settings, data, place, accumulate=ACCUMULATE):
    """That of TRL. Packs are taken one at a time, and pairs of ORPO, which else would count by their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.chat_template = CHATML.read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), place.adapter, is_trainable=True)
    # In fp32 steps of one machine are not those of another.
    model = model.double()
    usual = dict(
        output_dir=place.out, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, max_steps=STEPS, save_strategy="no",
        per_device_train_batch_size=1 if settings.get("packing") or kind == "orpo" else BATCH, gradient_accumulation_steps=accumulate, gradient_checkpointing=False,
        learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.01, max_grad_norm=1.0,
    )
    trainer, config = TRAINERS[kind]
    # Here the last word counts.
    args = config(**{**usual, "max_length": None, **settings})
    return trainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def trained(trainer):
    """Of each step what the trainer logs, and would print."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(steps) == STEPS
    return {key: [step[key] for step in steps] for key in steps[0] if key.split("/")[0] in ("loss", "grad_norm", "learning_rate", "rewards", "logps")}


def main():
    torch.set_num_threads(1)
    check = sys.argv[1:] == ["check"]
    data = rows(5, STEPS * BATCH * ACCUMULATE)
    if not check:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        adapter(MODEL, 7, GOLDEN / "adapter")
        name_base(GOLDEN / "adapter", "byte_level")
    cases = {}
    with tempfile.TemporaryDirectory() as out:
        log = lambda kind, settings, of: trained(trainer_of(kind, settings, data[of], Place(MODEL, GOLDEN / "adapter", out)))
        for name, (settings, of, job) in SFT.items():
            cases[name] = {"rows": of, "job": job, "max_length": settings.get("max_length"), **log("sft", settings, of)}
        for name, settings in DPO.items():
            cases[name] = {"rows": "preferences", "dpo": settings, **log("dpo", settings, "preferences")}
    golden = json.dumps({"trl": trl.__version__, "rows": data, "cases": cases}, ensure_ascii=False) + "\n"
    file = GOLDEN / "expected.json"
    if not check:
        file.write_text(golden)
    differs = file.read_text() != golden
    print(f"TRL {trl.__version__}: {len(cases)} cases, {'they differ' if differs else 'the same' if check else 'written'}")
    return differs


if __name__ == "__main__":
    sys.exit(main())
