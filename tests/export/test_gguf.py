"""Files of llama.cpp: equal to the artifact as measured by llama.cpp itself, or not written at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer

from posttrain.config.schema import LoraSettings
from posttrain.export import gguf_file, parity, tensors
from posttrain.model import llama
from posttrain.model.loading import load_model, new_adapter
from posttrain.model.saving import save_model
from tests.support.command import main
from tests.support.gguf import FAMILIES, TEMPLATE, adapter_on, sentencepiece, write_model
from tests.support.tiny import base_source, nudge, published, write_base


def record(pattern: str, folder: str = "out") -> dict[str, Any]:
    (path,) = Path(folder).glob(pattern)
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_answers_as_the_weights_do(working_folder: Path, family: str) -> None:
    source = base_source(write_model(working_folder / "base", family))
    model = load_model(source, "float32")
    draft = working_folder / ".full"
    draft.mkdir()
    save_model(model, source, draft, "float32")
    artifact = published(draft, source, working_folder / "full")
    assert main("export", "full", "--to", "gguf", "output=out") == 0
    found = record("*.json")
    assert (found["parity"], found["ids"], found["greedy"], found["artifact"]) == (
        "agrees",
        "7/7",
        "7/7",
        artifact.digest,
    )
    assert found["log_prob"] < parity.LIMIT
    (path,) = Path("out").glob("*-f16.gguf")
    fields = GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert (fields["tokenizer.ggml.eos_token_id"].contents(), fields["tokenizer.ggml.eot_token_id"].contents()) == (
        2,
        0,
    )
    assert 'PARAMETER stop "<|im_end|>"' in Path("out/Modelfile").read_text()


def test_rank_stabilised_adapters_keep_their_scaling(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(working_folder / "base")
    adapter_on(base, working_folder / "adapter")
    assert main("export", "adapter", "--to=gguf-lora", "output=out") == 0
    found = record("*-lora.json")
    assert (found["parity"], found["greedy"]) == ("agrees", "7/7")
    assert Path("out/Modelfile").read_text().splitlines()[1].startswith("ADAPTER ./sft-")
    assert main("export", "adapter", "--to", "gguf", "output=merged") == 0
    assert record("*.json", "merged")["parity"] == "agrees"
    monkeypatch.setattr(gguf_file, "_alpha", lambda config, module, rank: float(config["lora_alpha"]))
    assert main("export", "adapter", "--to", "gguf-lora", "output=wrong") == 5
    assert list(Path("wrong").iterdir()) == []


def test_a_file_with_rows_in_the_wrong_order_is_not_kept(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_on(write_model(working_folder / "base"), working_folder / "adapter")
    monkeypatch.setattr(tensors, "PERMUTED", "")
    assert main("export", "adapter", "--to", "gguf", "output=out") == 5
    assert "answers otherwise than the artifact" in capsys.readouterr().err
    assert list(Path("out").iterdir()) == []


def test_a_quantised_file_is_called_lossy(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_on(write_model(working_folder / "base"), working_folder / "adapter")
    assert main("export", "adapter", "--to", "gguf", "type=q8_0", "output=out") == 0
    assert "no gate has judged this file" in capsys.readouterr().out
    found = record("*.lossy.json")
    assert (found["parity"], found["type"]) == ("lossy", "q8_0")
    assert (Path("out") / found["file"]).stat().st_size < 200_000
    assert main("card", "adapter", "output=card.md") == 0


def test_without_llama_cpp_the_file_says_that_nothing_was_measured(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_on(write_model(working_folder / "base"), working_folder / "adapter")
    monkeypatch.setattr(llama, "is_installed", lambda: False)
    assert main("export", "adapter", "--to", "gguf") == 0
    assert "parity was not measured" in capsys.readouterr().out
    assert record("*.unmeasured.json", "exports")["parity"] == "not measured"
    assert main("card", "adapter", "output=card.md") == 0
    assert "| f16 | not measured |" in Path("card.md").read_text()


def test_a_pinned_variable_of_the_template_is_in_the_file(working_folder: Path) -> None:
    adapter_on(write_model(working_folder / "base"), working_folder / "adapter", {"loud": True})
    assert main("export", "adapter", "--to", "gguf-lora", "output=out") == 0
    assert record("*-lora.json")["parity"] == "agrees"


def test_a_tokenizer_is_proven_or_rejected(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    adapter_on(write_model(working_folder / "base", rule=rule), working_folder / "adapter")
    for words, expected in (
        ([], "by a rule without a known name"),
        (["pretokenizer=gpt-2"], "in llama.cpp, and ["),
        (["pretokenizer=gpt2"], "Did you mean gpt-2?"),
    ):
        assert main("export", "adapter", "--to", "gguf", "output=out", *words) == 2
        assert expected in capsys.readouterr().err
        assert not list(Path("out").glob("*.gguf"))


def test_sentencepiece_is_proven_or_rejected(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_on(write_model(working_folder / "base", tokenizer=sentencepiece()), working_folder / "adapter")
    assert main("export", "adapter", "--to", "gguf", "output=out") == 0
    found = record("*.json")
    assert (found["parity"], found["ids"]) == ("agrees", "7/7")
    (path,) = Path("out").glob("*.gguf")
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
    # only the first piece of a text has the space here, and of llama.cpp every piece after a special token
    adapter_on(write_model(working_folder / "first", tokenizer=sentencepiece(legacy=False)), working_folder / "other")
    assert main("export", "other", "--to", "gguf", "output=other-out") == 2
    told = capsys.readouterr().err
    assert "the tokenizer: the ids from" in told
    assert "in llama.cpp, and [" in told
    assert not list(Path("other-out").glob("*.gguf"))


def test_a_token_before_every_text_is_not_written_twice(working_folder: Path) -> None:
    base = write_model(working_folder / "base")
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + text)
    tokenizer = AutoTokenizer.from_pretrained(base, bos_token="<|endoftext|>")
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save_pretrained(base)
    adapter_on(base, working_folder / "adapter")
    assert main("export", "adapter", "--to", "gguf", "output=out") == 0
    assert record("*.json")["parity"] == "agrees"


def test_what_a_file_cannot_hold_is_rejected_with_the_way_out(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_model(working_folder / "base")
    adapter_on(base, working_folder / "dora", use_dora=True)
    source = base_source(write_base(working_folder / "words"))
    model = new_adapter(load_model(source, "float32"), LoraSettings(r=4), seed=0)
    nudge(model)
    draft = working_folder / ".adapter"
    draft.mkdir()
    save_model(model, source, draft, "float32")
    published(draft, source, working_folder / "adapter")
    cases = {
        ("dora", "--to", "gguf-lora"): "it is DoRA, which a GGUF adapter cannot hold",
        ("adapter", "--to", "gguf"): "the tokenizer is WordLevel",
        ("adapter", "--to", "ggfu"): "Did you mean gguf?",
        ("adapter",): "export: needs a form\n    Add --to FORM. Available: merged, gguf, gguf-lora",
        ("adapter", "--to", "gguf", "type=q4"): "type=q4: 'q4' is no type of numbers",
        ("--to", "gguf"): "needs one artifact",
        ("nowhere", "--to", "gguf"): "there is no such directory",
    }
    for words, expected in cases.items():
        assert main("export", *words) == 2
        assert expected in capsys.readouterr().err
    assert main("export", "dora", "--to", "gguf", "output=out") == 0
    assert record("*.json")["parity"] == "agrees"
    config = json.loads((base / "config.json").read_text())
    monkeypatch.setattr(tensors, "FAMILIES", {"other": "LLAMA"})
    assert config["model_type"] == "llama"
    assert main("export", "dora", "--to", "gguf", "output=out") == 2
    assert "the architecture is llama" in capsys.readouterr().err
    assert main("export", "dora", "--to", "merged", "output=merged") == 0
    assert Path("merged/model.safetensors").is_file()
