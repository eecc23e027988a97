"""Output of the command line: summaries, progress and errors."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import dagster as dg
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.text import Text

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.refresh import RefreshReport
from scalselect_assets.resources.pool_listing import in_words
from scalselect_assets.resources.progress import Log
from scalselect_assets.resources.shard_reader import ShardFormatError
from scalselect_assets.resources.shown_text import json_shown, shown

T = TypeVar("T")
OUT, ERR = Console(), Console(stderr=True)


def say(text: str, *, style: str = "") -> None:
    """Print a line of text as it is: no markup, no emoji code and no escape sequence in it acts."""
    OUT.print(Text(shown(text), style=style), soft_wrap=True)


def complain(text: str, *, label: str = "") -> None:
    """Print a problem on the standard error: its label in red, or all of it where it has none."""
    line = Text(label, style="red") if label else Text()
    line.append(f"{' ' if label else ''}{shown(text)}", style="" if label else "red")
    ERR.print(line, soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    sys.stdout.write(json_shown(json.dumps(value, ensure_ascii=False)) + "\n")


def described_budget(selection: Selection) -> str:
    """The budget in words: a number, with its unit unless that is rows."""
    budget = selection.declared_budget
    return str(budget.amount) if budget.unit == "rows" else f"{budget.amount} {budget.unit.replace('_', ' ')}"


def print_summary(selection: Selection, result: Mapping[str, Any]) -> None:
    """Print the last result: counts, rank, and where the files are."""
    rejected = result["rejected"]
    for label, value in (
        ("rows in", f"{result['rows']:,}"),
        ("embedded", f"{result['embedded']:,}"),
        ("rejected", f"{sum(rejected.values()):,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in rejected.items()),
        *([("not read", there)] if (there := in_words(result["passed_over"])) else []),
        *(
            [("not in the pool", f"{len(unknown):,} listed: {', '.join(unknown[:5])}")]
            if (unknown := result["unknown_listed"])
            else []
        ),
        ("rank k", f"{result['rank']} ({result['energy']:.1%} of the energy)"),
        *(
            [("basis moved", f"{moved['score_change']:.2g} (bound on the mean change of a score)")]
            if (moved := result["basis_drift"])
            else []
        ),
        ("selected", f"{result['selected']:,} ({selection.strategy}, budget {described_budget(selection)})"),
        *([("advice", result["advice"])] if "advice" in result else []),
        ("subset", result["selected_subset"]),
        ("dataset", result["training_dataset"]),
        *((name.replace("_", " ", 1), place) for name, place in result.items() if name.startswith("export_")),
        *([("report", result["report"])] if "report" in result else []),
        ("lineage", result["manifest"]),
    ):
        say(f"{label:<24}{value}")


def print_work(report: RefreshReport) -> None:
    """Print the work of a refresh, or that there was nothing to do."""
    if report.unsettled:
        say(
            f"Still being written, and left unchanged: {', '.join(report.unsettled[:20])}; "
            "run again when they are complete."
        )
    if not report.runs and not report.failed:
        say(
            "Nothing to do: everything else is up to date."
            if report.unsettled
            else "Nothing to do: everything is up to date."
        )
        return
    say(
        f"{len(report.embedded)} shards embedded ({report.computed_rows:,} samples computed, "
        f"{report.reused_rows:,} taken over), {len(report.added)} new, {len(report.removed)} removed, "
        f"{len(report.runs)} Dagster runs."
    )


class ProgressBars:
    """Progress of the embedding on the terminal: rows, shards, rows per second, time left."""

    def __init__(self) -> None:
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=ERR,
            transient=True,
            disable=not ERR.is_terminal,
        )
        self._shards: TaskID | None = None
        self._rows: TaskID | None = None

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Set the totals."""
        if n_shards:
            self._shards = self._bars.add_task("shards", total=n_shards, rate="")
            self._rows = self._bars.add_task("samples", total=n_rows, rate="")

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: Log) -> Iterator[T]:  # noqa: ARG002
        """Pass ``rows`` through and move the bars."""
        for row in rows:
            yield row
            if self._rows is not None:
                self._bars.advance(self._rows)
                speed = self._bars.tasks[self._rows].speed
                self._bars.update(self._rows, rate=f"{speed:.1f}/s" if speed else "")
        if self._shards is not None:
            self._bars.advance(self._shards)


@contextmanager
def user_errors(*, verbose: bool) -> Iterator[None]:
    """Turn a failure into one message and exit code 1; with --verbose show the traceback."""
    logging.getLogger("scalselect").setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        yield
    except typer.Exit:
        raise
    except typer.BadParameter as error:
        raise typer.BadParameter(shown(error.message)) from error
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        ERR.print(Text("Interrupted; what was computed is kept, and the next run goes on from there."))
        raise typer.Exit(1) from None
    except Exception as error:
        if verbose:
            raise
        explained = isinstance(error, (OSError, RuntimeError, ShardFormatError, ValueError))
        message = str(error) if explained else f"{type(error).__name__}: {error}"
        complain(message, label="error:")
        raise typer.Exit(1) from error
