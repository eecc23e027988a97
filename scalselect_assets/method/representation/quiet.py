"""Keep Transformers from warning about things that are intended."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers(*, keep_bars: bool = False) -> Iterator[None]:
    """Hide warnings and progress bars; `keep_bars` keeps the bars, which show downloads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not keep_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
