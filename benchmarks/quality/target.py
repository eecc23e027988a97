"""The target model: a small LLaVA (CLIP tower, projector, Llama) with a processor of its own."""

import math
from collections.abc import Iterable
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.quality.presets import Size

PATCH: Final = 8
"""Pixels of a side of a patch."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
_VOCABULARY = 1500
_HEAD_WIDTH = 32
# The first layer's queries and keys begin so wide that its attention is not flat; training keeps it so.
_ATTENTION_GAIN = 1.6
_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- else -%}{{ '\\n' + part['text'] }}{%- endif -%}{%- endfor -%}{{ ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' }}{%- generation -%}"
    "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endgeneration -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, bos, eos, image = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        model_max_length=1024,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, side: int) -> LlavaProcessor:
    """LLaVA's processor for pictures of a side."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, side: int, size: Size, seed: int
) -> LlavaForConditionalGeneration:
    """An untrained model."""
    pad, bos, eos, image = tokenizer.convert_tokens_to_ids(list(_SPECIAL))
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=size.tower_width,
        intermediate_size=size.tower_width * 3,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_width // _HEAD_WIDTH,
        image_size=side,
        patch_size=PATCH,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.width * 2,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // _HEAD_WIDTH,
        num_key_value_heads=size.width // _HEAD_WIDTH,
        max_position_embeddings=1024,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    config: Any = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=language.to_dict(),
        image_token_id=image,
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    attention = model.model.language_model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        torch.nn.init.normal_(projection.weight, std=_ATTENTION_GAIN / math.sqrt(size.width))
    return model
