"""A changed byte in any file of a store leads to the right result or to a message, never to a wrong result.

The store is of a pool with rejected rows, an export and a comparison, so that it holds every kind of file but
the report's. After each change the refresh is run as it is, then with a changed row, so that everything is
read.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import Children
from tests.faults.invariants import incomplete
from tests.faults.known_pool import FaultBench, Pool, problems

SEED = 17
PLACES = 2  # in each kind of file
OPTIONS: dict[str, Any] = {
    "exports": [{"format": "llama_factory"}],
    "compare": {"strategies": ["random"]},
}
NOT_TRIED = {".locks", "selection.yaml", "verified_files-1"}


def results(bench: FaultBench) -> dict[str, str]:
    """What a person takes from a store: the files for training, and the rows that were chosen."""
    folder = bench.store / "training_dataset"
    found = {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    chosen, _ = bench.artifacts.read_frame("selected_subset")
    return {**found, "selected_subset": json.dumps(chosen.select("rank", "shard", "row").rows())}


def kind_of(path: Path, store: Path) -> str:
    """Files of one kind are written and read by the same code."""
    top, *rest = path.relative_to(store).parts
    if top == "lance":
        return f"lance {rest[-2]}"
    if top == "training_dataset" and len(rest) > 1:
        return f"export {path.name}"
    return f"{top} {path.suffix}" if rest else path.name


def flip(path: Path, choose: random.Random) -> str:
    """Change one byte; returns which."""
    data = bytearray(path.read_bytes())
    place = choose.randrange(len(data))
    data[place] ^= 1 << choose.randrange(8)
    path.write_bytes(data)
    return f"{path} byte {place}"


def files_by_kind(store: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.stat().st_size and path.relative_to(store).parts[0] not in NOT_TRIED:
            found.setdefault(kind_of(path, store), []).append(path)
    return found


def try_flips(pool: Pool, store: Path, wanted: Callable[[str], bool]) -> dict[str, Counter[str]]:
    """Change bytes one at a time; returns what came of it, by kind of file."""
    bench, choose = FaultBench(pool.folder, store, **OPTIONS), random.Random(SEED)
    assert problems(bench) == []
    assert problems(bench) == []
    kept = store.with_name("kept")
    shutil.copytree(store, kept)
    untouched = {shard: list(numbers) for shard, numbers in pool.shards.items()}
    outcome: dict[str, Counter[str]] = {}
    right = results(bench)
    for kind, paths in files_by_kind(store).items():
        for _ in range(PLACES if wanted(kind) else 0):
            shutil.rmtree(store)
            shutil.copytree(kept, store)
            flipped = flip(choose.choice(paths), choose)
            first, report = refreshed(bench)
            if not first:
                assert results(bench) == right, flipped
                # Vectors are compared when they are read, which a refresh without work does not do.
                assert kind.startswith("lance") or incomplete(bench, pool) == [], flipped
            # Now everything is read, and what is wrong after that is made again in a few refreshes.
            pool.change("b.jsonl", [0])
            said = [*first, *report]
            for _ in range(4):
                latest, _ = refreshed(bench)
                if not latest:
                    break
                said += latest
            assert not latest, (flipped, said)
            assert incomplete(bench, pool) == [], flipped
            pool.shards = {shard: list(numbers) for shard, numbers in untouched.items()}
            pool.write("b.jsonl")
            outcome.setdefault(kind, Counter())["a message" if said else "the right result at once"] += 1
    return outcome


def refreshed(bench: FaultBench) -> tuple[list[str], list[str]]:
    """What a refresh says is wrong, and what it has made again."""
    try:
        report = bench.refresh()
    except (OSError, RuntimeError) as error:
        return [str(error)], []
    return report.problems(), list(report.damaged.values())


def try_records(pool: Pool, store: Path) -> Counter[str]:
    """Change bytes in Dagster's own files; returns what came of it."""
    bench, choose = FaultBench(pool.folder, store, **OPTIONS), random.Random(SEED)
    assert problems(bench) == []
    kept = store.with_name("kept")
    shutil.copytree(store, kept)
    right, outcome = results(bench), Counter[str]()
    files = sorted(path for path in (store / "dagster").rglob("*") if path.suffix in {".db", ".yaml"})
    assert {path.name for path in files} >= {"dagster.yaml", "index.db", "runs.db", "schedules.db"}
    for path in files:
        for _ in range(PLACES):
            shutil.rmtree(store)
            shutil.copytree(kept, store)
            flipped = flip(path, choose)
            try:
                said = bench.refresh().problems()
            except Exception as error:  # noqa: BLE001 - the command line prints any error and exits with 1
                said = [f"{type(error).__name__}: {error}"]
            outcome["a message" if said else "the right result at once"] += 1
            assert results(bench) == right, flipped
            if said:
                shutil.move(store / "dagster", store.with_name(f"moved {outcome.total()}"))
                report = bench.refresh()
                assert (report.problems(), report.computed_rows) == ([], 0), flipped
            assert incomplete(bench, pool) == [], flipped
    return outcome


def test_a_changed_byte_in_dagsters_records_costs_no_result_and_no_vector(
    children: Children, pool: Pool, tmp_path: Path, record_property: Any
) -> None:
    outcome = children.run(try_records, pool, tmp_path / "store", timeout=900).value
    record_property("outcome", dict(outcome))
    assert outcome.total() >= 8


def mix(pool: Pool, store: Path) -> list[str]:
    """Put files of an earlier version of the store among the present ones, one at a time."""
    bench = FaultBench(pool.folder, store, **OPTIONS)
    assert problems(bench) == []
    earlier = store.with_name("earlier")
    shutil.copytree(store, earlier)
    pool.change("a.jsonl", [0, 1])
    pool.change("b.jsonl", [1])
    assert problems(bench) == []
    kept, right, tried = store.with_name("kept"), results(bench), []
    shutil.copytree(store, kept)
    for kind, paths in files_by_kind(earlier).items():
        path = paths[0].relative_to(earlier)
        if kind.startswith(("dagster", "lance")) or not (kept / path).exists():
            continue
        shutil.rmtree(store)
        shutil.copytree(kept, store)
        shutil.copyfile(earlier / path, store / path)
        tried.append(kind)
        for _ in range(3):
            said, _ = refreshed(bench)
            if not said:
                break
        assert not said, (kind, said)
        assert results(bench) == right, kind
        assert incomplete(bench, pool) == [], kind
    return tried


def test_a_file_of_an_earlier_version_among_the_present_ones_is_made_again(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    tried = children.run(mix, pool, tmp_path / "store", timeout=900).value
    assert {
        "importance_scores .parquet",
        "embedding_moments .safetensors",
        "selected_subset .parquet",
    } <= set(tried)


def artifacts_only(kind: str) -> bool:
    return not kind.startswith(("dagster", "lance"))


def tables_only(kind: str) -> bool:
    return kind.startswith("lance")


@pytest.mark.parametrize("wanted", [artifacts_only, tables_only])
def test_a_changed_byte_leads_to_the_right_result_or_to_a_message(
    children: Children, pool: Pool, tmp_path: Path, wanted: Callable[[str], bool], record_property: Any
) -> None:
    outcome = children.run(try_flips, pool, tmp_path / "store", wanted, timeout=900).value
    for kind, counts in outcome.items():
        record_property(kind, dict(counts))
    assert sum(counts.total() for counts in outcome.values()) >= 6
    # Rows of a damaged table that are embedded anyway are embedded without a message.
    assert wanted is tables_only or any(counts["a message"] for counts in outcome.values())
