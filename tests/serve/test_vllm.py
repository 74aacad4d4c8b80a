"""vLLM behind the server, in processes of their own: a stand-in that speaks its HTTP takes its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import Artifact
from posttrain.model import vllm_process as processes
from posttrain.model.vllm_process import Process
from tests.support.command import PROGRAM, main
from tests.support.serving import chat, events, make_artifact, post, serving
from tests.support.tiny import write_base
from tests.support.warm import started

TOKEN = "not-a-secret-of-anyone"
ROOT = Path(__file__).parents[2]
COMMAND = f"{sys.executable} -m tests.support.vllm serve"
QUESTION = "What is this called?"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("vllm")
    base = write_base(root / "base")
    stages = root / "runs" / "run" / "stages"
    kinds: dict[str, dict[str, Any]] = {"one": {}, "two": {}, "dora": {"dora": True}, "wide": {"r": 9}}
    for name in kinds:
        (stages / name).mkdir(parents=True)
    return {
        name: make_artifact(stages / name / "artifact", base, seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items(), start=1)
    }


def standin(journal: Path) -> dict[str, str]:
    """The environment of a stand-in: it is found, and has a journal."""
    return {"STANDIN_JOURNAL": str(journal), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def read(journal: Path, path: str) -> list[dict[str, Any]]:
    lines = journal.read_text().splitlines() if journal.is_file() else []
    return [found for line in lines if (found := json.loads(line))["path"] == path]


def until(true: Callable[[], Any]) -> Any:
    """Return the first value that is true."""
    for _ in range(3000):
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def call(url: str, body: Any = None, token: str = TOKEN) -> tuple[int, Message, str]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def logprobs(body: dict[str, Any]) -> list[float]:
    given = [choice["logprobs"] for choice in body["choices"]]
    return [token["logprob"] for each in given if each is not None for token in each["content"]]


def likeliest(body: dict[str, Any]) -> list[list[str]]:
    given = [choice["logprobs"] for choice in body["choices"]]
    return [[top["token"] for top in token["top_logprobs"]] for each in given if each for token in each["content"]]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_vllm_is_supervised_and_answers_as_the_embedded_engine_does(made: dict[str, Artifact], tmp_path: Path) -> None:
    journal, runs = tmp_path / "journal", made["one"].path.parents[3]
    (tmp_path / "token").write_text(TOKEN)
    words = [*PROGRAM, "serve", str(made["one"].path), str(made["dora"].path), "--port", "0", "--allow-unpromoted"]
    words += ["--token-file", str(tmp_path / "token"), "--backend", "vllm"]
    words += ["--vllm-command", f"{COMMAND} --max-model-len 256"]
    environment = {**os.environ, **standin(journal)}
    bodies = [
        chat("v1", QUESTION), chat("v2", QUESTION), chat("base", "Hi"), chat("v1", "Hi", stop=["e"]),
        chat("v1", "Hi", logprobs=True, top_logprobs=2, max_tokens=3), chat("v2", "Hi", n=2),
        chat("v1", "Hi", logprobs=True, max_tokens=3),
    ]  # fmt: skip
    with serving(made["one"], made["dora"], made["two"]) as service:
        expected = [post(service, **body).json() for body in bodies]
        second = post(service, **chat(made["two"].digest, QUESTION)).json()
    log = (tmp_path / "log").open("w")
    with log, started(words, stdout=subprocess.PIPE, stderr=log, env=environment) as server:
        assert server.stdout is not None
        while "listening on" not in (line := server.stdout.readline()):
            assert line, (tmp_path / "log").read_text()
        url = line.split()[-1]
        # the same answers, names, headers and errors; an adapter is applied, DoRA is merged into weights of its own
        for body, wanted in zip(bodies, expected, strict=True):
            status, headers, text = call(f"{url}/chat/completions", body)
            found = json.loads(text)
            assert status == 200
            assert headers["X-Posttrain-Digest"] == found["system_fingerprint"] == wanted["system_fingerprint"]
            for one, other in zip(found["choices"], wanted["choices"], strict=True):
                assert (one["token_ids"], one["message"], one["finish_reason"]) == (
                    other["token_ids"], other["message"], other["finish_reason"]
                )  # fmt: skip
            assert found["usage"] == wanted["usage"]
            assert logprobs(found) == pytest.approx(logprobs(wanted), abs=1e-3)
            assert likeliest(found) == likeliest(wanted)
        streamed = call(f"{url}/chat/completions", chat("v1", QUESTION, stream=True))[2]
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in events(streamed))
        assert text == expected[0]["choices"][0]["message"]["content"]
        assert call(f"{url}/chat/completions", chat("v1", "Hi"), token="wrong")[0] == 401
        assert call(f"{url}/chat/completions", chat("nobody", "Hi"))[0] == 404
        assert call(f"{url}/chat/completions", chat("v1", "Hi", chat_template="x"))[0] == 400
        status, headers, text = call(f"{url}/chat/completions", chat("v1", "a" * 256))
        assert status == 400
        assert "more than the 256 of the model" in text  # of its weights it would be 512
        begun = read(journal, "begun")
        assert len(begun) == 2
        assert {(made["dora"].digest in each["weights"], each["adapting"]) for each in begun} == {
            (True, False), (False, True)
        }  # fmt: skip
        # a promotion loads an adapter under its digest; going back unloads it
        for name in ("one", "two"):
            assert main("promote", "live", made[name].digest, f"output_root={runs}", "--allow-unpromoted") == 0
        until(lambda: made["two"].digest in call(f"{url}/models/live")[2])
        moved = json.loads(call(f"{url}/chat/completions", chat("live", QUESTION))[2])
        assert moved["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
        assert main("rollback", "live", f"output_root={runs}") == 0
        until(lambda: read(journal, "/v1/unload_lora_adapter"))
        assert read(journal, "/v1/unload_lora_adapter")[0]["model"] == made["two"].digest[:32]
        # an adapter of a higher rank than vLLM was begun for is merged
        assert main("promote", "live", made["wide"].digest, f"output_root={runs}", "--allow-unpromoted") == 0
        until(lambda: made["wide"].digest in call(f"{url}/models/live")[2])
        assert made["wide"].digest in read(journal, "begun")[-1]["weights"]
        # a crash is noticed, and the process begun again with its adapters
        plain = next(each["pid"] for each in begun if made["dora"].digest not in each["weights"])
        os.kill(plain, signal.SIGKILL)
        ready = url.removesuffix("/v1") + "/ready"
        until(lambda: call(ready)[0] == 503)
        status, headers, text = call(f"{url}/chat/completions", chat("v1", "Hi"))
        assert (status, headers.get("Retry-After")) == (503, "5") or status == 200
        until(lambda: call(ready)[0] == 200)
        again = json.loads(call(f"{url}/chat/completions", bodies[0])[2])
        assert again["choices"][0]["token_ids"] == expected[0]["choices"][0]["token_ids"]
        pids = {each["pid"] for each in read(journal, "begun")}
        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0
    assert len(pids) == 4
    engines = {each["engine"] for each in read(journal, "engine")}
    until(lambda: not any(map(is_alive, pids | engines)))
    assert "ended with status -9" in (tmp_path / "log").read_text()


def test_a_process_ends_with_what_began_it_and_a_false_start_is_told(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "journal"
    base = made["one"].path.parents[4] / "base"
    code = (
        "import os, signal; from pathlib import Path; from posttrain.model.vllm_process import Process\n"
        f"each = Process({COMMAND.split()!r}, Path({str(base)!r}), ['--dtype', 'float32'], os.environ)\n"
        "each.start(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = standin(journal)
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    (begun,), (engine,) = read(journal, "begun"), read(journal, "engine")
    until(lambda: not is_alive(begun["pid"]) and not is_alive(engine["engine"]))

    for name, value in (*environment.items(), ("STANDIN_FAULT", "yes")):
        monkeypatch.setenv(name, value)
    words = ["serve", str(made["one"].path), "--port", "0", "--allow-unpromoted", "--backend"]
    for more, told in (
        (["vllm", "--vllm-command", COMMAND], "ended with status 3: ValueError: no room for the cache"),
        (["vllm", "--vllm-command", "/nowhere/vllm"], "there is no such command"),
        (["vlm"], "Did you mean vllm?"),
    ):
        assert main(*words, *more) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(*words, "vllm") == 2
    assert "there is no command vllm" in capsys.readouterr().err


def test_a_process_that_keeps_ending_is_begun_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSES", (0.01, 0.04))
    told: list[Any] = []
    each = Process(["never"], Path("model"), [], {})
    each.tell = told.append
    each._begun.set()
    monkeypatch.setattr(each, "_live", lambda output: each._ending.set() if len(told) == 5 else 1)
    each._keep()
    assert [found["again in"] for found in told] == [0.01, 0.02, 0.04, 0.04, 0.04]


def test_the_reason_for_which_vllm_gives_an_answer_up_is_told() -> None:
    lines = [b'data: {"choices": [{"token_ids": [5]}]}\n', b'data: {"error": {"message": "EngineCore died"}}\n']
    found = processes.choices(lines)
    assert next(found)["token_ids"] == [5]
    with pytest.raises(ValueError, match="EngineCore died"):
        next(found)
