"""Transformers processors for images and text, even on machines where their video part cannot be built.

Several processors take videos too. Their video classes need torchvision, which cannot be installed on every
machine. Images and text never pass through the video classes.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

from scalselect_assets.method.representation.families import UnsupportedModelError


def load_processor(model: str, revision: str | None, config: Any) -> Any:
    """The processor of a model, without its video part if torchvision is missing.

    Args:
        model: Local folder or hub id.
        revision: Branch, tag or commit of a hub id.
        config: The model's Transformers configuration.

    Raises:
        OSError: The processor's files cannot be read.
        ImportError: The processor needs a package that is not installed; the message names the package.
        UnsupportedModelError: The model's processor does not take images and chats.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    options = {"revision": revision, "trust_remote_code": False}
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if is_torchvision_available() or kind is None or "video_processor" not in kind.get_attributes():
        processor = AutoProcessor.from_pretrained(model, **options)
    else:
        settings, more = kind.get_processor_dict(model, **options)
        settings.pop("video_processor", None)
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(model, **options),
            "tokenizer": AutoTokenizer.from_pretrained(model, **options),
            "video_processor": None,
        }
        arguments = [parts[name] for name in kind.get_attributes()]
        processor = _for_images(kind).from_args_and_dict(arguments, settings, **more)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "image_processor") or not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{model!r} has no processor with an image processor and a fast tokenizer; both are needed"
        )
    if not getattr(processor, "chat_template", None):
        # Older checkpoints keep the chat template with the tokenizer, where a processor does not look for it.
        processor.chat_template = tokenizer.chat_template
    if not processor.chat_template:
        raise UnsupportedModelError(f"{model!r} has no chat template; add chat_template.jinja to its files")
    return processor


@cache
def _for_images(kind: Any) -> Any:
    """The processor class without its video part."""

    class ImagesOnly(kind):  # type: ignore[misc]
        # SmolVLM's chat template asks for these values even when the chat has no video.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        def __reduce__(self) -> tuple[Any, ...]:
            return _rebuilt, (kind, self.__dict__)

    ImagesOnly.__name__ = kind.__name__  # the name is among the settings in a model's fingerprint
    return ImagesOnly


def _rebuilt(kind: Any, state: dict[str, Any]) -> Any:
    """Inverse of the class's ``__reduce__``. A class made inside a function cannot be pickled by name."""
    processor = object.__new__(_for_images(kind))
    processor.__dict__.update(state)
    return processor
