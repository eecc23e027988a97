"""Two stores over the same samples agree as far as their choices and scores do."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scalselect_assets.choice import selected_subset
from scalselect_assets.explain.store_agreement import SourceAgreement, agreement
from scalselect_assets.recording.columns import SELECTED_SUBSET, polars_schema
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.storage import StorageResource
from tests.choice.test_duplicate_removal import Row, different, write_store


def store(folder: Path, rows: list[Row], chosen: list[int], shard: str = "a") -> ArtifactStore:
    """A store with scores and a choice of some rows."""
    write_store(folder, {shard: rows})
    artifacts = StorageResource().artifacts(str(folder))
    keys = artifacts.read_frame("importance_scores", shard)[0]["sample_key"]
    frame = pl.DataFrame(
        {
            "shard": [shard] * len(chosen),
            "row": chosen,
            "sample_key": [keys[row] for row in chosen],
            "source": ["even" if row % 2 == 0 else "odd" for row in chosen],
        }
    )
    schema = polars_schema(SELECTED_SUBSET)
    whole = frame.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in frame.columns
    )
    artifacts.write_frame(selected_subset.NAME, whole.select(schema.names()).cast(schema), {})
    return artifacts


def test_overlap_is_counted_against_chance_and_by_source(tmp_path: Path) -> None:
    rows = different(20)
    first = store(tmp_path / "one", rows, [0, 1, 2, 3])
    second = store(tmp_path / "two", rows[:18], [2, 3, 4, 5, 6])
    found = agreement(first, second)
    assert (found.shared_samples, found.only_first, found.only_second) == (18, 2, 0)
    assert (found.first, found.second, found.both) == (4, 5, 2)
    assert found.by_chance == pytest.approx(4 * 5 / 18)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.sources == {"even": SourceAgreement(2, 3, 1), "odd": SourceAgreement(2, 2, 1)}
    told = dict(found.lines())
    assert "2, 50.0% of the smaller choice, 1.8 times as many as by chance" in told["chosen in both"]


def test_the_rank_correlation_is_that_of_the_leverages(tmp_path: Path) -> None:
    rows = different(12)
    turned = [
        Row(row.vector, 5 - row.leverage, row.question, row.image, row.content, row.row_id) for row in rows
    ]
    found = agreement(store(tmp_path / "one", rows, [0]), store(tmp_path / "two", turned, [11]))
    assert found.rank_correlation == pytest.approx(-1.0)
    assert found.both == 0
    level = [Row(row.vector, 1.0, row.question, row.image) for row in rows]
    assert (
        agreement(store(tmp_path / "one", rows, [0]), store(tmp_path / "level", level, [0])).rank_correlation
        is None
    )


def test_stores_of_different_pools_are_refused(tmp_path: Path) -> None:
    first = store(tmp_path / "one", different(5), [0])
    second = store(tmp_path / "two", different(5, seed=9), [0])
    with pytest.raises(ValueError, match="share no sample"):
        agreement(first, second)
    elsewhere = store(tmp_path / "three", different(5), [0], shard="b")
    with pytest.raises(ValueError, match="name two stores over the same pool"):
        agreement(first, elsewhere)


def test_all_numbers_can_be_written_as_json(tmp_path: Path) -> None:
    one = store(tmp_path / "one", different(5), [0, 1])
    found = agreement(one, one).to_json()
    assert found["both"] == found["first"] == 2
    assert found["sources"]["even"] == {"first": 1, "second": 1, "both": 1}
    assert np.isclose(found["by_chance"], 4 / 5)
