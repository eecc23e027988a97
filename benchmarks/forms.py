"""Time and memory of one pool in several forms: JSON Lines with image files, Parquet, WebDataset tar, gzip.

Every form holds the same rows and pictures. Measured are, each in a process of its own so that the peak of
memory is its own: discovery (the file is read and hashed), reading (every row judged, embedded images
hashed), and opening every image in a shuffled order, as the embedding does.

    python -m benchmarks.forms --folder DIR [--megabytes 50]
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from scalselect_assets.resources.sample_source import SampleSource

_SIDE = 384
_ROW_GROUP = 100  # as Hugging Face writes image datasets
FORMS = ("files", "gzip", "parquet", "tar")
STEPS = ("discover", "read", "open")


def pictures(n_bytes: int) -> Iterator[bytes]:
    """Distinct JPEG pictures of some 100 kB each, of so many bytes together."""
    rng = np.random.default_rng(0)
    written = 0
    base = rng.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
    while written < n_bytes:
        base = np.roll(base, 7, axis=0)
        base[:8] = rng.integers(0, 256, (8, _SIDE, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(base).save(buffer, "JPEG", quality=85)
        written += buffer.tell()
        yield buffer.getvalue()


def row(number: int, image: str | None) -> dict[str, object]:
    """One row about one picture."""
    turns = [
        {"role": "user", "content": f"<image>\nWhat is in picture {number}?"},
        {"role": "assistant", "content": "A pattern that nobody has seen before. " * 8},
    ]
    return {"id": f"r{number}", "messages": turns, **({} if image is None else {"images": [image]})}


def write_pools(folder: Path, n_bytes: int) -> int:
    """Write the pool in every form; returns the number of rows."""
    (folder / "files" / "images").mkdir(parents=True, exist_ok=True)
    for form in FORMS[1:]:
        (folder / form).mkdir(exist_ok=True)
    (folder / "gzip" / "images").unlink(missing_ok=True)
    (folder / "gzip" / "images").symlink_to(folder / "files" / "images")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(turn)), ("images", pa.list_(image))])
    lines, group, n_rows = [], [], 0
    with (
        pq.ParquetWriter(folder / "parquet" / "pool.parquet", schema) as parquet,
        tarfile.open(folder / "tar" / "pool.tar", "w") as archive,
    ):
        for n_rows, data in enumerate(pictures(n_bytes), start=1):
            (folder / "files" / "images" / f"{n_rows}.jpg").write_bytes(data)
            lines.append(json.dumps(row(n_rows, f"images/{n_rows}.jpg")) + "\n")
            group.append({**row(n_rows, None), "images": [{"bytes": data, "path": None}]})
            for name, content in (
                (f"{n_rows:08d}.json", json.dumps(row(n_rows, None)).encode()),
                (f"{n_rows:08d}.jpg", data),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            if len(group) == _ROW_GROUP:
                parquet.write_table(pa.Table.from_pylist(group, schema))
                group = []
        parquet.write_table(pa.Table.from_pylist(group, schema))
    (folder / "files" / "pool.jsonl").write_text("".join(lines), encoding="utf-8")
    import gzip

    with gzip.open(folder / "gzip" / "pool.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.writelines(lines)
    return n_rows


def measure(folder: Path, form: str, step: str) -> dict[str, float]:
    """Seconds and peak MiB of one step on one form, in this process."""
    # The images of the gzip pool lie behind a link, which the image root must name.
    root = UPath(folder / "files") if form == "gzip" else None
    source = SampleSource(UPath(folder / form), root)
    (key,) = source.shard_keys()
    images = []
    if step == "open":
        images = [path for found in source.read_shard(key) for path in found.image_paths]
        Random(0).shuffle(images)  # noqa: S311
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if step == "discover":
        source.shard_state(key, source.index_shard(key))
    elif step == "read":
        for found in source.read_shard(key):
            if found.rejection:
                raise SystemExit(f"row {found.row} is rejected: {found.rejection.detail}")
    else:
        opened = source.image_files()
        for path in images:
            opened.read(path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mib": peak / 1024, "before_mib": before / 1024}


def main() -> None:
    """Write the pools, measure each step in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Where the pools are written.")
    parser.add_argument("--megabytes", type=int, default=50, help="Of pictures in each form.")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "STEP"), help="One measurement, as JSON.")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.measure:
        print(json.dumps(measure(folder, *arguments.measure)))
        return
    n_rows = write_pools(folder, arguments.megabytes << 20)
    print(f"{n_rows:,} rows, {arguments.megabytes} MiB of pictures in each form\n")
    print("| form | step | seconds | MiB/s | peak MiB | of it before |\n|---|---|---:|---:|---:|---:|")
    for form in FORMS:
        for step in STEPS:
            command = [
                *(sys.executable, "-m", "benchmarks.forms", "--folder", str(folder)),
                *("--measure", form, step),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
            result = json.loads(done.stdout)
            speed = arguments.megabytes / result["seconds"]
            print(
                f"| {form} | {step} | {result['seconds']:.2f} | {speed:.0f} | {result['peak_mib']:.0f} | "
                f"{result['before_mib']:.0f} |"
            )


if __name__ == "__main__":
    main()
