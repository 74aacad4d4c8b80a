"""Secrets of the user, planted as canaries, and every byte that any ending leaves in files or on the screen."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli
from posttrain.quoting import is_secret, redacted
from tests.support import warm
from tests.support.fakes import GATES, Script, scripted_host, write_project

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "AWS_SESSION_TOKEN", "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "GOOGLE_API_KEY", "AZURE_CLIENT_SECRET", "DB_PASSWORD",
    "MY_SECRET", "COMET_API_KEY", "NEPTUNE_API_TOKEN", "MLFLOW_TRACKING_PASSWORD", "SSH_PASSPHRASE", "DEPLOY_KEY",
)  # fmt: skip
"""Variables of the environment whose values are secrets; HF_ENDPOINT and HTTPS_PROXY hold two more in their URLs."""
ARGUMENTS = {
    "model.path=https://me:{}@hub.example/base": "user information of a URL",
    "sft.data=hf://{}@hub.example/base": "user information without a name",
    "sft.data=me:{}@host.example/data.jsonl": "user information without a scheme",
    "sft.data=https://bucket.example/x.jsonl?X-Amz-Signature={}&a=b": "a signed query",
    "sft.data=hf_{}abcdefgh": "a token by its form",
    "HF_TOKEN={}": "a variable that belongs before the command",
    "WANDB_API_KEY={}": "the same",
    "+tracker.api_key={}": "a setting of a tracker",
    "tracker.password={}": "the same",
    "aws_secret_access_key={}": "a key of a cloud",
    "sft.lrr=https://{}@host/x": "a misspelt key",
}


@pytest.fixture
def canaries(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write_project(working_folder)
    found = {name: f"canary{index:02d}x{index * 7919:08x}" for index, name in enumerate(VARIABLES)}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:canary97x00endpoint@hub.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:canary98x000proxy@proxy.example:8080")
    return [*found.values(), "canary97x00endpoint", "canary98x000proxy"]


def leaks(canaries: list[str], folder: Path, *shown: str) -> list[str]:
    """The places that hold a canary: files below ``folder`` in any encoding, their names, and the screen."""
    texts = [("the screen", text.encode()) for text in shown]
    texts += [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    texts += [(f"the name {path}", str(path.relative_to(folder)).encode()) for path in folder.rglob("*")]
    return [f"{where}: {canary}" for where, data in texts for canary in canaries if canary.encode() in data]


def everything() -> str:
    """A message with the whole environment, as careless code raises it."""
    return f"cannot log in with {dict(os.environ)}"


def raising(error: Callable[[], BaseException]) -> Callable[[object], None]:
    def act(_: object) -> None:
        raise error()

    return act


def scripted(ending: str, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    if ending in ("fail", "undecided"):
        script.verdicts["sft"] = ending  # type: ignore[assignment]
    elif ending == "crash of the core":
        script.during_training = raising(lambda: RuntimeError(everything()))
    elif ending == "crash of a plugin":
        monkeypatch.setattr("posttrain.run.train.CORE_ORIGIN", "another")
        script.during_training = raising(lambda: RuntimeError(everything()))
    elif ending == "crash of a gate":
        script.during_evaluation = raising(lambda: ValueError(everything()))
    elif ending == "full disk":
        script.during_training = raising(lambda: OSError(28, everything(), everything()))
    elif ending == "interrupted":
        script.during_training = raising(KeyboardInterrupt)
    return script


ENDINGS = {
    "success": (0,), "fail": (3,), "undecided": (4,), "crash of the core": (1,), "crash of a plugin": (6,),
    "crash of a gate": (1, 6), "full disk": (2,), "interrupted": (75,), "bad input": (2,), "tracker crashes": (0,),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_ending_leaves_a_secret_of_the_environment(
    ending: str, canaries: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    host = scripted_host(scripted(ending, monkeypatch))
    monkeypatch.setattr("posttrain.host.plugins.load", lambda: host)
    monkeypatch.setitem(sys.modules, "wandb", offline_wandb(broken=ending == "tracker crashes"))
    words = [
        "recipe=mine",
        "tracker=wandb",
        *GATES,
        *(["sft.lrr=1", "sft.data=nowhere"] if ending == "bad input" else []),
    ]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    shown = capfd.readouterr()
    assert caught.value.code in ENDINGS[ending], shown.err
    assert leaks(canaries, Path.cwd(), shown.out, shown.err) == []
    if ending not in ("bad input",):
        assert list(Path("runs").rglob("run.json")), "the ending left a run to search"
    if ending.startswith("crash of a plugin"):
        assert list(Path("runs").rglob("error.txt"))


def offline_wandb(*, broken: bool) -> types.ModuleType:
    """A client that writes into its folder what the real one writes: the settings and the command."""

    class Run:
        def __init__(self, folder: Path, config: object) -> None:
            self.folder, self.summary = folder, dict[str, Any]()
            (folder / "wandb-metadata.json").write_text(
                json.dumps({"args": ["recipe=mine"], "config": config}, default=str)
            )

        def log(self, values: object) -> None:
            if broken:
                raise RuntimeError(everything())
            (self.folder / "wandb.log").write_text(str(values))

        def finish(self, exit_code: int) -> None:
            (self.folder / "end").write_text(str(exit_code))

    module = types.ModuleType("wandb")
    module.init = lambda **settings: Run(Path(settings["dir"]), settings["config"])  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    module.__spec__ = ModuleSpec("wandb", None)
    return module


@pytest.mark.parametrize("word", ARGUMENTS)
@pytest.mark.parametrize(
    "command", [[], ["plan"], ["-m"], ["gate"], ["leaderboard"]], ids=lambda words: " ".join(words)
)
def test_a_secret_on_the_command_line_is_named_and_not_shown(
    word: str, command: list[str], working_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    canary = "canaryargv00112233"
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "recipe=mine", word.format(canary)])
    shown = capfd.readouterr()
    assert caught.value.code == 2
    assert "holds a password, a key or a token" in shown.err
    assert leaks([canary], working_folder, shown.out, shown.err) == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "setting", ["model: {path: 'https://me:{}@hub/x'}", "tracker: {api_key: {}}", "x: {y: [{token: {}}]}"]
)
def test_a_secret_in_a_recipe_is_named_and_not_shown(
    setting: str, working_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    path = Path("recipes/leaky.yaml")
    path.write_text("defaults: [{/stage@sft: sft}, _self_]\n" + setting.replace("{}", "canaryfile00112233") + "\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["recipe=leaky"])
    shown = capfd.readouterr()
    assert caught.value.code == 2
    assert "leaky.yaml" in shown.err
    assert leaks(["canaryfile00112233"], working_folder / "runs", shown.out, shown.err) == []


KILLED = """\
import os, signal
from pathlib import Path
from posttrain import cli
from posttrain.host import plugins
from tests.support.fakes import GATES, Script, scripted_host
script = Script()
script.during_training = lambda context: os.kill(os.getpid(), signal.SIGKILL)
host = scripted_host(script)
plugins.load = lambda: host
cli.main(["recipe=mine", *GATES])
"""


def test_a_killed_run_leaves_no_secret(canaries: list[str], working_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = warm.run([sys.executable, "-c", KILLED], env=environment)
    assert result.returncode == -signal.SIGKILL
    assert list(Path("runs").rglob("run.json"))
    assert leaks(canaries, working_folder, result.stdout, result.stderr) == []


def test_a_secret_counts_from_the_moment_it_is_set_until_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "it says blue-harbour-mill twice"
    assert redacted(text) == text
    monkeypatch.setenv("SOME_TOKEN", "blue-harbour-mill")
    assert redacted(text) == "it says *** twice"
    monkeypatch.setenv("SOME_TOKEN", "says blue-harbour")
    assert redacted(text) == "it ***-mill twice"
    monkeypatch.delenv("SOME_TOKEN")
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "1,024 tokens of user@example.com", "the stop token <|im_end|> is added_tokens[0]", "org/model@abc123",
        "12:30 at a/b@main",
        "https://host.example/path/x@1.2?page=2&keys=3", "sha256:0123456789abcdef0123456789abcdef",
        "gate@sft.gate=none",
        "/stage@sft: sft", "recipe=mine model.revision=0123456789012345678901234567890123456789", "a_token_of_love=1",
    ],
)  # fmt: skip
def test_plain_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.template_variables.bos_token", "<s>"), ("use_auth_token", "true"), ("sft.max_tokens", "10000000"),
     ("model.added_tokens", "[<call>]"), ("data.revision", "0123456789012345678901234567890123456789")],
)  # fmt: skip
def test_plain_settings_are_no_secrets(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKENIZER", "organisation/model")
    monkeypatch.setenv("MAX_TOKENS", value)
    assert not is_secret(key, value)
    assert not is_secret("model.path", "organisation/model")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop what the machine of the tests holds: a secret of its own would be taken out of the texts above."""
    for name in [name for name in os.environ if "TOKEN" in name or "KEY" in name]:
        monkeypatch.delenv(name)
