"""Tables of a pool's runs: accuracy, paired differences from random with intervals, what was chosen."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import spearmanr, t

from benchmarks.quality.trial import BASE, FULL, TrialRun


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); the width is NaN for one value."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return float(numbers.mean()), math.nan
    half = t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    return float(numbers.mean()), float(half)


def paired_differences(runs: Iterable[TrialRun], reference: Iterable[TrialRun]) -> list[float]:
    """Points of accuracy above the reference's run of the same seed, for the seeds that both have."""
    of_seed = {run.seed: run.mean for run in reference}
    return [100 * (run.mean - of_seed[run.seed]) for run in runs if run.seed in of_seed]


def worth_in_random_rows(mean: float, curve: Sequence[tuple[float, float]]) -> float:
    """The share of random rows that reaches an accuracy, from random's learning curve; NaN beyond its ends.

    Args:
        mean: An accuracy.
        curve: Shares and accuracies.
    """
    shares, accuracies = (np.array(one) for one in zip(*sorted(curve), strict=True))
    rising = np.maximum.accumulate(accuracies)
    if not rising[0] <= mean <= rising[-1]:
        return math.nan
    return float(np.exp(np.interp(mean, rising, np.log(shares))))


def accuracy_table(runs: Sequence[TrialRun], share: float) -> str:
    """Every strategy beside random, in Markdown."""
    at_share = [run for run in runs if run.share in {0.0, 1.0, share}]
    random = [run for run in at_share if run.name == "random"]
    full = _mean([run.mean for run in runs if run.name == FULL]) or math.nan
    curve = _curve(runs)
    lines = [
        "| trained on | seeds | accuracy, % | of everything's, % | minus random, points | "
        "worth random rows, % | groups | noise, % | wrong, % | rare, % | distinct share | training, s |",
        "|---|" + "---:|" * 11,
    ]
    for name in dict.fromkeys(run.name for run in at_share):
        own = [run for run in at_share if run.name == name]
        mean = _mean([run.mean for run in own])
        minus = paired_differences(own, random) if name not in {FULL, BASE, "random"} else []
        worth = worth_in_random_rows(mean, curve) if len(curve) > 1 and name not in {FULL, BASE} else math.nan
        distinct = [run.distinct for run in own if run.distinct is not None]
        lines.append(
            f"| {name} | {len(own)} | {_shown([100 * run.mean for run in own])} | "
            f"{_number(100 * mean / full)} | {_shown(minus)} | {_number(100 * worth)} | "
            f"{_mean([run.groups for run in own]):,.0f} | "
            + " | ".join(
                f"{100 * _mean([getattr(run, kind) for run in own]):.1f}"
                for kind in ("noise", "wrong", "tail")
            )
            + f" | {_number(_mean(distinct), 3)} | {_mean([run.training.seconds for run in own]):.1f} |"
        )
    return "\n".join(lines)


def skills_table(runs: Sequence[TrialRun], share: float) -> str:
    """Accuracy by skill, the mean over seeds."""
    skills = sorted({skill for run in runs for skill in run.accuracy})
    lines = ["| trained on | " + " | ".join(skills) + " |", "|---|" + "---:|" * len(skills)]
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name and run.share in {0.0, 1.0, share}]
        if own:
            means = (100 * _mean([run.accuracy[skill] for run in own]) for skill in skills)
            lines.append(f"| {name} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(lines)


def curve_table(runs: Sequence[TrialRun]) -> str:
    """Random's learning curve."""
    shares = sorted({run.share for run in runs if run.name in {"random", FULL}})
    lines = ["| random rows, % of the pool | seeds | accuracy, % |", "|---:|---:|---:|"]
    for one in shares:
        own = [run for run in runs if run.share == one and run.name in {"random", FULL}]
        lines.append(f"| {100 * one:.0f} | {len(own)} | {_shown([100 * run.mean for run in own])} |")
    return "\n".join(lines)


def advice_line(runs: Sequence[TrialRun], share: float) -> str:
    """Whether the distinct share, beside random's, predicts the accuracy beside random's."""
    random = {run.seed: run for run in runs if run.name == "random" and run.share == share}
    pairs = [
        (run.distinct / random[run.seed].distinct, run.mean - random[run.seed].mean)
        for run in runs
        if run.share == share and run.name != "random" and run.seed in random and run.distinct
    ]
    if len(pairs) < 3:
        return "Too few runs to compare the distinct share with the accuracy."
    found = spearmanr(*zip(*pairs, strict=True))
    below = [gain for ratio, gain in pairs if ratio < 0.95]
    return (
        f"Distinct share over random's against accuracy minus random's, {len(pairs)} choices: Spearman's ρ "
        f"{found.statistic:.2f}. Choices that the advice warns of: {len(below)}, "
        f"{sum(gain < 0 for gain in below)} of them below random; the others: {len(pairs) - len(below)}, "
        f"{sum(gain < 0 for ratio, gain in pairs if ratio >= 0.95)} below random."
    )


def _curve(runs: Sequence[TrialRun]) -> list[tuple[float, float]]:
    shares = sorted({run.share for run in runs if run.name in {"random", FULL}})
    return [
        (one, _mean([run.mean for run in runs if run.share == one and run.name in {"random", FULL}]))
        for one in shares
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _number(value: float, decimals: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{decimals}f}"


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
