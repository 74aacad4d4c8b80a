"""A file of llama.cpp as the candidate of a gate: scored as its artifact is, and named when it is not what it says."""

from __future__ import annotations

import json
import random
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from posttrain.digests import digest_of, file_digest
from posttrain.scoring import checks
from posttrain.scoring.harness import llama as harness
from tests.support.adapters import edit
from tests.support.command import main
from tests.support.gguf import TEXTS, adapter_on, byte_level, write_model

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n", "town"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
HEAD = "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: quiz.jsonl}}\ntest_split: test"
GATE = """
tasks:
  choose: {{task: {folder}/choose.yaml, role: guard, metric: acc, max_drop: 0.99}}
  write: {{task: {folder}/write.yaml, role: guard, metric: exact_match, max_drop: 0.99}}
batch_size: 8
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an artifact on it, its three exports, and a gate ``quiz``."""
    root = tmp_path_factory.mktemp("gguf")
    adapter_on(write_model(root / "base"), root / "stage" / "artifact")
    (root / "conf" / "gate").mkdir(parents=True)
    (root / "conf" / "gate" / "quiz.yaml").write_text(GATE.format(folder=root))
    for name, text in TASKS.items():
        (root / f"{name}.yaml").write_text(HEAD.format(name=name) + text)
    draw = random.Random(0)
    words = [word for text in TEXTS for word in text.split()] + ["naïve", "東京", "42."]
    rows = [{"question": draw.choice(TEXTS)[: 8 + n], "choices": draw.sample(words, 3)} for n in range(16)]
    (root / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for words in (["gguf"], ["gguf", "type=q8_0"], ["gguf-lora"]):
        assert main("export", str(root / "stage" / "artifact"), "--to", *words) == 0
    return root


def gate(material: Path, adapter: Path, *words: str) -> int:
    given = [f"adapter={adapter}", "gate=quiz", "gate.backend=llama", "--config-dir", str(material / "conf")]
    return main("gate", *given, *words)


def export_of(material: Path, pattern: str) -> Path:
    (path,) = (material / "stage" / "exports").glob(pattern)
    return path


def scores(folder: Path, system: str) -> dict[tuple[str, int], tuple[Any, str]]:
    rows = [json.loads(line) for line in (folder / "scorecard.jsonl").read_text().splitlines()]
    return {(row["task"], row["doc_id"]): (row["metrics"], row["response"]) for row in rows if row["system"] == system}


def test_a_file_is_scored_as_its_artifact_is(
    material: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = material / "stage" / "artifact"
    assert gate(material, artifact, "gate.backend=hf") == 0
    kept = set(Path("runs/cache").glob("*.jsonl"))
    exact, lora = export_of(material, "sft-????????????-f16.gguf"), export_of(material, "*-lora.gguf")
    for path, files in ((exact, [exact]), (lora, [export_of(material, "*-base-f16.gguf"), lora])):
        before = set(Path("runs/gates").iterdir())
        comment = working_folder / "comment.md"
        assert gate(material, path, f"baseline={artifact}", f"markdown={comment}") == 0
        (folder,) = set(Path("runs/gates").iterdir()) - before
        found = scores(folder, "candidate")
        assert found == scores(folder, "baseline")
        assert found != scores(folder, "base")
        assert len(found) == 32
        verdict = json.loads((folder / "verdict.json").read_text())
        digests = [file_digest(each) for each in files]
        digest = digests[0] if len(digests) == 1 else digest_of(digests)
        assert {asked["systems"]["candidate"] for asked in verdict["basis"]["asked"]} == {digest}
        assert verdict["basis"]["asked"][0]["gate"]["backend"] == "llama"
        assert f"{path.name} (xllamacpp " in comment.read_text()
    # The systems beside the file have the scores that they had; each file has two of its own, and is not asked again.
    assert len(set(Path("runs/cache").glob("*.jsonl")) - kept) == 4
    monkeypatch.setattr(harness, "llama", None)
    assert gate(material, exact) == 0
    capsys.readouterr()


def test_a_lossy_file_that_a_gate_has_passed_is_not_called_lossy(material: Path, tmp_path: Path) -> None:
    artifact, path = material / "stage" / "artifact", export_of(material, "*.lossy.gguf")
    record = json.loads(path.with_suffix(".json").read_text())
    assert main("card", str(artifact), "output=before.md") == 0
    assert f"| {path.name} | q8_0 | lossy | never judged |" in Path("before.md").read_text()
    assert gate(material, path) == 0
    assert main("card", str(artifact), "output=after.md", "output_root=runs") == 0
    assert f"| {path.name} | q8_0 | lossy | passed |" in Path("after.md").read_text()
    assert main("export", str(artifact), "--to", "gguf", "type=q8_0", f"output={tmp_path}") == 0
    (again,) = tmp_path.glob("*.gguf")
    assert again.name == path.name.replace(".lossy", "")
    assert file_digest(again) == record["sha256"]
    assert "FROM ./" + again.name in (tmp_path / "Modelfile").read_text()


def test_what_is_not_the_file_that_it_says_is_named(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, lora = export_of(material, "sft-????????????-f16.gguf"), export_of(material, "*-lora.gguf")
    below = export_of(material, "*-base-f16.gguf")
    base = f"model.path={material / 'base'}"

    def copied(path: Path, *, record: bool = False, cut: int = 0) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) - cut])
        if record:
            shutil.copy(path.with_suffix(".json"), folder)
        return folder / path.name

    moved = copied(lora, record=True)
    (moved.parent / below.name).write_bytes(exact.read_bytes())
    wide, other = write_model(tmp_path / "wide", "mistral"), write_model(tmp_path / "other")
    edit(wide / "config.json", hidden_size=96)
    shuffled = byte_level()
    shuffled.add_tokens(["<new>"])
    shuffled.save_pretrained(other)
    cases: list[tuple[int, Path, list[str], str]] = [
        (2, exact.with_name("sft.gguf"), [], "there is no such file"),
        (2, exact, ["gate.backend=hf"], "hf does not read files of llama.cpp"),
        (2, material / "stage" / "artifact", [], "llama.cpp answers for GGUF files alone"),
        (5, copied(exact, record=True, cut=4000), [], "is damaged: its SHA-256"),
        (5, copied(exact, cut=4000), [base], "is damaged"),
        (5, copied(exact, cut=exact.stat().st_size), [base], "is no GGUF file"),
        (2, copied(exact), [], "does not name its base"),
        (2, copied(exact, record=True), [], "which is not below runs"),
        (2, copied(exact), [f"model.path={wide}"], "another base"),
        (2, copied(exact), [f"model.path={other}"], "in the tokenizer of"),
        (2, copied(lora), [base], "no record beside it names"),
        (2, copied(lora, record=True), [base], "which is not beside it"),
        (2, moved, [base], "stands on another file"),
    ]
    for code, path, words, expected in cases:
        assert gate(material, path, *words) == code, expected
        told = capsys.readouterr().err
        assert expected in told
        assert "Traceback" not in told
    specs = {"gguf": ModuleSpec("gguf", None), "xllamacpp": None}
    monkeypatch.setattr(checks, "find_spec", lambda name: specs[name])
    assert gate(material, exact) == 2
    told = capsys.readouterr().err
    assert "xllamacpp is not installed" in told
    assert "pip install 'posttrain[llama]'" in told
