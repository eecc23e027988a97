"""The demo model's parts: a LLaVA-1.5 architecture, its weights, and its tokenizer and processor.

This module is separate from `demo_model` because it imports torch, which a demo that is up to date does not
need.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

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

from scalselect_assets.demo.demo_pool import demo_corpus
from scalselect_assets.demo.scenes import IMAGE_SIDE

PATCH_SIDE: Final = 14
N_IMAGE_TOKENS: Final = (IMAGE_SIDE // PATCH_SIDE) ** 2
MAX_POSITIONS: Final = 2048
_SPECIAL_TOKENS: Final = ("<pad>", "<s>", "</s>", "<image>")
_MAX_VOCABULARY: Final = 2000
# Standard deviations of the weights relative to 1 / sqrt(fan in), by a part of the parameter's name.
_GAINS: Final[Mapping[str, float]] = MappingProxyType(
    {
        # Attention sharp enough to select some of the patches, and soft enough not to select only one.
        "language_model.layers.0.self_attn.q_proj": 2.2,
        "language_model.layers.0.self_attn.k_proj": 2.2,
        # GELU halves the variance; this brings the image tokens back to the scale of the words.
        "multi_modal_projector": math.sqrt(2),
        # Residual branches below the stream keep a patch's colour readable through the random layers.
        ".self_attn.out_proj": 0.5,
        ".mlp.fc2": 0.5,
    }
)
_POSITION_SCALE: Final = 0.3
# LLaVA-1.5's template, except that an image keeps its place in the turn. Content is parts or plain text.
_CHAT_TEMPLATE: Final = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for part in content -%}"
    "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ render(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + render(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' }}"
    "{%- generation -%}{{ render(message['content']) }}{%- endgeneration -%}"
    "{{ eos_token }}"
    "{%- else -%}{{ raise_exception('Got role ' + message['role'] + '; allowed: system, user, assistant.') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the demo pool's texts; any other text falls back to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_rendered_corpus(), trainer)
    pad, bos, eos, image = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        model_max_length=MAX_POSITIONS,
    )


def _rendered_corpus() -> Iterator[str]:
    return (f"USER: {text} ASSISTANT: {text}" for text in demo_corpus())


def demo_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor on CLIP's image processor, which needs no torchvision."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the default strategy drops
        chat_template=_CHAT_TEMPLATE,
    )


def demo_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The whole model with its weights; the caller's random state does not change."""
    pad, bos, eos, image = tokenizer.convert_tokens_to_ids(list(_SPECIAL_TOKENS))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIDE,
            patch_size=PATCH_SIDE,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        ).to_dict(),
        image_token_id=image,
        image_seq_length=N_IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    # Constructing a module draws from the global CPU generator, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(config)
    _fill(model, seed)
    return model.eval()


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: int) -> None:
    """Set every weight from one generator, in the order of the names, so that vectors depend on the scene.

    The libraries' own initialisation is made for training: its small weights leave the first layer's
    attention almost uniform (90 % of the mass needs 91 % of the vision tokens, whatever the scene shows).
    Here every layer keeps the scale of its input, and two properties of trained models are added.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            # In a trained model the embeddings of words share a direction. Without it, each instruction token
            # prefers other patches, and the mean over the instruction is flat again.
            shared = torch.randn(parameter.shape[1], generator=generator)
            parameter.copy_((noise + shared) / math.sqrt(2))
        elif name.endswith("position_embedding.weight"):
            parameter.copy_(noise * _POSITION_SCALE)
        elif name.endswith("class_embedding"):
            parameter.copy_(noise)
        elif parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
