"""Writes golden/eval.json: documents, and how well transformers finds that models of golden/foreign predict them.

    python eval.py            makes it anew (transformers 5)

`fleet eval` must find the same: tests/tests/eval.rs.
"""

import json
import pathlib

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = "the harbour was quiet in winter a lantern slowly crossed river nobody heard letters fall machines learned to count caf\u00e9".split()
WINDOW = 40


def documents():
    state, texts = 7, []
    for number in range(30):
        words = []
        for _ in range(5 + number % 17):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        texts.append(" ".join(words).capitalize() + ("." if number % 3 else "!\n"))
    return texts


def stream(folder, texts):
    """What the post-processor puts around each document, and its end."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
    if end is None:
        ends = json.loads((folder / "config.json").read_text())["eos_token_id"]
        end = ends[0] if isinstance(ends, list) else ends
    else:
        end = tokenizer.token_to_id(end if isinstance(end, str) else end["content"])
    ids = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, end]
    return ids


def score(model, ids, window):
    """Mean loss in nats, share of targets that are the likeliest, targets; windows follow each other, and the last one may be shorter."""
    loss, hits, targets = 0.0, 0, 0
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start : start + window]])
        if part.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=part).logits[0, :-1]
        wanted = part[0, 1:]
        loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        hits += (logits.argmax(-1) == wanted).sum().item()
        targets += len(wanted)
    return dict(loss=loss / targets, accuracy=hits / targets, tokens=targets)


def main():
    texts = documents()
    models = {}
    for name in ("byte_level", "metaspace", "legacy"):
        folder = GOLDEN / "foreign" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        models[name] = score(model, stream(folder, texts), WINDOW)
    golden = dict(documents=texts, max_seq_len=WINDOW, models=models)
    (GOLDEN / "eval.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
