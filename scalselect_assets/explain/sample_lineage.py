"""From one sample back to everything that it came from, and to the runs that made it.

`trace` finds a sample by its key, its id or its place, and follows the versions that the artifacts' own
headers state: shard file, images, rows, table and model, moments, basis, scores, choice and dataset. Each
step names the Dagster run that recorded exactly that version, and where the UI shows it; where the instance
knows of none, it says so. Where two steps do not fit each other, the trace says which, and what mends it.
Reads only. Costs: four columns of every shard's rows, one shard's table without its vectors, and a query per
asset.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from json import loads
from typing import Any
from urllib.parse import quote

import dagster as dg
import polars as pl

from scalselect_assets.asset_path import ShardAsset, StoreState, path_of
from scalselect_assets.choice import selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.explain.sample_search import SamplePlace, find_sample, last_shards, remedy
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.records import MadeBy, Records
from scalselect_assets.resources.artifacts import (
    ARRAYS,
    FRAME,
    RECORD,
    ArtifactCorruptError,
    ArtifactMissingError,
)
from scalselect_assets.resources.embedding_store import EmbeddingTableError
from scalselect_assets.resources.forms.embedded import address_of
from scalselect_assets.resources.sample_source import ShardIndex
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import CARDS, VlmResource
from scalselect_assets.subspace import embedding_moments, importance_scores, subspace_basis


@dataclass(frozen=True, slots=True)
class Step:
    """One asset on the way.

    Attributes:
        asset: Its name.
        data_version: The version that its output states; none where no output can be read.
        facts: Facts about it, by name.
        made_by: The run that recorded this version, if the instance knows one.
        ui: Path of the asset's page, at the shard's partition.
    """

    asset: str
    data_version: str | None
    facts: Mapping[str, Any]
    made_by: MadeBy | None
    ui: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "data_version": self.data_version,
            **self.facts,
            "made_by": self.made_by and self.made_by.to_json(),
            "ui": self.ui,
        }


@dataclass(frozen=True, slots=True)
class SampleLineage:
    """A sample and its way.

    Attributes:
        sample: Key, id, shard, row, line, and what has become of it.
        shard_file: Path and SHA-256 of the file that it stands in, and where the UI shows it.
        images: Path and SHA-256 of each of its images.
        steps: The assets on its way, in path order; of a rejected sample, up to the one that rejected it.
        problems: Contradictions between the steps, each with its remedy; empty if all is well.
    """

    sample: Mapping[str, Any]
    shard_file: Mapping[str, Any]
    images: tuple[Mapping[str, Any], ...]
    steps: tuple[Step, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the steps by asset."""
        return {
            "sample": dict(self.sample),
            "shard_file": dict(self.shard_file),
            "images": [dict(image) for image in self.images],
            **{step.asset: step.to_json() for step in self.steps},
            "problems": list(self.problems),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and value of each line to print; facts of a step stand indented below its version."""
        yield from _lines_of(self.sample)
        yield "", ""
        yield "shard file", str(self.shard_file["path"])
        yield from _lines_of({"sha256": self.shard_file["sha256"], "shown_at": self.shard_file["ui"]}, "  ")
        for image in self.images:
            yield "image", str(image["path"])
            yield from _lines_of({"sha256": image["sha256"]}, "  ")
        for step in self.steps:
            yield "", ""
            yield step.asset, step.data_version or "-"
            yield from _lines_of(step.facts, "  ")
            if step.made_by is None:
                yield "  made by", "no run recorded"
            else:
                job = step.made_by.job or "of a job that is no longer known"
                yield "  made by", f"{job}, {step.made_by.at:%Y-%m-%d %H:%M:%S} UTC"
                yield "  run", f"/runs/{step.made_by.run_id}"
            yield "  shown at", step.ui


def _lines_of(facts: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        yield f"{indent}{name.replace('_', ' ')}", "-" if value is None else str(value)


def trace(
    selection: Selection, storage: StorageResource, instance: dg.DagsterInstance, key: str
) -> SampleLineage:
    """Follow one sample.

    Args:
        selection: The selection that the sample belongs to.
        storage: Opens pool and store.
        instance: The instance that records the store's runs.
        key: A sample key or a prefix of one, from 6 characters on; a row's own id, verbatim; or
            ``<shard>#<row>``, which tells samples apart that have the same key or id.

    Raises:
        SampleKeyError: No sample goes by it, or several do.
    """
    return _Trace(selection, storage, instance).of(key)


def _no_fingerprint() -> str:
    raise RuntimeError("a sample is followed by what outputs state, without the target model")


class _Trace:
    """Follows one sample, and collects steps and problems on the way."""

    def __init__(self, selection: Selection, storage: StorageResource, instance: dg.DagsterInstance) -> None:
        self._selection, self._storage, self._records = selection, storage, Records(instance)
        self._artifacts = storage.artifacts(selection.store)
        self._embeddings = storage.embeddings(selection.store)
        self._source = selection.open_pool(storage)
        self._remedy = remedy(selection)
        self._steps: list[Step] = []
        self._problems: list[str] = []

    def of(self, key: str) -> SampleLineage:
        """The lineage of the one sample that goes by ``key``."""
        # Those in the pool, and those that the last results are of.
        known = set(self._records.known_shards(self._selection.name))
        shards = known | last_shards(self._artifacts)
        place = find_sample(self._selection, self._artifacts, shards, key)
        raw, header = self._artifacts.read_frame(raw_samples.NAME, place.shard)
        row = raw.row(by_predicate=pl.col("row") == place.row, named=True)
        shard_file = self._shard_file(place.shard, header)
        file = self._artifacts.path(raw_samples.NAME, place.shard, suffix=FRAME)
        self._add(raw_samples.NAME, header, place.shard, file=str(file))
        vector = self._embedding(place, header)
        if vector is not None:
            images = self._images(vector["images"], vector["image_sha256"])
        else:
            images = self._images(row["images"], map(self._sha256_now, row["images"]))
        sample = {**place.to_json(), **(self._rejection(place, row) or self._choice(place))}
        return SampleLineage(sample, shard_file, images, tuple(self._steps), tuple(self._problems))

    # The pool

    def _shard_file(self, shard: str, raw: Mapping[str, str]) -> dict[str, Any]:
        """The file as discovery remembers it, compared with what the rows were read from."""
        facts: dict[str, Any] = {
            "path": f"{self._selection.source}/{shard}",
            "sha256": None,
            "ui": self._page("shard_files", shard),
        }
        try:
            index = ShardIndex.from_json(self._artifacts.read_json(raw_samples.SHARD_INDEX, shard))
        except (ArtifactMissingError, ArtifactCorruptError, ValueError):
            self._problems.append(f"what the shard file held is not remembered; {self._remedy}")
            return facts
        facts["sha256"] = index.sha256
        try:
            facts["path"] = str(self._source.shard_path(shard))
            same = self._source.is_current(shard, index) and raw["provenance"] == raw_samples.provenance(
                self._selection, self._source.shard_fingerprint(shard, index)
            )
        except FileNotFoundError as error:
            self._problems.append(f"the shard file or its images are gone ({error}); {self._remedy}")
        else:
            if not same:
                self._problems.append(
                    f"the shard file or one of its images has changed since it was read; {self._remedy}"
                )
        return facts

    def _images(self, paths: Iterable[str], digests: Iterable[str | None]) -> tuple[dict[str, Any], ...]:
        try:
            images, shards = f"{self._source.images_folder()}/", f"{self._source.shards_folder()}/"
        except FileNotFoundError:  # said of the shard file already
            images = shards = ""
        return tuple(
            {"path": f"{shards if address_of(path) else images}{path}", "sha256": sha256}
            for path, sha256 in zip(paths, digests, strict=True)
        )

    def _sha256_now(self, path: str) -> str | None:
        """The hash of a rejected sample's image, which no file of the store has; None if it is unreadable."""
        try:
            return hashlib.sha256(self._source.open_image(path)).hexdigest()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            return None

    # The way

    def _embedding(self, place: SamplePlace, raw: Mapping[str, str]) -> dict[str, Any] | None:
        """The sample's row in its shard's table, if it has one."""
        name = f"{receipts.NAME}[{place.shard}]"
        with self._problems_reported():
            table, header = receipts.recorded_table(self._artifacts, place.shard)
            self._compare(name, raw_samples.NAME, header["raw_samples"], raw["data_version"])
            facts = {
                "table": str(self._embeddings.location(table)),
                "table_version": table.version,
                "content_sha256": table.content_sha256,
                **self._model(table.fingerprint),
            }
            self._add(receipts.NAME, header, place.shard, **facts)
            rows = pl.DataFrame(
                self._embeddings.read_rows(table, ["sample_key", "images", "image_sha256"])
            ).filter(pl.col("sample_key") == place.sample_key)
            return rows.row(0, named=True) if rows.height else None
        return None

    def _model(self, fingerprint: str) -> dict[str, Any]:
        """The store's facts about a model."""
        facts = {"model_fingerprint": fingerprint, "model": None, "model_commit": None}
        for path in self._artifacts.paths(CARDS, suffix=RECORD):
            with suppress(ValueError, KeyError, TypeError):  # a damaged card says nothing of this model
                card = loads(path.read_bytes())
                if card["fingerprint"] == fingerprint:
                    facts.update(model=card["model"], model_commit=card["commit"])
        return facts

    def _rejection(self, place: SamplePlace, raw: Mapping[str, Any]) -> dict[str, Any] | None:
        """Why the sample was rejected, on reading or by the model; none if it was not."""
        fate = {"state": "rejected", "reason": raw["reason"], "detail": raw["detail"]}
        if raw["reason"] is None:
            with self._problems_reported():
                rejected, _ = self._artifacts.read_frame(receipts.REJECTED, place.shard)
                found = rejected.filter(pl.col("sample_key") == place.sample_key)
                if found.height:
                    fate.update(found.select("reason", "detail").row(0, named=True))
        if fate["reason"] is None:
            return None
        if fate["reason"] == RejectionReason.TEXT_ONLY and self._selection.text_only == "keep":
            self._dataset(self._header(subspace_basis.NAME, suffix=ARRAYS))
        return fate

    def _choice(self, place: SamplePlace) -> dict[str, Any]:
        """The outcome of a sample with a vector, from the basis on."""
        moments = self._moments(place.shard)
        basis = self._basis(place.shard, moments)
        scored = self._scores(place, basis)
        rank = self._subset(place, basis)
        self._dataset(basis)
        self._others(place.shard)
        if not scored and not self._problems:
            self._problems.append(f"the sample has no score; {self._remedy}")
        if rank is not None:
            return {"state": "selected", "rank": rank}
        return {"state": "not selected" if scored else "not scored"}

    def _moments(self, shard: str) -> Mapping[str, str]:
        header = self._header(embedding_moments.NAME, shard, suffix=ARRAYS)
        with self._problems_reported():
            _, embedded = receipts.recorded_table(self._artifacts, shard)
            self._compare(
                f"{embedding_moments.NAME}[{shard}]",
                receipts.NAME,
                header.get("attention_embeddings"),
                embedded["data_version"],
            )
        self._add(embedding_moments.NAME, header, shard)
        return header

    def _basis(self, shard: str, moments: Mapping[str, str]) -> Mapping[str, str]:
        with self._problems_reported():
            subspace, header = subspace_basis.read_basis(self._artifacts)
            held = header.shards.get(shard)
            if held is None:
                self._problems.append(
                    f"{subspace_basis.NAME} was made without this shard: either it is newer, or it could not "
                    f"be embedded with the present model, which the refresh reports; {self._remedy}"
                )
            else:
                self._compare(
                    subspace_basis.NAME,
                    f"{embedding_moments.NAME}[{shard}]",
                    held.data_version,
                    moments.get("data_version"),
                )
            self._add(
                subspace_basis.NAME,
                header.model_dump(include={"data_version"}),
                rank=subspace.k,
                energy=subspace.energy,
                samples=subspace.n,
                drift=header.drift.get("score_change"),
            )
            return header.model_dump(include={"data_version"})
        return {}

    def _scores(self, place: SamplePlace, basis: Mapping[str, str]) -> bool:
        """Whether the sample has a score."""
        with self._problems_reported():
            scores, header = self._artifacts.read_frame(importance_scores.NAME, place.shard)
            if basis:
                self._compare(
                    f"{importance_scores.NAME}[{place.shard}]",
                    subspace_basis.NAME,
                    header["subspace_basis"],
                    basis["data_version"],
                )
            found = scores.filter(pl.col("sample_key") == place.sample_key)
            score = found.row(0, named=True) if found.height else {}
            facts = {name: score.get(name) for name in ("leverage", "normalised_leverage")}
            self._add(
                importance_scores.NAME, header, place.shard, **facts, scored_with=header["subspace_basis"]
            )
            return bool(score)
        return False

    def _subset(self, place: SamplePlace, basis: Mapping[str, str]) -> int | None:
        """The sample's rank among the selected."""
        with self._problems_reported():
            subset, header = self._artifacts.read_frame(selected_subset.NAME)
            self._compare(
                selected_subset.NAME,
                subspace_basis.NAME,
                header["subspace_basis"],
                basis.get("data_version"),
            )
            found = subset.filter(
                (pl.col("sample_key") == place.sample_key) & (pl.col("shard") == place.shard)
            )
            rank = int(found["rank"][0]) if found.height else None
            lowest = subset["normalised_leverage"].min()
            self._add(
                selected_subset.NAME,
                header,
                rank=rank,
                selected=subset.height,
                lowest_normalised_leverage=lowest,
                file=str(self._artifacts.path(selected_subset.NAME, suffix=FRAME)),
            )
            return rank
        return None

    def _dataset(self, basis: Mapping[str, str]) -> None:
        with self._problems_reported():
            manifest = training_manifest.read_manifest(self._artifacts)
            file = manifest["training_file"]
            self._compare(
                training_manifest.NAME,
                subspace_basis.NAME,
                manifest["basis_version"],
                basis.get("data_version"),
            )
            if not training_manifest.is_complete(self._artifacts):
                self._problems.append(
                    f"{training_manifest.NAME}: {file} is not there as the manifest says; {self._remedy}"
                )
            self._add(
                training_manifest.NAME,
                manifest,
                file=str(self._artifacts.root / training_manifest.NAME / file),
                sha256=manifest["files"][file]["sha256"],
                manifest=str(
                    self._artifacts.path(training_manifest.NAME, training_manifest.MANIFEST, suffix=RECORD)
                ),
            )

    def _others(self, shard: str) -> None:
        """The assets of the path that have nothing to add about one sample but their version."""
        state = StoreState(self._selection, self._storage, VlmResource(), _no_fingerprint)
        names = [asset.name for asset in path_of(self._selection)]
        seen = {step.asset for step in self._steps}
        for asset in path_of(self._selection):
            if asset.name not in seen:
                place = shard if isinstance(asset, ShardAsset) else None
                if header := state.header(asset, place):
                    self._add(asset.name, header, place)
        self._steps.sort(key=lambda step: names.index(step.asset))

    # What is collected

    def _add(self, asset: str, header: Mapping[str, str], shard: str | None = None, **facts: Any) -> None:
        version = header.get("data_version")
        made = version and self._records.made_by(self._selection.key(asset), shard, version)
        self._steps.append(Step(asset, version, facts, made or None, self._page(asset, shard)))

    def _compare(self, what: str, of: str, stated: str | None, now: str | None) -> None:
        if stated != now and None not in {stated, now}:
            self._problems.append(
                f"{what} was made from version {stated} of {of}, which is now {now}; {self._remedy}"
            )

    def _header(self, asset: str, shard: str | None = None, *, suffix: str) -> Mapping[str, str]:
        with self._problems_reported():
            return self._artifacts.read_header(asset, shard, suffix=suffix)
        return {}

    @contextmanager
    def _problems_reported(self) -> Iterator[None]:
        """Report what is missing or cannot be read as a problem, and go on."""
        try:
            yield
        except (ArtifactMissingError, ArtifactCorruptError) as error:
            self._problems.append(f"{error}; {self._remedy}")
        except EmbeddingTableError as error:
            # A table that is there and damaged is not seen until it is read; without its receipt, it is.
            receipt = self._artifacts.path(receipts.NAME, error.shard, suffix=RECORD)
            self._problems.append(f"{error}: where its receipt {receipt} is deleted, {self._remedy}")

    def _page(self, asset: str, shard: str | None) -> str:
        """The path of an asset's page in the UI, at a shard's partition."""
        page = "/".join(["/assets", *map(quote, self._selection.key(asset).path)])
        return page if shard is None else f"{page}?partition={quote(shard, safe='')}"
