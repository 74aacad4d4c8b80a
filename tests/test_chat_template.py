"""The chat template is pinned: what an artifact was trained with is what evaluates it and what trains it on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from posttrain.artifact import ModelSource, publish, read_manifest, verify
from posttrain.config.schema import ModelConfig
from posttrain.context import StageContext
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.gate.spec import GateRequest
from posttrain.model.base import resolve_base
from posttrain.model.loading import load_tokenizer, load_trainable
from posttrain.model.saving import save_model
from posttrain.testing.tiny import tiny_manifest
from tests.support.fakes import Script, run_recipe, write_project
from tests.support.tiny import TEMPLATE, base_source, write_base
from tests.support.tiny import published as publish_output

FOREIGN = ModelSource(
    name="base", model=Path(), adapter=None, tokenizer=Path(), chat_template="", digest="", base="", model_digest=""
)
OTHER = TEMPLATE.replace("<|end|>", "<|end|>\n")


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    return working_folder


def sft_artifact(template: str = "template") -> Path:
    """An SFT artifact that was trained with ``template``, as a run leaves it."""
    (Path("base") / "chat_template.jinja").write_bytes(template.encode())
    run = run_recipe(Script(), "stages=[sft]", "output_root=before")
    return run.path / "stages" / "sft" / "artifact"


def published(folder: Path, template: str = TEMPLATE, inside: str | None = None) -> Path:
    """An artifact of a tokenizer alone."""
    folder.mkdir()
    (folder / "chat_template.jinja").write_bytes(template.encode())
    (folder / "tokenizer_config.json").write_text(json.dumps({} if inside is None else {"chat_template": inside}))
    return publish(folder, tiny_manifest(FOREIGN, folder, chat_template=template), folder.with_name("artifact")).path


def test_the_manifest_holds_the_template_and_its_hash() -> None:
    artifact = verify(sft_artifact("line one\r\nline two ⟦ü⟧"))
    assert artifact.manifest.chat_template == "line one\r\nline two ⟦ü⟧"
    digest = hashlib.sha256(artifact.manifest.chat_template.encode()).hexdigest()
    assert read_manifest(artifact.path)["template_sha256"] == digest
    assert (artifact.path / "chat_template.jinja").read_bytes().decode() == artifact.manifest.chat_template


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_template_in_an_artifact_is_shown_as_a_difference(tmp_path: Path, place: str) -> None:
    path = published(tmp_path / "draft", "first\nsecond\n")
    other = "first\n2nd\n"
    (path / place).write_text(json.dumps({"chat_template": other}) if place.endswith("json") else other)
    with pytest.raises(ArtifactDamaged, match=rf"{place} is not the pinned chat template:\n--- pinned") as caught:
        verify(path)
    assert "\n-second\n+2nd" in str(caught.value)


def test_a_missing_template_and_changed_ends_of_lines_are_named(tmp_path: Path) -> None:
    path = published(tmp_path / "draft", "first\nsecond\n")
    (path / "chat_template.jinja").write_bytes(b"first\r\nsecond\r\n")
    with pytest.raises(ArtifactDamaged, match="differ only in their line ends"):
        verify(path)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ArtifactDamaged, match=r"chat_template\.jinja is missing"):
        verify(path)


def test_a_stage_that_leaves_another_template_is_not_published() -> None:
    def change(context: StageContext) -> None:
        copy = shutil.copytree(context.parent.tokenizer, "changed", dirs_exist_ok=True)
        (Path(copy) / "chat_template.jinja").write_text("mine")
        object.__setattr__(context.parent, "tokenizer", Path(copy))  # what the stage of the test copies

    script = Script()
    script.during_training = change
    with pytest.raises(ArtifactDamaged, match=r"is not the pinned chat template:\n(.|\n)*-template\n\+mine"):
        run_recipe(script)


def test_another_template_for_a_trained_artifact_is_rejected_with_the_difference() -> None:
    artifact = sft_artifact()
    Path("other.jinja").write_text("template\nand more")
    words = ("stages=[dpo]", f"start_from={artifact}")
    with pytest.raises(BadInput, match=r"model\.chat_template: other\.jinja is not the template") as caught:
        run_recipe(Script(), *words, "model.chat_template=other.jinja")
    assert "--- pinned\n+++ found\n" in str(caught.value)
    assert "+and more" in str(caught.value)
    Path("same.jinja").write_text("template")
    run_recipe(Script(), *words, "model.chat_template=same.jinja")


def test_later_stages_and_gates_use_the_pinned_template_whatever_the_base_brings() -> None:
    artifact = sft_artifact("trained with this")
    (Path("base") / "chat_template.jinja").write_text("brought by the base")
    seen: list[str] = []

    def note(what: StageContext | GateRequest) -> None:
        sources = what.systems.values() if isinstance(what, GateRequest) else [what.parent]
        seen.extend(source.chat_template for source in sources)

    script = Script()
    script.during_training = script.during_evaluation = note
    run = run_recipe(script, "stages=[dpo]", f"start_from={artifact}")
    assert seen == ["trained with this"] * 4  # the parent, then base, candidate and parent in the gate
    stacked = verify(run.path / "stages" / "dpo" / "artifact")
    assert stacked.manifest.chat_template == "trained with this"


def test_a_base_without_a_template_is_enough_under_an_artifact() -> None:
    artifact = verify(sft_artifact())
    (Path("base") / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, match="has no chat template"):
        resolve_base(ModelConfig(path="base"))
    assert resolve_base(ModelConfig(path="base"), artifact.pins).chat_template == "template"


def test_a_pinned_template_is_the_only_one_in_an_artifact(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "own")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": OTHER}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    base = resolve_base(ModelConfig(path=str(folder), chat_template=str(tmp_path / "mine.jinja")))
    (tmp_path / "output").mkdir()
    save_model(load_trainable(base, "float32"), base, tmp_path / "output", "float32")
    kept = json.loads((tmp_path / "output" / "tokenizer_config.json").read_text())
    assert kept == {key: value for key, value in settings.items() if key != "chat_template"}
    artifact = publish_output(tmp_path / "output", base, tmp_path / "artifact")
    assert load_tokenizer(verify(artifact.path).source(base)).chat_template == TEMPLATE
    assert load_tokenizer(base_source(folder)).chat_template == OTHER
