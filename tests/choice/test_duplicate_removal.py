"""Samples that repeat a better one are listed with it, exact copies and near ones, over shards; no others."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from scalselect_assets.choice import removed_samples
from scalselect_assets.declaration.curation import NearDuplicates
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.method.subspace.basis import principal_axes
from scalselect_assets.method.subspace.moments import MomentsAccumulator
from scalselect_assets.recording.columns import IMPORTANCE_SCORES, polars_schema
from scalselect_assets.resources.samples import content_key, occurrence_key, parse_row
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores, subspace_basis
from tests.conftest import sharegpt_row
from tests.headers import basis_header, moments_header

D = 16
FINGERPRINT = "f" * 32
DEFAULTS = NearDuplicates(cosine=0.995)


@dataclass(frozen=True)
class Row:
    """An embedded sample, as the assets before this one leave it."""

    vector: NDArray[np.float32]
    leverage: float
    question: str
    image: str
    content: str | None = None
    """What the image file holds; its name, where nothing is said."""
    row_id: str | None = None

    @property
    def text(self) -> str:
        return json.dumps(sharegpt_row(self.image, f"<image>\n{self.question}", id=self.row_id))


def different(n: int, seed: int = 1) -> list[Row]:
    """Samples far from each other, the first with the highest leverage."""
    vectors = np.random.default_rng(seed).normal(5, 1, (n, D)).astype(np.float32)
    return [
        Row(vector, 2 - index / n, f"What is {seed}.{index}?", f"{seed}-{index}.png")
        for index, vector in enumerate(vectors)
    ]


def moved(row: Row, by: float, **more: Any) -> Row:
    """A sample of its own whose vector is a little off."""
    off = np.random.default_rng(99).normal(size=D).astype(np.float32)
    return replace(row, vector=row.vector + by * off, question=f"{row.question} Really?", **more)


def write_store(folder: Path, shards: Mapping[str, Sequence[Row]]) -> None:
    """Vectors, basis and scores of a pool in the store ``folder``."""
    storage, store = StorageResource(), str(folder)
    artifacts, tables = storage.artifacts(store), storage.embeddings(store)
    moments, in_basis = MomentsAccumulator(D), {}
    keys: dict[str, list[str]] = {}
    for shard, rows in shards.items():
        keys[shard] = _keys(rows)
        vectors = np.array([row.vector for row in rows], np.float32).reshape(-1, D)
        table = tables.replace(
            FINGERPRINT,
            shard,
            dimension=D,
            rows=range(len(rows)),
            sample_keys=keys[shard],
            source_ids=[row.row_id for row in rows],
            vectors=vectors,
            attributes={
                "text": pa.array([row.text for row in rows], pa.string()),
                "image_sha256": pa.array(
                    [[hashlib.sha256((row.content or row.image).encode()).hexdigest()] for row in rows],
                    pa.list_(pa.string()),
                ),
            },
        )
        version = table.content_sha256[:32]
        header = {"data_version": version, "provenance": "p", "raw_samples": "r", "raw_rows": "9"}
        receipt = {"table": table.to_json(), "header": {**header, "container": "lines"}}
        artifacts.write_json(receipts.NAME, receipt, shard)
        in_basis[shard] = moments_header(version, rows=len(rows))
        moments.add(vectors)
    subspace = principal_axes(moments.moments()).subspace(4)
    artifacts.write_arrays(
        subspace_basis.NAME, subspace.to_arrays(), basis_header("basis-1", in_basis).to_header()
    )
    for shard, rows in shards.items():
        leverage = [row.leverage for row in rows]
        frame = pl.DataFrame(
            {
                "row": range(len(rows)),
                "sample_key": keys[shard],
                "source_id": [row.row_id for row in rows],
                "leverage": leverage,
                "normalised_leverage": leverage,
            },
            schema=polars_schema(IMPORTANCE_SCORES),
        )
        artifacts.write_frame(importance_scores.NAME, frame, {"subspace_basis": "basis-1"}, shard)


def _keys(rows: Sequence[Row]) -> list[str]:
    keys: list[str] = []
    for row in rows:
        sample = parse_row(row.text).sample
        assert sample is not None
        base = content_key(sample, sample.images)
        keys.append(occurrence_key(base, sum(key == base for key in keys)))
    return keys


def materialized(
    folder: Path, settings: NearDuplicates | None = DEFAULTS
) -> tuple[pl.DataFrame, dict[str, Any], dict[str, str]]:
    selection = Selection(
        name="pool", source="/pool", store=str(folder), target_model="m", near_duplicates=settings
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [removed_samples.build(selection)], instance=instance, resources={"storage": StorageResource()}
        )
        made = result.asset_materializations_for_node("pool__removed_samples")[0]
        assert all(check.passed for check in result.get_asset_check_evaluations())
    frame, header = StorageResource().artifacts(selection.store).read_frame(removed_samples.NAME)
    return frame, {name: value.value for name, value in made.metadata.items()}, header


def removals(frame: pl.DataFrame) -> list[tuple[Any, ...]]:
    columns = ("shard", "row", "reason", "partner_shard", "partner_row")
    return list(frame.select(columns).iter_rows())


def test_a_pool_of_different_samples_loses_none(tmp_path: Path) -> None:
    write_store(tmp_path, {"a": different(40), "b": different(40, seed=2)})
    frame, told, _ = materialized(tmp_path)
    assert frame.is_empty()
    assert frame.schema == polars_schema(removed_samples.REMOVED_SAMPLES)
    assert (frame.height, told["embedded"], told["search"], told["recall"]) == (0, 80, "exact", 1.0)


def test_an_exact_copy_is_found_whatever_its_name_its_id_and_its_shard(tmp_path: Path) -> None:
    rows = different(20)
    copy = replace(rows[3], image="copies/x.png", content=rows[3].image, row_id="again", leverage=0.1)
    repeat = replace(rows[3], leverage=0.1)
    write_store(tmp_path, {"a": [*rows, copy], "b": [*different(5, seed=2), repeat]})
    frame, told, _ = materialized(tmp_path)
    assert removals(frame) == [
        ("a", 20, "exact_duplicate", "a", 3),
        ("b", 5, "exact_duplicate", "a", 3),
    ]
    assert frame["cosine"].is_null().all()
    assert frame["sample_key"][1] == frame["partner_key"][1]
    assert told["removed_by_reason"] == {"exact_duplicate": 2}
    assert told["largest_groups"][0]["removed"] == 2


def test_the_same_name_of_another_picture_is_no_copy(tmp_path: Path) -> None:
    rows = different(20)
    other = replace(different(1, seed=7)[0], question=rows[3].question, image=rows[3].image, content="new")
    write_store(tmp_path, {"a": rows, "b": [other]})
    assert materialized(tmp_path)[0].is_empty()


def test_the_better_of_two_near_samples_stays_wherever_it_stands(tmp_path: Path) -> None:
    rows = different(20)
    write_store(tmp_path, {"a": [*rows, moved(rows[3], 0.01, leverage=9.0)], "b": [moved(rows[5], 0.01)]})
    frame, _, _ = materialized(tmp_path)
    # Of equal leverage, the smaller key stays.
    a5, b0 = (frame.filter(shard=shard, row=row).height for shard, row in (("a", 5), ("b", 0)))
    assert a5 + b0 == 1
    assert removals(frame.filter(row=3)) == [("a", 3, "near_duplicate", "a", 20)]
    kept, gone = frame.filter(partner_row=20)["partner_key"][0], frame.filter(row=3)["sample_key"][0]
    assert kept != gone
    tie = frame.filter(pl.col("row") != 3).row(0, named=True)
    assert tie["partner_key"] < tie["sample_key"]
    assert frame["cosine"].is_between(0.995, 1).all()


def test_the_threshold_is_a_setting(tmp_path: Path) -> None:
    rows = different(20)
    near = moved(rows[0], 0.01, leverage=0, image="near.png")
    farther = moved(rows[1], 0.2, leverage=0, image="farther.png")
    write_store(tmp_path, {"a": [*rows, near, farther]})

    def removed(cosine: float) -> list[int]:
        return materialized(tmp_path, NearDuplicates(cosine=cosine))[0]["row"].to_list()

    assert removed(1.0) == []
    assert removed(0.995) == [20]
    assert removed(0.9) == [20, 21]


def test_copies_of_a_sample_that_goes_go_for_the_same_partner(tmp_path: Path) -> None:
    rows = different(20)
    best = moved(rows[4], 0.01, leverage=9.0)
    write_store(tmp_path, {"a": [*rows, best], "b": [replace(rows[4], leverage=0.5)]})
    frame, _, _ = materialized(tmp_path)
    assert removals(frame) == [
        ("a", 4, "near_duplicate", "a", 20),
        ("b", 0, "near_duplicate", "a", 20),
    ]
    assert frame["cosine"].n_unique() == 1


def about(row: Row, question: str, by: float = 0.0) -> Row:
    """Another question about the picture of a row."""
    return replace(moved(row, by), question=question, leverage=0.1)


def test_different_questions_about_one_picture_stay_unless_asked_for(tmp_path: Path) -> None:
    rows = different(20)
    others = [about(rows[3], "Which colour is the roof?"), about(rows[3], "How many people are there?")]
    write_store(tmp_path, {"a": rows, "b": others})
    frame, told, _ = materialized(tmp_path)
    assert frame.is_empty()
    assert (told["kept_for_their_text"], told["pairs_sharing_pictures"]) == (2, 0)
    by_vector, told, _ = materialized(tmp_path, NearDuplicates(cosine=0.995, text_likeness=0))
    assert removals(by_vector) == [
        ("b", 0, "near_duplicate", "a", 3),
        ("b", 1, "near_duplicate", "a", 3),
    ]
    assert told["pairs_sharing_pictures"] == told["pairs_sharing_pictures_not_question"] == 2
    assert (by_vector["question_likeness"] < 0.9).all()


def test_the_same_question_about_one_picture_goes_whatever_its_vector(tmp_path: Path) -> None:
    rows = different(20)
    again = about(rows[3], f"{rows[3].question.upper()}  Really?", by=5.0)
    write_store(tmp_path, {"a": rows, "b": [again]})
    frame, told, _ = materialized(tmp_path)
    assert removals(frame) == [("b", 0, "near_duplicate", "a", 3)]
    assert frame["cosine"][0] < 0.995
    assert frame.select("same_pictures", "question_likeness", "text_likeness").row(0) == (True, 1.0, 1.0)
    assert (told["near_pairs"], told["pairs_sharing_pictures_not_question"]) == (1, 0)


def test_the_threshold_can_come_from_the_pool(tmp_path: Path) -> None:
    write_store(tmp_path, planted_pool())
    suggested, told, _ = materialized(tmp_path, NearDuplicates())
    assert told["cosine"] == told["suggested_cosine"] > told["innocent_cosine_90"]
    by_number, again, _ = materialized(tmp_path, NearDuplicates(cosine=told["cosine"]))
    assert by_number.equals(suggested)
    assert again["suggested_cosine"] == told["suggested_cosine"]
    assert suggested.height > 50


def planted_pool() -> dict[str, list[Row]]:
    rows = different(120)
    rng = np.random.default_rng(3)
    near = [moved(rows[i], float(rng.uniform(0, 0.3)), leverage=float(rng.uniform(0, 2))) for i in range(60)]
    exact = [replace(rows[i], leverage=float(rng.uniform(0, 2)), row_id="copy") for i in range(30, 80)]
    return {"a": rows, "b": near, "ümlaut/…": exact}


def test_the_list_does_not_depend_on_how_samples_lie_in_shards(tmp_path: Path) -> None:
    pool = planted_pool()
    everything = [row for rows in pool.values() for row in rows]
    shuffled = [everything[i] for i in np.random.default_rng(5).permutation(len(everything))]
    write_store(tmp_path / "one", pool)
    elsewhere = {"x": shuffled[:7], "y": shuffled[7:200], "z": shuffled[200:]}
    write_store(tmp_path / "other", elsewhere)

    def told(folder: Path, shards: Mapping[str, Sequence[Row]]) -> list[tuple[Any, ...]]:
        """The removals, each sample told by its text and not by its place."""
        return sorted(
            (
                shards[one["shard"]][one["row"]].text,
                one["reason"],
                shards[one["partner_shard"]][one["partner_row"]].text,
                one["cosine"] or 0.0,
            )
            for one in materialized(folder)[0].rows(named=True)
        )

    one = told(tmp_path / "one", pool)
    assert len(one) > 50
    assert told(tmp_path / "other", elsewhere) == one


def test_no_row_is_lost_and_what_is_kept_has_no_duplicates_left(tmp_path: Path) -> None:
    pool = planted_pool()
    write_store(tmp_path, pool)
    frame, told, _ = materialized(tmp_path)
    rows = pl.DataFrame(
        [(shard, row) for shard, rows in pool.items() for row in range(len(rows))],
        schema={"shard": pl.String, "row": pl.Int64},
        orient="row",
    )
    kept = rows.join(frame, on=["shard", "row"], how="anti")
    assert kept.height + frame.height == rows.height == told["embedded"]
    assert told["dagster/row_count"] == frame.height
    assert {"exact_duplicate", "near_duplicate"} == set(frame["reason"])
    leverage = {(shard, row): one.leverage for shard, rows in pool.items() for row, one in enumerate(rows)}
    for one in frame.rows(named=True):
        assert leverage[one["partner_shard"], one["partner_row"]] >= leverage[one["shard"], one["row"]]

    write_store(tmp_path / "kept", {"k": [pool[shard][row] for shard, row in kept.iter_rows()]})
    again, _, _ = materialized(tmp_path / "kept", NearDuplicates(cosine=0.999))
    assert again.is_empty()


def test_an_index_gives_the_list_of_the_exact_search_and_says_how_well_it_finds(tmp_path: Path) -> None:
    write_store(tmp_path, planted_pool())
    exact, _, _ = materialized(tmp_path)
    indexed, told, _ = materialized(tmp_path, NearDuplicates(cosine=0.995, exact_up_to=10))
    assert (told["search"], told["recall"]) == ("ivf", 1.0)
    assert indexed.equals(exact)
    assert StorageResource().embeddings(str(tmp_path)).table_names() == {
        receipts.recorded_table(StorageResource().artifacts(str(tmp_path)), shard)[0].table
        for shard in planted_pool()
    }


def test_made_again_it_is_the_same_and_other_settings_are_another_provenance(tmp_path: Path) -> None:
    write_store(tmp_path, planted_pool())
    first, _, header = materialized(tmp_path)
    again, _, header_again = materialized(tmp_path)
    _, _, other = materialized(tmp_path, NearDuplicates(cosine=0.9))
    assert again.equals(first)
    assert header_again == header
    assert other["provenance"] != header["provenance"]


def test_without_settings_nothing_is_looked_for(tmp_path: Path) -> None:
    write_store(tmp_path, planted_pool())
    frame, told, _ = materialized(tmp_path, None)
    assert frame.is_empty()
    assert told["embedded"] == 230


def failure(folder: Path) -> str:
    with pytest.raises(dg.Failure) as caught:
        materialized(folder)
    assert caught.value.allow_retries is False
    return str(caught.value.description)


def test_scores_of_another_basis_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path, {"a": different(20)})
    artifacts = StorageResource().artifacts(str(tmp_path))
    scores, _ = artifacts.read_frame(importance_scores.NAME, "a")
    artifacts.write_frame(importance_scores.NAME, scores, {"subspace_basis": "basis-0"}, "a")
    assert "shard 'a' was scored with basis basis-0, and the present one is basis-1" in failure(tmp_path)
    artifacts.write_frame(importance_scores.NAME, scores.head(19), {"subspace_basis": "basis-1"}, "a")
    assert "19 scores and 20 vectors, of which 19 belong together" in failure(tmp_path)


def test_vectors_that_are_newer_than_the_basis_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path, {"a": different(20)})
    artifacts = StorageResource().artifacts(str(tmp_path))
    receipt = artifacts.read_json(receipts.NAME, "a")
    receipt["header"]["data_version"] = "newer"
    artifacts.write_json(receipts.NAME, receipt, "a")
    assert "of shard 'a', its vectors are now newer" in failure(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"cosine": 0},
        {"cosine": 1.1},
        {"cosine": "near"},
        {"text_likeness": 1.1},
        {"text_likeness": -0.1},
        {"exact_up_to": -1},
        {"threshold": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="NearDuplicates"):
        NearDuplicates(**settings)  # type: ignore[arg-type]
