"""Makes a small model of every family and of every way to stretch rotary embeddings, and what transformers computes with it.

    /tmp/parity/bin/python families.py [--seed N] [--out DIR]

Without arguments it writes the golden files of golden/families; the environment is that of generate.py.
"""

import argparse
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
STEPS, BATCH, SEQUENCE, VOCAB = 20, 2, 24, 64
HYPER = dict(learning_rate=2e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)

SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.08,
)
OPT = dict(
    vocab_size=VOCAB, hidden_size=32, ffn_dim=56, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    word_embed_proj_dim=32, dropout=0.0, init_std=0.08,
)
ROPE = dict(rope_theta=300.0, original_max_position_embeddings=16)

MODELS = {
    "llama": ("llama", dict(SHAPE, attention_bias=True, mlp_bias=True, head_dim=10)),
    "llama_linear": ("llama", dict(SHAPE, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=300.0))),
    "llama_dynamic": ("llama", dict(SHAPE, max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=300.0))),
    "llama_llama3": ("llama", dict(SHAPE, rope_parameters=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ROPE))),
    "llama_yarn": ("llama", dict(SHAPE, rope_parameters=dict(rope_type="yarn", factor=4.0, beta_fast=4.0, **ROPE))),
    "mistral": ("mistral", dict(SHAPE, sliding_window=7, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen3": ("qwen3", dict(SHAPE, head_dim=12, attention_bias=False, tie_word_embeddings=True)),
    "phi": ("phi", dict(SHAPE, rope_parameters=dict(rope_type="default", rope_theta=300.0, partial_rotary_factor=0.5))),
    "phi_normed": ("phi", dict(SHAPE, qk_layernorm=True, num_key_value_heads=4)),
    "gpt2": ("gpt2", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "opt": ("opt", dict(OPT)),
    "opt_last": ("opt", dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=20, activation_function="gelu")),
    "bloom": ("bloom", dict(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6, initializer_range=0.08)),
}


def model_of(name, seed):
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=None, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():  # biases and norms away from where they begin, so that a wrong one is seen
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def train(model, batches, parameters=None, with_gradients=lambda: None, decay=None):
    parameters = list(model.parameters()) if parameters is None else parameters
    decay = [p for p in parameters if p.dim() > 1] if decay is None else decay
    plain = [p for p in parameters if not any(p is other for other in decay)]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=HYPER["weight_decay"]), dict(params=plain, weight_decay=0.0)],
        lr=HYPER["learning_rate"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"],
    )
    losses, norms = [], []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        with_gradients()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, HYPER["max_grad_norm"]).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def gradients(model, batch):
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    return {name: p.grad.float().contiguous() for name, p in model.named_parameters()}


def make(name, seed, out):
    model = model_of(name, seed)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    model = model.double()  # so that what differs is fleet's own rounding
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, VOCAB, (2, 40), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        loss = model(input_ids=ids, labels=ids).loss
        greedy = ids[:1, :8]
        for _ in range(12):  # without a cache, which old families fill with more than a sum in another order
            greedy = torch.cat([greedy, model(input_ids=greedy).logits[:, -1:].argmax(-1)], 1)
    grads = gradients(model, ids)
    start = torch.randint(0, VOCAB, (STEPS, BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (STEPS, BATCH, 1), generator=generator)
    batches = (start + stride * torch.arange(SEQUENCE)) % VOCAB
    # A new one: transformers' dynamic rotary embeddings remember the longest sequence.
    losses, norms = train(model_of(name, seed).double(), batches)
    f64 = lambda list: torch.tensor(list, dtype=torch.float64)
    save_file(
        dict(ids=ids, logits=logits.contiguous(), loss=f64([loss.item()]), greedy=greedy.contiguous(), batches=batches.contiguous(),
             losses=f64(losses), grad_norms=f64(norms), **{f"grad.{name}": grad for name, grad in grads.items()}),
        out / "expected.safetensors",
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "golden" / "families")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.out, ignore_errors=True)
    for name in MODELS:
        make(name, args.seed, args.out / name)
    (args.out / "hyper.json").write_text(json.dumps(HYPER, indent=2) + "\n")


if __name__ == "__main__":
    main()
