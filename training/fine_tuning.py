"""The fine-tuning itself: Transformers' Trainer on the target model, without Dagster and without storage.

A result is a folder of its own, named by the version of the rows and by all else that decides the weights:

========================  ==============================================================================
`rows.json`               the rows that are trained on, by place, and those that are left out, with reasons
`checkpoints/`            the Trainer's own, the last two; each counts once its file ``whole`` is written
`model/`                  the tuned model and its processor, for ``from_pretrained``
`adapter/`                with LoRA: the adapter alone; `model/` has it merged
`result.json`             what came out; written last, so that what has it is whole
========================  ==============================================================================

A run that is killed leaves all but the last; the next one with the same rows and settings goes on from the
last whole checkpoint, with the optimizer's state and the order of rows, to the same weights.
"""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from scalselect_assets.method.representation.image_size import ImageSize, ask_for
from scalselect_assets.method.representation.loading import load_card
from scalselect_assets.method.representation.model_card import weights_sha256
from scalselect_assets.method.representation.processors import load_processor
from scalselect_assets.method.representation.quiet import quiet_transformers
from scalselect_assets.resources.identity import digest
from training.examples import Collator, LeftOut, Rows, judge
from training.exports import Export
from training.recipe import Recipe

CODE_VERSION = "1"
"""Raise it when the same rows and recipe are to give other weights."""

_RESULT, _ROWS, _WHOLE = "result.json", "rows.json", "whole"
_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "tokenizers", "pillow"),
    *("dagster", "scalselect-dagster"),
)
_POINTS = 200  # of the loss curve; a long run logs the mean of several steps as one point


class TrainingError(RuntimeError):
    """It cannot be trained as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a training came to.

    Attributes:
        folder: Where everything lies.
        data_version: SHA-256 over the tuned weights.
        base_weights_sha256: SHA-256 over the weights that it began with.
        losses: Optimizer step and mean loss per answer token up to it, since the step before.
        steps: Optimizer steps in all.
        rows: Rows that were trained on.
        tokens: Tokens of these rows, image tokens included.
        left_out: Rows of the file that were not, by reason.
        trained_parameters: By part of the model.
        frozen_parameters: By part of the model.
        packages: Versions that it was made with, at the end.
        resumed_from: The step that this run went on from; 0 where it began anew.
        seconds: What this run took.
        made_now: False where the result was there already.
    """

    folder: Path
    data_version: str
    base_weights_sha256: str
    losses: tuple[tuple[int, float], ...]
    steps: int
    rows: int
    tokens: int
    left_out: dict[str, int]
    trained_parameters: dict[str, int]
    frozen_parameters: dict[str, int]
    packages: dict[str, str]
    resumed_from: int
    seconds: float
    made_now: bool = True

    @property
    def model_folder(self) -> Path:
        """The tuned model with its processor."""
        return self.folder / "model"

    def fell(self) -> tuple[float, float]:
        """Mean loss over the first and over the last fifth of the curve, one point at least."""
        n = max(1, len(self.losses) // 5)
        values = [loss for _, loss in self.losses]
        return sum(values[:n]) / n, sum(values[-n:]) / n


def fine_tune(
    export: Export,
    recipe: Recipe,
    runs: Path,
    tell: Callable[[str], None],
    fsspec_options: dict[str, str] | None = None,
) -> Result:
    """Train the export's target model on its rows, or go on where an earlier run was stopped.

    Deterministic on a CPU: the same export, recipe and packages give the same weights, interrupted or not. On
    a GPU they agree up to the order in which its kernels add.

    Args:
        export: The verified rows.
        recipe: How to train.
        runs: Folder of the results of this selection.
        tell: Told in words how it goes.
        fsspec_options: Of the images' folder, where that is not local.

    Raises:
        TrainingError: Another process trains the same, no row can be trained on, there are several GPUs, or
            the model is not the one that the samples were chosen for.
        ModelLoadError: The model cannot be read.
        OSError: The model, an image or the folder cannot be read or written.
    """
    start = time.monotonic()
    _require_one_device(recipe)
    source, commit = export.model["model"], export.model["commit"]
    _require_the_chosen_model(export, recipe)
    with quiet_transformers(keep_bars=not Path(source).is_dir()):
        model, processor = _load_model(source, commit, recipe), _load_processor(source, commit)
        ask_for(processor.image_processor, _image_size(export))
        base = weights_sha256(model)
        settings = digest(CODE_VERSION, recipe.result_settings(), export.model["fingerprint"], base)
        folder = runs / f"{export.version[:16]}-{settings[:8]}"
        with _alone(folder):
            if recipe.train_again:
                _empty(folder)
            if (folder / _RESULT).exists():
                tell(f"{folder} holds the result of these rows and this recipe")
                return _read_result(folder, time.monotonic() - start)
            rows = Rows(
                export.rows,
                processor,
                export.manifest["images_relative_to"],
                fsspec_options or {},
                export.model.get("image_place", "as_written"),
            )
            lengths, left_out = _judged(
                folder, rows, Collator(processor), _max_tokens(export, recipe), recipe
            )
            tell(f"{len(lengths)} of {len(export.rows)} rows are trained on, in {folder}")
            if not lengths:
                raise TrainingError(
                    f"none of the {len(export.rows)} rows can be trained on: see {folder / _ROWS}"
                )
            checkpoint, resumed_from = _last_checkpoint(folder / "checkpoints")
            if checkpoint:
                tell(f"going on from step {resumed_from}, {checkpoint}")
                if not recipe.lora:
                    del model  # before its successor is there
                    # Checkpoints bear the names of the hub's weights. The Trainer looks for those of the
                    # model's modules, finds none, and goes on with what it has (transformers#43701).
                    model = _load_model(str(checkpoint), None, recipe)
            model = _prepared(model, recipe)
            trained, frozen = _parameters(model)
            trainer = _trainer(
                model, Subset(rows, sorted(lengths)), Collator(processor), recipe, folder, tell
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            tuned = _save(trainer.model, processor, folder)
            result = Result(
                folder=folder,
                data_version=weights_sha256(tuned),
                base_weights_sha256=base,
                losses=_losses(trainer.state),
                steps=trainer.state.global_step,
                rows=len(lengths),
                tokens=sum(lengths.values()),
                left_out=dict(sorted(Counter(row.reason for row in left_out).items())),
                trained_parameters=trained,
                frozen_parameters=frozen,
                packages=_packages(),
                resumed_from=resumed_from,
                seconds=time.monotonic() - start,
            )
            _write_json(folder / _RESULT, {**asdict(result), "folder": None})
            return result


def _require_one_device(recipe: Recipe) -> None:
    if recipe.device == "auto" and (n := torch.cuda.device_count()) > 1:
        raise TrainingError(
            f"torch sees {n} GPUs, and a run trains on one: set CUDA_VISIBLE_DEVICES to the one to use"
        )


def _require_the_chosen_model(export: Export, recipe: Recipe) -> None:
    """The samples were chosen for one model, so no other is trained on them unawares.

    Raises:
        TrainingError: It is a hub id without a commit, or its files are others now.
    """
    chosen_for, source = export.model, export.model["model"]
    if chosen_for["commit"] is None and not Path(source).expanduser().is_dir():
        raise TrainingError(
            f"the manifest names the hub id {source!r} without a commit, and what is there may have changed "
            "since; run the selection again, which records one"
        )
    if recipe.other_model:
        return
    found = load_card(
        source,
        revision=chosen_for["commit"],
        dtype=chosen_for["dtype"],
        attention_mass=chosen_for["attention_mass"],
        image_place="first" if chosen_for.get("image_place") == "first" else "as_written",
        image_size=_image_size(export),
    )
    if found.fingerprint == chosen_for["fingerprint"]:
        return
    others = [
        part
        for part in ("weights", "config", "processor")
        if getattr(found, f"{part}_sha256") != chosen_for[f"{part}_sha256"]
    ]
    raise TrainingError(
        f"{source!r} is not the model that the samples were chosen for: {', '.join(others) or 'settings'} "
        f"differ (fingerprint {found.fingerprint}, chosen for {chosen_for['fingerprint']}). Bring its files "
        "back, use the versions of transformers and tokenizers that the selection used, or run the selection "
        "again; other_model: true trains all the same"
    )


def _image_size(export: Export) -> ImageSize:
    return ImageSize(**export.model.get("image_size", {}))


def _load_processor(source: str, revision: str | None) -> Any:
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    return load_processor(source, revision, config)


def _load_model(source: str, revision: str | None, recipe: Recipe) -> Any:
    """The model; what is trained is float32, frozen weights under LoRA are as computed."""
    dtype = torch.bfloat16 if recipe.lora and recipe.precision == "bfloat16" else torch.float32
    return AutoModelForImageTextToText.from_pretrained(
        source, revision=revision, dtype=dtype, trust_remote_code=False
    )


def _max_tokens(export: Export, recipe: Recipe) -> int:
    limit = int(export.model["max_tokens"])
    return limit if recipe.max_length is None else min(limit, recipe.max_length)


def _judged(
    folder: Path, rows: Rows, collator: Collator, max_tokens: int, recipe: Recipe
) -> tuple[dict[int, int], list[LeftOut]]:
    """The rows that can be trained on and those that cannot; an interrupted run's judgement stands."""
    path = folder / _ROWS
    if not path.exists():
        lengths, left_out = judge(rows, collator, max_tokens, recipe.workers)
        told = {"tokens_by_row": list(lengths.items()), "left_out": [asdict(row) for row in left_out]}
        _write_json(path, told)
    judged = json.loads(path.read_bytes())
    return dict(judged["tokens_by_row"]), [LeftOut(**row) for row in judged["left_out"]]


def _prepared(model: Any, recipe: Recipe) -> Any:
    """The model with what is not trained frozen, and with adapters where LoRA is asked for.

    Adapters begin at random numbers that depend on the seed alone, and on nothing that ran before.
    """
    set_seed(recipe.seed)
    tower = model.get_encoder(modality="image")
    if recipe.freeze_vision_tower:
        for name, parameter in tower.named_parameters():
            # In Qwen's models the projector, called merger, is a part of the tower.
            parameter.requires_grad_("merger" in name)
    if recipe.activation_checkpointing:
        model.enable_input_require_grads()
    if not recipe.lora:
        return model
    from peft import LoraConfig, get_peft_model

    # A frozen linear layer is left alone, and so is the output layer, as in LoRA's own recipes.
    output = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and module is not output
    ]
    return get_peft_model(
        model, LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=targets)
    )


def _parameters(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """How many parameters of each part are trained, and how many are frozen."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, parameter in model.named_parameters():
        part = re.sub(r"^(base_model\.)?(model\.)*", "", name).split(".")[0]
        counts[parameter.requires_grad][part] += parameter.numel()
    return dict(counts[True]), dict(counts[False])


def _trainer(
    model: Any,
    rows: Subset[Any],
    collator: Collator,
    recipe: Recipe,
    folder: Path,
    tell: Callable[[str], None],
) -> Trainer:
    accumulated = recipe.batch_size // recipe.micro_batch_size
    steps = recipe.max_steps or max(1, int(recipe.epochs * -(-len(rows) // recipe.batch_size)))
    trainer = Trainer(
        model=model,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_Progress(tell)],
        args=TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            per_device_train_batch_size=recipe.micro_batch_size,
            gradient_accumulation_steps=accumulated,
            learning_rate=recipe.highest_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup,
            bf16=recipe.precision == "bfloat16",
            activation_checkpointing=recipe.activation_checkpointing,
            logging_steps=max(1, steps // _POINTS),
            logging_nan_inf_filter=False,  # a loss that is no number is to be seen
            save_strategy="steps",
            save_steps=recipe.save_every,
            save_total_limit=2,  # while one is written, the one before is whole
            seed=recipe.seed,
            data_seed=recipe.seed,
            use_cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
            dataloader_num_workers=recipe.workers,
            remove_unused_columns=False,  # they are prompts, not columns
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Tells how it goes, and marks each checkpoint that is whole."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """A point of the loss curve."""
        if logs and "loss" in logs:
            self._tell(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint's files are all written."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def _losses(state: TrainerState) -> tuple[tuple[int, float], ...]:
    return tuple((entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry)


def _last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The last whole checkpoint to go on from, and its step; removes what a killed process left unfinished.

    That of the very last step is left alone: the Trainer would take one step beyond it.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if not (path / _WHOLE).exists():
            shutil.rmtree(path)
            continue
        state = TrainerState.load_from_json(str(path / "trainer_state.json"))
        if state.global_step < state.max_steps:
            found[state.global_step] = path
    return (found[max(found)], max(found)) if found else (None, 0)


def _save(model: Any, processor: Any, folder: Path) -> Any:
    """Write the model as ``from_pretrained`` reads it; returns it, with LoRA's adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return model


def _read_result(folder: Path, seconds: float) -> Result:
    told = json.loads((folder / _RESULT).read_bytes())
    losses = tuple((step, loss) for step, loss in told["losses"])
    of_this_run = {"folder": folder, "made_now": False, "resumed_from": 0, "seconds": seconds}
    return Result(**{**told, "losses": losses, **of_this_run})


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # PEFT, where nothing needs it
            continue
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a folder; the kernel lets go when it dies.

    Raises:
        TrainingError: Another one does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), blocking=False):
            yield
    except Timeout as error:
        raise TrainingError(
            f"another process trains in {folder}, on the same rows with the same recipe; wait for it or "
            "stop it"
        ) from error


def _empty(folder: Path) -> None:
    if folder.exists():
        # What says that it is whole goes first, should this be interrupted.
        (folder / _RESULT).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    writing.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    writing.replace(path)
