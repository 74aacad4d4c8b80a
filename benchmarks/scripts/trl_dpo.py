"""The script of a user of TRL: DPO with a new adapter on the merged model of the fine-tuning, its reference.

python trl_dpo.py MERGED_MODEL DATA OUTPUT ROWS_PER_STEP LEARNING_RATE BETA SEQUENCE_LENGTH
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main(model: str, data: str, output: str, rows: str, rate: str, beta: str, sequence_length: str) -> None:
    """Train, and save the adapter."""
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig(
            output_dir=f"{output}/checkpoints", per_device_train_batch_size=int(rows), num_train_epochs=1,
            max_length=int(sequence_length), learning_rate=float(rate), beta=float(beta), lr_scheduler_type="cosine",
            warmup_steps=0.1, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=5, report_to=[],
            seed=0,
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{output}/adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
