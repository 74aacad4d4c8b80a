"""The proof before listening: what is served is what was judged, or nothing is served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import Artifact, publish, verify
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.serve.catalogue import BasePlace, read_catalogue
from posttrain.serve.models import Models
from posttrain.serve.names import Names, names_of
from posttrain.serve.prompts import Prompter
from tests.support.serving import catalogue_of, make_artifact, serving
from tests.support.tiny import write_base


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return write_base(root / "base")


@pytest.fixture(scope="module")
def artifact(root: Path, base: Path) -> Artifact:
    return make_artifact(root / "one", base, 1)


@pytest.fixture(scope="module")
def other(root: Path, base: Path) -> Artifact:
    return make_artifact(root / "two", base, 2)


def again(artifact: Artifact, folder: Path, change: Any) -> Artifact:
    """Publish an artifact again after a change to its files."""
    draft = folder.with_name(f".{folder.name}")
    shutil.copytree(artifact.path, draft)
    (draft / "manifest.json").unlink()
    change(draft)
    return publish(draft, artifact.manifest, folder)


def test_an_adapter_that_changes_nothing_is_not_served(artifact: Artifact, tmp_path: Path) -> None:
    def silence(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        silent = {name: torch.zeros_like(each) if "lora_B" in name else each for name, each in tensors.items()}
        save_file(silent, folder / "adapter_model.safetensors")

    silent = again(artifact, tmp_path / "silent", silence)
    with pytest.raises(ArtifactDamaged, match="changes nothing"), serving(silent):
        pass


def test_ids_that_are_not_those_of_training_are_found(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Prompter.chat
    monkeypatch.setattr(Prompter, "chat", lambda self, messages: [5, *right(self, messages)])
    with pytest.raises(ArtifactDamaged, match="not those of training"), serving(artifact):
        pass


def test_a_mix_up_of_two_adapters_is_found(
    artifact: Artifact, other: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Models.add

    def mixed_up(self: Models, served: Any) -> None:
        right(self, served)
        if len(self.places) == 3:
            first, second = artifact.digest, other.digest
            self.places[first], self.places[second] = self.places[second], self.places[first]

    monkeypatch.setattr(Models, "add", mixed_up)
    with pytest.raises(ArtifactDamaged, match="is not the artifact"), serving(artifact, other):
        pass


def test_an_adapter_that_would_change_the_weights_of_the_others_is_rejected(artifact: Artifact, tmp_path: Path) -> None:
    def retell(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))

    changed = again(artifact, tmp_path / "pissa", retell)
    with pytest.raises(BadInput, match="changes the weights under it"), serving(changed):
        pass


def test_a_damaged_artifact_is_named(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(artifact.path, path)
    (path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactDamaged, match="tokenizer_config"):
        catalogue_of(Artifact(path, artifact.manifest, artifact.digest))


def test_an_unpromoted_artifact_needs_the_flag(artifact: Artifact) -> None:
    with pytest.raises(BadInput, match=r"never judged.*\n.*--allow-unpromoted"):
        read_catalogue([str(artifact.path)], BasePlace())


def test_a_base_that_is_gone_or_another_is_named(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="was trained on"):
        read_catalogue([str(artifact.path)], BasePlace(path=str(tmp_path / "gone")), unpromoted=True)
    strange = write_base(tmp_path / "strange", intermediate_size=40)
    with pytest.raises(ArtifactDamaged, match="base weights"):
        read_catalogue([str(artifact.path)], BasePlace(path=str(strange)), unpromoted=True)


def test_a_word_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a run nor an artifact"):
        read_catalogue([str(tmp_path / "nowhere")], BasePlace())


def test_bases_that_differ_are_served_beside_each_other(artifact: Artifact, tmp_path: Path) -> None:
    strange = make_artifact(tmp_path / "other", write_base(tmp_path / "strange", intermediate_size=40), 5)
    with serving(artifact, strange) as service:
        assert len(service.models.loaded) == 4
        assert service.names.aliases["base"] == catalogue_of(artifact).bases[0].digest


def test_names(artifact: Artifact, other: Artifact) -> None:
    catalogue = catalogue_of(artifact, other)
    one, two, base = artifact.digest, other.digest, catalogue.bases[0].digest
    loaded = frozenset((one, two, base))
    names = names_of(catalogue, {}, loaded)
    assert names.aliases == {"base": base, "v1": one, "v2": two, "latest": two, "previous": one}
    assert names.find(one) == names.find(one[:8]) == one
    assert names.find(one[:7]) is None
    assert names.find("nobody") is None
    moved = names_of(catalogue, {"latest": (one,), "live": (two, one), "lost": ("unknown",)}, loaded)
    assert moved.aliases == {"base": base, "v1": one, "v2": two, "latest": one, "previous": two, "live": one}
    assert Names({}, frozenset(("ab" * 32, "ab" * 31 + "cd"))).find("ab" * 10) is None  # the beginning of two
    assert verify(artifact.path).digest == one
