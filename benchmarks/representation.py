"""Speed, memory and accuracy of the representation: ours, and the whole model with eager attention.

Both ways get the same samples and the same generated checkpoint: a real architecture of Transformers with
random weights, sharded as on the hub, and its real processor on a small tokenizer. The straightforward way
runs the whole model on one sample at a time, with all attentions and hidden states, and applies the
definition to them. Both are clocked from image files (in the page cache) to vectors, in one process and in
turns, so that a busy machine slows both; the rate of the machine's matrix products is measured in the same
turns. Memory and seconds to load are of a process of its own for each way.

It needs numpy, torch, Transformers, Pillow and Jinja alone, so that a bare GPU machine can run it, as
``python -m benchmarks.representation`` or by its path from the root of the repository. The tables of
``docs/benchmarks.md`` are

* throughput, limit and breakdown on two cores: without options;
* the same on a GPU: ``--model llava-1.5-7b --device cuda --samples 4096 --workers 16 --batch-tokens 32768``
  and likewise ``--model qwen3-vl-8b``;
* bfloat16 against float32: ``--agreement --samples 1024 --model llava-1.5-7b --device cuda``;
* memory to load a 7B checkpoint: ``--load-memory --model llava-1.5-7b``, which needs 14 GB of disk, or as
  much as there is, under ``--folder``.
"""

import argparse
import copy
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.machine import GIB, MIB
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.representation.loading import (
    DEFAULT_ATTENTION_MASS,
    DeviceName,
    DtypeName,
    load_encoder,
    resolve_device,
)
from scalselect_assets.method.representation.processors import load_processor
from scalselect_assets.method.representation.quiet import quiet_transformers

_TOLERANCE: Final = 1e-4  # float32, of a vector's largest component
_BREAKDOWN_SAMPLES: Final = 256  # prepared by one thread in every round, which is slow beside a GPU
_TOP: Final = 0.16  # arXiv 2602.11636 trains on 16 % of LLaVA-665K
_SHARE_OF_ENERGY: Final = 0.9  # of the same paper

Matrix = NDArray[np.float32]


# --- Models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preset:
    """A model to generate.

    Attributes:
        family: Its ``model_type``.
        text: Of the configuration's text part.
        vision: Of its vision part.
        dtype: Of the weights on disk, and to compute in where nothing else is asked for.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    dtype: DtypeName


def _llava(
    layers: int, width: int, mlp: int, heads: int, vocabulary: int, tower: Mapping[str, int], dtype: DtypeName
) -> Preset:
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    return Preset("llava", text, {"model_type": "clip_vision_model", "patch_size": 14, **tower}, dtype)


def _clip(layers: int, width: int, mlp: int, heads: int, side: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "image_size": side,
    }


def _qwen3_vl(
    layers: int,
    width: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    mrope: tuple[int, int, int],
    vision: Mapping[str, Any],
) -> Preset:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": list(mrope),
            "mrope_interleaved": True,
        },
    }
    return Preset("qwen3_vl", text, {"out_hidden_size": width, **vision}, "bfloat16")


def _qwen3_vision(depth: int, width: int, mlp: int, heads: int, deepstack: tuple[int, ...]) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_heads": heads,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": list(deepstack),
        "num_position_embeddings": 2304,
    }


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "tiny": _llava(3, 64, 128, 4, 8192, _clip(3, 32, 64, 2, 56), "float32"),
        "mid": _llava(24, 1024, 2816, 16, 32064, _clip(12, 192, 768, 3, 224), "float32"),
        "llava-1.5-7b": _llava(32, 4096, 11008, 32, 32064, _clip(24, 1024, 4096, 16, 336), "bfloat16"),
        "tiny-qwen3-vl": _qwen3_vl(3, 64, 128, 4, 2, 8192, (4, 2, 2), _qwen3_vision(3, 32, 64, 2, (0, 1))),
        "qwen3-vl-8b": _qwen3_vl(
            36, 4096, 12288, 32, 8, 151936, (24, 20, 20), _qwen3_vision(27, 1152, 4304, 16, (8, 16, 24))
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a family writes a conversation.

    Attributes:
        template: Its chat template.
        image_mark: What an image becomes, as often as it has vision tokens.
        answer: Finds the content of an assistant's turn in the prompt.
        special_tokens: All of them, in the order of their ids.
        bos, eos, pad: The usual three; ``bos`` is empty where the family has none.
    """

    template: str
    image_mark: str
    answer: str
    special_tokens: tuple[str, ...]
    bos: str
    eos: str
    pad: str


_PARTS: Final = (
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
)
PROMPTS: Final[Mapping[str, Prompt]] = MappingProxyType(
    {
        "llava": Prompt(
            template="{{ bos_token }}"
            "{%- for message in messages -%}"
            "{{ message['role'] | upper + ': ' }}" + _PARTS.replace("IMAGE", "<image>\\n") + "{%- if "
            "message['role'] == 'assistant' -%}{{ eos_token }}{%- else -%}{{ ' ' }}{%- endif -%}"
            "{%- endfor -%}",
            image_mark="<image>",
            answer=r"ASSISTANT: (.*?)</s>",
            special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
            bos="<s>",
            eos="</s>",
            pad="<pad>",
        ),
        "qwen3_vl": Prompt(
            template="{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
            + _PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
            + "{{ '<|im_end|>\\n' }}{%- endfor -%}",
            image_mark="<|image_pad|>",
            answer=r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>",
            special_tokens=(
                "<|endoftext|>",
                "<|im_start|>",
                "<|im_end|>",
                "<|vision_start|>",
                "<|vision_end|>",
                "<|image_pad|>",
                "<|video_pad|>",
            ),
            bos="",
            eos="<|im_end|>",
            pad="<|endoftext|>",
        ),
    }
)


def configuration(preset: Preset, tokenizer: Any) -> Any:
    """The Transformers configuration of a preset."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        **preset.text,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if preset.family == "llava":
        top = {
            "image_token_index": token("<image>"),
            "image_seq_length": (preset.vision["image_size"] // preset.vision["patch_size"]) ** 2,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
    else:
        top = {
            "image_token_id": token("<|image_pad|>"),
            "video_token_id": token("<|video_pad|>"),
            "vision_start_token_id": token("<|vision_start|>"),
            "vision_end_token_id": token("<|vision_end|>"),
        }
    return transformers.AutoConfig.for_model(
        preset.family, text_config=text, vision_config=dict(preset.vision), tie_word_embeddings=False, **top
    )


# --- Checkpoint ---------------------------------------------------------------------------------------------

_SHARD_BYTES: Final = 5 * 10**9  # of the hub's shards
_SPARE_DISK_BYTES: Final = 3 * GIB
_NOISE_VALUES: Final = 2**22 - 3  # prime, so that no two rows of a matrix begin at the same place
_DTYPES_ON_DISK: Final = MappingProxyType({"float32": "F32", "bfloat16": "BF16", "float16": "F16"})
_COMPLETE: Final = "benchmark.json"  # what was generated; written last
# Standard deviations of the weights relative to 1 / sqrt(fan in), by the name's parts.
_GAINS: Final = (
    # Sharp enough that part of the image suffices, soft enough that no single token takes all.
    (("language_model", ".layers.0.self_attn.q_proj"), 2.2),
    (("language_model", ".layers.0.self_attn.k_proj"), 2.2),
    # GELU halves the variance; the image tokens should arrive at the scale of the words.
    (("multi_modal_projector",), math.sqrt(2)),
    (("merger",), math.sqrt(2)),
    # Residual branches below the stream keep an image readable through the random layers.
    (("self_attn.out_proj",), 0.5),
    (("mlp.fc2",), 0.5),
    (("attn.proj.",), 0.5),
    (("mlp.linear_fc2",), 0.5),
)


@dataclass(frozen=True, slots=True)
class Generated:
    """What a checkpoint was generated from."""

    model: str
    layers: int
    seed: int


def write_checkpoint(folder: Path, generated: Generated) -> None:
    """Generate the checkpoint; in memory are one block of noise and one part of a tensor at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    preset = _with_layers(PRESETS[generated.model], generated.layers)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_processor(preset, folder)
    model = _empty_model(configuration(preset, tokenizer), preset.dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    names = {
        # Transformers saves the other tensors under the hub's names by itself, those of a CLIP tower not.
        re.sub(r"^((?:model\.)?vision_tower)\.(?!vision_model\.)", r"\1.vision_model.", name): tensor
        for name, tensor in revert_weight_conversion(model, dict(model.state_dict())).items()
    }
    shards = _shards({name: tuple(tensor.shape) for name, tensor in names.items()}, preset.dtype)
    noise = torch.randn(_NOISE_VALUES, generator=torch.Generator().manual_seed(generated.seed))
    weight_map = {}
    for place, shapes in enumerate(shards, start=1):
        shard = f"model-{place:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / shard, shapes, preset.dtype, noise)
        weight_map.update(dict.fromkeys(shapes, shard))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": checkpoint_bytes(folder)}, "weight_map": weight_map})
    )
    (folder / _COMPLETE).write_text(json.dumps(asdict(generated)))


def checkpoint_bytes(folder: Path) -> int:
    """Size of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def layers_that_fit(name: str, folder: Path) -> int:
    """Text layers of the preset, or fewer if the disk has no room for all."""
    preset = PRESETS[name]
    layers = int(preset.text["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_processor(preset, Path(scratch))
    sizes = [
        sum(value.nbytes for value in _empty_model(configuration(one, tokenizer), one.dtype).parameters())
        for one in (_with_layers(preset, 1), _with_layers(preset, 2))
    ]
    room = shutil.disk_usage(folder).free - _SPARE_DISK_BYTES - sizes[0]
    fitting = min(layers, 1 + room // (sizes[1] - sizes[0]))
    if fitting < 2:
        raise SystemExit(f"{folder} has no room for two layers of {name}; choose another --folder")
    return int(fitting)


def _with_layers(preset: Preset, layers: int) -> Preset:
    return replace(preset, text={**preset.text, "num_hidden_layers": layers})


def _empty_model(config: Any, dtype: DtypeName) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: DtypeName) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, in runs of at most ``_SHARD_BYTES``."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = _tensor_bytes(shape, dtype)
        if shards[-1] and held + size > _SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    return shards


def _tensor_bytes(shape: tuple[int, ...], dtype: DtypeName) -> int:
    return math.prod(shape) * cast("int", getattr(torch, dtype).itemsize)


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DtypeName, noise: torch.Tensor
) -> None:
    """A safetensors file, value by value: the library itself wants all its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _tensor_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPES_ON_DISK[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for part in _values(name, shape, noise):
                part.to(getattr(torch, dtype)).view(torch.uint8).numpy().tofile(file)


def _values(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of one tensor in order, at the scale that its place in the model needs."""
    size = math.prod(shape)
    mean, deviation = _distribution(name, shape)
    # Words of a trained model share a direction. Without one each instruction token prefers other patches,
    # and the mean over the instruction is flat.
    shared = noise[: shape[-1]] if name.endswith("embed_tokens.weight") else None
    begin = zlib.crc32(name.encode()) % len(noise)
    done = 0
    while done < size:
        part = noise[begin : begin + size - done] * deviation + mean
        if shared is not None:
            part = (part + shared[torch.arange(done, done + len(part)) % len(shared)]) / math.sqrt(2)
        yield part
        done += len(part)
        begin = 0


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if name.endswith("bias"):
        return 0.0, 0.0
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.7, 0.0  # a sharp attention, as the gains of the projections give where there is no norm
    if name.endswith(("embed_tokens.weight", "class_embedding")):
        return 0.0, 1.0
    if name.endswith(("position_embedding.weight", "pos_embed.weight")):
        return 0.0, 0.3
    if len(shape) == 1:
        return 1.0, 0.0
    gain = next((gain for parts, gain in _GAINS if all(part in name for part in parts)), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


# --- Tokenizer, processor and samples -----------------------------------------------------------------------

_N_WORDS: Final = 3000
_SENTENCE_WORDS: Final = 12
_TEXT_TOKENS: Final = (130.0, 0.6, 40, 400)  # median and log-deviation, and the limits, like LLaVA-665K's
_TEXT_SHAPES: Final = 0.6180339887498949  # steps of the golden ratio spread evenly however many are taken
_IMAGE_SIZES: Final = ((640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (640, 360), (1024, 768))


class Speech:
    """Sentences of made-up words, frequent and rare ones."""

    def __init__(self, seed: int) -> None:
        """The words are always the same; the seed decides what is said."""
        fixed = np.random.default_rng(0)
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self._words = list(
            dict.fromkeys("".join(fixed.choice(syllables, size)) for size in fixed.integers(1, 5, _N_WORDS))
        )
        weights = 1 / (10 + np.arange(len(self._words)))
        self._probabilities = weights / weights.sum()
        self._generator = np.random.default_rng(seed)

    def say(self, n_words: int) -> str:
        """So many words, in sentences."""
        words = self._generator.choice(self._words, max(1, n_words), p=self._probabilities)
        sentences = (
            words[start : start + _SENTENCE_WORDS] for start in range(0, len(words), _SENTENCE_WORDS)
        )
        return " ".join(f"{' '.join(sentence).capitalize()}." for sentence in sentences)

    def converse(self, n_words: int) -> Conversation:
        """One image and one or more questions with their answers."""
        rounds = min(int(self._generator.geometric(0.5)), 1 + n_words // 25)
        asked = self._generator.uniform(0.2, 0.6) * n_words / rounds
        answered = n_words / rounds - asked
        turns = []
        for place in range(rounds):
            question = self.say(round(asked))
            turns.append(Turn("user", (question,) if place else (IMAGE, question)))
            turns.append(Turn("assistant", (self.say(round(answered)),)))
        return Conversation(tuple(turns))


def write_processor(preset: Preset, folder: Path) -> Any:
    """Write tokenizer, processor and chat template; returns the tokenizer."""
    prompt = PROMPTS[preset.family]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    speech = Speech(0)
    bpe.train_from_iterator(
        (f"USER: {speech.say(100)} ASSISTANT: {speech.say(100)}" for _ in range(200)),
        trainers.BpeTrainer(
            vocab_size=6000,
            special_tokens=list(prompt.special_tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=prompt.bos or None,
        eos_token=prompt.eos,
        pad_token=prompt.pad,
        extra_special_tokens={"image_token": prompt.image_mark},
        model_max_length=preset.text["max_position_embeddings"],
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(prompt.template)
    (folder / "processor_config.json").write_text(json.dumps(_processor_settings(preset), indent=1))
    return tokenizer


def _processor_settings(preset: Preset) -> dict[str, Any]:
    """``processor_config.json``, its classes named as the hub does: the machine decides on the backend."""
    if preset.family == "llava":
        side = preset.vision["image_size"]
        images = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        return {
            "image_processor": {**images.to_dict(), "image_processor_type": "CLIPImageProcessor"},
            "processor_class": "LlavaProcessor",
            "patch_size": preset.vision["patch_size"],
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,  # the class token, which the default strategy drops again
        }
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=preset.vision["patch_size"],
        temporal_patch_size=preset.vision["temporal_patch_size"],
        merge_size=preset.vision["spatial_merge_size"],
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    settings = {**images.to_dict(), "image_processor_type": "Qwen2VLImageProcessorFast"}
    return {
        "image_processor": settings,
        "video_processor": {
            **{name: settings[name] for name in ("do_normalize", "image_mean", "image_std", "patch_size")},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        "processor_class": "Qwen3VLProcessor",
    }


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Reads images that were written before, so from the page cache; a worker process needs only the path."""

    folder: Path

    def __call__(self, reference: str) -> bytes:
        """The file's bytes."""
        return (self.folder / reference).read_bytes()


@dataclass(frozen=True, slots=True)
class Pool:
    """Samples, of which ``reuse`` on average share an image."""

    reuse: float
    samples: tuple[ChatSample, ...]

    @property
    def n_images(self) -> int:
        """Distinct ones."""
        return len({sample.images for sample in self.samples})


def make_pools(folder: Path, n: int, reuses: Sequence[float], seed: int) -> list[Pool]:
    """Write the images and make a pool for each reuse; all have the same conversations.

    Any few of the samples, taken from the beginning, have images of their own and texts of all lengths.
    """
    counts = [math.ceil(n / reuse) for reuse in reuses]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(lambda place: _write_image(folder, place, seed), range(max(counts))))
    speech, typical = Speech(seed + 1), NormalDist()
    middle, deviation, shortest, longest = _TEXT_TOKENS
    conversations = []
    for place in range(n):
        spread = math.exp(deviation * typical.inv_cdf(((place + 0.5) * _TEXT_SHAPES) % 1))
        conversations.append(speech.converse(round(min(max(middle * spread, shortest), longest))))
    return [
        Pool(
            reuse,
            tuple(
                ChatSample(conversation, (_image_name(place % count),))
                for place, conversation in enumerate(conversations)
            ),
        )
        for reuse, count in zip(reuses, counts, strict=True)
    ]


def _image_name(place: int) -> str:
    return f"{place:06}.jpg"


def _write_image(folder: Path, place: int, seed: int) -> None:
    """Smooth noise at several scales, in the sizes of photographs from the web."""
    generator = np.random.default_rng((seed, place))
    width, height = _IMAGE_SIZES[place % len(_IMAGE_SIZES)]
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 20), (256, 10)):
        coarse = generator.standard_normal((cells * height // width, cells, 3)) * 40 + 128
        layer = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        picture += (np.asarray(layer, np.float32) - 128) * (strength / 40)
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(
        folder / _image_name(place), "JPEG", quality=88
    )


# --- The two ways -------------------------------------------------------------------------------------------

OURS: Final = "ours"
STRAIGHTFORWARD: Final = "whole model, eager"


class Straightforward:
    """The whole model, all attentions and hidden states, one sample at a time."""

    def __init__(self, folder: Path, device: torch.device, dtype: DtypeName) -> None:
        """Load every weight."""
        with quiet_transformers():
            self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, attn_implementation="eager", dtype=getattr(torch, dtype)
            )
        self._model.to(device).eval()
        self._processor = load_processor(str(folder), None, self._model.config)
        self._prompt = PROMPTS[self._model.config.model_type]

    def represent(self, samples: Iterable[ChatSample], read_image: ImageFolder) -> Matrix:
        """(n, d)."""
        return np.stack([self._represent(sample, read_image) for sample in samples])

    @torch.inference_mode()
    def _represent(self, sample: ChatSample, read_image: ImageFolder) -> Matrix:
        (reference,) = sample.images
        image = Image.open(io.BytesIO(read_image(reference))).convert("RGB")
        text = self._processor.apply_chat_template(_messages(sample.conversation), tokenize=False)
        inputs = self._processor(
            text=[text],
            images=[[image]],
            return_tensors="pt",
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
        )
        starts, ends = inputs.pop("offset_mapping")[0].unbind(-1)
        vision = inputs["input_ids"][0] == self._model.config.image_token_id
        token = self._prompt.image_mark
        expanded = text.replace(token, token * int(vision.sum()))
        answer = torch.zeros_like(vision)
        for match in re.finditer(self._prompt.answer, expanded, re.DOTALL):
            begin, end = match.span(1)
            answer |= (starts < end) & (ends > begin)
        instruction = ~vision & ~answer

        parameter = next(self._model.parameters())
        output = self._model(
            **{
                name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            },
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        share = output.attentions[0][0].float().mean(0).cpu()[instruction][:, vision].double().mean(0)
        order = share.argsort(descending=True, stable=True)
        reached = (share[order] / share.sum()).cumsum(0)
        dominant = order[: int((reached <= DEFAULT_ATTENTION_MASS).sum()) + 1]
        states = output.hidden_states[1][0].cpu()[vision].float()
        return np.asarray(states[dominant].mean(0).numpy())


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]


@dataclass(frozen=True, slots=True)
class How:
    """Everything that both ways and all measurements share."""

    folder: Path
    images: ImageFolder
    device: DeviceName
    dtype: DtypeName
    batch_tokens: int
    workers: int
    baseline_samples: int
    repeats: int

    def straightforward(self) -> Straightforward:
        """Loaded."""
        return Straightforward(self.folder, resolve_device(self.device), self.dtype)

    def encoder(self) -> VlmEncoder:
        """Loaded."""
        return load_encoder(str(self.folder), device=self.device, dtype=self.dtype)

    def encode(self, encoder: VlmEncoder, samples: Sequence[ChatSample]) -> list[Representation]:
        """Ours, all samples.

        Raises:
            RuntimeError: A generated sample was rejected.
        """
        outcomes = encoder.encode(samples, self.images, batch_tokens=self.batch_tokens, workers=self.workers)
        found = [outcome for outcome in outcomes if isinstance(outcome, Representation)]
        if len(found) < len(outcomes):
            rejected = next(outcome for outcome in outcomes if not isinstance(outcome, Representation))
            raise RuntimeError(
                f"{len(outcomes) - len(found)} of {len(outcomes)} samples rejected: {rejected}"
            )
        return found

    def synchronise(self) -> None:
        """Wait for the device."""
        if resolve_device(self.device).type == "cuda":
            torch.cuda.synchronize()


# --- What has to be computed --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Flops, of a pool or per sample: a multiplication with its addition counts as two.

    Attributes:
        tower: Vision tower, its used layers, and projector, once per image.
        layer: Of the first layer: queries, keys and values of all tokens, attention of the instruction on
            everything before it, attention, output projection and MLP of the dominant tokens, and of the
            MLP's last projection, which commutes with the mean, one row per sample.
        whole_layer: The first layer for all tokens.
    """

    tower: float
    layer: float
    whole_layer: float

    @property
    def needed(self) -> float:
        """What the representation takes."""
        return self.tower + self.layer

    @property
    def with_whole_layer(self) -> float:
        """What it takes if the layer is run as it is."""
        return self.tower + self.whole_layer


def work_per_sample(config: Any, pool: Pool, representations: Sequence[Representation]) -> Work:
    """The mean over the pool; the image is taken to stand at the beginning of a prompt."""
    by_image = {
        sample.images: representation.n_vision_tokens
        for sample, representation in zip(pool.samples, representations, strict=True)
    }
    towers = sum(_tower_flops(config, n_vision) for n_vision in by_image.values())
    layers = [_layer_flops(config.get_text_config(), one) for one in representations]
    n = len(representations)
    return Work(towers / n, sum(part for part, _ in layers) / n, sum(whole for _, whole in layers) / n)


def _tower_flops(config: Any, n_vision: int) -> float:
    tower = config.vision_config
    width, mlp, out = tower.hidden_size, tower.intermediate_size, config.get_text_config().hidden_size
    values = 3 * tower.patch_size**2
    if config.model_type == "llava":
        patches, tokens = n_vision, n_vision + 1
        layers = tower.num_hidden_layers + config.vision_feature_layer + 1
        projector = width * out + out * out
    else:
        patches = tokens = n_vision * tower.spatial_merge_size**2
        layers = tower.depth
        values *= tower.temporal_patch_size
        merged = width * tower.spatial_merge_size**2
        projector = merged * merged + merged * out
    per_layer = 2 * tokens * (4 * width * width + 2 * width * mlp) + 4 * tokens**2 * width
    return float(2 * patches * values * width + layers * per_layer + 2 * n_vision * projector)


def _layer_flops(text: Any, of: Representation) -> tuple[float, float]:
    """Of one sample: as far as needed, and for all tokens."""
    width, mlp, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * head, text.num_key_value_heads * head
    n, n_vision, n_dominant = of.n_tokens, of.n_vision_tokens, of.n_dominant_tokens
    projections = 2 * n * width * (queries + 2 * keys)
    per_token = 2 * (queries * width + 2 * width * mlp)
    back = 2 * width * mlp  # linear up to the mean, so once per sample
    seen_by_instruction = of.n_instruction_tokens * (n_vision + (n - n_vision) / 2)
    attention = queries * (2 * seen_by_instruction + 4 * n_dominant * n_vision / 2)
    whole = projections + n * (per_token + back) + 4 * queries * n * (n + 1) / 2
    return projections + attention + n_dominant * per_token + back, whole


def matmul_workloads(config: Any, how: How) -> list[machine.Workload]:
    """Products of the sizes at hand; the fastest is what the machine can do."""
    device, dtype = resolve_device(how.device), getattr(torch, how.dtype)
    text, tower = config.get_text_config(), config.vision_config
    rows, times = (16384, 10) if device.type == "cuda" else (4096, 1)
    side = 8192 if device.type == "cuda" else 2048
    shapes = {
        (rows, text.hidden_size, text.intermediate_size),
        (rows, text.intermediate_size, text.hidden_size),
        (rows, text.hidden_size, text.hidden_size),
        (rows, tower.hidden_size, tower.intermediate_size),
        (side, side, side),
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                left @ right
            how.synchronise()

        return run

    return [
        machine.Workload(
            f"({m:,}, {k:,}) × ({k:,}, {n:,})",
            "GFLOP/s",
            2.0 * m * k * n * times,
            # As a linear layer holds its weight: transposed.
            product(random(m, k), random(n, k).T),
        )
        for m, k, n in sorted(shapes)
    ]


# --- One process each ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process that loads one way and runs it; in bytes.

    Attributes:
        load_seconds: From imported libraries to ready.
        resident_before: With libraries imported and nothing loaded.
        loaded: Peak up to when it was loaded.
        resident_loaded: What was resident then.
        peak: Peak of the whole run.
        device_peak: The most that was allocated on a CUDA device.
        weights: Bytes of the weights that are kept, for ours.
    """

    load_seconds: float
    resident_before: int
    loaded: int
    resident_loaded: int
    peak: int
    device_peak: int | None
    weights: int | None


def memory_run(way: str, how: How, samples: Sequence[ChatSample]) -> Memory:
    """Load one way and run it on some samples (none: only load)."""
    config = transformers.AutoConfig.from_pretrained(how.folder)
    load_processor(str(how.folder), None, config)
    _empty_model(config, how.dtype)  # imports what a model of this kind needs
    cuda = resolve_device(how.device).type == "cuda"
    if cuda:
        torch.zeros(1, device="cuda")
    before = machine.resident_bytes()
    machine.forget_peak()
    start = time.perf_counter()
    loaded: Straightforward | VlmEncoder = how.encoder() if way == OURS else how.straightforward()
    how.synchronise()
    seconds = time.perf_counter() - start
    peak_of_load, resident = machine.peak_bytes(), machine.resident_bytes()
    weights = None
    if isinstance(loaded, VlmEncoder):
        weights = loaded.card.n_parameters * cast("int", getattr(torch, how.dtype).itemsize)
        if samples:
            how.encode(loaded, samples)
    elif samples:
        loaded.represent(samples, how.images)
    return Memory(
        seconds,
        before,
        peak_of_load,
        resident,
        machine.peak_bytes(),
        torch.cuda.max_memory_allocated() if cuda else None,
        weights,
    )


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds per sample of the parts of ours, each alone and one after the other; best of the rounds.

    Attributes:
        preparation: Decoding, processor, template and tokenizer, on one thread.
        tower: Vision tower and projector.
        layer: The first layer.
        rest: Of a run on prepared samples, what is neither.
    """

    preparation: float
    tower: float
    layer: float
    rest: float


@dataclass(frozen=True, slots=True)
class Speed:
    """One way on one pool.

    Attributes:
        way: Which one.
        reuse: Samples per image.
        n_samples: That were clocked.
        mean_tokens: Of them.
        seconds: Of each round.
    """

    way: str
    reuse: float
    n_samples: int
    mean_tokens: float
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Samples per second of the fastest round."""
        return self.n_samples / min(self.seconds)

    @property
    def typical(self) -> float:
        """Samples per second of the median round."""
        return self.n_samples / median(self.seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that one process measured, in turns.

    Attributes:
        speeds: Each way on each pool.
        work: Per sample, by reuse.
        matmuls: GFLOP/s of the machine's products.
        breakdown: Of ours on the first pool.
        tokens: Mean number of tokens, vision tokens, dominant and instruction tokens.
        difference: Of the two ways' vectors, largest over all samples, of a vector's largest component.
    """

    speeds: tuple[Speed, ...]
    work: dict[float, Work]
    matmuls: dict[str, float]
    breakdown: Breakdown | None
    tokens: dict[str, float]
    difference: float | None


def comparison_run(how: How, pools: Sequence[Pool], ways: Sequence[str]) -> Comparison:
    """Load both ways and clock them in turns with the machine's products."""
    config = transformers.AutoConfig.from_pretrained(how.folder)
    few = pools[0].samples[: how.baseline_samples]
    encoder = how.encoder() if OURS in ways else None
    baseline = how.straightforward() if STRAIGHTFORWARD in ways else None
    workloads = matmul_workloads(config, how)
    products = [workload.name for workload in workloads]
    found: dict[str, Any] = {}

    def remember(name: str, run: Callable[[], Any]) -> machine.Workload:
        def clocked() -> None:
            print(f"running: {name}", file=sys.stderr, flush=True)
            found[name] = run()
            how.synchronise()

        return machine.Workload(name, "", 1, clocked)

    if baseline:
        workloads.append(remember(STRAIGHTFORWARD, lambda: baseline.represent(few, how.images)))
    parts: _Parts | None = None
    if encoder:
        workloads += [
            remember(f"{OURS} {pool.reuse:g}", lambda pool=pool: how.encode(encoder, pool.samples))  # type: ignore[misc]
            for pool in pools
        ]
        parts = _Parts(how, encoder, pools[0].samples[:_BREAKDOWN_SAMPLES])
        workloads += [
            remember("preparation alone", parts.prepare),
            remember("model alone", parts.run_model),
        ]
    rates = machine.time_in_turns(workloads, how.repeats)

    speeds, work, tokens = [], {}, {}
    representations: list[Representation] = []
    for pool in pools if encoder else ():
        representations = found[f"{OURS} {pool.reuse:g}"]
        mean_tokens = float(np.mean([one.n_tokens for one in representations]))
        speeds.append(
            Speed(
                OURS,
                pool.reuse,
                len(pool.samples),
                mean_tokens,
                rates[f"{OURS} {pool.reuse:g}"].seconds,
            )
        )
        work[pool.reuse] = work_per_sample(config, pool, representations)
    difference = None
    if encoder:
        representations = found[f"{OURS} {pools[0].reuse:g}"]
        tokens = {
            name: float(np.mean([getattr(one, f"n_{name}") for one in representations]))
            for name in ("tokens", "vision_tokens", "dominant_tokens", "instruction_tokens")
        }
    if baseline:
        mean_tokens = (
            float(np.mean([one.n_tokens for one in representations[: len(few)]]))
            if representations
            else math.nan
        )
        seconds = rates[STRAIGHTFORWARD].seconds
        speeds.insert(0, Speed(STRAIGHTFORWARD, pools[0].reuse, len(few), mean_tokens, seconds))
    if encoder and baseline:
        ours = np.stack([one.vector for one in representations[: len(few)]])
        difference = float(relative_differences(ours, found[STRAIGHTFORWARD]).max())
    return Comparison(
        tuple(speeds),
        work,
        {name: rates[name].best for name in products},
        parts.breakdown(rates) if parts else None,
        tokens,
        difference,
    )


def relative_differences(found: Matrix, expected: Matrix) -> Matrix:
    """(n,) largest difference of each row, of its largest component."""
    largest: Matrix = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    return largest


class _Parts:
    """Runs the preparation alone, and the model alone on what was prepared."""

    def __init__(self, how: How, encoder: VlmEncoder, samples: Sequence[ChatSample]) -> None:
        self._how, self._encoder, self._samples = how, encoder, samples
        self._prepared: list[Any] = []
        self._clocked = _ClockedFirstLayer(encoder._first_layer, how)
        self._model = cast("Any", copy.copy(encoder))
        self._model._first_layer = self._clocked
        self._model._prepared = lambda *_: (item for item in self._prepared)
        self._seconds: list[tuple[float, float]] = []

    def prepare(self) -> None:
        self._prepared = list(self._encoder._prepared(self._samples, self._how.images, 0))

    def run_model(self) -> None:
        self._clocked.tower = self._clocked.layer = 0.0
        self._model.encode(self._samples, self._how.images, batch_tokens=self._how.batch_tokens)
        self._seconds.append((self._clocked.tower, self._clocked.layer))

    def breakdown(self, rates: Mapping[str, machine.Rate]) -> Breakdown:
        n = len(self._samples)
        counted = zip(rates["model alone"].seconds, self._seconds[1:], strict=True)
        total, (tower, layer) = min(counted)
        preparation = min(rates["preparation alone"].seconds)
        return Breakdown(preparation / n, tower / n, layer / n, (total - tower - layer) / n)


class _ClockedFirstLayer:
    """A first layer that adds up the seconds in its two parts."""

    def __init__(self, first_layer: Any, how: How) -> None:
        self._first_layer, self._how = first_layer, how
        self.device = first_layer.device
        self.tower = self.layer = 0.0

    def image_features(self, *arguments: Any) -> Any:
        with self._clock() as seconds:
            features = self._first_layer.image_features(*arguments)
        self.tower += seconds[0]
        return features

    def represent(self, *arguments: Any) -> Any:
        with self._clock() as seconds:
            states = self._first_layer.represent(*arguments)
        self.layer += seconds[0]
        return states

    @contextmanager
    def _clock(self) -> Iterator[list[float]]:
        seconds: list[float] = []
        self._how.synchronise()
        start = time.perf_counter()
        yield seconds
        self._how.synchronise()
        seconds.append(time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Agreement:
    """bfloat16 against float32.

    Attributes:
        n: Samples.
        ranks: Directions kept in float32 and in bfloat16.
        typical: Median over the samples of the largest difference, of a vector's largest component.
        largest: The largest such difference.
        overlap: Shared part of the top 16 % by leverage.
        by: What computed the scores.
    """

    n: int
    ranks: tuple[int, int]
    typical: float
    largest: float
    overlap: float
    by: str


def vectors_run(how: How, pool: Pool) -> Matrix:
    """(n, d)."""
    return np.stack([one.vector for one in how.encode(how.encoder(), pool.samples)])


def agreement(how: How, pool: Pool) -> Agreement:
    """Represent a pool in both dtypes and compare what is selected."""
    exact, rounded = (
        machine.fresh_process(vectors_run, replace(how, dtype=dtype), pool)
        for dtype in ("float32", "bfloat16")
    )
    by, (k, scores), (other_k, other_scores) = (
        _scores_by(),
        leverage_scores(exact),
        leverage_scores(rounded),
    )
    size = round(_TOP * len(scores))
    tops = [set(np.argsort(-one, kind="stable")[:size].tolist()) for one in (scores, other_scores)]
    differences = relative_differences(rounded, exact)
    return Agreement(
        len(scores),
        (k, other_k),
        float(np.median(differences)),
        float(differences.max()),
        len(tops[0] & tops[1]) / size,
        by,
    )


def _scores_by() -> str:
    bare = any(importlib.util.find_spec(name) is None for name in ("scipy", "threadpoolctl"))
    return "numpy's SVD in float64, as SciPy or threadpoolctl is missing" if bare else "our method"


def leverage_scores(x: Matrix) -> tuple[int, NDArray[np.float64]]:
    """Rank and scores; by an SVD where the machine has not what our method needs for them."""
    if _scores_by() != "our method":
        centred = x - x.mean(axis=0, dtype=np.float64)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        k = int(np.searchsorted(np.cumsum(s**2) / np.square(s).sum(), _SHARE_OF_ENERGY)) + 1
        return k, np.square(u[:, :k]).sum(axis=1)
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer
    from scalselect_assets.method.subspace.moments import Moments
    from scalselect_assets.method.subspace.rank import EnergyThreshold

    subspace = fit_subspace(Moments.of(x), EnergyThreshold(_SHARE_OF_ENERGY))
    return subspace.k, LeverageScorer(subspace).scores(x)


# --- Report -------------------------------------------------------------------------------------------------


def describe(device: DeviceName) -> dict[str, str]:
    """Hardware, versions and threads, for a header; run it in a process of its own, it may start CUDA."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    header = {
        "CPU": f"{cpu.strip() or platform.machine()}, {cores} cores used of {os.cpu_count()}",
        "load average before the run": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Transformers "
        f"{transformers.__version__}, numpy {np.__version__}",
        "torch threads": str(torch.get_num_threads()),
        "device": "CPU",
    }
    if resolve_device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        header["device"] = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    return header


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, numbers to the right."""
    print("\n| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_comparison(comparison: Comparison, memories: Mapping[str, Memory], how: How) -> None:
    """Throughput, limit and breakdown."""
    _print_speeds(comparison, memories)
    if comparison.difference is not None:
        print(
            f"\nThe two ways' vectors differ by at most {comparison.difference:.1e} of a vector's largest "
            f"component ({how.dtype})."
        )
    if not comparison.tokens:
        return
    print(
        "A sample has on average {tokens:.0f} tokens: {vision_tokens:.0f} of vision, of which "
        "{dominant_tokens:.0f} are dominant, and {instruction_tokens:.0f} of the instruction.".format(
            **comparison.tokens
        )
    )
    _print_limit(comparison, how)
    if comparison.breakdown:
        _print_breakdown(comparison, comparison.breakdown, how)


def _print_speeds(comparison: Comparison, memories: Mapping[str, Memory]) -> None:
    slow = next((speed for speed in comparison.speeds if speed.way == STRAIGHTFORWARD), None)
    rows = []
    for speed in comparison.speeds:
        memory = memories[speed.way]
        host = f"{(memory.peak - memory.resident_before) / MIB:,.0f}"
        rows.append(
            (
                speed.way,
                f"{speed.reuse:g}",
                f"{speed.n_samples}",
                f"{speed.mean_tokens:.0f}",
                f"{speed.best:.3g}",
                f"{speed.typical:.3g}",
                f"{speed.best / slow.best:.1f}" if slow else "",
                f"{memory.load_seconds:.1f}",
                host,
                "" if memory.device_peak is None else f"{memory.device_peak / MIB:,.0f}",
            )
        )
    print_table(
        (
            "",
            "samples per image",
            "samples",
            "tokens each",
            "samples/s, best",
            "median",
            "× whole model",
            "load s",
            "own MiB",
            "GPU MiB",
        ),
        rows,
    )


def _print_limit(comparison: Comparison, how: How) -> None:
    rate = max(comparison.matmuls.values())
    name = max(comparison.matmuls, key=comparison.matmuls.__getitem__)
    best = {speed.reuse: speed.best for speed in comparison.speeds if speed.way == OURS}
    rows = []
    for reuse, work in comparison.work.items():
        for label, flops in (("needed", work.needed), ("whole layer", work.with_whole_layer)):
            limit = rate * 1e9 / flops
            parts = f"{work.tower / 1e9:.1f} + {(flops - work.tower) / 1e9:.1f}"
            reached = f"{best[reuse] / limit:.0%}"
            rows.append((label, f"{reuse:g}", parts, f"{flops / 1e9:.1f}", f"{limit:.3g}", reached))
    print_table(("flops", "samples per image", "tower + layer, GFLOP", "GFLOP", "limit", "reached"), rows)
    print(
        f"\nLimit: samples/s at {rate:,.0f} GFLOP/s, the fastest of these products in {how.dtype}, {name}. "
        "Needed: queries, keys and values of all tokens, the rest of the first layer for the dominant "
        "tokens alone, and the MLP's last projection for their mean. All products: "
        + ", ".join(f"{product} {rate:,.0f}" for product, rate in comparison.matmuls.items())
        + "."
    )


def _print_breakdown(comparison: Comparison, parts: Breakdown, how: How) -> None:
    rate = max(comparison.matmuls.values()) * 1e9
    first = next(speed for speed in comparison.speeds if speed.way == OURS)
    work = comparison.work[first.reuse]
    whole = 1 / first.best
    rows = [
        ("preparation, one thread", parts.preparation, ""),
        ("vision tower and projector", parts.tower, f"{work.tower / rate / parts.tower:.0%}"),
        ("first layer", parts.layer, f"{work.layer / rate / parts.layer:.0%}"),
        ("rest", parts.rest, ""),
        ("end to end", whole, f"{work.needed / rate / whole:.0%}"),
    ]
    print_table(
        ("part of ours, alone", "ms per sample", "of its limit"),
        ((name, f"{seconds * 1e3:.2f}", reached) for name, seconds, reached in rows),
    )
    busy = (parts.tower + parts.layer) / whole
    print(
        f"\nThe model alone is {busy:.0%} of the time from end to end"
        + (" (how busy the GPU is). " if resolve_device(how.device).type == "cuda" else ". ")
        + f"Preparation would need {parts.preparation / (parts.tower + parts.layer):.1f} processes to keep "
        f"up with the model; it had {how.workers or 'a thread'}."
    )


def print_agreement(found: Agreement) -> None:
    """bfloat16 against float32."""
    print_table(
        ("samples", "k float32", "k bfloat16", "median difference", "largest", "top 16 % shared"),
        [
            (
                f"{found.n}",
                f"{found.ranks[0]}",
                f"{found.ranks[1]}",
                f"{found.typical:.1e}",
                f"{found.largest:.1e}",
                f"{found.overlap:.2%}",
            )
        ],
    )
    print(f"\nDifferences are of a vector's largest component. Scores by {found.by}.")


def print_load_memory(memory: Memory, on_disk: int, layers: str) -> None:
    """What ``load_encoder`` takes."""
    weights = memory.weights or 0
    before = memory.resident_before
    print_table(
        (
            "checkpoint MiB",
            "layers",
            "weights kept MiB",
            "peak while loading, own MiB",
            "of the checkpoint",
            "× weights kept",
            "resident afterwards, own MiB",
            "load s",
        ),
        [
            (
                f"{on_disk / MIB:,.0f}",
                layers,
                f"{weights / MIB:,.0f}",
                f"{(memory.loaded - before) / MIB:,.0f}",
                f"{(memory.loaded - before) / on_disk:.1%}",
                f"{(memory.loaded - before) / weights:.2f}",
                f"{(memory.resident_loaded - before) / MIB:,.0f}",
                f"{memory.load_seconds:.1f}",
            )
        ],
    )
    print("\nOwn: less what was resident with the libraries imported. Pages of mapped files count.")


# --- Command ------------------------------------------------------------------------------------------------


def checkpoint(options: argparse.Namespace, scratch: Path) -> tuple[Path, str]:
    """A generated checkpoint, or the one kept in ``--checkpoint``, and its layers in words."""
    wanted = int(PRESETS[options.model].text["num_hidden_layers"])
    folder = options.checkpoint or scratch / "checkpoint"
    marker = folder / _COMPLETE
    if marker.exists():
        generated = Generated(**json.loads(marker.read_text()))
        if (generated.model, generated.seed) != (options.model, options.seed):
            raise SystemExit(f"{folder} holds {generated}; remove it or name another --checkpoint")
    elif folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty and holds no complete checkpoint; remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        generated = Generated(options.model, layers_that_fit(options.model, folder), options.seed)
        print(f"generating {generated} in {folder}", file=sys.stderr, flush=True)
        machine.fresh_process(write_checkpoint, folder, generated)
    if generated.layers < wanted:
        return folder, f"{generated.layers} of {wanted} (no room for more on the disk)"
    return folder, f"{wanted}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the options ask for, print it as Markdown, and write it as JSON if asked to."""
    options = parse_options(arguments)
    machine.use_cores(options.cores)
    options.dtype = options.dtype or PRESETS[options.model].dtype
    ways = [way for way in (STRAIGHTFORWARD, OURS) if way in (options.only or way)]
    header = machine.fresh_process(describe, options.device)
    with tempfile.TemporaryDirectory(prefix="scalselect-benchmark-", dir=options.folder) as scratch:
        folder, layers = checkpoint(options, Path(scratch))
        header["model"] = (
            f"{options.model}, {layers} layers, {checkpoint_bytes(folder) / GIB:.2f} GiB on disk"
        )
        header["dtype"] = options.dtype
        header["batches"] = f"{options.batch_tokens} tokens, {options.workers} workers"
        print("# Representation\n")
        for name, value in header.items():
            print(f"- {name}: {value}", flush=True)
        images = Path(scratch) / "images"
        images.mkdir()
        how = How(
            folder,
            ImageFolder(images),
            options.device,
            options.dtype,
            options.batch_tokens,
            options.workers,
            options.baseline_samples,
            options.repeats,
        )
        results = {"header": header, **measure(options, how, ways, layers)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    difference = results.get("comparison", {}).get("difference")
    if options.dtype == "float32" and difference is not None and not difference < _TOLERANCE:
        raise SystemExit(
            f"the two ways differ by {difference:.1e}; in float32 at most {_TOLERANCE} is rounding"
        )


def measure(options: argparse.Namespace, how: How, ways: Sequence[str], layers: str) -> dict[str, Any]:
    """One of the three modes."""
    if options.load_memory:
        memory = machine.fresh_process(memory_run, OURS, how, ())
        print_load_memory(memory, checkpoint_bytes(how.folder), layers)
        return {"load": asdict(memory), "checkpoint_bytes": checkpoint_bytes(how.folder)}
    pools = make_pools(how.images.folder, options.samples, options.reuse, options.seed)
    if options.agreement:
        found = agreement(how, pools[0])
        print_agreement(found)
        return {"agreement": asdict(found)}
    memories = {}
    for way in ways:
        print(f"memory: {way}", file=sys.stderr, flush=True)
        n = len(pools[0].samples) if way == OURS else how.baseline_samples
        memories[way] = machine.fresh_process(memory_run, way, how, pools[0].samples[:n])
    comparison = machine.fresh_process(comparison_run, how, pools, ways)
    print_comparison(comparison, memories, how)
    return {
        "memory": {way: asdict(memory) for way, memory in memories.items()},
        "comparison": asdict(comparison),
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.representation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="mid", help="what to generate (mid)")
    add("--checkpoint", type=Path, help="keep the generated checkpoint there, or use the one that is there")
    add("--folder", type=Path, help="where to put what is generated (the system's temporary folder)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=tuple(_DTYPES_ON_DISK), help="to compute in (that of the weights on disk)")
    add("--samples", type=int, default=64, help="of ours (64)")
    add("--baseline-samples", type=int, default=8, help="of the whole model, the first ones (8)")
    add("--reuse", nargs="+", type=float, default=[1, 3], help="average samples per image (1 3)")
    add("--batch-tokens", type=int, default=4096)
    add("--workers", type=int, default=0, help="processes that prepare samples for ours (0: a thread)")
    add("--repeats", type=int, default=3, help="rounds that are counted, after one that is not (3)")
    add("--cores", type=int, help="cores to use (all)")
    add("--seed", type=int, default=0)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-ours", dest="only", action="store_const", const=[OURS])
    only.add_argument("--only-baseline", dest="only", action="store_const", const=[STRAIGHTFORWARD])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--agreement", action="store_true", help="bfloat16 against float32 instead")
    mode.add_argument("--load-memory", action="store_true", help="memory of loading ours instead")
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
