"""A command that takes dataclasses is, for Typer, a command with an option for each field."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer
from typer.testing import CliRunner

from scalselect_assets.cli.option_groups import grouped_options


@dataclass(frozen=True, slots=True)
class Paint:
    PANEL: ClassVar = "How it is painted"

    colour: Annotated[str | None, typer.Option(help="A colour's name.")] = None
    layer: Annotated[list[int] | None, typer.Option("--coat", help="One of the layers.")] = None


@grouped_options
def paint(
    wall: Annotated[str, typer.Argument()],
    paint: Paint,
    *,
    dry: Annotated[bool, typer.Option("--dry")] = False,
) -> None:
    typer.echo(f"{wall} {paint.colour} {paint.layer} {dry}")


def output_of(*arguments: str) -> str:
    app = typer.Typer(add_completion=False)
    app.command()(paint)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_options_of_a_group_arrive_in_its_dataclass() -> None:
    assert output_of("north", "--colour", "red", "--coat", "1", "--coat", "2", "--dry") == (
        "north red [1, 2] True\n"
    )


def test_options_that_are_left_out_have_the_defaults_of_the_dataclass() -> None:
    assert output_of("north") == "north None None False\n"


def test_the_help_lists_a_group_under_its_title() -> None:
    text = output_of("--help")
    _, panel = text.split("How it is painted")
    assert "--colour" in panel
    assert "--coat" in panel
    assert "--dry" not in panel
