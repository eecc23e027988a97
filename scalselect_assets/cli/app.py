"""The `scalselect` command: the list of its subcommands.

What a run computes, Dagster computes. The modules beside this one turn options into a declared selection
(`options`), open the store's Dagster instance and run (`run`), read a store (`look`), manage one (`store`),
and print what came out (`printing`). Exit codes: 0 done, 1 failed, 2 wrong usage.
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


@app.callback()
def scalselect(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            callback=lambda wanted: print_version(wanted=wanted),
        ),
    ] = False,
) -> None:
    """Choose what a vision-language model is fine-tuned on."""


def print_version(*, wanted: bool) -> None:
    """Print the installed version and exit, where it was asked for."""
    if wanted:
        typer.echo(f"scalselect-dagster {version('scalselect-dagster')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the ``scalselect`` command."""
    # LanceDB warns of every table that does not exist before it is written for the first time.
    os.environ.setdefault("LANCEDB_LOG", "error")
    app()
