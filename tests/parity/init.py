"""Writes how transformers draws the fresh weights of a model of every family: golden/init.json, with the mean and the deviation of every parameter.

    /tmp/parity/bin/python init.py

The environment is that of generate.py.
"""

import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).parent
LLAMA = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128, initializer_range=0.05,
)
MODELS = {
    "llama": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi": {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(qk_layernorm=True, num_key_value_heads=4),
    "gpt2": dict(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=128, initializer_range=0.05),
    "opt": dict(
        vocab_size=300, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=48, init_std=0.05,
    ),
    "bloom": dict(vocab_size=300, hidden_size=64, n_layer=3, n_head=4, initializer_range=0.05),
}


def main():
    golden = {}
    for kind, settings in MODELS.items():
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(kind, pad_token_id=None, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        drawn = {
            name: [round(p.mean().item(), 6), round(p.std(correction=0).item(), 6)] for name, p in model.named_parameters()
        }
        golden[kind] = dict(config=settings, drawn=drawn)
    (HERE / "golden" / "init.json").write_text(json.dumps(golden, indent=1) + "\n")


main()
