"""The embedded rows of the pool as the choice sees them: scores, tokens, sources, and who is on a list.

Rows come in the order of their shards, then of their places in them. What is read of a shard is its scores
and, of its vectors' table, the columns that something asks for. Costs: some 300 bytes for every row that is
held; the texts of a shard are read only where a field of the row names the source.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray
from upath import UPath

from resources.artifacts import ArtifactStore
from resources.embedding_store import EmbeddingStore, EmbeddingTable
from scalselect_assets import attention_embeddings, importance_scores

if TYPE_CHECKING:
    from scalselect_assets.method.candidates import Candidates
    from scalselect_assets.method.subspace import Subspace

NO_LABEL = "(none)"
_FIRST_FOLDER = re.compile(r"^(?:\./|/)*([^/]+)/")
_SCORES = ("row", "sample_key", "source_id", "leverage", "normalised_leverage")


class SampleListError(RuntimeError):
    """A list of samples cannot be read; the message names the file and what it should be."""


@dataclass(frozen=True)
class PoolRows:
    """Reads the rows of the shards that are in the basis.

    Attributes:
        artifacts: The store.
        embeddings: Its vectors.
        basis_version: The version of the basis that the scores must be of.
        shards: By shard in the basis, what the basis says of it.
        labels: The labels that rows are to have, each a column.
        with_images: Whether rows are to have the hashes of their images.
    """

    artifacts: ArtifactStore
    embeddings: EmbeddingStore
    basis_version: str
    shards: Mapping[str, Mapping[str, str]]
    labels: Sequence[str]
    with_images: bool = False

    def scores(self, columns: list[str] | None = None) -> Iterator[tuple[str, pl.DataFrame]]:
        """The scores of each shard, in the order of their names.

        Raises:
            dg.Failure: A shard was scored with another basis.
        """
        for shard in sorted(self.shards):
            yield shard, importance_scores.read_scores(self.artifacts, self.basis_version, shard, columns)

    def all(self) -> pl.DataFrame:
        """Every embedded row; see ``described``."""
        return pl.concat([self.described(shard, scores.select(_SCORES)) for shard, scores in self.scores()])

    def described(self, shard: str, scored: pl.DataFrame) -> pl.DataFrame:
        """Some rows of a shard with all that a choice may ask of them.

        Returns:
            Their columns, the shard, ``n_text_tokens`` and ``n_image_tokens`` (Int64), a String column for
            each label and, if asked for, ``image_sha256``.

        Raises:
            dg.Failure: The shard's table is not the one that was scored.
        """
        table = self.table(shard)
        wanted = ["sample_key", "n_tokens", "n_vision_tokens"]
        if self.with_images:
            wanted.append("image_sha256")
        if "image_folder" in self.labels:
            wanted.append("images")
        if any(label == "source" or label.startswith("field:") for label in self.labels):
            wanted.append("text")
        held = pl.DataFrame(self.embeddings.read_rows(table, wanted)).with_columns(
            n_image_tokens=pl.col("n_vision_tokens").cast(pl.Int64),
            n_text_tokens=(pl.col("n_tokens") - pl.col("n_vision_tokens")).cast(pl.Int64),
            **{label: _label(label, shard) for label in self.labels},
        )
        kept = [
            "row",
            "sample_key",
            "n_text_tokens",
            "n_image_tokens",
            *self.labels,
            *(["image_sha256"] if self.with_images else []),
        ]
        rows = scored.join(held.select(kept), on=["row", "sample_key"], how="inner", maintain_order="left")
        if rows.height != scored.height:
            raise dg.Failure(
                f"{scored.height - rows.height} scored rows of shard {shard!r} are not in its table "
                f"{table.table!r} version {table.version}; run the refresh again",
                allow_retries=False,
            )
        return rows.with_columns(shard=pl.lit(shard))

    def table(self, shard: str) -> EmbeddingTable:
        """The table that the basis and the scores are of.

        Raises:
            dg.Failure: The shard has other vectors by now.
        """
        return attention_embeddings.fitted_table(self.artifacts, shard, self.shards)[0]


def _label(label: str, shard: str) -> pl.Expr:
    """The expression of a label over a table's columns; the same as `source_of` gives."""
    match label:
        case "shard":
            return pl.lit(shard)
        case "shard_folder":
            return pl.lit(_folder(shard))
        case "image_folder":
            return pl.col("images").list.first().str.extract(_FIRST_FOLDER.pattern).fill_null(NO_LABEL)
    value = pl.col("text").str.json_path_match(
        "$" + "".join(f"[{json.dumps(name)}]" for name in _field(label))
    )
    if label == "source":
        named = value.str.strip_chars()
        return pl.when(named != "").then(named).otherwise(pl.lit(_folder(shard)))
    return value.fill_null(NO_LABEL)


def source_of(label: str) -> Callable[[str, str], str]:
    """From a shard and the text of one of its rows to the row's label, also for rows that have no vector."""

    def of(shard: str, text: str) -> str:
        if label == "shard":
            return shard
        if label == "shard_folder":
            return _folder(shard)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if label == "image_folder":
            return _image_folder(row)
        value = row
        for name in _field(label):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if label == "source":
            return (value or "").strip() or _folder(shard)
        return NO_LABEL if value is None else value

    return of


def _folder(shard: str) -> str:
    """The folder of a shard below the pool, or its own name where it is in none."""
    path = PurePosixPath(shard)
    return str(path.parent) if len(path.parts) > 1 else path.stem


def _field(label: str) -> list[str]:
    """The names that lead to a field of the row."""
    return label.removeprefix("field:").split(".")


def _image_folder(row: object) -> str:
    """The first folder of the first image that a row names, whatever else is wrong with it."""
    named = [row.get(field) for field in ("images", "image")] if isinstance(row, dict) else []
    for value in named:
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, str):
                found = _FIRST_FOLDER.match(image)
                return found[1] if found else NO_LABEL
    return NO_LABEL


def candidates(rows: pl.DataFrame, labels: Sequence[str]) -> "Candidates":
    """The rows as the method takes them, in their order."""
    from scalselect_assets.method.candidates import Candidates, Labels

    order = np.empty(rows.height, np.int64)
    order[rows.select(pl.arg_sort_by("sample_key", "shard")).to_series().to_numpy()] = np.arange(rows.height)
    return Candidates(
        rows["normalised_leverage"].to_numpy(),
        order,
        rows["n_text_tokens"].to_numpy(),
        rows["n_image_tokens"].to_numpy(),
        {label: Labels.of(rows[label].to_list()) for label in labels},
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """The samples of a list, found in the pool.

    Attributes:
        rows: (m,) int64, places of the rows that an entry names, ascending.
        unknown: Entries that name no embedded row.
    """

    rows: NDArray[np.int64]
    unknown: tuple[str, ...]


def read_list(path: UPath) -> list[str]:
    """The entries of a list of samples: one a line; empty lines and those that begin with # do not count.

    Raises:
        SampleListError: The file cannot be read as UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise SampleListError(
            f"the list {path} cannot be read ({error}); it is a UTF-8 text file with a source id, a sample "
            "key or the SHA-256 of an image in each line"
        ) from error
    return list(
        dict.fromkeys(entry for line in lines if (entry := line.strip()) and not entry.startswith("#"))
    )


def find_listed(rows: pl.DataFrame, entries: Sequence[str]) -> Listed:
    """The rows that the entries of a list name: by source id, by sample key, or by an image's SHA-256."""
    listed = pl.DataFrame({"entry": list(entries)}, schema={"entry": pl.String()})
    names = (
        rows.with_row_index("place")
        .select("place", entry=pl.concat_list("source_id", "sample_key", "image_sha256"))
        .explode("entry")
        .join(listed, on="entry", how="semi")
    )
    found = set(names["entry"])
    return Listed(
        names["place"].unique().sort().cast(pl.Int64).to_numpy(),
        tuple(entry for entry in entries if entry not in found),
    )


class Projections:
    """The rows of U_k of a pool, (n, k), computed once and kept in a temporary file as float32.

    A context manager; the file goes with it. Blocks have some megabytes.
    """

    def __init__(self, rows: PoolRows, frame: pl.DataFrame, subspace: "Subspace", *, unit_rows: bool) -> None:
        """Project all rows of ``frame``, which is ``rows.all()``."""
        from scalselect_assets.method.candidates import projected
        from scalselect_assets.method.preprocessing import prepared_rows

        self.n, self.k = frame.height, subspace.k
        self._file = TemporaryFile()  # noqa: SIM115 - closed by the context manager that this is
        self._block_rows = max(1, 2**22 // max(1, self.k))
        self._rows: NDArray[np.float32] = (
            np.memmap(self._file, np.float32, "w+", shape=(self.n, self.k))
            if self.n * self.k
            else np.zeros((self.n, self.k), np.float32)
        )
        start = 0
        for (shard,), part in frame.group_by("shard", maintain_order=True):
            numbers = part["row"].to_numpy()
            place = np.full(numbers.max() + 1, -1)
            place[numbers] = np.arange(part.height)
            for batch in rows.embeddings.read(rows.table(str(shard))):
                x = prepared_rows(batch.vector, to_unit_length=unit_rows)
                self._rows[start + place[batch.row]] = projected(x, subspace)
            start += part.height

    def __enter__(self) -> "Projections":
        return self

    def __exit__(self, *_: object) -> None:
        del self._rows
        self._file.close()

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All rows, in order."""
        for start in range(0, self.n, self._block_rows):
            yield np.asarray(self._rows[start : start + self._block_rows])

    def of(self, chosen: NDArray[np.int64], scale: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
        """Some rows, each coordinate times its ``scale``, (k,)."""
        for start in range(0, len(chosen), self._block_rows):
            yield np.asarray(self._rows[chosen[start : start + self._block_rows]], np.float64) * scale
