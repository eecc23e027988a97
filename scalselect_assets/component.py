"""A selection as a component of Dagster, for projects that load their definitions with ``dg``.

The settings are those of `scalselect_assets.declaration.selection.Selection`, and their files have the same
form. The component brings no resources, because a deployment has one set of them: merge its definitions with
``scalselect_assets.deployment.build_defs([])``.
"""

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.graph import selection_defs


class SelectionComponent(dg.Component, dg.Resolvable, Selection):
    """Choose training samples from one pool for one target VLM."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        """The graph of this selection; see `scalselect_assets.graph`."""
        return selection_defs(self)
