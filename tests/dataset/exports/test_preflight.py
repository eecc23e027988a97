"""A preflight that cannot fail proves nothing: each rule is broken on the written files, and told."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalselect_assets.dataset.exports.base import HF_CHUNK_BYTES, PlacedImage, PlacedRow, Preflight, Setting
from scalselect_assets.dataset.exports.publish import EXPORTS
from scalselect_assets.dataset.exports.trl_parquet import SCHEMA
from scalselect_assets.declaration.export_specs import ExportSpec
from scalselect_assets.resources.folders import NewFolder, replaced_folder
from tests.dataset.exports.conftest import DATASET, ExportBench, MakeBench, said

PLAIN = [
    said("<image>\nWhat?", "Noise.", images=["a.png"], id="a"),
    said("<image>, <image>?", "Same.", images=["a.png", "b.png"], id="b"),
    said("Alone?", "Yes.", id="c"),
]


def preflight(made: ExportBench, name: str, tamper: Callable[[NewFolder], object]) -> Preflight:
    export = EXPORTS[name]
    setting = Setting(
        ExportSpec(format=export.name),
        DATASET,
        str(made.folder),
        lambda reference: (made.folder / reference).is_file(),
    )
    placed = [
        PlacedRow(
            row,
            tuple(
                PlacedImage(path, sha256, (made.folder / path).read_bytes())
                for path, sha256 in zip(row.images, row.image_sha256, strict=True)
            ),
        )
        for row in made.spooled
        if export.refuses(row) is None
    ]
    with replaced_folder(made.target / name) as folder:
        export.write(placed, folder, setting)
        tamper(folder)
        return export.preflight(folder, setting)


def replaced(file: str, old: str, new: str) -> Callable[[NewFolder], object]:
    def tamper(folder: NewFolder) -> None:
        path = Path(folder.path(file).path)
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old} is not in {text}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return tamper


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_untouched_files_pass(bench: MakeBench, name: str) -> None:
    verdict = preflight(bench(PLAIN), name, lambda _: None)
    several = name != "llava"
    assert verdict == Preflight(rows=2 + several, images=1 + 2 * several, text_only=1)


TAMPERED = [
    ("llama_factory", "dataset_info.json", '"train.jsonl"', '"other.jsonl"', "names other.jsonl"),
    ("llama_factory", "dataset_info.json", DATASET, "else", "does not describe"),
    ("llama_factory", "train.jsonl", '"role": "user"', '"role": "assistant"', "turn 0 is of role"),
    ("llama_factory", "train.jsonl", "<image>", "", "0 image marks for 1 images"),
    ("llama_factory", "train.jsonl", "Noise.", "<video>", "a bare <video> in its text"),
    ("llama_factory", "train.jsonl", "a.png", "gone.png", "image 'gone.png' is not at"),
    ("llama_factory", "train.jsonl", '["a.png"]', "null", "`images` is no list"),
    ("llama_factory", "train.jsonl", '"Noise."', "null", "a content is no text"),
    ("llama_factory", "train.jsonl", "}\n", "\n", "cannot be read|no JSON object"),
    ("llava", "train.json", '"image": "a.png", ', "", "1 image marks for 0 images"),
    ("llava", "train.json", '"image": "a.png"', '"image": ["a.png"]', "`image` is no single path"),
    ("llava", "train.json", '"from": "gpt"', '"from": "human"', "turn 1 is of role 'human'"),
    ("llava", "train.json", "Noise.", "Noise.</s>", "a separator"),
    ("llava", "train.json", "Noise.", "Lärm.", "not ASCII"),
    ("llava", "train.json", "a.png", "gone.png", "image 'gone.png'"),
    ("llava", "arguments.txt", "train.json", "train.jsonl", "does not name train.json"),
    ("llava_next", "data.yaml", "all", "first:1", "does not name all"),
    ("llava_next", "train.json", '["a.png", "b.png"]', "[]", "`image` is empty"),
    ("llava_next", "train.json", '"from": "human"', '"from": "system"', "turn 0 is of role 'system'"),
    ("qwen_vl", "data_dict_entry.py", "train.jsonl", "train.json", "does not name train.jsonl"),
    ("qwen_vl", "train.jsonl", "Noise.", "<|image_pad|>", "a mark of the trainer's own"),
    ("qwen_vl", "train.jsonl", "<image>", "", "0 image marks for 1 images"),
    ("qwen_vl", "train.jsonl", '"from": "human"', '"from": "system"', "turn 0 is of role 'system'"),
    ("ms_swift", "dataset_info.json", "train.jsonl", "other.jsonl", "names other.jsonl"),
    ("ms_swift", "train.jsonl", '"channel": "unlabelled"', '"channel": null', "`channel` is no text"),
    ("ms_swift", "train.jsonl", '"role": "assistant"', '"role": "user"', "the last turn has no answer"),
    ("axolotl", "axolotl.yaml", "sample_packing: false", "sample_packing: true", "lacks one of"),
    ("axolotl", "axolotl.yaml", "train.jsonl", "train.json", "does not name train.jsonl"),
    ("axolotl", "train.jsonl", '"id":', '"images": [], "id":', "uses one image only"),
    ("axolotl", "train.jsonl", '"path":', '"url":', "neither a text nor an image"),
    ("axolotl", "train.jsonl", "a.png", "gone.png", "image 'gone.png'"),
    ("internvl", "meta.json", '"length": 3', '"length": 4', "length is not 3"),
    ("internvl", "meta.json", '"repeat_time": 1', '"repeat_time": 0.5', "only the first rows"),
    ("internvl", "train.jsonl", '"image": "a.png"', '"image": []', "1 image marks for 0 images"),
    ("internvl", "train.jsonl", "<image>\\nWhat?", "What?", "a mark would be put before"),
    ("internvl", "train.jsonl", '"from": "gpt"', '"from": "tool"', "roles"),
    ("internvl", "train.jsonl", '"length": 17', '"length": 0', "length 0"),
    ("internvl", "train.jsonl", "Noise.", "</img>", "an image token"),
    ("webdataset", "shards.json", '"nsamples": 3', '"nsamples": 2', "has 3 samples, not 2"),
    ("webdataset", "shards.json", "train-000000.tar", "train-000001.tar", "names other shards"),
    ("trl", "README.md", "train-*.parquet", "*", "does not name the files"),
]


@pytest.mark.parametrize(("name", "file", "old", "new", "told"), TAMPERED)
def test_a_broken_rule_is_reported(
    bench: MakeBench, name: str, file: str, old: str, new: str, told: str
) -> None:
    if (name, new) == ("webdataset", "train-000001.tar"):

        def tamper(folder: NewFolder) -> None:
            replaced(file, old, new)(folder)
            Path(folder.path(old).path).rename(folder.path(new).path)
    else:
        tamper = replaced(file, old, new)
    verdict = preflight(bench(PLAIN), name, tamper)
    assert not verdict.passed
    assert re.search(told, "\n".join(verdict.problems)), verdict.problems


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row["images"].clear(), "1 parts for 0 images"),
        (lambda row: row.update(images=None), "`images` is null"),
        (lambda row: row["messages"][0].update(role="human"), "roles"),
        (lambda row: row["messages"].pop(), "no answer"),
        (lambda row: row["messages"][1]["content"][0].update(text=None), "a text is null"),
        (lambda row: row["messages"][1]["content"][0].update(type="video"), "parts of types"),
        (lambda row: row["images"][0].update(bytes=b"no image"), "cannot be opened"),
    ],
)
def test_a_broken_parquet_row_is_reported(
    bench: MakeBench, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    def tamper(folder: NewFolder) -> None:
        path = folder.path("data/train-00000.parquet").path
        rows = pq.read_table(path).to_pylist()
        change(rows[0])
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)

    problems = preflight(bench(PLAIN), "trl", tamper).problems
    assert any(told in problem for problem in problems), problems


def test_parquet_that_does_not_tell_its_images_is_reported(bench: MakeBench) -> None:
    def tamper(folder: NewFolder) -> None:
        path = folder.path("data/train-00000.parquet").path
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)

    assert preflight(bench(PLAIN), "trl", tamper).problems == ["data/train-00000.parquet: images untold"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda members: [*members[:1], *members[2:]], "has the fields"),
        (lambda members: members[1:], "has no json"),
        (lambda members: [members[0], members[0], *members[1:]], "is there twice"),
        (lambda members: [*members[2:], *members[:2]], "where 0 is next"),
        (lambda members: [("nodot", b""), *members], "is no key with a field"),
        (lambda members: [members[0], (members[1][0], b"no image"), *members[2:]], "cannot be opened"),
    ],
)
def test_a_broken_shard_is_reported(
    bench: MakeBench, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], told: str
) -> None:
    def tamper(folder: NewFolder) -> None:
        path = folder.path("train-000000.tar").path
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w") as tar:
            for name, data in change(members):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    problems = preflight(bench(PLAIN), "webdataset", tamper).problems
    assert any(told in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "axolotl"])
def test_a_first_image_beyond_the_chunk_that_gives_the_types_is_reported(bench: MakeBench, name: str) -> None:
    def tamper(folder: NewFolder) -> None:
        path = Path(folder.path("train.jsonl").path)
        *others, text_only = path.read_text().splitlines(keepends=True)
        long = json.dumps({**json.loads(text_only), "more": "x" * (HF_CHUNK_BYTES // 8)}) + "\n"
        path.write_text("".join([long] * 9 + others))

    (problem,) = preflight(bench(PLAIN), name, tamper).problems
    assert "the first row with an image begins at byte" in problem
