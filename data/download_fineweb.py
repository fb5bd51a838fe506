"""Download the published FineWeb shards of the parameter-golf challenge and their tokenizer, proved file by file.

    python data/download_fineweb.py                       # sp1024: 80 training shards, all of validation, tokenizer
    python data/download_fineweb.py --train-shards 1      # enough for a first run
    python data/download_fineweb.py --variant byte260     # another tokenizer's shards
    MATCHED_FINEWEB_REPO_ID=kevclark/parameter-golf python data/download_fineweb.py --variant sp8192

The repository's listing states size and hash of every file. A file here counts only if it has both, whenever it came;
what is missing is fetched by huggingface-hub to downloads/, and takes its place once it is proved. So a run may end at
any moment: the next one goes on with the files that are missing. data/README.md describes options, layout and errors.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import common
from common import DATA_ROOT, first_line, leave, locked, run_command, say

from train_gpt import UserError, open_shard, require

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its servers are others than HF_ENDPOINT
try:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars, get_session
except (ImportError, ValueError) as error:  # it reads the environment when it is imported
    say(
        f"error: huggingface-hub 1.0 or later is needed ({error}): pip install -r requirements.txt; check also "
        "variables that begin with HF_, such as HF_HUB_DOWNLOAD_TIMEOUT",
        sys.stderr,
    )
    leave(2)

REPO_ID, PREFIX, SP8192_REPO_ID = "willdepueoai/parameter-golf", "datasets", "kevclark/parameter-golf"
DEFAULT_DATASET = "fineweb10B_sp1024"  # which the trainer's defaults point to
DOCS = "docs_selected.jsonl"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # one part of a path: never "..", absolute, a drive or hidden
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class Remote(NamedTuple):
    """A file as the hub describes it."""

    path: str  # below the prefix
    size: int
    digest: str  # sha256; for a file that git itself keeps the sha1 of its blob: "blob <size>", a zero byte, the bytes


class Listing(NamedTuple):
    commit: str
    files: dict[str, Remote]
    manifest: dict


class Hub:
    """The repository, as the environment names it; every request of this script is made here."""

    def __init__(self):
        self.repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPO_ID
        self.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", PREFIX).strip("/")
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
        safe = not self.prefix or all(map(SAFE_NAME.fullmatch, self.prefix.split("/")))
        for name, value, sound, expected in [
            ("MATCHED_FINEWEB_REPO_ID", self.repo_id, re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id), "owner/name"),
            ("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", self.prefix, safe, f"a folder such as {PREFIX}, or nothing"),
            ("HF_ENDPOINT", self.endpoint, re.match(r"https?://[^/]", self.endpoint), "https://huggingface.co or so"),
        ]:
            require(sound, f"{name}={value!r}: expected {expected}")
        try:
            get_session()
        except (ImportError, ValueError) as error:  # a scheme that needs another package, or that there is not
            names = [name for name in os.environ if name.lower() in ("all_proxy", "http_proxy", "https_proxy")]
            raise UserError(
                f"{', '.join(sorted(names))}: the proxy cannot be used ({first_line(error)}): pip install "
                "socksio for socks5, name one of http://, or unset the variable"
            ) from None

    def explain(self, error: BaseException, path: str | None = None) -> Exception:
        """The error of a request as one that says what to do: ConnectionError where trying later may help."""
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if not isinstance(error, HfHubHTTPError) or status is None or status >= 500 or status in (408, 429):
            return ConnectionError(f"{self.endpoint} cannot be reached ({first_line(error)})")
        return UserError(
            f"{self.endpoint}, asked for {path or self.repo_id}: status {status}: there is none of that name, or it is "
            f"private or gated: check MATCHED_FINEWEB_REPO_ID={self.repo_id}, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="
            f"{self.prefix} and HF_ENDPOINT; accept the terms on its page and set HF_TOKEN to a token that may read it"
        )

    def fetch(self, remote: Remote, commit: str, folder: Path) -> Path:
        """The file below `folder`, by the library, which takes up lost connections."""
        path = f"{self.prefix}/{remote.path}".lstrip("/")
        try:
            where = {"revision": commit, "local_dir": folder, "endpoint": self.endpoint}
            return Path(hf_hub_download(self.repo_id, path, repo_type="dataset", **where))
        except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise self.explain(error, path) from error
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            raise UserError(
                f"{path} arrived damaged and was not put in place ({first_line(error)}): start the command "
                "again, or check HF_ENDPOINT"
            ) from error

    def fetch_listing(self, folder: Path) -> Listing:
        """The commit, its files under the prefix, the manifest, which is kept below `folder`."""
        files, start = {}, f"{self.prefix}/" if self.prefix else ""
        try:
            info = HfApi(endpoint=self.endpoint).repo_info(
                self.repo_id, repo_type="dataset", files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            for it in info.siblings:
                path = it.rfilename.removeprefix(start)
                size, digest = (it.lfs.size, it.lfs.sha256) if it.lfs else (it.size, it.blob_id)
                if type(size) is not int or size < 0 or not DIGEST.fullmatch(digest) or not DIGEST.fullmatch(info.sha):
                    raise ValueError(f"{it.rfilename} has size {size!r}, hash {digest!r} and commit {info.sha!r}")
                if it.rfilename.startswith(start):
                    files[path] = Remote(path, size, digest)
        except (HTTPError, OSError) as error:
            raise self.explain(error) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape, or none at all
            raise UserError(
                f"{self.endpoint} does not answer as a hub does ({first_line(error)}): check HF_ENDPOINT, "
                "and that no log-in page of the network stands between"
            ) from error
        remedy = f"check MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX={self.prefix}"
        require("manifest.json" in files, f"{self.repo_id} has no {start}manifest.json: {remedy}")
        staged = self.fetch(files["manifest.json"], info.sha, folder)
        fault = find_fault(staged, files["manifest.json"])
        require(fault is None, f"{start}manifest.json {fault}: start the command again")
        return Listing(info.sha, files, common.read_json(staged))


class Plan(NamedTuple):
    chosen: str  # a line that says what
    wanted: dict[Path, Remote]  # every file that the arguments ask for, by its place
    strangers: dict[Path, Remote]  # shards beside them, which the trainer would read as well
    next: str  # the trainer's command


def make_plan(listing: Listing, repo_id: str, args: argparse.Namespace) -> Plan:
    """UserError where the repository lacks what the manifest or the arguments name, or it would leave the data root."""

    def remote(path: str, remedy: str = "check MATCHED_FINEWEB_REPO_ID") -> Remote:
        safe = all(map(SAFE_NAME.fullmatch, path.split("/")))
        require(safe, f"the manifest names {path!r}, expected a path below the prefix: check MATCHED_FINEWEB_REPO_ID")
        require(path in listing.files, f"the manifest of {repo_id} asks for {path}, which it does not have: {remedy}")
        return listing.files[path]

    try:
        datasets = {entry["name"]: entry for entry in listing.manifest["datasets"]}
        name = args.variant if args.variant in datasets else f"fineweb10B_{args.variant}"
        hint = f"; sp8192 is published by {SP8192_REPO_ID}: set MATCHED_FINEWEB_REPO_ID={SP8192_REPO_ID}"
        names = ", ".join(sorted(datasets)) + hint * (name == "fineweb10B_sp8192" and repo_id != SP8192_REPO_ID)
        require(name in datasets, f"--variant {args.variant}: the manifest of {repo_id} has {names}")
        entry, folder = datasets[name], args.out / "datasets" / name
        count = {split: entry["stats"][f"files_{split}"] for split in ("val", "train")}
        asked, wanted = {"val": count["val"], "train": min(args.train_shards, count["train"])}, {}
        require(count["val"], f"the manifest counts no val shards of {name}: check MATCHED_FINEWEB_REPO_ID")
        for split, shards in asked.items():
            for number in range(shards):
                path = f"datasets/{name}/fineweb_{split}_{number:06d}.bin"
                fewer = f"--train-shards {number} asks for those before it" if split == "train" else "ask its owner"
                wanted[args.out / path] = remote(path, fewer)
        tokenizer = {it["name"]: it for it in listing.manifest["tokenizers"]}[entry["tokenizer_name"]]
        main = tokenizer.get("model_path") or tokenizer["path"]
        vocab = tokenizer.get("vocab_path") or main  # the pieces once more, as text: no tool here needs it
        if vocab not in listing.files:
            say(f"note: the repository lacks {vocab}, which its manifest names; going on without")
        for path in {main, vocab} if vocab in listing.files else [main]:
            target = args.out / "tokenizers" / path.rpartition("/")[2]
            found = remote(path if path in listing.files else f"tokenizers/{path}")
            require(wanted.setdefault(target, found) == found, f"the manifest has two files for {target}: refused")
        size = entry.get("vocab_size", tokenizer.get("vocab_size"))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"the manifest of {repo_id} is not that of such data ({error!r:.80}): check MATCHED_FINEWEB_REPO_ID"
        ) from None
    if args.with_docs:
        require(DOCS in listing.files, f"--with-docs: {repo_id} has no {DOCS} beside its manifest; leave it out")
        docs = [path for path in listing.files if path.startswith("docs_selected.") and SAFE_NAME.fullmatch(path)]
        wanted |= {args.out / "downloads" / path: listing.files[path] for path in docs}
    strangers = {}
    for path in sorted(set(folder.glob("fineweb_*.bin")) - set(wanted)):
        found = listing.files.get(path.relative_to(args.out).as_posix())
        fault = "is no shard of the repository, and the trainer would read it as part of the data"
        require(found, f"{path} {fault}: delete it or move it away")
        strangers[path] = found
    chosen = f"{name}: {asked['train']} of {count['train']} training shards, all {count['val']} of validation"
    more = f" (--train-shards {args.train_shards} is more than there are)" * (args.train_shards > count["train"])
    knobs = {}
    if folder != DATA_ROOT / "datasets" / DEFAULT_DATASET:
        model = args.out / "tokenizers" / main.rpartition("/")[2]
        knobs = {"DATA_PATH": folder, "TOKENIZER_PATH": model, "VOCAB_SIZE": size or ""}
    command = [*(f"{knob}={shlex.quote(str(value))}" for knob, value in knobs.items()), "python train_gpt.py"]
    return Plan(chosen + more, wanted, strangers, " ".join(command))


def find_fault(path: Path, remote: Remote) -> str | None:
    """What is wrong with the file at `path`, which should be `remote`; None if it is whole."""
    size = path.stat().st_size if path.exists() else None
    if size != remote.size:
        return "is missing" if size is None else f"has {size} bytes, expected {remote.size}"
    with open(path, "rb") as file:
        begun = hashlib.sha256() if len(remote.digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
        digest = hashlib.file_digest(file, lambda: begun).hexdigest()
    if digest != remote.digest:
        return f"has the hash {digest}, expected {remote.digest}"
    try:
        if path.suffix == ".bin":
            open_shard(path)
    except UserError as error:
        return f"cannot be read ({error})"
    return None


def download(target: Path, remote: Remote, hub: Hub, commit: str, staging: Path):
    """Fetch to `staging`, prove, put in place."""
    staged = hub.fetch(remote, commit, staging)
    if fault := find_fault(staged, remote):
        staged.unlink()  # so that the next run fetches it anew
        raise UserError(
            f"{remote.path} arrived damaged and was not put in place: it {fault}; start the command again, "
            f"and if that is of no help, ask the owner of {hub.repo_id} or check HF_ENDPOINT"
        )
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(staged, part)  # which may be on another disk
    os.replace(part, target)
    say(f"fetched {target} ({remote.size:,} bytes)")


def bring(plan: Plan, hub: Hub, commit: str, offline: str | None, args: argparse.Namespace):
    """Have every wanted file in place, whole."""
    pool, staging, items = ThreadPoolExecutor(args.workers), args.out / "downloads" / "fineweb.part", {}
    try:
        items = plan.wanted | plan.strangers
        faults = dict(zip(items, pool.map(find_fault, items, items.values()), strict=True))
        for path in plan.strangers:
            note = "it is not among the shards asked for, but the trainer would read it"
            remedy = "delete it, or ask for more with --train-shards"
            require(not faults[path], f"{path} {faults[path]}; {note}: {remedy}")
            say(f"{path} is here from before and whole; the trainer reads it too")
        missing = {path: remote for path, remote in plan.wanted.items() if faults[path]}
        for path in filter(Path.exists, missing):
            say(f"{path} {faults[path]}" + ("" if offline else ": it is replaced"))
        size, count = sum(remote.size for remote in missing.values()), len(plan.wanted)
        say(f"{count - len(missing)} of {count} files are in place, with the size and hash the hub states")
        if missing:
            which = f"{len(missing)} files of {size:,} bytes are missing or damaged, the first is {min(missing)}"
            require(not offline, f"{offline}; {which}: connect, or set HF_ENDPOINT to a mirror")
            free = shutil.disk_usage(next(path for path in min(missing).parents if path.exists())).free
            needed = f"{size:,} bytes are missing, but the disk of {args.out} has {free:,} free"
            remedy = "make room, take fewer shards (--train-shards N), or another disk (--out DIR)"
            require(size <= free, f"{needed}: {remedy}")
            say(f"fetching {len(missing)} files, {size:,} bytes")
            for done in as_completed([pool.submit(download, *item, hub, commit, staging) for item in missing.items()]):
                done.result()
            say(f"all {count} files are in place")
        shutil.rmtree(staging, ignore_errors=True)
    finally:  # neither an error nor Ctrl+C waits for a server that has gone silent
        pool.shutdown(wait=False, cancel_futures=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    variables = "MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"environment: {variables}")
    names = "sp1024, sp4096, sp8192, byte260 or a data set of the manifest (default sp1024)"
    parser.add_argument("--variant", default="sp1024", metavar="NAME", help=names)
    shards = "the first N training shards, or all where there are fewer (default 80)"
    parser.add_argument("--train-shards", type=int, default=80, metavar="N", help=shards)
    parser.add_argument("--with-docs", action="store_true", help=f"also the text itself, {DOCS}")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="files at a time, 1 to 64 (default 8)")
    parser.add_argument("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    args = parser.parse_args(argv)
    given = f"--train-shards {args.train_shards} --workers {args.workers}"
    limits = "expected 0 shards (validation alone) or more, and 1 to 64 workers"
    require(args.train_shards >= 0 and 1 <= args.workers <= 64, f"{given}: {limits}")
    return args


def run(args: argparse.Namespace):
    disable_progress_bars()  # of eight at a time; a line per file says as much
    hub, downloads, offline = Hub(), args.out / "downloads", None
    record = downloads / ("--".join(["fineweb", *hub.repo_id.split("/"), *hub.prefix.split("/")]) + ".json")
    with locked(downloads / "fineweb.lock", lambda: f"another download into {args.out} is at work"):
        try:
            listing = hub.fetch_listing(downloads / "fineweb.part")
            say(f"{hub.repo_id} at commit {listing.commit}")
        except ConnectionError as error:
            offline, known = str(error), common.read_json(record)
            try:
                files = {path: Remote(*it) for path, it in known["files"].items()}
                listing = Listing(known["commit"], files, known["manifest"])
            except (TypeError, LookupError, AttributeError):
                raise UserError(
                    f"{offline}; and no earlier run has left a record of {hub.repo_id} in {downloads}: "
                    "connect, set HF_ENDPOINT to a mirror, or unset HF_HUB_OFFLINE"
                ) from None
            say(f"offline: {offline}; going by the record of commit {listing.commit}")
        plan = make_plan(listing, hub.repo_id, args)
        say(plan.chosen)
        common.write_json(record, listing._asdict())
        try:
            bring(plan, hub, listing.commit, offline, args)
        except ConnectionError as error:
            raise UserError(
                f"{error}; what has arrived is kept: start the same command again, or set HF_ENDPOINT to a mirror"
            ) from error
    say(f"next: {plan.next}")


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(parse_arguments(argv)), "what has arrived is kept: start the same command again")


if __name__ == "__main__":
    leave(main())
