"""Models that engines with sliced weights cannot train: rejected before anything is trained, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.engine import loop
from posttrain.engine.engine import DEEPSPEED, FSDP, Single
from posttrain.engine.units import reject_lone_experts
from posttrain.errors import BadInput
from tests.engine.test_attention import UNPACKABLE
from tests.support.architectures import tiny_model
from tests.support.training import training


class Mixture(torch.nn.Module):
    """A mixture of two experts, each a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])


@pytest.mark.parametrize("engine", [FSDP, DEEPSPEED])
def test_documents_computed_alone_are_rejected_where_processes_gather_layers_together(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.ENGINES, engine, Single)  # slicing needs other processes
    model = tiny_model(next(iter(UNPACKABLE)))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(BadInput, match=f"engine: {engine} cannot train {type(model).__name__}.*\n.*engine=ddp"):
        training(model, tmp_path, engine=engine, packing=False).run()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("engine", [FSDP, DEEPSPEED])
def test_experts_that_are_layers_of_their_own_are_rejected_where_they_are_trained(engine: str) -> None:
    model = Mixture()
    with pytest.raises(BadInput, match=rf"engine: {engine} cannot train experts .*\(experts\.0\.weight\)\n.*ddp"):
        reject_lone_experts(model, engine)
    reject_lone_experts(model.requires_grad_(False), engine)
