"""Makes small models whose weights transformers keeps in few bits, and what it computes with them: golden/packed.

    /tmp/parity/bin/python packed.py [--out DIR] [--hqq]

Bases are the first blocks of the golden families. Those of bitsandbytes are made with transformers 5.17; transformers 5 reads no weights of hqq, so that
these (`--hqq`) are made with transformers 4.57.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
FAMILIES = HERE / "golden" / "families"
BF16, F16 = torch.bfloat16, torch.float16

# The family, the type of its weights, and what bitsandbytes is asked for.
CASES = {
    "nf4": ("llama", BF16, dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "fp4": ("opt", F16, dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=BF16, llm_int8_skip_modules=["lm_head", "k_proj"])),
    "int8": ("gpt2", F16, dict(load_in_8bit=True)),
    "by_head": ("bloom", BF16, dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
}


# bitsandbytes on a CPU with AVX-512 takes wrong scales for rows of 32 or 48 numbers, fewer than a block has.
WIDTHS = {"llama": dict(hidden_size=64), "opt": dict(hidden_size=64, word_embed_proj_dim=64), "bloom": dict(hidden_size=64, n_head=4)}


def base_of(family, dtype, out):
    """One block of a family, in that type, with numbers of its own where it is wider."""
    folder = out / "base"
    config = json.loads((FAMILIES / family / "config.json").read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    if family in WIDTHS:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FAMILIES / family, **{layers: 1}, **WIDTHS[family]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * 0.05)
        model = model.to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(FAMILIES / family, dtype=dtype, **{layers: 1})
    model.save_pretrained(folder)
    return folder


def bitsandbytes():
    import bitsandbytes.functional

    return bitsandbytes.functional


def wide(model):
    """The same model in fp64, of what the codes stand for."""
    for name, module in list(model.named_modules()):
        match type(module).__name__:
            case "Linear4bit":
                weight = bitsandbytes().dequantize_4bit(module.weight.data, module.weight.quant_state)
            case "Linear8bitLt":
                weight = bitsandbytes().int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            case "HQQLinear":
                weight = module.dequantize()
            case _:
                continue
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight.data = weight.double().reshape(plain.weight.shape)
        if module.bias is not None:
            plain.bias.data = module.bias.data.double()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    model.is_loaded_in_4bit, model.is_quantized = False, False
    model.quantization_method = None
    return torch.nn.Module.to(model, torch.float64)


def expect(folder, dtype, family):
    ids = load_file(FAMILIES / family / "expected.safetensors")["ids"][:1, :16].contiguous()
    with torch.no_grad():
        # Else bitsandbytes takes a product for shapes of other sizes. Nothing is dropped.
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()(input_ids=ids).logits
        logits = wide(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))(input_ids=ids).logits
    off = ((own.double() - logits).abs().max() / logits.abs().max()).item()
    print(f"{folder.name}: what transformers computes in {dtype} is {off:.1e} from fp64")
    save_file(dict(ids=ids, logits=logits.float().contiguous(), own=own.float().contiguous()), folder / "expected.safetensors")


def train(folder, family):
    """Steps of QLoRA beside what the codes stand for, in fp64, with the gradients of the first. (bitsandbytes 0.50 rounds that to the type of the weights
    on some ways through a layer, and not on others.)"""
    import families
    from peft import LoraConfig, PeftModel, get_peft_model

    base = lambda: wide(AutoModelForCausalLM.from_pretrained(folder, dtype=BF16))
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base().float(), config).save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": folder.name}, indent=2) + "\n")
    model = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True, autocast_adapter_dtype=False).double().eval()
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    batches = load_file(FAMILIES / family / "expected.safetensors")["batches"][:6].contiguous()
    ids = load_file(folder / "expected.safetensors")["ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    grads = {}

    def keep_first():
        if not grads:
            grads.update({f"grad.{name}": p.grad.float().contiguous() for name, p in trained.items()})

    losses, norms = families.train(model, batches, list(trained.values()), keep_first)
    of_steps = dict(losses=torch.tensor(losses, dtype=torch.float64), grad_norms=torch.tensor(norms, dtype=torch.float64))
    save_file(dict(ids=ids, logits=logits.float().contiguous(), batches=batches, **of_steps, **grads), folder / "adapter" / "training.safetensors")


def tidy(folder):
    for name in ("generation_config.json", "README.md"):
        (folder / name).unlink(missing_ok=True)


def with_bitsandbytes(out):
    from transformers import BitsAndBytesConfig

    for name, (family, dtype, settings) in CASES.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base = base_of(family, dtype, folder)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings))
        model.save_pretrained(folder)
        shutil.rmtree(base)
        tidy(folder)
        expect(folder, dtype, family)
    train(out / "nf4", "llama")


def with_hqq(out):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import HqqConfig

    for name, bits, axis in (("hqq4", 4, 1), ("hqq3", 3, 0)):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base = base_of("mistral", BF16, folder)
        config = HqqConfig(nbits=bits, group_size=16, axis=axis, skip_modules=["lm_head", "k_proj", "v_proj", "o_proj"])
        # On a CPU layers of hqq compute in fp32 alone.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
        shutil.rmtree(base)
        tidy(folder)
        ids = load_file(FAMILIES / "mistral" / "expected.safetensors")["ids"][:1, :16].contiguous()
        with torch.no_grad():
            own = model(input_ids=ids).logits
            logits = wide(model)(input_ids=ids).logits.float()
        save_file(dict(ids=ids, logits=logits.contiguous(), own=own.contiguous()), folder / "expected.safetensors")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "golden" / "packed")
    parser.add_argument("--hqq", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (with_hqq if args.hqq else with_bitsandbytes)(args.out)


main()
