"""Makes and checks the tiny models of others in golden/foreign: what fleet must make of the files that people have.

    python foreign.py            makes them anew (transformers 5)
    python foreign.py check      generates again and compares, in whatever version of transformers this is
    python foreign.py load DIR   loads a checkpoint of fleet as its users would, and prints what they get

Each directory is a whole model; expected.json has prompts with their ids, the greedy ids behind them and the text of those. See README.md.
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOREIGN = pathlib.Path(__file__).parent / "golden" / "foreign"
TEXT = (
    "The harbour was quiet in winter. A lantern slowly crossed the river; nobody heard the letters fall.\n"
    "Machines learned to count: one, two, three, and the northern light went over the stones.\n"
) * 20
PROMPTS = ["The river", "the lantern slowly", "winter\n\nlight", "", "  two spaces", "caf\u00e9 \u20ac5 \U0001f600"]
NEW = 24


def train(tokenizer, special, byte_level=False, vocab_size=340):
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def begin(token, token_id):
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)])


def sentence_piece(legacy):
    """As the converted tokenizers of Llama 1 and 2: pieces with U+2581 for a space, a token for each byte."""
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    # No piece has a line's end, so that one is written as a byte.
    model = json.loads(train(trained, names, vocab_size=380).to_str())["model"]
    vocab = {token: i for i, token in enumerate(token for token in model["vocab"] if token != "\n")}
    merges = [tuple(merge) for merge in model["merges"] if "\n" not in "".join(merge)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    if legacy:
        tokenizer.normalizer = trained.normalizer
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    tokenizer.post_processor = begin("<s>", 1)
    return tokenizer


def byte_level():
    """As that of Llama 3, with the truncation and padding of somebody's training left in it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], byte_level=True)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin("<|begin_of_text|>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=12, pad_id=2, pad_token="<|eot_id|>")
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("\u2581", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def model_of(tokenizer, seed, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=96, initializer_range=0.6, bos_token_id=1, eos_token_id=2, **more,
    )
    return LlamaForCausalLM(config).eval()


def change(path, **values):
    """Sets keys of a JSON file; `...` takes one out."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}, indent=2) + "\n")


def generate(folder, eos=...):
    """What transformers makes of each prompt."""
    config = json.loads((folder / "config.json").read_text())
    # Versions before 5 do not know of these parameters, and fail at the null.
    old = transformers.__version__ < "5" and "rope_parameters" in config
    rope = dict(rope_theta=config["rope_parameters"]["rope_theta"]) if old else {}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **rope)
    more = {} if eos is ... else dict(eos_token_id=eos)
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            continue
        with torch.no_grad():
            out = model.generate(
                ids.long(), attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **more
            )[0]
        new = out[ids.shape[1] :].tolist()
        # What ends a text is no part of it, be it special or, as here, not.
        ends = model.generation_config.eos_token_id if eos is ... else []
        out = out[:-1] if new[-1] in (ends if isinstance(ends, list) else [ends]) else out
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        text = tokenizer.decode(out, skip_special_tokens=True)
        # A byte that no character comes of spoils the run of bytes that it stands in, which the prompt may have begun.
        text = text[len(before) :] if text.startswith(before) else tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
        cases.append(dict(prompt=prompt, prompt_ids=ids[0].tolist(), new_ids=new, text=text))
    return cases


def usual_end(folder, at):
    """A token that ends several of the texts when it is made an end: the one at this place of the first text."""
    return generate(folder, eos=None)[0]["new_ids"][at]


def make():
    shutil.rmtree(FOREIGN, ignore_errors=True)
    old_style = dict(rope_parameters=..., rope_theta=10000.0, rope_scaling=None, dtype=..., torch_dtype="float32", head_dim=None)

    def start(name, tokenizer, model, **save):
        folder = FOREIGN / name
        model.save_pretrained(folder, **save)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        return folder

    # Several ends in config.json, no generation config, weights in shards, a head of its own.
    tokenizer = sentence_piece(legacy=False)
    folder = start("metaspace", tokenizer, model_of(tokenizer, 1), max_shard_size="25KB")
    (folder / "generation_config.json").unlink()
    change(
        folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        add_bos_token=True, add_eos_token=False, legacy=False, clean_up_tokenization_spaces=False,
    )
    change(folder / "config.json", **old_style)
    change(folder / "config.json", eos_token_id=[2, usual_end(folder, 9)])

    # Ends in generation_config.json alone, weights in bf16, the head tied to the embedding, tokens of the older special_tokens_map.json.
    tokenizer = sentence_piece(legacy=True)
    folder = start("legacy", tokenizer, model_of(tokenizer, 2, tie_word_embeddings=True).to(torch.bfloat16))
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    change(folder / "special_tokens_map.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    change(folder / "config.json", **old_style)
    change(folder / "config.json", torch_dtype="bfloat16", pad_token_id=-1)
    change(folder / "generation_config.json", eos_token_id=[2, usual_end(folder, 7)])

    # As transformers 5 writes it: the rotary base among parameters. Nulls beside them, as converters leave them.
    tokenizer = byte_level()
    rope = dict(rope_type="default", rope_theta=500000.0)
    folder = start("byte_level", tokenizer, model_of(tokenizer, 3, rope_parameters=rope))
    change(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", clean_up_tokenization_spaces=True, model_max_length=96,
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}")
    change(folder / "config.json", bos_token_id=0, eos_token_id=1, rope_theta=None, rope_scaling=None)
    change(folder / "generation_config.json", bos_token_id=0, eos_token_id=[1, 2, usual_end(folder, 12)])

    # A list of pieces with scores. No begin, and no end but the one of the defaults.
    tokenizer = unigram()
    folder = start("unigram", tokenizer, model_of(tokenizer, 4))
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", unk_token="<unk>")

    for folder in sorted(FOREIGN.iterdir()):
        cases = generate(folder)
        change(folder / "expected.json", made_with=transformers.__version__, cases=cases)
        print(folder.name, [len(case["new_ids"]) for case in cases])


def check():
    for folder in sorted(FOREIGN.iterdir()):
        expected = json.loads((folder / "expected.json").read_text())["cases"]
        for want, got in zip(expected, generate(folder), strict=True):
            for key in want:
                if want[key] != got[key]:
                    print(f"{folder.name} {want['prompt']!r} {key}: {got[key]} here, {want[key]} in the file")
    print("compared with transformers", transformers.__version__)


def load(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
    print(json.dumps(dict(
        transformers=transformers.__version__, tokens=len(tokenizer), vocab_size=model.config.vocab_size, ids=ids[0].tolist(),
        bos=tokenizer.bos_token, eos=tokenizer.eos_token, config_eos=model.config.eos_token_id,
        ends=model.generation_config.eos_token_id, chat=tokenizer.chat_template, dtype=str(model.dtype),
        logits=[round(x, 4) for x in logits[:6].tolist()], new=out[ids.shape[1] :].tolist(),
        text=tokenizer.decode(out, skip_special_tokens=True),
    )))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            make()
        case ["check"]:
            check()
        case ["load", folder]:
            load(folder)
        case _:
            sys.exit(__doc__)
