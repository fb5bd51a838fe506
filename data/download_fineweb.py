"""Download the published FineWeb shards of the parameter-golf challenge and their tokenizer, proved file by file.

    python data/download_fineweb.py                       # sp1024: 80 training shards, all of validation, tokenizer
    python data/download_fineweb.py --train-shards 1      # enough for a first run
    python data/download_fineweb.py --variant byte260     # another tokenizer's shards
    MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/download_fineweb.py --variant sp8192

The repository's listing states size and hash of every file. A file here counts only if it has both, whenever it came;
what is missing arrives beside its place as NAME.<hash>.part, and takes its name once it is proved. So a run may end at
any moment: the next one goes on from there. data/README.md describes options, layout and errors.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

try:
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: of whichever HTTP library it is built on
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import (
        WeakFileLock,
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
        http_stream_backoff,
        tqdm,
        validate_repo_id,
    )
except ImportError as error:
    print(f"error: huggingface-hub 1.0 or later is needed ({error}): pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
except ValueError as error:  # it reads the environment when it is imported
    print(f"error: huggingface-hub cannot read its variables ({error}): check HF_ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT and "
          "others that begin with HF_", file=sys.stderr)  # fmt: skip
    sys.exit(2)

DATA_ROOT = Path(__file__).resolve().parent
REPO_ID, PREFIX = "willdepueoai/parameter-golf", "datasets"
SP8192_REPO_ID = "kevclark/parameter-golf"
DEFAULT_DATASET = "fineweb10B_sp1024"  # which the trainer's defaults point to
DOCS = "docs_selected.jsonl"

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
SHARD_NAME = re.compile(r"fineweb_(train|val)_\d+\.bin")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # one part of a path: never "..", absolute, a drive or hidden
DIGESTS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git-sha1": re.compile(r"[0-9a-f]{40}")}
RETRIES = 5  # attempts in a row that may bring nothing


class UserError(ValueError):
    """Something that the user can mend: shown as one message, exit code 2."""


class Unreachable(Exception):
    """The hub did not answer, or not now; what is here may still be proved by the record of an earlier run."""


def require(ok, message: str):
    if not ok:
        raise UserError(message)


# ----------------------------------------------------------------------------------------------------------------------
# What the repository has: its listing at one commit, the manifest in it, and the record of both for a run offline
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it. `digest` is the sha256 of its bytes, or, for a file that git itself keeps, the
    sha1 of its git blob: of "blob <size>", a zero byte, and the bytes."""

    path: str
    size: int
    algorithm: str
    digest: str

    def __post_init__(self):
        sound = isinstance(self.path, str) and type(self.size) is int and self.size >= 0
        pattern = DIGESTS.get(self.algorithm)
        require(sound and pattern and isinstance(self.digest, str) and pattern.fullmatch(self.digest),
                f"the hub's listing says {self.path!r} has size {self.size!r} and {self.algorithm} {self.digest!r}, "
                "expected bytes and a hash in hex: check HF_ENDPOINT")  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The files under the prefix at one commit, by path relative to the prefix, and the manifest among them."""

    commit: str
    files: dict[str, Remote]
    manifest: dict


class Hub:
    """The repository, as the environment names it; every request of this script is made here."""

    def __init__(self):
        self.repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPO_ID
        self.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", PREFIX).strip("/")
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self.host = self.endpoint or constants.ENDPOINT
        try:
            validate_repo_id(self.repo_id)
        except ValueError:
            raise UserError(f"MATCHED_FINEWEB_REPO_ID={self.repo_id!r} is no repository: expected owner/name") from None
        require(all(map(SAFE_NAME.fullmatch, self.prefix.split("/"))) or not self.prefix,
                f"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX={self.prefix!r}: expected a folder such as {PREFIX}, or nothing "
                "for the repository's root")  # fmt: skip
        require(re.match(r"https?://[^/]", self.host),
                f"HF_ENDPOINT={self.host!r}: expected an address such as https://huggingface.co")
        self.headers = {}

    def explain(self, error: Exception, path: str | None = None) -> Exception:
        """The error of a request as one that says what to do: Unreachable where trying later may help."""
        what = f"{self.host}, asked for {path or self.repo_id}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            return UserError(
                f"{what}: status {status}: the repository is private or gated, or there is none of that name: check "
                f"MATCHED_FINEWEB_REPO_ID={self.repo_id}; for a private or gated one accept its terms on its page and "
                "set HF_TOKEN to a token that may read it (and unset one that has expired)"
            )
        if status == 404:
            return UserError(
                f"{what}: status 404: there is no such data set repository or file: check MATCHED_FINEWEB_REPO_ID="
                f"{self.repo_id} and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX={self.prefix}"
            )
        if status is not None and status < 500 and status not in (408, 429):
            return UserError(f"{what}: status {status}: {first_line(error)}; check HF_ENDPOINT")
        return Unreachable(f"{self.host} cannot be reached ({first_line(error)})")

    def fetch_listing(self) -> Listing:
        """Three requests: the commit, the tree under the prefix at it (one more per 1,000 files), the manifest."""
        api = HfApi(endpoint=self.endpoint)
        files = {}
        try:
            self.headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # sizes and ranges are of the file
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            commit = api.repo_info(self.repo_id, repo_type="dataset", timeout=timeout).sha
            require(isinstance(commit, str) and DIGESTS["git-sha1"].fullmatch(commit),
                    f"{self.host} names {commit!r} as the commit of {self.repo_id}: it is no hub, check HF_ENDPOINT")
            start = f"{self.prefix}/" if self.prefix else ""
            tree = api.list_repo_tree(
                self.repo_id, self.prefix or None, recursive=True, revision=commit, repo_type="dataset"
            )
            for entry in tree:
                if isinstance(entry, RepoFile) and entry.path.startswith(start):
                    stated = ("sha256", entry.lfs.sha256) if entry.lfs else ("git-sha1", entry.blob_id)
                    size = entry.lfs.size if entry.lfs else entry.size
                    files[entry.path.removeprefix(start)] = Remote(entry.path, size, *stated)
            require("manifest.json" in files, f"{self.repo_id} has no {start}manifest.json: check "
                    f"MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX={self.prefix}")  # fmt: skip
            remote = files["manifest.json"]
            response = http_backoff("GET", self.url(remote, commit), headers=self.headers, timeout=timeout)
            hf_raise_for_status(response)
        except UserError:
            raise
        except (HTTPError, OSError) as error:
            raise self.explain(error) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape, or none at all
            raise UserError(f"{self.host} does not answer as a hub does ({first_line(error)}): check HF_ENDPOINT, and "
                            "that no log-in page of the network stands between") from error  # fmt: skip
        digest = hash_content(io.BytesIO(response.content), remote.algorithm, len(response.content))
        require(digest == remote.digest, f"{remote.path} arrived with {remote.algorithm} {digest}, expected "
                f"{remote.digest}: start the command again")  # fmt: skip
        return Listing(commit, files, parse_manifest(response.content, remote.path))

    def url(self, remote: Remote, commit: str) -> str:
        return hf_hub_url(self.repo_id, remote.path, repo_type="dataset", revision=commit, endpoint=self.endpoint)

    def append(self, remote: Remote, commit: str, part: Path, progress: "Progress"):
        """One request for what `part` lacks of `remote`, written as it comes. Errors of the network are raised as such.

        Through plain HTTP, though the library has faster means: its own download begins a file anew after a restart,
        and Xet's servers are others than HF_ENDPOINT.
        """
        with open(part, "ab") as file:
            have = file.tell()
            headers = self.headers | ({"Range": f"bytes={have}-"} if have else {})
            with http_stream_backoff(
                "GET", self.url(remote, commit), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_exceptions=(),  # it could not go on in the middle of a file; the caller can
            ) as response:  # fmt: skip
                hf_raise_for_status(response)
                if have and response.status_code != 206:  # no ranges here: the file comes from its start
                    file.truncate(0)
                    progress.add(-have)
                    have = 0
                for chunk in response.iter_bytes():
                    have += len(chunk)
                    require(have <= remote.size, f"{remote.path}: the server sends more than its {remote.size} bytes: "
                            "start the command again, or check HF_ENDPOINT")  # fmt: skip
                    file.write(chunk)
                    progress.add(len(chunk))


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def parse_manifest(data: bytes, path: str) -> dict:
    """The manifest: an object with lists `datasets` and `tokenizers` of objects that have a text `name`; or UserError.
    What an entry says beyond its name is checked where it is used."""
    try:
        manifest = json.loads(data)
        entries = manifest["datasets"] + manifest["tokenizers"]
        sound = all(isinstance(entry["name"], str) for entry in entries) and isinstance(entries, list)
    except (ValueError, TypeError, LookupError, RecursionError):
        sound = False
    require(sound, f"{path} is not the manifest of such data: expected an object with lists `datasets` and "
            "`tokenizers` of named objects; check MATCHED_FINEWEB_REPO_ID")  # fmt: skip
    return manifest


def write_record(path: Path, listing: Listing):
    """Keep the hub's word, so that a later run can prove the files without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"format": 1} | asdict(listing), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path) -> Listing | None:
    """The listing of an earlier run, or None if there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {name: Remote(**fields) for name, fields in record["files"].items()}
        manifest = parse_manifest(json.dumps(record["manifest"]).encode(), str(path))
        return Listing(record["commit"], files, manifest) if record["format"] == 1 else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted of it, and where it goes
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    remote: Remote
    target: Path


def find_dataset(manifest: dict, variant: str, repo_id: str) -> dict:
    """The manifest's entry of that name, or of fineweb10B_<variant>."""
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    name = variant if variant in datasets else f"fineweb10B_{variant}"
    hint = ""
    if name == "fineweb10B_sp8192" and repo_id != SP8192_REPO_ID:
        hint = f"; sp8192 is published by {SP8192_REPO_ID}: set MATCHED_FINEWEB_REPO_ID={SP8192_REPO_ID}"
    has = ", ".join(sorted(name if SAFE_NAME.fullmatch(name) else repr(name) for name in datasets)) or "no data set"
    require(name in datasets, f"--variant {variant}: {repo_id} has {has}{hint}")
    require(SAFE_NAME.fullmatch(name), f"the manifest names a data set {name!r}, which may lead to another folder: "
            "refused; check MATCHED_FINEWEB_REPO_ID")  # fmt: skip
    return datasets[name]


def count_shards(dataset: dict) -> dict[str, int]:
    """Split -> number of published shards, from the entry's `stats`."""
    stats = dataset.get("stats")
    counts = {split: stats.get(f"files_{split}") if isinstance(stats, dict) else None for split in ("train", "val")}
    for split, count in counts.items():
        require(type(count) is int and 0 <= count <= 999_999 and (count or split == "train"),
                f"the manifest says stats.files_{split} of {dataset['name']} is {count!r}, expected a number of "
                "shards: check MATCHED_FINEWEB_REPO_ID")  # fmt: skip
    return counts


def tokenizer_files(manifest: dict, dataset: dict, files: dict[str, Remote]) -> list[Remote]:
    """The files of the data set's tokenizer, the one that the trainer reads first."""
    name = dataset.get("tokenizer_name")
    entry = next((entry for entry in manifest["tokenizers"] if entry["name"] == name), None)
    require(entry is not None, f"the manifest gives {dataset['name']} the tokenizer {name!r}, but lists none of that "
            "name: check MATCHED_FINEWEB_REPO_ID")  # fmt: skip
    stated = {key: entry[key] for key in ("model_path", "path", "vocab_path") if entry.get(key)}
    require(stated.keys() - {"vocab_path"}, f"the manifest gives no model_path and no path for the tokenizer {name!r}")
    found = []
    for key, path in stated.items():
        require(isinstance(path, str) and all(map(SAFE_NAME.fullmatch, path.split("/"))),
                f"the manifest says that tokenizer {name!r} is at {path!r}, expected a path below the prefix: refused; "
                "check MATCHED_FINEWEB_REPO_ID")  # fmt: skip
        remote = files.get(path) or files.get(f"tokenizers/{path}")
        if remote is None and key == "vocab_path":  # the pieces once more, as text: no tool here needs it
            print(f"note: the repository lacks {path}, which its manifest names; going on without")
            continue
        require(remote, f"the manifest says that tokenizer {name!r} is at {path}, but the repository has no such file")
        found.append(remote)
    return found


def plan(listing: Listing, hub: Hub, args: argparse.Namespace) -> tuple[list[Wanted], str]:
    """Every file that the arguments ask for, and a line that says what was chosen."""
    dataset = find_dataset(listing.manifest, args.variant, hub.repo_id)
    name, counts = dataset["name"], count_shards(dataset)
    train = min(args.train_shards, counts["train"])
    chosen = f"{name}: {train} of {counts['train']} training shards, all {counts['val']} of validation"
    if train < args.train_shards:
        chosen += f" (--train-shards {args.train_shards} is more than there are)"

    wanted = []
    for split, count in {"val": counts["val"], "train": train}.items():
        for number in range(count):
            file = f"datasets/{name}/fineweb_{split}_{number:06d}.bin"
            remedy = f": --train-shards {number} asks for those before it" if split == "train" else ""
            require(file in listing.files, f"the manifest of {hub.repo_id} counts {counts[split]} {split} shards, but "
                    f"the repository has no {file}{remedy}")  # fmt: skip
            wanted.append(Wanted(listing.files[file], args.out / file))
    for remote in tokenizer_files(listing.manifest, dataset, listing.files):
        wanted.append(Wanted(remote, args.out / "tokenizers" / Path(remote.path).name))
    if args.with_docs:
        docs = [file for file in listing.files if "/" not in file and file.startswith("docs_selected.")]
        require(DOCS in docs, f"--with-docs: {hub.repo_id} has no {DOCS} beside its manifest; leave the option out")
        safe = [file for file in docs if SAFE_NAME.fullmatch(file)]
        wanted += [Wanted(listing.files[file], args.out / "downloads" / file) for file in sorted(safe)]
    wanted = list(dict.fromkeys(wanted))
    twice = [str(target) for target, count in Counter(item.target for item in wanted).items() if count > 1]
    require(not twice, f"the manifest of {hub.repo_id} has two files for {', '.join(twice)}: refused")
    return wanted, chosen


# ----------------------------------------------------------------------------------------------------------------------
# Proof: size, hash and header
# ----------------------------------------------------------------------------------------------------------------------


def hash_content(file: io.BufferedIOBase, algorithm: str, size: int) -> str:
    """The hash of an open file of `size` bytes as the hub states it, in hex."""
    if algorithm == "git-sha1":
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)).hexdigest()
    return hashlib.file_digest(file, algorithm).hexdigest()


def find_fault(path: Path, remote: Remote) -> str | None:
    """What is wrong with the file at `path`, which should be `remote`; None if it is whole."""
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    if size != remote.size:
        return f"has {size} bytes, expected {remote.size}"
    with open(path, "rb") as file:
        digest = hash_content(file, remote.algorithm, size)
    if digest != remote.digest:
        return f"has {remote.algorithm} {digest}, expected {remote.digest}"
    return None


def find_header_fault(path: Path) -> str | None:
    """What keeps the trainer from reading the file at `path` as a shard: int32 magic, version, token count, zeros up
    to 1,024 bytes, then as many uint16 tokens."""
    size = path.stat().st_size
    if size < SHARD_HEADER_BYTES:
        return f"has {size} bytes, less than a header"
    with open(path, "rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12))
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        return f"has magic {magic} version {version}, expected {SHARD_MAGIC} version {SHARD_VERSION}"
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        return f"has {size} bytes, but states {count} tokens, which take {SHARD_HEADER_BYTES + 2 * count}"
    return None


def find_strangers(wanted: list[Wanted], listing: Listing, out: Path) -> list[Wanted]:
    """Shards beside the wanted ones, which the trainer would read as well; one that the repository lacks is refused."""
    targets = {item.target for item in wanted}
    found = []
    for folder in {target.parent for target in targets if SHARD_NAME.fullmatch(target.name)}:
        beside = [path for path in folder.glob("fineweb_*.bin") if SHARD_NAME.fullmatch(path.name)]
        for path in sorted(set(beside) - targets):
            remote = listing.files.get(path.relative_to(out).as_posix())
            require(remote, f"{path} is no shard of the repository, and the trainer would read it as part of the data: "
                    "delete it or move it away")  # fmt: skip
            found.append(Wanted(remote, path))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Transfer
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """One bar over all bytes, for all workers; where standard error is no terminal, a line per file instead."""

    def __init__(self, description: str, total: int):
        self.bar = tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=None)
        self.lock = threading.Lock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, count: int):
        with self.lock:
            self.bar.update(count)

    def say(self, line: str):
        with self.lock:  # a line and its end are written one after the other
            if self.bar.disable:
                print(line, flush=True)


def in_parallel(function: Callable, items: list, workers: int) -> Iterable:
    """Yields `function(item)` in the order of completion. The threads are daemons and the wait for them has a time
    limit, so that neither an error nor Ctrl+C (on Windows too) has to wait for a server that has gone silent."""
    if not items:
        return
    with ThreadPool(min(workers, len(items))) as pool:
        results = pool.imap_unordered(function, items)
        for _ in items:
            while True:
                try:
                    yield results.next(timeout=0.5)
                    break
                except multiprocessing.TimeoutError:
                    pass


def find_faults(items: list[Wanted], workers: int) -> dict[Wanted, str | None]:
    """Hash every file that is here; what is wrong with each of `items`."""
    with Progress("checking", sum(item.target.stat().st_size for item in items if item.target.exists())) as progress:

        def check(item: Wanted) -> tuple[Wanted, str | None]:
            fault = find_fault(item.target, item.remote)
            progress.add(item.target.stat().st_size if item.target.exists() else 0)
            return item, fault

        return dict(in_parallel(check, items, workers))


def part_of(item: Wanted) -> Path:
    """Where the file grows: the name holds the hash, so that what one version left is never continued as another."""
    return item.target.with_name(f"{item.target.name}.{item.remote.digest[:16]}.part")


def part_size(item: Wanted) -> int:
    part = part_of(item)
    return part.stat().st_size if part.exists() else 0


def check_disk(missing: list[Wanted]):
    """UserError unless each disk that files go to has room for what they still lack."""
    needed, folders = Counter(), {}
    for item in missing:
        folder = next(folder for folder in item.target.parents if folder.exists())
        disk = folder.stat().st_dev
        needed[disk] += max(0, item.remote.size - part_size(item))
        folders[disk] = folder
    for disk, size in needed.items():
        free = shutil.disk_usage(folders[disk]).free
        require(size <= free, f"{size:,} bytes are missing, but the disk of {folders[disk]} has {free:,} free: make "
                "room, take fewer shards (--train-shards N), or another disk (--out DIR)")  # fmt: skip


def download(item: Wanted, hub: Hub, commit: str, progress: Progress):
    """Fill the part, prove it, give it its name."""
    remote, part = item.remote, part_of(item)
    part.parent.mkdir(parents=True, exist_ok=True)
    resumed, failures = part_size(item), 0
    while part_size(item) < remote.size or not part.exists():
        have, trouble = part_size(item), "the connection ended early"
        try:
            hub.append(remote, commit, part, progress)
        except HfHubHTTPError as error:
            raise hub.explain(error, remote.path) from error
        except HTTPError as error:
            trouble = first_line(error)
        failures = 0 if part_size(item) > have else failures + 1
        if failures > RETRIES:
            raise Unreachable(f"{remote.path}: {hub.host} sends nothing more ({trouble})")
        if failures:
            time.sleep(1)

    fault = find_fault(part, remote)
    if fault:
        progress.add(-part.stat().st_size)
        part.unlink()
        if resumed:  # it may be what an earlier run left that is bad, as after a loss of power
            return download(item, hub, commit, progress)
        raise UserError(f"{remote.path} arrived damaged and was not put in place: it {fault}; start the command again, "
                        f"and if that is of no help, ask the owner of {hub.repo_id} or check HF_ENDPOINT")  # fmt: skip
    fault = find_header_fault(part) if SHARD_NAME.fullmatch(item.target.name) else None
    if fault:
        part.unlink()
        raise UserError(f"{remote.path} is no shard that the trainer can read and was not put in place: it {fault}; "
                        f"ask the owner of {hub.repo_id}")  # fmt: skip
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, item.target)
    progress.say(f"fetched {item.target} ({remote.size:,} bytes)")


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="environment: MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, HF_ENDPOINT, HF_TOKEN, "
        "HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT (seconds)",
    )
    variants = "sp1024, sp4096, sp8192, byte260 or a data set of the manifest (default sp1024)"
    parser.add_argument("--variant", default="sp1024", metavar="NAME", help=variants)
    parser.add_argument("--train-shards", type=int, default=80, metavar="N",
                        help="the first N training shards, or all where there are fewer (default 80)")  # fmt: skip
    parser.add_argument("--with-docs", action="store_true", help=f"also the text itself, {DOCS}")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="files at a time, 1 to 64 (default 8)")
    parser.add_argument("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    args = parser.parse_args(argv)
    require(args.train_shards >= 0, f"--train-shards {args.train_shards}: expected 0 (validation alone) or more")
    require(1 <= args.workers <= 64, f"--workers {args.workers}: expected 1 to 64")
    return args


def name_next(listing: Listing, wanted: list[Wanted], args: argparse.Namespace) -> str:
    """The trainer's command for this data."""
    folder = next(item.target.parent for item in wanted if SHARD_NAME.fullmatch(item.target.name))
    tokenizer = next(item.target for item in wanted if item.target.parent == args.out / "tokenizers")
    dataset = find_dataset(listing.manifest, args.variant, "")
    size = dataset.get("vocab_size")
    for entry in listing.manifest["tokenizers"]:
        if size is None and entry["name"] == dataset["tokenizer_name"]:
            size = entry.get("vocab_size")
    knobs = [f"DATA_PATH={shlex.quote(str(folder))}", f"TOKENIZER_PATH={shlex.quote(str(tokenizer))}"]
    knobs += [f"VOCAB_SIZE={size}"] if type(size) is int else []
    by_default = folder == DATA_ROOT / "datasets" / DEFAULT_DATASET
    return "python train_gpt.py" if by_default else " ".join([*knobs, "python train_gpt.py"])


def run(args: argparse.Namespace):
    hub = Hub()
    record = args.out / "downloads" / "--".join(["fineweb", *hub.repo_id.split("/"), *hub.prefix.split("/")])
    record = record.with_name(record.name + ".json")
    offline = None
    try:
        listing = hub.fetch_listing()
        print(f"{hub.repo_id} at commit {listing.commit}")
    except Unreachable as error:
        offline = str(error)
        listing = read_record(record)
        require(listing, f"{offline}; and no earlier run has left a record of {hub.repo_id} in {record.parent}: "
                "connect, set HF_ENDPOINT to a mirror that can be reached, or unset HF_HUB_OFFLINE")  # fmt: skip
        print(f"offline: {offline}; going by the record of commit {listing.commit}")
    wanted, chosen = plan(listing, hub, args)
    print(chosen, flush=True)
    strangers = find_strangers(wanted, listing, args.out)
    if not offline:
        write_record(record, listing)

    lock = args.out / "downloads" / "fineweb.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1))
        except TimeoutError:
            raise UserError(f"another download into {args.out} is at work: wait for it (or, if there is none, delete "
                            f"{lock})") from None  # fmt: skip
        bring(wanted, strangers, hub, listing.commit, offline, args.workers)
    print(f"next: {name_next(listing, wanted, args)}")


def bring(wanted: list[Wanted], strangers: list[Wanted], hub: Hub, commit: str, offline: str | None, workers: int):
    """Have every wanted file in place, whole."""
    faults = find_faults(wanted + strangers, workers)
    for item in strangers:
        require(faults[item] is None, f"{item.target} {faults[item]}; it is not among the shards asked for, but the "
                "trainer would read it: delete it, or ask for more with --train-shards")  # fmt: skip
    if strangers:
        print(f"{len(strangers)} more shards are here from before and whole; the trainer reads them too")
    missing = [item for item in wanted if faults[item]]
    for item in missing:
        if item.target.exists():
            print(f"{item.target} {faults[item]}" + ("" if offline else ": it is replaced"))
    size = sum(item.remote.size for item in missing)
    print(f"{len(wanted) - len(missing)} of {len(wanted)} files are in place, with the size and hash the hub states")
    if missing and offline:
        raise UserError(f"{offline}; {len(missing)} files of {size:,} bytes are missing or damaged, the first is "
                        f"{missing[0].target}: connect, or set HF_ENDPOINT to a mirror")  # fmt: skip
    check_disk(missing)
    if missing:
        print(f"fetching {len(missing)} files, {size:,} bytes", flush=True)
        with Progress("fetching", size) as progress:
            progress.add(sum(map(part_size, missing)))
            for _ in in_parallel(lambda item: download(item, hub, commit, progress), missing, workers):
                pass
        print(f"all {len(wanted)} files are in place")
    for item in wanted:  # beginnings of other versions
        for part in item.target.parent.glob(f"{item.target.name}.*.part"):
            part.unlink()


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except Unreachable as error:
        print(f"error: {error}; what has arrived is kept: start the same command again to go on, or set HF_ENDPOINT to "
              "a mirror", file=sys.stderr)  # fmt: skip
    except OSError as error:
        print(f"error: {error}; what has arrived is kept. For a data root that can be written to, pass --out DIR",
              file=sys.stderr)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept: start the same command again to go on", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
