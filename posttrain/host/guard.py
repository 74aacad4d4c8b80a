"""Stands between the pipeline and a plugin's hooks: whatever a hook does wrong is said with the plugin's name.

Around every call: exceptions, answers of the wrong type, a changed working directory, changed random numbers and modes
of torch become PluginFailed; the call is made known to the process that watches for hangs and crashes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import BadInput, PluginFailed, PosttrainError, Problem
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.host.process_state import ProcessState

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What the disk refuses is nobody's fault."""
MARK = "posttrain_impl"
"""Attribute by which pluggy knows a hook's implementation."""
STARTING = ("register_stages", "register_config", "register_eval_tasks")
"""Hooks that every command waits for."""
SETTINGS = "settings"
"""What is called when the settings of a plugin's stage are made, for every recipe."""
COLLECTING = (*STARTING, "check_plan", "check_gate")
"""Hooks whose answers are lists."""
TRAINING = "run_stage"
"""The hook that may seed and set torch as it likes: the pipeline puts everything back."""


def _start_seconds() -> float:
    text = os.environ.get("POSTTRAIN_START_SECONDS", "30")
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise BadInput(Problem(where="POSTTRAIN_START_SECONDS", what=f"{text!r} is not a number of seconds above 0"))


START_SECONDS = _start_seconds()
"""How long a plugin may take to be imported, and to answer each hook of STARTING."""


@dataclass
class Patience:
    """How long a plugin may go without a sign of life."""

    seconds: float | None = 3600.0


class Hooks:
    """A plugin as pluggy sees it: an attribute for each of its hooks."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)


def guarded(plugin: object, name: str, origin: str, patience: Patience) -> Hooks:
    """The hooks of ``plugin``, each behind a guard, as pluggy registers them.

    Raises PluginFailed for a wrapper in pluggy's old style, which cannot be guarded.
    """
    guard = Guard(name, origin, patience)
    found = {}
    for attribute in dir(plugin):
        options = getattr(getattr(plugin, attribute), MARK, None)
        if not isinstance(options, dict):
            continue
        if options["hookwrapper"]:
            raise PluginFailed(f"{attribute} is a hookwrapper; write @hookimpl(wrapper=True)")
        hook = options["specname"] or attribute
        function = getattr(plugin, attribute)
        found[attribute] = guard.wrapper(hook, function) if options["wrapper"] else guard.plain(hook, function)
    return Hooks(found)


@dataclass(frozen=True)
class Guard:
    """Guards the hooks of one plugin."""

    plugin: str
    origin: str
    patience: Patience

    def plain(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, guarded."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.calling(hook):
                answer = function(*args, **kwargs)
                if hook in COLLECTING and isinstance(answer, Iterable):
                    answer = list(answer)  # a generator runs here, not where its answers are used
            if (fault := _fault(hook, answer)) is not None:
                raise self._failed(hook, f"it answered {fault}")
            return answer

        return call

    def wrapper(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, a generator that wraps the other implementations of a hook, guarded before and after them."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Generator[None, Any, Any]:
            try:
                with self.calling(hook):
                    inner = function(*args, **kwargs)
                    next(inner)
            except _Ended:
                raise self._failed(hook, "it wraps the hook but does not yield") from None
            thrown: BaseException | None = None
            answer = None
            try:
                answer = yield
            except BaseException as error:
                thrown = error
            try:
                with self.calling(hook, passing=thrown):
                    inner.send(answer) if thrown is None else inner.throw(thrown)
            except _Ended as ended:
                return ended.value
            raise self._failed(hook, "it yields twice")

        return call

    @contextlib.contextmanager
    def calling(self, hook: str, passing: BaseException | None = None) -> Iterator[None]:
        """A call into the plugin; ``passing`` is an error that it is shown and may raise again."""
        before, ended = ProcessState.now(), None
        try:
            with activity.calling(self._activity(hook)):
                yield
        except StopIteration as stop:
            ended = _Ended(stop.value)
        except (Exception, SystemExit) as error:
            if error is passing or isinstance(error, PosttrainError) or _is_of_the_disk(error):
                raise
            raise self._failed(hook, describe(error)) from error
        finally:
            if changes := before.changes():
                before.restore()
        if hook == TRAINING:
            changes = [change for change in changes if "directory" in change]
        if changes:
            raise self._failed(hook, f"it changed {' and '.join(changes)}; it has to {_instead(changes[-1])}")
        if ended is not None:
            raise ended

    def _activity(self, call: str) -> Activity:
        starting = call in (*STARTING, SETTINGS)
        seconds = START_SECONDS if starting else self.patience.seconds
        return Activity(plugin=self.plugin, origin=self.origin, call=call, seconds=seconds, starting=starting)

    def _failed(self, hook: str, what: str) -> PluginFailed:
        return PluginFailed(f"plugin {self.plugin} ({self.origin}) in {hook}: {what}")


class _Ended(Exception):
    """A wrapper is at its end; a StopIteration could not pass through the context that guards it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def describe(error: BaseException) -> str:
    """An error and the line that raised it."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _instead(change: str) -> str:
    if "random" in change:
        return "use a generator of its own"
    return "use absolute paths" if "directory" in change else "put back what it finds"


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _fault(hook: str, answer: Any) -> str | None:
    """What an answer is, when it is not what the hook's specification says."""
    if answer is None:  # nothing to say
        return None
    if hook in ("check_plan", "check_gate"):
        return _unless_all(answer, (Problem,), "a list of Problem")
    if hook == "load_records":
        from posttrain.data.records import Conversation, Feedback, Preference, Text

        return _unless_all(answer, (Conversation, Text, Preference, Feedback), "a list of records")
    if hook in ("evaluate_artifact", "judge_artifact"):
        from posttrain.gate.spec import Scorecard, Verdict

        wanted = Scorecard if hook == "evaluate_artifact" else Verdict
        return None if isinstance(answer, wanted) else f"{answer!r:.80}, not a {wanted.__name__}"
    if hook == TRAINING:
        return None if answer is True else f"{answer!r:.80}, not True"
    if hook in COLLECTING:
        return None if isinstance(answer, list) else f"{answer!r:.80}, not a list"
    return f"{answer!r:.80}, although this hook has no answer"


def _unless_all(answer: Any, kinds: tuple[type, ...], wanted: str) -> str | None:
    if not isinstance(answer, list | tuple):
        return f"{answer!r:.80}, not {wanted}"
    strange = next((item for item in answer if not isinstance(item, kinds)), None)
    return None if strange is None else f"{strange!r:.80} among others, not {wanted}"
