"""The PyTorch side of the GPU benchmark: the same Llama in transformers, autocast to bf16, fused AdamW, clipping.

    pytorch.py MODEL BATCH SEQ STEPS eager|compile
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

model_name, batch, seq, steps, mode = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
began = time.time()
SHAPES = {
    "124m": (768, 2048, 12, 12, 12, 50304, True),
    "1b": (2048, 5632, 22, 32, 4, 32000, False),
    "tiny": (64, 128, 2, 4, 2, 256, False),
}
h, f, layers, heads, kv, vocab, tied = SHAPES[model_name]
torch.backends.cuda.matmul.allow_tf32 = True
config = LlamaConfig(
    vocab_size=vocab, hidden_size=h, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
    tie_word_embeddings=tied, max_position_embeddings=4096, use_cache=False, attn_implementation="sdpa",
)
with torch.device("cuda"):
    model = LlamaForCausalLM(config).float()
step_model = torch.compile(model) if mode == "compile" else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
ids = torch.randint(0, vocab, (batch, seq), device="cuda")


def step():
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = step_model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


loss = step().item()
print(f"first step after {time.time() - began:.2f} s, loss {loss:.4f}", flush=True)
for _ in range(4):
    step()
torch.cuda.synchronize()
at = time.time()
for _ in range(steps):
    step()
torch.cuda.synchronize()
per_step = (time.time() - at) / steps
print(
    f"pytorch {mode} {model_name} batch {batch} x {seq}: {batch * seq / per_step:.0f} tokens/s, {per_step * 1e3:.1f} ms a step, "
    f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True,
)
