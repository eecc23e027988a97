"""The Dagster code location of an installed package: every declared selection with the default resources.

`scalselect ui` opens it, and so does ``dagster dev -m scalselect_assets.code_location`` in any folder. A
repository that configures its own resources has a `definitions.py` instead, like the repository of this
project.
"""

import dagster as dg

from scalselect_assets.deployment import build_defs, declared_selections

defs: dg.Definitions = build_defs(declared_selections())
