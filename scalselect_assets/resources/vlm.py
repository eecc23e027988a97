"""The target VLM as a Dagster resource: its device and batching. Each selection names its own model.

A loaded model is kept for the life of the process, so a refresh of many shards loads it once. Memory: the
vision tower, the projector, the token embeddings and one decoder layer. Importing this module imports no
torch.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import dagster as dg
from pydantic import Field

from scalselect_assets.method import REPRESENTATION_VERSION
from scalselect_assets.method.representation.image_size import ImageSize
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.identity import digest

if TYPE_CHECKING:
    from scalselect_assets.method.representation.encoder import VlmEncoder

CARDS = "model_cards"
COMMITS = "model_commits"
"""The commit that the store began with, by hub id and revision."""

_LOADED: dict[tuple[str, str, int], "VlmEncoder"] = {}


class TargetModel(TypedDict):
    """The part of a selection that describes its model; see `method.representation.loading.load_encoder`."""

    model: str
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attention_mass: float
    image_place: Literal["first", "as_written"]
    image_size: int | None
    min_pixels: int | None
    max_pixels: int | None
    max_tiles: int | None


class Speed(TypedDict):
    """Options of ``scalselect_assets.method.representation.encoder.VlmEncoder.encode_as_done``."""

    batch_tokens: int
    workers: int


class VlmResource(dg.ConfigurableResource):
    """Device and batching for the target models of this deployment."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where models run; auto is CUDA where torch sees a device."
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that are computed together: memory grows in proportion. By default 4,096 on a "
        "CPU and 16,384 on a GPU; a batch that does not fit the memory is halved until it does.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that read, decode and tokenize ahead of the model; 0 for a thread. By default "
        "a thread on a CPU, and on a GPU as many as there are cores, up to 16, but one.",
    )
    set_aside_seconds: float = Field(
        default=300,
        ge=0,
        description="How often the finished part of a shard is set aside: a run that is killed loses at most "
        "so much work.",
    )
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Images with more pixels are rejected, not decoded."
    )

    def array_device(self) -> str:
        """The device of the large matrix products: ``cuda`` or ``cpu``."""
        if self.device != "auto":
            return self.device
        if version("torch").endswith("+cpu"):
            return "cpu"  # a process without a model need not import torch, which takes seconds
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def speed(self, encoder: "VlmEncoder") -> "Speed":
        """The options for encoding samples on this machine; none of them changes a representation."""
        on_gpu = encoder.device.type == "cuda"
        return {
            "batch_tokens": self.batch_tokens or (16_384 if on_gpu else 4_096),
            "workers": self._processes(on_gpu=on_gpu),
        }

    def _processes(self, *, on_gpu: bool) -> int:
        """Processes that prepare samples."""
        if self.workers is not None:
            return self.workers
        return min(16, _usable_cores() - 1) if on_gpu else 0

    def encoder(self, artifacts: ArtifactStore, **target: Unpack[TargetModel]) -> "VlmEncoder":
        """The loaded model; its card is kept in the store.

        Raises:
            ModelLoadError: The model cannot be loaded; see `method.representation.loading.load_encoder`.
            UnsupportedModelError: The model is not supported; see the same function.
        """
        # Threads that wait by spinning take the processor from those that compute. Torch reads the setting
        # when it is first imported, so a value from the environment, or an earlier import, prevails.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from scalselect_assets.method.representation import workers
        from scalselect_assets.method.representation.loading import ModelLoadError, load_encoder

        signature = model_signature(**target)
        key = (signature, self.device, self.max_image_pixels)
        known = _known_card(artifacts, signature)
        commit = _first_commit(artifacts, target) or (known or {}).get("commit")
        if key not in _LOADED or commit not in {None, _LOADED[key].card.commit}:
            _LOADED.clear()  # one model at a time: two would not fit where one just does
            if self._processes(on_gpu=self.array_device() == "cuda"):
                workers.start_server()
            _LOADED[key] = load_encoder(
                target["model"],
                revision=commit or target["revision"],
                device=self.device,
                dtype=target["dtype"],
                attention_mass=target["attention_mass"],
                image_place=target["image_place"],
                image_size=ImageSize(
                    target["image_size"], target["min_pixels"], target["max_pixels"], target["max_tiles"]
                ),
                max_pixels=self.max_image_pixels,
            )
        encoder = _LOADED[key]
        if encoder.card.commit is not None and _first_commit(artifacts, target) is None:
            _keep_commit(artifacts, target, encoder.card.commit)
        if known is None:
            artifacts.write_json(CARDS, encoder.card.to_json(), signature)
        elif known["fingerprint"] != encoder.card.fingerprint:
            raise ModelLoadError(
                f"{target['model']!r} has fingerprint {encoder.card.fingerprint}, the store knows it as "
                f"{known['fingerprint']}; name another --revision, or delete {CARDS} and {COMMITS} in the "
                "store to embed everything again"
            )
        return encoder

    def card(self, artifacts: ArtifactStore, **target: Unpack[TargetModel]) -> dict[str, Any]:
        """The model's card, with its fingerprint; read from the store if the model's files are unchanged.

        Loads the model, and raises as ``encoder``, only if the store has no card of it yet.
        """
        known = _known_card(artifacts, model_signature(**target))
        return known if known is not None else self.encoder(artifacts, **target).card.to_json()


def _usable_cores() -> int:
    """Cores that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _known_card(artifacts: ArtifactStore, signature: str) -> dict[str, Any] | None:
    """The card in the store; None where it is missing or damaged, since the file is only a cache."""
    try:
        card: dict[str, Any] = artifacts.read_json(CARDS, signature, shape=dict[str, Any])
    except (ArtifactMissingError, ArtifactCorruptError):
        return None
    return card if "fingerprint" in card else None


def _first_commit(artifacts: ArtifactStore, target: TargetModel) -> str | None:
    """The commit of a hub id at its first use in the store. The store keeps it when the branch moves on."""
    key = digest(target["model"], target["revision"])
    try:
        kept: dict[str, Any] = artifacts.read_json(COMMITS, key, shape=dict[str, Any])
    except (ArtifactMissingError, ArtifactCorruptError):
        return None
    commit: str | None = kept.get("commit")
    return commit


def _keep_commit(artifacts: ArtifactStore, target: TargetModel, commit: str) -> None:
    model, revision = target["model"], target["revision"]
    kept = {"model": model, "revision": revision, "commit": commit}
    artifacts.write_json(COMMITS, kept, digest(model, revision))


def model_signature(**target: Unpack[TargetModel]) -> str:
    """A cheap stand-in for the fingerprint: it changes whenever the fingerprint could.

    For a local folder: size and modification time of each file. A hub id keeps the commit of its first use.
    """
    folder = Path(target["model"]).expanduser()
    files = (
        sorted(
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in folder.rglob("*")
            if path.is_file()
        )
        if folder.is_dir()
        else []
    )
    identity = str(folder.resolve()) if folder.is_dir() else target["model"]
    libraries: dict[str, str | None] = {name: version(name) for name in ("transformers", "tokenizers")}
    # If it is installed, image processors are of another class, whose pixels differ by rounding.
    libraries["torchvision"] = version("torchvision") if find_spec("torchvision") else None
    settings = {name: value for name, value in target.items() if name != "model"}
    return digest(identity, settings, files, libraries, REPRESENTATION_VERSION)
