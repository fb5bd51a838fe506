"""data/download_fineweb.py against a hub made here: proved or absent, nothing fetched twice, errors that help.

HF_ENDPOINT names a local server, which speaks the part of the hub's protocol that huggingface_hub needs.
"""

import functools
import hashlib
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import filelock
import numpy as np
import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import http_backoff
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import TokenStream

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "download_fineweb.py"
REPO = "willdepueoai/parameter-golf"
NAME = "fineweb10B_sp1024"
SHARD_TOKENS = 150_000


# ----------------------------------------------------------------------------------------------------------------------
# The hub
# ----------------------------------------------------------------------------------------------------------------------


def make_shard(seed: int, tokens: int = SHARD_TOKENS, magic: int = 20240520, version: int = 1, count=None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens if count is None else count
    return header.tobytes() + np.random.default_rng(seed).integers(0, 1024, tokens).astype("<u2").tobytes()


def make_manifest(train: int = 3, val: int = 2) -> dict:
    stats = {"files_train": train, "files_val": val, "tokens_train": 1}
    return {
        "version": 1,
        "datasets": [
            {"name": NAME, "tokenizer_name": "sp_bpe_1024", "vocab_size": 1024, "stats": stats},
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
        ],
        "tokenizers": [
            {
                "name": "sp_bpe_1024",
                "model_path": "tokenizers/fineweb_1024_bpe.model",
                "vocab_path": "tokenizers/fineweb_1024_bpe.vocab",
            },
            {"name": "bytes", "path": "tokenizers/fineweb_pure_byte_260.json", "vocab_size": 260},
        ],
    }


def make_repo() -> dict[str, bytes]:
    """Path -> content of a small repository; manifest and .vocab are files of git, the others LFS."""
    datasets = "datasets/datasets"
    files = {f"{datasets}/{NAME}/fineweb_train_{i:06d}.bin": make_shard(i) for i in range(3)}
    files |= {f"{datasets}/{NAME}/fineweb_val_{i:06d}.bin": make_shard(10 + i) for i in range(2)}
    files |= {f"{datasets}/fineweb10B_byte260/fineweb_{s}_000000.bin": make_shard(20, 500) for s in ("train", "val")}
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = random.Random(0).randbytes(20_000)
    files["datasets/tokenizers/fineweb_1024_bpe.vocab"] = "<unk>\t0\n\u2581the\t-1\n".encode()
    files["datasets/tokenizers/fineweb_pure_byte_260.json"] = b'{"vocab_size": 260}\n'
    files["datasets/manifest.json"] = json.dumps(make_manifest()).encode()
    return files


@functools.cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def git_oid(data: bytes) -> str:
    """What `git hash-object` prints."""
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


class Hub:
    """A hub of one repository. How a connection is kept and taken up again is the library's to test."""

    def __init__(self):
        self.repo, self.files = REPO, make_repo()
        self.content = {}  # path -> what is sent instead of the bytes that the listing describes
        self.status = {}  # what a URL contains -> (status, headers, body) that answer it
        self.entry = {}  # path -> what the listing says instead
        self.log = []  # paths asked for
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def commit(self) -> str:
        return git_oid(repr(sorted((path, sha256(data)) for path, data in self.files.items())).encode())

    def publish(self, manifest):
        self.files["datasets/manifest.json"] = json.dumps(manifest).encode()

    def fetched(self) -> list[str]:
        """Names of the files that were asked for since the last `log.clear()`, but for the manifest."""
        return sorted({Path(path).name for path in self.log if "/resolve/" in path} - {"manifest.json"})

    def respond(self, path: str) -> tuple[int, dict, bytes]:
        """Status, headers and body."""
        self.log.append(path)
        for part, answer in self.status.items():
            if part in path:
                return answer
        if path == f"/api/datasets/{self.repo}":
            siblings = [self.describe(name) for name in sorted(self.files)]
            body = json.dumps({"id": self.repo, "sha": self.commit, "siblings": siblings})
            return 200, {"Content-Type": "application/json"}, body.encode()
        name = path.removeprefix(f"/datasets/{self.repo}/resolve/{self.commit}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound" if name == path else "EntryNotFound"}, b""
        etag = sha256(self.files[name]) if self.is_lfs(name) else git_oid(self.files[name])
        return 200, {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}, self.content.get(name, self.files[name])

    def handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                status, headers, body = hub.respond(unquote(urlsplit(self.path).path))
                self.send_response(status)
                for key, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

        return Handler

    def is_lfs(self, path: str) -> bool:
        return path.endswith((".bin", ".model", ".jsonl"))

    def describe(self, path: str) -> dict:
        """The listing's entry of a file."""
        data = self.files[path]
        entry = {"rfilename": path, "size": len(data), "blobId": git_oid(data)}
        if self.is_lfs(path):
            entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        return entry | self.entry.get(path, {})


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module("download_fineweb")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def run(script, hub, root, tmp_path, monkeypatch, capfd):
    """Function: run the script in this process, with these options and environment variables, until its last thread
    has ended; returncode, stdout and stderr. `free` is what the disk is said to have. Waits between retries are left
    out."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MATCHED_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from the environment before this test began
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (file_download, sys.modules[http_backoff.__module__]):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))

    def start(*options, free=None, **environ):
        before = set(threading.enumerate())
        out = () if "--out" in options else ("--out", str(root))
        with monkeypatch.context() as patch:
            for name, value in {"HF_ENDPOINT": hub.url, "NO_PROXY": "*", **environ}.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", environ.get("HF_HUB_OFFLINE") == "1")
            if free is not None:
                patch.setattr(script.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            capfd.readouterr()
            close_session()  # which knows the environment of its first request
            code = script.main([*out, *options])
            for thread in set(threading.enumerate()) - before:
                if "ThreadPool" in thread.name:
                    thread.join(timeout=10)
                    assert not thread.is_alive()
        captured = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

    return start


@pytest.fixture
def launch(hub, root, tmp_path):
    """Function: the script as its users run it, in a process of its own; the Popen."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MATCHED_"))}
    inherited |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", "PYTHONUTF8": "1"}

    def start(*options, **environ):
        line = [sys.executable, str(SCRIPT), "--out", str(root), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(line, env=inherited | environ, **pipes, text=True, encoding="utf-8")

    return start


def finish(process) -> SimpleNamespace:
    stdout, stderr = process.communicate(timeout=60)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def expected_files(hub: Hub, train: int = 3) -> dict[str, bytes]:
    """Local path -> content after a download of sp1024."""
    found = {}
    for path, data in hub.files.items():
        local = path.removeprefix("datasets/")
        number = int(local[-10:-4]) if "_train_" in local else -1
        if local.startswith(f"datasets/{NAME}/") and number < train or "fineweb_1024_bpe" in local:
            found[local] = data
    return found


def snapshot(root: Path) -> dict[str, bytes]:
    """Local path -> content of everything below the data root but record, lock and what is not in place yet."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    ours = {name: path for name, path in files.items() if not name.startswith("downloads/fineweb")}
    return {name: path.read_bytes() for name, path in ours.items() if path.suffix != ".part"}


def assert_error(done, *words, code=2):
    """One message on standard error, with these words in it."""
    assert done.returncode == code, done.stdout + done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in message, done.stderr


FIRST = f"datasets/datasets/{NAME}/fineweb_train_000000.bin"


# ----------------------------------------------------------------------------------------------------------------------
# A download
# ----------------------------------------------------------------------------------------------------------------------


def test_a_fresh_download_is_what_the_hub_has_and_the_trainer_reads_it(hub, launch, root, tmp_path):
    done = finish(launch())
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert snapshot(root) == expected_files(hub)
    assert "3 of 3 training shards, all 2 of validation (--train-shards 80 is more than there are)" in done.stdout
    assert f"{REPO} at commit {hub.commit}" in done.stdout and "0 of 7 files are in place" in done.stdout
    knobs = f"DATA_PATH={root}/datasets/{NAME} TOKENIZER_PATH={root}/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024"
    assert f"next: {knobs} python train_gpt.py" in done.stdout
    for split in ("train", "val"):
        stream = TokenStream(str(root / "datasets" / NAME), split, 1024)
        published = [data[1024:] for path, data in sorted(hub.files.items()) if f"{NAME}/fineweb_{split}" in path]
        assert stream.read(0, len(stream)).tobytes() == b"".join(published)
    kept = [path for path in (tmp_path / "hf", root / "downloads") for path in path.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 10_000 for path in kept), "stored a second time"


def test_a_second_run_fetches_nothing(hub, run, root):
    assert run().returncode == 0
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")}
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and "7 of 7 files are in place" in done.stdout
    assert not hub.fetched() and len(hub.log) <= 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")} == times


def test_more_shards_come_on_top_and_validation_is_never_cut(hub, run, root):
    for asked, fetched, there in [(1, 5, 1), (2, 1, 2), (0, 0, 2)]:
        hub.log.clear()
        done = run("--train-shards", str(asked))
        assert done.returncode == 0 and len(hub.fetched()) == fetched
        assert snapshot(root) == expected_files(hub, train=there)
    assert done.stdout.count("is here from before and whole; the trainer reads it too") == 2


@pytest.mark.parametrize("variant", ["byte260", "fineweb10B_byte260"])
def test_another_variant_by_short_or_full_name(hub, run, root, variant):
    done = run("--variant", variant)
    assert done.returncode == 0 and "VOCAB_SIZE=260" in done.stdout
    names = [f"datasets/fineweb10B_byte260/fineweb_{split}_000000.bin" for split in ("train", "val")]
    assert sorted(snapshot(root)) == [*names, "tokenizers/fineweb_pure_byte_260.json"]


@pytest.mark.parametrize("prefix", ["", "a/b"])
def test_another_repository_and_prefix(hub, run, root, prefix):
    hub.repo = "someone/golf-data"
    hub.files = {f"{prefix}/{path.removeprefix('datasets/')}".strip("/"): data for path, data in hub.files.items()}
    done = run("--train-shards", "1", MATCHED_FINEWEB_REPO_ID=hub.repo, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=prefix)
    assert done.returncode == 0, done.stderr
    assert sorted(snapshot(root)) == sorted(expected_files(SimpleNamespace(files=make_repo()), train=1))


def test_the_text_itself_and_a_vocab_file_that_only_the_manifest_has(hub, run, root):
    assert_error(run("--with-docs"), "--with-docs", REPO, "docs_selected.jsonl")
    hub.files["datasets/docs_selected.jsonl"] = b'{"text": "x"}\n' * 5000
    del hub.files["datasets/tokenizers/fineweb_1024_bpe.vocab"]
    done = run("--with-docs", "--train-shards", "0")
    assert done.returncode == 0 and "lacks tokenizers/fineweb_1024_bpe.vocab" in done.stdout
    docs = {"downloads/docs_selected.jsonl": hub.files["datasets/docs_selected.jsonl"]}
    assert snapshot(root) == expected_files(hub, train=0) | docs


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted, damaged, changed
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [(503, {}, b""), (200, {"Content-Length": 301_024}, b"")])
def test_a_server_in_trouble_ends_the_run_and_the_next_one_goes_on(hub, run, root, answer):
    hub.status["/" + FIRST] = answer
    assert_error(run(), "start the same command again")
    hub.status.clear()
    hub.log.clear()
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)
    assert "fineweb_train_000000.bin" in hub.fetched()


def test_ctrl_c_keeps_what_is_whole_and_the_next_run_goes_on(hub, script, run, root, monkeypatch):
    download = script.download

    def interrupted(target, *arguments):
        if target.name == "fineweb_train_000000.bin":
            raise KeyboardInterrupt
        download(target, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "download", interrupted)
        done = run("--workers", "1")
    assert done.returncode == 130
    assert done.stderr == "interrupted: what has arrived is kept: start the same command again\n"
    left = snapshot(root)
    assert 0 < len(left) < 7 and left.items() <= expected_files(hub).items()
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and f"{len(left)} of 7 files are in place" in done.stdout
    assert len(hub.fetched()) == 7 - len(left) and snapshot(root) == expected_files(hub)


def test_two_downloads_into_one_folder_do_not_mix(hub, run, root):
    assert run("--train-shards", "0").returncode == 0
    with filelock.FileLock(root / "downloads" / "fineweb.lock"):
        assert_error(run(), "another download", str(root), "fineweb.lock")
    assert run().returncode == 0


def flip(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


DAMAGES = {"empty": lambda data: b"", "a flipped bit": flip, "cut": lambda data: data[:-2], "an error page":
           lambda data: b"<html>404</html>", "too long": lambda data: data + b"\0\0"}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_local_file_is_replaced_whatever_its_size_and_time(hub, run, root, damage):
    assert run().returncode == 0
    for name in ("fineweb_val_000001.bin", "fineweb_1024_bpe.model", "fineweb_1024_bpe.vocab"):
        (path,) = root.rglob(name)
        stat = path.stat()
        data = path.read_bytes()
        path.write_bytes(b"\0" + data[1:] if name.endswith("vocab") else DAMAGES[damage](data))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and done.stdout.count("it is replaced") == 3
    assert hub.fetched() == ["fineweb_1024_bpe.model", "fineweb_1024_bpe.vocab", "fineweb_val_000001.bin"]
    assert snapshot(root) == expected_files(hub)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_arrives_damaged_is_not_put_in_place(hub, run, root, damage):
    hub.content[FIRST] = DAMAGES[damage](hub.files[FIRST])
    done = run()
    assert_error(done, FIRST.removeprefix("datasets/"), "start the command again")
    if damage == "a flipped bit":
        assert_error(done, sha256(hub.files[FIRST]), sha256(hub.content[FIRST]), "was not put in place")
    assert snapshot(root).items() <= expected_files(hub).items()
    hub.content.clear()
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)


@pytest.mark.parametrize("shard, said", [
    (make_shard(0, magic=20240521), "magic 20240521"), (make_shard(0, version=2), "version 2"),
    (make_shard(0, count=SHARD_TOKENS - 1), "149999 tokens"), (make_shard(0, count=-1), "-1 tokens"),
    (make_shard(0)[:1000], "1000 bytes, less than a header"), (b"", "0 bytes, less than a header"),
])  # fmt: skip
def test_a_published_file_that_is_no_shard_is_refused(hub, run, root, shard, said):
    hub.files[FIRST] = shard
    assert_error(run("--train-shards", "1"), FIRST.removeprefix("datasets/"), said, "was not put in place")
    assert not [path for path in (root / "datasets").rglob("fineweb_train_*")]


def test_a_manifest_other_than_the_listing_says_is_refused(hub, run, root):
    hub.content["datasets/manifest.json"] = hub.files["datasets/manifest.json"].replace(b"sp_bpe", b"sp_BPE")
    right, wrong = (git_oid(files["datasets/manifest.json"]) for files in (hub.files, hub.content))
    assert_error(run(), "datasets/manifest.json", right, wrong)
    assert not snapshot(root)


def test_a_shard_that_the_trainer_would_read_but_the_hub_does_not_vouch_for(hub, run, root):
    assert run().returncode == 0
    (root / "datasets" / NAME / "fineweb_train_000002.bin").write_bytes(b"")
    assert_error(run("--train-shards", "1"), "fineweb_train_000002.bin", "0 bytes", "--train-shards")
    assert run().returncode == 0
    stranger = root / "datasets" / NAME / "fineweb_val_000002.bin"
    stranger.write_bytes(make_shard(99))
    hub.log.clear()
    assert_error(run(), str(stranger), "no shard of the repository", "delete it")
    assert not hub.fetched() and stranger.read_bytes() == make_shard(99), "it is the user's to delete"


def test_a_new_version_of_the_repository_replaces_what_it_changed(hub, run, root):
    assert run().returncode == 0
    hub.files[f"datasets/datasets/{NAME}/fineweb_val_000001.bin"] = make_shard(30)
    hub.files[f"datasets/datasets/{NAME}/fineweb_train_000003.bin"] = make_shard(31)
    hub.publish(make_manifest(train=4))
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and "4 of 4 training shards" in done.stdout
    assert hub.fetched() == ["fineweb_train_000003.bin", "fineweb_val_000001.bin"]
    assert snapshot(root) == expected_files(hub, train=4)
    done = run(HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and hub.commit in done.stdout, "the record is that of the new version"


def test_a_manifest_that_counts_more_shards_than_there_are(hub, run, root):
    hub.publish(make_manifest(train=5))
    assert_error(run(), "fineweb_train_000003.bin", "--train-shards 3")
    assert run("--train-shards", "3").returncode == 0
    hub.publish(make_manifest(val=3))
    assert_error(run(), "fineweb_val_000002.bin")


def test_a_missing_variant_names_what_there_is(hub, run, root):
    done = run("--variant", "sp8192")
    assert_error(done, "sp8192", REPO, "fineweb10B_byte260, fineweb10B_sp1024", "MATCHED_FINEWEB_REPO_ID=kevclark/")
    done = run("--variant", "sp4096")
    assert_error(done, "sp4096", "fineweb10B_byte260, fineweb10B_sp1024")
    assert "kevclark" not in done.stderr and not snapshot(root)


# ----------------------------------------------------------------------------------------------------------------------
# Disk, network, permission, mistakes
# ----------------------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_anything_is_fetched(hub, run, root):
    needed = sum(map(len, expected_files(hub).values()))
    done = run(free=needed - 1)
    assert_error(done, f"{needed:,} bytes are missing", f"{needed - 1:,} free", "--train-shards", "--out")
    assert not hub.fetched() and not snapshot(root)
    assert run(free=needed).returncode == 0
    assert run(free=0).returncode == 0, "nothing is missing"


def test_offline_with_everything_here_is_proved_by_the_record(hub, run, root):
    assert run("--train-shards", "1").returncode == 0
    commit = hub.commit
    hub.log.clear()
    done = run("--train-shards", "1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not hub.log
    assert "offline" in done.stdout and commit in done.stdout and "5 of 5 files are in place" in done.stdout
    assert_error(run(HF_HUB_OFFLINE="1"), "2 files of 602,048 bytes are missing", "fineweb_train_000001.bin", "connect")
    (path,) = root.rglob("fineweb_val_000000.bin")
    path.write_bytes(flip(path.read_bytes()))
    assert_error(run("--train-shards", "1", HF_HUB_OFFLINE="1"), "1 files", "fineweb_val_000000.bin")


def test_a_hub_that_cannot_be_reached_is_offline(hub, run, root):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert_error(run(HF_ENDPOINT=nobody), nobody, "no earlier run", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    assert run().returncode == 0
    done = run(HF_ENDPOINT=nobody)
    assert done.returncode == 0 and "offline" in done.stdout
    hub.status["/api/"] = (503, {}, b"")
    done = run()
    assert done.returncode == 0 and "503" in done.stdout
    (record,) = root.glob("downloads/fineweb--*.json")
    for damaged in ("", "{}", "[1]", '{"commit": "x", "files": {"a": [1]}, "manifest": {}}'):
        record.write_text(damaged)
        assert_error(run(HF_ENDPOINT=nobody), "no earlier run")


REFUSALS = {
    "401": ((401, {}, b'{"error": "Invalid username or password."}'), ["401", "MATCHED_FINEWEB_REPO_ID", "HF_TOKEN"]),
    "403": ((403, {"X-Error-Code": "GatedRepo"}, b""), ["403", "gated", "HF_TOKEN"]),
    "404": ((404, {"X-Error-Code": "RepoNotFound"}, b""), ["404", "MATCHED_FINEWEB_REPO_ID=" + REPO]),
    "400": ((400, {}, b""), ["400", "HF_ENDPOINT"]),
    "html": ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), ["hub", "HF_ENDPOINT", "log-in page"]),
    "list": ((200, {}, b"[1, 2]"), ["hub", "HF_ENDPOINT"]),
    "no commit": ((200, {}, b'{"id": "x", "sha": "../../x", "siblings": [{"rfilename": "a", "size": 1, "blobId": "'
                   + b"0" * 40 + b'"}]}'), ["../../x", "HF_ENDPOINT"]),
}  # fmt: skip


@pytest.mark.parametrize("answer, words", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_says_what_to_do(hub, run, root, answer, words):
    assert run("--train-shards", "0").returncode == 0
    before = snapshot(root)
    hub.status["/api/datasets/"] = answer
    assert_error(run(), *words)
    assert snapshot(root) == before


def test_a_gated_file_and_a_repository_without_the_prefix_or_the_manifest(hub, run):
    hub.status[f"/resolve/{hub.commit}/{FIRST}"] = (403, {"X-Error-Code": "GatedRepo"}, b"")
    assert_error(run(), FIRST, "403", "HF_TOKEN")
    assert_error(run(MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="nowhere"), "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=nowhere")
    del hub.files["datasets/manifest.json"]
    assert_error(run(), "datasets/manifest.json", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=datasets")


MISTAKES = [
    (["--train-shards", "-1"], {}, ["--train-shards -1", "0"]),
    (["--workers", "0"], {}, ["--workers 0", "1 to 64"]),
    ([], {"HF_ENDPOINT": "huggingface.co"}, ["HF_ENDPOINT='huggingface.co'", "https://"]),
    ([], {"MATCHED_FINEWEB_REPO_ID": "a/b/c"}, ["MATCHED_FINEWEB_REPO_ID='a/b/c'", "owner/name"]),
    ([], {"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "a/../.."}, ["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX='a/../..'"]),
    ([], {"NO_PROXY": "", "all_proxy": "socks5://localhost:1"}, ["all_proxy", "socks5"]),
    ([], {"NO_PROXY": "", "HTTPS_PROXY": "odd://localhost:1"}, ["HTTPS_PROXY", "odd"]),
    (["--out", os.devnull], {}, ["--out DIR"]),
]


@pytest.mark.parametrize("options, environ, words", MISTAKES, ids=[str(options or env) for options, env, _ in MISTAKES])
def test_a_mistake_is_one_message(run, root, options, environ, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)  # as if it was not installed
    assert_error(run(*options, **environ), *words)
    assert not snapshot(root)


def test_without_the_library_or_with_variables_that_it_cannot_read(launch, tmp_path):
    assert_error(finish(launch(HF_HUB_DOWNLOAD_TIMEOUT="long")), "'long'", "HF_HUB_DOWNLOAD_TIMEOUT")
    (tmp_path / "huggingface_hub.py").write_text("")  # a version without what is needed
    assert_error(finish(launch(PYTHONPATH=str(tmp_path))), "huggingface-hub", "pip install -r requirements.txt")


# ----------------------------------------------------------------------------------------------------------------------
# A repository that means harm
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [
    {"lfs": {"sha256": "../../x", "size": 1, "pointerSize": 1}}, {"lfs": {"sha256": "0" * 64, "size": "1"}},
    {"lfs": {"sha256": "0" * 64, "size": -1, "pointerSize": 1}}, {"lfs": {"sha256": None, "size": 1, "pointerSize": 1}},
    {"lfs": None, "blobId": "x"}, {"lfs": None, "size": None}, {"rfilename": 3},
])  # fmt: skip
def test_a_hostile_listing_is_refused(hub, run, root, entry):
    hub.entry[FIRST] = entry
    assert_error(run(), "HF_ENDPOINT")
    assert not snapshot(root)


NAMES = st.one_of(
    st.sampled_from(["..", ".", "a", "a/b", "../a", "/a", "a\\b", "C:", "a\0", "", "tokenizers/t", NAME]),
    st.text(max_size=4), st.none(), st.integers(), st.lists(st.text(max_size=2), max_size=2),
)  # fmt: skip
ENTRIES = st.fixed_dictionaries({"name": NAMES, "tokenizer_name": NAMES, "model_path": NAMES, "path": NAMES, "stats": (
    st.fixed_dictionaries({"files_train": st.integers(-1, 2) | NAMES, "files_val": st.integers(-1, 2) | NAMES}) | NAMES
)})  # fmt: skip


@settings(max_examples=300)
@given(st.lists(ENTRIES, max_size=3), st.lists(ENTRIES, max_size=3), st.data())
def test_no_manifest_leads_out_of_the_data_root(script, datasets, tokenizers, data):
    """Whatever it says, and whatever files the repository has: a UserError, or files in their folders."""

    class Everything(dict):
        def __contains__(self, key):
            return True

        def __missing__(self, key):
            return script.Remote(key, 1, "0" * 64)

    variant = data.draw(st.sampled_from([e["name"] for e in datasets if isinstance(e["name"], str)] or ["sp1024"]))
    args = SimpleNamespace(variant=variant, train_shards=2, with_docs=False, out=Path("/root/data"))
    listing = script.Listing("0" * 40, Everything(), {"datasets": datasets, "tokenizers": tokenizers})
    try:
        plan = script.make_plan(listing, "a/b", args)
    except script.UserError:
        return
    assert len(plan.wanted) == len({remote.path for remote in plan.wanted.values()}), "two files never have one place"
    for target in plan.wanted:
        resolved = Path(os.path.normpath(target))
        below = resolved.relative_to("/root/data").parts
        assert resolved == target and (below[0], len(below)) in {("datasets", 3), ("tokenizers", 2)}
