"""The proof of the gradient: it holds for what trains, and fails for every fault that is put into it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import cli
from posttrain.data.records import Conversation
from posttrain.engine import attention, gradient
from posttrain.engine.attention_kernels import Documents
from posttrain.errors import BadInput
from posttrain.model.loading import new_adapter
from posttrain.sft import proof
from posttrain.sft.proof import LENGTH, Check, Proof, plain_gradient, sample
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import MaskProof
from posttrain.tokens.packing import PackedRow
from tests.support.architectures import tiny_model
from tests.support.tiny import documents_of, packed_rows, sft_config, tiny_llama, tiny_tokenizer, write_base

DOCUMENTS = [
    Rendered(alone.input_ids.tolist(), alone.mask.tolist(), "")
    for alone in documents_of(packed_rows([8], longest=24)[0])
]
RANKS = list(proof.RANKS.values())
RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: train.jsonl, sequence_length: 96, method: full}
"""


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes take seconds to start: only the tests that are about them do it."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(proof, "RANKS_PARAMETERS", 0)


@pytest.fixture
def processes() -> None:
    """Ask for the two processes."""


def checks(
    *, lora: bool = False, tied: bool = False, documents: Sequence[Rendered] = DOCUMENTS, **settings: Any
) -> list[Check]:
    model, config = tiny_llama(tie_word_embeddings=tied), sft_config(**settings)
    policy = new_adapter(model, config.lora, seed=0) if lora else model
    return list(Proof(model=policy, documents=documents, config=config).checks())


def failures(found: Sequence[Check]) -> set[str]:
    return {check.name for check in found if check.failed}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_comparison_holds(lora: bool, tied: bool) -> None:
    found = checks(lora=lora, tied=tied)
    assert not failures(found)
    assert [check.name for check in found if check.error is None] == RANKS
    for check in found:
        if check.error is not None:
            assert check.error <= (2e-6 if check.against == "float64" else 1e-6), check


@pytest.mark.parametrize("settings", [{"packing": False}, {"per_device_batch_size": 3}, {"loss_chunk": 1}])
def test_every_comparison_holds_whatever_the_recipe_sets(settings: dict[str, Any]) -> None:
    assert not failures(checks(**settings))


def test_two_processes_give_the_same_gradient_in_silence(processes: None, capfd: pytest.CaptureFixture[str]) -> None:
    found = [check for check in checks(lora=True) if check.name in RANKS]
    assert [check.name for check in found] == RANKS
    # DeepSpeed sums in float32
    limits = [1e-6 if check.name == proof.RANKS["deepspeed"] else 1e-12 for check in found]
    assert all(each.error is not None and each.error <= limit for each, limit in zip(found, limits, strict=True)), found
    assert capfd.readouterr() == ("", "")  # they would write into the table of the comparisons


def test_processes_that_do_not_end_are_named_and_ended(processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.sft.ranks.SECONDS", 0)
    found = [check for check in checks(lora=True) if check.name in RANKS]
    assert {check.reason for check in found} == {"ddp did not end within 0 seconds"}
    assert not multiprocessing.active_children()


def test_one_document_is_enough() -> None:
    found = checks(documents=DOCUMENTS[:1])
    assert not failures(found)
    assert "a document when its neighbour changes" in {check.name for check in found if check.error is None}


def test_a_short_sliding_window_is_proven_but_not_under_a_mask() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = {**tiny_llama().config.to_dict(), "sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(**{k: v for k, v in settings.items() if k != "model_type"}))
    found = list(Proof(model=model, documents=DOCUMENTS, config=sft_config()).checks())
    assert not failures(found)
    assert found[-1].reason == "the model attends to 4 tokens only"


@pytest.mark.parametrize("scale", [1, 2])
def test_the_rounding_of_a_deep_model_accuses_nothing_and_hides_nothing(scale: int) -> None:
    deep = tiny_llama(num_hidden_layers=24)
    with torch.no_grad():
        for layer in deep.model.layers:
            layer.self_attn.q_proj.weight *= scale  # sharper attention: rounding grows
    rounding, own, *others = Proof(model=deep, documents=DOCUMENTS, config=sft_config()).checks()
    assert rounding.error is not None
    assert 1e-6 < rounding.error < rounding.limit
    assert own.limit == 2 * rounding.error
    assert not failures([own, *others])
    assert {check.limit for check in others} == {1e-6}
    assert all(check.error <= 1e-9 for check in others if check.error is not None)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_mixture_of_experts_is_proven_and_trains_on_with_its_own_product(name: str, lora: bool) -> None:
    model, config = tiny_model(name), sft_config()
    product = model.get_experts_implementation()
    policy = new_adapter(model, config.lora, seed=0) if lora else model
    found = list(Proof(model=policy, documents=DOCUMENTS, config=config).checks())
    assert not failures(found)
    assert len([check for check in found if check.error is not None]) >= 9
    assert model.get_experts_implementation() == product == {"": "grouped_mm"}


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_what_cannot_be_packed_is_proven_without_packing(name: str) -> None:
    found = list(Proof(model=tiny_model(name), documents=DOCUMENTS, config=sft_config(packing=False)).checks())
    assert not failures(found)
    assert [check.reason for check in found if check.name == "attention of a whole row under one mask"] == [
        "the model cannot be packed"
    ]


def test_each_comparison_is_named_as_it_begins() -> None:
    begun: list[str] = []
    for check in Proof(model=tiny_llama(), documents=DOCUMENTS, config=sft_config()).checks(began=begun.append):
        assert begun[-1] == check.name
    assert len(begun) == len(set(begun)) == 13


def test_float32_that_is_none_fails() -> None:
    model = tiny_llama()
    correct = model.model.layers[0].mlp.forward

    def coarse(hidden: torch.Tensor) -> torch.Tensor:
        return correct(hidden) if hidden.dtype == torch.float64 else correct(hidden).bfloat16().float()

    model.model.layers[0].mlp.forward = coarse
    assert "float32 itself" in failures(list(Proof(model=model, documents=DOCUMENTS, config=sft_config()).checks()))


def test_an_adapters_a_has_a_gradient_to_compare() -> None:
    config = sft_config()
    model = new_adapter(tiny_llama(), config.lora, seed=0)
    list(Proof(model=model, documents=DOCUMENTS, config=config).checks())
    sizes = {name: float(g.norm()) for name, g in plain_gradient(model, DOCUMENTS).items() if ".lora_A." in name}
    assert sizes
    assert all(sizes.values())


# --- Faults that must not pass ----------------------------------------------------------------------------------------


def average_of_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch weighs the same, however many tokens of it are trained."""

    def averaged(model: Any, rows: Sequence[PackedRow], trained: int, config: Any, dtype: str) -> None:
        size = config.per_device_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        for batch in batches:
            gradient.add_gradient(model, batch, gradient.trained_tokens(batch) * len(batches), config, dtype)

    monkeypatch.setattr(proof, "add_gradient", averaged)


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents of a row are one."""
    for module in (gradient, proof):
        monkeypatch.setattr(
            module, "packed_hidden", lambda causal, ids, lengths: attention.packed_hidden(causal, ids, [sum(lengths)])
        )


def positions_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is isolated, but positions are counted through the whole row."""

    def hidden(causal: Any, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None] * 2
        output = causal.get_decoder()(
            input_ids=ids, position_ids=positions, use_cache=False, documents=Documents.of(lengths, ids.device)
        )
        return output.last_hidden_state[0]

    monkeypatch.setattr(gradient, "packed_hidden", hidden)


def targets_changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray, PackedRow], np.ndarray]) -> None:
    correct = PackedRow.targets
    monkeypatch.setattr(PackedRow, "targets", lambda row, ignored=-100: change(correct(row, ignored), row))


def untrained_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of every document is not trained."""

    def change(targets: np.ndarray, row: PackedRow) -> np.ndarray:
        targets[np.cumsum(row.lengths) - 2] = -100
        return targets

    targets_changed(monkeypatch, change)


def shifted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position predicts itself."""
    targets_changed(monkeypatch, lambda targets, row: np.roll(targets, 1))


def one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "trained_tokens", lambda rows: gradient.trained_tokens(rows) + 1)


def every_token_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "trained_tokens", lambda rows: sum(len(row.input_ids) for row in rows))


def chunk_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last, shorter chunk of the loss is left out."""
    correct = gradient.summed_cross_entropy

    def shorter(head: Any, hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        kept = max(len(targets) // chunk * chunk, min(chunk, len(targets)))
        return correct(head, hidden[:kept], targets[:kept], chunk)

    monkeypatch.setattr(gradient, "summed_cross_entropy", shorter)


OWN = "the loop, as the recipe sets it"


@pytest.mark.parametrize(
    ("sabotage", "caught_by"),
    [
        (average_of_averages, OWN),
        (leak, "a document when its neighbour changes"),
        (leak, OWN),
        (positions_that_go_on, OWN),
        (untrained_stop, OWN),
        (shifted_mask, OWN),
        (one_token_too_many, OWN),
        (every_token_counted, OWN),
        (chunk_lost, "loss in chunks of 7 tokens"),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_fault_is_found(
    sabotage: Callable[[pytest.MonkeyPatch], None], caught_by: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    found = checks(lora=lora)
    assert caught_by in failures(found)
    assert max(check.error for check in found if check.error is not None) > 1e-3


def test_an_error_that_is_no_number_fails() -> None:
    assert Check(name="some", error=float("nan")).failed
    assert not Check(name="some", reason="too large").failed


# --- Which documents, and their mask ----------------------------------------------------------------------------------


def test_a_sample_is_short_and_trained_whatever_the_documents() -> None:
    long = Rendered(list(range(1000)), [index >= 900 for index in range(1000)], "")
    untrained = Rendered(list(range(10)), [False] * 10, "")
    found = sample([untrained, long] * 20, sequence_length=950)
    assert len(found) == 8
    assert all(len(document.ids) <= LENGTH and any(document.mask[1:]) for document in found)
    assert found[0].ids[-1] == 949
    with pytest.raises(BadInput, match="no trained token in the first 900 tokens of 40 records"):
        sample([untrained, long] * 20, sequence_length=900)


MESSAGES = ("user", "hi"), ("assistant", "hello"), ("user", "2?"), ("assistant", "two  2")
TALK = Conversation(messages=tuple({"role": role, "content": said} for role, said in MESSAGES), where="talk.jsonl:1")


def remasked(change: Callable[[list[bool]], list[bool]]) -> str | None:
    tokenizer = tiny_tokenizer()
    rendered = ChatRenderer(tokenizer).conversation(TALK)
    return MaskProof(tokenizer).fault(TALK, Rendered(rendered.ids, change(rendered.mask), rendered.text))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda mask: mask, None),
        (lambda mask: [*mask[:-1], False], "the stop token after 'two  2' is not trained"),
        (lambda mask: [*mask[1:], False], "the stop token after 'hello' is not trained"),
        (lambda mask: [False, *mask[:-1]], "'hello' is not trained as a whole"),
        (lambda mask: [True] * len(mask), "1 runs of trained tokens for 2 answers"),
        (lambda mask: [False] * len(mask), "0 runs of trained tokens for 2 answers"),
    ],
)
def test_a_wrong_mask_is_seen_in_the_tokens(change: Callable[[list[bool]], list[bool]], fault: str | None) -> None:
    assert remasked(change) == fault


@pytest.mark.parametrize("last_only", [False, True])
def test_turns_that_are_context_are_not_missed(last_only: bool) -> None:
    tokenizer = tiny_tokenizer()
    untrained = tuple(
        {**message, "train": False} if message["content"] == "hello" else message for message in TALK.messages
    )
    record = Conversation(messages=TALK.messages if last_only else untrained, where="talk.jsonl:1")
    rendered = ChatRenderer(tokenizer).conversation(record, last_only=last_only)
    assert MaskProof(tokenizer).fault(record, rendered, last_only=last_only) is None
    assert MaskProof(tokenizer).fault(TALK, rendered) == "1 runs of trained tokens for 2 answers"


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(working_folder: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    write_base(working_folder / "base")
    lines = [json.dumps({"prompt": f"{i}+1", "completion": f"it is {i + 1}"}) for i in range(20)]
    (working_folder / "train.jsonl").write_text("\n".join(lines))
    return working_folder


def doctor(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "recipe=mine", *words])
    return int(caught.value.code or 0)


def test_the_command_proves_the_gradient(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(project.rglob("*"))
    assert doctor() == 0
    text = capsys.readouterr().out
    assert "20 records: every answer trained with its stop token" in text
    size = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert f"full, {size:,} of {size:,} parameters trained" in text
    assert "SDPA per document" in text
    assert text.count("  ok\n") == 10
    last = text.splitlines()[-1]
    assert last == f"The SFT gradient of mine is right in every comparison that was run; not run: {', '.join(RANKS)}."
    assert sorted(project.rglob("*")) == before


def test_a_wrong_gradient_ends_with_code_5_and_names_the_comparison(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    average_of_averages(monkeypatch)
    assert doctor("sft.per_device_batch_size=4") == 5
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "is right" not in captured.out
    assert "the SFT gradient of mine is wrong: accumulation, one row at a time (" in captured.err


def test_a_wrong_mask_ends_with_code_5(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    correct = ChatRenderer.conversation

    def shortened(renderer: ChatRenderer, record: Conversation, **options: bool) -> Rendered:
        rendered = correct(renderer, record, **options)
        return Rendered(rendered.ids, [*rendered.mask[:-1], False], rendered.text)

    monkeypatch.setattr(ChatRenderer, "conversation", shortened)
    assert doctor() == 5
    assert "train.jsonl:1 is wrong: the stop token after 'it is 1' is not trained" in capsys.readouterr().err
