"""A progress bar of documents on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int, float], None]


@contextlib.contextmanager
def progress_bar(title: str, show: bool | None) -> Iterator[Advance]:
    """Gives a function that takes how many more documents and megabytes are done.

    Unless told the bar is shown where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda documents, megabytes: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed:,} documents"),
        TextColumn("{task.fields[megabytes]:,.1f} MB, {task.fields[rate]:.1f} MB/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, megabytes=0.0, rate=0.0)

        def advance(documents: int, megabytes: float) -> None:
            megabytes += bar.tasks[task].fields["megabytes"]
            rate = megabytes / max(bar.tasks[task].elapsed or 0.0, 1e-3)
            bar.update(task, advance=documents, megabytes=megabytes, rate=rate)

        yield advance
