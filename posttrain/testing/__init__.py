"""Tools for testing a stage: a conformance suite, a tiny model, a fake gate.

    from posttrain.testing import StageConformance

    class TestMine(StageConformance):
        kind = "mine"
        settings = {"lr": 1e-3}

The suite is a class of tests for pytest. Only running it needs pytest installed: nothing here imports it.
"""

from posttrain.testing.conformance import StageConformance
from posttrain.testing.evaluator import FakeEvaluator
from posttrain.testing.project import Project, example_records
from posttrain.testing.recording import Recorder
from posttrain.testing.tiny import tiny_llama, tiny_tokenizer, write_base, write_sft

__all__ = [
    "FakeEvaluator",
    "Project",
    "Recorder",
    "StageConformance",
    "example_records",
    "tiny_llama",
    "tiny_tokenizer",
    "write_base",
    "write_sft",
]
