"""Record: a record folder parsed for the checks. Fault, Finding and Skip: their results."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from record_read import Run, is_record, read_manifest, record_runs, sources_of
from record_schema import Claim, Track, parse_track, read_claim

from train_gpt import UserError, read_env_file, require


class Fault(NamedTuple):
    """A problem found by a check: where, what, and how to fix it."""

    place: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """A fault with the name of the check or rule that found it."""

    check: str
    place: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Skip:
    """The reason why a check could not run."""

    why: str


@dataclass
class Record:
    folder: Path
    runs: list[Run]
    claim: Claim | None = None
    plain: dict = field(default_factory=dict)
    unreadable: str = ""

    @cached_property
    def ours(self) -> bool:
        return any(run.result for run in self.runs)

    @cached_property
    def results(self) -> list[dict]:
        return [run.result for run in self.runs if run.result]

    @cached_property
    def track(self) -> Track:
        named = [self.folder.parent.name, str((self.claim.raw if self.claim else {}).get("track", ""))]
        tracks = [parse_track(name) for name in named]
        return next((track for track in tracks if track.bytes or track.seconds), tracks[0])

    @cached_property
    def sources(self) -> dict[str, dict]:
        return sources_of(self.runs[0].result) if self.ours else {}

    @cached_property
    def config(self) -> dict[str, str]:
        path = self.folder / "config.env"
        try:
            return read_env_file(path) if path.exists() else {}
        except UserError as error:
            raise UserError(f"{error}: take the file that the run wrote") from error

    @cached_property
    def manifest(self) -> dict:
        """The data's manifest.json, which `record.py new` copies into the record."""
        return read_manifest(self.folder / "data_manifest.json")

    @cached_property
    def contradicted(self) -> bool:
        """True if a log and its result.json disagree. Values computed from them are then not checked."""
        return any(run.contradictions for run in self.runs)

    def log_of(self, run: Run) -> str:
        return run.log.path.relative_to(self.folder).as_posix() if run.log else run.name

    def scored(self) -> dict[int, Run]:
        """Return {seed: run} for the runs that have both a seed and a score."""
        return {run.seed: run for run in self.runs if run.seed is not None and run.val_bpb}


def open_record(folder: Path) -> Record:
    require(folder.is_dir(), f"{folder}: no such folder: give records/<track>/<date>_<slug>")
    record = Record(folder, record_runs(folder))
    if is_record(folder):
        try:
            record.claim, record.plain = read_claim(folder / "submission.json", record.ours)
        except UserError as error:
            record.unreadable = str(error)
    return record


def all_records(records: Path) -> list[Path]:
    """Return the record folders of all tracks."""
    wanted = "give a checkout of the repository, or its folder of records"
    require(records.is_dir(), f"there is no {records}: {wanted}")
    return sorted(path for path in records.glob("track_*/*") if path.is_dir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
