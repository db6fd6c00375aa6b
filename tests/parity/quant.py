"""Writes what bitsandbytes and HQQ make of a few tensors: golden/quant/FORMAT.safetensors.

    /tmp/parity/bin/python quant.py [--seed N --out DIR]

The environment is that of generate.py. Everything is computed on the CPU, in one thread.
"""

import argparse
import pathlib

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent


def edges(bounds):
    """A block of 64 whose largest amount is 1 and whose other numbers lie on the bounds between codes, and beside them."""
    beside = [torch.nextafter(b, torch.tensor(s)) for b in bounds for s in (-9.0, 9.0)]
    block = torch.cat([torch.stack(beside), bounds, torch.tensor([1.0, -1.0, -0.0, 0.0])])
    return torch.nn.functional.pad(block, (0, 64 - block.numel()))


def four_bit(generator):
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

    bounds = torch.cat([_get_4bit_quantize_bounds(kind, torch.device("cpu"))[0] for kind in ("nf4", "fp4")])
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return {
        "even": draw(24, 128),
        "odd": draw(7, 33),
        "one": draw(1, 1),
        "short": draw(1, 65),
        "spread": draw(40, 64) * torch.exp(3 * draw(40, 1)),
        "ties": torch.cat([edges(bounds[:15]), edges(bounds[15:]), -edges(bounds[:15]) * 0.3, edges(bounds[15:]) * 7e-12]).reshape(4, 64),
        "zeros": torch.cat([torch.zeros(64), -torch.zeros(64), draw(64), torch.zeros(3)]).reshape(5, 39),
        "zero": torch.zeros(1, 1),
        "tiny": draw(4, 64) * torch.tensor([1e-36, 1e-38, 1e-40, 1e-45])[:, None],
        "tiny_end": torch.cat([draw(64), draw(5) * 1e-40]).reshape(3, 23),
        "bf16": draw(6, 70).bfloat16(),
    }


def write_four_bit(out, generator):
    tensors = {}
    for name, x in four_bit(generator).items():
        tensors[name] = x
        for kind in ("nf4", "fp4"):
            for block in (32, 64, 4096):
                codes, state = bnb.quantize_4bit(x, blocksize=block, quant_type=kind)
                key = f"{name}.{kind}.{block}"
                tensors[key + ".codes"] = codes.flatten()
                tensors[key + ".absmax"] = state.absmax
                state.dtype = torch.float32
                if kind == "nf4" and block == 64:
                    tensors[key + ".numbers"] = bnb.dequantize_4bit(codes, state).reshape(x.shape)
    tensors["map.nf4"], tensors["map.fp4"] = (bnb.get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4"))
    save_file(tensors, out / "four_bit.safetensors")


def write_double(out, generator):
    tensors = {"map": bnb.create_dynamic_map()}
    for n in (1, 2, 3, 5, 15, 16, 17, 40, 64, 250, 256, 257, 1023, 1024, 3000):
        scales = torch.rand(n, generator=generator) ** 2
        x = (scales[:, None] * torch.ones(n, 32)).contiguous()
        codes, state = bnb.quantize_4bit(x, blocksize=32, quant_type="nf4", compress_statistics=True)
        tensors |= {
            f"{n}.scales": scales,
            f"{n}.codes": state.absmax,
            f"{n}.absmax": state.state2.absmax,
            f"{n}.offset": state.offset.reshape(1),
            f"{n}.numbers": bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset,
        }
    save_file(tensors, out / "double.safetensors")


def write_int8(out, generator):
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    halves = torch.arange(-127, 128) / 2.0
    cases = {
        "even": draw(12, 64),
        "odd": draw(3, 37),
        "one": draw(1, 1),
        "ties": torch.cat([halves, torch.tensor([127.0])]).reshape(1, 256) * torch.tensor([1.0, 0.5, 3.0])[:, None],
        "zeros": torch.cat([torch.zeros(2, 9), -torch.zeros(1, 9), draw(1, 9)]),
        "tiny": draw(4, 16) * torch.tensor([1e-30, 1e-37, 1e-39, 1e-44])[:, None],
        "fp16": draw(5, 33).half().float(),
    }
    tensors = {}
    for name, x in cases.items():
        codes, scales, _ = bnb.int8_vectorwise_quant(x.clone())
        tensors |= {name: x, f"{name}.codes": codes, f"{name}.scales": scales, f"{name}.numbers": bnb.int8_vectorwise_dequant(codes, scales)}
    save_file(tensors, out / "int8.safetensors")


def write_hqq(out, generator):
    tensors = {}
    for bits in (1, 2, 3, 4, 8):
        for axis in (0, 1):
            x = torch.randn(32, 96, generator=generator)
            x[5] = 0.25
            codes, meta = Quantizer.quantize(x, nbits=bits, group_size=64, axis=axis, device="cpu", compute_dtype=torch.float32)
            meta["compute_dtype"] = torch.float32
            key = f"{bits}.{axis}"
            tensors |= {
                key: x,
                f"{key}.codes": codes.contiguous().view(torch.uint8),
                f"{key}.scales": meta["scale"].flatten(),
                f"{key}.zeros": meta["zero"].flatten(),
                f"{key}.numbers": Quantizer.dequantize(codes, meta).contiguous(),
            }
    save_file(tensors, out / "hqq.safetensors")


def write_stored(out, generator):
    """Linear layers as bitsandbytes puts them into a model's safetensors."""
    tensors = {}
    for name, kind, double in (("plain", "nf4", False), ("double", "nf4", True), ("fp4", "fp4", True)):
        layer = bitsandbytes.nn.Linear4bit(48, 20, bias=False, quant_type=kind, compress_statistics=double, compute_dtype=torch.float32)
        layer.weight = bitsandbytes.nn.Params4bit(
            torch.randn(20, 48, generator=generator).bfloat16(), requires_grad=False, quant_type=kind, compress_statistics=double
        )
        layer = layer.to("cpu")
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()}
        tensors[f"{name}.numbers"] = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    layer = bitsandbytes.nn.Linear8bitLt(48, 20, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(20, 48, generator=generator), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    tensors |= {f"int8.{key}": value.contiguous() for key, value in layer.state_dict().items()}
    save_file(tensors, out / "stored.safetensors")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "golden" / "quant")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for write in (write_four_bit, write_double, write_int8, write_hqq, write_stored):
        write(args.out, torch.Generator().manual_seed(args.seed))


main()
