"""Each rule keeps what its source says, on spectra known in advance and on planted pools."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.subspace.rank import (
    DEFAULT_ENERGY_THRESHOLD,
    EffectiveRank,
    EnergyThreshold,
    FixedRank,
    GavishDonoho,
    RankRule,
    hard_threshold,
    parse_rank_rule,
)

RULES: list[RankRule] = [EnergyThreshold(0.9), FixedRank(3), GavishDonoho(), EffectiveRank()]


def energies(*values: float) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def spectrum_of(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The squared singular values of the centred matrix that are not rounding."""
    s = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    return np.square(s[s > 1e-10 * s[0]])


def planted(n: int, d: int, r: int, seed: int, strength: float = 3.0) -> NDArray[np.float64]:
    """White noise, far from zero, with r directions of ``strength`` times its largest singular value."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.normal(size=(n, r)))[0]
    V = np.linalg.qr(rng.normal(size=(d, r)))[0]
    return strength * (np.sqrt(n) + np.sqrt(d)) * U @ V.T + rng.normal(size=(n, d)) + 50


@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20),
    more=st.integers(0, 500),
    wide=st.booleans(),
)
def test_every_rule_keeps_at_least_one_direction_and_at_most_the_rank(values, more, wide):
    spectrum = energies(*sorted(values, reverse=True))
    r = len(spectrum)
    for rule in RULES:
        k = rule.rank(spectrum, r + 1, r + more) if wide else rule.rank(spectrum, r + 1 + more, r)
        assert type(k) is int
        assert 1 <= k <= r


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_rule_finds_a_direction_where_there_is_no_energy(rule: RankRule):
    assert rule.rank(energies(), 1, 5) == 0
    assert rule.rank(energies(), 100, 5) == 0


@pytest.mark.parametrize("rule", [*RULES[:1], *RULES[2:]], ids=str)
def test_a_scale_of_the_data_changes_no_rank(rule: RankRule):
    spectrum = spectrum_of(planted(80, 20, 3, seed=0))
    assert {rule.rank(spectrum * scale, 80, 20) for scale in (1e-12, 1.0, 1e12)} == {
        rule.rank(spectrum, 80, 20)
    }


@pytest.mark.parametrize(
    ("values", "threshold", "k"),
    [
        ([9, 1], 0.9, 1),  # reaching is enough
        ([9, 1], 0.900001, 2),
        ([8.999, 1.001], 0.9, 2),
        ([7, 2, 1], 0.9, 2),  # 0.7 + 0.2 is 0.8999... in float64
        ([1] * 10, 0.9, 9),
        ([5, 3, 2], 0.5, 1),
        ([5, 3, 2], 1e-12, 1),  # never an empty subspace where there is energy
        ([5, 3, 2], 1.0, 3),
        ([5, 3, 1e-10], 1.0, 3),
        ([1 / 3, 1 / 7, 1 / 11, 1 / 13], 1.0, 4),
        ([4], 0.9, 1),
    ],
)
def test_the_energy_rule_takes_the_first_count_that_reaches_the_threshold(
    values: list[float], threshold: float, k: int
):
    assert EnergyThreshold(threshold).rank(energies(*values), 1000, len(values)) == k


def test_a_tie_with_the_energy_threshold_does_not_depend_on_rounding():
    noise = np.random.default_rng(0).normal(size=(200, 3)) * 1e-14
    assert {EnergyThreshold(0.9).rank(energies(70, 20, 10) * (1 + row), 1000, 3) for row in noise} == {2}


def test_the_default_energy_threshold_is_the_papers():
    assert DEFAULT_ENERGY_THRESHOLD == EnergyThreshold().threshold == 0.9
    assert EnergyThreshold().rank(energies(80, 11, 9), 1000, 3) == 2


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0000001, 90, np.nan])
def test_an_energy_threshold_outside_its_range_is_refused(threshold: float):
    with pytest.raises(ValueError, match=r"energy threshold .*above 0 and at most 1"):
        EnergyThreshold(threshold)


def test_a_fixed_rank_stops_at_the_numerical_rank():
    assert [FixedRank(k).rank(energies(5, 3, 2), 1000, 9) for k in (1, 3, 4)] == [1, 3, 3]


@pytest.mark.parametrize("k", [0, -2])
def test_a_fixed_rank_below_one_is_refused(k: int):
    with pytest.raises(ValueError, match=rf"fixed rank of {k}; allowed is 1 or more"):
        FixedRank(k)


@pytest.mark.parametrize(
    ("beta", "omega"),
    [(0.05, 1.5194), (0.5, 2.1711), (1.0, 2.8582)],
)
def test_the_threshold_equals_the_table_of_gavish_and_donoho(beta: float, omega: float):
    assert hard_threshold(beta) == pytest.approx(omega, abs=1e-3)


def test_the_threshold_has_its_limits():
    # Without any noise spread (β → 0) the median is the noise itself, and λ* is √2.
    assert hard_threshold(1e-9) == pytest.approx(np.sqrt(2), abs=1e-8)
    # The median squared singular value of a square matrix: that of the quarter-circle law, from tables.
    assert (4 / np.sqrt(3) / hard_threshold(1.0)) ** 2 == pytest.approx(0.6527759, abs=1e-6)


def test_the_threshold_stays_within_the_papers_bound_of_its_cubic():
    for beta in np.linspace(0.01, 1, 34):
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert hard_threshold(beta) == pytest.approx(cubic, abs=0.02)


@pytest.mark.parametrize("beta", [0.0, 1.01, np.nan])
def test_a_threshold_for_no_matrix_is_refused(beta: float):
    with pytest.raises(ValueError, match=r"aspect ratio .*Pass the shorter side"):
        hard_threshold(beta)


@pytest.mark.parametrize("r", [1, 4, 10])
@pytest.mark.parametrize(("n", "d"), [(400, 100), (100, 400), (200, 200)])
def test_gavish_donoho_finds_the_planted_rank_under_white_noise(n: int, d: int, r: int):
    for seed in range(3):
        assert GavishDonoho().rank(spectrum_of(planted(n, d, r, seed)), n, d) == r


def test_gavish_donoho_keeps_one_direction_of_pure_noise():
    for seed in range(3):
        assert GavishDonoho().rank(spectrum_of(planted(300, 80, 1, seed, strength=0.0)), 300, 80) == 1


def test_gavish_donoho_takes_the_median_over_zero_singular_values_too():
    spectrum = energies(9, 3, 2, 1) ** 2
    assert GavishDonoho().rank(spectrum, 1000, 4) == 1  # median 2.5
    assert GavishDonoho().rank(spectrum, 1000, 7) == 3  # median 1 of 9, 3, 2, 1, 0, 0, 0


def test_gavish_donoho_counts_one_dimension_less_than_rows():
    # 6 rows of full rank have 5 singular values, none of them zero; the median is the third.
    spectrum = energies(100, 1, 1, 1, 1) ** 2
    assert GavishDonoho().rank(spectrum, 6, 50) == 1


@pytest.mark.parametrize(("n", "d"), [(1000, 10), (11, 50)])
def test_gavish_donoho_refuses_a_pool_without_a_noise_level(n: int, d: int):
    with pytest.raises(ValueError, match=r"6 zero singular values out of 10.*'effective_rank'"):
        GavishDonoho().rank(energies(4, 3, 2, 1), n, d)


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values():
    # Shares 1/2, 1/4, 1/4 have entropy 1.5·ln 2, so 2.83 directions; shares of the squares would give 1.89.
    assert EffectiveRank().rank(energies(4, 2, 2) ** 2, 1000, 9) == 3


@pytest.mark.parametrize("r", [1, 2, 3, 7, 100, 1023])
def test_equally_strong_directions_are_all_effective(r: int):
    assert EffectiveRank().rank(np.full(r, 1 / 3), 5000, 2000) == r


def test_weak_directions_are_not_effective():
    assert EffectiveRank().rank(energies(*[1.0] * 5, *[1e-12] * 50), 1000, 100) == 5


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("energy", EnergyThreshold(0.8)),
        ("gavish_donoho", GavishDonoho()),
        ("effective_rank", EffectiveRank()),
        (64, FixedRank(64)),
        ("64", FixedRank(64)),
    ],
)
def test_a_rule_is_found_by_what_a_configuration_says(text: str | int, rule: RankRule):
    assert parse_rank_rule(text, 0.8) == rule


@pytest.mark.parametrize("text", ["Energy", "", "0.9", "-3", "²", True, 2.5, None])
def test_an_unknown_rule_is_refused_with_all_that_are_allowed(text: Any):
    with pytest.raises(ValueError, match=r"'energy', 'gavish_donoho', 'effective_rank' or a number"):
        parse_rank_rule(text, 0.9)


@pytest.mark.parametrize("text", [0, "0", -1])
def test_a_number_of_directions_below_one_is_refused(text: str | int):
    with pytest.raises(ValueError, match=r"1 or more|from 1"):
        parse_rank_rule(text, 0.9)


def test_every_rule_describes_itself_by_name_and_knobs():
    assert [rule.describe() for rule in RULES] == [
        {"rule": "energy", "threshold": 0.9},
        {"rule": "fixed", "k": 3},
        {"rule": "gavish_donoho"},
        {"rule": "effective_rank"},
    ]
