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
from posttrain.digests import file_digest
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
        self.large: int | None = None
        """Bytes from which on files are uploaded apart, as LFS has it."""
        self.part: int | None = None
        """Bytes of a part of such a file; None takes each whole."""
        self.store: dict[str, bytes] = {}
        self.broken = ""
        """Digest of the file whose upload fails."""

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

    def do_PUT(self) -> None:
        place = "/".join(self.asked()[1:])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if place.partition("/")[0] == self.server.broken:
            self.answer({"error": "the store is closed"}, 403)
            return
        self.server.store[place] = body
        self.send_response(200)
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def upload(self, oid: str, size: int) -> dict[str, Any]:
        """Return what the hub wants of a large file: nothing, if it is there."""
        if oid in self.server.store:
            return {"oid": oid, "size": size}
        address, part = f"{self.server.url}/store/{oid}", self.server.part
        numbers = range(1, -(-size // part) + 1) if part else ()
        header = {f"{number:05d}": f"{address}/{number:05d}" for number in numbers}
        header |= {"chunk_size": str(part)} if part else {}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": address, "header": header}}}

    def do_POST(self) -> None:
        parts = self.asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts[0] == "store":
            places = [f"{parts[1]}/{part['partNumber']:05d}" for part in json.loads(body)["parts"]]
            self.server.store[parts[1]] = b"".join(map(self.server.store.pop, places))
            self.answer({})
            return
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
        elif parts[-1] == "batch":
            self.answer({"transfer": "basic", "objects": [self.upload(**each) for each in json.loads(body)["objects"]]})
        elif parts[-1] == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            modes = {
                file["path"]: "regular" if self.server.large is None or file["size"] < self.server.large else "lfs"
                for file in json.loads(body)["files"]
            }
            answers = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer({"files": answers})
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

    def apply(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.server.files[value["path"]] = self.server.store[value["oid"]]
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


@pytest.mark.parametrize("part", [None, 50])
def test_large_files_go_up_before_the_commit_and_once(
    part: int | None,
    working_folder: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    path = artifact(working_folder)
    hub.large, hub.part, hub.broken = 100, part, file_digest(path / "manifest.json")
    assert main("push", str(path), "owner/model") == 2
    error = capsys.readouterr().err
    assert "403" in error
    assert "give the same command again" in error
    assert not hub.files
    assert not hub.tags
    stored = {name for name in hub.store if "/" not in name}
    assert stored
    hub.broken = ""
    hub.calls.clear()
    assert main("push", str(path), "owner/model") == 0
    assert not [call for call in hub.calls if call.startswith("PUT") and call.split("/")[2] in stored]
    folder = working_folder / "downloaded"
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    assert hub.tags == {verify(folder).digest[:12]: COMMIT}


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
