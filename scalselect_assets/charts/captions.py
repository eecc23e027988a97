"""Text alternatives and captions of the charts, each one sentence without a full stop."""

from scalselect_assets.charts.chart_data import Churn, EnergyCurve, LeverageProfile


def energy(curve: EnergyCurve) -> str:
    """A caption for the energy curve."""
    return f"{curve.k:,} of {curve.rank:,} directions hold {curve.k_energy:.2%} of the energy ({curve.rule})"


def leverage(profile: LeverageProfile, selected: int) -> str:
    """A caption for the histogram of leverage."""
    share = f"The {selected:,} selected samples hold {profile.leverage_share:.1%} of the pool's leverage"
    return share if profile.cut is None else f"{share}; the last one has {profile.cut:.3g} times the mean"


def ranks(profile: LeverageProfile) -> str:
    """A caption for the rank curve."""
    if not profile.values:
        return "No sample has any leverage"
    above = sum(1 for value in profile.values if value >= 1)
    crossing = f"; about {profile.ranks[above - 1]:,} samples are above the mean" if above else ""
    return (
        f"Normalised leverage falls from {profile.values[0]:.3g} to {profile.values[-1]:.2g} over "
        f"{profile.ranks[-1]:,} samples{crossing}"
    )


def churn(churn: Churn) -> str:
    """A sentence on the samples that stayed, came and went."""
    return (
        f"Of the selection before, {churn.stayed:,} samples stayed and {churn.went:,} went "
        f"({churn.share:.1%}); {churn.came:,} came"
    )
