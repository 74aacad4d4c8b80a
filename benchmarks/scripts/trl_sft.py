"""The script of a user of TRL: LoRA fine-tuning of a chat model, then the adapter merged for the next script.

python trl_sft.py MODEL DATA OUTPUT ROWS_PER_STEP EPOCHS SEQUENCE_LENGTH LEARNING_RATE
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def to_prompt_and_completion(row: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Return a record whose last message is the answer."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def main(model: str, data: str, output: str, rows: str, epochs: str, sequence_length: str, rate: str) -> None:
    """Train, and save the adapter and the merged model."""
    dataset = load_dataset("json", data_files=data, split="train")
    dataset = dataset.map(to_prompt_and_completion, remove_columns=["messages"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=SFTConfig(
            output_dir=f"{output}/checkpoints", per_device_train_batch_size=int(rows), num_train_epochs=float(epochs),
            max_length=int(sequence_length), learning_rate=float(rate), lr_scheduler_type="cosine", warmup_steps=0.03,
            gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=10, report_to=[], seed=0,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{output}/adapter")
    trainer.model.merge_and_unload().save_pretrained(f"{output}/merged")
    trainer.processing_class.save_pretrained(f"{output}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
