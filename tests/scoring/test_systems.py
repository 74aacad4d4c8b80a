"""Systems on shared weights: whatever an adapter does to the weights, each system is the one of its own lone load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from posttrain.artifact import ModelSource
from posttrain.config.regression import BaseSettings
from posttrain.config.schema import GateConfig, Role
from posttrain.errors import BadInput
from posttrain.gate.spec import GateRequest
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.model.probe import logits as probe_logits
from posttrain.model.probe import random_ids
from posttrain.model.reloading import probe_both
from posttrain.regression.candidate import read_candidate
from posttrain.regression.changes import require_change, require_tokenizer, with_brought_rows
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading, SharedWeights
from tests.support.adapters import Log
from tests.support.quizzes import gate_task, write_quizzes
from tests.support.tiny import TEMPLATE, base_source, tiny_llama, tiny_tokenizer, write_base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft says what is unusual about these adapters
BIASES = {"attention_bias": True, "mlp_bias": True}
TARGETS = ["q_proj", "v_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)


KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "plain": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_niter_4": lambda: lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva", eva_config=EvaConfig()),
    "mica": lambda: lora(init_lora_weights="mica"),
    "biases": lambda: lora(bias="lora_only"),
    "all_biases": lambda: lora(bias="all"),
    "lora_bias": lambda: lora(lora_bias=True),
    "replicated": lambda: lora(layer_replication=[[0, 2], [0, 2]]),
    "saved_head": lambda: lora(modules_to_save=["lm_head"]),
    "saved_norms": lambda: lora(modules_to_save=["norm"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=[]),
    "loha": lambda: LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS),
    "oft": lambda: OFTConfig(task_type="CAUSAL_LM", oft_block_size=8, target_modules=TARGETS),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
"""Adapters by what they do to the weights under them."""


@dataclass
class Counting:
    """A loader that counts."""

    loads: int = 0

    def load(self, source: ModelSource, dtype: str) -> Any:
        self.loads += 1
        return load_model(source, dtype)

    @property
    def loading(self) -> Loading:
        return Loading(self.load, load_tokenizer, "cpu")


@dataclass(frozen=True)
class Material:
    """A base with biases, and adapters on it."""

    folder: Path
    base: ModelSource

    def adapter(self, kind: str) -> ModelSource:
        """Return a trained adapter of ``kind``, as peft saves it."""
        path = self.folder / kind
        if not path.exists():
            torch.manual_seed(1)
            _disturb(get_peft_model(tiny_llama(**BIASES), KINDS[kind]())).save_pretrained(path)
        return replace(self.base, name=kind, adapter=path, digest=f"digest of {kind}")


def _disturb(model: Any) -> Any:
    """Change whatever is trained, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = write_quizzes(tmp_path_factory.mktemp("systems"))
    return Material(folder, base_source(write_base(folder / "biased", **BIASES)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids(128), use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_system_is_the_one_of_its_own_lone_load(material: Material, kind: str) -> None:
    """In any order, and again: a gate with looks asks each system several times."""
    systems = {"base": material.base, "candidate": material.adapter(kind), "parent": material.adapter("plain")}
    alone = {name: logits(load_model(source, "float32")) for name, source in systems.items()}
    assert not torch.equal(alone["base"], alone["candidate"])
    counting = Counting()
    weights = SharedWeights(systems, "float32", counting.loading)
    for name in ("candidate", "parent", "base", "candidate"):
        with weights.speaking_as(name) as model:
            assert torch.equal(logits(model), alone[name]), name
    if kind in ("plain", "rslora", "dora", "gaussian", "tokens", "saved_head"):
        assert counting.loads == 1


@pytest.mark.parametrize("kind", ["pissa", "olora", "all_biases", "replicated", "saved_norms"])
def test_the_base_under_any_adapter_has_the_score_of_the_base_alone(
    material: Material, tmp_path: Path, kind: str
) -> None:
    """A wrong score would be kept under the base's own digest, and judge every later adapter."""

    def score(cache: str, **systems: ModelSource) -> list[dict[str, float]]:
        request = GateRequest(
            stage="sft", gate=GateConfig(batch_size=16), dtype="float32", systems=systems,
            tasks={"quiz": replace(gate_task(material.folder, "likelihood0"), role=Role.lift)},
            cache=tmp_path / cache, scorecard=tmp_path / "scorecard.jsonl",
        )  # fmt: skip
        card = evaluate(request, Log(), Counting().loading)
        return [dict(row.metrics) for row in card.rows if row.system == "base"]

    alone = score("alone", base=material.base, candidate=material.base)
    assert score("kept", base=material.base, candidate=material.adapter(kind)) == alone
    assert score("kept", base=material.base, candidate=material.adapter("plain")) == alone


@pytest.mark.parametrize("kind", ["plain", "pissa", "olora", "all_biases", "replicated"])
def test_a_change_is_measured_against_untouched_weights(material: Material, kind: str) -> None:
    source = material.adapter(kind)
    found, parents = probe_both(source, material.base, "float32", random_ids(128))
    ids = random_ids(128)
    assert torch.equal(parents, probe_logits(load_model(material.base, "float32"), ids))
    assert torch.equal(found, probe_logits(load_model(source, "float32"), ids))


@pytest.mark.parametrize(("chat", "answer"), [(True, "a"), (False, "a" + 10 * "b")])
def test_a_chat_ends_at_the_stop_token_of_its_template(
    material: Material, tmp_path: Path, chat: bool, answer: str
) -> None:
    """The model says ``a``, then the stop token, and then ``b`` for ever; its own end token is another."""
    base = _bigram(tmp_path / "bigram")
    request = GateRequest(
        stage="sft", gate=GateConfig(batch_size=16), dtype="float32",
        systems={name: replace(base, name=name) for name in ("base", "candidate")},
        tasks={"quiz": replace(gate_task(material.folder, "generate0"), chat=chat)},
        cache=tmp_path / "cache", scorecard=tmp_path / "scorecard.jsonl",
    )  # fmt: skip
    card = evaluate(request, Log(), Counting().loading)
    assert {row.response for row in card.rows if row.system == "base"} == {answer}
    assert {row.response for row in card.rows if row.system == "candidate"} == {answer}


def _bigram(folder: Path) -> ModelSource:
    """Write a model whose next token follows from the last one alone."""
    write_base(folder, hidden_size=128, num_hidden_layers=1)
    tokenizer = load_tokenizer(base_source(folder))
    say, stop, more = tokenizer.convert_tokens_to_ids(["a", "<|system|>", "b"])
    following = torch.full((128,), say)
    following[torch.tensor([say, stop, more])] = torch.tensor([stop, more, more])
    tensors = load_file(folder / "model.safetensors")
    head = torch.zeros(128, 128)
    head[following, torch.arange(128)] = 1.0
    tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "proj" in name}
    tensors |= {"model.embed_tokens.weight": torch.eye(128), "lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<|system|>"))
    return base_source(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("known", "rows", "settings"),
    [
        (104, 106, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (104, 128, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (104, 106, {"modules_to_save": ["embed_tokens"]}),
        (104, 106, {}),
        (128, 106, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_an_adapter_brings_the_embeddings_of_added_tokens(
    tmp_path: Path, known: int, rows: int, settings: dict[str, Any], tied: bool
) -> None:
    """Other tools lengthen the embeddings, or cut spare rows off, and save them whole beside the adapter."""
    size = {"vocab_size": known, "tie_word_embeddings": tied}
    base = write_base(tmp_path / "base", **size)
    tokenizer, model = tiny_tokenizer(), tiny_llama(**size)
    tokenizer.add_tokens(["<one>", "<two>"], special_tokens=True)
    model.resize_token_embeddings(rows, mean_resizing=False)
    trained = _disturb(get_peft_model(model, lora(**settings)))
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    candidate = with_brought_rows(read_candidate(tmp_path / "adapter", BaseSettings(path=str(base))))
    assert len(require_tokenizer(candidate)) == 106
    require_change(candidate)
    weights = SharedWeights({"base": candidate.base, "candidate": candidate.source}, "float32", Counting().loading)
    ids, added = random_ids(104), torch.tensor([[5, 104, 105]])
    with weights.speaking_as("candidate") as found, torch.no_grad():
        for given in (ids, added):
            assert torch.allclose(found(given).logits, trained.eval()(given).logits, atol=1e-5)
    alone = load_model(base_source(base), "float32")
    with weights.speaking_as("base") as found, torch.no_grad():
        assert torch.equal(found(ids).logits[..., :known], alone(ids).logits)
        assert found(added).logits.isfinite().all()
        assert (found(ids).logits[..., known:] < -1e3).all()


def test_an_adapter_without_the_embeddings_of_its_tokens_is_rejected(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", vocab_size=104)
    _disturb(get_peft_model(tiny_llama(vocab_size=104), lora())).save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    candidate = with_brought_rows(read_candidate(tmp_path / "adapter", BaseSettings(path=str(base))))
    with pytest.raises(BadInput, match=r"adds <one>, which \S+ has no embeddings for"):
        require_tokenizer(candidate)


def test_a_forward_pass_that_changes_weights_is_noticed(material: Material) -> None:
    counting = Counting()
    weights = SharedWeights(
        {"base": material.base, "candidate": material.adapter("plain")}, "float32", counting.loading
    )
    with weights.speaking_as("candidate") as model, torch.no_grad():
        next(model.get_base_model().parameters())[0, 0] += 1e-7
    with weights.speaking_as("base") as model:
        assert torch.equal(logits(model), logits(load_model(material.base, "float32")))
    assert counting.loads == 2
