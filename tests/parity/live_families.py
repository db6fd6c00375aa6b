"""Models of every family, for live.py: logits, an evaluation, twenty steps on two ranks, and the checkpoint."""

import json

import families
import torch
from eval import score
from program import apart, logits_of, model_in, relative

STEPS, WINDOWS, WINDOW = 20, 4, 24
CASES = families.MODELS
BOUNDS = {"logits": 1e-5, "eval loss": 1e-5, "losses": 1e-4, "norms": 1e-4, "own logits": 1e-5, "trained": 1e-3}


def tokenizer_json():
    """A word for each token; the last one ends a text."""
    vocab = {f"w{i}": i for i in range(families.VOCAB - 1)} | {"</s>": families.VOCAB - 1}
    end = dict(id=families.VOCAB - 1, content="</s>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None, added_tokens=[end], normalizer=None, pre_tokenizer=dict(type="WhitespaceSplit"),
        post_processor=None, decoder=None, model=dict(type="WordLevel", vocab=vocab, unk_token="</s>"),
    ))


def draw(name, seed, folder):
    """A model of its family with a tokenizer, in `folder`, and in fp64."""
    model = families.model_of(name, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")))
    return model.double().eval()


def documents(generator, file):
    """Some forty of different lengths, which together fill the windows of one batch: the order of a batch says nothing. Their tokens."""
    end, total = families.VOCAB - 1, WINDOWS * WINDOW
    stream, texts = [], []
    while len(stream) < total:
        length = min(1 + (len(texts) * 7) % 4, total - len(stream) - 1)
        if total - len(stream) - 1 - length == 1:
            length += 1
        words = torch.randint(0, end, (length,), generator=generator).tolist()
        texts.append(" ".join(f"w{word}" for word in words))
        stream += [*words, end]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert len(texts) >= 20 and len(stream) == total, (len(texts), len(stream))
    return stream


def job(seed, folder, data, steps=STEPS, **more):
    """Of two ranks, the same batch in every step."""
    hyper = families.HYPER
    optimizer = dict(schedule="constant", warmup_steps=0, **{key: hyper[key] for key in ("learning_rate", "weight_decay", "beta1", "beta2", "eps", "max_grad_norm")})
    return dict(
        batch_size=WINDOWS // 2, max_seq_len=WINDOW, max_steps=steps, seed=seed, model=dict(path=str(folder)), data=dict(path=str(data)),
        optimizer=optimizer, **more,
    )


def compare(name, seed, fleet):
    """One line of the table: its name, each measure's largest difference, and what transformers said of the checkpoint."""
    folder, data = fleet.out / "model", fleet.out / "data.jsonl"
    model = draw(name, seed, folder)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, families.VOCAB, (2, 40), generator=generator)
    far = {"logits": apart(fleet.logits(folder, ids), logits_of(model, ids))}

    stream = documents(generator, data)
    args = ["eval", "--model", folder, "--data", data, "--max-seq-len", WINDOW, "--device", "cpu", "--json"]
    # A new one: transformers' dynamic rotary embeddings remember the longest sequence.
    found, want = json.loads(fleet(*args)), score(families.model_of(name, seed).double().eval(), stream, WINDOW)
    far["eval loss"] = abs(found["loss"] - want["loss"])
    if (found["tokens"], round(found["accuracy"] * found["tokens"])) != (want["tokens"], round(want["accuracy"] * want["tokens"])):
        far["eval loss"] = float("inf")

    run = fleet.launch(2, job(seed, folder, data))
    trained = families.model_of(name, seed).double()
    losses, norms = families.train(trained, [torch.tensor(stream).view(WINDOWS, WINDOW)] * STEPS)
    far["losses"], far["norms"] = relative(run.losses, losses), relative(run.norms, norms)

    loaded, said = model_in(run.checkpoint)
    own = logits_of(loaded, ids)
    far["own logits"] = apart(fleet.logits(run.checkpoint, ids), own)
    far["trained"] = apart(own, logits_of(trained.eval(), ids))
    yield name, far, said
