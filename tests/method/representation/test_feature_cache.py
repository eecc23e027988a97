"""Features are kept by what came from the tower together, and dropped with it."""

import torch

from scalselect_assets.method.representation.feature_cache import FeatureCache


def chunk(*keys: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """Parts of one tensor of 40 bytes a row."""
    return dict(zip(keys, torch.zeros(rows * len(keys), 10).split(rows), strict=True))


def test_what_came_together_is_kept_and_dropped_together() -> None:
    cache = FeatureCache(320)
    first, second = chunk("a", "b"), chunk("c", "d")
    cache.put(first)
    cache.put(second)
    assert len(cache) == 4
    assert cache.get("b") is first["b"]  # and so the second is the one that was used longest ago
    cache.put(chunk("e"))
    assert [cache.get(key) is not None for key in "abcde"] == [True, True, False, False, True]
    assert len(cache) == 3


def test_more_than_fits_is_not_kept() -> None:
    cache = FeatureCache(100)
    cache.put(chunk("a", "b"))
    assert (len(cache), cache.get("a")) == (0, None)


def test_a_cleared_cache_takes_as_much_again() -> None:
    cache = FeatureCache(160)
    for _ in range(3):
        cache.put(chunk("a", "b"))
        assert cache.get("a") is not None
        cache.clear()
        assert (len(cache), cache.get("a")) == (0, None)
