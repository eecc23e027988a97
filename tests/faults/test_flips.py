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
                assert incomplete(bench, pool) == [], flipped
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
    assert sum(sum(counts.values()) for counts in outcome.values()) >= 8
    assert any(counts["a message"] for counts in outcome.values())
