"""Makes the golden files that fleet's parity tests compare against, with PyTorch and Hugging Face transformers.

    python3 -m venv /tmp/parity && /tmp/parity/bin/pip install -r requirements.txt && /tmp/parity/bin/python generate.py

The files are committed; nobody needs this environment to run the tests. See README.md for what is in them.
"""

import json
import math
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
STEPS, BATCH, SEQUENCE = 20, 4, 32
SCALE_LOG2 = 22
HYPER = dict(
    learning_rate=3e-3, warmup_steps=4, total_steps=STEPS, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
)

MODELS = {
    # Grouped-query attention, own head, head_dim differing from hidden_size / heads.
    "gqa": dict(num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, rope_theta=10000.0),
    # As many key-value heads as heads, head tied to the embedding.
    "tied": dict(num_key_value_heads=4, head_dim=16, tie_word_embeddings=True, rope_theta=500000.0),
}


def model_of(name):
    torch.manual_seed(1234)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.05, bos_token_id=0, eos_token_id=1,
        attention_bias=False, mlp_bias=False, attn_implementation="eager", **MODELS[name],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # norm weights away from 1, so that a wrong one is seen
        for key, value in model.named_parameters():
            if "norm" in key:
                value.add_(torch.randn_like(value) * 0.1)
    return model.float()


def learning_rate(step):
    """Hugging Face's cosine schedule with linear warm-up; `step` counts from 0."""
    warmup, total = HYPER["warmup_steps"], HYPER["total_steps"]
    if step < warmup:
        return HYPER["learning_rate"] * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return HYPER["learning_rate"] * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


KINDS = ("fp32", "bf16", "fp16", "bf16_true")


def train(name, kind):
    """`kind`: fp32; bf16 and fp16 as autocast computes in them, fp16 with a loss scale that is too large at first; bf16_true is a model in bf16."""
    model = model_of(name)
    if kind == "bf16_true":
        model = model.bfloat16()
    autocast = dict(bf16=torch.bfloat16, fp16=torch.float16).get(kind)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=HYPER["weight_decay"]), dict(params=plain, weight_decay=0.0)],
        # Of numbers in bf16 the fused kernel computes in fp32 and rounds once.
        lr=0.0, betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"], fused=kind == "bf16_true",
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**SCALE_LOG2, enabled=kind == "fp16")
    # Learnable text: each sequence counts up from a random start with a random stride, with some noise.
    generator = torch.Generator().manual_seed(99)
    start = torch.randint(0, 256, (STEPS, BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (STEPS, BATCH, 1), generator=generator)
    batches = (start + stride * torch.arange(SEQUENCE)) % 256
    noise = torch.rand(batches.shape, generator=generator) < 0.05
    batches = torch.where(noise, torch.randint(0, 256, batches.shape, generator=generator), batches)
    losses, norms, rates, scales = [], [], [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(input_ids=batches[step], labels=batches[step]).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), HYPER["max_grad_norm"])
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        losses.append(loss.item())
        norms.append(norm.item())
        rates.append(learning_rate(step))
    tensors = dict(
        batches=batches.contiguous(),
        losses=torch.tensor(losses, dtype=torch.float64),
        grad_norms=torch.tensor(norms, dtype=torch.float64),
        learning_rates=torch.tensor(rates, dtype=torch.float64),
    )
    if kind == "fp16":
        # After each step; the norm of one that was skipped is no number.
        tensors["scales"] = torch.tensor(scales, dtype=torch.float64)
    return tensors


def main():
    torch.set_num_threads(1)
    golden = HERE / "golden"
    for name in MODELS:
        shutil.rmtree(golden / name, ignore_errors=True)
        model = model_of(name).eval()
        out = golden / name
        model.save_pretrained(out)
        (out / "generation_config.json").unlink(missing_ok=True)
        input_ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits
            greedy = model.generate(input_ids[:1, :8], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        save_file(dict(input_ids=input_ids, logits=logits.contiguous(), greedy=greedy.contiguous()), out / "logits.safetensors")
        for kind in KINDS:
            save_file(train(name, kind), out / f"train_{kind}.safetensors")
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, cpu=torch.backends.cpu.get_cpu_capability())
    (golden / "hyper.json").write_text(json.dumps(dict(**HYPER, made_with=versions), indent=2) + "\n")


if __name__ == "__main__":
    main()
