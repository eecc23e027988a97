"""Errors of a run: one message for the cause inside the errors that Dagster wraps around it."""


class RefreshError(RuntimeError):
    """The refresh cannot go on; the message says what to do."""


class NothingEmbeddedError(RefreshError):
    """No row of the pool could be embedded; the rows that were read are in the store, for inspection."""


def error_cause(error: BaseException) -> BaseException:
    """The exception that Dagster has wrapped: the first one of this project, or else the innermost one."""
    while error.__cause__ is not None and not _is_ours(error):
        error = error.__cause__
    return error


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith(("resources.", "scalselect_assets."))


def error_message(error: BaseException) -> str:
    """The message of the cause; an error that is not of this project is named with its type."""
    cause = error_cause(error)
    is_clear = _is_ours(cause) or isinstance(cause, ValueError)
    return str(cause) if is_clear else f"{type(cause).__name__}: {cause}"
