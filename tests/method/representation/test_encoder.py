"""What is computed together changes no outcome, and every row gets one, whatever its neighbours."""

import errno
import gc
import itertools
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.image_utils import make_flat_list_of_images

from scalselect_assets.method.representation import encoder as encoder_module
from scalselect_assets.method.representation import preparation
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.representation.first_layer import FirstLayer, ModelInput
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from tests.method.samples import (
    SAMPLES,
    Counting,
    assert_equal,
    chat,
    counts,
    pixels,
    question,
    read_image,
    read_image_or_fail,
    represent,
)
from tests.method.zoo import Reference

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Two texts to each of six sets of images, some of which have images in common.
POOL = [
    *SAMPLES.values(),
    *(
        ChatSample(question(f"And what else can you see there, apart from {number}?").conversation, ("1",))
        for number in range(3)
    ),
    question("Why?", "4:90x30"),
    question("Why is it as it is, and not otherwise?", "5:40x110", "Because " * 30),
]


@pytest.fixture(scope="module")
def encoder(demo_vlm: Path) -> VlmEncoder:
    return load_encoder(str(demo_vlm), device="cpu")


@pytest.fixture(scope="module")
def alone(encoder: VlmEncoder) -> list[Representation]:
    """The pool, each sample by itself."""
    return [represent(encoder, [sample])[0] for sample in POOL]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_demo_models_representation_equals_the_one_of_the_whole_model(
    name: str, encoder: VlmEncoder, demo_vlm: Path
) -> None:
    reference = Reference(demo_vlm)
    reference._answer = re.compile(r"ASSISTANT: (.*?)</s>", re.DOTALL)  # of the demo's own template
    sample = SAMPLES[name]
    expected = reference.represent(sample.conversation, [pixels(image) for image in sample.images])
    (got,) = represent(encoder, [sample])
    assert counts(got) == counts(expected)
    np.testing.assert_allclose(got.vector, expected.vector, atol=1e-5, rtol=0)


# Together or alone


@pytest.mark.parametrize("batch_tokens", [1, 100, 300, 10_000])
def test_outcomes_do_not_depend_on_batches_or_order(
    batch_tokens: int, encoder: VlmEncoder, alone: list[Representation]
) -> None:
    assert_equal(represent(encoder, POOL, batch_tokens=batch_tokens), alone)
    assert_equal(represent(encoder, POOL[::-1], batch_tokens=batch_tokens)[::-1], alone)


def test_every_place_comes_once_also_for_equal_samples(
    encoder: VlmEncoder, alone: list[Representation]
) -> None:
    samples = [*POOL, *POOL]
    places, outcomes = zip(*encoder.encode_as_done(samples, read_image, batch_tokens=500), strict=True)
    assert sorted(places) == list(range(len(samples)))
    assert list(places) != sorted(places)  # so that the order here is not the order of the work
    assert_equal([outcomes[places.index(place)] for place in range(len(samples))], [*alone, *alone])


def test_of_no_samples_there_are_no_outcomes(encoder: VlmEncoder) -> None:
    assert encoder.encode([], read_image) == []


def test_more_samples_about_one_image_than_are_prepared_at_once_all_come(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch, alone: list[Representation]
) -> None:
    monkeypatch.setattr(encoder_module, "_GROUP_SIZE", 2)
    monkeypatch.setattr(encoder_module, "_GROUPS_AHEAD", 1)
    assert_equal(represent(encoder, POOL), alone)


@pytest.mark.parametrize("batch_tokens", [1, 250, 1000, 2000])
def test_a_batch_holds_at_most_the_tokens_that_are_asked_for_and_twice_that_with_padding(
    batch_tokens: int, encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    original = FirstLayer.steps

    def watched(self: FirstLayer, samples: Sequence[ModelInput], *more: Any) -> Any:
        batches.append([len(sample) for sample in samples])
        return original(self, samples, *more)

    monkeypatch.setattr(FirstLayer, "steps", watched)
    one_long_among_short = [question("Why?"), question("word " * 200), *[question("Why?")] * 6]
    represent(encoder, one_long_among_short, batch_tokens=batch_tokens)
    for lengths in batches:
        assert len(lengths) == 1 or sum(lengths) <= batch_tokens
        assert len(lengths) == 1 or len(lengths) * max(lengths) <= 2 * batch_tokens
    assert sum(map(len, batches)) == len(one_long_among_short)
    if batch_tokens == 2000:
        assert sum(map(sum, batches)) <= batch_tokens  # so that only their padding keeps them apart
        assert max(map(len, batches)) > 1


def test_the_tokenizers_padding_side_does_not_matter(
    demo_vlm: Path, tmp_path: Path, alone: list[Representation]
) -> None:
    other = shutil.copytree(demo_vlm, tmp_path / "left")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    assert_equal(represent(load_encoder(str(other), device="cpu"), POOL), alone)


# Images that samples share


class Work:
    """Counts the steps that an image goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, image_processor: type) -> None:
        self.decoded = self.processed = self.through_tower = 0
        decode, process = preparation.decode_image, image_processor.preprocess  # type: ignore[attr-defined]
        features = FirstLayer.image_features

        def counted_decode(*arguments: Any) -> Any:
            self.decoded += 1
            return decode(*arguments)

        def counted_process(processor: Any, images: Any, *arguments: Any, **options: Any) -> Any:
            self.processed += len(make_flat_list_of_images(images))
            return process(processor, images, *arguments, **options)

        def counted_features(layer: FirstLayer, images: Sequence[Any]) -> Any:
            self.through_tower += len(images)
            return features(layer, images)

        monkeypatch.setattr(preparation, "decode_image", counted_decode)
        monkeypatch.setattr(image_processor, "preprocess", counted_process)
        monkeypatch.setattr(FirstLayer, "image_features", counted_features)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
@pytest.mark.parametrize(
    ("family", "image_processor"),
    [("llava", CLIPImageProcessorPil), ("qwen2_vl", Qwen2VLImageProcessorPil)],
)
def test_images_of_several_samples_pass_every_step_once(
    family: str,
    image_processor: type,
    batch_tokens: int,
    tiny_encoder: Callable[[str], VlmEncoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_encoder(family)
    work, reader = Work(monkeypatch, image_processor), Counting()
    about_two = [
        chat(("user", (IMAGE, IMAGE, text)), ("assistant", ("A",)), images=("1", "2:70x70"))
        for text in ("Which?", "Which of them is larger, and by how much?")
    ]
    about_one = [question(f"What is number {number}?", "3:30x100") for number in range(4)]
    mixed = [about_one[0], about_two[0], *about_one[1:3], about_two[1], about_one[3]]
    encoder.encode(mixed, reader, batch_tokens=batch_tokens)
    assert reader.reads == {"1": 1, "2:70x70": 1, "3:30x100": 1}
    assert (work.decoded, work.processed, work.through_tower) == (3, 3, 3)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen3_vl", "internvl", "gemma3"])
def test_an_image_that_rows_share_in_part_passes_the_tower_once(
    family: str,
    batch_tokens: int,
    tiny_encoder: Callable[[str], VlmEncoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_encoder(family)
    work = Work(monkeypatch, CLIPImageProcessorPil)
    samples = [
        question("What is this?", "1"),
        chat(("user", (IMAGE, IMAGE, "Which?")), ("assistant", ("A",)), images=("1", "2:70x70")),
        chat(
            ("user", (IMAGE,)),
            ("assistant", ("A",)),
            ("user", ("?", IMAGE, IMAGE)),
            images=("2:70x70", "4", "1"),
        ),
    ]
    together = encoder.encode(samples, read_image, batch_tokens=batch_tokens)
    assert work.through_tower == 3  # 1, 2 and 4
    assert_equal(together, [represent(encoder, [sample])[0] for sample in samples])


def test_equal_images_under_two_references_pass_the_tower_once(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(monkeypatch, CLIPImageProcessorPil)
    first, second = represent(encoder, [question("Why?", "7"), question("Why?", "7:48x40")])
    assert work.through_tower == 1
    assert first.image_sha256 == second.image_sha256
    assert_equal([first], [second])


def test_images_pass_the_tower_again_where_their_features_are_too_many_to_keep(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch, alone: list[Representation]
) -> None:
    monkeypatch.setattr(encoder_module, "_FEATURE_BYTES", 0)
    work = Work(monkeypatch, CLIPImageProcessorPil)
    assert_equal(represent(encoder, POOL, batch_tokens=1), alone)
    assert work.through_tower == sum(len(sample.images) for sample in POOL)


def test_the_kept_features_stay_within_their_bytes(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch, alone: list[Representation]
) -> None:
    caches: list[Any] = []
    original = encoder_module.FeatureCache
    one_image = 64 * encoder.card.dimension * 4

    def made(_max_bytes: int) -> Any:
        caches.append(original(3 * one_image))
        return caches[-1]

    monkeypatch.setattr(encoder_module, "FeatureCache", made)
    assert_equal(represent(encoder, POOL, batch_tokens=200), alone)
    (kept,) = caches
    storages = {
        feature.untyped_storage().data_ptr(): feature.untyped_storage().nbytes()
        for chunk in kept._chunks.values()
        for feature in chunk.values()
    }
    assert 0 < kept._bytes == sum(storages.values()) <= 3 * one_image
    assert len(kept) == sum(map(len, kept._chunks.values())) > 0


# Too little memory


def short_of_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """More than so many tokens at once do not fit; the tokens of every attempt are noted."""
    attempts: list[int] = []
    original = FirstLayer.steps

    def limited(self: FirstLayer, samples: Sequence[ModelInput], *more: Any) -> Any:
        attempts.append(sum(map(len, samples)))
        if attempts[-1] > tokens:
            raise error
        return original(self, samples, *more)

    monkeypatch.setattr(FirstLayer, "steps", limited)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes most of the time, and there is nothing to collect
    return attempts


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_computed_in_parts(
    error: Exception, encoder: VlmEncoder, alone: list[Representation], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = short_of_memory(monkeypatch, max(item.n_tokens for item in alone), error)
    assert_equal(represent(encoder, POOL, batch_tokens=10_000), alone)
    assert attempts[0] == sum(item.n_tokens for item in alone)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_a_sample_that_does_not_fit_by_itself_is_rejected_and_its_neighbours_are_not(
    error: Exception,
    batch_tokens: int,
    encoder: VlmEncoder,
    alone: list[Representation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(range(len(POOL)), key=lambda place: alone[place].n_tokens)
    short_of_memory(monkeypatch, alone[longest].n_tokens - 1, error)
    outcomes = encoder.encode(POOL, read_image, batch_tokens=batch_tokens)
    rejected = outcomes.pop(longest)
    assert isinstance(rejected, Rejection)
    assert rejected.reason is RejectionReason.TOO_LARGE
    assert rejected.detail.startswith(f"{alone[longest].n_tokens:,} tokens with 3 image(s) do not fit")
    assert "use fewer or smaller images" in rejected.detail
    assert_equal(outcomes, [*alone[:longest], *alone[longest + 1 :]])


@pytest.mark.parametrize("at_once", [1, 3])
def test_images_that_do_not_fit_the_tower_together_pass_it_in_parts(
    at_once: int, encoder: VlmEncoder, alone: list[Representation], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FirstLayer.image_features

    def limited(self: FirstLayer, images: Sequence[Any]) -> Any:
        if len(images) > at_once:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, images)

    monkeypatch.setattr(FirstLayer, "image_features", limited)
    assert_equal(represent(encoder, POOL, batch_tokens=10_000), alone)


def test_what_is_kept_of_other_samples_makes_room(
    encoder: VlmEncoder, alone: list[Representation], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, caches = FirstLayer.steps, []
    make = encoder_module.FeatureCache

    def noted(max_bytes: int) -> Any:
        caches.append(make(max_bytes))
        return caches[-1]

    def limited(self: FirstLayer, *arguments: Any) -> Any:
        if len(caches[-1]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *arguments)

    monkeypatch.setattr(encoder_module, "FeatureCache", noted)
    monkeypatch.setattr(FirstLayer, "steps", limited)
    assert_equal(represent(encoder, POOL, batch_tokens=1), alone)


@pytest.fixture(params=[1, 2, 5])
def several_under_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As on a GPU: some batches are between their steps while the next one is asked for."""
    monkeypatch.setattr(encoder_module, "_UNDER_WAY", {"cpu": request.param})
    return int(request.param)


def test_batches_that_are_under_way_together_change_no_outcome(
    encoder: VlmEncoder, alone: list[Representation], several_under_way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = 0, 0
    original = FirstLayer.steps

    def watched(self: FirstLayer, *arguments: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        states = yield from original(self, *arguments)
        under_way -= 1
        return states

    monkeypatch.setattr(FirstLayer, "steps", watched)
    assert_equal(represent(encoder, POOL, batch_tokens=200), alone)
    assert (under_way, most) == (
        0,
        min(several_under_way, 2) + 1,
    )  # of three steps, the last one ends a batch


@pytest.mark.usefixtures("several_under_way")
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_batches_that_do_not_fit_together_are_computed_one_by_one(
    fails_at: int, encoder: VlmEncoder, alone: list[Representation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of the steps, as long as another batch holds memory."""
    open_now: set[int] = set()
    original, numbers = FirstLayer.steps, itertools.count()

    def limited(self: FirstLayer, *arguments: Any) -> Any:
        number = next(numbers)
        open_now.add(number)
        try:
            steps = original(self, *arguments)
            for step in itertools.count(1):
                if step == fails_at and len(open_now) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                try:
                    next(steps)
                except StopIteration as finished:
                    return finished.value
                yield
        finally:
            open_now.remove(number)

    monkeypatch.setattr(FirstLayer, "steps", limited)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    assert_equal(represent(encoder, POOL, batch_tokens=200), alone)
    assert not open_now


def test_any_other_error_of_the_model_is_raised(encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        encoder.encode(POOL, read_image)


# Rows that cannot be represented


def test_a_bad_row_does_not_touch_its_neighbours(encoder: VlmEncoder, alone: list[Representation]) -> None:
    missing, broken = (question("Is it red?", reference) for reference in ("missing", "broken"))
    too_long = question("word " * 3000)
    second_missing = chat(("user", (IMAGE, IMAGE, "Which?")), ("assistant", ("A",)), images=("1", "missing"))
    samples = [broken, POOL[0], missing, too_long, POOL[1], second_missing]
    for batch_tokens in (1, 10_000):
        outcomes = encoder.encode(samples, read_image_or_fail, batch_tokens=batch_tokens)
        reasons = [item.reason if isinstance(item, Rejection) else None for item in outcomes]
        assert reasons == [
            RejectionReason.UNDECODABLE_IMAGE,
            None,
            RejectionReason.MISSING_IMAGE,
            RejectionReason.TOO_LONG,
            None,
            RejectionReason.MISSING_IMAGE,
        ]
        assert [outcomes[place].detail[:8] for place in (2, 5)] == ["image 1:", "image 2:"]  # type: ignore[union-attr]
        assert_equal([outcomes[1], outcomes[4]], alone[:2])


def test_rows_that_are_all_bad_reach_no_model(encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = short_of_memory(monkeypatch, 0, AssertionError("the model was called"))
    outcomes = encoder.encode([question("Why?", "missing")] * 3, read_image_or_fail)
    assert [type(outcome) for outcome in outcomes] == [Rejection] * 3
    assert attempts == []


def test_an_image_that_cannot_be_read_for_other_reasons_ends_the_work(encoder: VlmEncoder) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        encoder.encode([*POOL, question("Why?", "damaged disk")], read_image_or_fail)


def test_a_conversation_that_the_template_refuses_is_rejected(
    encoder: VlmEncoder, alone: list[Representation]
) -> None:
    turns = (Turn("tool", ("result",)), *POOL[0].conversation.turns)  # type: ignore[arg-type]
    refused, neighbour = encoder.encode(
        [ChatSample(Conversation(turns), POOL[0].images), POOL[0]], read_image
    )
    assert isinstance(refused, Rejection)
    assert refused.reason is RejectionReason.TEMPLATE_REFUSED
    assert_equal([neighbour], alone[:1])


def test_representations_that_are_not_finite_are_rejected(
    demo_vlm: Path, alone: list[Representation]
) -> None:
    encoder = load_encoder(str(demo_vlm), device="cpu")
    encoder._first_layer._layer.mlp.down_proj.weight.fill_(torch.inf)
    outcomes = encoder.encode(POOL[:2], read_image)
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [RejectionReason.NON_FINITE] * 2


def test_a_higher_attention_mass_keeps_more_tokens(demo_vlm: Path, alone: list[Representation]) -> None:
    wide = load_encoder(str(demo_vlm), device="cpu", attention_mass=0.99)
    for more, fewer in zip(represent(wide, POOL), alone, strict=True):
        assert more.n_dominant_tokens > fewer.n_dominant_tokens
    everything = load_encoder(str(demo_vlm), device="cpu", attention_mass=1.0)
    for item in represent(everything, POOL):
        assert item.n_dominant_tokens == item.n_vision_tokens


def test_what_the_instruction_pays_to_the_image_is_a_share(alone: list[Representation]) -> None:
    assert all(0 < item.vision_attention < 1 for item in alone)


# Reading ahead


def preparation_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("preparation")]


@pytest.mark.parametrize("n_taken", [0, 1, 3])
def test_work_that_is_abandoned_leaves_no_thread_behind(
    n_taken: int, encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "_GROUPS_AHEAD", 2)
    reader = Counting()
    samples = [question("Why?", str(seed)) for seed in range(20)]
    outcomes = encoder.encode_as_done(samples, reader, batch_tokens=1)
    assert len(list(itertools.islice(outcomes, n_taken))) == n_taken
    assert bool(preparation_threads()) == (n_taken > 0)
    outcomes.close()  # type: ignore[attr-defined]
    assert preparation_threads() == []
    assert len(reader.reads) <= n_taken + 4


def test_work_that_is_abandoned_is_not_done(encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reads, shutdown = threading.Event(), [], ThreadPoolExecutor.shutdown

    def read(reference: str) -> bytes:
        reads.append(reference)
        if len(reads) > 3:
            gate.wait()
        return read_image(reference)

    def open_and_shut_down(*arguments: Any, **options: Any) -> None:
        gate.set()
        shutdown(*arguments, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", open_and_shut_down)
    samples = [question("Why?", str(seed)) for seed in range(20)]
    outcomes = encoder.encode_as_done(samples, read, batch_tokens=1)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert len(reads) <= 4


def test_work_that_fails_leaves_no_thread_behind(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError):
        encoder.encode([question("Why?", str(seed)) for seed in range(20)], read_image, batch_tokens=1)
    assert preparation_threads() == []


def test_images_are_read_ahead_of_the_model_but_only_a_few(
    encoder: VlmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "_GROUPS_AHEAD", 2)
    reader, lead = Counting(), []
    samples = [question("Why?", str(seed)) for seed in range(20)]
    for done, _ in enumerate(encoder.encode_as_done(samples, reader, batch_tokens=1), start=1):
        lead.append(len(reader.reads) - done)
    assert 0 < max(lead) <= 5


# Worker processes


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_processes_that_prepare_change_no_outcome(
    family: str, tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    """Qwen2-VL's processor class is made at run time and has to reach the processes by pickle."""
    encoder = tiny_encoder(family)
    samples = [*POOL, question("Why?", "missing"), question("Why?", "broken"), question("word " * 3000)]
    by_thread = encoder.encode(samples, read_image_or_fail)
    assert Counter(type(outcome) for outcome in by_thread) == {Representation: len(POOL), Rejection: 3}
    try:
        assert_equal(encoder.encode(samples, read_image_or_fail, workers=2), by_thread)
        with pytest.raises(OSError, match="Input/output error") as raised:
            encoder.encode([*POOL, question("Why?", "damaged disk")], read_image_or_fail, workers=2)
        assert raised.value.errno == errno.EIO
    finally:
        encoder._preparation.close()
