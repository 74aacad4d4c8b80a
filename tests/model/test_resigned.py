"""An artifact whose manifest was written again over other weights: every way to use it checks the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.artifact import publish, verify
from posttrain.errors import ArtifactDamaged
from posttrain.model.loading import load_model, load_trainable
from posttrain.model.merging import merge
from posttrain.testing.project import Project
from tests.support.adapters import TASK
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.tiny import base_source

Tensors = dict[str, torch.Tensor]
DAMAGES: Mapping[str, Callable[[Tensors], Tensors]] = {
    "zeros": lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
    "renamed": lambda tensors: {name.replace("q_proj", "p_proj"): tensor for name, tensor in tensors.items()},
    "NaN": lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An SFT artifact and a stage on it; a plugin trains that stage, so that none of its weights matter here."""
    return Project(folder=tmp_path_factory.mktemp("resigned"), kind="dpo", settings={"max_steps": 1}).write()


def sign_again(artifact: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change an artifact's weights and write its manifest again."""
    manifest, draft = verify(artifact).manifest, artifact.with_name("draft")
    artifact.rename(draft)
    weights = draft / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    publish(draft, manifest, artifact)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_way_to_use_it_names_the_damage(
    project: Project, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(project.folder / "sft", tmp_path / "sft"))
    sign_again(artifact, DAMAGES[damage])
    named = str(artifact / "adapter_model.safetensors")
    with pytest.raises(ArtifactDamaged, match=named):
        project.run(tmp_path / "runs", f"start_from={artifact}", "start_from_unpromoted=true")
    with pytest.raises(ArtifactDamaged, match=named):
        merge(verify(artifact), base_source(project.folder / "base"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "quiz.yaml").write_text(TASK)
    (tmp_path / "quiz.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "label": 0}\n')
    task = f"+gate.tasks.quiz={{task: {tmp_path / 'quiz.yaml'}, role: lift, metric: acc}}"
    with pytest.raises(SystemExit) as ended:
        cli.main(["gate", f"adapter={artifact}", "gate=none", "gate.enabled=true", task, f"output_root={tmp_path}"])
    assert ended.value.code == 5
    assert named in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("damage", ["zeros", "NaN"])
def test_a_run_that_goes_on_names_the_damage(working_folder: Path, damage: str) -> None:
    write_project(working_folder)
    run_recipe(Script())
    artifact = only_run() / "stages" / "sft" / "artifact"
    sign_again(artifact, DAMAGES[damage])
    with pytest.raises(ArtifactDamaged, match=str(artifact / "adapter_model.safetensors")):
        run_recipe(Script())


def test_loading_names_a_tensor_without_a_place(project: Project, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(project.folder / "sft", tmp_path / "sft"))
    sign_again(artifact, DAMAGES["renamed"])
    source = verify(artifact).source(base_source(project.folder / "base"))
    for load in (load_model, load_trainable):
        with pytest.raises(ArtifactDamaged, match=r"adapter_model.safetensors: the adapter lacks \S+q_proj"):
            load(source, "float32")
