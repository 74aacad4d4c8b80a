"""Checkpoints: the whole state of an exact resume, in safetensors and JSON, verified before use.

    <folder>/step-00000050/state.safetensors    trained weights, optimizer state, random generators
    <folder>/step-00000050/manifest.json        step, last loss, identity of the run, SHA-256 of the state

They are published as artifacts are: whole or not at all. The newest two are kept: a damaged one costs little.
Order and learning rate are not saved: both follow from the step's number.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import publish_folder, verify_folder
from posttrain.errors import ArtifactDamaged
from posttrain.model.saving import disk_errors

STATE = "state.safetensors"
KEPT = 2
NAME = re.compile(r"step-(\d{8,})")

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Position:
    """The last step of a run so far."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Loss of the last of them."""


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run."""

    folder: Path
    identity: str
    """Digest of all that decides the course of the run; a checkpoint with another digest is not resumed."""
    note: Callable[[str], None]
    """Reports every unusable checkpoint, with the reason."""

    def save(self, position: Position, state: State) -> None:
        """Publish ``state`` and remove all but the newest two. Raises OSError when a write fails."""
        destination = self.folder / f"step-{position.step:08d}"
        draft = self.folder / ".draft"
        shutil.rmtree(draft, ignore_errors=True)
        manifest = {"step": position.step, "loss": position.loss, "identity": self.identity}
        try:
            draft.mkdir(parents=True)
            with disk_errors(destination):
                save_file(state, draft / STATE)
            publish_folder(draft, manifest, destination)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        # only now that the new one is whole: a kill before this line leaves one checkpoint too many, never one too few
        for old in self._newest_first()[KEPT:]:
            shutil.rmtree(old)

    def newest(self) -> tuple[Position, State] | None:
        """Return the newest sound checkpoint of this run, and remove any newer one."""
        for path in self._newest_first():
            try:
                return self._read(path)
            except ArtifactDamaged as error:
                self.note(f"checkpoint {path.name} is not used: {error}")
                shutil.rmtree(path)  # or it would outrank the next ones of this run
        return None

    def _read(self, path: Path) -> tuple[Position, State]:
        manifest = verify_folder(path)
        if manifest.get("identity") != self.identity:
            raise ArtifactDamaged(f"{path} belongs to a run with other settings or data")
        return Position(step=manifest["step"], loss=manifest["loss"]), load_file(path / STATE)

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        steps = {path: match for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))}
        return sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)


def capture(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return trained weights, optimizer state and random generators, by name."""
    state = {}
    for name, parameter in _trained(model).items():
        state[f"weight/{name}"] = parameter.detach()
        state |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    state["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.contiguous() for name, tensor in state.items()}


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]) -> None:
    """Restore a captured state, in place."""
    parameters = _trained(model)
    for key, tensor in state.items():
        kind, _, rest = key.partition("/")
        if kind == "weight":
            parameters[rest].data.copy_(tensor)
        elif kind == "optimizer":
            field, _, name = rest.partition("/")
            optimizer.state[parameters[name]][field] = tensor.to(parameters[name].device)
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
