"""The resources of this deployment: the one place where a repository that runs the product configures them.

The classes live in `scalselect_assets.resources`, so that the installed package brings no top-level module
of a name that other Dagster projects use, too. `definitions.py` passes ``RESOURCES`` to the assets.
"""

from typing import Any, Final

from scalselect_assets.deployment import default_resources

RESOURCES: Final[dict[str, Any]] = default_resources()
"""By the names under which assets ask for them: ``storage``, ``vlm`` and ``progress``."""
