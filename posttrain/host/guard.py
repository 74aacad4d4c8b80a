"""A guard around every hook of a plugin, so that each of its faults is reported under its name.

Exceptions, answers of the wrong type, a changed working directory, changed random numbers and modes of torch become
PluginFailed. Each call is recorded for the process that detects hangs and crashes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO

import pluggy

from posttrain import hookspecs
from posttrain.disk import is_machine_error
from posttrain.errors import BadInput, PluginFailed, PosttrainError, Problem
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.host.process_state import ProcessState
from posttrain.host.readers import Reader
from posttrain.rewards.reward import Reward

MARK = "posttrain_impl"
"""Attribute with which pluggy marks the implementation of a hook."""
STARTING = (
    "register_stages", "register_settings", "register_rewards", "register_config", "register_eval_tasks",
    "register_filters", "register_readers",
)  # fmt: skip
"""Hooks that every command waits for."""
SETTINGS = "settings"
"""Name of the call in which the settings of a plugin are created, for every recipe."""
COLLECTING = (*STARTING, "check_plan", "check_gate")
"""Hooks whose answers are lists."""
ROWS_AT_ONCE = 500
"""Rows that a reader gives in one guarded call."""
TRAINING = "run_stage"
"""The hook that may seed and set torch: the pipeline restores everything."""


def _start_seconds() -> float:
    text = os.environ.get("POSTTRAIN_START_SECONDS", "30")
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise BadInput(Problem(where="POSTTRAIN_START_SECONDS", what=f"{text!r} is not a number of seconds above 0"))


START_SECONDS = _start_seconds()
"""Seconds that a plugin may take to be imported, and to answer each hook of STARTING."""


class Hooks:
    """The guarded hooks of a plugin as attributes, in the form that pluggy registers."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)


def guarded(plugin: object, name: str, origin: str) -> Hooks:
    """Return the hooks of ``plugin``, each behind a guard.

    Raises PluginFailed for a wrapper in pluggy's old style, which cannot be guarded.
    """
    guard = Guard(name, origin)
    found = {}
    for attribute, options in implementations(plugin):
        if options["hookwrapper"]:
            raise PluginFailed(f"{attribute} is a hookwrapper; write @hookimpl(wrapper=True)")
        hook = options["specname"] or attribute
        function = getattr(plugin, attribute)
        found[attribute] = guard.wrapper(hook, function) if options["wrapper"] else guard.plain(hook, function)
    return Hooks(found)


def implementations(plugin: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names of the attributes that implement hooks, with pluggy's options."""
    for attribute in dir(plugin):
        options = getattr(getattr(plugin, attribute), MARK, None)
        if isinstance(options, dict):
            yield attribute, options


@dataclass(frozen=True)
class Guard:
    """The guard of one plugin's hooks."""

    plugin: str
    origin: str
    """Distribution and version."""

    def plain(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, guarded."""

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

    def reward(self, reward: Reward) -> Reward:
        """Return ``reward`` with every one of its functions guarded."""

        def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any) -> Any:
                try:
                    with self.calling(f"reward {reward.name}"):
                        return function(*args)
                except _Ended:
                    raise self._failed(f"reward {reward.name}", "StopIteration") from None

            return call

        score = None if reward.score is None else guarded(reward.score)
        opening = None if (opens := reward.open) is None else guarded(lambda *args: guarded(opens(*args)))
        return replace(reward, score=score, open=opening, lacks=guarded(reward.lacks), prepare=guarded(reward.prepare))

    def reader(self, reader: Reader) -> Reader:
        """Return ``reader`` with its function guarded, and each of its answers checked."""
        call = f"the reader {reader.name}"

        def read(file: BinaryIO) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
            with self.calling(call):
                rows = iter(reader.read(file))
            while True:
                with self.calling(call):
                    batch = list(islice(rows, ROWS_AT_ONCE))
                for row in batch:
                    if not _is_row(row):
                        raise self._failed(call, f"it yielded {row!r:.80}, not a line's number with its keys or a text")
                    yield row
                if len(batch) < ROWS_AT_ONCE:
                    return

        return replace(reader, read=read)

    def wrapper(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, a wrapper of the hook's other implementations, guarded before and after them."""

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
        """Guard a call into the plugin; ``passing`` is an error from inside, which a wrapper may raise again."""
        before, ended = ProcessState.now(), None
        try:
            with activity.calling(self._activity(hook)):
                yield
        except StopIteration as stop:
            ended = _Ended(stop.value)
        except (Exception, SystemExit) as error:
            if error is passing or isinstance(error, PosttrainError) or is_machine_error(error):
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
        limit = START_SECONDS if starting else activity.silence_limit()
        return Activity(plugin=self.plugin, origin=self.origin, call=call, silence_limit=limit, starting=starting)

    def _failed(self, hook: str, what: str) -> PluginFailed:
        return PluginFailed(f"plugin {self.plugin} ({self.origin}) in {hook}: {what}")


class _Traced:
    """One implementation of a hook, as a plugin."""

    def __init__(self, hook: str, function: Callable[..., Any], *, wrapper: bool) -> None:
        setattr(self, hook, hookspecs.hookimpl(wrapper=wrapper)(function))


def ask_traced(
    hook: str, implementations: Iterable[tuple[pluggy.HookImpl, str]], arguments: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """Call a hook of the first result in these implementations, each with its plugin's name.

    Return the answer, and the names behind it: the plugin that answered, then those that wrapped it.
    """
    behind: list[str] = []
    manager = pluggy.PluginManager("posttrain")
    manager.add_hookspecs(hookspecs)
    for implementation, name in implementations:
        trace = _trace_wrapper if implementation.wrapper else _trace
        function = trace(implementation.function, name, behind)
        manager.register(_Traced(hook, function, wrapper=implementation.wrapper))
    answer = getattr(manager.hook, hook)(**arguments)
    return answer, tuple(behind)


def _trace(function: Callable[..., Any], name: str, behind: list[str]) -> Callable[..., Any]:
    """Return ``function``, which adds ``name`` to ``behind`` when it answers."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if (answer := function(*arguments)) is not None:
            behind.append(name)
        return answer

    return call


def _trace_wrapper(function: Callable[..., Any], name: str, behind: list[str]) -> Callable[..., Any]:
    """Return ``function``, a wrapper, which adds ``name`` to ``behind`` at its end."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Generator[None, Any, Any]:
        answer = yield from function(*arguments)
        behind.append(name)
        return answer

    return call


class _Ended(Exception):
    """The end of a wrapper, in place of StopIteration, which cannot leave the generator of a context manager."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def describe(error: BaseException) -> str:
    """Return an error's type and text, and the line that raised it."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _instead(change: str) -> str:
    if "random" in change:
        return "use a generator of its own"
    return "use absolute paths" if "directory" in change else "put back what it finds"


def _fault(hook: str, answer: Any) -> str | None:
    """Describe an answer that its hook does not allow; None for one that it does."""
    if answer is None:
        return None
    if hook in ("check_plan", "check_gate"):
        return _unless_all(answer, (Problem,), "a list of Problem")
    if hook == "load_records":
        from posttrain.data.records import Conversation, Feedback, Preference, Question, Text

        return _unless_all(answer, (Conversation, Text, Preference, Feedback, Question), "a list of records")
    if hook in ("evaluate_artifact", "judge_artifact"):
        from posttrain.gate.spec import Scorecard, Verdict

        wanted = Scorecard if hook == "evaluate_artifact" else Verdict
        return None if isinstance(answer, wanted) else f"{answer!r:.80}, not a {wanted.__name__}"
    if hook == "run_started":
        return None if any(implementations(answer)) else f"{answer!r:.80}, which has no hooks"
    if hook == TRAINING:
        return None if answer is True else f"{answer!r:.80}, not True"
    if hook in COLLECTING:
        return None if isinstance(answer, list) else f"{answer!r:.80}, not a list"
    return f"{answer!r:.80}, although this hook has no answer"


def _is_row(row: object) -> bool:
    """Return True for the number of a line with a mapping or a text."""
    if not isinstance(row, tuple) or len(row) != 2:
        return False
    return isinstance(row[0], int) and not isinstance(row[0], bool) and isinstance(row[1], Mapping | str)


def _unless_all(answer: Any, kinds: tuple[type, ...], wanted: str) -> str | None:
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return f"{answer!r:.80}, not {wanted}"
    strange = next((item for item in answer if not isinstance(item, kinds)), None)
    return None if strange is None else f"{strange!r:.80} among others, not {wanted}"
