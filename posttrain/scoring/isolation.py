"""Contexts in which scoring leaves no trace: no output, no random state, no setting of the model.

A gate runs between the stages of a run, in the same process: any trace would reach the next training, and a run with a
gate would train another model than a run without.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
import transformers

CHATTY = ("lm_eval", "datasets", "huggingface_hub", "transformers")
"""Loggers kept silent below ERROR while a gate scores."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, logs and warnings of lm_eval and of the libraries under it.

    Their bars would break the pipeline's own display.
    """
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    bars = transformers.logging.is_progress_bar_enabled(), not datasets.utils.are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars[0]:
            transformers.logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hide standard output and standard error: the modules of some tasks print their downloads."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators, and restore their states.

    Task functions and lm_eval draw from Python's, numpy's and torch's generators.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and give each its mode back.

    ``model.train()`` would not do: it also sets modules kept in evaluation mode on purpose.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def plain_generation(model: Any, ends: Iterable[int | None]) -> Iterator[None]:
    """Generate by the task's settings, up to ``ends``; of the model's own, keep only the end tokens.

    A sampling temperature or a repetition penalty in generation_config.json would otherwise change the scores.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    owns = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = sorted({end for end in (*owns, *ends) if end is not None})
    inner.generation_config = transformers.GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=stops or None)
    try:
        yield
    finally:
        inner.generation_config = own


@contextlib.contextmanager
def tied_already(model: Any) -> Iterator[None]:
    """Keep lm_eval from tying the weights of a loaded model again: it fails with rows of added tokens."""
    model.__dict__["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]
