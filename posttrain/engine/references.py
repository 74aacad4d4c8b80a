"""Log-probabilities by the model before training, computed once and kept by content: no second model is in memory.

    <folder>/<key>/references.safetensors    answers [R, A] and answers aside [R], in float64
    <folder>/<key>/manifest.json             their SHA-256

A key covers the parent's weights, the rows, the number format and the versions of the code that computes. Whatever
does not match its manifest is computed again.
"""

# R = rows, A = answers of a row

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import publish_folder, verify_folder
from posttrain.errors import ArtifactDamaged
from posttrain.model.saving import disk_errors

TENSORS = "references.safetensors"


@dataclass(frozen=True)
class References:
    """The log-probabilities of all rows of a stage, on the CPU."""

    answers: torch.Tensor
    """Of each answer to its prompt, [R, A] in float64."""
    aside: torch.Tensor
    """Of each answer aside, [R] in float64; 0 for a row without."""


@dataclass(frozen=True)
class ReferenceFolder:
    """The kept log-probabilities of one key."""

    folder: Path
    key: str
    note: Callable[[str], None]
    """Reports kept log-probabilities that cannot be used, with the reason."""

    def read(self) -> References | None:
        """Return what is kept, every byte checked; None when there is nothing sound."""
        path = self.folder / self.key
        if not path.exists():
            return None
        try:
            if verify_folder(path).get("key") != self.key:
                raise ArtifactDamaged(f"{path} holds other log-probabilities")
            tensors = load_file(path / TENSORS)
            return References(tensors["answers"], tensors["aside"])
        except ArtifactDamaged as error:
            self.note(f"kept reference log-probabilities are not used: {error}")
            shutil.rmtree(path)
            return None

    def write(self, references: References) -> None:
        """Keep ``references``, whole or not at all. Raises OSError when a write fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.folder))
        destination = self.folder / self.key
        try:
            with disk_errors(destination):
                save_file({"answers": references.answers, "aside": references.aside}, draft / TENSORS)
            publish_folder(draft, {"key": self.key}, destination)
        except OSError:
            if not destination.is_dir():  # another run of a sweep was first, with the same content
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
