"""Schemas of submission.json, for records of this repository and for the public challenge's files with their varying
field names; and the limits encoded in a track's name."""

import datetime
import json
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from train_gpt import UserError, require

MEGABYTE = 10**6  # decimal: 16 MB is 16,000,000 bytes; 16 MiB would be 16,777,216
DATE = r"^\d{4}-\d{2}-\d{2}([T ].*)?$"
Text = Field(pattern=r"\S")
Positive = Field(gt=0, allow_inf_nan=False)


class SeedResult(BaseModel):
    val_loss: float = Positive
    val_bpb: float = Positive
    artifact_bytes: int = Positive
    steps: int = Positive
    step_avg_ms: float = Positive
    train_time_s: float = Positive
    eval_time_s: float = Positive


class Submission(BaseModel):
    """A record of this repository. `record.py new` computes every number. Additional fields are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)
    author: str = Text
    github_id: str = Text
    name: str = Text
    date: str = Field(pattern=DATE)
    track: str = Text
    blurb: str = Text
    val_loss: float = Positive
    val_bpb: float = Positive
    val_bpb_std: float | None = Field(ge=0, description="sample standard deviation; null for a single seed")
    bytes_total: int = Positive
    bytes_code: int = Positive
    seeds: list[int] = Field(min_length=1)
    seed_results: dict[str, SeedResult]
    hardware: str = Text
    pytorch_version: str = Text
    pre_quant_val_bpb: float = Positive
    step_stop: int = Positive
    wallclock_seconds: float = Positive
    eval_time_seconds: float = Positive
    base: str | None = Field(description="folder of the record that this one claims to beat, in the same track")


ALIASES = {  # all field names found in public folders, in order of preference
    "author": ("author", "authors", "submitter", "author_name", "team"),
    "github_id": ("github_id", "github", "github_username", "github_user", "github_handle", "submitter"),
    "name": "name title run_name submission_name record_name blurb notes description".split(),
    "date": ("date", "timestamp", "submission_date", "created_at"),
    "val_bpb": "val_bpb val_bpb_mean mean_val_bpb bpb final_val_bpb val_bpb_exact bpb_mean score".split(),
    "val_loss": ("val_loss", "val_loss_mean", "mean_val_loss", "final_val_loss"),
    "val_bpb_std": ("val_bpb_std", "std_val_bpb", "val_bpb_stdev", "val_bpb_std_dev", "bpb_std"),
    "bytes_total": (
        "bytes_total total_bytes bytes_total_max max_bytes_total artifact_bytes artifact_size_bytes "
        "total_submission_bytes artifact_bytes_max artifact_bytes_mean"
    ).split(),
    "bytes_code": ("bytes_code", "code_bytes", "code_size_bytes", "code_size"),
}
COMPARED = ("val_bpb", "val_loss", "val_bpb_std", "bytes_total", "bytes_code")  # numeric fields, checked if present


def alias(name: str, **rules):
    return Field(validation_alias=AliasChoices(*ALIASES[name]), **rules)


class PublicSubmission(BaseModel):
    """The core fields, accepted under any name found in public folders."""

    model_config = ConfigDict(extra="allow")
    author: str | list[str] = alias("author", min_length=1)
    github_id: str = alias("github_id", min_length=1, coerce_numbers_to_str=True)
    name: str = alias("name", min_length=1)
    date: str = alias("date", pattern=DATE)
    val_bpb: float = alias("val_bpb", gt=0, allow_inf_nan=False)


SEED_TABLES = ("seed_results", "per_seed", "results", "per_seed_results", "runs", "seeds_results")


@dataclass
class Claim:
    """The claims in submission.json, as Decimals that keep the digits as written."""

    raw: dict
    val_bpb: Decimal | None = None
    val_loss: Decimal | None = None
    val_bpb_std: Decimal | None = None
    bytes_total: Decimal | None = None
    bytes_code: Decimal | None = None
    seeds: dict[int, dict[str, Decimal]] = field(default_factory=dict)  # per-seed claims
    listed: list[int] = field(default_factory=list)


def number(value, from_text: bool = False) -> Decimal | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    text = from_text and isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value)
    value = Decimal(value) if whole or text else value
    return value if isinstance(value, Decimal) and value.is_finite() else None


def stated(row: dict, from_text: bool) -> dict[str, Decimal]:
    """Return {field: number} for a row, taking each field from the first of its names that holds a number."""
    found = {}
    for name in COMPARED:
        values = (number(row.get(choice), from_text) for choice in ALIASES[name])
        found[name] = next((value for value in values if value is not None), None)
    return {name: value for name, value in found.items() if value is not None}


def seed_claims(raw: dict, from_text: bool) -> dict[int, dict[str, Decimal]]:
    """Return {seed: {field: number}} from a table keyed by seed (1337, "seed_42") or a list of rows with a seed. A
    table's value may also be a bare score."""
    table = next((raw[name] for name in SEED_TABLES if isinstance(raw.get(name), dict | list)), {})
    listed = [] if isinstance(table, dict) else [row for row in table if isinstance(row, dict) and "seed" in row]
    rows = table.items() if isinstance(table, dict) else [(row["seed"], row) for row in listed]
    claims = {}
    for key, row in rows:
        match = re.fullmatch(r"(?:seed[_ -]?)?(\d+)", str(key))
        row = row if isinstance(row, dict) else {"val_bpb": row}
        if match:
            claims[int(match[1])] = stated(row, from_text)
    return claims


def read_claim(path: Path, ours: bool) -> tuple[Claim, dict]:
    """Return (numbers to compare, plain JSON to validate). In public files, numbers may also be strings."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw, plain = json.loads(text, parse_float=Decimal), json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: no JSON ({error})") from error
    require(isinstance(raw, dict), f"{path.name} holds a {type(raw).__name__}, expected an object")
    claim = Claim(raw, **stated(raw, from_text=not ours))
    claim.seeds = seed_claims(raw, from_text=not ours)
    listed = raw.get("seeds")
    claim.listed = [seed for seed in listed if isinstance(seed, int)] if isinstance(listed, list) else []
    return claim, plain


def schema_errors(plain: dict, ours: bool) -> list[tuple[str, str]]:
    """Return (field, problem) pairs."""
    try:
        (Submission if ours else PublicSubmission).model_validate(plain)
    except ValidationError as error:
        problems = []
        for found in error.errors():
            problem = "missing" if found["type"] == "missing" else f"{found['msg']}, found {found['input']!r:.60}"
            problems.append((".".join(map(str, found["loc"])), problem))
        return problems
    try:
        datetime.date.fromisoformat(str(plain.get("date") or plain.get("timestamp") or "2000-01-01")[:10])
    except ValueError as error:
        return [("date", f"{error}, found {plain.get('date')!r}")]
    return []


@dataclass(frozen=True)
class Track:
    """Limits encoded in a track's name: track_10min_16mb means 600 s each for training and evaluation, and 16,000,000
    bytes. A limit missing from the name does not apply."""

    name: str
    seconds: float | None
    bytes: int | None


def parse_track(name: str) -> Track:
    clock = re.search(r"(?:^|_)(\d+)(s|min|h)(?:_|$)", name)
    size = re.search(r"(?:^|_)(\d+)mb(?:_|$)", name)
    units = {"s": 1, "min": 60, "h": 3600}
    return Track(name, clock and int(clock[1]) * units[clock[2]], size and int(size[1]) * MEGABYTE)
