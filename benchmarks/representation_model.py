"""The models of the representation benchmark: real architectures with random weights, and their processors.

A checkpoint is written in shards of safetensors, as on the hub, and block by block, which needs no memory.
"""

import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.machine import GIB
from benchmarks.representation_speech import Speech
from scalselect_assets.method.representation.dtypes import DtypeName


@dataclass(frozen=True, slots=True)
class ModelPreset:
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
) -> ModelPreset:
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
    return ModelPreset("llava", text, {"model_type": "clip_vision_model", "patch_size": 14, **tower}, dtype)


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
) -> ModelPreset:
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
    return ModelPreset("qwen3_vl", text, {"out_hidden_size": width, **vision}, "bfloat16")


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


PRESETS: Final[Mapping[str, ModelPreset]] = MappingProxyType(
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


def configuration(preset: ModelPreset, tokenizer: Any) -> Any:
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


_SHARD_BYTES: Final = 5 * 10**8  # small enough that all cores write, one shard each
_SPARE_DISK_BYTES: Final = 3 * GIB
_NOISE_VALUES: Final = 2**22 - 3  # prime, so that no two rows of a matrix begin at the same place
DTYPES_ON_DISK: Final = MappingProxyType({"float32": "F32", "bfloat16": "BF16", "float16": "F16"})
COMPLETE: Final = "benchmark.json"  # what was generated; written last
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
    """Generate the checkpoint; in memory are one block of noise and, for each core, one part of a tensor."""
    from transformers.core_model_loading import revert_weight_conversion

    preset = _with_layers(PRESETS[generated.model], generated.layers)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_processor(preset, folder)
    model = empty_model(configuration(preset, tokenizer), preset.dtype)
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
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        writing = []
        for place, shapes in enumerate(shards, start=1):
            shard = f"model-{place:05}-of-{len(shards):05}.safetensors"
            writing.append(threads.submit(_write_shard, folder / shard, shapes, preset.dtype, noise))
            weight_map.update(dict.fromkeys(shapes, shard))
        for shard_written in writing:
            shard_written.result()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": checkpoint_bytes(folder)}, "weight_map": weight_map})
    )
    (folder / COMPLETE).write_text(json.dumps(asdict(generated)))


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
        sum(value.nbytes for value in empty_model(configuration(one, tokenizer), one.dtype).parameters())
        for one in (_with_layers(preset, 1), _with_layers(preset, 2))
    ]
    room = shutil.disk_usage(folder).free - _SPARE_DISK_BYTES - sizes[0]
    fitting = min(layers, 1 + room // (sizes[1] - sizes[0]))
    if fitting < 2:
        raise SystemExit(f"{folder} has no room for two layers of {name}; choose another --folder")
    return int(fitting)


def _with_layers(preset: ModelPreset, layers: int) -> ModelPreset:
    return replace(preset, text={**preset.text, "num_hidden_layers": layers})


def empty_model(config: Any, dtype: DtypeName) -> Any:
    """The whole model without memory for its weights."""
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
        header[name] = {"dtype": DTYPES_ON_DISK[dtype], "shape": shape, "data_offsets": [begin, end]}
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


def write_processor(preset: ModelPreset, folder: Path) -> Any:
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


def _processor_settings(preset: ModelPreset) -> dict[str, Any]:
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
