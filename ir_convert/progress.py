"""How long work tells how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Shows stages of work."""

    @contextmanager
    def stage(self, name: str, steps: int, tokens: int = 0, done: int = 0) -> Iterator[Callable[[], None]]:
        """Opens a stage of ``steps`` steps, each over ``tokens`` tokens; yields what to call after each step.

        ``done`` of them an earlier run did: they count as progress, not as speed.
        """
        ...

    def note(self, text: str) -> None:
        """Says something that is not the progress of a stage."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, steps: int, tokens: int = 0, done: int = 0) -> Iterator[Callable[[], None]]:
        yield lambda: None

    def note(self, text: str) -> None:
        pass


class Bars:
    """A bar for each stage on the terminal: layer k of n, tokens per second, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, steps: int, tokens: int = 0, done: int = 0) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=False),
            TextColumn("{task.fields[rate]:>14}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=steps, completed=done, rate="")

            def advance() -> None:
                progress.advance(task)
                elapsed = progress.tasks[0].elapsed or 0
                if tokens and elapsed:
                    rate = (progress.tasks[0].completed - done) * tokens / elapsed
                    progress.update(task, rate=f"{rate:,.0f} tokens/s")

            yield advance
