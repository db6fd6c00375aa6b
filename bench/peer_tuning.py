"""The other side of tuning.py: TRL's trainers with PEFT, on the CPU. Prints a JSON line after each step.

    python peer_tuning.py make DIR --config JSON --tokenizer DIR
    python peer_tuning.py lora|qlora|dpo DIR --steps N --threads N [--bf16]
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SEQUENCE, BATCH, PAIRS = 512, 2, 2


class Told(TrainerCallback):
    """The tokens that went through the model, padding not counted."""

    def __init__(self):
        self.tokens = 0

    def count(self, model, _args, kwargs):
        if model.training and torch.is_grad_enabled():
            ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
            self.tokens += int(mask.sum()) if mask is not None else ids.numel()

    def on_step_end(self, *_, **__):
        print(json.dumps({"time": time.time(), "tokens": self.tokens}), flush=True)


def make(work, config, tokenizer):
    settings = json.loads(config)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(work / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, work / "base" / name)


def train(arguments):
    torch.set_num_threads(arguments.threads)
    work, dpo = arguments.work, arguments.kind == "dpo"
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    more = {"quantization_config": quantised} if arguments.kind == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32, **more)
    usual = dict(
        output_dir=str(work / "peer"), report_to=[], use_cpu=True, bf16=arguments.bf16, disable_tqdm=True, save_strategy="no", logging_steps=1000,
        max_steps=arguments.steps, learning_rate=2e-4, max_length=SEQUENCE, gradient_checkpointing=False,
        per_device_train_batch_size=PAIRS if dpo else BATCH,
    )
    trainer, config, more = (DPOTrainer, DPOConfig, {}) if dpo else (SFTTrainer, SFTConfig, {"packing": True})
    told = Told()
    trainer = trainer(
        model=model, args=config(**usual, **more), processing_class=AutoTokenizer.from_pretrained(work / "base"), callbacks=[told],
        train_dataset=Dataset.from_list(json.loads((work / f"{'pairs' if dpo else 'rows'}.json").read_text())),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)  # its lines are no JSON
    trainer.model.register_forward_pre_hook(told.count, with_kwargs=True)
    trainer.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("make", "lora", "qlora", "dpo"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--tokenizer")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    if arguments.kind == "make":
        make(arguments.work, arguments.config, arguments.tokenizer)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
