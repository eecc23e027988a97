import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalselect_assets.demo.demo_pool import DEMO_REJECTIONS, DemoPool, demo_corpus, write_demo_pool
from scalselect_assets.method.representation.rejection import RejectionReason

COLOURS = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (34, 139, 74),
    "yellow": (240, 196, 25),
    "purple": (122, 60, 170),
    "orange": (243, 120, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_demo_pool(tmp_path_factory.mktemp("pool"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def mtimes(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*"))}


def shards(pool: DemoPool) -> list[list[str]]:
    return [path.read_text(encoding="utf-8").splitlines() for path in sorted(pool.root.glob("shard-*.jsonl"))]


def _decoded(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def parsed(line: str) -> dict | None:
    """A line as an object; a duplicate, which differs from its original in the id only, says what it is."""
    row = _decoded(line)
    if isinstance(row, dict) and str(row.get("id")).startswith("bad-duplicate"):
        return {**row, "source": "bad", "expected_rejection": RejectionReason.DUPLICATE.value}
    return row


def objects(pool: DemoPool) -> list[dict]:
    return [row for shard in shards(pool) for line in shard if (row := parsed(line)) is not None]


def good_rows(pool: DemoPool) -> list[dict]:
    return [row for row in objects(pool) if row["source"] != "bad"]


def bad_rows(pool: DemoPool, reason: RejectionReason) -> list[dict]:
    return [row for row in objects(pool) if row.get("expected_rejection") == reason]


def pairs(row: dict) -> list[tuple[str, str]]:
    texts = [m["content"] for m in row["messages"] if m["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def is_korean(row: dict) -> bool:
    return any(re.search("[가-힣]", m["content"]) for m in row["messages"])


def n_blobs(mask: np.ndarray) -> int:
    """Connected components, diagonal neighbours included, by flood fill."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    n = 0
    while todo:
        n += 1
        stack = [todo.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack.extend(near)
    return n


def test_the_same_seed_gives_the_same_bytes(pool, tmp_path):
    again = write_demo_pool(tmp_path / "again")
    assert contents(again.root) == contents(pool.root)


def test_another_seed_gives_other_rows_under_the_same_names_and_counts(pool, tmp_path):
    other = write_demo_pool(tmp_path / "other", seed=1)
    a, b = contents(pool.root), contents(other.root)
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in a if name.endswith(".jsonl"))
    assert (other.n_shards, other.n_rows, other.n_bad_rows) == (pool.n_shards, pool.n_rows, pool.n_bad_rows)
    assert Counter(r["expected_rejection"] for r in objects(other) if r["source"] == "bad") == Counter(
        r["expected_rejection"] for r in objects(pool) if r["source"] == "bad"
    )


def test_a_second_call_touches_no_file_and_no_folder(pool):
    before = mtimes(pool.root)
    assert write_demo_pool(pool.root) == pool
    assert mtimes(pool.root) == before


def test_only_a_changed_file_is_written_again_and_foreign_files_are_kept(tmp_path):
    root = write_demo_pool(tmp_path).root
    expected = contents(root)
    (root / "shard-003.jsonl").write_text("half a sh")
    (root / "shard-900.jsonl").write_text("mine\n")
    before = mtimes(root)
    write_demo_pool(root)
    assert contents(root) == {**expected, "shard-900.jsonl": b"mine\n"}
    changed = {name for name, mtime in mtimes(root).items() if mtime != before[name]}
    assert changed == {"shard-003.jsonl"}


def test_the_counts_are_those_on_disk(pool):
    lines = [line for shard in shards(pool) for line in shard]
    assert pool.n_shards == len(shards(pool)) == 8
    assert pool.n_rows == len(lines) == 480
    assert pool.n_rows - len(good_rows(pool)) == pool.n_bad_rows == sum(DEMO_REJECTIONS.values())
    assert sum(path.stat().st_size for path in pool.root.rglob("*")) < 1_000_000


def test_every_planned_fault_is_there_as_often_as_announced(pool):
    planned = Counter(RejectionReason(r["expected_rejection"]) for r in objects(pool) if r["source"] == "bad")
    unreadable = pool.n_rows - len(objects(pool))
    planned[RejectionReason.MALFORMED_ROW] += unreadable
    assert unreadable == 2
    assert planned == DEMO_REJECTIONS


def test_bad_rows_stand_in_every_shard(pool):
    for shard in shards(pool):
        assert any(row is None or row["source"] == "bad" for row in map(parsed, shard))


def test_each_bad_row_has_the_fault_that_it_announces(pool):
    root = pool.root.resolve()
    for row in bad_rows(pool, RejectionReason.MALFORMED_ROW):
        assert "messages" not in row
    for row in bad_rows(pool, RejectionReason.TEXT_ONLY):
        assert not row.get("images")
        assert "<image>" not in json.dumps(row)
    for row in bad_rows(pool, RejectionReason.IMAGE_COUNT_MISMATCH):
        assert sum(m["content"].count("<image>") for m in row["messages"]) != len(row["images"])
    for row in bad_rows(pool, RejectionReason.NO_INSTRUCTION_TEXT):
        assert not row["messages"][0]["content"].replace("<image>", "").strip()
    for row in bad_rows(pool, RejectionReason.OUTSIDE_IMAGE_ROOT):
        assert not (root / row["images"][0]).resolve().is_relative_to(root)
    for row in bad_rows(pool, RejectionReason.MISSING_IMAGE):
        assert not all((root / image).exists() for image in row["images"])
    for row in bad_rows(pool, RejectionReason.UNDECODABLE_IMAGE):
        with (
            pytest.raises(OSError, match=r"cannot identify|truncated"),
            Image.open(root / row["images"][0]) as image,
        ):
            image.load()


def test_a_duplicate_follows_its_original_in_the_same_shard(pool):
    for shard in shards(pool):
        rows = [row for line in shard if (row := parsed(line)) is not None]
        for at, row in enumerate(rows):
            if row.get("expected_rejection") == RejectionReason.DUPLICATE:
                earlier = [(r.get("messages"), r.get("images")) for r in rows[:at]]
                assert (row["messages"], row["images"]) in earlier


def test_good_rows_are_all_different_and_their_images_open(pool):
    rows = good_rows(pool)
    keys = {json.dumps([[m["content"] for m in row["messages"]], row["images"]]) for row in rows}
    assert len(keys) == len(rows)
    for reference in {image for row in rows for image in row["images"]}:
        with Image.open(pool.root / reference) as image:
            assert image.convert("RGB").size == (112, 112)


def test_good_rows_mark_each_image_or_leave_all_marks_out(pool):
    marks = Counter(
        (sum(m["content"].count("<image>") for m in row["messages"]), len(row["images"]))
        for row in good_rows(pool)
    )
    assert set(marks) == {(1, 1), (2, 2), (0, 1)}
    assert marks[2, 2] >= 5


def test_a_second_image_comes_in_a_later_turn_inside_its_text(pool):
    for row in good_rows(pool):
        if len(row["images"]) == 2:
            last_question = pairs(row)[-1][0]
            assert len(pairs(row)) > 1
            assert re.fullmatch(r".+<image>\n.+", last_question)


def test_many_conversations_share_an_image(pool):
    uses = Counter(row["images"][0] for row in good_rows(pool))
    assert Counter(uses.values()).most_common(1)[0][0] >= 2


def test_about_a_third_is_korean_and_a_few_percent_are_rare(pool):
    rows = good_rows(pool)
    assert 0.28 < sum(map(is_korean, rows)) / len(rows) < 0.42
    assert 0.02 < sum(row["source"] == "rare" for row in rows) / len(rows) < 0.04


def test_short_answers_also_occur_inside_their_questions(pool):
    echoed = {answer for row in good_rows(pool) for question, answer in pairs(row) if answer in question}
    assert {"Yes", "No", "Two", "네", "아니요", "왼쪽", "left"} <= echoed


def test_roles_turns_and_ids_vary_as_in_real_pools(pool):
    rows = good_rows(pool)
    assert {m["role"] for row in rows for m in row["messages"]} == {
        "system",
        "user",
        "assistant",
        "human",
        "gpt",
    }
    assert {len(pairs(row)) for row in rows} == {1, 2, 3}
    ids = [row.get("id") for row in rows]
    assert {type(i) for i in ids} == {int, str, type(None)}
    assert max(Counter(i for i in ids if i is not None).values()) > 1


def test_counts_in_the_answers_are_true_of_the_pixels(pool):
    checked = 0
    for row in good_rows(pool):
        if row["source"] != "counting" or is_korean(row):
            continue
        pixels = np.asarray(Image.open(pool.root / row["images"][0]))
        for question, answer in pairs(row):
            asked = re.search(r"(?:How many|Count the) (\w+) \w+s\b(?! are there in total)", question)
            if asked is None or asked[1] not in COLOURS:
                continue
            said = next(n for n, word in enumerate(NUMBERS) if re.search(rf"\b{word}\b", answer.lower()))
            assert n_blobs((pixels == COLOURS[asked[1]]).all(-1)) == said
            checked += 1
    assert checked > 30


def test_the_largest_and_smallest_shape_are_so_in_pixels(pool):
    asked = [
        (row["images"][0], word[0], answer)
        for row in good_rows(pool)
        if row["source"] == "layout"
        for question, answer in pairs(row)
        if (word := re.search("largest|smallest", question))
    ]
    for image, word, answer in asked:
        pixels = np.asarray(Image.open(pool.root / image))
        areas = {name: int((pixels == rgb).all(-1).sum()) for name, rgb in COLOURS.items()}
        areas = {name: area for name, area in areas.items() if area}
        assert (max if word == "largest" else min)(areas, key=areas.__getitem__) in answer
    assert len(asked) > 15


def test_the_corpus_is_the_text_of_the_good_rows_without_marks(pool):
    corpus = list(demo_corpus())
    assert any(re.search("[가-힣]", text) for text in corpus)
    assert "<image>" not in "".join(corpus)
    told = {
        text for row in good_rows(pool) for m in row["messages"] for text in m["content"].split("<image>")
    }
    assert set(corpus) == {text.strip() for text in told if text.strip()}
