"""The display of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from posttrain.console import DataConsole, styled
from posttrain.errors import require_finite
from posttrain.host import activity
from posttrain.run.metrics import MetricsLog

LINE_SECONDS = 10
"""Seconds between two progress lines where there is no terminal."""
LONG_STEP_SECONDS = 5
"""Seconds after which the parts of a step are shown."""
FIGURES = {
    "loss": "loss {:.3f}",
    "eval_loss": "eval loss {:.3f}",
    "reward": "reward {:.3f}",
    "eval_reward": "eval reward {:.3f}",
    "lr": "lr {:.1e}",
    "rewards_margin": "margin {:+.3f}",
    "entropy": "entropy {:.3f}",
    "kl": "kl {:.4f}",
    "clipped": "clipped {:.2%}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.0%}",
}
"""Metrics beside the bar, with their formats."""


class Display:
    """Lines and bars of one run, on standard error: standard output holds results alone."""

    def __init__(self, console: Console | None = None, *, verbose: bool = False) -> None:
        self.console = console or DataConsole(file=sys.stderr, soft_wrap=True)
        self.verbose = verbose
        """True to show the debug lines of every library."""
        self.log: Callable[[str], None] | None = None
        """Receiver of all lines, those without a style or a bar; None outside of a run."""

    def line(self, stage: str, what: str, text: str) -> None:
        """Print one line about a stage."""
        self._print(styled((f"{stage:<8}", "bold"), f" {what:<6} {text}"))

    def tick(self, stage: str, what: str, text: str) -> None:
        """Print one line of progress; a terminal has its bar, and the line goes to the log alone."""
        if not self.console.is_terminal:
            self.line(stage, what, text)
        elif self.log is not None:
            self.log(f"{stage:<8} {what:<6} {text}")

    def announce(self, *parts: str | tuple[str, str]) -> None:
        """Print one line about the run, its parts alone or with a style."""
        self._print(styled(*parts))

    def _print(self, text: Text) -> None:
        self.console.print(text)
        if self.log is not None:
            self.log(text.plain)

    def bar(self) -> Progress:
        """Return a bar, drawn on a terminal only and removed at its end."""
        return Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False), TimeRemainingColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
            redirect_stdout=False, redirect_stderr=False,  # it would obey the colours and links in what others print
        )  # fmt: skip


class Ticker:
    """One bar, or its lines where there is no terminal."""

    def __init__(self, display: Display, stage: str, what: str) -> None:
        self._display, self._stage, self._what = display, stage, what
        self._bar = display.bar()
        self._task: TaskID | None = None
        self._printed = time.monotonic()
        self._started = self._advanced = self._printed
        self._first = 0

    def start(self, total: int, done: int = 0) -> None:
        """Begin at ``done`` of ``total``."""
        self._started, self._first = time.monotonic(), done
        self._bar.start()
        self._task = self._bar.add_task(f"{self._stage:<8} {self._what:<6}", total=total, completed=done, figures="")

    def advance(self, done: int, total: int, figures: str) -> None:
        """Show ``done`` of ``total``."""
        if self._task is None:
            self.start(total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, figures=figures)
        now = self._advanced = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            pace = (now - self._started) / max(done - self._first, 1)
            left = _clock(pace * (total - done))
            self._display.tick(self._stage, self._what, f"{done}/{total}  {figures}  {left} left")

    def begin_part(self, done: int, total: int, part: str) -> None:
        """Show ``part`` of the work after ``done`` of ``total``."""
        now = time.monotonic()
        if now - self._advanced < LONG_STEP_SECONDS:  # the figures of the last step say more
            return
        if self._task is not None:
            self._bar.update(self._task, figures=part)
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            self._display.tick(self._stage, self._what, f"{done}/{total}  {part}" if total else part)

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        self._display.line(self._stage, self._what, text)

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class TrainingProgress:
    """Progress of one training stage: shown, appended to metrics.jsonl, sent to ``step_logged``."""

    def __init__(self, display: Display, stage: str, metrics: Path, host: Any) -> None:
        self._ticker = Ticker(display, stage, "train")
        self._stage, self._host = stage, host
        self._log = MetricsLog(metrics, stage)
        self._total = 0
        self._done = 0
        self._tokens = 0
        self._flops = 0.0
        self._device_flops: float | None = None
        self._started = time.monotonic()

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Begin, or resume from a checkpoint: lines logged after it are dropped."""
        activity.sign_of_life()
        self._total, self._done, self._device_flops = total_steps, done_steps, device_flops
        self._started, self._tokens, self._flops = time.monotonic(), 0, 0.0
        self._log.rewind(done_steps)
        if done_steps:
            self.note(f"resume after step {done_steps} of {total_steps}")
        self._ticker.start(total_steps, done_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step. Raises Diverged when its loss is not finite."""
        activity.sign_of_life()
        require_finite(step, f"loss of {self._stage}", metrics.get("loss", 0.0))
        metrics = self._timed(metrics)
        self._log.append(step, metrics)
        self._host.hook.step_logged(stage=self._stage, step=step, metrics=metrics)
        figures = [text.format(metrics[key]) for key, text in FIGURES.items() if key in metrics]
        self._done = step
        self._ticker.advance(step, self._total, "  ".join(figures))

    def _timed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return ``metrics`` with the speed since the start: tokens a second, and the share of the devices' rate."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._tokens += int(metrics.get("tokens", 0))
        self._flops += metrics.get("model_flops", 0)
        found = {**metrics, "tokens_per_second": round(self._tokens / seconds, 1)}
        if self._device_flops and self._flops:
            found["mfu"] = round(self._flops / seconds / self._device_flops, 4)
        return found

    def part(self, done: int, total: int, what: str) -> None:
        """Show ``done`` of ``total`` parts of the step in work."""
        activity.sign_of_life()
        step = f"step {self._done + 1}: " if self._total else ""  # a stage may have work before its first step
        self._ticker.begin_part(self._done, self._total, f"{step}{what} {done}/{total}")

    def note(self, text: str) -> None:
        """Show one line."""
        activity.sign_of_life()
        self._ticker.note(text)

    def stop(self) -> None:
        """Remove the bar."""
        self._ticker.stop()


class EvaluationProgress:
    """Progress of one gate."""

    def __init__(self, display: Display, stage: str) -> None:
        self._display, self._stage = display, stage
        self._ticker: Ticker | None = None
        self._current: tuple[str, str] | None = None

    def advance(self, system: str, task: str, done: int, total: int, tokens: int = 0) -> None:
        """Show ``done`` of ``total`` documents of a task, scored for one system, and the tokens for the next ones."""
        activity.sign_of_life()
        if (system, task) != self._current:
            self.stop()
            self._current, self._ticker = (system, task), Ticker(self._display, self._stage, "gate")
            self._ticker.start(total)
        assert self._ticker is not None
        if tokens:
            self._ticker.begin_part(done, total, f"{task} {system}  {tokens:,} tokens")
        else:
            self._ticker.advance(done, total, f"{task} {system}")

    def note(self, text: str) -> None:
        """Show one line."""
        activity.sign_of_life()
        self._display.line(self._stage, "gate", text)

    def stop(self) -> None:
        """Remove the bar."""
        if self._ticker is not None:
            self._ticker.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
