"""Makes sequences of rows with TRL, for worker/data/tests/rows.rs. See README.md.

    python rows.py           writes golden/rows of worker/data anew
    python rows.py check     makes them again and compares

Needs TRL (1.16), transformers (5.24) and torch. What is compared is what the trainers of TRL have in `train_dataset`.
"""

import json
import pathlib
import sys
import tempfile

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

HERE = pathlib.Path(__file__).parent
DATA = HERE.parent.parent / "worker" / "data"
ROWS = DATA / "tests" / "golden" / "rows"
MODEL = HERE / "golden" / "foreign" / "byte_level"
TEMPLATES = {
    "chatml": DATA / "src" / "chat" / "templates" / "chatml.jinja",
    "qwen3_training": DATA / "tests" / "golden" / "chat" / "templates" / "qwen3_training.jinja",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALKS = [
    [user("What is 2 + 2?"), assistant("4.")],
    [{"role": "system", "content": "Be brief."}, user("Hello"), assistant("Hi."), user("And now?"), assistant("Nothing, caf\u00e9 \U0001f600.")],
    [user("  one\n\ntwo "), assistant("three\nlines\n")],
    [user("asked twice"), assistant("first"), user("again"), assistant("second"), user("and left open")],
]
PAIRS = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "The sky is ", "completion": "blue, as ever."},
    {"prompt": "Ends itself", "completion": " here<|eot_id|>"},
    {"prompt": "", "completion": "without a question"},
    {"prompt": "caf\u00e9\n", "completion": "\U0001f600\n\n"},
]
ASKED = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS[:3]]
PREFERRED = [
    {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [assistant("no " * (n + 1))]} for n, talk in enumerate(TALKS[:3])
]
# What TRL is given, how it is called in fleet's rows, and what the job says.
CASES = {
    "text": {"rows": [{"text": "One text."}, {"text": "It ends.<|eot_id|>"}, {"text": "\u00fc " * 20}], "format": "text"},
    "pairs": {"rows": PAIRS, "format": "prompt_completion"},
    "pairs_all": {"rows": PAIRS, "format": "prompt_completion", "loss_on": "all"},
    "messages": {"rows": [{"messages": talk} for talk in TALKS], "format": "messages", "chat_template": "chatml"},
    "messages_all": {"rows": [{"messages": talk} for talk in TALKS], "format": "messages", "chat_template": "chatml", "loss_on": "all"},
    "messages_qwen3": {"rows": [{"messages": talk} for talk in TALKS], "format": "messages", "chat_template": "qwen3_training"},
    "asked": {"rows": ASKED, "format": "prompt_completion", "chat_template": "chatml"},
    "asked_qwen3": {"rows": ASKED, "format": "prompt_completion", "chat_template": "qwen3_training"},
    "preferred": {"rows": PREFERRED, "format": "preference", "chat_template": "chatml"},
    "preferred_text": {
        "rows": [{"prompt": "A good", "chosen": " day", "rejected": " grief, no"}, {"prompt": "One ", "chosen": "two", "rejected": "three"}],
        "format": "preference",
    },
    "implicit": {"rows": [{"chosen": talk, "rejected": [*talk[:-1], assistant("no")]} for talk in TALKS[:3]], "format": "preference", "chat_template": "chatml"},
    "implicit_text": {"rows": [{"chosen": "It is so good", "rejected": "It is so bad"}], "format": "preference"},
}
LENGTHS = [(n * 37) % 61 + 3 for n in range(40)]


def made(case, tokenizer, out):
    """Ids and mask of each sequence, as texts of digits."""
    rows = Dataset.from_list(case["rows"])
    template = case.get("chat_template")
    tokenizer.chat_template = TEMPLATES[template].read_text() if template else None
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    usual = {"output_dir": out, "report_to": [], "use_cpu": True, "max_length": None, "disable_tqdm": True}
    line = lambda ids, mask: {"ids": " ".join(map(str, ids)), "mask": "".join(map(str, mask))}
    if case["format"] == "preference":
        trainer = DPOTrainer(model=model, args=DPOConfig(**usual), train_dataset=rows, processing_class=tokenizer)
        both = [[row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")] for row in trainer.train_dataset]
        first = [len(row["prompt_ids"]) for row in trainer.train_dataset]
        return [[line(ids, [int(at >= n) for at in range(len(ids))]) for ids in pair] for pair, n in zip(both, first)]
    is_all = case.get("loss_on") == "all"
    args = SFTConfig(
        **usual,
        assistant_only_loss=case["format"] == "messages" and not is_all,
        completion_only_loss=False if is_all and case["format"] == "prompt_completion" else None,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    found = []
    for row in trainer.train_dataset:
        found.append([line(row["input_ids"], [int(label != -100) for label in row["labels"]])])
    return found


def packs():
    """Which examples share a sequence of 64 tokens, by the value of all their tokens."""
    rows = Dataset.from_dict({"input_ids": [[n] * length for n, length in enumerate(LENGTHS)]})
    packed = trl.pack_dataset(rows, 64, strategy="bfd")
    return [list(dict.fromkeys(row["input_ids"])) for row in packed]


def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as out:
        cases = {name: {**case, "expected": made(case, tokenizer, out)} for name, case in CASES.items()}
    golden = {"trl": trl.__version__, "cases": cases, "lengths": LENGTHS, "packs": packs()}
    text = json.dumps(golden, ensure_ascii=False, indent=1) + "\n"
    file = ROWS / "expected.json"
    differs = sys.argv[1:] == ["check"] and file.read_text() != text
    if sys.argv[1:] != ["check"]:
        ROWS.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    print(f"TRL {trl.__version__}: {len(cases)} cases, {'they differ' if differs else 'the same' if sys.argv[1:] else 'written'}")
    return differs


if __name__ == "__main__":
    sys.exit(main())
