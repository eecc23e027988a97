"""Of a model folder no more is read than needed, and what cannot be a target model is said to be none."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from scalselect_assets.method.representation import loading
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.families import TESTED_FAMILIES, UnsupportedModelError
from scalselect_assets.method.representation.loading import (
    ModelLoadError,
    load_card,
    load_encoder,
    resolve_device,
)
from scalselect_assets.method.representation.model_card import ModelCard, weights_sha256
from scalselect_assets.method.representation.processors import load_processor
from tests.method.samples import SAMPLES, assert_equal, represent

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def folder(tiny_vlm: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's tiny model, to be changed."""
    return lambda family: shutil.copytree(tiny_vlm(family), tmp_path / family)


def load(path: Path, **options: Any) -> VlmEncoder:
    return load_encoder(str(path), **{"device": "cpu", **options})


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# What is read

_LATER_LAYERS = r"(language_model|text_model)\.(model\.)?layers\.[12]\.|(^|\.)lm_head"
UNUSED = {
    "llava": rf"{_LATER_LAYERS}|vision_model\.encoder\.layers\.2\.",  # the output of the last but one is read
    "llava_next": rf"{_LATER_LAYERS}|vision_model\.encoder\.layers\.2\.",
    "llava_onevision": _LATER_LAYERS,
    "qwen3_vl": rf"{_LATER_LAYERS}|deepstack_merger_list",
    "gemma3": _LATER_LAYERS,
}


@pytest.mark.parametrize("family", UNUSED)
def test_weights_that_the_first_layer_does_not_depend_on_are_not_read(
    family: str, folder: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    """They may be missing from the checkpoint, and change neither the representations nor the fingerprint."""
    path, whole = folder(family), tiny_encoder(family)
    names = [name for name in load_file(path / "model.safetensors") if re.search(UNUSED[family], name)]
    assert len(names) > 10

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    edit_weights(path, drop)
    part = load(path)
    assert dataclasses.replace(part.card, model="") == dataclasses.replace(whole.card, model="")
    samples = list(SAMPLES.values())[:3]
    assert_equal(represent(part, samples), represent(whole, samples))


@pytest.mark.parametrize("family", UNUSED)
def test_of_what_is_not_read_nothing_is_kept(
    family: str, tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(tiny_vlm(family))
    parameters = {name: part.numel() for name, part in whole.named_parameters()}
    unused = {
        name
        for name in parameters
        if re.search(UNUSED[family], name.replace("vision_tower.", "vision_tower.vision_model."))
    }
    assert tiny_encoder(family).card.n_parameters == sum(parameters.values()) - sum(
        parameters[name] for name in unused
    )


def test_only_the_first_layer_and_no_head_is_loaded(demo_vlm: Path) -> None:
    encoder = load(demo_vlm)
    full_model = AutoModelForImageTextToText.from_pretrained(demo_vlm)
    unused = [*full_model.model.language_model.layers[1:], full_model.lm_head]
    # CLIP's last layer comes after the one that the projector reads.
    unused += full_model.model.vision_tower.encoder.layers[-1:]
    n_unused = sum(part.numel() for module in unused for part in module.parameters())
    assert encoder.card.n_parameters == sum(part.numel() for part in full_model.parameters()) - n_unused


def test_a_checkpoint_in_the_older_layout_is_read(tiny_vlm: Callable[[str], Path]) -> None:
    path = tiny_vlm("qwen2_5_vl")
    assert not (path / "processor_config.json").exists()
    assert (path / "preprocessor_config.json").exists()
    assert (path / "chat_template.json").exists()
    represent(load(path), list(SAMPLES.values()))


# The card


def test_the_card_tells_what_the_model_is(tiny_vlm: Callable[[str], Path]) -> None:
    path = tiny_vlm("gemma3")
    card = load(path, attention_mass=0.7).card
    assert (card.model, card.revision, card.commit) == (str(path), None, None)
    assert (card.model_type, card.dtype, card.attention_mass) == ("gemma3", "float32", 0.7)
    assert (card.dimension, card.max_tokens) == (64, 2048)
    assert ModelCard(**json.loads(json.dumps(card.to_json()))) == card


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_fingerprint_is_of_the_content_and_not_of_the_place(
    family: str, folder: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    assert load(folder(family)).card.fingerprint == tiny_encoder(family).card.fingerprint


def test_the_pixel_limit_and_the_device_are_not_part_of_the_fingerprint(
    tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    other = load(tiny_vlm("llava"), max_pixels=100, device="auto")
    assert other.card.fingerprint == tiny_encoder("llava").card.fingerprint


def test_how_a_checkpoint_was_saved_is_not_part_of_the_fingerprint(
    folder: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    path = folder("llava")
    edit_json(
        path / "config.json",
        lambda config: config.update(transformers_version="4.1", architectures=["X"], _name_or_path="y"),
    )
    assert load(path).card.fingerprint == tiny_encoder("llava").card.fingerprint


def _flip_a_bit_of(part: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        def flip(tensors: dict[str, torch.Tensor]) -> None:
            name = next(name for name in sorted(tensors) if re.search(part, name))
            tensors[name].view(-1).view(torch.uint8)[0] ^= 1

        edit_weights(path, flip)

    return change


def _image_setting(path: Path) -> None:
    edit_json(
        path / "processor_config.json", lambda config: config["image_processor"].update(rescale_factor=0.004)
    )


def _processor_setting(path: Path) -> None:
    """For LLaVA-OneVision the crops of an image, and so its tokens."""
    edit_json(
        path / "processor_config.json", lambda config: config.update(vision_aspect_ratio="anyres_max_1")
    )
    edit_json(path / "config.json", lambda config: config.update(vision_aspect_ratio="anyres_max_1"))


def _chat_template(path: Path) -> None:
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


def _merges(path: Path) -> None:
    edit_json(path / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop())


def _max_tokens(path: Path) -> None:
    edit_json(path / "tokenizer_config.json", lambda config: config.update(model_max_length=1024))


def _rope(path: Path) -> None:
    edit_json(
        path / "config.json",
        lambda config: config["text_config"]["rope_parameters"].update(rope_theta=12345.0),
    )


CHANGES: dict[str, Callable[[Path], None]] = {
    "the first layer": _flip_a_bit_of(r"language_model.*layers\.0\.self_attn"),
    "the embeddings": _flip_a_bit_of(r"embed_tokens"),
    "the vision tower": _flip_a_bit_of(r"vision_tower.*layers\.0"),
    "the projector": _flip_a_bit_of(r"multi_modal_projector"),
    "an image setting": _image_setting,
    "a setting of the processor": _processor_setting,
    "the chat template": _chat_template,
    "the tokenizer's merges": _merges,
    "the longest input": _max_tokens,
    "the rotary base": _rope,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_representations_changes_the_fingerprint(
    change: str, folder: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    path = folder("llava_onevision")
    CHANGES[change](path)
    assert load(path).card.fingerprint != tiny_encoder("llava_onevision").card.fingerprint


@pytest.mark.parametrize("option", [{"attention_mass": 0.8}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_options_that_change_representations_change_the_fingerprint(
    option: dict[str, Any], tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    assert load(tiny_vlm("llava"), **option).card.fingerprint != tiny_encoder("llava").card.fingerprint


def test_the_hash_of_weights_covers_names_types_shapes_and_bytes() -> None:
    def hashed(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_sha256(module)

    zeros = torch.zeros(2, 3)
    different = [
        hashed(a=zeros),
        hashed(b=zeros),
        hashed(a=zeros.T),
        hashed(a=zeros.to(torch.int32)),
        hashed(a=-zeros),
        hashed(a=zeros, b=zeros),
        hashed(),
    ]
    assert len(set(different)) == len(different)
    assert hashed(a=zeros, b=zeros + 1) == hashed(b=zeros + 1, a=zeros)
    assert hashed(a=torch.arange(6.0).view(2, 3).T) == hashed(a=torch.arange(6.0).view(2, 3).T.contiguous())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_half_precision_is_close_to_single_precision(
    dtype: str, family: str, tiny_vlm: Callable[[str], Path], tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    samples = list(SAMPLES.values())
    half = represent(load(tiny_vlm(family), dtype=dtype), samples)
    for rough, exact in zip(half, represent(tiny_encoder(family), samples), strict=True):
        assert rough.vector.dtype == exact.vector.dtype
        assert rough.n_tokens == exact.n_tokens
        # Rounding can also move the threshold across a token or two.
        assert abs(rough.n_dominant_tokens - exact.n_dominant_tokens) <= 4
        assert abs(rough.vector - exact.vector).max() < 0.25 * abs(exact.vector).max()


# What is refused


def test_a_missing_folder_is_said_plainly(tmp_path: Path) -> None:
    for name in ("./no/such/model", str(tmp_path / "nowhere"), "~/nowhere", "a/b/c"):
        with pytest.raises(ModelLoadError, match="no folder"):
            load_encoder(name)


def test_a_missing_device_is_said_plainly(demo_vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="no CUDA device; use 'cpu' or 'auto'"):
        load_encoder(str(demo_vlm), device="cuda")
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("attention_mass", [0, -0.1, 1.0001, float("nan")])
def test_a_threshold_outside_its_range_is_refused(attention_mass: float, demo_vlm: Path) -> None:
    with pytest.raises(ValueError, match=r"not in \(0, 1\]"):
        load_encoder(str(demo_vlm), attention_mass=attention_mass)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("llava", r"layers\.0\.self_attn\.q_proj.*weight"),
        ("llava", r"multi_modal_projector"),
        ("llava", r"vision_model\.encoder\.layers\.1\."),
        ("qwen3_vl", r"visual\.merger\."),
    ],
)
def test_a_checkpoint_that_lacks_needed_weights_is_refused(
    family: str, part: str, folder: Callable[[str], Path]
) -> None:
    path = folder(family)
    lost = [name for name in load_file(path / "model.safetensors") if re.search(part, name)]
    edit_weights(path, lambda tensors: [tensors.pop(name) for name in lost])
    with pytest.raises(ModelLoadError, match=f"lacks {len(lost)} weights that are needed, among them"):
        load(path)


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "the weights are missing": lambda path: (path / "model.safetensors").unlink(),
    "the weights are cut off": lambda path: _truncate(path / "model.safetensors"),
    "the weights have other shapes": lambda path: edit_json(
        path / "config.json", lambda config: config["text_config"].update(intermediate_size=64)
    ),
    "the configuration is cut off": lambda path: _truncate(path / "config.json"),
    "the tokenizer is missing": lambda path: (path / "tokenizer.json").unlink(),
    "the tokenizer is cut off": lambda path: _truncate(path / "tokenizer.json"),
    "the processor is missing": lambda path: (path / "processor_config.json").unlink(),
    "the processor is cut off": lambda path: _truncate(path / "processor_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_damaged_folder_is_named(damage: str, family: str, folder: Callable[[str], Path]) -> None:
    path = folder(family)
    DAMAGES[damage](path)
    # Qwen's tokenizer is made up without its file, and then knows no image token.
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=re.escape(repr(str(path)))):
        load(path)


def test_a_package_that_the_processor_needs_is_named(
    tiny_vlm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    path = tiny_vlm("smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(ModelLoadError, match="num2words"):
        load(path)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_without_a_chat_template_is_refused(family: str, folder: Callable[[str], Path]) -> None:
    path = folder(family)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no chat template; add chat_template\.jinja"):
        load(path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", "refuses one image and one question.*never"),
        ("{% if %}", "refuses one image and one question"),
        ("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", "cannot take a plain sample"),
    ],
    ids=["raises", "is none", "forgets the image"],
)
def test_a_chat_template_that_cannot_express_a_plain_sample_is_refused(
    template: str, message: str, folder: Callable[[str], Path]
) -> None:
    path = folder("llava")
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(UnsupportedModelError, match=message):
        load(path)


def _merge_across_the_border(path: Path) -> None:
    """One token for two letters, of which the template writes one and the answer begins with the other."""

    def replace_the_last_merge(tokenizer: dict[str, Any]) -> None:
        model = tokenizer["model"]
        lost = "".join(model["merges"].pop())
        model["merges"].append(["x", "A"])
        model["vocab"]["xA"] = model["vocab"].pop(lost)

    edit_json(path / "tokenizer.json", replace_the_last_merge)
    template = path / "chat_template.jinja"
    text, answer = template.read_text(), "{{ part['text'] + ' ' }}"
    template.write_text(text.replace(answer, f"x{answer}", 1))


def test_a_model_whose_answers_cannot_be_found_in_its_prompt_is_refused(
    folder: Callable[[str], Path],
) -> None:
    path = folder("llava")
    _merge_across_the_border(path)
    with pytest.raises(UnsupportedModelError, match=r"of the answer 'A pattern\.', 'xA pattern\.' is found"):
        load(path)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedModelError, match="not a model that Transformers itself knows"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "clip", "whisper"])
def test_a_model_that_reads_no_images_and_chats_is_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}', which is not an image-text-to-text"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["fuyu", "emu3", "chameleon"])
def test_a_model_without_a_vision_tower_is_refused_with_the_tested_families(
    model_type: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no vision tower of its own") as refusal:
        load(tmp_path)
    assert all(name in str(refusal.value) for name in TESTED_FAMILIES.values())


def test_a_model_whose_configuration_names_a_token_that_carries_no_image_is_refused(
    folder: Callable[[str], Path],
) -> None:
    path = folder("llava")
    edit_json(path / "config.json", lambda config: config.update(image_token_index=5))
    with pytest.raises(UnsupportedModelError):
        load(path)


# Hub ids


COMMITS = ("1" * 40, "2" * 40)


@dataclasses.dataclass(frozen=True)
class HubCache:
    """A cache of the hub as the libraries lay it out, of one model in two commits; there is no connection."""

    folder: Path
    model: str = "org/tiny"

    def add(self, commit: str, source: Path) -> None:
        """Store a model's files under their hashes, and link to them from the commit's snapshot."""
        snapshot = self.folder / "snapshots" / commit
        for file in source.iterdir():
            blob = self.folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))

    def point(self, branch: str, commit: str) -> None:
        """What the branch was when the cache last heard of it."""
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / branch).write_text(commit)


@pytest.fixture
def hub_cache(tmp_path: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """Two versions of a model that differ in their weights and in their chat template."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = HubCache(tmp_path / "models--org--tiny")
    path = folder("llava")
    cache.add(COMMITS[0], path)
    _flip_a_bit_of("embed_tokens")(path)
    _chat_template(path)
    cache.add(COMMITS[1], path)
    cache.point("main", COMMITS[0])
    cache.point("next", COMMITS[1])
    return cache


def test_a_hub_id_is_read_at_one_commit_which_its_card_names(
    hub_cache: HubCache, tiny_encoder: Callable[[str], VlmEncoder]
) -> None:
    card = load_encoder(hub_cache.model, device="cpu").card
    assert (card.model, card.revision, card.commit) == (hub_cache.model, None, COMMITS[0])
    assert card.fingerprint == tiny_encoder("llava").card.fingerprint


def test_a_branch_that_has_moved_on_is_another_model_and_a_commit_stays(hub_cache: HubCache) -> None:
    before = load_encoder(hub_cache.model, revision="main", device="cpu").card
    hub_cache.point("main", COMMITS[1])

    moved = load_encoder(hub_cache.model, revision="main", device="cpu").card
    pinned = load_encoder(hub_cache.model, revision=COMMITS[0], device="cpu").card

    assert (moved.commit, pinned.commit) == (COMMITS[1], COMMITS[0])
    assert moved.weights_sha256 != before.weights_sha256
    assert moved.processor_sha256 != before.processor_sha256
    assert pinned.fingerprint == before.fingerprint
    assert load_encoder(hub_cache.model, revision="next", device="cpu").card.fingerprint == moved.fingerprint


def test_a_branch_that_moves_while_it_is_read_is_read_at_the_commit_that_it_began_with(
    hub_cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_encoder(hub_cache.model, device="cpu").card

    def move_on(*arguments: Any, **options: Any) -> Any:
        hub_cache.point("main", COMMITS[1])
        return load_processor(*arguments, **options)

    monkeypatch.setattr(loading, "load_processor", move_on)
    assert load_encoder(hub_cache.model, device="cpu").card == whole


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "111111"])
def test_a_hub_id_without_a_commit_is_refused(hub_cache: HubCache, revision: str | None) -> None:
    (hub_cache.folder / "refs" / "main").unlink()
    with pytest.raises(ModelLoadError, match=r"'org/tiny'.*commit is not known.*a commit that is in the loc"):
        load_encoder(hub_cache.model, revision=revision, device="cpu")


@pytest.mark.parametrize("written", ["", "main", "1" * 39, "x" * 40])
def test_a_cache_that_names_no_commit_is_refused(hub_cache: HubCache, written: str) -> None:
    hub_cache.point("main", written)
    with pytest.raises(ModelLoadError, match="as its commit, which is none"):
        load_encoder(hub_cache.model, device="cpu")


def test_an_unknown_hub_id_is_named(hub_cache: HubCache) -> None:
    with pytest.raises(ModelLoadError, match="'org/other'"):
        load_encoder("org/other", device="cpu")
    with pytest.raises(ModelLoadError, match="'no such name'"):
        load_encoder("no such name", device="cpu")


def test_a_card_is_the_encoders_card(tiny_vlm: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"attention_mass": 0.7, "image_place": "as_written", "dtype": "bfloat16"}
    for family in ("llava", "qwen2_vl"):
        assert load_card(str(tiny_vlm(family)), **options) == load(tiny_vlm(family), **options).card
