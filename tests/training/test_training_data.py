"""What a selection left is read as it was written, and only where it fits its manifest."""

import json

import pytest
from upath import UPath

from scalselect_assets.resources.samples import parse_row
from tests.bench import Bench
from tests.conftest import sharegpt_row, write_lines
from tests.training.conftest import ROWS, Outputs
from training.training_data import TrainingDataError, read_training_data


def test_versions_are_those_that_the_selection_recorded(made: Bench) -> None:
    data = read_training_data(UPath(made.store / "training_dataset"))
    assert data.version == made.metadata("training_dataset")["scalselect/data_version"]
    assert data.subset_version == made.metadata("selected_subset")["scalselect/data_version"]
    assert data.manifest["basis_version"] == made.metadata("subspace_basis")["scalselect/data_version"]
    assert data.training_file_sha256 == data.version


def test_every_selected_row_and_the_text_rows_that_are_kept_are_there(outputs: Outputs) -> None:
    assert [json.loads(row) for row in outputs.read().rows] == ROWS


def test_a_row_without_an_image_is_a_sample_for_who_trains_on_it() -> None:
    text = json.dumps(ROWS[-1])
    assert parse_row(text).sample is None
    sample = parse_row(text, keep_text_only=True).sample
    assert sample is not None
    assert (sample.images, list(sample.conversation.texts("assistant"))) == ((), ["Hello."])


def test_an_array_is_read_as_rows_whatever_stands_between_them(outputs: Outputs) -> None:
    outputs.write([])
    text = json.dumps(ROWS, indent=2).replace("\n", "\r\n")
    manifest = outputs.manifest | {"training_file": "train.json"}
    path = outputs.folder / "train.json"
    path.write_bytes(text.encode())
    import hashlib

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["train.json"] = {"sha256": sha256, "rows": len(ROWS), "bytes": path.stat().st_size}
    (outputs.folder / "manifest.json").write_text(json.dumps(manifest))
    assert [json.loads(row) for row in outputs.read().rows] == ROWS


def test_a_line_separator_inside_a_row_does_not_end_it(outputs: Outputs) -> None:
    row = sharegpt_row("0.png", answer="one\u2028two\x85three")
    outputs.write([row])
    assert [json.loads(text) for text in outputs.read().rows] == [row]


def test_a_file_that_was_edited_is_refused_with_both_hashes(outputs: Outputs) -> None:
    said = outputs.manifest["data_version"]
    write_lines(outputs.folder / "train.jsonl", ROWS[:-1])
    with pytest.raises(
        TrainingDataError, match=f"{said}.*materialize selected_subset and training_dataset again"
    ):
        outputs.read()


def test_a_subset_that_has_moved_on_without_its_dataset_is_refused(outputs: Outputs) -> None:
    subset = outputs.folder.parent / "selected_subset" / "selected_subset.parquet"
    subset.write_bytes(subset.read_bytes() + b" ")
    with pytest.raises(TrainingDataError, match=r"selected_subset.parquet has SHA-256"):
        outputs.read()


def test_a_wrong_number_of_rows_is_refused(outputs: Outputs) -> None:
    manifest = outputs.manifest
    manifest["files"]["train.jsonl"]["rows"] += 1
    (outputs.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingDataError, match=f"holds {len(ROWS)} rows, its manifest says {len(ROWS) + 1}"):
        outputs.read()


@pytest.mark.parametrize(
    ("file", "message"),
    [("manifest.json", "materialize training_dataset first"), ("train.jsonl", "which is not there")],
)
def test_a_missing_file_says_what_makes_it(outputs: Outputs, file: str, message: str) -> None:
    (outputs.folder / file).unlink()
    with pytest.raises(TrainingDataError, match=message):
        outputs.read()


def test_a_manifest_cut_short_is_reported(outputs: Outputs) -> None:
    path = outputs.folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(TrainingDataError, match="not readable"):
        outputs.read()
