"""The commands around a server: one is started, checked and stopped; and one talks in the terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from posttrain.artifact import Artifact
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.serve import server
from posttrain.serve import service as services
from posttrain.serve.catalogue import BasePlace
from posttrain.serve.check import Remote, check
from posttrain.serve.follower import Follower
from posttrain.serve.server import listen, take_port
from tests.support.command import PROGRAM, main
from tests.support.serving import catalogue_of, chat, events, make_artifact, serving
from tests.support.tiny import write_base
from tests.support.warm import started

TOKEN = "not-a-secret-of-anyone"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """The artifact of a run with one stage, and one that stands alone."""
    root = tmp_path_factory.mktemp("root")
    base = write_base(root / "base")
    run = root / "runs" / "quickstart-1a2b3c"
    (run / "stages" / "sft").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    return make_artifact(run / "stages" / "sft" / "artifact", base, 1), make_artifact(root / "two", base, 2)


def quoted() -> tuple[str, str, bytes]:
    """README's lines about serving: what is served, the address that curl asks, and what it sends."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    served = re.search(r"posttrain serve (runs/\S+)\n", text)
    asked = re.search(r"curl localhost:8000(\S+) -H 'Content-Type: application/json' -d '(.+)'\n", text)
    assert served
    assert asked
    return served[1], asked[1], asked[2].encode()


def test_a_server_is_started_checked_and_stopped_while_it_answers(
    made: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    one, two = made
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    given, address, quote = quoted()
    (run,) = one.path.parents[3].parent.glob(given)
    words = [*PROGRAM, "serve", str(run), "--port", "0", "--token-file", str(tmp_path / "token")]
    with started([*words, "--allow-unpromoted"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = []
        while "listening on" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
            lines.append(line)
        url = line.split()[-1]
        assert any("v1, latest, not promoted: was never judged" in line for line in lines)

        assert "ids, greedy answers and template agree" in next(check(catalogue_of(one), Remote(url, TOKEN)))
        with pytest.raises(BadInput, match="status 401"):
            list(check(catalogue_of(one), Remote(url, "wrong")))
        with pytest.raises(BadInput, match="neither it nor v2"):
            list(check(catalogue_of(one, two), Remote(url, TOKEN)))
        stranger = replace(catalogue_of(two).artifacts[0], digest=one.digest)  # as if another were served by this name
        with pytest.raises(ArtifactDamaged, match="is not the artifact"):
            list(check(replace(catalogue_of(two), artifacts=(stranger,)), Remote(url, TOKEN)))
        with pytest.raises(BadInput, match="Address already in use"):
            take_port("127.0.0.1", int(url.split(":")[-1].split("/")[0]))

        asked = urllib.request.Request(
            f"{url.removesuffix('/v1')}{address}",
            quote,
            {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=300) as answer:
            told = json.load(answer)
        assert told["system_fingerprint"] == one.digest
        assert told["choices"][0]["message"]["role"] == "assistant"

        body = json.dumps(chat("v1", "Hi", max_tokens=400, temperature=2.0, stream=True)).encode()
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            text = (first + answer.read()).decode()
        assert events(text)[-1]["choices"][0]["finish_reason"]
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "stopped    no answer is under way\n")
    logged = [json.loads(line) for line in err.splitlines()]
    assert {"request", "rejected"} == {each["event"] for each in logged}
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve"], "needs a run or an artifact"), (["serve", "x", "--port", "many"], "is no number"),
        (["serve", "x", "--host", "0.0.0.0"], "there is no token"), (["serve", "x", "batch=0"], "is no whole number"),
        (["serve", "x", "--token-file", "none"], "there is no such file"), (["serve", "x", "--prot", "1"], "--port"),
        (["serve", "nowhere"], "neither a run nor an artifact"), (["chat"], "needs a run or an artifact"),
        (["chat", "nowhere"], "neither a run nor an artifact"), (["chat", "x", "temperature=9"], "of 0 to 2"),
    ],
)  # fmt: skip
def test_bad_words(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*words) == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_loaded(
    made: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(services, "open_service", lambda *given: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main("serve", str(made[0].path), "--allow-unpromoted", "--port", port) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_port_that_another_took_meanwhile_is_told(made: tuple[Artifact, Artifact]) -> None:
    catalogue = catalogue_of(made[0])
    with serving(made[0]) as service, take_port("127.0.0.1", 0) as one, take_port(*one.getsockname()) as other:
        one.listen()
        follower = Follower(service, catalogue, BasePlace(), unpromoted=True)
        follower.start()
        with pytest.raises(BadInput, match="cannot be listened on"):
            listen(service, other, follower, lambda: None)


def test_a_connection_stays_open_longer_than_clients_keep_it(
    made: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * (httpx.Limits().keepalive_expiry or 0) < server.IDLE
    monkeypatch.setattr(server, "IDLE", 1)  # the server closes it by this figure, and by no other
    found: list[tuple[bytes, float]] = []

    def knock(port: int) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = connection.recv(4096)
                began = time.monotonic()
                while connection.recv(4096):
                    pass
                found.append((answer, time.monotonic() - began))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with serving(made[0]) as service, take_port("127.0.0.1", 0) as port:
        follower = Follower(service, catalogue_of(made[0]), BasePlace(), unpromoted=True)
        follower.start()
        client = threading.Thread(target=knock, args=(port.getsockname()[1],))
        listen(service, port, follower, client.start)
        client.join()
    ((answer, seconds),) = found
    assert answer.startswith(b"HTTP/1.1 200")
    assert 0.5 < seconds < server.IDLE + 3


def test_a_server_that_does_not_run_is_told(made: tuple[Artifact, Artifact]) -> None:
    with take_port("127.0.0.1", 0) as port, pytest.raises(BadInput, match="Is the server running"):
        list(check(catalogue_of(made[0]), Remote(f"http://127.0.0.1:{port.getsockname()[1]}", None)))
    with pytest.raises(BadInput, match="is no address"):
        Remote("file:///etc/passwd", None)


def test_a_talk_switches_models_and_shows_two_side_by_side(
    made: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "Hi\n/model v1 base\nHi\n/model nobody\n/models\n/what\n\na<|end|>b\n/new\nHi\n/quit\nHi\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    paths = [str(each.path) for each in made]
    assert main("chat", *paths, "max_tokens=8", "--allow-unpromoted") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("[")] == ["[v1]", "[base]"] * 2
    assert lines[-1] == next(line for line in lines if line.startswith("[base]"))  # /new began anew
    assert any(line.startswith("v2, latest: ") for line in lines)
    for fault in ("nobody: is unknown", "/what: is no command", "special token"):
        assert fault in err


def test_a_talk_with_an_unknown_model_ends_before_one_is_loaded(
    made: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("posttrain.serve.service.open_service", lambda *given: pytest.fail("a model is loaded"))
    assert main("chat", str(made[0].path), "model=v1,lastest", "--allow-unpromoted") == 2
    assert "model lastest: is unknown\n    Did you mean latest?" in capsys.readouterr().err


def test_ctrl_c_ends_a_talk(
    made: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(io.StringIO):
        def readline(self, size: int = -1) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Stopped())
    assert main("chat", str(made[0].path), "--allow-unpromoted") == 0
    assert "resume" not in capsys.readouterr().err
