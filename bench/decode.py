"""Greedy generation token by token: `fleet-rank generate` beside transformers' `generate`, in turn; the README beside it says how.

One text, and several at once (`--batch`). Both read the same directories, which are made here with random weights, in fp32 and in bf16, and compute in fp32 with as many threads as there are cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The quick brown fox"
NO_END = {"bos_token_id": None, "eos_token_id": None}


def llama_13m():
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                                        num_attention_heads=6, max_position_embeddings=1024, **NO_END))


def gpt2_124m():
    return GPT2LMHeadModel(GPT2Config(**NO_END))


def make(model, dtype, path):
    """The model's directory, with a tokenizer that has a token for each byte, and names for the others."""
    model.to(dtype).save_pretrained(path)
    model.float()
    size, letters = model.config.vocab_size, sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"<{number}>" for number in range(size - len(letters))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def prompts(count):
    """Of equal length, so that the peer pads none."""
    return [PROMPT[at:] + PROMPT[:at] for at in range(count)]


def fleet(program, path, tokens, count):
    command = [program, "generate", "--model", path, "--max-new-tokens", tokens, "--temperature", 0, "--batch", count, "--json"]
    command += [word for prompt in prompts(count) for word in ("--prompt", prompt)]
    lines = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    done = list(map(json.loads, lines))
    assert all(text["new_tokens"] == tokens for text in done), done
    return sum(text["tokens_per_s"] for text in done), [text["text"] for text in done]


def peer(model, tokenizer, tokens, count):
    ids = torch.tensor([tokenizer.encode(prompt).ids for prompt in prompts(count)])
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True)
    elapsed = time.perf_counter() - start
    assert out.shape[1] == ids.shape[1] + tokens
    return count * tokens / elapsed, [tokenizer.decode(text[ids.shape[1]:].tolist()) for text in out]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", type=Path, default=ROOT / "target/debug", help="folder of fleet's programs")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tokens", type=int, default=100)
    options.add_argument("--batch", type=int, default=8, help="texts at once, besides one alone")
    arguments = options.parse_args()
    torch.set_num_threads(os.cpu_count())
    print(f"{os.cpu_count()} threads, {arguments.tokens} tokens, {arguments.rounds} rounds in turn; load average {os.getloadavg()[0]:.1f}")
    print("| model | written as | texts | fleet tokens/s | transformers tokens/s | ratio, median (range) | same texts |\n|---|---|---|---|---|---|---|")
    for make_model, dtype, count in product((llama_13m, gpt2_124m), (torch.float32, torch.bfloat16), (1, arguments.batch)):
        torch.manual_seed(0)
        model = make_model().eval()
        with tempfile.TemporaryDirectory(prefix="fleet-decode-") as path:
            tokenizer = make(model, dtype, Path(path))
            peer(model, tokenizer, 5, count)
            rounds = [(fleet(arguments.bin / "fleet-rank", path, arguments.tokens, count), peer(model, tokenizer, arguments.tokens, count))
                      for _ in range(arguments.rounds)]
        ours, theirs = ([round[side][0] for round in rounds] for side in (0, 1))
        ratios = [a / b for a, b in zip(ours, theirs)]
        same = sum(a == b for a, b in zip(rounds[0][0][1], rounds[0][1][1]))
        print(f"| {make_model.__name__} | {str(dtype)[6:]} | {count} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} "
              f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {same} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
