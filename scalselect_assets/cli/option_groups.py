"""Options in groups: a command takes dataclasses, and Typer sees an option for each of their fields."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, cast, get_args, get_type_hints


def grouped_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each of its dataclass parameters replaced by the fields of that dataclass.

    A group is a dataclass whose fields are annotated as options of Typer. Its class attribute ``PANEL`` is
    the title under which ``--help`` lists them.
    """
    groups: dict[str, Any] = {
        name: kind for name, kind in get_type_hints(command).items() if is_dataclass(kind)
    }

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += [_option(field, groups[name].PANEL) for field in fields(groups[name])]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    # Typer reads the signature, not the function's code.
    cast("Any", flat).__signature__ = inspect.Signature(parameters)
    return flat


def _option(field: Field[Any], panel: str) -> inspect.Parameter:
    kind, option = get_args(field.type)
    option = copy(option)
    option.rich_help_panel = panel
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
    )
