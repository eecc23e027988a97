"""`scalselect agree`: how far the selections of two stores agree."""

from typing import Annotated

import typer

from scalselect_assets.cli.options import JsonOption, VerboseOption, declaration_path
from scalselect_assets.cli.printing import print_json, say, user_errors
from scalselect_assets.declaration.selection_file import read_selection
from scalselect_assets.explain.store_agreement import agreement
from scalselect_assets.resources.storage import StorageResource


def agree(
    first: Annotated[str, typer.Argument(metavar="STORE", help="A store with a result.")],
    second: Annotated[str, typer.Argument(metavar="STORE", help="Another store over the same samples.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show how far the selections of two stores agree, such as those for two target models; changes nothing.

    Samples are the same where shard name and content are the same.
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
            say(f"{label:<24}{value}")
