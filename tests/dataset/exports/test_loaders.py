"""The trainers' own loaders read the exports, where they are installed (the extra ``exports-check``)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from upath import UPath

from scalselect_assets.dataset.exports.base import HF_CHUNK_BYTES
from scalselect_assets.dataset.exports.trl_parquet import TrlParquet
from scalselect_assets.dataset.exports.web_dataset import WebDataset
from scalselect_assets.method.representation.conversation import IMAGE
from tests.dataset.exports.conftest import DATASET, HOSTILE, ExportBench, MakeBench, said

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``datasets.load_dataset`` with a cache of its own, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the loader `datasets` is not installed")
    datasets.disable_progress_bars()

    def loaded(*args: Any, **options: Any) -> Any:
        return datasets.load_dataset(*args, split="train", cache_dir=str(tmp_path / "cache"), **options)

    return loaded


def written(made: ExportBench, format_name: str | Any, **spec: Any) -> Path:
    report, folder = made.write(format_name, **spec)
    assert report.preflight.passed, report.preflight.problems
    return Path(folder.path)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def written_messages(made: ExportBench) -> list[list[tuple[str, str]]]:
    return [list(row.turns) for row in made.spooled]


def test_datasets_reads_every_row_of_llama_factory_as_its_description_says(
    bench: MakeBench, load: Load
) -> None:
    made = bench()
    folder = written(made, "llama_factory")
    described = json.loads((folder / "dataset_info.json").read_text())[DATASET]
    rows = load("json", data_files=str(folder / described["file_name"]))
    tags, columns = described["tags"], described["columns"]
    read = [
        [(message[tags["role_tag"]], message[tags["content_tag"]]) for message in row[columns["messages"]]]
        for row in rows
    ]
    assert read == written_messages(made)
    assert [row[columns["images"]] for row in rows] == [list(row.images) for row in made.spooled]
    media = Path(yaml.safe_load((folder / "train_arguments.yaml").read_text())["media_dir"])
    assert all((media / image).is_file() for row in rows for image in row["images"])


def test_datasets_reads_every_row_of_ms_swift(bench: MakeBench, load: Load) -> None:
    made = bench()
    folder = written(made, "ms_swift")
    (described,) = json.loads((folder / "dataset_info.json").read_text())
    rows = load("json", data_files=str(folder / described["dataset_path"]))
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in rows] == written_messages(made)
    assert all(Path(image).is_file() for row in rows for image in row["images"])
    assert rows["channel"][:3] == ["coco", "mllm", '{"name": "two"}']
    assert rows["channel"][3] == "unlabelled"


def test_datasets_reads_every_row_of_axolotl(bench: MakeBench, load: Load) -> None:
    made = bench()
    folder = written(made, "axolotl")
    declared = yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"][0]
    rows = load(declared["ds_type"], data_files=declared["path"])
    images = [
        [
            part["path"]
            for message in row["messages"]
            for part in message["content"]
            if part["type"] == "image"
        ]
        for row in without_nulls(list(rows))
    ]
    assert images == [[str(made.folder / image) for image in row.images] for row in made.spooled]
    assert without_nulls(list(rows)[2])["messages"][0]["content"] == [
        {"type": "image", "path": str(made.folder / "plain.png")},
        {"type": "text", "text": "and"},
        {"type": "image", "path": str(made.folder / "plain.png")},
        {"type": "text", "text": "?"},
    ]


@pytest.mark.parametrize("name", ["llama_factory", "ms_swift", "axolotl"])
def test_datasets_reads_rows_without_images_beyond_the_chunk_that_gives_the_types(
    bench: MakeBench, load: Load, name: str
) -> None:
    text = "x" * (HF_CHUNK_BYTES // 16)
    texts = [said(f"{n}{text}", "So.") for n in range(20)]
    made = bench([*texts, HOSTILE[0], *texts, HOSTILE[1]])
    folder = written(made, name)
    rows = load("json", data_files=str(folder / "train.jsonl"))
    assert len(rows) == 42
    (folder / "train.jsonl").write_text(
        "".join(sorted((folder / "train.jsonl").read_text().splitlines(keepends=True), key=len, reverse=True))
    )
    datasets = pytest.importorskip("datasets")
    with pytest.raises(datasets.exceptions.DatasetGenerationError):  # what the leading row is for
        load("json", data_files=str(folder / "train.jsonl"))


def test_datasets_reads_every_row_of_trl_with_its_images(bench: MakeBench, load: Load) -> None:
    made = bench()
    folder = written(made, TrlParquet(file_bytes=800, group_rows=2))
    assert len(list((folder / "data").iterdir())) > 1
    rows = load(str(folder))  # the card keeps the JSON Lines files out
    assert rows["sample_key"][:] == [row.sample_key for row in made.spooled]
    for row, expected in zip(rows, made.spooled, strict=True):
        assert [image.size for image in row["images"]] == [(48, 40)] * len(expected.images)
        for image, path in zip(row["images"], expected.images, strict=True):
            assert image.tobytes() == Image.open(made.folder / path).tobytes()
        turns = [(turn.role, list(turn.parts)) for turn in expected.conversation.turns]
        read = [
            (m["role"], [IMAGE if part["type"] == "image" else part["text"] for part in m["content"]])
            for m in row["messages"]
        ]
        assert read == turns


def test_trl_puts_each_image_in_its_place(bench: MakeBench, load: Load) -> None:
    pytest.importorskip("trl", reason="the trainer `trl` is not installed")
    from trl.data_utils import prepare_multimodal_messages

    made = bench()
    for row, expected in zip(load(str(written(made, "trl"))), made.spooled, strict=True):
        prepared = prepare_multimodal_messages(row["messages"], images=row["images"])
        placed = [part["image"] for m in prepared for part in m["content"] if part["type"] == "image"]
        assert placed == row["images"]
        assert len(placed) == len(expected.images)
        texts = [part["text"] for m in prepared for part in m["content"] if part["type"] == "text"]
        assert texts == list(expected.conversation.texts("system", "user", "assistant"))


def test_trls_collator_makes_a_batch_of_all_rows(bench: MakeBench, load: Load, demo_vlm: Path) -> None:
    pytest.importorskip("trl", reason="the trainer `trl` is not installed")
    from transformers import AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    made = bench()
    rows = list(load(str(written(made, "trl"))))
    processor = AutoProcessor.from_pretrained(demo_vlm)
    batch = DataCollatorForVisionLanguageModeling(processor, max_length=None)(rows)
    assert batch["input_ids"].shape[0] == len(HOSTILE)
    assert batch["pixel_values"].shape[0] == sum(len(row.images) for row in made.spooled)


def test_webdataset_reads_every_row_with_its_images(bench: MakeBench) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the loader `webdataset` is not installed")
    made = bench()
    folder = written(made, WebDataset(shard_bytes=2_000))
    shards = [shard["url"] for shard in json.loads((folder / "shards.json").read_text())["shardlist"]]
    assert len(shards) > 1
    read = webdataset.WebDataset([str(folder / shard) for shard in shards], shardshuffle=False).decode("pil")
    samples = list(read)
    assert [sample["json"]["sample_key"] for sample in samples] == [row.sample_key for row in made.spooled]
    for sample, row in zip(samples, made.spooled, strict=True):
        assert [(m["role"], m["content"]) for m in sample["json"]["messages"]] == list(row.turns)
        images = [sample[field] for field in sample["json"]["images"]]
        assert [image.tobytes() for image in images] == [
            Image.open(made.folder / path).tobytes() for path in row.images
        ]
        assert {name for name in sample if not name.startswith("__")} == {"json", *sample["json"]["images"]}


def test_llama_factorys_converter_takes_every_row(bench: MakeBench, load: Load) -> None:
    # Its package imports more than its reader needs; what of that is missing, it says itself.
    pytest.importorskip(
        "llamafactory.data.converter",
        reason="the trainer `llamafactory` is not installed with its dependencies",
        exc_type=ImportError,
    )
    from llamafactory.data.converter import SharegptDatasetConverter
    from llamafactory.data.parser import get_dataset_list

    made = bench()
    folder = written(made, "llama_factory")
    (described,) = get_dataset_list([DATASET], str(folder))

    class DataArguments:
        media_dir = yaml.safe_load((folder / "train_arguments.yaml").read_text())["media_dir"]

    convert = SharegptDatasetConverter(described, DataArguments)
    for row, expected in zip(
        load("json", data_files=str(folder / described.dataset_name)), made.spooled, strict=True
    ):
        converted = convert(row)
        messages = [*converted["_prompt"], *converted["_response"]]
        assert [(m["role"], m["content"]) for m in messages] == list(expected.dialogue)
        assert (converted["_system"] or None) == expected.system
        images = [str(made.folder / image) for image in expected.images]
        assert (converted["_images"] or []) == images


def test_ms_swifts_preprocessor_deletes_no_row(bench: MakeBench, load: Load) -> None:
    pytest.importorskip(
        "swift.dataset.preprocessor.core",
        reason="the trainer `ms-swift` is not installed with its dependencies",
        exc_type=ImportError,
    )
    from swift.dataset.preprocessor.core import AutoPreprocessor

    made = bench()
    rows = load("json", data_files=str(written(made, "ms_swift") / "train.jsonl"))
    processed = AutoPreprocessor()(rows, strict=True, load_from_cache_file=False)
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in processed] == written_messages(
        made
    )
    assert [[image["path"] for image in row["images"] or []] for row in processed] == [
        [str(made.folder / image) for image in row.images] for row in made.spooled
    ]
    assert processed["channel"][:] == [row.label("source") for row in made.spooled]


def test_the_pools_own_reader_takes_the_llava_export_as_it_was(bench: MakeBench) -> None:
    from scalselect_assets.resources.samples import written_turns
    from scalselect_assets.resources.shard_reader import iter_rows

    made = bench()
    folder = written(made, "llava")
    keys = {row.sample_key: row for row in made.spooled}
    for read in iter_rows(UPath(folder / "train.json")):
        row = json.loads(read.text)
        expected = keys[row["sample_key"]]
        assert ("image" in row) == bool(expected.images)
        assert written_turns(read.text) == expected.turns
