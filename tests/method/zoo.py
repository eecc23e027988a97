"""Tiny vision-language models of real Transformers architectures, and the representation by its definition.

`write_tiny_vlm` writes a folder that ``from_pretrained`` cannot tell from a checkpoint on the hub, except by
its size: the architecture, the processor's settings, the names of the special tokens and the behaviour of the
chat template are the family's own; the weights are random and the tokenizer is trained on a few sentences.

`Reference` is the yardstick for everything that computes a representation more cheaply. It runs the whole
model with eager attention and shares no code with the package under test beyond the conversation type. In
particular it finds the answers with one regular expression per family over the final prompt text.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import PIL.Image
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
)

from scalselect_assets.method.representation.conversation import IMAGE, Conversation

_HIDDEN: Final = 64
_HEADS: Final = 4
_KV_HEADS: Final = 2
_MAX_POSITIONS: Final = 2048
_VISION_HIDDEN: Final = 32
_PATCH: Final = 7
_N_MERGES: Final = 120
_VOCABULARY_MULTIPLE: Final = 64  # checkpoints pad their embedding beyond the tokenizer's last id

_CORPUS: Final = (
    "USER: What is this? ASSISTANT: This is a small blue square.",
    "user assistant system model User Assistant System",
    "You are a helpful assistant. Answer the question with Yes or No. Answer briefly.",
    "How many circles are on the left of the largest one? There are two of them.",
    "What colour is the picture? It is red, green and blue.",
)

# ------------------------------------------------------------------------------------- chat templates

# LLaVA-1.5: images first, no turn end but a space; the tokenizer adds the BOS token.
_LLAVA_TEMPLATE: Final = """\
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%}{{ message['role'] | upper + ': ' }}{%- endif -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
  {%- for part in message['content'] if part['type'] == 'text' -%}
    {%- if message['role'] == 'assistant' -%}
      {%- generation -%}{{ part['text'] + ' ' }}{%- endgeneration -%}
    {%- else -%}{{ part['text'] + ' ' }}{%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# LLaVA-1.6 on Mistral: images first, the system text in front of the first instruction.
_LLAVA_NEXT_TEMPLATE: Final = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}
  {%- elif message['role'] == 'user' -%}
    {{ '[INST] ' }}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
    {{ ' [/INST]' }}
  {%- elif message['role'] == 'assistant' -%}
    {{ ' ' + message['content'][0]['text'] + '</s> ' }}
  {%- else -%}
    {{ raise_exception('Only user and assistant roles are supported!') }}
  {%- endif -%}
{%- endfor -%}
"""

# LLaVA-OneVision: ChatML in its own spelling, a space after the role and no line break after a turn.
_LLAVA_ONEVISION_TEMPLATE: Final = """\
{%- for message in messages -%}
  {{ '<|im_start|>' + message['role'] + ' ' }}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
  {%- for part in message['content'] if part['type'] == 'text' -%}
    {%- if message['role'] == 'assistant' -%}
      {%- generation -%}{{ '\n' + part['text'] }}{%- endgeneration -%}
    {%- else -%}{{ '\n' + part['text'] }}{%- endif -%}
  {%- endfor -%}
  {{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

_QWEN_TURNS: Final = """\
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['content'] is string -%}{{ message['content'] }}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
      {%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# Qwen2-VL and Qwen2.5-VL put in a system text where there is none.
_QWEN2_TEMPLATE: Final = (
    """\
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
  {%- endif -%}
"""
    + _QWEN_TURNS
)
# Qwen3-VL puts in none.
_QWEN3_TEMPLATE: Final = "{%- for message in messages -%}\n" + _QWEN_TURNS

_INTERNVL_TEMPLATE: Final = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\n' }}
    {%- elif part['type'] == 'video' -%}{{ '<video>\n' }}
    {%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# Idefics3 and SmolVLM differ in the token that opens the prompt.
_IDEFICS_TURNS: Final = """\
{%- for message in messages -%}
  {{- message['role'] | capitalize -}}
  {%- if message['content'][0]['type'] == 'image' -%}{{ ':' }}{%- else -%}{{ ': ' }}{%- endif -%}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}{{ '<image>' }}
    {%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
  {%- endfor -%}
  {{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
_IDEFICS3_TEMPLATE: Final = "{{ '<|begin_of_text|>' -}}\n" + _IDEFICS_TURNS
_SMOLVLM_TEMPLATE: Final = "{{ '<|im_start|>' -}}\n" + _IDEFICS_TURNS

# Gemma 3: the system text opens the first user turn, texts are trimmed, roles must alternate.
_GEMMA3_TEMPLATE: Final = """\
{{- bos_token -}}
{%- set opening = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set opening = messages[0]['content'][0]['text'] + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif -%}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
  {{ '<start_of_turn>' + role + '\n' + (opening if loop.first else '') }}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
    {%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
  {%- endfor -%}
  {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

PALIGEMMA_TEMPLATE: Final = """\
{%- for message in messages -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}{{ 'answer: ' }}{%- endif -%}
  {%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
  {{ '\n' }}
{%- endfor -%}
"""
"""A template that somebody could put beside a PaliGemma; the hub's repositories have none.

`Reference` reads a PaliGemma folder only with this text as its ``chat_template.jinja``.
"""


# ------------------------------------------------------------------------------------------- families


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What makes a tiny model one of its family.

    Attributes:
        processor_class: Name of its processor, as the checkpoint's files name it.
        image_processor: Class of its image processor without torchvision.
        image_processor_type: The spelling that the hub's checkpoints use for it.
        image_settings: Settings of the image processor that differ from the class's defaults.
        processor_settings: Arguments of the processor besides its parts.
        video_processor_type: Class of its video processor, for those that take videos.
        special_tokens: Every special token, in the order of the ids.
        named_tokens: Those that the processor reads as attributes of the tokenizer.
        bos, eos, pad: The usual three; ``bos`` is empty where the family has none.
        writes_bos: The tokenizer itself puts the BOS token in front.
        qwen_tokenizer: Qwen2's tokenizer class instead of the generic one.
        vision: The configuration's vision part.
        text: The configuration's text part, beyond what all have in common.
        top: The configuration's own values; a token's name stands for its id.
        template: The chat template, if the family has one.
        answer: The content of an assistant turn in the expanded prompt (group 1).
        older_layout: Image processor and template in files of their own, without ``processor_config.json``.
    """

    processor_class: str
    image_processor: str
    image_processor_type: str
    image_settings: Mapping[str, Any]
    special_tokens: tuple[str, ...]
    eos: str
    pad: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    top: Mapping[str, Any]
    template: str | None
    answer: str
    bos: str = ""
    writes_bos: bool = False
    qwen_tokenizer: bool = False
    named_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    processor_settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    video_processor_type: str = ""
    older_layout: bool = False


def _clip(image_size: int) -> dict[str, Any]:
    return {**_siglip(image_size), "model_type": "clip_vision_model", "projection_dim": _VISION_HIDDEN}


def _siglip(image_size: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": _VISION_HIDDEN,
        "intermediate_size": 2 * _VISION_HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": _PATCH,
    }


_QWEN_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TOP: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_CHATML_ANSWER: Final = r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>"
_IDEFICS_ANSWER: Final = r"Assistant: (.*?)<end_of_utterance>"
_ROW_COLUMN_TOKENS: Final = tuple(
    f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)
)
_TILE: Final = 28
"""Side of one crop for the families that cut an image into crops."""

_RECIPES: Final[Mapping[str, _Recipe]] = MappingProxyType(
    {
        "llava": _Recipe(
            processor_class="LlavaProcessor",
            image_processor="CLIPImageProcessorPil",
            image_processor_type="CLIPImageProcessor",
            image_settings={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
            processor_settings={
                "patch_size": _PATCH,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                "image_token": "<image>",
            },
            special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
            named_tokens={"image_token": "<image>"},
            bos="<s>",
            eos="</s>",
            pad="<pad>",
            writes_bos=True,
            vision=_clip(56),
            text={"model_type": "llama"},
            top={"image_token_index": "<image>", "image_seq_length": 64},
            template=_LLAVA_TEMPLATE,
            answer=r"ASSISTANT: (.*?) (?=USER: |\Z)",
        ),
        "llava_next": _Recipe(
            processor_class="LlavaNextProcessor",
            image_processor="LlavaNextImageProcessorPil",
            image_processor_type="LlavaNextImageProcessor",
            image_settings={
                "size": {"shortest_edge": _TILE},
                "crop_size": {"height": _TILE, "width": _TILE},
                "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            },
            processor_settings={
                "patch_size": _PATCH,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                "image_token": "<image>",
            },
            special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
            named_tokens={"image_token": "<image>"},
            bos="<s>",
            eos="</s>",
            pad="<pad>",
            writes_bos=True,
            vision=_clip(_TILE),
            text={"model_type": "mistral", "sliding_window": None},
            top={
                "image_token_index": "<image>",
                "image_seq_length": 16,
                "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            },
            template=_LLAVA_NEXT_TEMPLATE,
            answer=r"\[/INST\] (.*?)</s> ",
        ),
        "llava_onevision": _Recipe(
            processor_class="LlavaOnevisionProcessor",
            image_processor="LlavaOnevisionImageProcessorPil",
            image_processor_type="LlavaOnevisionImageProcessor",
            image_settings={
                "size": {"height": _TILE, "width": _TILE},
                "image_grid_pinpoints": [[28 * a, 28 * b] for a in range(1, 4) for b in range(1, 4)],
            },
            processor_settings={
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": "anyres_max_4",
            },
            video_processor_type="LlavaOnevisionVideoProcessor",
            special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
            named_tokens={"image_token": "<image>", "video_token": "<video>"},
            eos="<|im_end|>",
            pad="<|endoftext|>",
            qwen_tokenizer=True,
            vision={**_siglip(_TILE), "vision_use_head": False},
            text={"model_type": "qwen2"},
            top={
                "image_token_index": "<image>",
                "video_token_index": "<video>",
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": "anyres_max_4",
                "image_grid_pinpoints": [[28 * a, 28 * b] for a in range(1, 4) for b in range(1, 4)],
            },
            template=_LLAVA_ONEVISION_TEMPLATE,
            answer=r"<\|im_start\|>assistant \n(.*?)<\|im_end\|>",
        ),
        "qwen2_vl": _Recipe(
            processor_class="Qwen2VLProcessor",
            image_processor="Qwen2VLImageProcessorPil",
            image_processor_type="Qwen2VLImageProcessor",
            image_settings={
                "patch_size": _PATCH,
                "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84},
            },
            video_processor_type="Qwen2VLVideoProcessor",
            special_tokens=_QWEN_TOKENS,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            qwen_tokenizer=True,
            vision={
                "depth": 3,
                "embed_dim": _VISION_HIDDEN,
                "hidden_size": _HIDDEN,  # of the language model: Qwen2-VL's own naming
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": _PATCH,
            },
            text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
            top={**_QWEN_TOP, "tie_word_embeddings": True},
            template=_QWEN2_TEMPLATE,
            answer=_CHATML_ANSWER,
        ),
        "qwen2_5_vl": _Recipe(
            processor_class="Qwen2_5_VLProcessor",
            image_processor="Qwen2VLImageProcessorPil",
            image_processor_type="Qwen2VLImageProcessor",
            image_settings={"patch_size": _PATCH, "min_pixels": 28 * 28, "max_pixels": 84 * 84},
            special_tokens=_QWEN_TOKENS,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            qwen_tokenizer=True,
            vision={
                "depth": 3,
                "hidden_size": _VISION_HIDDEN,
                "out_hidden_size": _HIDDEN,
                "intermediate_size": 2 * _VISION_HIDDEN,
                "num_heads": 2,
                "patch_size": _PATCH,
                "window_size": 28,  # two by two merged patches
                "fullatt_block_indexes": [1],
            },
            text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
            top=_QWEN_TOP,
            template=_QWEN2_TEMPLATE,
            answer=_CHATML_ANSWER,
            older_layout=True,
        ),
        "qwen3_vl": _Recipe(
            processor_class="Qwen3VLProcessor",
            image_processor="Qwen2VLImageProcessorPil",
            image_processor_type="Qwen2VLImageProcessorFast",
            image_settings={
                "patch_size": 8,
                "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
            video_processor_type="Qwen3VLVideoProcessor",
            special_tokens=_QWEN_TOKENS,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            qwen_tokenizer=True,
            vision={
                "depth": 3,
                "hidden_size": _VISION_HIDDEN,
                "out_hidden_size": _HIDDEN,
                "intermediate_size": 2 * _VISION_HIDDEN,
                "num_heads": 2,
                "patch_size": 8,
                "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0, 1],
            },
            text={
                "head_dim": _HIDDEN // _HEADS,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            top={**_QWEN_TOP, "tie_word_embeddings": True},
            template=_QWEN3_TEMPLATE,
            answer=_CHATML_ANSWER,
        ),
        "internvl": _Recipe(
            processor_class="InternVLProcessor",
            image_processor="GotOcr2ImageProcessorPil",
            image_processor_type="GotOcr2ImageProcessorFast",
            # The processor's own default switches the crops on; the hub's files leave the setting off.
            image_settings={"size": {"height": 42, "width": 42}, "max_patches": 6, "crop_to_patches": False},
            processor_settings={"image_seq_length": 9},
            video_processor_type="InternVLVideoProcessor",
            special_tokens=(
                "<|endoftext|>",
                "<|im_start|>",
                "<|im_end|>",
                "<img>",
                "</img>",
                "<IMG_CONTEXT>",
                "<video>",
            ),
            named_tokens={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
            eos="<|im_end|>",
            pad="<|endoftext|>",
            qwen_tokenizer=True,
            vision={
                "hidden_size": _VISION_HIDDEN,
                "intermediate_size": 2 * _VISION_HIDDEN,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": [42, 42],
                "patch_size": [_PATCH, _PATCH],
                "attention_bias": True,
            },
            text={"model_type": "qwen2"},
            top={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 9, "tie_word_embeddings": False},
            template=_INTERNVL_TEMPLATE,
            answer=_CHATML_ANSWER,
        ),
        "idefics3": _Recipe(
            processor_class="Idefics3Processor",
            image_processor="Idefics3ImageProcessorPil",
            image_processor_type="Idefics3ImageProcessor",
            image_settings={
                "size": {"longest_edge": 4 * _TILE},
                "max_image_size": {"longest_edge": _TILE},
                "do_image_splitting": True,
            },
            processor_settings={"image_seq_len": 4},
            special_tokens=(
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|finetune_right_pad_id|>",
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
                "<global-img>",
                *_ROW_COLUMN_TOKENS,
            ),
            bos="<|begin_of_text|>",
            eos="<end_of_utterance>",
            pad="<|finetune_right_pad_id|>",
            writes_bos=True,
            vision={
                "hidden_size": _VISION_HIDDEN,
                "intermediate_size": 2 * _VISION_HIDDEN,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": _TILE,
                "patch_size": _PATCH,
            },
            text={"model_type": "llama"},
            top={"image_token_id": "<image>", "scale_factor": 2},
            template=_IDEFICS3_TEMPLATE,
            answer=_IDEFICS_ANSWER,
        ),
        "smolvlm": _Recipe(
            processor_class="SmolVLMProcessor",
            image_processor="SmolVLMImageProcessorPil",
            image_processor_type="SmolVLMImageProcessor",
            image_settings={
                "size": {"longest_edge": 3 * 56},
                "max_image_size": {"longest_edge": 56},
                "do_image_splitting": True,
            },
            processor_settings={"image_seq_len": 4},
            video_processor_type="SmolVLMVideoProcessor",
            special_tokens=(
                "<|endoftext|>",
                "<|im_start|>",
                "<|im_end|>",
                "<global-img>",
                *_ROW_COLUMN_TOKENS,
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
            ),
            named_tokens={
                "fake_image_token": "<fake_token_around_image>",
                "image_token": "<image>",
                "end_of_utterance_token": "<end_of_utterance>",
                "global_image_token": "<global-img>",
            },
            bos="<|im_start|>",
            eos="<end_of_utterance>",
            pad="<|im_end|>",
            vision={
                "hidden_size": _VISION_HIDDEN,
                "intermediate_size": 2 * _VISION_HIDDEN,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": _PATCH,
            },
            text={"model_type": "llama"},
            top={"image_token_id": "<image>", "scale_factor": 4},
            template=_SMOLVLM_TEMPLATE,
            answer=_IDEFICS_ANSWER,
        ),
        "gemma3": _Recipe(
            processor_class="Gemma3Processor",
            image_processor="Gemma3ImageProcessorPil",
            image_processor_type="Gemma3ImageProcessor",
            image_settings={"size": {"height": 56, "width": 56}},
            processor_settings={"image_seq_length": 16},
            special_tokens=(
                "<pad>",
                "<eos>",
                "<bos>",
                "<unk>",
                "<start_of_turn>",
                "<end_of_turn>",
                "<start_of_image>",
                "<end_of_image>",
                "<image_soft_token>",
            ),
            named_tokens={
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
            writes_bos=True,
            vision={**_siglip(56), "vision_use_head": False},
            text={
                "head_dim": _HIDDEN // _HEADS,
                "query_pre_attn_scalar": _HIDDEN // _HEADS,
                "sliding_window": 20,  # shorter than an image with its question
                "sliding_window_pattern": 2,
            },
            top={
                "image_token_index": "<image_soft_token>",
                "boi_token_index": "<start_of_image>",
                "eoi_token_index": "<end_of_image>",
                "mm_tokens_per_image": 16,
            },
            template=_GEMMA3_TEMPLATE,
            answer=r"<start_of_turn>model\n(.*?)<end_of_turn>",
        ),
        "paligemma": _Recipe(
            processor_class="PaliGemmaProcessor",
            image_processor="SiglipImageProcessorPil",
            image_processor_type="SiglipImageProcessor",
            image_settings={"size": {"height": 42, "width": 42}, "image_seq_length": 36},
            special_tokens=(
                "<pad>",
                "<eos>",
                "<bos>",
                "<unk>",
                "<image>",
                *(f"<loc{number:04}>" for number in range(1024)),
                *(f"<seg{number:03}>" for number in range(128)),
            ),
            named_tokens={"image_token": "<image>"},
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
            writes_bos=True,
            vision={**_siglip(42), "vision_use_head": False},
            text={"model_type": "gemma", "head_dim": _HIDDEN // _HEADS, "num_key_value_heads": 1},
            top={"image_token_index": "<image>", "projection_dim": _HIDDEN, "hidden_size": _HIDDEN},
            template=None,
            answer=r"answer: (.*?)\n",
        ),
    }
)

FAMILIES: Final[tuple[str, ...]] = tuple(_RECIPES)
"""The ``model_type`` of every family that `write_tiny_vlm` can write."""


# ---------------------------------------------------------------------------------------- checkpoints


def write_tiny_vlm(family: str, folder: Path, *, seed: int = 0, layers: int = 3) -> Path:
    """Write a tiny model of ``family`` with its tokenizer, processor and chat template.

    The files are those of a checkpoint on the hub: ``processor_config.json`` with the image and video
    processors inside it, ``chat_template.jinja`` beside it. Two families stand for what else the hub holds:

    - ``qwen2_5_vl`` has the older layout, as its repositories do: ``preprocessor_config.json`` and
      ``chat_template.json``, no ``processor_config.json``.
    - ``paligemma`` has no chat template. Its processor takes a text that opens with one ``<image>`` per
      image, expands them, puts the BOS token *after the last image* and a line break at the end. It returns
      ``token_type_ids`` of zeros, with which the model lets every token of the prompt see every other.

    Args:
        family: One of `FAMILIES`.
        folder: Folder to write to; made if missing.
        seed: Decides the weights, and nothing else.
        layers: Decoder layers of the language model; at least two, as the last hidden state of the whole
            model has passed the final norm and the representation is read before it.

    Returns:
        ``folder``.

    Raises:
        ValueError: Fewer than two layers.
    """
    if layers < 2:
        raise ValueError(
            f"{layers} layers; at least 2 are needed to tell the first layer from the final norm"
        )
    recipe = _RECIPES[family]
    tokenizer = _tokenizer(recipe)
    _model(family, recipe, tokenizer, seed, layers).save_pretrained(folder)
    if recipe.vision.get("model_type") in {"clip_vision_model", "siglip_vision_model"}:
        _rename_tower(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    _write_processor(recipe, folder)
    return folder


def _rename_tower(weights: Path) -> None:
    """Name the tensors of a CLIP or SigLIP tower as the hub does.

    Transformers saves the other tensors under the names of the hub by itself, these it does not.
    """
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for name, tensor in load(weights.read_bytes()).items()
    }
    weights.write_bytes(save(tensors, metadata={"format": "pt"}))


def _tokenizer(recipe: _Recipe) -> Any:
    """A byte-level BPE, so that any text has tokens, with the family's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + _N_MERGES, initial_alphabet=alphabet, show_progress=False
        ),
    )
    options = {
        "bos_token": recipe.bos or None,
        "eos_token": recipe.eos,
        "pad_token": recipe.pad,
        "model_max_length": _MAX_POSITIONS,
        "extra_special_tokens": dict(recipe.named_tokens),
    }
    specials = [
        transformers.AddedToken(token, normalized=False, special=True) for token in recipe.special_tokens
    ]
    if recipe.qwen_tokenizer:
        model = json.loads(bpe.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **options)
        tokenizer.add_tokens(specials, special_tokens=True)
    else:
        bpe.add_special_tokens(specials)
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
        if recipe.writes_bos:
            bos = (recipe.bos, bpe.token_to_id(recipe.bos))
            bpe.post_processor = processors.TemplateProcessing(
                single=f"{recipe.bos} $A", pair=f"{recipe.bos} $A {recipe.bos} $B", special_tokens=[bos]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **options)
    return tokenizer


def _model(family: str, recipe: _Recipe, tokenizer: Any, seed: int, layers: int) -> Any:
    """The whole model with its weights; the caller's random streams do not move."""
    vocab_size = math.ceil(len(tokenizer) / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    text = {
        "vocab_size": vocab_size,
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": _MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **deepcopy(recipe.text),  # configurations write into what they are given
    }
    tokens = set(recipe.special_tokens)
    top = {
        key: tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) and value in tokens else value
        for key, value in recipe.top.items()
    }
    config = AutoConfig.for_model(family, vision_config=deepcopy(recipe.vision), text_config=text, **top)
    # Constructing a module draws from the global CPU generator; the caller's stream must not move.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _fill(model, seed)
    return model.eval()


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter from one generator, in the order of the names.

    The libraries' own initialisation leaves attention almost uniform, norms at one and biases at zero, under
    which many a mistake changes nothing. Here every layer keeps the scale of what it reads, the first
    attention of the language model is sharp, and norms and biases show whether they were applied.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {
        f"{name}.{part}": float(part == "weight" and not type(module).__name__.startswith("Gemma"))
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        for part in ("weight", "bias")
    }
    scales = {
        f"{name}.weight": 1 / getattr(module, "scalar_embed_scale", 1.0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name in norms:
            sharper = 0.7 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
            parameter.copy_(norms[name] + sharper + 0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            # Words of a trained model share a direction. Without one each instruction token prefers other
            # patches, and the mean over the instruction is flat again.
            shared = torch.randn(parameter.shape[1], generator=generator)
            parameter.copy_((noise + shared) / math.sqrt(2) * scales[name])
        elif name in scales or any(part in name for part in ("position_embedding", "pos_embed", "_token")):
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 1:
            # Biases, class and newline embeddings, layer scales.
            parameter.copy_(0.2 * noise if name.endswith("bias") else 0.5 + 0.5 * noise)
        else:
            # A bare matrix is applied from the right; modules hold theirs transposed.
            fan_in = parameter.shape[0] if name.endswith("projection_weight") else parameter[0].numel()
            sharp = ".layers.0.self_attn." in name and "vision" not in name
            gain = 2.2 if sharp and name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            parameter.copy_(noise * gain / math.sqrt(fan_in))


def _write_processor(recipe: _Recipe, folder: Path) -> None:
    """The processor's files, as `write_tiny_vlm` describes them."""
    image_processor = getattr(transformers, recipe.image_processor)(**recipe.image_settings)
    image_settings = {**image_processor.to_dict(), "image_processor_type": recipe.image_processor_type}
    if recipe.older_layout:
        image_settings |= {**recipe.image_settings, "processor_class": recipe.processor_class}
        # The class translates the older pair of limits to a size.
        image_settings.pop("size", None)
        _write_json(folder / "preprocessor_config.json", image_settings)
        _write_json(folder / "chat_template.json", {"chat_template": recipe.template})
        return
    parts: dict[str, Any] = {"image_processor": image_settings}
    if recipe.video_processor_type:
        frames = (
            "do_convert_rgb",
            "do_normalize",
            "do_rescale",
            "do_resize",
            "image_mean",
            "image_std",
            "resample",
        )
        parts["video_processor"] = {
            **{key: image_settings[key] for key in frames},
            "do_sample_frames": False,
            "video_processor_type": recipe.video_processor_type,
        }
    _write_json(
        folder / "processor_config.json",
        {**parts, "processor_class": recipe.processor_class, **recipe.processor_settings},
    )
    if recipe.template is not None:
        (folder / "chat_template.jinja").write_text(recipe.template, encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ reference


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRepresentation:
    """The representation of one sample and the sizes of the token sets that it was made from.

    Attributes:
        vector: (d,) float32.
        n_tokens: Length of the model's input.
        n_vision_tokens: Image tokens in it.
        n_dominant_tokens: Vision tokens kept, whose mean the vector is.
        n_instruction_tokens: Tokens that are neither vision nor part of an answer.
    """

    vector: NDArray[np.float32]
    n_tokens: int
    n_vision_tokens: int
    n_dominant_tokens: int
    n_instruction_tokens: int


class Reference:
    """The representation by its definition, from the whole model with eager attention.

    The family's own processor prepares the input. It is built without its video part, whose classes need
    torchvision; nothing else of it is replaced.

    Raises:
        ValueError: The folder has no chat template (a PaliGemma as `write_tiny_vlm` writes it), so that
            nothing says where answers stand.
    """

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.processor = _image_text_processor(folder)
        if self.processor.chat_template is None:
            raise ValueError(
                f"{folder} has no chat template, so the answers in its prompts are not defined; put one "
                "there (for PaliGemma, PALIGEMMA_TEMPLATE as chat_template.jinja)"
            )
        self._answer = re.compile(_RECIPES[self.model.config.model_type].answer, re.DOTALL)

    @torch.inference_mode()
    def represent(
        self, conversation: Conversation, images: Sequence[PIL.Image.Image], attention_mass: float = 0.9
    ) -> ReferenceRepresentation:
        """The representation of one sample.

        Args:
            conversation: The whole sample, answers included.
            images: One image per mark, in order.
            attention_mass: Share of the instruction's attention that the kept tokens must exceed.

        Raises:
            ValueError: The answers that the expression finds are not those of the conversation.
        """
        inputs = self.inputs(conversation, images)
        starts, ends = inputs.pop("offset_mapping")[0].unbind(-1)
        vision = inputs["input_ids"][0] == self.model.config.image_token_id
        answer = torch.zeros_like(vision)
        for begin, end in self._answer_spans(conversation):
            answer |= (starts < end) & (ends > begin)
        instruction = ~vision & ~answer

        output = self.model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        attention = output.attentions[0][0].double().mean(0)
        share = attention[instruction][:, vision].mean(0)
        share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(share))
        order = share.argsort(descending=True, stable=True)
        kept = order[: int((share[order].cumsum(0) <= attention_mass).sum()) + 1]
        vector = output.hidden_states[1][0][vision][kept].mean(0)
        return ReferenceRepresentation(
            vector=vector.numpy(),
            n_tokens=len(vision),
            n_vision_tokens=int(vision.sum()),
            n_dominant_tokens=len(kept),
            n_instruction_tokens=int(instruction.sum()),
        )

    def inputs(self, conversation: Conversation, images: Sequence[PIL.Image.Image]) -> dict[str, Any]:
        """What the family's processor makes of one sample, with the character offsets of its tokens.

        The expanded prompt is then in ``processor.expanded``.
        """
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"} if part is IMAGE else {"type": "text", "text": part}
                    for part in turn.parts
                ],
            }
            for turn in conversation.turns
        ]
        # SmolVLM's own method asks its video processor for defaults first.
        prompt = ProcessorMixin.apply_chat_template(self.processor, messages, tokenize=False)
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=[prompt],
            images=[list(images)],
            return_tensors="pt",
            return_offsets_mapping=True,
            # As in Transformers' own apply_chat_template: a template that writes BOS gets no second one.
            add_special_tokens=not (bos and prompt.startswith(bos)),
        )
        inputs.pop("labels", None)  # PaliGemma's, for training
        return dict(inputs)

    def _answer_spans(self, conversation: Conversation) -> list[tuple[int, int]]:
        """The [start, end) characters of the answers in the expanded prompt."""
        matches = list(self._answer.finditer(self.processor.expanded))
        found = [match[1].strip() for match in matches]
        expected = [
            "".join(part for part in turn.parts if isinstance(part, str)).strip()
            for turn in conversation.turns
            if turn.role == "assistant"
        ]
        if found != expected:
            raise ValueError(f"the expression finds the answers {found}, the conversation has {expected}")
        return [match.span(1) for match in matches]


def _image_text_processor(folder: Path) -> Any:
    """The family's processor without its video part, remembering the last expanded prompt."""
    settings_file = folder / "processor_config.json"
    if not settings_file.exists():
        settings_file = folder / "preprocessor_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    base: Any = getattr(transformers, settings["processor_class"])

    class ImageTextProcessor(base):  # type: ignore[misc]  # chosen at run time
        expanded: str = ""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def get_text_with_replacements(self, *args: Any, **kwargs: Any) -> Any:
            texts, offsets = super().get_text_with_replacements(*args, **kwargs)
            self.expanded = texts[0]
            return texts, offsets

    accepted = inspect.signature(base.__init__).parameters
    options = {key: value for key, value in settings.items() if key in accepted and key != "image_processor"}
    if "video_processor" in accepted:
        options["video_processor"] = None
    return ImageTextProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=_chat_template(folder),
        **options,
    )


def _chat_template(folder: Path) -> str | None:
    """The template's text in either layout."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.json").exists():
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    return None
