"""The Dagster code location: every declared selection, built by one function.

Selections are declared in YAML (`scalselect_assets.declaration.selection`), by default one in each store
under `./.scalselect`, where `scalselect run` writes it; SCALSELECT_SELECTIONS names other files or folders.
The table in `scalselect_assets/__init__.py` shows the path of assets that each selection becomes.
"""

import dagster as dg

from resources import RESOURCES
from scalselect_assets.deployment import build_defs, declared_selections

defs: dg.Definitions = build_defs(declared_selections(), RESOURCES)
