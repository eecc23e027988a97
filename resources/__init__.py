"""The resources of this deployment: the one place where a repository that runs the product configures them.

The classes are in `scalselect_assets.resources`, because the installed package must not bring a top-level
`resources`, a name that other Dagster projects also use. `definitions.py` passes ``RESOURCES`` to the assets.
"""

from typing import Any, Final

from scalselect_assets.deployment import default_resources

RESOURCES: Final[dict[str, Any]] = default_resources()
"""Resources by the names under which assets ask for them: ``storage``, ``vlm`` and ``progress``."""
