"""The pool is listed, read and fingerprinted shard by shard, and one shard's trouble stays its own."""

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from upath import UPath

from scalselect_assets.method.representation.rejection import RejectionReason as Reason
from scalselect_assets.resources.sample_source import SampleSource, ShardIndex
from scalselect_assets.resources.shard_reader import ShardFormatError

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
FORBIDDEN_IN_KEYS = ["...", "\a", "\b", "\f", "\n", "\r", "\t", "\v", "\0"]


def row(image: str = "a.png", question: str = "What is it?", **fields) -> dict:
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": "A dog."}]
    return {"messages": turns, "images": [image], **fields}


def write(path: Path, *rows: object) -> Path:
    """A JSON Lines shard; strings and bytes are lines as they are."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def pool(tmp_path):
    """A folder with the images that ``row`` names."""
    root = tmp_path / "pool"
    root.mkdir()
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(name.encode())
    return root


def source_at(root: Path, **fields) -> SampleSource:
    return SampleSource(UPath(root), **fields)


def rows_of(root: Path, key: str = "s.jsonl", **fields):
    return list(source_at(root, **fields).read_shard(key))


def reasons(rows) -> list[str | None]:
    return [found.rejection and found.rejection.reason for found in rows]


def test_every_json_file_below_the_source_is_a_shard(pool):
    for name in ("b.jsonl", "a.json", "sub/deep/c.NDJSON", "sub/한 %.json"):
        write(pool / name)
    for name in (".hidden.json", ".git/x.json", "sub/.x/y.json", "notes.txt", "x.json.partial", "a.tar.gz"):
        write(pool / name)
    (pool / "folder.json").mkdir()

    keys = source_at(pool).shard_keys()

    assert list(keys) == ["a.json", "b.jsonl", "sub/deep/c.NDJSON", "sub/한 %25.json"]
    assert keys["sub/한 %25.json"] == UPath(pool / "sub" / "한 %.json")
    assert source_at(pool).shard_path("sub/한 %25.json") == keys["sub/한 %25.json"]


def test_excluded_folders_and_links_to_folders_hold_no_shards_and_any_other_link_is_one(pool, tmp_path):
    for name in ("a.json", "store/manifest.json", "store/deep/x.json", "sub/store/kept.json"):
        write(pool / name)
    write(tmp_path / "elsewhere" / "x.json")
    (pool / "linked").symlink_to(tmp_path / "elsewhere")
    (pool / "loop").symlink_to(pool)
    (pool / "linked.json").symlink_to(tmp_path / "elsewhere" / "x.json")
    (pool / "dangling.json").symlink_to("nowhere.json")

    exclude = (UPath(pool / "sub" / ".." / "store"), UPath(tmp_path / "not-there"), UPath("memory:///x"))

    assert list(source_at(pool, exclude=exclude).shard_keys()) == [
        "a.json",
        "dangling.json",
        "linked.json",
        "sub/store/kept.json",
    ]


def test_one_file_is_a_pool_of_one_shard(pool):
    file = write(pool / "my pool.json", row())

    source = source_at(file)

    assert source.shard_keys() == {"my pool.json": UPath(file)}
    assert reasons(source.read_shard("my pool.json")) == [None]
    assert source.open_image("a.png") == b"a.png"


def test_a_missing_source_is_an_error_and_an_empty_one_is_empty(pool):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist\. Correct"):
        source_at(pool / "nowhere").shard_keys()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        next(source_at(pool / "nowhere").read_shard("a.json"))

    assert source_at(pool).shard_keys() == {}


def test_a_folder_that_cannot_be_listed_is_an_error(pool, monkeypatch):
    write(pool / "sub" / "a.json")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)

    with pytest.raises(PermissionError, match="sub"):
        source_at(pool).shard_keys()


# Of the surrogates only those that stand for an undecodable byte occur in file names.
IN_PATHS = st.characters(exclude_categories=["Cs"]) | st.sampled_from("...%/\n\t\0 2E한\udc80\udcff")


@given(st.text(alphabet=IN_PATHS, min_size=1))
@example("....json")
@example("a" + "." * 7 + "/%2E%2e%")
@example("caf\udce9.json")
@example(string.printable)
def test_shard_keys_are_reversible_and_legal_for_dagster(path):
    key = SampleSource.shard_key(path)

    assert not [text for text in FORBIDDEN_IN_KEYS if text in key]
    key.encode()
    normal = os.path.normpath(path) == path and not path.startswith(("/", "../")) and path not in (".", "..")
    if normal and "\0" not in path:
        assert source_at(Path("/")).shard_path(key).path == f"/{path}"


def test_ordinary_names_are_their_own_keys():
    for path in ("part-000.jsonl", "한국/a b.json", "a..b/(1)+#?.json"):
        assert SampleSource.shard_key(path) == path


@pytest.mark.parametrize(
    "key", ["../x.json", "/etc/x.json", "a/../../x.json", "a//b.json", "", ".", "..", "%2E./x", "a%41.json"]
)
def test_what_is_no_shard_key_is_refused(pool, key):
    with pytest.raises(ValueError, match="Got the shard key"):
        source_at(pool).shard_path(key)


def test_a_file_name_that_is_no_text_still_has_a_key(pool):
    name = os.fsdecode(b"caf\xe9.jsonl")
    write(pool / name, row())

    (key,) = source_at(pool).shard_keys()

    assert key == "caf%E9.jsonl"
    assert reasons(source_at(pool).read_shard(key)) == [None]


def test_every_row_comes_back_in_order_with_its_place_and_verdict(pool):
    write(
        pool / "s.jsonl",
        row(id=7),
        b"",
        row("b.png", id="7"),
        b'{"id": 3, ',
        b'{"id": "caf\xe9"}',
        row(id=[1]),
    )

    found = rows_of(pool)

    assert [(item.row, item.line, item.source_id) for item in found] == [
        (0, 1, "7"),
        (1, 3, "7"),
        (2, 4, None),
        (3, 5, None),
        (4, 6, "[1]"),
    ]
    assert reasons(found) == [None, None, Reason.MALFORMED_ROW, Reason.MALFORMED_ROW, Reason.DUPLICATE]
    assert all((item.sample is None) == (item.rejection is not None) for item in found)
    assert found[1].text == json.dumps(row("b.png", id="7"))
    assert found[1].image_paths == ("b.png",)
    assert found[3].text == '{"id": "caf\\xe9"}'


def test_each_rejection_is_the_rows_own(pool, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    (pool / "link.png").symlink_to("../secret.png")
    no_image = {**row(question="Why?"), "images": []}
    text_only = {**row(), "images": [], "messages": [{**turn, "content": "x"} for turn in row()["messages"]]}
    write(
        pool / "s.jsonl",
        row(),
        {"messages": 3},
        text_only,
        no_image,
        row(question=" "),
        row("../secret.png"),
        row("link.png"),
        row("c.png"),
        row("https://x.org/a.png"),
        row(id="again"),
        row("b.png"),
    )

    assert reasons(rows_of(pool)) == [
        None,
        Reason.MALFORMED_ROW,
        Reason.TEXT_ONLY,
        Reason.IMAGE_COUNT_MISMATCH,
        Reason.NO_INSTRUCTION_TEXT,
        Reason.OUTSIDE_IMAGE_ROOT,
        Reason.OUTSIDE_IMAGE_ROOT,
        Reason.MISSING_IMAGE,
        Reason.MISSING_IMAGE,
        Reason.DUPLICATE,
        None,
    ]


def test_keys_are_unique_and_do_not_depend_on_order_or_on_other_fields(pool):
    rows = [row(), row("b.png"), row(), row("no.png"), row("no.png"), {"x": 1}, {"x": 1}]
    write(pool / "s.jsonl", *rows)
    write(pool / "t.jsonl", *({"id": n, **item} for n, item in enumerate(reversed(rows[:2]))))

    found, reversed_rows = rows_of(pool), rows_of(pool, "t.jsonl")

    assert len({item.sample_key for item in found}) == len(rows)
    assert [item.sample_key for item in reversed_rows] == [found[1].sample_key, found[0].sample_key]


def test_a_duplicate_names_the_row_that_it_repeats(pool):
    write(
        pool / "s.jsonl",
        row(id="a"),
        row("./a.png", id="b"),
        row(str(pool / "a.png")),
        row("b.png"),
        row("b.png"),
    )

    found = rows_of(pool)

    assert [item.rejection and item.rejection.detail.split(",")[0] for item in found] == [
        None,
        "the row repeats row 0 (id 'a') of this shard",
        "the row repeats row 0 (id 'a') of this shard",
        None,
        "the row repeats row 3 of this shard",
    ]


def test_rejected_rows_repeat_for_their_own_reason(pool):
    write(pool / "s.jsonl", row("no.png"), row("no.png"), b"{", b"{", row())

    assert reasons(rows_of(pool)) == [Reason.MISSING_IMAGE] * 2 + [Reason.MALFORMED_ROW] * 2 + [None]


def test_a_missing_image_that_appears_does_not_change_the_key(pool):
    write(pool / "s.jsonl", row("late.png"))
    before = rows_of(pool)

    (pool / "late.png").write_bytes(b"")
    after = rows_of(pool)

    assert (reasons(before), reasons(after)) == ([Reason.MISSING_IMAGE], [None])
    assert before[0].sample_key == after[0].sample_key


def test_references_start_from_the_shards_folder_or_from_the_declared_root(pool):
    write(pool / "sub" / "s.jsonl", row("a.png"), row("../a.png"))
    (pool / "sub" / "a.png").write_bytes(b"sub")

    beside = rows_of(pool, "sub/s.jsonl")
    declared = rows_of(pool, "sub/s.jsonl", image_root=UPath(pool))

    assert [item.image_paths for item in beside] == [("sub/a.png",), ("a.png",)]
    assert [item.image_paths for item in declared] == [("a.png",), ()]
    assert reasons(declared) == [None, Reason.OUTSIDE_IMAGE_ROOT]
    assert source_at(pool).open_image("sub/a.png") == b"sub"
    assert source_at(pool / "sub", image_root=UPath(pool)).open_image("a.png") == b"a.png"


def test_an_image_outside_is_never_opened(pool, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")

    with pytest.raises(PermissionError):
        source_at(pool).open_image("../secret.png")
    with pytest.raises(PermissionError):
        source_at(pool).open_image(str(tmp_path / "secret.png"))


def test_an_image_root_that_is_not_there_is_no_fault_of_the_rows(pool, tmp_path):
    write(pool / "s.jsonl", row())
    source = source_at(pool, image_root=UPath(tmp_path / "unmounted"))

    for read in (lambda: next(source.read_shard("s.jsonl")), lambda: source.index_shard("s.jsonl")):
        with pytest.raises(FileNotFoundError, match=r"image root .*unmounted is not a folder"):
            read()


def test_a_shard_that_is_gone_is_an_error(pool):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        next(source_at(pool).read_shard("gone.jsonl"))


def test_an_index_tells_what_the_shard_names(pool):
    (pool / "link.png").symlink_to("/etc/hostname")
    write(
        pool / "s.jsonl",
        row("b.png"),
        row("./a.png"),
        row("later/c.png"),
        row("link.png"),
        row("../out.png"),
        row("https://x.org/a.png"),
        b'{"id": "\xe9"}',
        row("b.png"),
    )

    index = source_at(pool).index_shard("s.jsonl")

    assert index.n_rows == 8
    assert index.images == ("a.png", "b.png", "later/c.png", "link.png")
    assert index.size == (pool / "s.jsonl").stat().st_size
    assert ShardIndex.from_json(json.loads(json.dumps(index.to_json()))) == index


def test_an_index_of_hostile_names_survives_json(pool):
    write(pool / "s.jsonl", row("한 \n\"'.png"))
    index = source_at(pool).index_shard("s.jsonl")

    assert index.images == ("한 \n\"'.png",)
    assert ShardIndex.from_json(json.loads(json.dumps(index.to_json()))) == index


@pytest.mark.parametrize("value", ["", [], {}, {"images": []}, {"images": [], "other": 1}])
def test_what_is_no_index_is_refused(value):
    with pytest.raises(ValueError, match="Got no shard index but"):
        ShardIndex.from_json(value)


def test_an_index_is_current_until_size_or_time_change(pool):
    path = write(pool / "s.jsonl", row())
    source = source_at(pool)
    index = source.index_shard("s.jsonl")
    assert source.is_current("s.jsonl", index)

    os.utime(path, ns=(0, 12345))
    assert not source.is_current("s.jsonl", index)

    index = source.index_shard("s.jsonl")
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(0, 12345))
    assert not source.is_current("s.jsonl", index)


def test_an_index_is_not_current_for_another_image_root(pool):
    write(pool / "sub" / "s.jsonl", row())
    index = source_at(pool).index_shard("sub/s.jsonl")

    declared = source_at(pool, image_root=UPath(pool))

    assert not declared.is_current("sub/s.jsonl", index)
    assert declared.index_shard("sub/s.jsonl").images == ("a.png",)
    assert declared.is_current("sub/s.jsonl", declared.index_shard("sub/s.jsonl"))


def fingerprint(root: Path, **fields) -> str:
    source = source_at(root, **fields)
    return source.shard_fingerprint("s.jsonl", source.index_shard("s.jsonl"))


def test_the_fingerprint_changes_with_bytes_and_images_and_with_nothing_else(pool):
    path = write(pool / "s.jsonl", row(), row("late.png"), row("link.png"))
    image, late, link = pool / "a.png", pool / "late.png", pool / "link.png"
    (pool / "other.png").write_bytes(b"other")
    seen = [fingerprint(pool)]

    os.utime(path, ns=(0, 1))
    os.utime(pool / "b.png", ns=(0, 1))
    write(pool / "t.jsonl", row())
    assert fingerprint(pool) == seen[0]
    assert fingerprint(pool, image_root=UPath(pool)) == seen[0]

    changes = [
        lambda: path.write_bytes(path.read_bytes() + b"\n"),
        lambda: os.utime(image, ns=(0, 77)),
        lambda: (image.write_bytes(b"longer than before"), os.utime(image, ns=(0, 77))),
        lambda: (late.write_bytes(b"L"), os.utime(late, ns=(0, 77))),
        lambda: link.symlink_to("other.png"),
        lambda: (link.unlink(), link.symlink_to("../outside.png")),
        image.unlink,
    ]
    for change in changes:
        change()
        seen.append(fingerprint(pool))
    assert len(set(seen)) == len(seen)

    late.unlink()
    late.write_bytes(b"L")
    os.utime(late, ns=(0, 77))
    assert fingerprint(pool) == seen[-1]


def test_the_fingerprint_is_that_of_now_although_the_index_is_older(pool):
    write(pool / "s.jsonl", row("late.png"))
    source = source_at(pool)
    index = source.index_shard("s.jsonl")
    before = source.shard_fingerprint("s.jsonl", index)

    (pool / "late.png").write_bytes(b"")

    assert source.is_current("s.jsonl", index)
    assert source.shard_fingerprint("s.jsonl", index) != before


def test_the_fingerprint_is_the_same_for_a_copy_of_the_pool(pool, tmp_path):
    write(pool / "s.jsonl", row())
    os.utime(pool / "a.png", ns=(0, 5))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("s.jsonl", "a.png"):
        (copy / name).write_bytes((pool / name).read_bytes())
    os.utime(copy / "a.png", ns=(0, 5))

    assert fingerprint(copy) == fingerprint(pool)


@pytest.mark.parametrize(
    "broken", [b"\x89PNG\r\n", b'[{"messages": [', b'{\n"a": 1\n}', b"[1 2" + b" " * (3 << 20)]
)
def test_a_file_that_is_no_shard_fails_alone_and_heals_when_it_changes(pool, broken):
    write(pool / "good.jsonl", row())
    path = pool / "s.jsonl"
    path.write_bytes(broken)
    source = source_at(pool)

    index = source.index_shard("s.jsonl")
    before = source.shard_fingerprint("s.jsonl", index)

    assert (index.n_rows, index.images) == (None, ())
    assert ShardIndex.from_json(json.loads(json.dumps(index.to_json()))) == index
    with pytest.raises(ShardFormatError, match=r"s\.jsonl"):
        list(source.read_shard("s.jsonl"))
    assert reasons(source.read_shard("good.jsonl")) == [None]
    # Also a change behind the place that cannot be read is a change.
    path.write_bytes(broken + b" ")
    assert source.shard_fingerprint("s.jsonl", source.index_shard("s.jsonl")) != before
    write(path, row())
    assert source.index_shard("s.jsonl").n_rows == 1


def test_rows_for_one_file_of_the_whole_pool_are_verbatim_unless_their_images_would_be_lost(pool):
    said = f'"messages": {json.dumps(row()["messages"])}'
    odd = f'{{"images":  ["a.png"], "n": 1.50, {said}}}'
    source = source_at(pool)

    assert source.export_text("s.jsonl", odd, ["a.png"]) == odd
    assert source.export_text("sub/s.jsonl", odd, ["sub/a.png"]) == odd.replace("a.png", "sub/a.png")
    assert source.export_text("sub/s.jsonl", '{"text": 1.0}', []) == '{"text": 1.0}'
    declared = source_at(pool, image_root=UPath(pool))
    assert declared.export_text("sub/s.jsonl", odd, ["a.png"]) == odd


def test_the_container_of_a_shard_is_reported(pool):
    write(pool / "s.jsonl", row())
    (pool / "t.json").write_text("[]", encoding="utf-8")

    assert [source_at(pool).container(key) for key in ("s.jsonl", "t.json")] == ["lines", "array"]


def test_a_pool_in_an_object_store_reads_like_a_local_one(pool):
    write(pool / "a b#%.jsonl", row(), row("sub/b.png"), row("../out.png"), row("no.png"))
    write(pool / "sub" / "t.json", row("b.png"))
    write(pool / "store" / "x.json")
    write(pool / ".hidden" / "x.json")
    (pool / "sub" / "b.png").write_bytes(b"b")
    root = UPath("memory:///sample-source/pool")
    for path in pool.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(pool).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    local = source_at(pool, exclude=(UPath(pool / "store"),))
    remote = SampleSource(root, exclude=(root / "store",))

    assert list(remote.shard_keys()) == list(local.shard_keys()) == ["a b#%25.jsonl", "sub/t.json"]
    for key in local.shard_keys():
        assert [(item.sample_key, item.image_paths) for item in remote.read_shard(key)] == [
            (item.sample_key, item.image_paths) for item in local.read_shard(key)
        ]
        index = remote.index_shard(key)
        assert (index.sha256, index.images) == (local.index_shard(key).sha256, local.index_shard(key).images)
        assert remote.is_current(key, index)
        before = remote.shard_fingerprint(key, index)
        (root / "sub" / "b.png").write_bytes(b"changed")
        assert remote.shard_fingerprint(key, index) != before
    assert remote.open_image("sub/b.png") == b"changed"


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the shared sample data is not at {SHARED_DATA}")
@pytest.mark.parametrize(("name", "n_shards", "n_rows"), [("nlvr_sample", 4, 720), ("mllm_demo", 1, 6)])
def test_every_row_of_the_published_samples_is_accepted(name, n_shards, n_rows):
    source = source_at(SHARED_DATA / name)
    keys = source.shard_keys()

    found = [item for key in keys for item in source.read_shard(key)]

    assert (len(keys), len(found)) == (n_shards, n_rows)
    assert reasons(found) == [None] * n_rows
    assert len({item.sample_key for item in found}) == n_rows
    assert sum(source.index_shard(key).n_rows for key in keys) == n_rows
    assert source.open_image(found[-1].image_paths[-1])[:3] in (b"\x89PN", b"\xff\xd8\xff")
