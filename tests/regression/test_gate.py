"""``posttrain gate`` on the command line: any adapter or model, against its base, another adapter, committed scores."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from markupsafe import escape

from posttrain import cli
from posttrain.config.schema import GateTask, Role
from posttrain.digests import digest_of
from posttrain.engine import arithmetic
from posttrain.engine.arithmetic import Rates
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.gate.spec import Scorecard
from posttrain.regression.baseline import add_baseline, read_baseline, require_same_asked
from posttrain.scoring.scorecard import read_scorecard
from tests.support.adapters import edit, other_template, save_adapter, scaled, write_adapters
from tests.support.tiny import tiny_llama, tiny_tokenizer, write_base

Gate = Callable[..., int]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def gate(material: Path) -> Gate:
    """Run ``posttrain gate`` about an adapter of the material, or of the working folder."""

    def run(adapter: str, *words: str) -> int:
        path = Path(adapter) if Path(adapter).exists() else material / adapter
        given = [f"adapter={path}", "gate=quiz", "--config-dir", str(material / "conf"), *words]
        with pytest.raises(SystemExit) as ended:
            cli.main(["gate", *given])
        return int(str(ended.value.code))

    return run


def copy(material: Path, name: str, to: str = "changed") -> Path:
    return Path(shutil.copytree(material / name, to))


def cases(path: str = "junit.xml") -> dict[str, str]:
    """What each test case of a JUnit file ended with."""
    return {
        case.get("name", ""): next((child.tag for child in case if child.tag != "system-out"), "passed")
        for case in ElementTree.parse(path).iter("testcase")
    }


# --- Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "artifact"])
def test_an_adapter_that_lifts_passes(
    gate: Gate, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("summary.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert gate(name, "junit=junit.xml", "markdown=out/pr.md") == 0
    assert "quiz (lift, n 48)" in capsys.readouterr().out
    assert cases() == {"lift quiz against base": "passed"}
    assert Path("out/pr.md").read_text().startswith("### ✅ passed")
    assert Path("summary.md").read_text() == "before\n" + Path("out/pr.md").read_text()
    assert f"torch {torch.__version__}" in Path("out/pr.md").read_text()
    (verdict,) = Path("runs/gates").glob("quiz-*/verdict.json")
    assert json.loads(verdict.read_text())["tasks"][0]["candidate"] == 1.0
    page = verdict.with_name("report.html").read_text()
    first = json.loads(verdict.with_name("questions.jsonl").read_text().splitlines()[0])["prompt"]
    assert "judged by the gate quiz" in page
    assert str(escape(first)) in page
    assert not [section for section in ("training", "cost", "lineage") if f'id="{section}"' in page]


def test_a_second_time_nothing_is_asked(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gate("artifact") == 0
    monkeypatch.setattr("posttrain.scoring.responders.Transformers", None)
    assert gate("artifact") == 0


def test_refused_and_undecided_are_failures(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("other", "gate.tasks.quiz.min_lift=0.9", "junit=junit.xml", "markdown=pr.md") == 3
    assert "does not exceed" in capsys.readouterr().err
    assert cases() == {"lift quiz against base": "failure"}
    assert "❌ failed" in Path("pr.md").read_text()
    assert gate("good", "gate.tasks.quiz.limit=2", "junit=junit.xml") == 4
    assert "n = 2" in capsys.readouterr().err
    assert cases() == {"lift quiz against base": "failure"}
    assert gate("good", "gate.tasks.quiz.limit=2", "gate.on_undecided=warn") == 0


# --- What is no candidate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["lora_B", "lora_A"])
def test_an_adapter_of_zeros_is_refused_by_name(
    gate: Gate, material: Path, half: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(copy(material, "good"), 0, half)
    assert gate("changed", "junit=junit.xml", "markdown=pr.md") == 3
    assert f"changes nothing: every {half} is zero" in capsys.readouterr().err
    assert cases() == {"gate": "failure"}
    assert f"every {half.replace('_', chr(92) + '_')} is zero" in Path("pr.md").read_text()


def test_an_adapter_that_changes_no_logits_is_refused(
    gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy(material, "good") / "adapter_config.json", lora_alpha=0)
    assert gate("changed") == 3
    assert "its logits are those of" in capsys.readouterr().err


def test_a_changed_artifact_names_its_file(gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(copy(material, "artifact"), 0)
    assert gate("changed", "junit=junit.xml") == 5
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err
    assert cases() == {"gate": "error"}


def test_an_adapter_of_nan_is_damaged(gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(copy(material, "good"), float("nan"))
    assert gate("changed") == 5
    assert "not finite" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(Path("deep"), material / "base", seed=1, num_hidden_layers=3)
    assert gate("deep") == 5
    assert "the adapter has no place for base_model.model.model.layers.2" in capsys.readouterr().err
    write_base(Path("wider"), hidden_size=64)
    assert gate("good", "model.path=wider") == 5
    assert "has shape" in capsys.readouterr().err
    assert gate("artifact", "model.path=wider") == 5
    assert "was trained on base weights" in capsys.readouterr().err


def test_full_weights_need_a_base_and_must_differ_from_it(
    gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate("base") == 2
    assert "model.path=" in capsys.readouterr().err
    assert gate("base", f"model.path={material / 'base'}") == 3
    assert "to the last bit" in capsys.readouterr().err
    model = tiny_llama()
    model.lm_head.weight.data[:, 0] += 1
    model.save_pretrained("whole")
    tiny_tokenizer().save_pretrained("whole")
    assert gate("whole", f"model.path={material / 'base'}", "gate.tasks.quiz.min_lift=0.9") == 3
    assert "even its upper bound" in capsys.readouterr().err


def test_a_tokenizer_with_other_ids_is_refused(gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(copy(material, "good"))
    text = Path("changed/tokenizer.json").read_text()
    swapped = text.replace('"a": ', '"?? ').replace('"b": ', '"a": ').replace('"?? ', '"b": ')
    Path("changed/tokenizer.json").write_text(swapped)
    assert gate("changed") == 2
    assert "'a' has another id" in capsys.readouterr().err


def test_a_tokenizer_beyond_the_embeddings_is_refused(
    gate: Gate, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|{index}|>" for index in range(30)])
    tokenizer.save_pretrained(copy(material, "good"))
    assert gate("changed") == 2
    assert "has no embeddings for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("missing", [], "there is no such directory"),
        ("conf", [], "holds no artifact, no adapter and no full weights"),
        ("nameless", [], "does not name its base"),
        ("pickled", [], "pickled weights are not read"),
        ("lost", [], "Give the base's present place"),
        ("good", ["--update-baseline"], "there is no file to write the scores to"),
        ("good", ["baseline=none.json"], "--update-baseline writes it"),
        ("good", ["baseline="], "baseline: is empty"),
        ("good", ["junit=", "output_root="], "output_root: is empty"),
        ("good", ["gate=quizz"], "Did you mean quiz?"),
        ("good", ["gate=none"], "switched off"),
        ("good", ["adaptr=x"], "Did you mean adapter?"),
        ("good", ["gate.tasks.quiz.metric=ac"], "Did you mean acc?"),
        ("good", ["gate.tasks.quiz.limits=3"], "unknown key"),
        ("good", ["gate.tasks.quizz.limit=3"], "Did you mean gate.tasks.quiz?"),
        ("good", ["modle.path=x"], "Did you mean model?"),
        ("good", ["nonsense"], "is not key=value"),
        ("good", ["--config-dir", "nowhere"], "there is no directory nowhere"),
    ],
)
def test_bad_input_says_what_to_do(
    gate: Gate, material: Path, name: str, settings: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for copied in ("nameless", "pickled", "lost"):
        copy(material, "good", copied)
    edit(Path("nameless/adapter_config.json"), base_model_name_or_path=None)
    edit(Path("lost/adapter_config.json"), base_model_name_or_path="/gone/away")
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    assert gate(name, *settings) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_task_that_cannot_be_scored_is_an_error_in_the_files_too(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert gate("good", "gate.tasks.quiz.metric=ac", "junit=junit.xml") == 2
    assert cases() == {"gate": "error"}
    assert "the task has no metric ac" in Path("summary.md").read_text()


def test_a_wrong_value_of_a_setting_is_one_problem(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("good", "gate.tasks.quiz.role=lfit") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: gate.tasks.quiz.role: 'lfit' is not one of lift,")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"tasks: [\n", "gate/mine.yaml:2: is not sound YAML"),
        (b"\xff\xfe", "gate/mine.yaml: is not text in UTF-8"),
        (b"tasks: 3\n", "gate.tasks: Cannot assign int"),
    ],
)
def test_a_gate_that_cannot_be_read_is_one_problem(
    gate: Gate, content: bytes, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own/gate").mkdir(parents=True)
    Path("own/gate/mine.yaml").write_bytes(content)
    assert gate("good", "gate=mine", "--config-dir", "own") == 2
    assert capsys.readouterr().err.count(complaint) == 1


# --- Baselines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(material: Path) -> Path:
    """A baseline with the scores of ``good``."""
    path = material / "baselines" / "quiz.json"
    words = [f"adapter={material / 'good'}", "gate=quiz", "--config-dir", str(material / "conf")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["gate", *words, f"baseline={path}", "--update-baseline", f"output_root={material / 'runs'}"])
    assert ended.value.code == 0
    return path


def test_a_baseline_is_small_and_has_a_line_per_document(committed: Path) -> None:
    text = committed.read_text()
    assert len(text) < 5000
    record = json.loads(text)
    documents = record["tasks"]["quiz"]["documents"]
    assert len(documents) == 48
    assert {score for _, _, _, score, *_ in documents} == {1.0}
    assert all(base and adapter for *_, base, adapter in documents)
    for document in documents:
        assert text.count(json.dumps(document, separators=(",", ":"))) == 1
    assert len(text.splitlines()) > 48


def test_the_adapter_of_a_baseline_passes_and_is_asked_alone(gate: Gate, committed: Path) -> None:
    assert gate("good", f"baseline={committed}", "junit=junit.xml") == 0
    assert cases() == {"lift quiz against base": "passed", "guard quiz against baseline": "passed"}
    (card,) = Path("runs/gates").glob("*/scorecard.jsonl")
    said = {row.system: row.response for row in read_scorecard(card)}
    assert all(said[system] for system in ("base", "baseline", "candidate"))  # the first two are the file's
    (folder,) = Path("runs/gates").iterdir()
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(folder)])
    assert not ended.value.code
    assert (folder / "report.html").read_bytes() == page
    assert b"against baseline" in page
    assert b"parent" not in page


def test_an_adapter_that_is_worse_than_the_baseline_is_refused(
    gate: Gate, committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"baseline={committed}", "gate.tasks.quiz.min_lift=-1", "junit=junit.xml", "markdown=pr.md")
    assert gate("other", *words) == 3
    comment = Path("pr.md").read_text()
    assert "| task | base | baseline | candidate | lift | verdict |" in comment
    assert "parent" not in comment
    shown = [line.split(" | ") for line in comment.splitlines() if re.match(r"\| \d+ \| ", line)]
    assert shown
    assert all(question and before and after for _, question, before, after, _ in shown)
    assert cases() == {"lift quiz against base": "passed", "guard quiz against baseline": "failure"}
    assert "quiz against baseline" in capsys.readouterr().err


def test_a_previous_adapter_is_a_baseline(gate: Gate, material: Path) -> None:
    assert gate("good", f"baseline={material / 'other'}", "junit=junit.xml") == 0
    assert cases() == {"lift quiz against base": "passed", "guard quiz against baseline": "passed"}
    assert gate("other", f"baseline={material / 'good'}", "gate.tasks.quiz.min_lift=-1", "junit=junit.xml") == 3
    assert cases() == {"lift quiz against base": "passed", "guard quiz against baseline": "failure"}


def test_only_an_adapter_that_passes_becomes_the_baseline(
    gate: Gate, committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.json").write_bytes(committed.read_bytes())
    assert gate("other", "baseline=mine.json", "--update-baseline", "gate.tasks.quiz.min_lift=0.9") == 3
    assert "left as it was" in capsys.readouterr().err
    assert Path("mine.json").read_bytes() == committed.read_bytes()
    assert gate("other", "baseline=mine.json", "update_baseline=true", "gate.tasks.quiz.min_lift=-1") == 0
    assert Path("mine.json").read_bytes() != committed.read_bytes()


def changed(committed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A baseline with a sound hash that says something else."""
    record = json.loads(committed.read_text())
    change(record)
    for entry in record["tasks"].values():
        for name, column in (("base", 2), ("score", 3)):
            scores = [document[column] for document in entry["documents"] if isinstance(document[column], float)]
            entry[name] = round(sum(scores) / len(scores), 6)
    del record["sha256"]
    Path("mine.json").write_text(json.dumps({**record, "sha256": digest_of(record)}))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "base": (lambda record: record["asked"].update(base="0" * 64), "another base: 0000000000000000 then"),
    "template": (lambda record: record["asked"].update(chat_template="1"), "another chat template"),
    "tokenizer": (lambda record: record["asked"].update(tokenizer="1"), "another tokenizer"),
    "versions": (lambda record: record["asked"]["versions"].update(torch="1"), "mine.json: torch 1 then, 2."),
    "task": (lambda record: record["tasks"].clear(), "no scores of this task"),
    "metric": (lambda record: record["tasks"]["quiz"].update(metric="f1"), "another metric: f1 then, acc now"),
    "settings": (lambda record: record["tasks"]["quiz"].update(settings="1"), "another settings"),
    "missing": (lambda record: record["tasks"]["quiz"]["documents"].pop(), "1 of its documents are other ones"),
    "document": (lambda record: record["tasks"]["quiz"]["documents"][3].__setitem__(1, "x"), "such as 3"),
    "format": (lambda record: record.update(format=0), "has format 0, not 2"),
}


@pytest.fixture(scope="module")
def candidate(material: Path, committed: Path) -> Scorecard:
    """The scores that the baseline was made from, but for those of its base."""
    (file,) = (material / "runs" / "gates").glob("*/scorecard.jsonl")
    rows = tuple(row for row in read_scorecard(file) if row.system == "candidate")
    settings = {"quiz": read_baseline(committed).tasks["quiz"].settings}
    return Scorecard(rows=rows, higher_is_better={"quiz": True}, settings=settings)


def compared(path: Path, asked: Mapping[str, Any], candidate: Scorecard) -> Scorecard:
    task = GateTask(role=Role.lift, metric="acc")
    baseline = read_baseline(path)
    require_same_asked(path, baseline, asked)
    return add_baseline(path, baseline, {"quiz": task}, candidate, "base")


def test_scores_of_a_baseline_stand_beside_the_candidates(committed: Path, candidate: Scorecard) -> None:
    card = compared(committed, read_baseline(committed).asked, candidate)
    means = {
        system: sum(row.metrics["acc"] for row in card.rows if row.system == system) / 48
        for system in ("base", "baseline", "candidate")
    }
    assert means["baseline"] == means["candidate"] == 1.0
    assert means["base"] < 0.5


def test_a_patch_release_is_noted_and_the_minor_one_of_a_library_is_not_compared(
    committed: Path, candidate: Scorecard
) -> None:
    asked = read_baseline(committed).asked
    libraries = asked["versions"]
    minor = ".".join(libraries["torch"].split(".")[:2])
    now = {**asked, "versions": {**libraries, "torch": f"{minor}.99+cu130", "posttrain": "99"}}
    (note,) = require_same_asked(committed, read_baseline(committed), now)
    assert f"torch {libraries['torch']} then, {minor}.99+cu130 now" in note
    assert "posttrain" in note
    others = {"dtype": "bfloat16", "device": "cuda", "versions": {**libraries, "peft": "0.1"}}
    words = {
        "dtype": "another dtype",
        "device": "another device",
        "versions": f"peft {libraries['peft']} then, 0.1 now",
    }
    for key, value in others.items():
        with pytest.raises(BadInput, match=f": {re.escape(words[key])}"):
            require_same_asked(committed, read_baseline(committed), {**asked, key: value})


def test_a_missing_baseline_is_told_with_everything_else_and_before_anything_is_read(
    gate: Gate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.commands.gate.judge_adapter", None)
    assert gate("good", "baseline=none.json", "gate.enabled=false") == 2
    told = capsys.readouterr().err
    assert "none.json: no such baseline" in told
    assert "switched off" in told


@pytest.mark.parametrize(("then", "now"), [((90.0, 3.0), (90.0, 300.0)), ((90.0, 300.0), (90.0, 3.0))])
def test_a_baseline_of_another_processor_is_compared_in_its_own_arithmetic(
    gate: Gate, then: tuple[float, float], now: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [then]
    monkeypatch.setattr(arithmetic, "measure_rates", lambda *_: Rates(float32=rates[-1][0], bfloat16=rates[-1][1]))
    words = ("baseline=cpu.json", "model.dtype=bfloat16")
    assert gate("good", *words, "--update-baseline") == 0
    asked = read_baseline(Path("cpu.json")).asked
    assert (asked["dtype"], asked.get("compute_dtype")) == ("bfloat16", "float32" if then[0] > then[1] else None)
    rates.append(now)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("another machine").absolute()))
    assert gate("good", *words) == 0


@pytest.mark.parametrize("name", CHANGES)
def test_scores_that_cannot_be_compared_are_refused(committed: Path, candidate: Scorecard, name: str) -> None:
    change, complaint = CHANGES[name]
    changed(committed, change)
    with pytest.raises(BadInput, match=complaint) as caught:
        compared(Path("mine.json"), read_baseline(committed).asked, candidate)
    assert "--update-baseline" in str(caught.value)


def edited(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


def signed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """A change by somebody who makes the hash anew."""

    def apply(text: str) -> str:
        record = json.loads(text)
        del record["sha256"]
        change(record)
        return json.dumps({**record, "sha256": digest_of(record)})

    return apply


DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "score": (edited(",1.0,", ",0.0,"), "was changed after it was written"),
    "mean": (edited('"score": 1.0', '"score": 0.9'), "was changed after it was written"),
    "digest": (edited('"digest": "', '"digest": "0'), "was changed after it was written"),
    "signed score": (
        signed(lambda record: record["tasks"]["quiz"]["documents"][3].__setitem__(3, 0.0)),
        "quiz: score is 1.0, but its documents have the mean 0.979167",
    ),
    "signed twice": (
        signed(lambda record: record["tasks"]["quiz"]["documents"].append(record["tasks"]["quiz"]["documents"][0])),
        "quiz: a document has two scores",
    ),
    "number": (
        signed(lambda record: record["tasks"]["quiz"]["documents"][3].__setitem__(3, "x")),
        "tasks.quiz.documents[3][3] is 'x', not a finite number",
    ),
    "short row": (
        signed(lambda record: record["tasks"]["quiz"]["documents"].__setitem__(3, [1])), "documents[3] has 1 items",
    ),
    "no documents": (
        signed(lambda record: record["tasks"]["quiz"].update(documents=5)), "documents is 5, not a list",
    ),
    "other keys": (signed(lambda record: record.update(more=1)), "has the unknown 'more'"),
    "empty": (lambda text: "", "it is empty"),
    "torn": (lambda text: text[:200], "is damaged"),
    "list": (lambda text: "[]", "is [], not a mapping"),
    "foreign": (lambda text: '{"scores": 1}', "is no baseline"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_baseline_that_is_not_what_was_written_is_damaged(committed: Path, name: str) -> None:
    change, complaint = DAMAGED[name]
    Path("mine.json").write_text(change(committed.read_text()))
    with pytest.raises(ArtifactDamaged, match=re.escape(complaint)) as caught:
        read_baseline(Path("mine.json"))
    assert "mine.json" in str(caught.value)
    assert "--update-baseline makes it anew" in str(caught.value)


def test_an_edited_baseline_ends_the_gate(gate: Gate, committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text(committed.read_text().replace(",1.0,", ",0.0,", 1))
    assert gate("good", "baseline=mine.json") == 5
    assert "mine.json was changed after it was written" in capsys.readouterr().err


def test_another_batch_size_is_another_question(
    gate: Gate, committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate("good", f"baseline={committed}", "gate.batch_size=8", "junit=junit.xml") == 2
    assert cases() == {"gate": "error"}
    assert "another batch size: 16 then, 8 now" in capsys.readouterr().err


def test_baselines_of_another_ground_are_refused(
    gate: Gate, material: Path, committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_template(copy(material, "good"))
    assert gate("changed", f"baseline={committed}") == 2
    assert "another chat template" in capsys.readouterr().err
    assert gate("changed", f"baseline={material / 'good'}") == 2
    assert "has another chat template" in capsys.readouterr().err
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])  # of an embedding that the base has to spare
    tokenizer.save_pretrained(copy(material, "good", "spare"))
    assert gate("good", "baseline=spare") == 2
    assert "its tokenizer is not the candidate's" in capsys.readouterr().err
    model = tiny_llama()
    model.lm_head.weight.data += 1
    model.save_pretrained("moved")
    tiny_tokenizer().save_pretrained("moved")
    edit(copy(material, "good", "elsewhere") / "adapter_config.json", base_model_name_or_path="moved")
    assert gate("elsewhere", f"baseline={committed}") == 2
    assert "another base" in capsys.readouterr().err
