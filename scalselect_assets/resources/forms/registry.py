"""Every form of shard that is read. A new one is a module beside this one and a line here."""

from scalselect_assets.resources.forms.form import Form
from scalselect_assets.resources.forms.tables import ARROW, PARQUET
from scalselect_assets.resources.forms.tar import TAR
from scalselect_assets.resources.forms.text import GZIP, PLAIN, ZSTD

FORMS: tuple[Form, ...] = (PLAIN, GZIP, ZSTD, PARQUET, ARROW, TAR)
SHARD_SUFFIXES: tuple[str, ...] = tuple(suffix for form in FORMS for suffix in form.suffixes)
_FORM_OF = {suffix: form for form in FORMS for suffix in form.suffixes}


def form_of(name: str) -> Form | None:
    """The form of a shard by its file's name; None for a file that is no shard."""
    lower = name.lower()
    return next((form for suffix, form in _FORM_OF.items() if lower.endswith(suffix)), None)
