"""Special tokens missing from the base: added, trained by the right method, saved, reloaded, trained again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posttrain.artifact import ModelSource
from posttrain.config.compose import compose
from posttrain.config.schema import LoraSettings, Method, ModelConfig
from posttrain.engine.attention import install
from posttrain.engine.gradient import add_gradient
from posttrain.errors import BadInput
from posttrain.model.added_tokens import embedding_layers
from posttrain.model.base import resolve_base
from posttrain.model.checks import check_output
from posttrain.model.loading import added_token_ids, load_model, load_tokenizer, load_trainable, new_adapter
from posttrain.model.saving import save_model
from posttrain.plan import make_plan
from posttrain.scoring.systems import Loading, SharedWeights, group_by_weights
from posttrain.sft.stage import run
from tests.support.fakes import GATES, Script, scripted_host, write_project
from tests.support.sft import context, conversations
from tests.support.tiny import (
    TURNS,
    VOCABULARY,
    Killed,
    Recorder,
    base_source,
    documents_of,
    packed_row,
    published,
    sft_config,
    tiny_tokenizer,
    write_base,
)

TOKENS = ("<think>", "</think>", "<|turn|>")
IDS = torch.tensor([[4, 5, 130, 6, 128, 7, 129, 8]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied: bool = request.param
    path = write_base(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=tied, hidden_size=64)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<spare{i}>" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def base(folder: Path) -> ModelSource:
    return base_source(folder, added_tokens=list(TOKENS))


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids).logits
    return result


def tied(source: ModelSource) -> bool:
    return bool(json.loads((source.model / "config.json").read_text())["tie_word_embeddings"])


def test_new_tokens_follow_the_known_ones_and_start_as_their_mean(base: ModelSource) -> None:
    assert added_token_ids(base) == [128, 129, 130]
    tokenizer = load_tokenizer(base)
    assert tokenizer("<|user|>a</think>b")["input_ids"] == [1, 14, 129, 15]
    model, plain = load_model(base, "float32"), load_model(replace(base, added_tokens=()), "float32")
    assert torch.equal(logits(model, IDS[:, :2])[..., :128], logits(plain, IDS[:, :2]))
    for name, layer in embedding_layers(model).items():
        before = plain.get_parameter(f"{name}.weight")
        assert layer.weight.shape == (131, 64)
        assert torch.equal(layer.weight[:128], before)
        assert torch.allclose(layer.weight[128:], before.mean(0).expand(3, 64), atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied(base)


def test_spare_rows_are_used_before_new_ones_are_made(tmp_path: Path) -> None:
    source = base_source(write_base(tmp_path / "base"), added_tokens=list(TOKENS))  # 104 tokens, 128 rows
    ids, model = added_token_ids(source), load_model(source, "float32")
    assert ids == [104, 105, 106]
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert torch.allclose(model.lm_head.weight[105], model.lm_head.weight[:104].mean(0), atol=1e-6)


@pytest.mark.parametrize("method", list(Method))
def test_the_stage_trains_saves_and_reloads_them(base: ModelSource, tmp_path: Path, method: Method) -> None:
    stage = context(base, tmp_path, method=method, epochs=6, sequence_length=96, lora=LoraSettings(r=4, dora=True))
    run(stage)
    check_output(stage.output, base)
    source = published(stage.output, base, tmp_path / "artifact").source(base)
    tokenizer, model = load_tokenizer(source), load_model(source, "float32")
    assert tokenizer("<|turn|>")["input_ids"] == [130]
    assert tokenizer.chat_template == TURNS
    assert "<|turn|>" in tokenizer.all_special_tokens + [str(t) for t in tokenizer.added_tokens_decoder.values()]
    assert model.get_input_embeddings().weight.shape[0] == 131
    start = load_model(replace(base, quantization=source.quantization), "float32")
    assert not torch.allclose(logits(model), logits(start), atol=1e-2)
    used = logits(start, IDS[:, 2:3])  # <|turn|> is in every row, and its embedding has moved
    assert not torch.allclose(logits(model, IDS[:, 2:3]), used, atol=1e-3)
    assert torch.allclose(logits(load_trainable(source, "float32")), logits(model), atol=1e-5)


def test_an_adapter_holds_the_rows_of_new_tokens_and_no_embeddings(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, max_steps=2)
    run(stage)
    tensors = load_file(stage.output / "adapter_model.safetensors")
    rows = {name: tensor.shape for name, tensor in tensors.items() if ".lora_" not in name}
    names = ["model.embed_tokens"] if tied(base) else ["lm_head", "model.embed_tokens"]
    assert rows == {f"base_model.model.{name}.token_adapter.trainable_tokens_delta": (3, 64) for name in names}
    config = json.loads((stage.output / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {name: [128, 129, 130] for name in names}


def test_an_interrupted_stage_ends_with_the_same_bytes(base: ModelSource, tmp_path: Path) -> None:
    whole = context(base, tmp_path / "whole")
    run(whole)
    killed = replace(context(base, tmp_path / "killed"), progress=Recorder(fail_at=3))
    with pytest.raises(Killed):
        run(killed)
    run(replace(killed, progress=Recorder()))
    for path in whole.output.iterdir():
        assert (killed.output / path.name).read_bytes() == path.read_bytes()


def test_gradients_reach_exactly_the_new_rows(base: ModelSource) -> None:
    """Against full fine-tuning of the same model: the same gradient on the same rows."""
    full = load_trainable(base, "float32")
    adapted = new_adapter(load_model(base, "float32"), LoraSettings(r=4), seed=0, tokens=added_token_ids(base))
    for model in (full, adapted):
        model.eval()
        model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None and "lora" not in name}
    layers = embedding_layers(full)
    assert len(trained) == len(layers)
    for name, layer in layers.items():
        (gradient,) = [g for key, g in trained.items() if f".{name}." in key]
        assert torch.allclose(gradient, layer.weight.grad[128:], rtol=1e-4, atol=1e-6)


def test_the_loop_computes_the_gradient_of_the_models_own_forward_pass(base: ModelSource) -> None:
    ids = np.array([4, 130, 5, 128, 6, 129, 7, 130], np.int32)
    mask = np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
    row, trained = packed_row([(ids, mask), (ids[::-1].copy(), mask)]), 10
    loop, plain = (
        new_adapter(load_model(base, "float32"), LoraSettings(r=4), seed=0, tokens=added_token_ids(base))
        for _ in range(2)
    )
    install(loop)
    add_gradient(loop, [row], trained, sft_config(), "float32")
    for document in documents_of(row):
        labels = torch.tensor(np.where(document.mask, document.input_ids, -100))[None].long()
        out = plain(input_ids=torch.tensor(document.input_ids)[None].long(), labels=labels)
        (out.loss * int(document.mask.sum()) / trained).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in loop.named_parameters() if p.requires_grad}
    assert sum("trainable_tokens" in name for name in found) == (1 if tied(base) else 2)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / (gradient.norm() + 1e-6)) < 1e-5, name


def test_a_later_stage_trains_the_rest_of_the_adapter_on(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path / "first", epochs=3)
    run(stage)
    parent = published(stage.output, base, tmp_path / "sft").source(base)
    policy = load_trainable(parent, "float32")
    assert torch.equal(logits(policy), logits(load_model(parent, "float32")))
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name in trained:
            policy.get_parameter(name).mul_(1.1)
    (tmp_path / "output").mkdir()
    save_model(policy, parent, tmp_path / "output", "float32")
    check_output(tmp_path / "output", parent)
    child = published(tmp_path / "output", base, tmp_path / "dpo").source(base)
    assert torch.allclose(logits(load_model(child, "float32")), logits(policy), atol=1e-6)
    assert load_tokenizer(child)("<|turn|>")["input_ids"] == [130]


def test_the_gate_scores_base_parent_and_candidate_on_one_load(base: ModelSource, tmp_path: Path) -> None:
    systems = {"base": base}
    for name, lr in (("parent", 1e-2), ("candidate", 3e-2)):
        stage = context(base, tmp_path / name, epochs=2, lr=lr)
        run(stage)
        systems[name] = published(stage.output, base, tmp_path / f"{name}-artifact").source(base)
    (group,) = group_by_weights(systems)
    weights = SharedWeights(group, "float32", Loading(load_model, load_tokenizer, "cpu"))
    for name, source in systems.items():
        with weights.speaking_as(name) as model:
            assert torch.equal(logits(model), logits(load_model(source, "float32")))


def test_a_token_that_the_model_knows_is_rejected(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.added_tokens: the model already knows <\|user\|>"):
        load_model(base_source(folder, added_tokens=["<new>", "<|user|>"]), "float32")


def test_tokens_that_a_tokenizer_brings_without_embeddings_can_be_named(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", vocab_size=104)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    records = [
        replace(each, messages=(each.messages[0], {**each.messages[1], "content": "x"})) for each in conversations(4)
    ]
    with_token = tokenizer.chat_template.replace("<|end|>", "<new><|end|>")
    (folder / "chat_template.jinja").write_text(with_token)
    with pytest.raises(BadInput, match=r"token 104, but the model has only 104 .*\n.*model\.added_tokens"):
        run(context(base_source(folder), tmp_path / "without", records=records))
    run(context(base_source(folder, added_tokens=["<new>"]), tmp_path / "with", records=records, max_steps=1))


def test_an_artifact_keeps_its_tokens_for_the_stages_after_it(base: ModelSource, folder: Path, tmp_path: Path) -> None:
    stage = context(base, tmp_path, max_steps=2)
    run(stage)
    artifact = published(stage.output, base, tmp_path / "artifact")
    again = resolve_base(ModelConfig(path=str(folder)), artifact.pins)
    assert (again.added_tokens, again.digest) == (TOKENS, base.digest)
    with pytest.raises(BadInput, match=r"model\.added_tokens: .* was trained with"):
        resolve_base(ModelConfig(path=str(folder), added_tokens=["<other>"]), artifact.pins)


@pytest.mark.parametrize("tokens", ["['']", "[' <a>']", "['<a>','<a>']"])
def test_impossible_tokens_are_problems_of_the_plan(working_folder: Path, tokens: str) -> None:
    write_project(working_folder)
    host = scripted_host(Script())
    words = ["recipe=mine", *GATES]
    assert make_plan(compose(host, [*words, "model.added_tokens=['<a>','<b>']"]), host).model.added_tokens == [
        "<a>",
        "<b>",
    ]
    with pytest.raises(BadInput, match=r"model\.added_tokens: .* is empty, has blanks at an end, or occurs twice"):
        make_plan(compose(host, [*words, f"model.added_tokens={tokens}"]), host)
