"""The `scalselect` command: the list of its subcommands.

Dagster does the computing. The modules beside this one declare the options (`options`, `option_groups`,
`run_options`), open the store's Dagster instance and run (`run`), read a store (`look`), manage a store
(`store`) and print results (`printing`). Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from scalselect_assets.cli.agree import agree
from scalselect_assets.cli.look import explain, status, verify
from scalselect_assets.cli.run import demo, run
from scalselect_assets.cli.store import clean, split, ui

app = typer.Typer(
    name="scalselect",
    help="Choose what a vision-language model is fine-tuned on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, demo, status, explain, agree, verify, clean, split, ui):
    app.command()(command)


def print_version(wanted: bool) -> None:
    """Print the version of the installed package and exit, if ``--version`` was given."""
    if wanted:
        typer.echo(f"scalselect-dagster {version('scalselect-dagster')}")
        raise typer.Exit


@app.callback()
def scalselect(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version),
    ] = False,
) -> None:
    """Choose what a vision-language model is fine-tuned on."""


def main() -> None:
    """Entry point of the ``scalselect`` command."""
    # Before a table is written for the first time, LanceDB would warn that it does not exist.
    os.environ.setdefault("LANCEDB_LOG", "error")
    app()
