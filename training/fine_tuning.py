"""The fine-tuning itself: Transformers' Trainer on the target model, without Dagster and without storage.

Each result has a folder, named by the version of the rows and a hash of everything else that decides the
weights:

========================  ==============================================================================
`rows.json`               the positions of the rows that are trained on, and the rows left out, with reasons
`checkpoints/`            the Trainer's last two checkpoints; each is complete once it has the file ``whole``
`model/`                  the tuned model and its processor, for ``from_pretrained``
`adapter/`                with LoRA: the adapter alone; `model/` has it merged
`result.json`             the outcome; written last, so that a folder that has it is complete
========================  ==============================================================================

A killed run leaves everything but the last file. The next run with the same rows and settings resumes from
the last complete checkpoint, with the optimizer's state and the order of the rows, and ends with the same
weights.
"""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from training.examples import Collator, LeftOut, TrainingRows, judge
from training.recipe import Recipe
from training.result import RESULT, Result, installed_packages, read_result, write_json
from training.training_data import TrainingData

CODE_VERSION = "1"
"""Raise it whenever the same rows and recipe give other weights."""

_ROWS, _WHOLE = "rows.json", "whole"
_POINTS = 200  # of the loss curve; in a long run a point is the mean of several steps


class TrainingError(RuntimeError):
    """The training cannot run as configured; the message says what to change."""


def fine_tune(
    data: TrainingData,
    recipe: Recipe,
    runs: Path,
    log: Callable[[str], None],
    fsspec_options: dict[str, str] | None = None,
) -> Result:
    """Train the target model on the selected rows, or resume an earlier run that was stopped.

    On a CPU the result is deterministic: the same data, recipe and packages give the same weights, whether
    interrupted or not. On a GPU the weights agree up to the order in which its kernels add.

    Args:
        data: The verified rows, with the manifest that names the model.
        recipe: The settings of the training.
        runs: Folder of the results of this selection.
        log: Called with a sentence at each step of the work.
        fsspec_options: Storage options for the folder of the images, if that is not local.

    Raises:
        TrainingError: Another process trains on the same rows with the same recipe, no row can be trained on,
            there are several GPUs, or the model is not the one that the samples were chosen for.
        ModelLoadError: The model cannot be read.
        OSError: The model, an image or the folder cannot be read or written.
    """
    start = time.monotonic()
    _require_one_device(recipe)
    source, commit = data.model["model"], data.model["commit"]
    _require_the_chosen_model(data, recipe)
    with quiet_transformers(keep_bars=not Path(source).is_dir()):
        model, processor = _load_model(source, commit, recipe), _load_processor(source, commit)
        ask_for(processor.image_processor, _image_size(data))
        base = weights_sha256(model)
        settings = digest(CODE_VERSION, recipe.result_settings(), data.model["fingerprint"], base)
        folder = runs / f"{data.version[:16]}-{settings[:8]}"
        with _alone(folder):
            if recipe.train_again:
                _empty(folder)
            if (folder / RESULT).exists():
                log(f"{folder} holds the result of these rows and this recipe")
                return read_result(folder, time.monotonic() - start)
            rows = TrainingRows(
                data.rows,
                processor,
                data.manifest["images_relative_to"],
                fsspec_options or {},
                data.model.get("image_place", "as_written"),
                data.manifest.get("embedded_images_relative_to"),
            )
            lengths, left_out = _judged(folder, rows, Collator(processor), _max_tokens(data, recipe), recipe)
            log(f"{len(lengths)} of {len(data.rows)} rows are trained on, in {folder}")
            if not lengths:
                raise TrainingError(
                    f"none of the {len(data.rows)} rows can be trained on: see {folder / _ROWS}"
                )
            checkpoint, resumed_from = _last_checkpoint(folder / "checkpoints")
            if checkpoint:
                log(f"resuming from step {resumed_from}, {checkpoint}")
                if not recipe.lora:
                    del model  # frees its memory before the next one is loaded
                    # A checkpoint names weights as the hub does. The Trainer looks for the names of modules,
                    # finds none, and silently keeps the weights that it has (transformers#43701).
                    model = _load_model(str(checkpoint), None, recipe)
            model = _prepared(model, recipe)
            trained, frozen = _parameters(model)
            trainer = _trainer(model, Subset(rows, sorted(lengths)), Collator(processor), recipe, folder, log)
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
                packages=installed_packages(),
                resumed_from=resumed_from,
                seconds=time.monotonic() - start,
            )
            write_json(folder / RESULT, {**asdict(result), "folder": None})
            return result


def _require_one_device(recipe: Recipe) -> None:
    if recipe.device == "auto" and (n := torch.cuda.device_count()) > 1:
        raise TrainingError(
            f"torch sees {n} GPUs, and a run trains on one: set CUDA_VISIBLE_DEVICES to the one to use"
        )


def _require_the_chosen_model(data: TrainingData, recipe: Recipe) -> None:
    """Refuse any model but the one that the samples were chosen for.

    Raises:
        TrainingError: The model is a hub id without a commit, or its files have changed.
    """
    chosen_for, source = data.model, data.model["model"]
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
        image_size=_image_size(data),
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


def _image_size(data: TrainingData) -> ImageSize:
    return ImageSize(**data.model.get("image_size", {}))


def _load_processor(source: str, revision: str | None) -> Any:
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    return load_processor(source, revision, config)


def _load_model(source: str, revision: str | None, recipe: Recipe) -> Any:
    """The model: trained weights in float32, frozen weights under LoRA in the recipe's precision."""
    dtype = torch.bfloat16 if recipe.lora and recipe.precision == "bfloat16" else torch.float32
    return AutoModelForImageTextToText.from_pretrained(
        source, revision=revision, dtype=dtype, trust_remote_code=False
    )


def _max_tokens(data: TrainingData, recipe: Recipe) -> int:
    limit = int(data.model["max_tokens"])
    return limit if recipe.max_length is None else min(limit, recipe.max_length)


def _judged(
    folder: Path, rows: TrainingRows, collator: Collator, max_tokens: int, recipe: Recipe
) -> tuple[dict[int, int], list[LeftOut]]:
    """The rows that can be trained on and those that cannot; the list of an interrupted run is kept."""
    path = folder / _ROWS
    if not path.exists():
        lengths, left_out = judge(rows, collator, max_tokens, recipe.workers)
        found = {"tokens_by_row": list(lengths.items()), "left_out": [asdict(row) for row in left_out]}
        write_json(path, found)
    judged = json.loads(path.read_bytes())
    return dict(judged["tokens_by_row"]), [LeftOut(**row) for row in judged["left_out"]]


def _prepared(model: Any, recipe: Recipe) -> Any:
    """The model with its untrained parts frozen, and with adapters if the recipe asks for LoRA.

    Adapters start from random numbers that depend on the seed alone, not on code that ran before.
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

    # Frozen linear layers get no adapter, nor does the output layer, as in LoRA's own recipes.
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
    log: Callable[[str], None],
) -> Trainer:
    accumulated = recipe.batch_size // recipe.micro_batch_size
    steps = recipe.max_steps or max(1, int(recipe.epochs * -(-len(rows) // recipe.batch_size)))
    trainer = Trainer(
        model=model,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_Progress(log)],
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
            logging_nan_inf_filter=False,  # a loss that is no number must be visible
            save_strategy="steps",
            save_steps=recipe.save_every,
            save_total_limit=2,  # while one is written, the one before is complete
            seed=recipe.seed,
            data_seed=recipe.seed,
            use_cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
            dataloader_num_workers=recipe.workers,
            remove_unused_columns=False,  # items are prompts and have no columns
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Logs the loss, and marks each complete checkpoint."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Log a point of the loss curve."""
        if logs and "loss" in logs:
            self._log(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint, whose files are all written now."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def _losses(state: TrainerState) -> tuple[tuple[int, float], ...]:
    return tuple((entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry)


def _last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The last complete checkpoint and its step; removes checkpoints that a killed process left unfinished.

    The checkpoint of the very last step is not used: the Trainer would take one step beyond it.
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
    """Write the model for ``from_pretrained`` and return it, with LoRA's adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return model


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a folder; the kernel releases the lock when the process dies.

    Raises:
        TrainingError: Another process trains in it.
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
        # The file that marks the folder as complete goes first, in case the removal is interrupted.
        (folder / RESULT).unlink(missing_ok=True)
        shutil.rmtree(folder)
