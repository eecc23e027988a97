"""What must hold of a store at any time, as somebody sees it who opens it then.

Everything that is there can be read, holds what it held before or what the pool as it is now gives, and
whatever is selected is embedded. What the pool gives is computed here from the stand-in's vectors, by the
definition.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from scalselect_assets.dataset import training_manifest
from scalselect_assets.embedding import receipts
from scalselect_assets.resources.artifacts import ArtifactMissingError
from scalselect_assets.subspace import subspace_basis
from tests.faults.known_pool import FaultBench, Pool

Content: TypeAlias = dict[Any, Any]
"""Rows or parts of an artifact by name; numbers are compared within rounding."""


class Unreadable(dict[Any, Any]):
    """Stands for what cannot be read, and is equal to nothing."""


def contents(bench: FaultBench) -> dict[str, Content]:
    """All artifacts that the store has, by asset and shard."""
    found: dict[str, Content] = {}

    @contextmanager
    def artifact(name: str, shard: str | None = None) -> Iterator[Content]:
        content: Content = {}
        try:
            yield content
        except ArtifactMissingError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what a reader meets
            content = Unreadable(error=repr(error))
        found[name if shard is None else f"{name}[{shard}]"] = content

    artifacts, tables = bench.artifacts, bench.storage.embeddings(str(bench.store))
    for shard in _shards(bench):
        with artifact("raw_samples", shard) as raw:
            raw.update(artifacts.read_frame("raw_samples", shard)[0].select("row", "text").iter_rows())
        with artifact("attention_embeddings", shard) as embedded:
            table, _ = receipts.recorded_table(artifacts, shard)
            rows = tables.read_all(table).select(["row", "text", "vector"]).to_pylist()
            embedded.update({row["row"]: row["text"] for row in rows})
            embedded.update({f"vector {row['row']}": np.array(row["vector"]) for row in rows})
        with artifact("rejected_rows", shard) as rejected:
            rejected.update(artifacts.read_frame("rejected_rows", shard)[0].select("row", "text").iter_rows())
        with artifact("embedding_moments", shard) as moments:
            moments.update(artifacts.read_arrays("embedding_moments", shard)[0])
        with artifact("importance_scores", shard) as scores:
            frame, _ = artifacts.read_frame("importance_scores", shard)
            scores.update(frame.select("row", "leverage").iter_rows())
    with artifact("subspace_basis") as basis:
        subspace, header = subspace_basis.read_basis(artifacts)
        basis.update(n=subspace.n, k=subspace.k, mean=subspace.mean, shards=sorted(header.shards))
    with artifact("selected_subset") as subset:
        frame, _ = artifacts.read_frame("selected_subset")
        subset.update(
            {rank: (shard, row) for rank, shard, row in frame.select("rank", "shard", "row").rows()}
        )
    if (bench.store / "training_dataset" / "train.jsonl").exists():
        with artifact("train.jsonl") as dataset:
            dataset.update(
                enumerate((bench.store / "training_dataset" / "train.jsonl").read_text().splitlines())
            )
    with artifact("manifest") as manifest:
        told = training_manifest.read_manifest(artifacts)
        manifest.update({name: told[name] for name in ("rows", "embedded", "rejected", "selected")})
        manifest["shards"] = sorted(told["shards"])
    return found


def expected(pool: Pool) -> dict[str, Content]:
    """What the artifacts hold once a refresh of this pool is complete."""
    rank, scores = pool.scores()
    selected = pool.selected()
    found: dict[str, Content] = {}
    for shard in pool.shards:
        texts, vectors = pool.texts(shard), pool.vectors(shard)
        x = np.array(list(vectors.values()), np.float64).reshape(len(vectors), -1)
        centred = x - x.mean(0)
        found[f"raw_samples[{shard}]"] = dict(texts)
        found[f"attention_embeddings[{shard}]"] = {
            **{row: texts[row] for row in vectors},
            **{f"vector {row}": vector for row, vector in vectors.items()},
        }
        found[f"rejected_rows[{shard}]"] = {row: text for row, text in texts.items() if row not in vectors}
        found[f"embedding_moments[{shard}]"] = {
            "n": np.array(len(x)),
            "mean": x.mean(0),
            "scatter_upper": (centred.T @ centred)[np.triu_indices(x.shape[1])],
        }
        found[f"importance_scores[{shard}]"] = {row: scores[shard, row] for row in vectors}
    found["subspace_basis"] = {
        "n": len(scores),
        "k": rank,
        "mean": np.mean(
            [vector for shard in pool.shards for vector in pool.vectors(shard).values()], 0, np.float64
        ),
        "shards": sorted(pool.shards),
    }
    found["selected_subset"] = dict(enumerate(selected, start=1))
    found["train.jsonl"] = dict(enumerate(pool.texts(shard)[row] for shard, row in sorted(selected)))
    reasons = Counter(reason for shard in pool.shards for reason in pool.rejected(shard).values())
    found["manifest"] = {
        "rows": sum(map(len, pool.shards.values())),
        "embedded": len(scores),
        "rejected": dict(reasons),
        "selected": len(selected),
        "shards": sorted(pool.shards),
    }
    return found


def same(one: Mapping[Any, Any] | None, other: Mapping[Any, Any] | None) -> bool:
    """Whether two artifacts hold the same, numbers within rounding."""
    if one is None or other is None or isinstance(one, Unreadable) or one.keys() != other.keys():
        return False
    return all(_equal(one[name], other[name]) for name in one)


def torn(
    before: Mapping[str, Content], after: Mapping[str, Content], new: Mapping[str, Content]
) -> list[str]:
    """What is neither as it was nor as it is to be, in words.

    Moments may be missing, too: they are set aside before others take their place, and made again.
    """
    return [
        f"{name} holds {after.get(name)}, before it was {before.get(name)}, it is to be {new.get(name)}"
        for name in {**before, **after}
        if not same(after.get(name), before.get(name))
        and not same(after.get(name), new.get(name))
        and not (name.startswith("embedding_moments") and name not in after)
    ]


def incomplete(bench: FaultBench, pool: Pool) -> list[str]:
    """What is not as a complete refresh of this pool leaves it."""
    found, new = contents(bench), expected(pool)
    return [name for name in new if not same(found.get(name), new[name])]


def unembedded(bench: FaultBench) -> list[tuple[str, str]]:
    """The selected samples that have no vector in the tables that the selection was made from."""
    try:
        selected, header = bench.artifacts.read_frame("selected_subset")
    except ArtifactMissingError:
        return []
    versions = _table_versions(bench, header["subspace_basis"])
    keys = {
        shard: _embedded(bench, shard, versions.get(shard)) for shard in selected["shard"].unique().to_list()
    }
    return [
        (shard, key) for shard, key in selected.select("shard", "sample_key").rows() if key not in keys[shard]
    ]


def _table_versions(bench: FaultBench, basis_version: str) -> dict[str, int]:
    """The version of each shard's table that a basis was fitted on, where the store still says it."""
    with suppress(ArtifactMissingError):
        header = bench.artifacts.read_header("subspace_basis", suffix=".safetensors")
        if header["data_version"] == basis_version:
            moments = json.loads(header["shards"])
            return {shard: int(moments[shard]["lance_version"]) for shard in moments}
    with suppress(ArtifactMissingError):
        manifest = training_manifest.read_manifest(bench.artifacts)
        if manifest["basis_version"] == basis_version:
            return {shard: lineage["lance_version"] for shard, lineage in manifest["shards"].items()}
    return {}


def _embedded(bench: FaultBench, shard: str, version: int | None) -> set[str]:
    """The samples in one version of a shard's table; in all of them, where which is not known."""
    import lancedb

    table, _ = receipts.recorded_table(bench.artifacts, shard)
    handle = lancedb.connect(str(bench.store / "lance")).open_table(table.table)
    keys: set[str] = set()
    for one in [version] if version is not None else [known["version"] for known in handle.list_versions()]:
        handle.checkout(one)
        keys.update(handle.search().select(["sample_key"]).limit(None).to_arrow()["sample_key"].to_pylist())
    return keys


def leftovers(store: Path) -> list[Path]:
    """Files that were being written when a process was killed."""
    return [path for path in store.rglob(".*") if path.name.startswith((".writing-", ".tmp"))]


def _shards(bench: FaultBench) -> list[str]:
    """The shards that the store knows, from their files' names, which the pool here keeps simple."""
    files = [*bench.store.glob("raw_samples/*.parquet"), *bench.store.glob("attention_embeddings/*.json")]
    return sorted({path.stem.replace("_2e", ".") for path in files})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float | np.ndarray):
        return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-6, atol=1e-6))
    return bool(one == other)
