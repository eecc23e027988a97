"""Every chosen row is in an export or in its rejected.jsonl, whatever format, order and images are."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from upath import UPath

from scalselect_assets.dataset.exports import publish
from scalselect_assets.dataset.exports.placed_images import IMAGES, ExportError
from scalselect_assets.dataset.exports.publish import EXPORTS, write_exports
from scalselect_assets.dataset.exports.rows import ExportRow, RowSpool
from scalselect_assets.declaration.export_specs import FORMAT_NAMES, ExportSpec, parse_exports
from scalselect_assets.resources.folders import NewFolder, WrittenFile
from scalselect_assets.resources.image_root import ImageRoot
from tests.conftest import png_bytes
from tests.dataset.exports.conftest import HOSTILE, MakeBench, said

FORMATS = sorted(EXPORTS)
REFERRING = [name for name in FORMATS if not EXPORTS[name].embeds_images]


def test_every_declared_format_is_there() -> None:
    assert sorted(FORMAT_NAMES) == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_written_or_told_with_a_reason(bench: MakeBench, name: str) -> None:
    made = bench()
    made.spool.add_rejection({"sample_key": "k", "by": "pool", "reason": "malformed_row"})
    report, folder = made.write(name)
    assert report.preflight.passed, report.preflight.problems
    selected, rejected = (made.lines(folder / file) for file in (publish.SELECTED, publish.REJECTED))
    refused = [record for record in rejected if record["by"] == name]
    keys = {row.sample_key for row in made.spooled}
    assert {record["sample_key"] for record in selected} | {
        record["sample_key"] for record in refused
    } == keys
    assert len(selected) + len(refused) == len(HOSTILE)
    assert report.written == len(selected) == report.preflight.rows
    assert sum(report.refused.values()) == len(refused) == len(rejected) - 1
    assert all(record["reason"] and record["detail"] for record in refused)


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_tells_what_is_on_the_disk(bench: MakeBench, name: str) -> None:
    report, folder = bench().write(name, images="copied")
    on_disk = {str(path.relative_to(folder)) for path in Path(folder.path).rglob("*") if path.is_file()}
    beside = {path for path in on_disk if path.startswith("images/")}
    assert on_disk - beside == set(report.files)
    assert len(beside) == report.image_files
    for path, file in report.files.items():
        data = (folder / path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.bytes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", ["pool", "score", "shuffled"])
def test_a_second_time_gives_the_same_bytes(bench: MakeBench, name: str, order: str) -> None:
    made = bench()
    first, _ = made.write(name, order=order, seed=5)
    second, _ = made.write(name, order=order, seed=5)
    assert first == second


def _place(row: ExportRow, seed: int) -> bytes:
    """Where a row stands among others in the order of a seed, on every machine."""
    who = hashlib.sha256(json.dumps([row.sample_key, row.shard]).encode()).digest()[:16]
    return hashlib.sha256(f"{seed}:".encode() + who).digest()[:16]


def test_orders_are_the_pools_the_ranks_and_the_seeds(bench: MakeBench) -> None:
    made = bench()

    def rows(**spec: Any) -> list[int]:
        _, folder = made.write("webdataset", **spec)
        return [record["row"] for record in made.lines(folder / publish.SELECTED)]

    assert rows(order="pool") == list(range(8))
    assert rows(order="score") == [5, 4, 3, 2, 1, 0, 6, 7]  # without an image, there is no score
    shuffled = rows(order="shuffled", seed=1)
    assert sorted(shuffled) == list(range(8))
    assert len({tuple(rows(order="shuffled", seed=seed)) for seed in range(4)}) == 4
    assert shuffled == sorted(range(8), key=lambda place: _place(made.spooled[place], seed=1))


def test_a_row_that_comes_leaves_the_shuffled_order_of_the_others(bench: MakeBench) -> None:
    with RowSpool() as spool:
        for row in bench().spooled[1:]:
            spool.add(row)
        fewer = [spool[place].row for place in spool.order("shuffled", 3)]
        made = bench()
        all_rows = [made.spool[place].row for place in made.spool.order("shuffled", 3)]
    assert [row for row in all_rows if row != 0] == fewer


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "axolotl"])
def test_a_row_with_an_image_leads_where_the_reader_takes_types_from_the_first(
    bench: MakeBench, name: str
) -> None:
    made = bench([*HOSTILE[6:], *HOSTILE[:2]])
    report, folder = made.write(name)
    assert report.leading == [made.spooled[2].sample_key]
    assert [record["row"] for record in made.lines(folder / publish.SELECTED)] == [2, 0, 1, 3]
    assert report.written == 4


@pytest.mark.parametrize("name", REFERRING)
def test_images_are_copied_once_and_by_content(bench: MakeBench, name: str) -> None:
    made = bench()
    (made.folder / "upper.JPEG").write_bytes((made.folder / "plain.png").read_bytes())
    made = bench(HOSTILE[:3])
    report, folder = made.write(name, images="copied")
    listed = made.lines(folder / IMAGES)
    for image in listed:
        data = (folder / image["file"]).read_bytes()
        assert data == (made.folder / image["image"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == image["sha256"] in image["file"]
    assert report.image_files == len(listed) == 2
    assert report.images_base == str(folder)
    assert report.preflight.passed


@pytest.mark.parametrize("name", REFERRING)
def test_linked_images_are_the_pools_own_files(bench: MakeBench, name: str) -> None:
    made = bench()
    _, folder = made.write(name, images="hardlinked")
    for image in made.lines(folder / IMAGES):
        assert (folder / image["file"]).stat().st_ino == (made.folder / image["image"]).stat().st_ino


def test_an_image_that_becomes_a_link_after_it_was_read_is_linked_as_it_was_read(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, hard_link, secret = bench(), NewFolder.hard_link, tmp_path / "secret"
    secret.write_bytes(b"secret")

    def swapped_first(self: NewFolder, name: str, source: BinaryIO, known: WrittenFile) -> None:
        for image in sorted(made.folder.rglob("*")):
            if not image.is_symlink() and image.stat().st_ino == os.fstat(source.fileno()).st_ino:
                image.rename(tmp_path / f"moved-{image.name}")
                image.symlink_to(secret)
        hard_link(self, name, source, known)

    monkeypatch.setattr(NewFolder, "hard_link", swapped_first)
    _, folder = made.write("llava", images="hardlinked")
    listed = made.lines(folder / IMAGES)
    assert listed
    for image in listed:
        data = (folder / image["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == image["sha256"]
        assert (made.folder / image["image"]).is_symlink()


def test_links_across_file_systems_say_what_to_declare(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(*_: object, **__: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", other_device)
    with pytest.raises(ExportError, match="declare `images: copied`"):
        bench().write("llava", images="hardlinked")


@pytest.mark.parametrize(
    ("name", "images"),
    [("llava", "copied"), ("llava", "hardlinked"), ("trl", "referenced"), ("webdataset", "referenced")],
)
def test_an_image_that_changed_since_it_was_embedded_refuses_its_rows(
    bench: MakeBench, name: str, images: str
) -> None:
    made = bench(HOSTILE[:2])
    (made.folder / "plain.png").write_bytes(png_bytes(12345))
    report, folder = made.write(name, images=images)
    assert report.refused == {"image_changed": 1}
    (told,) = made.lines(folder / publish.REJECTED)
    assert (told["id"], told["row"]) == ("7", 0)
    assert "row 0 of shard 'b.jsonl' (id '7')" in told["detail"]
    assert "'plain.png'" in told["detail"]
    assert report.preflight.passed


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_that_is_gone_refuses_its_rows(bench: MakeBench, name: str) -> None:
    made = bench(HOSTILE[:2])
    (made.folder / "plain.png").unlink()
    report, _ = made.write(name)
    assert report.refused == {"image_missing": 1}
    assert report.written == 1


def test_an_export_without_rows_does_not_pass(bench: MakeBench) -> None:
    made = bench([said("<image><image>?", "Two.", images=["a.png", "b.png"])])
    report, _ = made.write("llava")
    assert report.refused == {"several_images": 1}
    assert report.preflight.problems == ["no row is left to train on"]


def test_what_fails_halfway_leaves_the_last_export(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench()
    before, folder = made.write("trl")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(ImageRoot, "read", full)
        with pytest.raises(OSError, match="No space"):
            made.write("trl", order="score")
    assert [path.name for path in folder.parent.iterdir()] == ["trl"]
    for path, file in before.files.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == file.sha256


@pytest.mark.parametrize("images", ["referenced", "copied"])
@pytest.mark.parametrize("name", FORMATS)
def test_exports_go_into_an_object_store(bench: MakeBench, name: str, images: str) -> None:
    target = UPath(f"memory://exports-{name}-{images}")
    made = bench(target=target)
    before, folder = made.write(name, images=images)
    report, _ = made.write(name, images=images)
    assert report == before
    assert report.preflight.passed, report.preflight.problems
    assert [path.name for path in target.iterdir()] == [name]
    for path, file in report.files.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == file.sha256
    found = [path for path in folder.fs.find(folder.path) if "/images/" in path]
    assert len(found) == report.image_files


def test_links_into_an_object_store_say_what_to_declare(bench: MakeBench) -> None:
    with pytest.raises(ExportError, match="declare `images: copied`"):
        bench(target=UPath("memory://linked")).write("llava", images="hardlinked")


def test_only_declared_exports_stay(bench: MakeBench) -> None:
    made = bench()
    specs = [ExportSpec(format="llava"), ExportSpec(format="trl")]
    reports = write_exports(specs, made.spool, made.source, made.target, "d")
    assert list(reports) == ["llava", "trl"]
    (made.target / ".making-llava").mkdir()  # of a process that was killed
    publish.remove_others(made.target, ["trl"])
    assert [path.name for path in made.target.iterdir()] == ["trl"]
    publish.remove_others(made.target, [])
    assert not made.target.exists()


def test_the_command_line_names_formats_and_settings() -> None:
    assert parse_exports(["llama_factory", "trl:order=score,seed=3"]) == [
        ExportSpec(format="llama_factory"),
        ExportSpec(format="trl", order="score", seed=3),
    ]
    for wrong, message in (
        (["alpaca"], "unknown export format 'alpaca'; there are llama_factory, llava"),
        (["trl:order=random"], "order"),
        (["trl:colour=red"], "colour"),
        (["trl", "trl:seed=1"], "trl is declared twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_exports(wrong)


def test_no_file_of_an_export_is_written_twice_or_outside(bench: MakeBench) -> None:
    from scalselect_assets.resources.folders import replaced_folder

    with replaced_folder(bench().target / "any") as folder:
        folder.write("a/b", b"1", rows=1)
        assert folder.files["a/b"] == WrittenFile(hashlib.sha256(b"1").hexdigest(), 1, 1)
        for name in ("a/b", "../out", "/out", ""):
            with pytest.raises(ValueError, match="is"):
                folder.write(name, b"2")


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_says_why_it_refuses(bench: MakeBench, name: str) -> None:
    asked, asked_more = said("<image>?", "Yes.")["messages"], said("So?", "So.")["messages"]
    cases = {
        "system": said("<image>?", "Yes.", images=["a.png"], system="Be brief."),
        "several": said("<image><image>?", "Yes.", images=["a.png", "b.png"]),
        "unanswered": said("<image>?", "Yes.", "And?", images=["a.png"]),
        "twice": {"messages": [*asked, {"role": "assistant", "content": "Sure."}], "images": ["a.png"]},
        "late system": {"messages": [*asked, {"role": "system", "content": "Hm."}, *asked_more],
                        "images": ["a.png"]},
        "answers first": {"messages": [{"role": "assistant", "content": "Hi."}, *asked], "images": ["a.png"]},
        "image in answer": said("Draw?", "<image>", images=["a.png"]),
        "image in system": said("Draw?", "So.", images=["a.png"], system="Like <image>"),
        "other media": said("<image> or what?", "<video>", images=["a.png"]),
        "separator": said("<image>?", "Strike: <s>x</s>", images=["a.png"]),
        "image token": said("<image>?", "<|im_start|>", images=["a.png"]),
        "context token": said("<image>?", "So: </img>", images=["a.png"]),
        "wordless": said(" ", ""),
    }  # fmt: skip
    plain = said("<image>?", "Yes.", images=["a.png"])
    _, folder = (made := bench([plain, *cases.values()])).write(name)
    found = {list(cases)[told["row"] - 1]: told["reason"] for told in made.lines(folder / publish.REJECTED)}
    turns = dict.fromkeys(["unanswered", "twice", "late system", "answers first"], "turn_order")
    systems = dict.fromkeys(["system", "late system", "image in system"], "system_turn")
    expected = {
        "llama_factory": {**turns, "image in system": "image_place"},
        "llava": {**turns, **systems, "several": "several_images", "separator": "reserved_text",
                  "wordless": "empty_text"},
        "llava_next": {**turns, **systems, "wordless": "empty_text"},
        "qwen_vl": {**turns, **systems, "image in answer": "image_place", "image token": "reserved_text"},
        "ms_swift": {"unanswered": "turn_order", "late system": "turn_order"},
        "internvl": {"late system": "system_turn", "image in answer": "image_place",
                     "image in system": "image_place", "context token": "reserved_text"},
        "axolotl": {},
        "trl": {},
        "webdataset": {},
    }  # fmt: skip
    assert found == {"other media": "reserved_text", **expected[name]}


def test_rejections_of_the_pool_are_told_as_the_pool_told_them(bench: MakeBench) -> None:
    made = bench(HOSTILE[:1])
    rejected = {"shard": "s", "file": "f", "row": 3, "line": 9, "sample_key": "k", "source_id": "é",
                "text": "{}", "reason": "malformed_row", "detail": "none"}  # fmt: skip
    made.spool.add_rejection(publish.pool_record("s", rejected))
    _, folder = made.write("llava")
    assert json.loads((folder / publish.REJECTED).read_text(encoding="utf-8")) == {
        "sample_key": "k", "id": "é", "shard": "s", "row": 3, "line": 9, "by": "pool",
        "reason": "malformed_row", "detail": "none"}  # fmt: skip
