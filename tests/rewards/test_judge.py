"""A judge behind HTTP: both orders, what is asked again, what is kept, and every way in which a judge can fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.questions import read_question
from posttrain.errors import BadInput, Interrupted, SpendCapReached
from posttrain.host import activity
from posttrain.rewards import judge
from posttrain.rewards.reward import Attempt
from posttrain.rewards.scorer import Rated, choose

Reply = tuple[int, dict[str, str], Any]


class StandIn:
    """A server that answers as ``reply`` says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[str, int], Reply] = lambda prompt, number: said("A")
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, content = stand_in.note(body, self.headers["Authorization"])
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked may have left
                    self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def note(self, body: dict[str, Any], key: str | None) -> Reply:
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            number = len(self.asked)
        return self.reply(body["messages"][0]["content"], number)


def said(text: str) -> Reply:
    return 200, {}, {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    found = StandIn()
    monkeypatch.setenv(judge.URL, found.url)
    monkeypatch.setenv(judge.KEY, "key-4471")
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)
    yield found
    found.server.shutdown()
    found.server.server_close()
    found.thread.join()


def rate(kept: Path, *texts: str, ended: bool = True, **asked: Any) -> list[Rated]:
    question = read_question({"question": "The capital of Italy?", **asked}, "q.jsonl:1")
    scorer = choose({"judge": {"model": "wise"}}, {"judge": judge.judge()}, {"judge": "us"}, kept)
    return scorer.rate([Attempt(question=question, text=text, ended=ended) for text in texts])


def first_of(prompt: str) -> str:
    """Return the answer in the first place of a prompt."""
    mark = prompt.split("lines of ")[1].split(";")[0]
    return prompt.split(f"Answer A:\n{mark}\n")[1].split(f"\n{mark}")[0]


def test_an_answer_is_compared_with_the_right_one_in_both_orders(server: StandIn, tmp_path: Path) -> None:
    server.reply = lambda prompt, number: said("A" if first_of(prompt) == "Rome" else "B")
    found = rate(tmp_path, "Oslo", "Rome", answer="Rome")
    assert found[0].reward == 0.0
    server.reply = lambda prompt, number: said(" tie.\n")
    assert rate(tmp_path, "Roma", answer="Rome")[0].reward == 0.5
    assert len(server.asked) == 5  # Rome beside Rome is one prompt, whichever comes first
    assert {body["model"] for body in server.asked} == {"wise"}
    assert set(server.keys) == {"Bearer key-4471"}


def test_a_liking_for_a_place_cancels_out_and_is_counted(server: StandIn, tmp_path: Path) -> None:
    (found,) = rate(tmp_path, "Roma", answer="Rome")
    assert (found.reward, dict(found.notes)) == (0.5, {"judge": judge.BY_PLACE})


def test_without_a_right_answer_a_grade_is_read_strictly(server: StandIn, tmp_path: Path) -> None:
    grades = {
        "best": "10",
        "worst": "1",
        "middle": " 4 \n",
        "more": "11",
        "words": "I say 7",
        "half": "7.5",
        "none": "",
    }
    server.reply = lambda prompt, number: said(next(grade for name, grade in grades.items() if f"\n{name}\n" in prompt))
    found = dict(zip(grades, rate(tmp_path, *grades), strict=True))
    assert [each.reward for each in found.values()] == [1.0, 0.0, pytest.approx(1 / 3), None, None, None, None]
    assert [name for name, each in found.items() if each.notes == {"judge": judge.NONSENSE}] == list(grades)[3:]


@pytest.mark.parametrize(
    "content", [b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, b"[" * 100_000, [1]]
)
def test_a_reply_of_another_form_is_no_zero(server: StandIn, tmp_path: Path, content: Any) -> None:
    server.reply = lambda prompt, number: (200, {}, content)
    (found,) = rate(tmp_path, "Rome")
    assert (found.reward, dict(found.notes)) == (None, {"judge": judge.NONSENSE})


def test_what_was_judged_is_kept_and_nonsense_asked_again(server: StandIn, tmp_path: Path) -> None:
    server.reply = lambda prompt, number: said("9" if "\ngood\n" in prompt else "nine")
    first = rate(tmp_path, "good", "bad", "good")
    assert len(server.asked) == 2
    server.reply = lambda prompt, number: said("2")
    second = rate(tmp_path, "good", "bad")
    assert len(server.asked) == 3
    assert first[0].reward == first[2].reward == second[0].reward == pytest.approx(8 / 9)
    assert second[1].reward == pytest.approx(1 / 9)


def test_every_answer_that_is_judged_is_a_sign_of_life(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[int] = []
    monkeypatch.setattr(activity, "sign_of_life", lambda: signs.append(1))
    server.reply = lambda prompt, number: said("9")
    rate(tmp_path, "one", "two", "three")
    assert len(signs) == 3


def test_a_busy_judge_is_asked_again(server: StandIn, tmp_path: Path) -> None:
    busy = {1: 429, 2: 503, 3: 500}
    server.reply = lambda prompt, number: (busy[number], {}, b"later") if number in busy else said("10")
    assert rate(tmp_path, "Rome")[0].reward == 1.0
    assert len(server.asked) == 4


def test_the_wait_that_a_busy_judge_asks_for_is_kept(server: StandIn, tmp_path: Path) -> None:
    times: list[float] = []

    def reply(prompt: str, number: int) -> Reply:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"") if number == 1 else said("10")

    server.reply = reply
    assert rate(tmp_path, "Rome")[0].reward == 1.0
    assert times[1] - times[0] >= 1


def test_a_signal_waits_neither_for_an_open_request_nor_for_the_next_try(server: StandIn, tmp_path: Path) -> None:
    open_one, ended, asked = threading.Event(), threading.Event(), threading.Barrier(2)

    def reply(prompt: str, number: int) -> Reply:
        if "\nbusy\n" in prompt:
            asked.wait(60)
            return 429, {"Retry-After": "60"}, b""
        asked.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        open_one.wait(60)
        ended.set()
        return said("10")

    server.reply = reply
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            rate(tmp_path, "busy", "slow")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not ended.is_set()
    open_one.set()


def test_one_that_is_rejected_ends_the_waits_of_the_others(server: StandIn, tmp_path: Path) -> None:
    asked = threading.Barrier(2)

    def reply(prompt: str, number: int) -> Reply:
        asked.wait(60)
        return (503, {"Retry-After": "60"}, b"") if "\nbusy\n" in prompt else (401, {}, b"no such key")

    server.reply = reply
    with pytest.raises(BadInput, match="HTTP 401: no such key"):
        rate(tmp_path, "busy", "other")
    assert len(server.asked) == 2


def test_a_judge_that_stays_down_stops_with_what_is_kept(server: StandIn, tmp_path: Path) -> None:
    server.reply = lambda prompt, number: said("10") if "\ngood\n" in prompt else (503, {}, b"")
    with pytest.raises(Interrupted, match="the judge wise is down: HTTP 503, 6 times; what it has judged is kept"):
        rate(tmp_path, "good", "bad")
    server.reply = lambda prompt, number: said("1")
    assert [each.reward for each in rate(tmp_path, "good", "bad")] == [1.0, 0.0]


def test_a_slow_judge_and_one_that_is_not_there_are_named(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()
    monkeypatch.setattr(judge, "SECONDS", 0.2)
    monkeypatch.setattr(judge, "TRIES", 2)
    server.reply = lambda prompt, number: said("10" if waiting.wait(60) else "1")
    with pytest.raises(Interrupted, match="is down: TimeoutError: timed out, 2 times"):
        rate(tmp_path, "Rome")
    waiting.set()
    monkeypatch.setenv(judge.URL, "http://127.0.0.1:9")
    with pytest.raises(Interrupted, match=r"Connection refused.*, 2 times"):
        rate(tmp_path, "Rome")


@pytest.mark.parametrize("status", [401, 404, 400, 302])
def test_a_request_that_is_rejected_is_bad_input_at_once(server: StandIn, tmp_path: Path, status: int) -> None:
    server.reply = lambda prompt, number: (status, {"Location": f"{server.url}/elsewhere"}, b"no such model")
    with pytest.raises(BadInput, match=rf"its endpoint says HTTP {status}: no such model(.|\n)*{judge.KEY}"):
        rate(tmp_path, "Rome")
    assert len(server.asked) == 1


def test_the_budget_is_one_for_a_run_over_its_processes_and_resumes(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reply = lambda prompt, number: said("10")
    monkeypatch.setenv(judge.MOST, "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    spent = rf"more than 5 times, the most that {judge.MOST} allows for a run"
    with activity.running(tmp_path / "run"):
        for rank, share in ((0, 2), (1, 2)):  # the later one has two of the three that are left
            monkeypatch.setenv("RANK", str(rank))
            with pytest.raises(SpendCapReached, match=spent):
                rate(tmp_path / str(rank), *"abcdef")
            assert len(list((tmp_path / str(rank) / "judged").iterdir())) == share
        # resumed in one process it has the one that is left, then none; what was judged is kept
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
        for total in (5, 5):
            with pytest.raises(SpendCapReached, match=spent):
                rate(tmp_path / "0", *"abcdef")
            assert len(server.asked) == total
        monkeypatch.setenv(judge.MOST, "8")
        assert [each.reward for each in rate(tmp_path / "0", *"abcdef")] == [1.0] * 6
        assert len(server.asked) == 8


def test_without_a_run_a_command_has_a_budget_of_its_own(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(judge.MOST, "3")
    server.reply = lambda prompt, number: said("10")
    with pytest.raises(SpendCapReached, match="more than 3 times"):
        rate(tmp_path, *"abcde")
    assert len(server.asked) == 3
    assert [each.reward for each in rate(tmp_path, *"abcde")] == [1.0] * 5


def test_an_answer_that_never_ended_is_wrong_without_being_asked(server: StandIn, tmp_path: Path) -> None:
    assert rate(tmp_path, "Rome", ended=False)[0].reward == 0.0
    assert server.asked == []


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({judge.URL: ""}, "the variable is not set"),
        ({judge.URL: "ftp://x"}, "is no endpoint"),
        ({judge.URL: "https://me:secret@x/v1"}, "is no endpoint"),
        ({judge.URL: "http://judge.example/v1", judge.KEY: "k"}, "in clear text"),
        ({judge.URL: "https://x/v1", judge.MOST: "many"}, "no number of requests"),
        ({judge.URL: "https://x/v1", judge.MOST: "0"}, "no number of requests"),
    ],
)
def test_an_unusable_environment_is_rejected_before_anything_trains(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], what: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    scorer = choose({"judge": {"model": "wise"}}, {"judge": judge.judge()}, {"judge": "us"})
    with pytest.raises(BadInput, match=what) as caught:
        scorer.identities()
    assert "secret" not in str(caught.value)
