"""A test falls into its tier by what it uses."""

import multiprocessing
import subprocess
import sys

import pytest

from tests.tiers import SLOW


def test_a_test_that_takes_no_slow_fixture_is_quick(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker(SLOW) is None


@pytest.mark.usefixtures("fresh_python")
def test_a_fixture_that_takes_a_slow_one_makes_its_test_slow(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker(SLOW) is not None


def test_a_quick_test_that_starts_python_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="takes the fixture `processes`"):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    with pytest.raises(pytest.fail.Exception, match="takes the fixture `processes`"):
        multiprocessing.Process(target=print).start()
