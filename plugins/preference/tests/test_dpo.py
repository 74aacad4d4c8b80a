from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from posttrain_preference.pairs import render_pairs
from posttrain_preference.stage import run
from preference_support.contexts import STAGES, MakeContext, content, progress, weights
from preference_support.loops import before_steps, objective
from safetensors.torch import load_file

from posttrain import ArtifactDamaged, BadInput, Diverged, StageContext
from posttrain.artifact import ModelSource
from posttrain.engine.answer_objective import Numbered
from posttrain.engine.answers import AnswerBatch
from posttrain.engine.loop import Training
from posttrain.engine.references import ReferenceFolder, References
from posttrain.engine.start import Start

KINDS = ("lora", "full")


# --- The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_ln_2_and_separates_the_answers(make_context: MakeContext, kind: str, dtype: str) -> None:
    context = make_context(kind, dtype=dtype)
    run(context)
    steps = progress(context).steps
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert progress(context).started == (6, 0)
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[1]["rewards_margin"] == pytest.approx(0)
    assert steps[6]["rewards_margin"] > 0.1
    assert steps[6]["rewards_accuracy"] == 1.0
    assert steps[6]["loss"] < steps[1]["loss"] - 0.05
    assert all(step["grad_norm"] > 0 for step in steps.values())
    rates = [step["lr"] for step in steps.values()]
    assert rates[0] == pytest.approx(2e-3)
    assert rates == sorted(rates, reverse=True)


def _erase(model: Any, part: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.zero_()


@pytest.mark.parametrize(("kind", "part"), [("lora", "lora_B"), ("full", "layers.1.mlp")])
def test_a_reference_that_is_not_the_parent_is_rejected(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kind: str, part: str
) -> None:
    honest = Start.of

    def then_lost(stage: str, model: Any, *rest: Any) -> Start[Any]:
        found = honest(stage, model, *rest)
        _erase(model, part)
        return found

    context = make_context(kind)
    monkeypatch.setattr(Start, "of", then_lost)
    with pytest.raises(ArtifactDamaged, match=r"the reference is not the SFT model: .*pairs\.jsonl:\d+ "):
        run(context)
    assert not list(context.output.iterdir())
    assert not progress(context).steps


@pytest.mark.parametrize(("kind", "part"), [("lora", "lora_B"), ("full", "layers.1.mlp")])
def test_a_policy_that_left_its_reference_is_rejected(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kind: str, part: str
) -> None:
    honest = Start.prove_reference
    context = make_context(kind)

    def then_lost(start: Start[Any], found: Any) -> None:
        honest(start, found)
        _erase(policies[0], part)

    policies: list[Any] = []
    load = StageContext.policy
    monkeypatch.setattr(StageContext, "policy", lambda context: policies.append(load(context)) or policies[0])
    monkeypatch.setattr(Start, "prove_reference", then_lost)
    with pytest.raises(ArtifactDamaged, match=r"does not start at the SFT model: .* be 0\.693147 within 0\.0001"):
        run(context)


# --- References are kept ----------------------------------------------------------------------------------------------


def computed(context: StageContext) -> list[int]:
    """Run the stage; return the numbers of rows whose reference was computed, as they were reported."""
    run(context)
    return [done for done, _, what in progress(context).parts if what == "reference row"]


def test_references_are_computed_once_for_all_runs(make_context: MakeContext, tmp_path: Path) -> None:
    first, again, other, less = (
        replace(make_context(folder=name, **settings), kept=tmp_path / "kept")
        for name, settings in (("a", {}), ("b", {"lr": 1e-3, "beta": 0.3}), ("c", {"records": 11}), ("d", {}))
    )
    assert computed(first)[-1] == 12
    assert computed(again) == []
    assert "reference log-probabilities: kept from an earlier run" in progress(again).notes
    assert computed(other)[-1] == 11
    assert computed(replace(less, parent=replace(less.parent, digest="2" * 64)))[-1] == 12
    assert len(list((tmp_path / "kept/references").iterdir())) == 3


def test_damaged_references_are_computed_again(make_context: MakeContext, tmp_path: Path) -> None:
    whole, again = (replace(make_context(folder=name), kept=tmp_path / "kept") for name in ("a", "b"))
    run(whole)
    (path,) = (tmp_path / "kept/references").glob("*/references.safetensors")
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    assert computed(again)[-1] == 12
    assert any("are not used: " in note and "SHA-256" in note for note in progress(again).notes)
    assert content(again.output) == content(whole.output)


def test_references_of_another_model_under_the_right_key_are_rejected(
    make_context: MakeContext, tmp_path: Path
) -> None:
    run(replace(make_context(folder="a"), kept=tmp_path / "kept"))
    (kept,) = (tmp_path / "kept/references").iterdir()
    tensors = load_file(kept / "references.safetensors")
    folder = ReferenceFolder(kept.parent, kept.name, print)
    rmtree(kept)
    folder.write(References(tensors["answers"] + 1, tensors["aside"]))
    with pytest.raises(ArtifactDamaged, match="the reference is not the SFT model"):
        run(replace(make_context(folder="b"), kept=tmp_path / "kept"))


# --- What the loop is fed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stage", ["dpo", "orpo"])
def test_the_loop_sees_exactly_the_rendered_ids(make_context: MakeContext, stage: str, shared: bool) -> None:
    prompt = ["what is the river", "the red heron", "what is the flag"]
    answers = ("the blue otter", "a clay town")
    context = make_context("lora", stage=stage, records=[(prompt, *answers)], per_device_batch_size=1)
    tokenizer = context.tokenizer()
    (row,) = render_pairs(context).rows
    batch = AnswerBatch.of([(row.prompt, [ids for _, ids in row.answers])], context.device(), shared=shared)
    text = "<|user|>{}<eos>\n<|assistant|>{}<eos>\n<|user|>{}<eos>\n<|assistant|>".format(*prompt)
    asked, *said = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (text, *(f"{answer}<eos>" for answer in answers))
    )
    whole = asked + said[0] + said[1] if shared else asked + said[0] + asked + said[1]
    assert batch.ids[0].tolist() == whole
    assert batch.targets.tolist() == said[0] + said[1]
    assert batch.owners.tolist() == [0] * len(said[0]) + [1] * len(said[1])


def test_no_answer_sees_another(make_context: MakeContext) -> None:
    """A changed answer changes the log-probabilities of no other."""
    found: list[torch.Tensor] = []

    def score(training: Training, engine: Any) -> None:
        rows = list(training.rows)
        changed = replace(rows[1].row, rejected=[*reversed(rows[1].row.rejected[:-1]), rows[1].row.rejected[-1]])
        for second in (rows[1], Numbered(rows[1].number, changed)):
            batch = objective(training).batch([rows[0], second, rows[2]], training.model.device)
            with torch.no_grad():
                found.append(objective(training).scores(training.model.eval(), batch).log_probs)

    before_steps(make_context(records=3), score)
    same = torch.isclose(found[0], found[1], rtol=1e-6)
    assert same.tolist() == [[True, True], [True, False], [True, True]]


def test_pairs_that_are_too_long_are_dropped_and_counted(make_context: MakeContext) -> None:
    long = [(["what is the " + "red " * 60], "yes", "no"), (["what is the flag"], "yes " * 60, "no")]
    context = make_context(records=[*long, (["what is the flag"], "yes", "no")], sequence_length=40, max_steps=1)
    run(context)
    assert context.metrics["pairs"] == 1
    assert context.metrics["dropped"] == 2
    assert "dropped 2 pairs longer than 40 tokens" in progress(context).notes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("records", "where", "what"),
    [
        (3, "{}.sequence_length", r"each of the \d {} is longer than 4 tokens"),
        ([], "{}.data", "holds no {}"),
        ([(["what is the flag"], "the red lace", "the red lace")], r"pairs\.jsonl:1", "the same"),
    ],
)
def test_nothing_to_train_on_is_bad_input(
    make_context: MakeContext, stage: str, records: Any, where: str, what: str
) -> None:
    noun = "answers" if stage == "kto" else "pairs"
    with pytest.raises(BadInput, match=f"{where.format(stage)}: .*{what.format(noun)}"):
        run(make_context(stage=stage, records=records, sequence_length=4))


@pytest.mark.parametrize("stage", STAGES)
def test_a_template_without_a_stop_token_is_rejected(
    make_context: MakeContext, parents: dict[str, ModelSource], stage: str
) -> None:
    """Answers would be taught not to end."""
    endless = replace(parents["lora"], chat_template=parents["lora"].chat_template.replace("<eos>", ""))
    context = replace(make_context(stage=stage), parent=endless)
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1.*stop token"):
        run(context)


def test_a_prompt_that_ends_otherwise_than_the_conversation_goes_on_keeps_its_end(
    make_context: MakeContext, parents: dict[str, ModelSource]
) -> None:
    """Without its end, here ``no``, another prompt would be trained than is asked later."""
    template = parents["lora"].chat_template.replace("<|assistant|>{% endif %}", "<|assistant|>no {% endif %}")
    context = replace(make_context(records=2), parent=replace(parents["lora"], chat_template=template))
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1"):
        run(context)


# --- The result -----------------------------------------------------------------------------------------------------


def test_the_same_adapter_goes_on(make_context: MakeContext, parents: dict[str, ModelSource]) -> None:
    context = make_context("lora")
    run(context)
    parent = parents["lora"].adapter
    assert parent is not None
    before, after = weights(parent), weights(context.output)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((context.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == 4
    assert config["use_rslora"]
    assert all(path.is_file() for path in context.output.iterdir())  # no folder of a second adapter


def test_full_weights_keep_the_parents_configuration(
    make_context: MakeContext, parents: dict[str, ModelSource]
) -> None:
    context = make_context("full", max_steps=2)
    run(context)
    before, after = weights(parents["full"].model), weights(context.output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((context.output / name).read_text()) == json.loads((parents["full"].model / name).read_text())


def test_metrics_tell_about_the_whole_run(make_context: MakeContext) -> None:
    context = make_context("lora", epochs=1)
    run(context)
    steps = progress(context).steps
    rendered = render_pairs(context).rows
    tokens = sum(len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rendered)
    reach = {each["kind"]: each["trained_matrices"] for each in context.metrics.pop("reach")}
    assert sum(reach.values()) > 0
    assert reach["embeddings"] == 0
    assert all("; usual is " in line for line in context.metrics.pop("warnings"))
    assert context.metrics == {
        "pairs": 12,
        "dropped": 0,
        "steps": 3,
        "final_loss": steps[3]["loss"],
        "rewards_margin": steps[3]["rewards_margin"],
        "tokens": tokens,
        "arithmetic": "float32",
    }
    assert sum(step["tokens"] for step in steps.values()) == tokens


def test_the_seed_decides_every_byte(make_context: MakeContext) -> None:
    contexts = [make_context("lora", folder=name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for context in contexts:
        run(context)
    first, second, other = (content(context.output) for context in contexts)
    assert first == second
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_divergence_stops_at_once(make_context: MakeContext) -> None:
    context = make_context("full", lr=1e30, max_grad_norm=1e30)
    with pytest.raises(Diverged, match=r"diverged at step 2: the loss is nan.*Lower lr"):
        run(context)
    assert list(progress(context).steps) == [1]
    assert not list(context.output.iterdir())
