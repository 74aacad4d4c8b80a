"""The settings of ``posttrain gate``: schema, default and help in one. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.config.launch import LaunchConfig
from posttrain.config.schema import MISSING, Dtype, GateConfig

GGUF = ".gguf"
"""Suffix of a candidate that is a file of llama.cpp."""


@dataclass(kw_only=True)
class BaseSettings:
    """The base model; by default the one that the adapter names."""

    path: str | None = None
    """Directory or hub name of the base model; needed for full weights that are no artifact."""
    revision: str | None = None
    """Commit of the hub repository."""
    chat_template: str | None = None
    """Jinja file of the chat template, for an adapter and a base without one."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, for anything but an artifact; ``date`` is the day it prints, by default today."""
    dtype: Dtype | None = None
    """Number format; by default that of the artifact's training, else float32 for a float32 base, else bfloat16."""


@dataclass(kw_only=True)
class RegressionConfig:
    """One gate on an existing adapter or model."""

    adapter: str = MISSING
    """Directory of an artifact, of a peft adapter or of full weights; or FILE.gguf with gate.backend=llama."""
    baseline: str | None = None
    """Directory of an earlier adapter, or its scores in FILE.json; a task may lose ``max_drop`` against them."""
    update_baseline: bool = False
    """Write the scores of an adapter that passes against its base into ``baseline`` (FILE.json)."""
    model: BaseSettings = field(default_factory=BaseSettings)
    gate: GateConfig = field(default_factory=GateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes that share the questions."""
    gate_data: Any = None
    """Files of rows to score, for gates that ask for them."""
    output_root: str = "runs"
    """Folder of cached scores and of the gate's records."""
    junit: str | None = None
    """JUnit XML file for the verdict."""
    markdown: str | None = None
    """Markdown file for the verdict, as a comment on a pull request."""
