"""The Dagster code location of an installed package: every declared selection with the default resources.

`scalselect ui` opens it, and ``dagster dev -m scalselect_assets.code_location`` does from anywhere. A
repository that configures resources of its own has a `definitions.py` instead, as this project's has.
"""

import dagster as dg

from scalselect_assets.deployment import build_defs, declared_selections

defs: dg.Definitions = build_defs(declared_selections())
