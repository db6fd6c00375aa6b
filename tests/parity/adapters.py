"""Makes adapters of some of the golden families with PEFT, and what it computes with them.

    /tmp/parity/bin/pip install peft==0.18.0 && /tmp/parity/bin/python adapters.py [--seed N] [--out DIR]

Without arguments it writes the golden files of golden/adapters; the environment is that of generate.py, with PEFT.
"""

import argparse
import json
import pathlib
import shutil

import families
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
FAMILIES = HERE / "golden" / "families"

# The family's directory, and what PEFT is asked for.
CASES = {
    "lora": ("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "rslora_patterns": ("qwen2", dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", bias="lora_only",
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.k_proj": 6}, alpha_pattern={"q_proj": 3, "k_proj|o_proj": 9},
    )),
    "dora": ("mistral", dict(r=3, lora_alpha=6, use_dora=True, target_modules="all-linear")),
    "saved_modules": ("qwen2", dict(r=2, lora_alpha=4, target_modules=["o_proj", "gate_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "transposed": ("gpt2", dict(r=4, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "transposed_dora": ("gpt2", dict(r=4, lora_alpha=4, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "by_head": ("bloom", dict(r=4, lora_alpha=8, target_modules=["query_key_value", "dense_h_to_4h"])),
    "by_head_dora": ("bloom", dict(r=4, lora_alpha=8, use_dora=True, target_modules=["query_key_value"])),
    "embedding": ("qwen2", dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "down_proj", "lm_head"])),
    # PEFT changes what the embedding reads and not what the head, which is the same matrix, does: one model cannot be made of both.
    "tied_embedding": ("opt", dict(r=4, lora_alpha=8, target_modules=["embed_tokens"])),
    "some_layers": ("qwen3", dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
}


def make(name, seed, out):
    family, settings = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(FAMILIES / family, attn_implementation="eager").double()
    expected = load_file(FAMILIES / family / "expected.safetensors")
    ids = expected["ids"][:1, :24].contiguous()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    whole = expected["logits"][:1, :24].double()
    assert (before - whole).abs().max() < 1e-4 * whole.abs().max(), f"{name}: {family} is read as another model"
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():  # away from where they begin, which changes nothing
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(torch.randn_like(parameter) * 0.1)
    folder = out / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.float().contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = get_peft_model_again(family, folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (logits - before).abs().max() > 1e-2, f"{name}: the adapter changes nothing"
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = family
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if name != "tied_embedding":
        train(family, folder)
    save_file(dict(ids=ids, logits=logits.float().contiguous(), merged=merged.float().contiguous()), folder / "expected.safetensors")


def get_peft_model_again(family, folder, **settings):
    """As a user loads it: from the file, in fp64."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(FAMILIES / family, attn_implementation="eager").double()
    return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False, **settings).double().eval()


def train(family, folder):
    """Twenty steps from there, with what the file has, and the gradients of the first one."""
    model = get_peft_model_again(family, folder, is_trainable=True)
    in_file = load_file(folder / "adapter_model.safetensors")
    trained = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".default", "").replace(".modules_to_save", "").replace("magnitude_vector.weight", "magnitude_vector")
        parameter.requires_grad_(parameter.requires_grad and plain in in_file)
        if parameter.requires_grad:
            trained[plain] = parameter
    # PEFT writes an embedding that is changed, and the head, as they were, too.
    assert trained.keys() == {key for key in in_file if "base_layer" not in key}, folder
    batches = load_file(FAMILIES / family / "expected.safetensors")["batches"]
    grads = {}

    def keep_first():
        if not grads:
            grads.update({f"grad.{name}": p.grad.float().contiguous() for name, p in trained.items()})

    # As transformers' Trainer has it: biases and norms do not decay, magnitudes do.
    decaying = [p for name, p in trained.items() if p.dim() > 1 or "magnitude" in name]
    losses, norms = families.train(model, batches, list(trained.values()), keep_first, decaying)
    of_steps = dict(losses=torch.tensor(losses, dtype=torch.float64), grad_norms=torch.tensor(norms, dtype=torch.float64))
    save_file(dict(batches=batches, **of_steps, **grads), folder / "training.safetensors")


def combine(seed, adapters, out):
    """A second adapter of the base of "lora", and what PEFT makes of both."""
    from peft import PeftModel

    family, first = CASES["lora"][0], adapters / "lora"
    base = AutoModelForCausalLM.from_pretrained(FAMILIES / family, attn_implementation="eager")
    torch.manual_seed(seed)
    settings = dict(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(out / "other")
    base = AutoModelForCausalLM.from_pretrained(FAMILIES / family, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, first, adapter_name="first")
    model.load_adapter(out / "other", adapter_name="other")
    for kind in ["cat", "linear"]:
        model.add_weighted_adapter(["first", "other"], [0.7, 0.3], kind, combination_type=kind)
        model.save_pretrained(out, selected_adapters=[kind])
    (out / "README.md").unlink(missing_ok=True)
    for folder in out.iterdir():
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = family
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "golden" / "adapters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.out, ignore_errors=True)
    for name in CASES:
        make(name, args.seed, args.out)
    combined = args.out.with_name("combined")
    shutil.rmtree(combined, ignore_errors=True)
    combine(args.seed, args.out, combined)


if __name__ == "__main__":
    main()
