"""Checkpoints: the whole state of an exact resume, in safetensors and JSON, verified before use.

    <folder>/step-00000050/state.safetensors      trained weights, optimizer state, random generators
    <folder>/step-00000050/state-0001.safetensors the slices of process 1, where weights are sliced, and so on
    <folder>/step-00000050/manifest.json          step, last loss, identity of the run, SHA-256 of each file

They are published as artifacts are: whole or not at all. The newest two are kept: a damaged one costs little.
Order and learning rate are not saved: both follow from the step's number. A slice is saved with its place in the whole,
and read from whatever files hold it: another number of processes can resume.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from posttrain.artifact import publish_folder, verify_folder
from posttrain.cost.memory import KEPT_CHECKPOINTS
from posttrain.engine import processes
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.model.device import generators
from posttrain.model.saving import disk_errors

STATE = "state.safetensors"
DRAFT = ".draft"
NAME = re.compile(r"step-(\d{8,})")
STEP = "step"
"""Entry of the optimizer's state that is one number."""

PATIENCE = 0.05
"""Seconds between two looks for the parts of other processes."""
PLACES = "places"
"""Key of a file's metadata: the first row of each slice in the whole tensor, and the rows of the whole, by name."""


@dataclass(frozen=True)
class Slice:
    """A process' slice of a tensor that all processes hold together."""

    own: torch.Tensor
    first: int
    """First row of it in the whole tensor; a tensor cut anywhere has its numbers as rows."""
    rows: int
    """Rows of the whole."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor | Slice:
        """Return the slice that a DTensor is; any other tensor is itself."""
        if not isinstance(tensor, DTensor):
            return tensor
        return cls(own=tensor.to_local(), first=_first_row(tensor), rows=tensor.shape[0])


State = dict[str, torch.Tensor | Slice]
"""By name."""
Cut = Callable[[str, torch.Tensor], torch.Tensor | Slice]
"""Returns what a tensor is a slice of, given the parameter's name and one of its tensors; or the tensor, if whole."""


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
        """Publish ``state`` and remove all but the newest two. Raises OSError when a write fails.

        Every process calls it, each with its part of the state: process 0 publishes once all have written.
        """
        self.write(position, Part.of(state), self.begin(bool(state)))
        processes.wait()

    def begin(self, writes: bool) -> list[str]:
        """Make room for the parts of all processes; return their files' names. Every process calls it."""
        draft = self.folder / DRAFT
        if processes.rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        own = torch.zeros(processes.world(), dtype=torch.int64)
        own[processes.rank()] = int(writes)
        return [_file_name(rank) for rank, count in enumerate(processes.total(own).tolist()) if count]

    def write(self, position: Position, part: Part, names: Sequence[str]) -> None:
        """Write a process' part; process 0 publishes once the files ``names`` of all parts are there.

        Processes meet at the files alone, so that a thread can do it while their main threads train.
        """
        destination = self.folder / f"step-{position.step:08d}"
        draft, own = self.folder / DRAFT, _file_name(processes.rank())
        manifest = {"step": position.step, "loss": position.loss, "identity": self.identity}
        try:
            if own in names:
                with disk_errors(destination):
                    part.write(draft / f".{own}")
                (draft / f".{own}").rename(draft / own)
            if processes.rank() == 0:
                _await(draft, names)
                publish_folder(draft, manifest, destination)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        # only now that the new one is whole: a kill before this line leaves one checkpoint too many, never one too few
        if processes.rank() == 0:
            for old in self._newest_first()[KEPT_CHECKPOINTS:]:
                shutil.rmtree(old)

    def newest(self) -> tuple[Position, SavedState] | None:
        """Return the newest sound checkpoint of this run, and remove any newer one; process 0 decides for all."""
        found = self._newest_sound() if processes.rank() == 0 else None
        if processes.world() > 1:
            step = int(processes.share(-1 if found is None else found.step))
            loss = processes.share(0.0 if found is None else found.loss)
            found = None if step < 0 else Position(step=step, loss=loss)
        return None if found is None else (found, SavedState(self.folder / f"step-{found.step:08d}"))

    def _newest_sound(self) -> Position | None:
        for path in self._newest_first():
            try:
                return self._read(path)
            except ArtifactDamaged as error:
                self.note(f"checkpoint {path.name} is not used: {error}")
                shutil.rmtree(path)  # or it would outrank the next ones of this run
        return None

    def _read(self, path: Path) -> Position:
        manifest = verify_folder(path)
        if manifest.get("identity") != self.identity:
            raise ArtifactDamaged(f"{path} belongs to a run with other settings or data")
        return Position(step=manifest["step"], loss=manifest["loss"])

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        steps = {path: match for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))}
        return sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a state that one process saves."""

    tensors: dict[str, torch.Tensor]
    """Own tensors and slices by name."""
    places: dict[str, tuple[int, int]]
    """First row of each slice in the whole tensor, and the rows of the whole, by name."""

    @classmethod
    def of(cls, state: State, *, copy: bool = False) -> Part:
        """Return this process' part of ``state``; with ``copy``, in memory of its own, which training leaves alone."""
        places = {name: (each.first, each.rows) for name, each in state.items() if isinstance(each, Slice)}
        own = {name: each.own if isinstance(each, Slice) else each for name, each in state.items()}
        if copy:
            own = {name: each.to("cpu", copy=True) for name, each in own.items()}
        return cls(tensors={name: each.contiguous() for name, each in own.items()}, places=places)

    def write(self, path: Path) -> None:
        """Write it as safetensors."""
        save_file(self.tensors, path, {PLACES: json.dumps(self.places)})


class SavedState(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, read when they are asked for, whole or in part."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._slices: dict[str, list[tuple[int, Any]]] = {}
        self._rows: dict[str, int | None] = {}
        for path in sorted(folder.glob("state*.safetensors")):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                start, rows = places.get(name, (0, None))
                self._slices.setdefault(name, []).append((start, file.get_slice(name)))
                self._rows[name] = rows

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor whole."""
        rows = self._rows[name]
        if rows is None:
            whole: torch.Tensor = self._slices[name][0][1][...]
            return whole
        pieces = sorted(self._slices[name], key=lambda piece: piece[0])
        return torch.cat([saved[...] for _, saved in pieces])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._slices)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._slices)

    def numbers(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return ``count`` numbers of a tensor from number ``start`` on, in a row."""
        if self._rows[name] is None:
            return self[name].flatten()[start : start + count]
        pieces = []
        for first, saved in sorted(self._slices[name], key=lambda piece: piece[0]):
            rows, *others = saved.get_shape()
            width = math.prod(others)
            low, high = max(start, first * width), min(start + count, (first + rows) * width)
            if low < high:
                top, bottom = low // width - first, -(-high // width) - first
                begin = low - (first + top) * width
                pieces.append(saved[top:bottom].flatten()[begin : begin + high - low])
        return torch.cat(pieces) if pieces else self._slices[name][0][1][0:0].flatten()


def capture(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return trained weights, optimizer state and, of a lone process, random generators, by name.

    Several processes draw from seeds of their own in each batch. What is whole, process 0 alone returns.
    """
    return capture_parts(_trained(model), optimizer, _as_sliced)


def capture_parts(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, cut: Cut) -> State:
    """Return the state of ``parameters`` as ``capture`` does; ``cut`` tells of what each tensor is a slice."""
    state: State = {}
    for name, parameter in parameters.items():
        state[f"weight/{name}"] = cut(name, parameter.detach())
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer/{key}/{name}"] = cut(name, value) if key != STEP else value
    if processes.world() == 1:
        state["random/cpu"] = torch.get_rng_state()
        state |= {f"random/{kind}": module.get_rng_state() for kind, module in generators().items()}
    return {name: each for name, each in state.items() if processes.rank() == 0 or isinstance(each, Slice)}


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]) -> None:
    """Restore a captured state, in place; of a sliced tensor, this process' slice."""
    restore_parts(_trained(model), optimizer, state, _as_sliced)


def restore_parts(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
    cut: Cut,
) -> None:
    """Restore the state of ``parameters`` as ``restore`` does; ``cut`` tells of what each tensor is a slice."""
    for key in state:
        kind, _, rest = key.partition("/")
        if kind == "weight":
            _fill(cut(rest, parameters[rest].data), state, key)
        elif kind == "optimizer":
            field, _, name = rest.partition("/")
            parameter = parameters[name]
            if field != STEP and isinstance(cut(name, parameter.data), Slice):
                optimizer.state[parameter][field] = torch.zeros_like(parameter.data)
                _fill(cut(name, optimizer.state[parameter][field]), state, key)
            else:
                value = state[key].to(parameter.device)
                like = field != STEP and value.numel() == parameter.numel()
                optimizer.state[parameter][field] = value.view_as(parameter) if like else value
    if "random/cpu" in state and processes.world() == 1:
        torch.set_rng_state(state["random/cpu"])
        for kind, module in generators().items():
            if f"random/{kind}" in state:
                module.set_rng_state(state[f"random/{kind}"])


def _as_sliced(name: str, tensor: torch.Tensor) -> torch.Tensor | Slice:
    return Slice.of(tensor)


def _fill(target: torch.Tensor | Slice, state: Mapping[str, torch.Tensor], key: str) -> None:
    if not isinstance(target, Slice):
        target.copy_(state[key].view(target.shape))  # it may have been cut anywhere
        return
    own = target.own
    start, count = target.first * math.prod(own.shape[1:]), own.numel()
    found = state.numbers(key, start, count) if isinstance(state, SavedState) else state[key].flatten()[start:][:count]
    own.copy_(found.view(own.shape))


def _await(draft: Path, names: Sequence[str]) -> None:
    """Wait until every part is written. Raises Interrupted when a process could not, which removes the draft."""
    end = time.monotonic() + processes.SECONDS
    while missing := [name for name in names if not (draft / name).exists()]:
        if not draft.is_dir() or time.monotonic() > end:
            what = f"the checkpoint lacks {missing[0]}: another process could not write it"
            raise Interrupted(f"{what}. Run the same command to resume from the one before")
        time.sleep(PATIENCE)


def _first_row(tensor: DTensor) -> int:
    """Return the first row of this process' slice: FSDP2 slices the first dimension, as torch.chunk does."""
    per_process = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(tensor.device_mesh.get_local_rank() * per_process, tensor.shape[0])


def _file_name(rank: int) -> str:
    return STATE if rank == 0 else f"state-{rank:04d}.safetensors"


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
