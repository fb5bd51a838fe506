"""A record folder as the checks see it, and what a check answers with."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from record_read import Run, UserError, read_env, read_manifest, record_runs, sources_of
from record_schema import Claim, Track, parse_track, read_claim


@dataclass(frozen=True)
class Finding:
    check: str
    place: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Skip:
    """What a check could not judge, and why."""

    why: str


@dataclass
class Record:
    """A record folder as the checks see it."""

    folder: Path
    runs: list[Run]
    claim: Claim | None = None
    plain: dict = field(default_factory=dict)
    unreadable: str = ""

    @cached_property
    def ours(self) -> bool:
        return any(run.result for run in self.runs)

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
        return read_env(path) if path.exists() else {}

    @cached_property
    def manifest(self) -> dict:
        """The data's manifest.json, which `record.py new` copies into the record."""
        return read_manifest(self.folder / "data_manifest.json")

    @cached_property
    def contradicted(self) -> bool:
        """Whether a log and its result.json differ: then what would be computed from them is not judged further."""
        return any(run.contradictions for run in self.runs)

    def log_of(self, run: Run) -> str:
        return run.log.path.relative_to(self.folder).as_posix() if run.log else run.name

    def scored(self) -> dict[int, Run]:
        """{seed: run} of the runs that have a score and a seed."""
        return {run.seed: run for run in self.runs if run.seed is not None and run.val_bpb}


def open_record(folder: Path) -> Record:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give records/<track>/<date>_<slug>")
    record = Record(folder, record_runs(folder))
    path = folder / "submission.json"
    if path.is_file():
        try:
            record.claim, record.plain = read_claim(path, record.ours)
        except UserError as error:
            record.unreadable = str(error)
    return record


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
