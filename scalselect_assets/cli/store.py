"""`scalselect clean`, `split` and `ui`."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from scalselect_assets import deployment
from scalselect_assets.cli.options import JsonOption, VerboseOption, declaration_path
from scalselect_assets.cli.printing import ERR, print_json, say, user_errors
from scalselect_assets.declaration.selection_file import read_selection
from scalselect_assets.operations.cleaning import clean as clean_store
from scalselect_assets.operations.leftovers import DEFAULT_RETENTION_DAYS
from scalselect_assets.resources.shard_reader import split_shard
from scalselect_assets.resources.storage import StorageResource


def clean(
    store: Annotated[str, typer.Option(help="The store to clean.")],
    retention_days: Annotated[
        float, typer.Option(min=0, help="Days that a file must have been unused.")
    ] = DEFAULT_RETENTION_DAYS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove unused files: leftovers, old versions, shards that left the pool, tables of other models.

    Removed shards and tables of other models are deleted only when a second cleaning also finds them unused.
    """
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        with deployment.opened_instance(selection) as instance:
            report = clean_store(
                selection,
                StorageResource(),
                instance,
                retention=timedelta(days=retention_days),
                dry_run=dry_run,
            )
        if as_json:
            print_json(report.to_json())
            return
        verb = "would be removed" if dry_run else "removed"
        for verdict, groups in ((verb, report.removed_by_kind()), ("kept", report.kept_by_reason())):
            for group in groups:
                files = f"{group['count']:,} {group['kind'].replace('_', ' ')}, {group['bytes']:,} bytes"
                say(f"{verdict:<24}{files}: {group['why']}")
        say(f"{report.bytes_freed:,} bytes {'would be ' if dry_run else ''}freed.")


def split(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A JSON array or JSON Lines file.", exists=True, dir_okay=False),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows in each shard.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    verbose: VerboseOption = False,
) -> None:
    """Split one large file into shards, row by row, without loading it whole."""
    with user_errors(verbose=verbose):
        from upath import UPath

        if out.resolve() == file.parent.resolve():
            raise typer.BadParameter(
                f"--out {out} is the file's own folder, where its rows would count twice; name another one"
            )
        result = split_shard(UPath(file.absolute()), rows, out)
        say(f"{result.n_rows:,} rows in {len(result.files)} shards in {out}")
        say(f"Image paths are relative to the file that they were in: run with --image-root {file.parent}")


def ui(
    store: Annotated[str, typer.Option(help="The store to open.")],
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 3000,
    host: Annotated[str, typer.Option(help="Interface; the UI has no login.")] = "127.0.0.1",
    verbose: VerboseOption = False,
) -> None:
    """Open the Dagster UI on a store: its graph, runs, lineage and checks."""
    with user_errors(verbose=verbose):
        declaration = declaration_path(store)
        selection = read_selection(declaration)
        deployment.open_instance(selection).dispose()
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(deployment.instance_folder(selection)),
            deployment.SELECTIONS_VARIABLE: str(declaration.absolute()),
        }
        environment.setdefault(deployment.TICK_SETTLE_VARIABLE, "0.1")
        ERR.print(Text(f"Dagster UI: http://{host}:{port} (stop with Ctrl-C)"))
        # Keeps Python from importing a `scalselect_assets` that the current folder may have.
        environment["PYTHONSAFEPATH"] = "1"
        command = [sys.executable, "-m", "dagster", "dev", "-m", "scalselect_assets.code_location"]
        # Dagster takes the place of this process, so that a signal reaches it and it stops its own processes.
        os.execve(sys.executable, [*command, "-h", host, "-p", str(port)], environment)  # noqa: S606
