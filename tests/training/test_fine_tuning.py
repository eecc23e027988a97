"""However often it was stopped, a training ends with the same weights; other rows have their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra `training` is not installed")
pytest.importorskip("peft", reason="the extra `training` is not installed")

from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from scalselect_assets.method.representation.quiet import quiet_transformers
from tests.conftest import RunPython, sharegpt_row
from tests.training.conftest import ROWS, Outputs
from training.fine_tuning import TrainingError, fine_tune
from training.recipe import Recipe
from training.result import Result

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FEW: dict[str, Any] = {
    "max_steps": 5,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "save_every": 2,
    "device": "cpu",
}


class StoppedError(Exception):
    """Raised where a test stops a training."""


def train(outputs: Outputs, runs: Path, tell: Callable[[str], None] = lambda _: None, **more: Any) -> Result:
    return fine_tune(outputs.read(), Recipe(**{**FEW, **more}), runs, tell)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder for results, with none in it."""
    return tmp_path / "runs"


def stop_at(step: int) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if text.startswith(f"step {step} "):
            raise StoppedError

    return tell


def weights(result: Result) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(result.model_folder / "model.safetensors")
    return tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results that tests share: the whole training of the first is what others are compared with."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(outputs: Outputs, runs: Path) -> Result:
    """A training that nothing stopped."""
    return train(outputs, runs)


def test_the_loss_falls_and_its_curve_has_every_step(whole: Result) -> None:
    first, last = whole.fell()
    assert last < first
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 5]
    assert (whole.rows, whole.left_out, whole.resumed_from) == (len(ROWS), {}, 0)


def test_a_training_that_was_killed_goes_on_from_its_last_whole_checkpoint_to_the_same_weights(
    fresh_python: RunPython,
    outputs: Outputs,
    whole: Result,
    fresh: Path,
) -> None:
    killed = fresh_python(
        "-c",
        "import os, signal, sys; from pathlib import Path; from upath import UPath\n"
        "from training.training_data import read_training_data\n"
        "from training.fine_tuning import fine_tune\n"
        "from training.recipe import Recipe\n"
        "import json, torch; torch.set_num_threads(1)\n"
        "def tell(text):\n"
        "    if text.startswith('step 4 '): os.kill(os.getpid(), signal.SIGKILL)\n"
        "fine_tune(read_training_data(UPath(sys.argv[1])), Recipe(**json.loads(sys.argv[2])), "
        "Path(sys.argv[3]), tell)",
        *(outputs.folder, json.dumps(FEW), fresh),
    )
    assert killed.returncode == -9, killed.stderr
    (folder,) = (path for path in fresh.iterdir() if path.is_dir())
    # What a process leaves that dies while it writes a checkpoint.
    shutil.copytree(folder / "checkpoints" / "checkpoint-2", folder / "checkpoints" / "checkpoint-4")
    (folder / "checkpoints" / "checkpoint-4" / "whole").unlink()
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text("{")
    told: list[str] = []
    resumed = train(outputs, fresh, told.append)
    assert resumed.resumed_from == 2
    assert [text.split(":")[0] for text in told if text.startswith("step ")] == [
        f"step {step} of 5" for step in (3, 4, 5)
    ]
    assert resumed.losses == whole.losses
    assert resumed.data_version == whole.data_version


def test_a_training_that_was_stopped_while_its_model_was_written_writes_it_again(
    outputs: Outputs, whole: Result, fresh: Path
) -> None:
    folder = fresh / whole.folder.name
    shutil.copytree(whole.folder, folder)
    (folder / "result.json").unlink()
    (folder / "model" / "model.safetensors").write_bytes(b"cut")
    again = train(outputs, fresh)
    # The Trainer, told to go on from its last step, would take another one.
    assert (again.resumed_from, again.losses) == (4, whole.losses)
    assert again.data_version == whole.data_version
    assert (folder / "model" / "model.safetensors").stat().st_size > 3


def test_a_result_that_is_there_is_not_made_again_unless_asked(
    outputs: Outputs, whole: Result, runs: Path
) -> None:
    again = train(outputs, runs, stop_at(1))
    assert not again.made_now
    assert (again.folder, again.losses, again.data_version) == (
        whole.folder,
        whole.losses,
        whole.data_version,
    )
    # What changes no weight names the same result.
    assert not train(outputs, runs, save_every=3, workers=1).made_now
    with pytest.raises(StoppedError):
        train(outputs, runs, stop_at(1), train_again=True)
    assert train(outputs, runs).made_now


def test_another_seed_gives_another_result(outputs: Outputs, whole: Result, fresh: Path) -> None:
    assert train(outputs, fresh, seed=1).data_version != whole.data_version


def test_other_rows_are_trained_on_from_the_start_in_a_folder_of_their_own(
    outputs: Outputs, whole: Result, runs: Path
) -> None:
    outputs.write(ROWS[:3])
    other = train(outputs, runs)
    assert other.folder != whole.folder
    assert (other.resumed_from, other.rows) == (0, 3)
    assert whole.model_folder.exists()


def test_the_vision_tower_stays_and_the_rest_learns(outputs: Outputs, whole: Result, demo_vlm: Path) -> None:
    before, after = load_file(demo_vlm / "model.safetensors"), weights(whole)
    assert set(before) == set(after)
    for name in before:
        if name.split(".layers.")[0].endswith("bias") and "vision_tower" not in name:
            continue
        changed = not torch.equal(before[name], after[name])
        assert changed == ("vision_tower" not in name), name
    assert set(whole.frozen_parameters) == {"vision_tower"}
    assert set(whole.trained_parameters) == {"multi_modal_projector", "language_model", "lm_head"}


def test_the_vision_tower_learns_too_where_asked(outputs: Outputs, fresh: Path, demo_vlm: Path) -> None:
    result = train(outputs, fresh, freeze_vision_tower=False, max_steps=2)
    before, after = load_file(demo_vlm / "model.safetensors"), weights(result)
    name = next(name for name in before if "vision_tower" in name and name.endswith("fc1.weight"))
    assert not torch.equal(before[name], after[name])
    assert result.frozen_parameters == {}


def test_the_tuned_model_is_one_that_transformers_loads_and_that_answers(whole: Result) -> None:
    with quiet_transformers():
        model = AutoModelForImageTextToText.from_pretrained(whole.model_folder)
        processor = AutoProcessor.from_pretrained(whole.model_folder)
        messages = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_lora_trains_adapters_alone_and_leaves_a_merged_model(
    outputs: Outputs, fresh: Path, demo_vlm: Path
) -> None:
    for step in (1, 4):  # before the first checkpoint, and after it
        with pytest.raises(StoppedError):
            train(outputs, fresh, stop_at(step), lora=True, lora_rank=4)
    result = train(outputs, fresh, lora=True, lora_rank=4)
    unstopped = train(outputs, fresh / "other", lora=True, lora_rank=4)
    assert (result.resumed_from, result.data_version) == (2, unstopped.data_version)
    assert sum(result.trained_parameters.values()) < 0.2 * sum(result.frozen_parameters.values())
    adapter = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name and "vision_tower" not in name for name in adapter)
    assert any("multi_modal_projector" in name for name in adapter)
    before, after = load_file(demo_vlm / "model.safetensors"), weights(result)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("vision_tower" not in name and "embed" not in name and "norm" not in name for name in changed)


def test_rows_that_cannot_be_trained_on_are_counted_and_reported(outputs: Outputs, fresh: Path) -> None:
    outputs.write([*ROWS, sharegpt_row("gone.png", id="lost")])
    result = train(outputs, fresh, max_steps=1)
    assert (result.rows, result.left_out) == (len(ROWS), {"missing_image": 1})
    (told,) = json.loads((result.folder / "rows.json").read_text())["left_out"]
    assert (told["row"], told["source_id"], told["reason"]) == (len(ROWS), "lost", "missing_image")


def test_nothing_to_train_on_is_an_error(outputs: Outputs, fresh: Path) -> None:
    with pytest.raises(TrainingError, match=f"none of the {len(ROWS)} rows can be trained on"):
        train(outputs, fresh, max_length=5)


def test_two_processes_do_not_train_the_same(outputs: Outputs, whole: Result, runs: Path) -> None:
    with (
        FileLock(runs / f".{whole.folder.name}.lock"),
        pytest.raises(TrainingError, match="another process trains"),
    ):
        train(outputs, runs)


def test_rows_together_learn_what_rows_one_by_one_learn(outputs: Outputs, whole: Result, fresh: Path) -> None:
    together = train(outputs, fresh, micro_batch_size=2)
    assert [loss for _, loss in together.losses] == pytest.approx(
        [loss for _, loss in whole.losses], rel=1e-3
    )


def test_bfloat16_keeps_what_is_trained_in_float32(outputs: Outputs, fresh: Path) -> None:
    result = train(outputs, fresh, precision="bfloat16", activation_checkpointing=True, max_steps=2)
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}


def _edit_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "embed_tokens" in name)
    tensors[name] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_processor(folder: Path) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["rescale_factor"] = 0.004
    (folder / "processor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("edit", "part"), [(_edit_weights, "weights"), (_edit_processor, "processor")])
def test_a_model_that_is_not_the_one_that_was_chosen_for_is_trained_only_where_asked(
    edit: Callable[[Path], None], part: str, outputs: Outputs, fresh: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(outputs.manifest["model"]["model"], tmp_path / "model")
    outputs.write(ROWS, model={**outputs.manifest["model"], "model": str(folder)})
    assert train(outputs, fresh, max_steps=1).steps == 1  # the same files in another folder
    edit(folder)
    with pytest.raises(TrainingError, match=f"not the model that the samples were chosen for: {part} differ"):
        train(outputs, fresh, max_steps=1)
    assert train(outputs, fresh, max_steps=1, other_model=True).steps == 1


def test_a_hub_id_without_a_commit_is_not_trained(outputs: Outputs, fresh: Path) -> None:
    outputs.write(ROWS, model={**outputs.manifest["model"], "model": "org/name", "revision": "main"})
    for other_model in (False, True):
        with pytest.raises(TrainingError, match="'org/name' without a commit"):
            train(outputs, fresh, other_model=other_model)


def test_a_hub_id_is_trained_at_the_commit_that_was_chosen_for(
    outputs: Outputs, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the hub holds that commit and a later one, which its branch names."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source, cache, commits = Path(outputs.manifest["model"]["model"]), tmp_path / "models--org--name", "ab"
    for commit in commits:
        shutil.copytree(source, cache / "snapshots" / (commit * 40))
    _edit_weights(cache / "snapshots" / ("b" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    model = {**outputs.manifest["model"], "model": "org/name", "revision": "main"}

    outputs.write(ROWS, model={**model, "commit": "a" * 40})
    assert train(outputs, fresh, max_steps=1).steps == 1

    outputs.write(ROWS, model={**model, "commit": "b" * 40})
    with pytest.raises(TrainingError, match="weights differ"):
        train(outputs, fresh, max_steps=1)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_other_families_are_trained_by_the_same_code(
    family: str, outputs: Outputs, fresh: Path, tiny_vlm: Callable[[str], Path]
) -> None:
    model = {**outputs.manifest["model"], "model": str(tiny_vlm(family))}
    outputs.write(ROWS, model=model)
    result = train(outputs, fresh, max_steps=8, other_model=True)
    first, last = result.fell()
    assert last < first
    if family == "qwen2_5_vl":  # its projector is a part of its tower
        assert result.trained_parameters["visual"] < result.frozen_parameters["visual"]


def test_images_have_the_size_that_the_selection_asked_for(
    outputs: Outputs, fresh: Path, tiny_vlm: Callable[[str], Path]
) -> None:
    tokens = []
    for size in ({}, {"max_pixels": 28 * 28}):
        model = {**outputs.manifest["model"], "model": str(tiny_vlm("qwen2_5_vl")), "image_size": size}
        outputs.write(ROWS[:2], model=model)
        tokens.append(train(outputs, fresh / str(len(size)), max_steps=1, other_model=True).tokens)
    assert tokens[1] < tokens[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"learning_rate": 0},
        {"batch_size": 8, "micro_batch_size": 3},
        {"max_length": 0},
        {"lora_rank": 0},
        {"precision": "float8"},
    ],
)
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)
