"""``posttrain export``: an artifact as standalone weights or as files for llama.cpp, compared before they are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain import environment
from posttrain.artifact import Artifact, ModelSource, require_artifact, verify
from posttrain.commands.arguments import Arguments, parse
from posttrain.config.schema import ModelConfig
from posttrain.errors import BadInput, Problem, reject, suggest
from posttrain.model.base import resolve_base

FORMS = ("merged", "gguf", "gguf-lora")
TYPES = ("f16", "f32", "q8_0")
KEYS = ("to", "type", "output", "pretokenizer", "model.path", "model.revision")
USAGE = (
    "posttrain export ARTIFACT --to merged|gguf|gguf-lora [type=f16|f32|q8_0] [output=DIR] [pretokenizer=NAME] "
    "[model.path=BASE]"
)


def main(words: list[str]) -> int:
    """Export an artifact in one of the FORMS, and say how far it is from the artifact."""
    given = parse("export", _settings(words), KEYS)
    if len(given.plain) != 1:
        reject(" ".join(["export", *words]), "needs one artifact", USAGE)
    form, kind = given.settings.get("to"), given.settings.get("type", TYPES[0])
    if form is None:
        reject("export", "needs a form", f"Add --to FORM. Available: {', '.join(FORMS)}")
    if form not in FORMS:
        reject(f"--to {form}", f"{form!r} is no form of an export", suggest(form, FORMS))
    if kind not in TYPES:
        reject(f"type={kind}", f"{kind!r} is no type of numbers", suggest(kind, TYPES))
    artifact = verify(require_artifact(Path(given.plain[0])))
    if form == "merged":
        return _merge(artifact, given)
    return _write(artifact, _base(artifact, given), form, kind, given)


def _settings(words: Sequence[str]) -> list[str]:
    """Return the words with ``--to FORM`` as a setting."""
    found, waiting = [], iter(words)
    for word in waiting:
        chosen = f"to={next(waiting, '')}" if word == "--to" else word
        found.append(chosen.removeprefix("--") if chosen.startswith("--to=") else chosen)
    return found


def _merge(artifact: Artifact, given: Arguments) -> int:
    from posttrain.commands.merge import KEYS as MERGE
    from posttrain.commands.merge import main as merge

    output = given.settings.get("output", str(_folder(artifact, given) / "merged"))
    settings = [f"{key}={value}" for key, value in given.settings.items() if key in MERGE]
    return merge([str(artifact.path), output, *settings])


def _write(artifact: Artifact, base: ModelSource, form: str, kind: str, given: Arguments) -> int:
    environment.prepare()
    require_gguf()
    from posttrain.export.release import export_adapter, export_model, figures
    from posttrain.run.start import find_standing

    write = export_adapter if form == "gguf-lora" else export_model
    done = write(artifact, base, _folder(artifact, given), kind, given.settings.get("pretokenizer"))
    if (doubt := find_standing(artifact, Path("runs")).doubt) is not None:
        print(f"warning    {artifact.named} {doubt}")
    for name, text in figures(done.parity).items() if done.parity is not None else ():
        print(f"{name:<10} {text}")
    if done.parity is None:
        print("warning    parity was not measured: pip install 'posttrain[llama]', and give the command again")
    if done.state == "lossy":
        print(f"warning    {kind} is lossy: no gate has judged this file (gate.backend=llama does)")
    print(f"exported   {done.adapter or done.path} ({done.state})")
    print(f"           {done.path.parent / 'Modelfile'} for Ollama" + (f", on {done.path}" if done.adapter else ""))
    return 0


def require_gguf() -> None:
    """Raise BadInput when the writer of GGUF files is not installed."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise BadInput(Problem(where="--to gguf", what="gguf is not installed", fix="pip install 'posttrain[gguf]'"))


def _folder(artifact: Artifact, given: Arguments) -> Path:
    from posttrain.report.card import EXPORTS

    return Path(given.settings.get("output", artifact.path.resolve().parent / EXPORTS))


def _base(artifact: Artifact, given: Arguments) -> ModelSource:
    """Return the base of the artifact, from where it was in training unless a setting names another place."""
    path = given.settings.get("model.path", artifact.manifest.base.name)
    return resolve_base(ModelConfig(path=path, revision=given.settings.get("model.revision")), artifact.pins)
