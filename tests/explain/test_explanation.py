"""Why a sample was selected, or not: every number against the whole pool computed in plain sight."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from scalselect_assets.embedding import receipts
from scalselect_assets.explain.explanation import DEFAULT_SIMILAR, Exemplar, Explanation, ExplanationError
from scalselect_assets.explain.sample_attention import attention_of
from scalselect_assets.explain.sample_search import SampleKeyError
from scalselect_assets.explain.why import explain
from scalselect_assets.method.subspace.preprocessing import prepared_rows
from scalselect_assets.recording.columns import STRONGEST_DIRECTIONS
from scalselect_assets.resources.artifacts import ArtifactMissingError
from scalselect_assets.resources.embedding_store import EmbeddingTableError
from scalselect_assets.subspace.sample_directions import directions_of_rows
from scalselect_assets.subspace.subspace_basis import read_basis
from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHARDS = ("a.jsonl", "sub/b 한.jsonl", "c.jsonl")


@pytest.fixture(scope="module", params=[{}, {"standardise": True, "unit_rows": True, "rank": 4}], ids=str)
def refreshed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    demo_vlm: Path,
    one_torch_thread: None,
    quick_dagster: None,
) -> Bench:
    """A pool and its store, up to date; some rows are rejected, and one is in two shards."""
    folder = tmp_path_factory.mktemp("explained")
    pool = folder / "pool"
    for seed, (shard, n_rows) in enumerate(zip(SHARDS[:2], (7, 6), strict=True)):
        write_pool_shard(pool, shard, n_rows, seed=1000 * seed)
    (pool / "images" / "cut.png").write_bytes(png_bytes(3)[:60])
    (pool / "images" / "wide.png").write_bytes(png_bytes(4, (120, 40)))
    rows = [
        sharegpt_row("images/cut.png", id="cut"),
        sharegpt_row(None, "Hello?", id="textual"),
        sharegpt_row("images/2.png", "<image>\nIs this picture 2?", "Yes", id=2),  # a row of a.jsonl, too
        sharegpt_row(["images/3.png", "images/wide.png"], "<image><image>\nWhich?", id="two images"),
    ]
    write_lines(pool / SHARDS[2], rows)
    bench = Bench(pool, folder / "store", demo_vlm)
    bench.options.update(request.param)
    bench.refresh()
    return bench


@pytest.fixture
def changeable(refreshed: Bench, tmp_path: Path) -> Bench:
    """A copy of the store that a test may damage."""
    store = shutil.copytree(refreshed.store, tmp_path / "store")
    bench = Bench(refreshed.pool, store, Path(refreshed.options["target_model"]))
    bench.options.update({**refreshed.options, "store": str(store)})
    return bench


class Pool:
    """All vectors and scores of a store, in memory."""

    def __init__(self, bench: Bench) -> None:
        self.subspace, _ = read_basis(bench.artifacts)
        vectors = bench.vectors()
        self.places = sorted(vectors)
        stacked = np.stack([vectors[place] for place in self.places])
        self.x = np.asarray(prepared_rows(stacked, to_unit_length=bench.selection.unit_rows), np.float64)
        self.u = ((self.x - self.subspace.mean) / self.subspace.scale) @ self.subspace.directions
        self.u /= self.subspace.singular_values
        frames = [
            bench.artifacts.read_frame("importance_scores", shard)[0].with_columns(shard=pl.lit(shard))
            for shard in SHARDS
        ]
        order = ["normalised_leverage", "sample_key", "shard"]
        self.ranked = pl.concat(frames).sort(order, descending=[True, False, False])
        self.key = {f"{row['shard']}#{row['row']}": row["sample_key"] for row in self.ranked.rows(named=True)}
        subset, _ = bench.artifacts.read_frame("selected_subset")
        self.selected = {f"{row['shard']}#{row['row']}": row["rank"] for row in subset.rows(named=True)}

    def index(self, place: str) -> int:
        return self.places.index(place)


@pytest.fixture(scope="module")
def pool(refreshed: Bench) -> Pool:
    return Pool(refreshed)


def told(bench: Bench, sample: str, **options: Any) -> Explanation:
    return explain(bench.selection, bench.storage, sample, **options)


# The score and the place


def test_every_embedded_sample_has_the_stored_score_and_its_place_in_a_full_sort(
    refreshed: Bench, pool: Pool
) -> None:
    for place, row in enumerate(pool.ranked.rows(named=True), start=1):
        found = told(refreshed, f"{row['shard']}#{row['row']}", similar=1)
        assert found.score is not None
        assert found.score.leverage == row["leverage"]
        assert found.score.normalised_leverage == row["normalised_leverage"]
        assert (found.score.rank, found.score.pool) == (place, pool.ranked.height)
        assert found.score.percentile == pytest.approx(
            100 * (pool.ranked.height - place) / (pool.ranked.height - 1)
        )
        rank = pool.selected.get(f"{row['shard']}#{row['row']}")
        assert (found.status, found.selected_rank) == ("selected" if rank else "not selected", rank)
        if rank is not None:
            assert rank == place  # what is selected is the head of the pool
        assert found.problems == ()
    assert 0 < len(pool.selected) < pool.ranked.height


def test_a_sample_that_two_shards_repeat_has_the_place_that_its_shard_decides(
    refreshed: Bench, pool: Pool
) -> None:
    twins = [place for place, key in pool.key.items() if list(pool.key.values()).count(key) == 2]
    assert sorted(place.split("#")[0] for place in twins) == ["a.jsonl", "c.jsonl"]
    first, second = (told(refreshed, place) for place in sorted(twins))
    assert first.score is not None
    assert second.score is not None
    if first.score.normalised_leverage == second.score.normalised_leverage:
        assert second.score.rank == first.score.rank + 1
    assert first.similar[0].cosine == pytest.approx(1, abs=1e-6)
    assert (first.similar[0].shard, second.similar[0].shard) == ("c.jsonl", "a.jsonl")


# The directions


def test_the_shares_of_all_directions_sum_to_one_and_make_up_the_leverage(
    refreshed: Bench, pool: Pool
) -> None:
    for place in pool.places:
        found = told(refreshed, place, directions=1000, exemplars=0, similar=0)
        assert found.score is not None
        assert len(found.directions) == found.score.k == pool.subspace.k
        assert sum(direction.share for direction in found.directions) == pytest.approx(1, abs=1e-12)
        whole = sum(direction.leverage for direction in found.directions)
        tolerance = 1e-9 if pool.subspace.k < 8 else 1e-5  # float32 projections of scores
        assert whole == pytest.approx(found.score.leverage, rel=tolerance)
        shares = [direction.share for direction in found.directions]
        assert shares == sorted(shares, reverse=True)
        for direction in found.directions:
            j = direction.direction - 1
            assert direction.coordinate == pytest.approx(pool.u[pool.index(place), j], abs=1e-9)
            assert direction.leverage == pytest.approx(direction.coordinate**2)
            assert direction.singular_value == pool.subspace.singular_values[j]
        energy = sum(direction.energy_share for direction in found.directions)
        assert energy == pytest.approx(pool.subspace.energy)


def test_the_exemplars_of_a_direction_are_the_samples_that_lie_furthest_on_either_side(
    refreshed: Bench, pool: Pool
) -> None:
    for place in pool.places[::4]:
        for direction in told(refreshed, place, exemplars=3).directions:
            u = pool.u[:, direction.direction - 1]
            side = np.sign(direction.coordinate)
            assert side == np.sign(u[pool.index(place)])
            for exemplars, towards in ((direction.same_side, side), (direction.other_side, -side)):
                expected = np.sort((u * towards)[u * towards > 0])[::-1][:3]
                np.testing.assert_allclose(
                    [towards * exemplar.coordinate for exemplar in exemplars], expected, atol=1e-9
                )
                for exemplar in exemplars:
                    name = f"{exemplar.shard}#{exemplar.row}"
                    assert u[pool.index(name)] == pytest.approx(exemplar.coordinate, abs=1e-9)
                    assert exemplar.sample_key == pool.key[name]
                    assert exemplar.selected_rank == pool.selected.get(name)


# What is like it


@pytest.mark.parametrize("batch_rows", [2, 4096])
def test_the_most_similar_samples_are_those_of_a_comparison_with_all(
    batch_rows: int, refreshed: Bench, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = type(refreshed.storage.embeddings("")).read
    monkeypatch.setattr(
        "scalselect_assets.resources.embedding_store.EmbeddingStore.read",
        lambda self, table: read(self, table, batch_rows=batch_rows),
    )
    centred = (pool.x - pool.subspace.mean) / pool.subspace.scale
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for place in pool.places[::3]:
        cosine = unit @ unit[pool.index(place)]
        others = [name for name in pool.places if name != place]
        expected = sorted(
            others,
            key=lambda name: (-round(cosine[pool.index(name)], 12), pool.key[name], name.split("#")[0]),
        )[:4]
        similar = told(refreshed, place, similar=4).similar
        assert [f"{found.shard}#{found.row}" for found in similar] == expected
        for found, name in zip(similar, expected, strict=True):
            assert found.cosine == pytest.approx(cosine[pool.index(name)], abs=1e-12)
            assert (found.sample_key, found.selected_rank) == (pool.key[name], pool.selected.get(name))


def test_as_many_similar_samples_as_there_are_and_none_if_none_are_wanted(
    refreshed: Bench, pool: Pool
) -> None:
    every = told(refreshed, pool.places[0], similar=1000).similar
    assert len(every) == len(pool.places) - 1
    assert told(refreshed, pool.places[0], similar=0).similar == ()


def test_counts_of_tokens_are_the_tables(refreshed: Bench, pool: Pool) -> None:
    tokens = told(refreshed, "two images").tokens
    assert tokens is not None
    table, _ = receipts.recorded_table(refreshed.artifacts, "c.jsonl")
    names = ["n_tokens", "n_vision_tokens", "n_dominant_tokens", "n_instruction_tokens", "vision_attention"]
    rows = pl.DataFrame(refreshed.storage.embeddings(str(refreshed.store)).read_rows(table, names))
    expected = rows.row(by_predicate=pl.col("row") == 3, named=True)
    assert {name: getattr(tokens, name) for name in names} == {name: expected[name] for name in names}


# What was rejected, and what is not there


@pytest.mark.parametrize(("sample", "reason"), [("cut", "undecodable_image"), ("textual", "text_only")])
def test_a_rejected_sample_is_explained_by_its_reason(refreshed: Bench, sample: str, reason: str) -> None:
    found = told(refreshed, sample)
    rejected, _ = refreshed.artifacts.read_frame("rejected_rows", "c.jsonl")
    expected = rejected.row(by_predicate=pl.col("source_id") == sample, named=True)
    assert (found.status, found.reason, found.detail) == ("rejected", reason, expected["detail"])
    assert (found.score, found.directions, found.similar, found.tokens) == (None, (), (), None)
    assert found.sample.source_id == sample
    with pytest.raises(ExplanationError, match=reason):
        attention_of(refreshed.selection, refreshed.storage, refreshed.vlm, found.sample)


def test_a_sample_that_nobody_knows_is_an_error_that_says_where_was_looked(refreshed: Bench) -> None:
    with pytest.raises(SampleKeyError, match=r"no sample 'nobody' among 17 rows of 3 shards"):
        told(refreshed, "nobody")
    with pytest.raises(SampleKeyError, match=r"several samples go by '2'"):
        told(refreshed, "2")


def test_a_key_and_a_prefix_of_it_find_the_sample(refreshed: Bench) -> None:
    by_id = told(refreshed, "two images")
    assert told(refreshed, by_id.sample.sample_key) == by_id
    assert told(refreshed, by_id.sample.sample_key[:12]) == by_id


def test_a_sample_of_a_shard_that_is_in_no_basis_is_found_where_the_caller_knows_of_it(
    changeable: Bench,
) -> None:
    raw, header = changeable.artifacts.read_frame("raw_samples", "c.jsonl")
    later = raw.with_columns(source_id=pl.lit("later ") + pl.col("source_id"))
    changeable.artifacts.write_frame("raw_samples", later, header, "new.jsonl")
    with pytest.raises(SampleKeyError):
        told(changeable, "later textual")
    found = told(changeable, "later textual", shards=["new.jsonl"])
    assert (found.status, found.reason, found.sample.shard) == ("rejected", "text_only", "new.jsonl")


def test_numbers_that_mean_nothing_are_refused(refreshed: Bench) -> None:
    with pytest.raises(ValueError, match="directions=0"):
        told(refreshed, "cut", directions=0)


# What does not fit


def test_scores_of_another_basis_are_not_explained(changeable: Bench) -> None:
    scores, header = changeable.artifacts.read_frame("importance_scores", "a.jsonl")
    changeable.artifacts.write_frame(
        "importance_scores", scores, {**header, "subspace_basis": "x"}, "a.jsonl"
    )
    with pytest.raises(ExplanationError, match=r"scores of shard 'a.jsonl' are of basis x.*scalselect run"):
        told(changeable, "two images")


def test_a_score_that_the_vector_does_not_give_is_not_explained(changeable: Bench) -> None:
    scores, header = changeable.artifacts.read_frame("importance_scores", "c.jsonl")
    doubled = scores.with_columns(pl.col("leverage") * 2)
    changeable.artifacts.write_frame("importance_scores", doubled, header, "c.jsonl")
    with pytest.raises(ExplanationError, match=r"and its vector gives .*scalselect run"):
        told(changeable, "two images")


def test_a_choice_by_another_basis_is_not_explained(changeable: Bench) -> None:
    subset, header = changeable.artifacts.read_frame("selected_subset")
    changeable.artifacts.write_frame("selected_subset", subset, {**header, "subspace_basis": "x"})
    with pytest.raises(ExplanationError, match="chosen by another basis"):
        told(changeable, "two images")


def receipt_of(bench: Bench, shard: str, **changes: str) -> None:
    """Change what a shard's receipt says of itself."""
    table, header = receipts.recorded_table(bench.artifacts, shard)
    bench.artifacts.write_json(
        "attention_embeddings", {"table": table.to_json(), "header": {**header, **changes}}, shard
    )


def test_rows_that_were_read_anew_are_not_explained_by_the_vectors_of_others(changeable: Bench) -> None:
    receipt_of(changeable, "c.jsonl", raw_samples="other rows")
    with pytest.raises(ExplanationError, match="read anew since they were embedded"):
        told(changeable, "two images")


def test_vectors_that_are_newer_than_the_basis_are_told_and_not_compared(changeable: Bench) -> None:
    receipt_of(changeable, "a.jsonl", data_version="newer")
    found = told(changeable, "two images", similar=1000)
    (problem,) = found.problems
    assert "'a.jsonl' are newer than the basis" in problem
    assert {similar.shard for similar in found.similar} == set(SHARDS[1:])
    with pytest.raises(ExplanationError, match="not those that the basis was fitted on"):
        told(changeable, "a.jsonl#0")


def test_without_a_result_there_is_nothing_to_explain(changeable: Bench) -> None:
    changeable.artifacts.path("selected_subset", suffix=".parquet").unlink()
    with pytest.raises(ArtifactMissingError, match="selected_subset is not in the store"):
        told(changeable, "two images")


def every_exemplar(found: Explanation) -> list[Exemplar]:
    return [one for direction in found.directions for one in (*direction.same_side, *direction.other_side)]


def test_an_explanation_is_json_and_lines_that_hold_what_it_says(refreshed: Bench, pool: Pool) -> None:
    found = told(refreshed, pool.places[0])
    assert found.score is not None
    read_back = json.loads(json.dumps(found.to_json()))
    assert read_back["score"]["leverage"] == found.score.leverage
    assert read_back["sample"]["shard"] == found.sample.shard
    assert len(read_back["similar"]) == DEFAULT_SIMILAR
    printed = "\n".join(f"{label} {value}" for label, value in found.lines())
    assert f"{found.score.rank} of {found.score.pool}" in printed
    itself = any(
        (one.shard, one.row) == (found.sample.shard, found.sample.row) for one in every_exemplar(found)
    )
    assert ("this sample" in printed) == itself
    for near in found.similar:
        assert f"{near.shard}#{near.row}" in printed
    assert "undecodable_image" in dict(told(refreshed, "cut").lines())["rejected as"]


# The column of the selected


def test_the_column_holds_what_the_explanations_of_the_rows_say(refreshed: Bench, pool: Pool) -> None:
    store = refreshed.storage.embeddings(str(refreshed.store))
    for shard in SHARDS:
        table, _ = receipts.recorded_table(refreshed.artifacts, shard)
        rows = [int(name.split("#")[1]) for name in pool.places if name.startswith(f"{shard}#")][::-2]
        found = directions_of_rows(store, table, pool.subspace, rows, unit_rows=refreshed.selection.unit_rows)
        assert found.schema["strongest_directions"] == STRONGEST_DIRECTIONS.dtype
        assert found["row"].to_list() == rows
        for row, strongest in found.iter_rows():
            expected = told(refreshed, f"{shard}#{row}", similar=0, exemplars=0).directions
            assert [one["direction"] for one in strongest] == [one.direction for one in expected]
            for name in ("share", "coordinate"):
                np.testing.assert_allclose(
                    [one[name] for one in strongest],
                    [getattr(one, name) for one in expected],
                    rtol=1e-9,
                    atol=1e-12,
                )


def test_the_column_of_no_rows_is_empty_and_of_a_row_that_is_not_there_an_error(
    refreshed: Bench, pool: Pool
) -> None:
    store = refreshed.storage.embeddings(str(refreshed.store))
    table, _ = receipts.recorded_table(refreshed.artifacts, "c.jsonl")
    none = directions_of_rows(store, table, pool.subspace, [], unit_rows=False)
    assert (none.height, none.schema["strongest_directions"]) == (
        0,
        STRONGEST_DIRECTIONS.dtype,
    )
    with pytest.raises(EmbeddingTableError, match="no row 1"):  # which was rejected
        directions_of_rows(store, table, pool.subspace, [3, 1], unit_rows=False)


# What the model saw


def test_the_attention_of_a_sample_is_that_of_its_stored_vector(refreshed: Bench) -> None:
    found = told(refreshed, "two images")
    assert found.tokens is not None
    seen = attention_of(refreshed.selection, refreshed.storage, refreshed.vlm, found.sample)
    assert seen.deviation < 1e-6
    kept = np.concatenate([image.kept for image in seen.map.images])
    assert (len(kept), kept.sum()) == (found.tokens.n_vision_tokens, found.tokens.n_dominant_tokens)
    assert sum(image.share for image in seen.map.images) == pytest.approx(1)
    assert seen.map.representation.vision_attention == pytest.approx(found.tokens.vision_attention, abs=1e-6)
    told_json = json.loads(json.dumps(seen.to_json()))
    assert [image["path"] for image in told_json["images"]] == ["images/3.png", "images/wide.png"]
    assert [image["width"] for image in told_json["images"]] == [48, 120]
    assert sum(
        sum(map(sum, grid["kept"])) for image in told_json["images"] for grid in image["grids"]
    ) == sum(image["kept"] for image in told_json["images"])
    first, second = (Image.open(io.BytesIO(png)) for png in seen.pngs(200))
    assert max(first.size) <= 200
    assert second.width / second.height == pytest.approx(3, abs=0.1)


def test_an_image_that_has_changed_since_is_not_drawn_over(
    refreshed: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = told(refreshed, "two images").sample
    monkeypatch.setattr(
        "scalselect_assets.resources.sample_source.SampleSource.open_image",
        lambda _self, _path: png_bytes(99),
    )
    with pytest.raises(ExplanationError, match=r"images/3.png .* has changed since it was embedded"):
        attention_of(refreshed.selection, refreshed.storage, refreshed.vlm, place)
