"""`scalselect agree`: how far the selections of two stores agree."""

from typing import Annotated

import typer
from rich.markup import escape

from scalselect_assets.cli.options import JsonOption, VerboseOption, declaration_path
from scalselect_assets.cli.printing import OUT, PLAIN, print_json, user_errors
from scalselect_assets.declaration.selection import read_selection
from scalselect_assets.explain.store_agreement import agreement
from scalselect_assets.resources.storage import StorageResource


def agree(
    first: Annotated[str, typer.Argument(metavar="STORE", help="A store with a result.")],
    second: Annotated[str, typer.Argument(metavar="STORE", help="Another store over the same samples.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say how far the selections of two stores agree, for two target models say; changes nothing.

    Samples are the same where shard name and content are.
    """
    with user_errors(verbose=verbose):
        storage = StorageResource()
        stores = [
            storage.artifacts(read_selection(declaration_path(store)).store) for store in (first, second)
        ]
        found = agreement(*stores)
        if as_json:
            print_json(found.to_json())
            return
        for label, value in found.lines():
            OUT.print(f"{label:<24}{escape(value)}", **PLAIN)
