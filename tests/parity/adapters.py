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
from peft import LoraConfig, PeftModel, get_peft_model
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


def opened(base):
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").double()


def draw(base, settings, seed, folder):
    """An adapter of the model in `base`, away from where adapters begin, which changes nothing."""
    torch.manual_seed(seed)
    model = get_peft_model(opened(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.float().contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make(name, seed, out):
    family, settings = CASES[name]
    base, folder = FAMILIES / family, out / name
    expected = load_file(base / "expected.safetensors")
    ids = expected["ids"][:1, :24].contiguous()
    with torch.no_grad():
        before = opened(base)(input_ids=ids).logits
    whole = expected["logits"][:1, :24].double()
    assert (before - whole).abs().max() < 1e-4 * whole.abs().max(), f"{name}: {family} is read as another model"
    draw(base, settings, seed, folder)
    model = loaded(base, folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (logits - before).abs().max() > 1e-2, f"{name}: the adapter changes nothing"
    name_base(folder, family)
    if name != "tied_embedding":
        save_file(of_training(base, folder, expected["batches"]), folder / "training.safetensors")
    save_file(dict(ids=ids, logits=logits.float().contiguous(), merged=merged.float().contiguous()), folder / "expected.safetensors")


def name_base(folder, family):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = family
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def loaded(base, folder, **settings):
    """As a user loads it: from the file, in fp64."""
    return PeftModel.from_pretrained(opened(base), folder, autocast_adapter_dtype=False, **settings).double().eval()


def parameters(model):
    """By the names that they have in files."""
    plain = lambda name: name.replace(".default", "").replace(".modules_to_save", "").replace("magnitude_vector.weight", "magnitude_vector")
    return {plain(name): parameter for name, parameter in model.named_parameters()}


def train(base, folder, batches, with_gradients=lambda trained: None):
    """The model, losses and norms of a step with each batch, on from what the file has. Gradients are told by the names in it."""
    model = loaded(base, folder, is_trainable=True)
    in_file = load_file(folder / "adapter_model.safetensors")
    for name, parameter in parameters(model).items():
        parameter.requires_grad_(parameter.requires_grad and name in in_file)
    trained = {name: parameter for name, parameter in parameters(model).items() if parameter.requires_grad}
    # PEFT writes an embedding that is changed, and the head, as they were, too.
    assert trained.keys() == {key for key in in_file if not key.endswith("base_layer.weight")}, folder
    # As transformers' Trainer has it: biases and norms do not decay, magnitudes do.
    decaying = [p for name, p in trained.items() if p.dim() > 1 or "magnitude" in name]
    losses, norms = families.train(model, batches, list(trained.values()), lambda: with_gradients(trained), decaying)
    return model, losses, norms


def of_training(base, folder, batches):
    """Twenty steps from there, and the gradients of the first one."""
    grads = {}

    def keep_first(trained):
        if not grads:
            grads.update({f"grad.{name}": p.grad.float().contiguous() for name, p in trained.items()})

    _, losses, norms = train(base, folder, batches, keep_first)
    of_steps = dict(losses=torch.tensor(losses, dtype=torch.float64), grad_norms=torch.tensor(norms, dtype=torch.float64))
    return dict(batches=batches, **of_steps, **grads)


def combine(seed, adapters, out):
    """A second adapter of the base of "lora", and what PEFT makes of both."""
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
        name_base(folder, family)


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
