"""A model is loaded when it is needed and no more often, and whether it is needed is cheap to tell."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from upath import UPath

from scalselect_assets.method.representation import loading
from scalselect_assets.method.representation import workers as workers_module
from scalselect_assets.method.representation.image_size import ImageSize
from scalselect_assets.method.representation.loading import ModelLoadError
from scalselect_assets.resources import vlm
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.vlm import CARDS, VlmResource, model_signature
from tests.conftest import RunPython

COMMITS_OF_A_HUB = ("c0ffee", "decade")
CPU = VlmResource(device="cpu")


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_models(monkeypatch)


def forget_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun."""
    monkeypatch.setattr(vlm, "_LOADED", {})


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(UPath(tmp_path / "store"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What models were loaded with; each gets a card of its own, and no weights are read."""
    calls: list[dict[str, Any]] = []

    def load(model: str, **options: Any) -> SimpleNamespace:
        calls.append({"model": model, **options})
        weights = Path(model, "weights").read_text() if Path(model).is_dir() else model
        settings = [options[name] for name in ("dtype", "attention_mass", "image_place", "image_size")]
        card = {"fingerprint": f"{weights}, {settings}", "model": model, "commit": None}
        if not Path(model).is_dir():
            card["commit"] = options["revision"] if options["revision"] in COMMITS_OF_A_HUB else "c0ffee"
        return SimpleNamespace(card=SimpleNamespace(to_json=lambda: card, **card))

    monkeypatch.setattr(loading, "load_encoder", load)
    return calls


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what workers are forked from instead of starting it."""
    started: list[str] = []
    monkeypatch.setattr(workers_module, "start_server", lambda: started.append("server"))
    return started


@pytest.mark.parametrize(
    ("resource", "starts"),
    [
        (VlmResource(device="cpu"), False),
        (VlmResource(device="cpu", workers=2), True),
        (VlmResource(device="cuda", workers=0), False),
        (VlmResource(device="cuda", workers=3), True),
    ],
    ids=["a thread", "processes", "a thread on a GPU", "processes on a GPU"],
)
def test_what_workers_are_forked_from_starts_once_and_before_the_model_is_loaded(
    resource: VlmResource,
    starts: bool,
    artifacts: ArtifactStore,
    loads: list[dict[str, Any]],
    servers: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        workers_module, "start_server", lambda: servers.append(f"before load {len(loads) + 1}")
    )
    for _ in range(2):
        resource.encoder(artifacts, **target("org/name"))
    assert len(loads) == 1
    assert servers == (["before load 1"] if starts else [])


def target(model: str | Path, **changes: Any) -> dict[str, Any]:
    """What a selection says of its model."""
    sizes = dict.fromkeys(("image_size", "min_pixels", "max_pixels", "max_tiles"))
    return {
        "model": str(model),
        "revision": None,
        "dtype": "float32",
        "attention_mass": 0.9,
        "image_place": "first",
        **sizes,
        **changes,
    }


def folder_with(path: Path, **files: str) -> Path:
    for name, text in {"config": "{}", "weights": "0", **files}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


# The card


def test_the_card_is_that_of_the_loaded_model(demo_vlm: Path, artifacts: ArtifactStore) -> None:
    encoder = CPU.encoder(artifacts, **target(demo_vlm))

    assert CPU.card(artifacts, **target(demo_vlm)) == encoder.card.to_json()
    told = ("model", "revision", "dtype", "attention_mass")
    assert {name: encoder.card.to_json()[name] for name in told} == {
        name: target(demo_vlm)[name] for name in told
    }


def test_a_store_that_does_not_know_the_model_loads_it_and_then_knows_it(
    demo_vlm: Path, tmp_path: Path, artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CPU.card(artifacts, **target(demo_vlm))

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(loading, "load_encoder", refuse)
    forget_models(monkeypatch)

    assert CPU.card(artifacts, **target(demo_vlm)) == card
    with pytest.raises(AssertionError, match="loaded again"):
        CPU.card(ArtifactStore(UPath(tmp_path / "another store")), **target(demo_vlm))


def test_a_card_does_not_depend_on_how_the_model_runs(artifacts: ArtifactStore, loads: list) -> None:
    card = CPU.card(artifacts, **target("org/name"))

    other = VlmResource(device="cuda", batch_tokens=64, workers=3, max_image_pixels=100)

    assert other.card(artifacts, **target("org/name")) == card
    assert len(loads) == 1


def test_a_changed_model_gets_a_new_card(tmp_path: Path, artifacts: ArtifactStore, loads: list) -> None:
    model = folder_with(tmp_path / "model")
    before = CPU.card(artifacts, **target(model))

    (model / "weights").write_text("01")

    assert CPU.card(artifacts, **target(model)) != before
    assert len(loads) == 2


def test_another_store_gets_the_card_of_a_model_that_is_already_loaded(
    tmp_path: Path, artifacts: ArtifactStore, loads: list
) -> None:
    other = ArtifactStore(UPath(tmp_path / "another store"))

    CPU.encoder(artifacts, **target("org/name"))
    CPU.encoder(other, **target("org/name"))

    signature = model_signature(**target("org/name"))
    assert artifacts.read_json(CARDS, signature) == other.read_json(CARDS, signature)
    assert len(loads) == 1


def test_a_card_that_is_damaged_is_made_again(artifacts: ArtifactStore, loads: list) -> None:
    card = CPU.card(artifacts, **target("org/name"))
    (file,) = (artifacts.root / CARDS).iterdir()
    file.write_text('{"fingerprint": "12')

    assert CPU.card(artifacts, **target("org/name")) == card
    assert artifacts.read_json(CARDS, model_signature(**target("org/name"))) == card


def test_a_model_that_cannot_be_loaded_leaves_no_card(tmp_path: Path, artifacts: ArtifactStore) -> None:
    with pytest.raises(ModelLoadError, match="no folder"):
        CPU.card(artifacts, **target(tmp_path / "nowhere"))

    assert not artifacts.root.exists()


# Loading once


def test_a_model_is_loaded_once_per_process(demo_vlm: Path, artifacts: ArtifactStore) -> None:
    first = CPU.encoder(artifacts, **target(demo_vlm))

    assert CPU.encoder(artifacts, **target(demo_vlm)) is first
    other = VlmResource(device="cpu", batch_tokens=1, workers=2)
    assert other.encoder(artifacts, **target(demo_vlm)) is first


def test_the_settings_reach_the_model(artifacts: ArtifactStore, loads: list) -> None:
    resource = VlmResource(device="cuda", max_image_pixels=123)

    resource.encoder(
        artifacts,
        **target(
            "org/name",
            revision="abc",
            dtype="bfloat16",
            attention_mass=0.8,
            image_place="as_written",
            min_pixels=4,
            max_pixels=9,
        ),
    )

    assert loads == [
        {
            "model": "org/name",
            "revision": "abc",
            "device": "cuda",
            "dtype": "bfloat16",
            "attention_mass": 0.8,
            "image_place": "as_written",
            "image_size": ImageSize(min_pixels=4, max_pixels=9),
            "max_pixels": 123,
        }
    ]


@pytest.mark.parametrize(
    ("resource", "changes"),
    [
        (VlmResource(device="auto"), {}),
        (VlmResource(device="cpu", max_image_pixels=100), {}),
        (CPU, {"model": "org/other"}),
        (CPU, {"revision": "abc"}),
        (CPU, {"dtype": "bfloat16"}),
        (CPU, {"attention_mass": 0.8}),
        (CPU, {"image_place": "as_written"}),
        (CPU, {"image_size": 100}),
        (CPU, {"min_pixels": 100}),
        (CPU, {"max_pixels": 100}),
        (CPU, {"max_tiles": 3}),
    ],
)
def test_other_settings_load_the_model_anew_and_only_one_is_kept(
    artifacts: ArtifactStore, loads: list, resource: VlmResource, changes: dict[str, Any]
) -> None:
    first = CPU.encoder(artifacts, **target("org/name"))

    other = resource.encoder(artifacts, **target("org/name") | changes)

    assert other is not first
    assert resource.encoder(artifacts, **target("org/name") | changes) is other
    assert len(loads) == 2
    assert list(vlm._LOADED.values()) == [other]


def test_a_model_whose_files_changed_is_loaded_anew(
    tmp_path: Path, artifacts: ArtifactStore, loads: list
) -> None:
    model = folder_with(tmp_path / "model")
    first = CPU.encoder(artifacts, **target(model))

    (model / "weights").write_text("01")

    assert CPU.encoder(artifacts, **target(model)) is not first


def test_a_store_stays_with_the_commit_that_it_began_with(
    artifacts: ArtifactStore, loads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        forget_models(monkeypatch)
        CPU.encoder(artifacts, **target("org/name", revision="main"))

    assert [call["revision"] for call in loads] == ["main", "c0ffee"]


def test_a_model_that_is_not_the_one_that_the_store_knows_is_refused(
    artifacts: ArtifactStore, loads: list
) -> None:
    CPU.encoder(artifacts, **target("org/name"))
    (signature,) = (path.stem for path in (artifacts.root / vlm.CARDS).iterdir())
    artifacts.write_json(vlm.CARDS, {"fingerprint": "another", "commit": None}, signature)

    with pytest.raises(ModelLoadError, match="the store knows it as another"):
        CPU.encoder(artifacts, **target("org/name"))


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"max_pixels": 100}])
def test_other_settings_and_other_libraries_stay_with_the_commit(
    changes: dict[str, Any], artifacts: ArtifactStore, loads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    CPU.encoder(artifacts, **target("org/name", revision="main"))
    forget_models(monkeypatch)
    monkeypatch.setattr(vlm, "version", lambda _package: "another version")

    CPU.encoder(artifacts, **target("org/name", revision="main", **changes))

    assert [call["revision"] for call in loads] == ["main", "c0ffee"]


def test_a_store_that_has_lost_its_commit_takes_that_of_its_card(
    artifacts: ArtifactStore, loads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    CPU.encoder(artifacts, **target("org/name"))
    (kept,) = (artifacts.root / vlm.COMMITS).iterdir()
    kept.write_text("{")
    forget_models(monkeypatch)

    CPU.encoder(artifacts, **target("org/name"))

    assert [call["revision"] for call in loads] == [None, "c0ffee"]


def test_two_stores_with_other_commits_of_one_branch_each_get_their_own(
    tmp_path: Path, artifacts: ArtifactStore, loads: list
) -> None:
    other = ArtifactStore(UPath(tmp_path / "another store"))
    vlm._keep_commit(other, target("org/name"), "decade")

    commits = [CPU.encoder(store, **target("org/name")).card.commit for store in (artifacts, other)]

    assert commits == ["c0ffee", "decade"]
    assert [call["revision"] for call in loads] == [None, "decade"]


# Speed


def on(device: str) -> Any:
    """An encoder, as far as its speed is concerned."""
    return SimpleNamespace(device=SimpleNamespace(type=device))


def test_a_cpu_reads_ahead_in_a_thread_and_computes_few_tokens_at_once() -> None:
    assert CPU.speed(on("cpu")) == {"batch_tokens": 4096, "workers": 0}


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (8, 7), (16, 15), (17, 16), (96, 16)])
def test_a_gpu_gets_processes_that_feed_it_and_leaves_a_core_free(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)), raising=False)
    assert VlmResource(device="cuda").speed(on("cuda")) == {"batch_tokens": 16_384, "workers": workers}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_deployment_says_of_its_speed_prevails(device: str) -> None:
    for workers in (0, 3):
        resource = VlmResource(batch_tokens=7, workers=workers)
        assert resource.speed(on(device)) == {"batch_tokens": 7, "workers": workers}


def test_the_speed_goes_by_where_the_model_is_and_not_by_what_was_asked_for() -> None:
    assert VlmResource(device="auto").speed(on("cuda"))["batch_tokens"] == 16_384
    assert VlmResource(device="auto").speed(on("cpu"))["batch_tokens"] == 4096


@pytest.mark.parametrize("setting", [{"batch_tokens": 0}, {"workers": -1}])
def test_a_speed_that_makes_no_sense_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        VlmResource(**setting)


def test_the_speed_is_one_that_the_encoder_takes(demo_vlm: Path, artifacts: ArtifactStore) -> None:
    encoder = CPU.encoder(artifacts, **target(demo_vlm))
    assert encoder.encode([], lambda _: b"", **CPU.speed(encoder)) == []


# The signature


def signature(model: str | Path, **changes: Any) -> str:
    return model_signature(**target(model, **changes))


def _touch(folder: Path) -> None:
    os.utime(folder / "weights", ns=(0, 12345))


def _grow(folder: Path) -> None:
    before = (folder / "weights").stat()
    (folder / "weights").write_text("01")
    os.utime(folder / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a touched file": _touch,
    "another size at the same time": _grow,
    "a new file": lambda folder: (folder / "more").write_text(""),
    "a new file in a folder": lambda folder: folder_with(folder / "sub"),
    "a file that is gone": lambda folder: (folder / "config").unlink(),
    "a renamed file": lambda folder: (folder / "config").rename(folder / "config2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_file_changes_the_signature(tmp_path: Path, change: str) -> None:
    folder = folder_with(tmp_path / "model")
    before = signature(folder)
    assert signature(folder) == before

    CHANGES[change](folder)

    assert signature(folder) != before


def test_a_touched_file_of_a_real_model_changes_the_signature(demo_vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_vlm, tmp_path / "model")
    before = signature(copy)

    os.utime(copy / "model.safetensors", ns=(0, 12345))

    assert signature(copy) != before


def test_a_file_behind_a_link_counts_as_it_does_in_a_hub_cache(tmp_path: Path) -> None:
    blob = folder_with(tmp_path / "blobs") / "weights"
    folder = folder_with(tmp_path / "model")
    (folder / "linked").symlink_to(blob)
    before = signature(folder)

    blob.write_text("01")

    assert signature(folder) != before


@pytest.mark.parametrize("is_folder", [True, False])
def test_every_setting_changes_the_signature(tmp_path: Path, is_folder: bool) -> None:
    model = folder_with(tmp_path / "model") if is_folder else "org/name"

    signatures = [
        signature(model),
        signature(model, dtype="bfloat16"),
        signature(model, dtype="float16"),
        signature(model, attention_mass=0.8),
        signature(model, attention_mass=0.9 + 1e-15),
        signature(model, revision="abc"),
        signature(model, revision="None"),
        signature(model, image_place="as_written"),
        *(signature(model, **{name: 9}) for name in ("image_size", "min_pixels", "max_pixels", "max_tiles")),
        signature(folder_with(tmp_path / "other") if is_folder else "org/other"),
    ]

    assert len(set(signatures)) == len(signatures)


def test_the_same_folder_by_another_name_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "home" / "model")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    names = [folder, "home/model", "./home/../home/model/", "~/model", "link"]

    assert len({signature(name) for name in names}) == 1


# Imports


def test_importing_the_resources_imports_nothing_heavy(
    fresh_python: RunPython,
) -> None:
    code = (
        "import sys; from scalselect_assets.resources import vlm, embedding_store, storage; "
        "print([name for name in ('torch', 'transformers', 'lancedb') if name in sys.modules])"
    )

    result = fresh_python("-c", code)

    assert result.stdout == "[]\n", result.stderr
