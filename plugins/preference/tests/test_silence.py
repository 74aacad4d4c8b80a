"""Nothing of a library reaches the user, and no trainer of another library is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_preference import register_stages
from posttrain_preference.methods import METHODS
from posttrain_preference.stage import run
from preference_support.contexts import STAGES, MakeContext

from posttrain.artifact import ModelSource

FRESH = """
import sys
from pathlib import Path
from posttrain_preference.stage import run
from preference_support.contexts import STAGES, build_context, parent_source
assert "transformers" not in sys.modules
for name in STAGES:
    context = build_context(Path(name), parent_source(Path(sys.argv[1])), stage=name, max_steps=2, checkpoint_steps=1)
    run(context)
assert "trl" not in sys.modules
"""
"""Every stage, in a process in which nothing is imported yet."""


def test_nothing_is_printed_and_no_other_trainer_imported(tmp_path: Path, parents: dict[str, ModelSource]) -> None:
    command = [sys.executable, "-W", "always::FutureWarning", "-c", FRESH, str(parents["lora"].model.parent)]
    environment = {"PYTHONPATH": ":".join(sys.path), "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", STAGES)
def test_only_checkpoints_and_the_result_are_written(make_context: MakeContext, name: str) -> None:
    context = make_context("lora", stage=name, max_steps=2, checkpoint_steps=1)
    run(context)
    references = {"references"} if name in ("dpo", "kto") else set()
    kept = {"tokens"} | references  # a stage without a place of its own keeps both beside its checkpoints
    assert {path.name for path in context.checkpoints.iterdir()} == {"step-00000001"} | kept
    assert {path.name for path in context.output.iterdir()} == {
        "adapter_config.json",
        "generation_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "probe.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_stages_are_registered() -> None:
    stages = {stage.name: stage for stage in register_stages()}
    assert list(stages) == STAGES
    for name, stage in stages.items():
        module, _, function = stage.run.partition(":")
        assert getattr(sys.modules[module], function) is run
        assert stage.config is METHODS[name].settings
        assert stage.parent == "sft"
        assert stage.records == ("feedback" if name == "kto" else "preferences")


def test_listing_the_stages_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets'}"
    modules = "posttrain_preference, posttrain_preference.stage"
    code = f"import sys, {modules}; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
