"""What a shard's receipt refers to is read only where it is of the same version."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from upath import UPath

from scalselect_assets.embedding.receipts import REJECTED, read_rejected
from scalselect_assets.recording.columns import REJECTED_ROWS, polars_schema
from scalselect_assets.resources.artifacts import ArtifactStore


def test_rejected_rows_of_another_version_than_the_vectors_are_refused(tmp_path: Path) -> None:
    """A process may have been killed between writing them and the receipt."""
    artifacts = ArtifactStore(UPath(tmp_path))
    rows = pl.DataFrame(schema=polars_schema(REJECTED_ROWS))
    artifacts.write_frame(REJECTED, rows, {"data_version": "new", "provenance": "p"}, "a.jsonl")

    assert read_rejected(artifacts, "a.jsonl", "new").equals(rows)
    with pytest.raises(dg.Failure, match=r"rejected_rows\[a\.jsonl\] is of version new, its vectors of old"):
        read_rejected(artifacts, "a.jsonl", "old")
