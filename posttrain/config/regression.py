"""The settings of ``posttrain gate``: schema, default and help in one. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.config.schema import MISSING, Dtype, GateConfig


@dataclass(kw_only=True)
class BaseSettings:
    """What may be said about the base: by default it is what the adapter names."""

    path: str | None = None
    """Directory or hub name of the base model; needed for full weights that are no artifact."""
    revision: str | None = None
    """Commit of the hub repository."""
    chat_template: str | None = None
    """Jinja file, when neither the adapter nor the base has a chat template."""
    dtype: Dtype | None = None
    """Number format; by default what an artifact was trained in, or float32 where the base is, else bfloat16."""


@dataclass(kw_only=True)
class RegressionConfig:
    """One gate about one adapter or model that is there already."""

    adapter: str = MISSING
    """Directory of an artifact, of a peft adapter or of full weights."""
    baseline: str | None = None
    """Directory of a previous adapter, or its scores in FILE.json; no task may be worse than there by ``max_drop``."""
    update_baseline: bool = False
    """Write ``baseline`` (FILE.json) from the scores of an adapter that passes against its base."""
    model: BaseSettings = field(default_factory=BaseSettings)
    gate: GateConfig = field(default_factory=GateConfig)
    gate_data: Any = None
    """Files of rows to score, for gates that ask for them."""
    output_root: str = "runs"
    """Folder of cached scores, and of what the gate leaves behind."""
    junit: str | None = None
    """File for the verdict as JUnit XML."""
    markdown: str | None = None
    """File for the verdict as Markdown, for a pull request."""
