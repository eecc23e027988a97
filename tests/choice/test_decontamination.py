"""Samples that an evaluation set holds already are found, by image or by text, and nothing else is."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from PIL import Image

from scalselect_assets.choice import decontamination, image_hashes
from scalselect_assets.choice.decontamination import (
    DECONTAMINATION,
    contaminated,
    evaluation_version,
    read_evaluation_set,
    trainable,
)
from scalselect_assets.choice.text_overlap import NgramIndex, words
from scalselect_assets.declaration.curation import Decontamination
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.columns import polars_schema
from scalselect_assets.resources.evaluation_set import EvaluationSetError, EvaluationText
from scalselect_assets.resources.storage import StorageResource
from tests.conftest import png_bytes, sharegpt_row, write_lines

SHARD = "a.jsonl"
LONG = (
    "Which of the two instruments on the left table was restored by the museum "
    "in the year after the great fire"
)


def photograph(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Smooth seeded structure at three scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3))
    for cells, share in ((4, 0.55), (12, 0.3), (40, 0.15)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += share * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    x, y = round(width * share), round(height * share)
    return image.crop((x, y, width - x, height - y))


def write_images(folder: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def looked_at(folder: Path, settings: Decontamination) -> pl.DataFrame:
    """What is found in the shard of the pool at ``folder / "pool"``, without Dagster."""
    storage, store = StorageResource(), str(folder / "store")
    source = storage.samples(str(folder / "pool"), None, store)
    raw = trainable(raw_samples.read_rows(source, SHARD))
    images = raw["images"].explode().drop_nulls().to_list()
    hashes, _ = image_hashes.shard_hashes(storage.artifacts(store), SHARD, "v1", images, source.open_image)
    return contaminated(raw, hashes, read_evaluation_set(storage, store, settings), settings)


def pool_of_images(folder: Path, images: dict[str, bytes]) -> None:
    write_images(folder / "pool" / "images", images)
    write_lines(
        folder / "pool" / SHARD,
        [sharegpt_row(f"images/{name}", f"<image>\nIs it {name}?", id=name) for name in images],
    )


def pool_of_texts(folder: Path, *texts: str) -> None:
    """One image, one question per row."""
    write_images(folder / "pool", {"one.png": png_bytes(1)})
    write_lines(folder / "pool" / SHARD, [sharegpt_row("one.png", f"<image>\n{text}") for text in texts])


def texts_found(folder: Path, *evaluation: str, **settings: Any) -> pl.DataFrame:
    write_lines(folder / "benchmark.txt", evaluation)
    return looked_at(folder, Decontamination(texts=str(folder / "benchmark.txt"), **settings))


# Images


@pytest.fixture
def one_evaluation_image(tmp_path: Path) -> Path:
    return write_images(tmp_path / "evaluation", {"split/7.png": encoded(photograph(7))})


@pytest.mark.parametrize(
    ("disguise", "most"),
    [
        (encoded, 0),
        (lambda image: encoded(image, "JPEG", quality=60), 2),
        (lambda image: encoded(image, "WEBP", quality=50), 2),
        (lambda image: encoded(image.resize((160, 120))), 2),
        (lambda image: encoded(image.resize((700, 500)), "JPEG"), 2),
        (lambda image: encoded(image.convert("L")), 2),
        (lambda image: encoded(cropped(image, 0.01), "JPEG"), 4),
    ],
    ids=["the file itself", "JPEG", "WebP", "half the size", "larger", "grey", "cropped slightly"],
)
def test_an_evaluation_image_is_found_under_a_disguise(
    tmp_path: Path, one_evaluation_image: Path, disguise: Callable[[Image.Image], bytes], most: int
) -> None:
    others = {f"other-{seed}.png": encoded(photograph(seed)) for seed in range(20, 30)}
    pool_of_images(tmp_path, {**others, "same": disguise(photograph(7))})
    (found,) = looked_at(tmp_path, Decontamination(images=str(one_evaluation_image))).rows(named=True)
    assert (found["source_id"], found["reason"], found["partner"]) == (
        "same",
        "evaluation_image",
        "split/7.png",
    )
    assert found["distance"] <= most
    assert found["overlap"] is None
    assert "images/same" in found["detail"]


def test_the_distance_that_counts_is_a_setting(tmp_path: Path, one_evaluation_image: Path) -> None:
    image = cropped(photograph(7), 0.03)
    pool_of_images(tmp_path, {"cropped.png": encoded(image), "same.png": encoded(photograph(7))})

    def found(max_hamming: int | None) -> list[str]:
        settings = Decontamination(images=str(one_evaluation_image), max_hamming=max_hamming)
        return looked_at(tmp_path, settings)["source_id"].to_list()

    assert found(None) == found(0) == ["same.png"]
    assert found(20) == ["cropped.png", "same.png"]


def test_an_image_at_exactly_the_distance_is_found_and_one_bit_nearer_is_asked_for_in_vain(
    tmp_path: Path,
) -> None:
    evaluation = write_images(tmp_path / "evaluation", {"e.png": encoded(photograph(1))})
    pool_of_images(tmp_path, {"near.png": encoded(cropped(photograph(1), 0.02))})
    near, other = (
        image_hashes._hash_or_none(encoded(image)) for image in (cropped(photograph(1), 0.02), photograph(1))
    )
    assert near is not None
    assert other is not None
    distance = (near ^ other).bit_count()
    assert distance > 0
    for allowed, n_found in ((distance, 1), (distance - 1, 0)):
        settings = Decontamination(images=str(evaluation), max_hamming=allowed)
        assert looked_at(tmp_path, settings).height == n_found


def test_the_nearest_of_several_evaluation_images_is_the_partner(tmp_path: Path) -> None:
    exact = encoded(photograph(3))
    evaluation = write_images(
        tmp_path / "evaluation",
        {"a.jpg": encoded(cropped(photograph(3), 0.02), "JPEG"), "b.png": exact, "c.png": exact},
    )
    pool_of_images(tmp_path, {"x.png": exact})
    (found,) = looked_at(tmp_path, Decontamination(images=str(evaluation), max_hamming=20)).rows(named=True)
    assert (found["partner"], found["distance"]) == ("b.png", 0)


def test_pictures_of_one_colour_are_the_same_only_byte_for_byte(tmp_path: Path) -> None:
    grey, white = (Image.new("RGB", (64, 64), (level,) * 3) for level in (128, 255))
    evaluation = write_images(tmp_path / "evaluation", {"blank.png": encoded(grey)})
    pool_of_images(tmp_path, {"white.png": encoded(white), "grey.png": encoded(grey)})
    assert looked_at(tmp_path, Decontamination(images=str(evaluation)))["source_id"].to_list() == ["grey.png"]


def test_a_damaged_image_is_compared_by_its_bytes_and_matches_nothing_else(tmp_path: Path) -> None:
    whole = encoded(photograph(7))
    evaluation = write_images(tmp_path / "evaluation", {"7.png": whole})
    pool_of_images(tmp_path, {"cut.png": whole[: len(whole) // 2], "7.png": whole})
    assert looked_at(tmp_path, Decontamination(images=str(evaluation)))["source_id"].to_list() == ["7.png"]


def test_any_of_a_rows_images_contaminates_it(tmp_path: Path, one_evaluation_image: Path) -> None:
    write_images(tmp_path / "pool", {"a.png": png_bytes(1), "b.jpg": encoded(photograph(7), "JPEG")})
    write_lines(tmp_path / "pool" / SHARD, [sharegpt_row(["a.png", "b.jpg"], "<image><image>\nWhich?")])
    (found,) = looked_at(tmp_path, Decontamination(images=str(one_evaluation_image))).rows(named=True)
    assert "b.jpg" in found["detail"]


def test_the_search_over_hashes_equals_the_naive_one_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    hashes, others = (rng.integers(0, 2**64, n, dtype=np.uint64) for n in (57, 23))
    others[11] = others[4] = hashes[30]
    naive = [[(int(one) ^ int(other)).bit_count() for other in others] for one in hashes]
    for cells in (1, 100, 10_000):
        monkeypatch.setattr(image_hashes, "_BLOCK_CELLS", cells)
        places, distances = image_hashes.nearest(hashes, others)
        assert distances.tolist() == [min(row) for row in naive]
        assert places.tolist() == [row.index(min(row)) for row in naive]
    assert places[30] == 4


def test_remembered_hashes_spare_what_was_decoded_before(tmp_path: Path) -> None:
    artifacts = StorageResource().artifacts(str(tmp_path))
    files = {"a.png": png_bytes(1), "b.png": png_bytes(2), "bad.png": b"\x89PNG nothing"}
    opened: list[str] = []

    def open_image(path: str) -> bytes:
        opened.append(path)
        return files[path]

    def look(version: str, *images: str) -> tuple[list[int | None], int, int]:
        opened.clear()
        frame, decoded = image_hashes.shard_hashes(artifacts, SHARD, version, images, open_image)
        return frame["phash"].to_list(), decoded, len(opened)

    first, decoded, read = look("v1", "b.png", "a.png", "a.png", "bad.png")
    assert (decoded, read) == (3, 3)
    assert first[2] is None
    assert look("v1", "a.png", "b.png", "bad.png") == (first, 0, 0)
    files["a.png"] = png_bytes(3)
    changed, decoded, read = look("v2", "a.png", "b.png", "bad.png")
    assert (decoded, read) == (1, 3)
    assert changed[0] != first[0]
    assert changed[1:] == first[1:]
    artifacts.path(image_hashes.IMAGE_HASHES, SHARD, suffix=".parquet").write_bytes(b"damaged")
    assert look("v2", "a.png", "b.png", "bad.png") == (changed, 3, 3)


def test_an_image_that_is_gone_or_outside_the_root_matches_nothing(tmp_path: Path) -> None:
    def open_image(path: str) -> bytes:
        raise FileNotFoundError(path) if path == "gone.png" else PermissionError(path)

    artifacts = StorageResource().artifacts(str(tmp_path))
    frame, _ = image_hashes.shard_hashes(artifacts, SHARD, "v1", ["gone.png", "/etc/x.png"], open_image)
    assert frame["image_sha256"].to_list() == frame["phash"].to_list() == [None, None]


# Texts


def test_thirteen_words_in_a_longer_text_are_found_whatever_their_case_and_punctuation(
    tmp_path: Path,
) -> None:
    repeated = " ".join(LONG.split()[3:16]).upper().replace(" ON ", ", ON - ")
    pool_of_texts(
        tmp_path, "What is this?", f"Dear reader, {repeated}?! And then some more words of our own."
    )
    (found,) = texts_found(tmp_path, "not this one, which the pool does not hold at all", LONG).rows(
        named=True
    )
    assert (found["row"], found["reason"], found["distance"]) == (1, "evaluation_text", None)
    assert found["partner"] == f"benchmark.txt, line 2: {LONG[:80]}…"
    assert found["overlap"] == pytest.approx(1 / (len(LONG.split()) - 12))
    assert found["detail"] == f"both have {' '.join(words(repeated))!r}"


def test_twelve_words_of_a_long_text_and_a_paraphrase_are_not_found(tmp_path: Path) -> None:
    pool_of_texts(
        tmp_path,
        " ".join(LONG.split()[:12]),
        "In the year following the great fire, which instrument of the two standing on the left-hand table "
        "did the museum restore?",
    )
    assert texts_found(tmp_path, LONG).is_empty()


def test_a_short_text_is_found_by_shorter_ngrams_and_a_very_short_one_is_not_looked_for(
    tmp_path: Path,
) -> None:
    pool_of_texts(tmp_path, "So: what is the colour of the smallest round lamp?", "How many dogs are there?")
    found = texts_found(
        tmp_path, "What is the colour of the smallest round lamp?", "How many dogs are there?"
    )
    assert found["row"].to_list() == [0]
    assert found["overlap"].to_list() == [1.0]


def test_a_chinese_text_is_found_by_its_characters(tmp_path: Path) -> None:
    text = "图中左边桌子上的两件乐器中哪一件是博物馆修复的？"
    pool_of_texts(
        tmp_path,
        "请看，左边桌子上的两件乐器中哪一件是 新的？",
        "左边桌子上的两件乐器很旧",
        "博物馆在哪里？",
    )
    found = texts_found(tmp_path, text)
    assert found["row"].to_list() == [0]
    assert found["detail"].item().startswith("both have '左 边 桌 子")


def test_words_are_characters_where_a_script_has_no_spaces() -> None:
    assert words("Ｔwo 乐器s, déjà-vu_1") == ["two", "乐", "器", "s", "déjà", "vu_1"]
    assert words("두 개의 악기") == ["두", "개의", "악기"]
    assert words("ดนตรี") == ["ด", "น", "ต", "รี"]
    assert words("🎻 … !") == []


def test_a_benchmarks_prompt_does_not_count_and_its_questions_do(tmp_path: Path) -> None:
    prompt = "Answer the question using a single word or phrase and say nothing else at all please."
    questions = [
        f"Where did painter number {n} put the third of his {n} brushes last week?" for n in range(4)
    ]
    pool_of_texts(tmp_path, f"What is it? {prompt}", f"{questions[2]} {prompt}")
    evaluation = [f"{question} {prompt}" for question in questions]
    assert texts_found(tmp_path, *evaluation, common_ngrams=3)["row"].to_list() == [1]
    assert texts_found(tmp_path, *evaluation, common_ngrams=4)["row"].to_list() == [0, 1]


def test_the_overlap_that_counts_is_a_setting_and_the_greatest_is_reported(tmp_path: Path) -> None:
    pool_of_texts(tmp_path, " ".join(LONG.split()[:15]))
    beginning = " ".join(LONG.split()[:14])
    found = texts_found(tmp_path, LONG, beginning)
    assert found["partner"].item().startswith("benchmark.txt, line 2")
    assert found["overlap"].item() == 1.0
    share = 3 / (len(LONG.split()) - 12)
    assert texts_found(tmp_path, LONG, min_overlap=share - 0.01)["overlap"].to_list() == [share]
    assert texts_found(tmp_path, LONG, min_overlap=share + 0.01).is_empty()


def test_answers_and_system_texts_count_and_so_do_rows_without_an_image(tmp_path: Path) -> None:
    write_images(tmp_path / "pool", {"one.png": png_bytes(1)})
    rows = [
        sharegpt_row("one.png", answer=LONG),
        sharegpt_row("one.png", system=LONG),
        sharegpt_row(None, "Hello?", LONG),
        {"conversations": [{"from": "human", "value": LONG}, {"from": "gpt", "value": "Yes"}]},
        {"messages": [{"role": "user", "content": LONG}]},
        "{ broken",
    ]
    write_lines(tmp_path / "pool" / SHARD, rows)
    assert texts_found(tmp_path, LONG)["row"].to_list() == [0, 1, 2, 3]


def test_an_image_is_the_reason_where_both_match_and_the_text_is_reported(tmp_path: Path) -> None:
    evaluation = write_images(tmp_path / "evaluation", {"1.png": png_bytes(1)})
    pool_of_texts(tmp_path, LONG)
    write_lines(tmp_path / "benchmark.txt", [LONG])
    settings = Decontamination(images=str(evaluation), texts=str(tmp_path / "benchmark.txt"))
    (found,) = looked_at(tmp_path, settings).rows(named=True)
    assert (found["reason"], found["partner"]) == ("evaluation_image", "1.png")
    assert "repeats benchmark.txt, line 1" in found["detail"]


def test_the_index_does_not_depend_on_the_order_of_texts() -> None:
    texts = [EvaluationText("f", n, f"{LONG} number {n}") for n in range(1, 6)]
    ways = [
        NgramIndex(order, ngram=13, short_ngram=8, common=10).match(f"{LONG} number 4")
        for order in (texts, texts[::-1])
    ]
    assert ways[0] == ways[1]
    assert ways[0] is not None
    assert ways[0].text.line == 4


# The evaluation set


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(EvaluationSetError) as caught:
        read_evaluation_set(StorageResource(), str(folder / "store"), Decontamination(**settings))
    return str(caught.value)


def test_an_evaluation_set_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    write_images(empty, {"LICENSE": b"free", ".hidden.png": png_bytes(1)})
    write_lines(tmp_path / "short.txt", ["How many?", "", "Why?"])
    (tmp_path / "blank.txt").write_text("\n \n")
    assert f"the folder {empty} for evaluation images, which holds none" in refused(
        tmp_path, images=str(empty)
    )
    assert "does not exist" in refused(tmp_path, images=str(tmp_path / "nowhere"))
    assert "allowed are .jsonl, .txt" in refused(tmp_path, texts=str(empty / "LICENSE"))
    assert "2 have fewer than 8 words" in refused(tmp_path, texts=str(tmp_path / "short.txt"))
    assert "can be looked for" in refused(tmp_path, texts=str(tmp_path / "blank.txt"))


def test_a_bad_evaluation_file_is_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"good.png": png_bytes(1), "sub/bad.png": b"no image"})
    (tmp_path / "latin.txt").write_bytes("¿Dónde está?".encode("latin-1"))
    write_lines(tmp_path / "lines.jsonl", [{"text": LONG}, "", "{"])
    write_lines(tmp_path / "fields.jsonl", [{"question": LONG}])
    assert "sub/bad.png cannot be decoded" in refused(tmp_path, images=str(images))
    assert "latin.txt is not UTF-8" in refused(tmp_path, texts=str(tmp_path / "latin.txt"))
    assert "lines.jsonl, line 3 is not JSON" in refused(tmp_path, texts=str(tmp_path / "lines.jsonl"))
    told = refused(tmp_path, texts=str(tmp_path / "fields.jsonl"))
    assert "line 1 has no text in the field 'text'; its fields are \"'question'\"" in told
    settings = Decontamination(texts=str(tmp_path / "fields.jsonl"), text_field="question")
    assert read_evaluation_set(StorageResource(), str(tmp_path / "store"), settings).texts is not None


@pytest.mark.parametrize(
    "settings",
    [{}, {"texts": "x", "ngram": 5}, {"images": "x", "max_hamming": -1}, {"images": "x", "hamming": 3}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Decontamination"):
        Decontamination(**settings)


def test_the_version_of_an_evaluation_set_is_that_of_its_bytes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "evaluation", {"a.png": png_bytes(1), "b.png": png_bytes(2)})
    settings = Decontamination(images=str(folder))

    def version() -> str:
        return evaluation_version(StorageResource(), str(tmp_path / "store"), settings)

    first = version()
    (folder / "a.png").touch()
    assert version() == first
    (folder / "LICENSE").write_text("free")
    assert version() == first
    (folder / "a.png").write_bytes(png_bytes(3))
    changed = version()
    (folder / "c.png").write_bytes(png_bytes(4))
    assert len({first, changed, version()}) == 3


def test_an_evaluation_set_is_not_read_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "evaluation", {"a.png": png_bytes(1)})
    settings, store = Decontamination(images=str(folder)), str(tmp_path / "store")
    version = evaluation_version(StorageResource(), store, settings)
    whole = read_evaluation_set(StorageResource(), store, settings)

    # Other bytes of the same size and time, which are no image: whoever read them would tell.
    file = folder / "a.png"
    times = file.stat()
    file.write_bytes(bytes(times.st_size))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert evaluation_version(StorageResource(), store, settings) == version
    again = read_evaluation_set(StorageResource(), store, settings)
    assert again.version == whole.version
    assert again.images is not None
    assert whole.images is not None
    assert again.images.hashes.tolist() == whole.images.hashes.tolist()


# Shards


def looked_through(folder: Path, settings: Decontamination) -> decontamination.Looked:
    """The pool's shard, read and looked through."""
    storage = StorageResource()
    selection = Selection(
        name="pool",
        source=str(folder / "pool"),
        store=str(folder / "store"),
        target_model="m",
        decontamination=settings,
    )
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("pool_shards", [SHARD])
        dg.materialize(
            [raw_samples.build(selection)],
            partition_key=SHARD,
            instance=instance,
            resources={"storage": storage},
        )
    return decontamination.look(
        storage, selection, decontamination.evaluation_of(storage, selection), [SHARD]
    )


def test_every_removal_is_recorded_and_no_row_is_lost(tmp_path: Path) -> None:
    evaluation = write_images(tmp_path / "evaluation", {"5.png": encoded(photograph(5))})
    pool_of_images(tmp_path, {f"{seed}.jpg": encoded(photograph(seed), "JPEG") for seed in range(8)})
    settings = Decontamination(images=str(evaluation))
    first, again = looked_through(tmp_path, settings), looked_through(tmp_path, settings)
    by_bytes = looked_through(tmp_path, Decontamination(images=str(evaluation), max_hamming=None))
    assert first.frame["source_id"].to_list() == ["5.jpg"]
    assert first.frame["reason"].to_list() == ["evaluation_image"]
    assert first.frame["shard"].to_list() == [SHARD]
    assert (first.numbers["shards_looked_through"], first.numbers["images_decoded"]) == (1, 8)
    assert (again.numbers["shards_looked_through"], again.numbers["images_decoded"]) == (0, 0)
    assert again.frame.equals(first.frame)
    assert by_bytes.frame.is_empty()
    assert (by_bytes.numbers["shards_looked_through"], by_bytes.numbers["images_decoded"]) == (1, 0)
    raw, _ = StorageResource().artifacts(str(tmp_path / "store")).read_frame(raw_samples.NAME, SHARD)
    kept = raw.join(first.frame, on=["row", "sample_key"], how="anti")
    assert kept.height + first.frame.height == raw.height


def test_a_damaged_list_of_a_shard_is_made_again(tmp_path: Path) -> None:
    evaluation = write_images(tmp_path / "evaluation", {"1.png": png_bytes(1)})
    pool_of_images(tmp_path, {"x.png": png_bytes(1), "y.png": png_bytes(2)})
    settings = Decontamination(images=str(evaluation))
    first = looked_through(tmp_path, settings)
    path = (
        StorageResource()
        .artifacts(str(tmp_path / "store"))
        .path(decontamination.NAME, SHARD, suffix=".parquet")
    )
    path.write_bytes(path.read_bytes()[:-9])
    again = looked_through(tmp_path, settings)
    assert again.numbers["shards_looked_through"] == 1
    assert again.frame.equals(first.frame)


def test_a_shard_that_is_a_copy_of_the_evaluation_set_is_reported(tmp_path: Path) -> None:
    evaluation = write_images(tmp_path / "evaluation", {"1.png": png_bytes(1)})
    pool_of_images(tmp_path, {"x.png": png_bytes(1)})
    assert looked_through(tmp_path, Decontamination(images=str(evaluation))).whole_shards == (SHARD,)


def test_an_evaluation_set_that_cannot_be_used_fails_with_its_reason(tmp_path: Path) -> None:
    pool_of_images(tmp_path, {"x.png": png_bytes(1)})
    with pytest.raises(dg.Failure) as caught:
        looked_through(tmp_path, Decontamination(images=str(tmp_path / "nowhere")))
    assert "nowhere for evaluation images, which does not exist" in str(caught.value.description)
    assert caught.value.allow_retries is False


def test_the_columns_are_those_that_are_declared(tmp_path: Path) -> None:
    pool_of_texts(tmp_path, LONG)
    frame = texts_found(tmp_path, LONG)
    assert frame.schema == polars_schema(DECONTAMINATION)
    assert json.loads(frame.write_json())[0]["reason"] == "evaluation_text"
