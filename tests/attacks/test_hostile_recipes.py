"""Recipes of a stranger: whatever the file and the way, nothing runs, nothing hangs, and the file is named."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from posttrain import cli
from posttrain.config.compose import compose
from posttrain.errors import BadInput
from posttrain.host.plugins import Host
from posttrain.plan import Plan, make_plan

SECONDS = 2
"""Computing time of a rejection, at most."""
BACKSLASHES = "\\\\"
CANARY = "canary-4711-of-the-environment"
STAGE = "/stage@sft: sft, /gate@sft.gate: none"
HEAD = f"defaults: [{{{STAGE.replace(', ', '}, {')}}}, _self_]\nmodel: {{path: a/b}}\n"
BODY = "sft: {data: c/d}\n"
LOGGING = """\
version: 1
handlers: {h: {"()": os.mkdir, path: PWNED}}
root: {handlers: [h]}
"""
"""A configuration of logging that makes the folder PWNED when somebody applies it."""


@pytest.fixture(autouse=True, scope="module")
def own_garbage() -> None:
    """Keep the objects of earlier tests out of every collection, as a command of its own has none of them."""
    gc.collect()
    gc.freeze()


def write(text: str, name: str = "mine", folder: str = "recipes") -> Path:
    path = Path(folder) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def plan(host: Host, *words: str) -> Plan:
    return make_plan(compose(host, words), host)


def rejected(host: Host, *words: str) -> str:
    """The message of a recipe that must be rejected, within two seconds of this process."""
    started = time.process_time()
    with pytest.raises(BadInput) as caught:
        plan(host, *words)
    assert time.process_time() - started < SECONDS
    text = str(caught.value)
    assert len(text) < 2000
    return text


def defaults(*entries: str) -> str:
    lines = [*entries, "- /stage@sft: sft", "- /gate@sft.gate: none", "- _self_"]
    return "defaults:\n" + "".join(f"  {line}\n" for line in lines) + "model: {path: a/b}\n" + BODY


INTO_HYDRA = {
    "package of a recipe": (defaults("- /recipe@hydra.job_logging: logging"), []),
    "package from the root": (defaults("- /recipe@_global_.hydra.job_logging: logging"), []),
    "package of the own folder": (defaults("- /model@hydra.job_logging: logging"), ["--config-dir", "own"]),
    "option of hydra": (defaults("- override /hydra/job_logging: stdout"), []),
    "option of hydra without override": (defaults("- /hydra/job_logging@hydra.job_logging: stdout"), []),
    "another launcher": (defaults("- override /hydra/launcher: basic"), []),
    "key": (HEAD + BODY + "hydra: {job_logging: {version: 2}}\n", []),
    "key with quotes": (HEAD + BODY + '"hydra": {searchpath: [file:///tmp]}\n', []),
    "dotted key": (HEAD + BODY + "hydra.run.dir: x\n", []),
    "key of an own model": (HEAD + BODY, ["model=root", "--config-dir", "own"]),
    "header of an own model": (HEAD + BODY, ["model=header", "--config-dir", "own"]),
    "header in two steps": (HEAD + BODY, ["model=header2", "--config-dir", "own"]),
    "target": (HEAD + BODY + "data: {_target_: os.system}\n", []),
    "word: key": (HEAD + BODY, ["hydra.run.dir=x"]),
    "word: added key": (HEAD + BODY, ["+hydra.job.env_set.A=b"]),
    "word: forced key": (HEAD + BODY, ["++hydra.job.env_copy=[HOME]"]),
    "word: deleted key": (HEAD + BODY, ["~hydra.job_logging"]),
    "word: option": (HEAD + BODY, ["hydra/job_logging=stdout"]),
    "word: launcher": (HEAD + BODY, ["hydra/launcher=basic"]),
    "word: package": (HEAD + BODY, ["+recipe@hydra.job_logging=logging"]),
    "word: package from the root": (HEAD + BODY, ["+model@_global_.hydra.job_logging=quickstart"]),
    "word: search path": (HEAD + BODY, ["hydra.searchpath=[file:///tmp]"]),
    "word: other primary file": (HEAD + BODY, ["--config-name=recipe/mine"]),
    "word: other primary path": (HEAD + BODY, ["--config-path", "recipes"]),
    "word: a pickle": (HEAD + BODY, ["--experimental-rerun", "x.pickle"]),
}


@pytest.fixture
def own(working_folder: Path) -> None:
    write(LOGGING, "logging")
    write(LOGGING, "logging", "own/model")
    write("path: a/b\nhydra: {verbose: true}\n", "root", "own/model")
    write("# @package hydra.job_logging\n" + LOGGING, "header", "own/model")
    write("# @package _global_\nhydra:\n  job_logging: {version: 2}\n", "header2", "own/model")


@pytest.mark.parametrize("way", INTO_HYDRA)
@pytest.mark.usefixtures("own")
def test_no_file_and_no_word_reaches_hydra(host: Host, way: str, capfd: pytest.CaptureFixture[str]) -> None:
    text, words = INTO_HYDRA[way]
    write(text)
    assert rejected(host, "recipe=mine", *words)
    with pytest.raises(SystemExit) as caught:
        cli.main(["-m", "recipe=mine", "seed=1,2", *words])
    assert caught.value.code == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("way", [way for way in INTO_HYDRA if not way.startswith("word: ") and way != "target"])
@pytest.mark.usefixtures("own")
def test_hydras_settings_are_compared_with_those_of_every_composition(
    host: Host, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line: what the reader of files might miss is seen in the result."""
    from posttrain.config import settings_file

    monkeypatch.setattr(settings_file, "HYDRA", "no such word")
    text, words = INTO_HYDRA[way]
    write(text)
    message = rejected(host, "recipe=mine", *words)
    assert "hydra" in message


@pytest.mark.parametrize(
    "entry",
    ["- /gate@sft.gate: ../../{}", "- /model: ../{}", "- ../{}", "- /{}", "- //{}", "- /recipe/../../{}",
     "- /recipe@data: [../{}]", "- /__pycache__/../{}"],
)  # fmt: skip
def test_no_entry_of_the_defaults_leads_out_of_the_folders(host: Host, entry: str, working_folder: Path) -> None:
    elsewhere = write("path: elsewhere/elsewhere\n", "elsewhere", ".")
    up = "../" * 20 + str(elsewhere.absolute()).removesuffix(".yaml").removeprefix("/")
    for path in (up, "elsewhere", str(elsewhere.absolute()).removesuffix(".yaml")):
        write(defaults(entry.format(path)))
        assert "elsewhere/elsewhere" not in rejected(host, "recipe=mine")
    assert rejected(host, "recipe=quickstart", f"model={up}", "stages=[sft]")
    assert rejected(host, "recipe=quickstart", f"gate@sft.gate={up}")


def test_every_source_of_settings_is_checked(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = "path: a/b\nchat_template: ${oc.env:HOME}\n"
    write(bad, "theirs", "own/model")
    write(HEAD + BODY)
    assert "cannot use the resolver" in rejected(host, "recipe=mine", "model=theirs", "--config-dir", "own")
    write(bad, "theirs", "plugin/conf/model")
    monkeypatch.setitem(host.folders, "safety", [Path("plugin").absolute()])
    assert "cannot use the resolver" in rejected(host, "recipe=mine", "model=theirs")


NESTED = [
    "oc.${data.path}:CANARY", "${data.subset}:CANARY", "oc.env:CANARY", " oc.env :CANARY",
    "oc.decode:'${oc.env:CANARY}'",
    "oc.select:x,${oc.env:CANARY}", "oc.dict.values:hydra", "oc.create:{a: 1}", "hydra:runtime.cwd", "now:%Y", "mine:x",
]  # fmt: skip


@pytest.mark.parametrize("spelling", NESTED)
def test_no_resolver_but_those_that_ship(host: Host, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", CANARY)
    OmegaConf.register_new_resolver("mine", lambda _: CANARY, replace=True)
    value = "${" + spelling + "}"
    source = "data: {path: env, subset: oc.env}\n"
    places = [
        (HEAD + source + f"sft: {{data: '{BACKSLASHES}{value}'}}\n", []),
        (HEAD + source + f"sft: {{data: [{{path: {value!r}}}]}}\n", []),
        (HEAD + BODY, ["data={path: env, subset: oc.env}", f"sft.data={value}"]),
        (HEAD + BODY, [f"sft.data='{value}'"]),
        (HEAD + BODY, [f"+sft.gate.tasks={{a: {{task: '{value}'}}}}"]),
    ]
    for text, words in places:
        write(text)
        assert CANARY not in rejected(host, "recipe=mine", *words)
    assert OmegaConf.create({"a": "${mine:x}"}).a == CANARY  # the process has its own resolvers back
    OmegaConf.clear_resolver("mine")


def test_without_the_reader_no_resolver_exists_either(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.config import settings_file

    monkeypatch.setenv("CANARY", CANARY)
    monkeypatch.setattr(settings_file, "_text_problems", lambda where, text: [])
    for spelling in NESTED[:5]:
        write(HEAD + "data: {path: env, subset: oc.env}\nsft: {data: ['${" + spelling + "}']}\n")
        assert CANARY not in rejected(host, "recipe=mine")


def bomb(levels: int, wide: int, start: str = "x") -> str:
    lines = [f"a0: &a0 [{','.join([start] * wide)}]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merge_bomb(levels: int, wide: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * wide)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def interpolation_bomb(levels: int, wide: int) -> str:
    tasks = ["k0: {role: lift, metric: acc, task: aaaaaaaaaa}"]
    for n in range(1, levels):
        value = "".join([f"${{sft.gate.tasks.k{n - 1}.task}}"] * wide)
        tasks.append(f"k{n}: {{role: lift, metric: acc, task: '{value}'}}")
    return HEAD + f"sft: {{data: c/d, gate: {{tasks: {{{', '.join(tasks)}}}}}}}\n"


def node_bomb(levels: int, wide: int) -> str:
    lines = ["k0: {a: x}"]
    for n in range(1, levels):
        inner = ", ".join(f"i{index}: '${{sft.gate.tasks.k{n - 1}}}'" for index in range(wide))
        lines.append(f"k{n}: {{{inner}}}")
    return HEAD + f"sft: {{data: c/d, gate: {{tasks: {{{', '.join(lines)}}}}}}}\n"


BIG = {
    "anchors": lambda: write(HEAD + BODY + bomb(9, 10)),
    "merge keys": lambda: write(HEAD + BODY + merge_bomb(9, 10)),
    "anchors in data": lambda: write(HEAD + bomb(7, 10) + "sft: {data: *a6}\n"),
    "an anchor in itself": lambda: write(HEAD + BODY + "x: &a [*a]\n"),
    "an anchor in itself, in a mapping": lambda: write(HEAD + BODY + "x: &a {<<: *a}\n"),
    "interpolations": lambda: write(interpolation_bomb(9, 10)),
    "interpolated nodes": lambda: write(node_bomb(9, 10)),
    "a chain of interpolations": lambda: write(interpolation_bomb(900, 1)),
    "a value that refers to itself": lambda: write(HEAD + "sft: {data: '${sft.data}'}\n"),
    "two values that refer to each other": lambda: write(
        HEAD + "sft: {data: '${sft.eval_data}', eval_data: '${sft.data}'}\n"
    ),
    "a node that refers to the one around it": lambda: write(HEAD + "sft: {data: {path: '${sft}'}}\n"),
    "brackets": lambda: write(HEAD + BODY + "x: " + "[" * 5000 + "]" * 5000),
    "braces": lambda: write(HEAD + BODY + "x: " + "{a: " * 900 + "}" * 900),
    "indents": lambda: write(HEAD + BODY + "".join(" " * n + "a:\n" for n in range(300))),
    "a long value": lambda: write(HEAD + f"sft: {{data: {'x' * 1_000_000}}}\n"),
    "a long key": lambda: write(HEAD + BODY + f"{'x' * 50_000}: 1\n"),
    "a long integer": lambda: write(HEAD + f"sft: {{data: c/d, epochs: {'9' * 9000}}}\n"),
    "a huge file": lambda: write(HEAD + BODY + "# filler\n" * 2_000_000),
    "many keys": lambda: write(HEAD + BODY + "".join(f"k{n}: {n}\n" for n in range(9000))),
    "many defaults": lambda: write(defaults(*[f"- /gate@sft.g{n}: none" for n in range(3000)])),
    "itself": lambda: write(defaults("- /recipe/mine")),
    "itself as the chosen one": lambda: write(defaults("- /recipe: mine")),
    "itself, relative": lambda: write(defaults("- mine")),
    "itself at a place": lambda: write(defaults("- /recipe@data: mine")),
    "a ring of two": lambda: (write(defaults("- mine"), "b"), write(defaults("- /recipe/b"))),
    "a ring of three": lambda: (
        write(defaults("- /recipe/c"), "b"),
        write(defaults("- mine"), "c"),
        write(defaults("- b")),
    ),
    "a tree of includes": lambda: (
        [write(f"defaults: [{{/recipe@a: r{n + 1}}}, {{/recipe@b: r{n + 1}}}, _self_]\n", f"r{n}") for n in range(25)]
        and write("x: 1\n", "r25")
        and write(defaults("- /recipe@data: r0"))
    ),
}


@pytest.mark.parametrize("what", BIG)
def test_what_grows_without_bounds_is_rejected_at_once(host: Host, what: str) -> None:
    BIG[what]()
    assert "mine" in rejected(host, "recipe=mine")


UNSOUND: dict[str, bytes] = {
    "binary": bytes(range(256)) * 10,
    "UTF-16": HEAD.encode("utf-16"),
    "UTF-16 without a mark": HEAD.encode("utf-16-le"),
    "NUL": HEAD.encode() + b"x: \0\n",
    "control characters": HEAD.encode() + b"x: \x1b[31m\n",
    "a key twice": HEAD.encode() + b"seed: 1\nseed: 2\n",
    "a tag of Python": HEAD.encode() + b"x: !!python/object/apply:os.mkdir [PWNED]\n",
    "a tag of Python, by name": HEAD.encode() + b"x: !!python/name:os.system\n",
    "a tag of its own": HEAD.encode() + b"x: !function mine.run\n",
    "binary by tag": HEAD.encode() + b"x: !!binary aGVsbG8=\n",
    "a list": b"[1, 2]\n",
    "a text": b"hello\n",
    "two documents": HEAD.encode() + b"---\n" + HEAD.encode(),
    "a key that is a list": HEAD.encode() + b"? [a, b]\n: 1\n",
    "a key that is null": HEAD.encode() + b"null: 1\n",
    "no alias": HEAD.encode() + b"x: *nowhere\n",
    "a tab": HEAD.encode() + b"x:\n\t- 1\n",
    "half a quote": HEAD.encode() + b'x: "abc\n',
    "defaults: a number": b"defaults: 3\n",
    "defaults: a mapping": b"defaults: {/stage@sft: sft}\n",
    "defaults: numbers": b"defaults: [3, 4]\n",
    "defaults: null": b"defaults: [null]\n",
    "defaults: two keys": b"defaults: [{/stage@sft: sft, /gate@sft.gate: none}]\n",
    "defaults: lists": b"defaults: [[/stage@sft]]\n",
    "defaults: a mapping as option": b"defaults: [{/stage@sft: {a: b}}]\n",
    "a header without a value": b"# @package\n" + HEAD.encode() + BODY.encode(),
    "a header with two": b"# @package a b\n" + HEAD.encode() + BODY.encode(),
    "half an interpolation": HEAD.encode() + b"sft: {data: '${sft.data'}\n",
    "an empty interpolation": HEAD.encode() + b"sft: {data: '${}'}\n",
    "a leading one": HEAD.encode() + b"sft: {data: '${....x}'}\n",
    "a password": HEAD.encode() + b"sft: {data: 'https://me:hunter2222@host/x'}\n",
    "a token": HEAD.encode() + BODY.encode() + b"tracker: {api_key: abcdefgh12345678}\n",
}


@pytest.mark.parametrize("what", UNSOUND)
def test_an_unsound_file_is_named(host: Host, what: str) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_bytes(UNSOUND[what])
    text = rejected(host, "recipe=mine")
    assert "mine" in text or "sft.data" in text or "recipe:" in text
    assert "hunter2222" not in text
    assert "abcdefgh12345678" not in text
    assert not Path("PWNED").exists()


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "an endless file": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_file_is_named(host: Host, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    SPECIAL[what](Path("recipes/mine.yaml"))
    assert "mine" in rejected(host, "recipe=mine")
    with pytest.raises(SystemExit) as caught:
        cli.main(["list", "recipes"])
    assert caught.value.code == 0
    assert "quickstart" in capsys.readouterr().out


WORDS = {
    "a long value": "sft.data=" + "x" * 100_000,
    "a long name of a file": "sft.data=" + "x" * 5000,
    "a long path": "model.path=" + "x/" * 4000,
    "a long key": "x" * 5000 + "=1",
    "brackets": "sft.data=" + "[" * 900 + "]" * 900,
    "braces": "sft.data=" + "{a:" * 900 + "1" + "}" * 900,
    "interpolations": "sft.data=" + "${" * 500 + "}" * 500,
    "a recipe elsewhere": "recipe=../elsewhere",
    "a gate elsewhere": "gate@sft.gate=../../etc/passwd",
    "a password": "model.path=https://me:hunter2222@hub/x",
    "a key": "+tracker.api_key=hunter2222",
}


@pytest.mark.parametrize("what", WORDS)
def test_a_hostile_word_is_named(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    write(HEAD + BODY, "elsewhere", ".")
    write(HEAD + BODY)
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "recipe=mine", WORDS[what]])
    shown = capfd.readouterr().err
    assert caught.value.code == 2
    assert len(shown) < 2000
    assert "Traceback" not in shown
    assert "hunter2222" not in shown


ATOMS = st.sampled_from(
    ["${", "}", "{", "[", "]", ":", ",", "oc.env", "CANARY", "sft.data", "'", '"', "\\", " ", "a", ".", "hydra",
    "@", "&a ", "*a"]
)  # fmt: skip


@settings(max_examples=10)
@given(pieces=st.lists(ATOMS, max_size=14), quoted=st.booleans())
def test_no_value_of_a_recipe_reads_the_environment_or_crashes(
    host: Host, pieces: list[str], quoted: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    os.environ["CANARY"] = CANARY
    value = "".join(pieces)
    text = "'" + value.replace("'", "''") + "'" if quoted else value
    write(HEAD + "sft: {data: [" + text + "]}\n")
    try:
        found = plan(host, "recipe=mine")
    except BadInput as error:
        assert CANARY not in str(error)
    else:
        assert CANARY not in str(found.resolved)


def test_a_recipe_is_checked_before_anything_heavy_is_imported() -> None:
    import subprocess

    write(HEAD + BODY + bomb(9, 10))
    code = (
        "import sys; from posttrain import cli\ntry: cli.main(['plan', 'recipe=mine'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2 set()"
    assert "mine.yaml" in result.stderr


def test_what_others_keep_in_hydras_store_reaches_no_recipe(host: Host) -> None:
    store = ConfigStore.instance()
    theirs = dict(store.repo)
    store.store(name="theirs", group="model", node={"path": CANARY})
    try:
        write(HEAD + BODY)
        assert "theirs" in rejected(host, "recipe=mine", "model=theirs")
        assert plan(host, "recipe=mine").recipe == "mine"
        assert "theirs.yaml" in store.list("model")
        assert set(store.repo) == {*theirs, "model"}
        assert {"launcher", "sweeper", "config.yaml"} <= set(store.list("hydra"))
    finally:
        store.repo = theirs


def test_variables_of_hydra_change_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "this.is.no.module")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    write(HEAD + BODY)
    assert plan(host, "recipe=mine").recipe == "mine"
    with pytest.raises(SystemExit) as caught:
        cli.main(["-m", "recipe=mien", "seed=1,2"])
    assert caught.value.code == 2
    assert capfd.readouterr().err.count("error: recipe=mien: no recipe named 'mien'") == 1


def test_a_file_that_hides_another_one_is_named(host: Host) -> None:
    hiding = write(HEAD + BODY, "quickstart")
    (line,) = plan(host, "recipe=quickstart").shadows
    assert line.startswith("recipe quickstart: ")
    assert str(hiding.absolute()) in line
    assert " shadows " in line
    hidden = write("enabled: false\n", "none", "own/gate")
    shadows = plan(host, "recipe=quickstart", "--config-dir", "own").shadows
    assert any(str(hidden.absolute()) in line and line.startswith("gate none: ") for line in shadows)
    write(HEAD + BODY)
    assert plan(host, "recipe=mine").shadows == ()
