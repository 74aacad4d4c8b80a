"""``posttrain push`` against a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from posttrain.artifact import verify
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_recipe, write_project

TOKEN = "a-token-of-the-test"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The part of the hub that a push asks for: repositories, one commit at a time, tags."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def asked(self) -> list[str]:
        path = self.path.partition("?")[0]
        self.server.calls.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials"}, 401)
        return False

    def do_GET(self) -> None:
        parts = self.asked()
        if not self.authorized():
            return
        if parts[-1] == "refs":
            tags = [
                {"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha}
                for name, sha in self.server.tags.items()
            ]
            self.answer({"branches": [], "converts": [], "tags": tags})
        else:
            repo = "/".join(parts[2:4])
            files = [{"rfilename": name} for name in self.server.files]
            self.answer(
                {"id": repo, "private": self.server.private[repo], "sha": COMMIT, "siblings": files, "tags": []}
            )

    def do_POST(self) -> None:
        parts = self.asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.authorized():
            return
        if parts[-1] == "create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if repo in self.server.private:
                self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
                return
            self.server.private[repo] = given.get("private", given.get("visibility") == "private")
            self.answer({"url": f"{self.server.url}/{repo}"})
        elif parts[-1] == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "commit" in parts:
            for line in body.splitlines():
                self.apply(**json.loads(line))
            self.answer(
                {
                    "commitUrl": f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        elif "tag" in parts:
            self.server.tags[json.loads(body)["tag"]] = parts[-1]
            self.answer({})

    def apply(self, key: str, value: dict[str, str]) -> None:
        if key == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "deletedFile":
            del self.server.files[value["path"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def artifact(folder: Path, script: Script | None = None, *overrides: str) -> Path:
    write_project(folder)
    run_recipe(script or Script(), *overrides)
    return only_run() / "stages" / "dpo" / "artifact"


def test_an_artifact_is_a_private_revision_named_by_its_digest(
    working_folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(working_folder)
    hub.files = {"model.safetensors": b"of a former artifact", "notes.md": b"a person's own", ".gitattributes": b""}
    assert main("push", str(path), "owner/model", "license=mit") == 0
    digest = verify(path).digest
    assert hub.private == {"owner/model": True}
    assert hub.tags == {digest[:12]: COMMIT}
    assert "notes.md" in hub.files
    assert "model.safetensors" not in hub.files
    folder = working_folder / "downloaded"
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    (folder / "notes.md").unlink()
    assert verify(folder).digest == digest, "what is downloaded is the artifact"
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    out = capsys.readouterr().out
    assert "removed    model.safetensors" in out
    assert f"/owner/model/tree/{digest[:12]}" in out
    hub.calls.clear()
    assert main("push", str(path), "owner/model") == 0
    assert "there already" in capsys.readouterr().out
    assert not [call for call in hub.calls if "commit" in call]


def test_a_public_repository_needs_a_word(working_folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact(working_folder)
    hub.private["owner/model"] = False
    assert main("push", str(path), "owner/model") == 2
    assert "is a public repository" in capsys.readouterr().err
    assert not hub.files
    assert main("push", str(path), "owner/model", "public=true") == 0
    assert "manifest.json" in hub.files


def test_nothing_leaves_the_machine_unless_it_is_promoted_and_whole(
    working_folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script()
    script.verdicts = {"dpo": "undecided"}
    path = artifact(working_folder, script, "dpo.gate.on_undecided=warn")
    assert main("push", str(path), "owner/model") == 2
    assert "left undecided by its gate" in capsys.readouterr().err
    sft = path.parents[1] / "sft" / "artifact"
    (sft / "tokenizer.json").write_text('{"changed": true}')
    assert main("push", str(sft), "owner/model") == 5
    assert not hub.calls


def test_what_the_hub_rejects_is_said_without_the_token(
    working_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(artifact(working_folder))
    cases = [
        ({"HF_TOKEN": "another-token-of-the-test"}, "the hub could not be written"),
        ({"HF_TOKEN": ""}, "holds no token"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub could not be written"),
    ]
    for variables, expected in cases:
        with monkeypatch.context() as changed:
            for name, value in variables.items():
                changed.setenv(name, value)
            assert main("push", path, "owner/model") == 2
            error = capsys.readouterr().err
            assert expected in error
            assert "another-token-of-the-test" not in error
            assert "Traceback" not in error
    with monkeypatch.context() as changed:
        changed.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main("push", path, "owner/model") == 2
        assert "offline mode is enabled" in capsys.readouterr().err
    for words in (["push", path], ["push", path, "not a name/x/y"], ["push", path, "a/b", "public=maybe"]):
        assert main(*words) == 2
    assert not hub.files
