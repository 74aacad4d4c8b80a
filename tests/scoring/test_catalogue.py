"""Revisions of the hub datasets behind tasks: what tells that a task's documents have changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from posttrain.scoring.catalogue import dataset_revisions, read_task_file

TASK = "task: mine\ndataset_path: owner/name\ntest_split: test\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path


def test_a_new_revision_of_a_tasks_dataset_is_seen(hub: Path) -> None:
    (hub / "mine.yaml").write_text(TASK)
    reference = str(hub / "mine.yaml")
    assert dataset_revisions(reference) == {}
    (hub / "hub/datasets--owner--name/snapshots/abc").mkdir(parents=True)
    assert dataset_revisions(reference) == {"owner/name": ["abc"]}
    (hub / "datasets/owner___name/main/0.0.0/def").mkdir(parents=True)
    (hub / "datasets/owner___other/main/0.0.0/ghi").mkdir(parents=True)
    assert dataset_revisions(reference) == {"owner/name": ["abc", "def"]}


def test_files_named_one_by_one_have_no_revision_whatever_other_files_were_read(hub: Path) -> None:
    (hub / "datasets/json/default-1/0.0.0/abc").mkdir(parents=True)
    for files, expected in (("mine.jsonl", {}), ("hf://datasets/owner/name/mine.jsonl", {"json": ["abc"]})):
        kwargs = f"dataset_kwargs: {{data_files: {{test: [other.jsonl, '{files}']}}}}"
        (hub / "mine.yaml").write_text(f"task: mine\ndataset_path: json\n{kwargs}\ntest_split: test\n")
        assert dataset_revisions(str(hub / "mine.yaml")) == expected


def test_registered_tasks_and_groups_count_by_all_of_their_datasets(hub: Path) -> None:
    for name in ("datasets--openai--gsm8k", "datasets--cais--mmlu"):
        (hub / "hub" / name / "snapshots/abc").mkdir(parents=True)
    assert dataset_revisions("gsm8k") == {"openai/gsm8k": ["abc"]}
    assert dataset_revisions("mmlu_stem") == {"cais/mmlu": ["abc"]}
    assert dataset_revisions("no_such_task") == {}


def test_a_file_is_read_anew_and_its_settings_are_their_readers_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TASK + "metric_list: [{metric: acc}]\n")
    read_task_file(file)["metric_list"][0]["metric"] = "changed"
    assert read_task_file(file)["metric_list"] == [{"metric": "acc"}]
    file.write_text(TASK + "metric_list: [{metric: exact_match}]\n")
    assert read_task_file(file)["metric_list"] == [{"metric": "exact_match"}]
