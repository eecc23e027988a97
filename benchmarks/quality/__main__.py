"""The command: ``python -m benchmarks.quality --preset tiny|cpu|gpu``; see the package."""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from benchmarks.quality import result_tables
from benchmarks.quality.choosing import score
from benchmarks.quality.drawn_scenes import CELL
from benchmarks.quality.pools import alignment, make_pool, world
from benchmarks.quality.presets import PRESETS, QualityPreset
from benchmarks.quality.target import make_model, make_processor, make_tokenizer
from benchmarks.quality.trial import Trial, TrialRun, copied
from benchmarks.quality.tuning import Trainee, check_assembly
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.representation.quiet import quiet_transformers

_STRATEGIES = (
    *("random", "top_leverage", "coverage", "spanning", "leverage_sampling"),
    *("dedup+top_leverage", "vectors+top_leverage", "length"),
)
_TERSE = 0.3
_KNOBS = (
    *({"attention_mass": mass} for mass in (0.5, 0.7, 1.0)),
    *({"energy": energy} for energy in (0.8, 0.95, 0.99)),
    {"centred": False},
)


def make_base(folder: Path, preset: QualityPreset, device: torch.device, *, seed: int) -> None:
    """Train the target model on captions and terse questions, and save it as Transformers does."""
    side = preset.grid * CELL
    aligned = alignment(preset.base_rows, preset.grid, terse=_TERSE)
    spoken = world(2000, 4, preset.grid, copies=0.0, balanced=True)
    said = [
        *zip(aligned.asked, aligned.answers, strict=True),
        *zip(spoken.asked, spoken.answers, strict=True),
    ]
    tokenizer = make_tokenizer(f"USER: \n{asked} ASSISTANT: {answer}" for asked, answer in said)
    model = make_model(tokenizer, side, preset.size, seed)
    trainee = Trainee(model, tokenizer, device, autocast=device.type == "cuda")
    data = trainee.encoded(aligned)
    took = trainee.train(
        data,
        torch.arange(len(aligned)).numpy(),
        epochs=preset.base_epochs,
        batch=preset.base_batch,
        rate=preset.base_rate,
        seed=1 + seed,
    )
    with quiet_transformers():
        model.save_pretrained(folder)
    make_processor(tokenizer, side).save_pretrained(folder)
    parameters = sum(one.numel() for one in model.parameters())
    print(
        f"Base model: {parameters / 1e6:.2f} M parameters, {len(aligned):,} rows, {took.steps:,} steps, "
        f"{took.seconds:.0f} s, loss {took.loss:.2f}",
        flush=True,
    )


def one_seed(options: argparse.Namespace, preset: QualityPreset, name: str, seed: int) -> list[TrialRun]:
    """All runs of one seed of one pool."""
    device = torch.device(options.device)
    with quiet_transformers():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.base)
        model = AutoModelForImageTextToText.from_pretrained(options.base, dtype=torch.float32)
    trainee = Trainee(model, tokenizer, device, autocast=device.type == "cuda")
    pool, test = make_pool(
        name,
        seed,
        rows=preset.rows,
        tests=preset.tests,
        grid=preset.grid,
        place=options.easy_vqa if name == "easy-vqa" else options.folder,
    )
    check_assembly(trainee, pool, preset.grid * CELL)
    how: dict[str, Any] = {"workers": preset.encode_workers, "batch_tokens": preset.batch_tokens}
    scored = score(load_encoder(str(options.base), device=options.device), pool, **how)
    removed = {
        "removed_by_text_and_vector": scored.removed(by_text=True),
        "removed_by_vector": scored.removed(by_text=False),
    }
    print(
        f"{name} seed {seed}: {len(pool):,} rows, k {scored.subspace.k} of d {scored.subspace.d}, "
        f"represented and scored in {scored.seconds:.1f} s; "
        + "; ".join(
            f"{kind} {len(one.rows)} at cosine {one.cosine:.4f}, of them {one.same_picture_other_question} "
            "with the picture of the kept row and another question"
            for kind, one in removed.items()
        ),
        flush=True,
    )
    trial = Trial(trainee, copied(model.state_dict()), scored, test, preset, seed)
    runs = [trial.base()] if seed == options.first_seed else []
    if seed - options.first_seed < preset.full_seeds:
        runs.append(trial.everything())
    runs += [trial.chosen(strategy, options.budget) for strategy in options.strategies]
    if seed - options.first_seed < preset.curve_seeds:
        runs += [trial.chosen("random", share) for share in preset.curve]
    for knob in _KNOBS if options.knobs else ():
        mass = {key: value for key, value in knob.items() if key == "attention_mass"}
        rest = {key: value for key, value in knob.items() if key != "attention_mass"}
        encoder = load_encoder(str(options.base), device=options.device, **mass)
        other = Trial(trainee, trial.weights, score(encoder, pool, **how, **rest), test, preset, seed)
        label = ", ".join(f"{key} {value}" for key, value in knob.items())
        runs.append(replace(other.chosen("top_leverage", options.budget), name=f"top_leverage, {label}"))
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables; write all numbers as JSON if asked to."""
    options = parse(arguments)
    preset: QualityPreset = options.preset
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quality-") as made_here:
        options.base = options.base or Path(made_here, "base")
        print(
            f"# Quality of selections\n\n{_machine(options.device)}; {options.budget:.0%} chosen, {preset}\n"
        )
        if not (options.base / "config.json").is_file():
            make_base(options.base, preset, torch.device(options.device), seed=options.base_seed)
        runs: dict[str, list[TrialRun]] = {name: [] for name in options.pools}
        for seed in range(options.first_seed, options.first_seed + preset.seeds):
            for name in options.pools:
                if time.perf_counter() - start > preset.time_limit:
                    print(f"(time limit: {name} stops before seed {seed})", flush=True)
                    continue
                runs[name] += one_seed(options, preset, name, seed)
                if options.json:  # after each seed, so that an interruption loses one seed only
                    made = {pool: [asdict(run) for run in of_pool] for pool, of_pool in runs.items()}
                    options.json.write_text(
                        json.dumps({"preset": asdict(preset), "runs": made}, indent=1) + "\n"
                    )
    for name, of_pool in runs.items():
        if of_pool:
            print(f"\n## {name}\n\n{result_tables.accuracy_table(of_pool, options.budget)}")
            print(f"\n{result_tables.advice_line(of_pool, options.budget)}")
            print(f"\n{result_tables.skills_table(of_pool, options.budget)}")
            print(f"\n{result_tables.curve_table(of_pool)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the preset's fields are options, too."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpu" if cuda else "cpu")
    add("--pools", nargs="+", help="world-PERCENT, world-PERCENT-junk, easy-vqa, folder")
    add("--strategies", nargs="+", default=list(_STRATEGIES))
    add("--budget", type=float, default=0.16, help="share of the pool that is chosen (0.16)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--base", type=Path, help="folder of the base model: read if it is there, else written")
    add("--base-seed", type=int, default=0, help="of the base model, for another target (0)")
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, help="of torch (all cores)")
    add("--knobs", action="store_true", help="also choose with other τ, energies, and without centring")
    add("--easy-vqa", type=Path, help="the wheel of easy-vqa 1.0")
    add("--folder", type=Path, help="a folder of ShareGPT .jsonl files")
    add("--json", type=Path, help="also write all numbers there, after each seed")
    scalars = [one for one in fields(QualityPreset) if one.type in {int, float}]
    for one in scalars:
        add(f"--{one.name.replace('_', '-')}", type=one.type, help="see presets.Preset")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    given = {one.name: value for one in scalars if (value := getattr(options, one.name)) is not None}
    options.preset = replace(preset, **given)
    options.pools = options.pools or list(preset.pools)
    return options


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
