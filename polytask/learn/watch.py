"""What a run shows and writes while it goes: a progress bar, a log of JSON lines, trackers, and a way to stop it."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from polytask.core.storage import writing


class Watch:
    """Shows and records the progress of a run.

    Args:
        total: steps of the whole run.
        done: steps that an earlier, interrupted run took.
        folder: where ``log.jsonl`` goes; no log when None.
        show: draw a progress bar on standard error.
        title: of the bar.
        tracker: an object with ``log(values, step=)``, such as an ``Accelerator`` with trackers.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        folder: Path | None = None,
        show: bool = False,
        title: str = "",
        tracker: Any = None,
    ) -> None:
        self.total, self.folder, self.tracker = total, folder, tracker
        self.started = self._last = time.perf_counter()
        self.examples = 0
        self._bar: Any = None
        self._log: Any = None
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._log = open(folder / "log.jsonl", "a" if done else "w", encoding="utf-8")  # noqa: SIM115
        if show and sys.stderr.isatty():
            self._start_bar(title, done)

    def _start_bar(self, title: str, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(title, total=self.total, completed=done, figures="")
        self._figures = {"loss": "", "dev": ""}

    def step(self, step: int, loss: float, examples: int, **more: float) -> None:
        """After an optimiser step."""
        self.examples += examples
        rate = self.examples / max(time.perf_counter() - self.started, 1e-9)
        self.record({"step": step, "loss": loss, **more, "examples_per_second": round(rate, 1)})
        if self._bar is not None:
            self._figures["loss"] = f"loss {loss:.3f}"
            self._bar.update(self._task, completed=step, figures=f"{self._text()} {rate:.0f} ex/s")

    def evaluated(self, step: int, name: str, values: dict[str, float]) -> None:
        """After an evaluation on dev."""
        self.record({"step": step, "adapter": name, **{f"dev/{task}": value for task, value in values.items()}})
        if self._bar is not None and values:
            self._figures["dev"] = f"dev {sum(values.values()) / len(values):.3f}"

    def record(self, values: dict[str, Any]) -> None:
        """One line of the log, and the trackers' figures."""
        if self._log is not None:
            with writing(self.folder or Path()):
                self._log.write(json.dumps(values) + "\n")
                self._log.flush()
        if self.tracker is not None:
            step = values.get("step", 0)
            self.tracker.log({k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}, step=step)

    def close(self) -> None:
        """Ends the bar and the log."""
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            with suppress(OSError):  # every line was flushed when it was written, and told if it could not be
                self._log.close()

    def _text(self) -> str:
        return " ".join(v for v in self._figures.values() if v)


class Stop:
    """Whether somebody asked the run to stop (Ctrl-C, or a termination signal)."""

    asked = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """The first Ctrl-C (or SIGTERM) lets the step end and the run be saved; the second interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals can only be handled in the main thread
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("stopping after this step (once more to stop at once)", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
