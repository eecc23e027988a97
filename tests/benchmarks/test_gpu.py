"""The script for a GPU runs at small size on a CPU, and its table has every measure."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.usefixtures("processes")  # it starts none, but takes as long
def test_the_script_measures_a_small_model_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (
        "--samples 8 --profiled 2 --whole-model 2 --workers 0 --rows 200 --width 16 --batch-tokens 2048 512"
    )
    main(["--device", "cpu", "--models", "tiny", "--folder", str(tmp_path), *sizes.split()])
    printed = capsys.readouterr().out
    table = dict(re.findall(r"^\| (.+?) \| (.*?) \|$", printed, re.MULTILINE))
    assert table["dtype"] == "float32"
    for measure in (
        "**end to end, first pass, samples/s**",
        "preparation, samples/s",
        "kernels a sample",
        "limit of the products, samples/s",
        "model alone, batches of 2,048 tokens: first pass / again, samples/s",
        "model alone, batches of 512 tokens: first pass / again, samples/s",
        "whole model, eager, one at a time, samples/s",
        "× whole model, end to end",
        "moments of 200 × 16 from host memory, s",
        "scores of 200 × 16 from host memory, s",
    ):
        assert re.search(r"\d", table[measure]), measure
    typical, largest = map(
        float, table["own dtype against float32: median / largest difference"].split(" / ")
    )
    assert typical <= largest < 1e-4  # float32 twice
    assert table["the same: top 16 % shared"] == "100.0%"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        main(["--folder", str(tmp_path)])
