"""data/download_fineweb.py against a local hub: files are verified or absent, nothing is fetched twice, errors help.

HF_ENDPOINT names a local server that implements the part of the hub's protocol that huggingface_hub needs.
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
from conftest import shard_bytes
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import http_backoff
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import TokenStream, UserError

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "download_fineweb.py"
REPO = "willdepueoai/parameter-golf"
NAME = "fineweb10B_sp1024"
SHARD_TOKENS = 150_000
LFS = ".bin", ".model", ".jsonl"
FIRST = f"datasets/datasets/{NAME}/fineweb_train_000000.bin"


# The hub


def make_shard(seed: int, tokens: int = SHARD_TOKENS, **header) -> bytes:
    return shard_bytes(np.random.default_rng(seed).integers(0, 1024, tokens), **header)


def make_manifest(train: int = 3, val: int = 2) -> dict:
    stats = {"files_train": train, "files_val": val, "tokens_train": 1}
    one, vocab = {"files_train": 1, "files_val": 1}, "tokenizers/fineweb_1024_bpe.vocab"
    return {
        "version": 1,
        "datasets": [
            {"name": NAME, "tokenizer_name": "sp_bpe_1024", "vocab_size": 1024, "stats": stats},
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": one},
        ],
        "tokenizers": [
            {"name": "sp_bpe_1024", "model_path": vocab.replace("vocab", "model"), "vocab_path": vocab},
            {"name": "bytes", "path": "tokenizers/fineweb_pure_byte_260.json", "vocab_size": 260},
        ],
    }


def make_repo() -> dict[str, bytes]:
    """Path -> content of a small repository; manifest and .vocab are files of git, the others LFS."""
    datasets, tokenizers = "datasets/datasets", "datasets/tokenizers"
    files = {f"{datasets}/{NAME}/fineweb_train_{i:06d}.bin": make_shard(i) for i in range(3)}
    files |= {f"{datasets}/{NAME}/fineweb_val_{i:06d}.bin": make_shard(10 + i) for i in range(2)}
    files |= {f"{datasets}/fineweb10B_byte260/fineweb_{s}_000000.bin": make_shard(20, 500) for s in ("train", "val")}
    files[f"{tokenizers}/fineweb_1024_bpe.model"] = random.Random(0).randbytes(20_000)
    files[f"{tokenizers}/fineweb_1024_bpe.vocab"] = "<unk>\t0\n\u2581the\t-1\n".encode()
    files[f"{tokenizers}/fineweb_pure_byte_260.json"] = b'{"vocab_size": 260}\n'
    return files | {"datasets/manifest.json": json.dumps(make_manifest()).encode()}


@functools.cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.cache
def git_oid(data: bytes) -> str:
    """The hash that `git hash-object` prints."""
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        status, headers, body = self.server.respond(unquote(urlsplit(self.path).path))
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


class Hub(ThreadingHTTPServer):
    """A hub with one repository. Keeping and resuming connections is left to the library's own tests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files = REPO, make_repo()
        self.content = {}  # path -> what is sent instead of the bytes that the listing describes
        self.status = {}  # part of a URL -> (status, headers, body) of the response
        self.entry = {}  # path -> what the listing has instead
        self.log = []  # requested paths
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def commit(self) -> str:
        return git_oid(repr(sorted((path, sha256(data)) for path, data in self.files.items())).encode())

    def publish(self, manifest):
        self.files["datasets/manifest.json"] = json.dumps(manifest).encode()

    def fetched(self) -> list[str]:
        """Names of the files requested since the last `log.clear()`, except the manifest."""
        return sorted({Path(path).name for path in self.log if "/resolve/" in path} - {"manifest.json"})

    def respond(self, path: str) -> tuple[int, dict, bytes]:
        """Status, headers and body of the response."""
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
        etag = sha256(self.files[name]) if name.endswith(LFS) else git_oid(self.files[name])
        return 200, {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"'}, self.content.get(name, self.files[name])

    def describe(self, path: str) -> dict:
        """The listing's entry for a file."""
        data = self.files[path]
        lfs = {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}} if path.endswith(LFS) else {}
        entry = {"rfilename": path, "size": len(data), "blobId": git_oid(data)}
        return entry | lfs | self.entry.get(path, {})


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


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
    has ended. Returns returncode, stdout and stderr. `free` is the simulated free disk space. Retries do not wait."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MATCHED_"))]:
        monkeypatch.delenv(name)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    read_before = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    for name, value in (read_before | {"HF_TOKEN_PATH": str(tmp_path / "none")}).items():
        monkeypatch.setattr(constants, name, value)
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
            close_session()  # it keeps the environment of its first request
            code = script.main([*out, *options])
            for thread in set(threading.enumerate()) - before:
                if "ThreadPool" in thread.name:
                    thread.join(timeout=10)
                    assert not thread.is_alive()
        captured = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

    return start


def expected_files(hub: Hub, train: int = 3) -> dict[str, bytes]:
    """Local path -> content after a download of sp1024."""
    files = {path.removeprefix("datasets/"): data for path, data in hub.files.items()}
    left_out = {f"datasets/{NAME}/fineweb_train_{number:06d}.bin" for number in range(train, 10)}
    ours = {name for name in files if name.startswith(f"datasets/{NAME}/") or "fineweb_1024_bpe" in name}
    return {name: files[name] for name in ours - left_out}


def snapshot(root: Path) -> dict[str, bytes]:
    """Local path -> content of everything below the data root except record, lock and files not yet in place."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".part"]
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("downloads/fineweb")}


def assert_done(done, root: Path, expected: dict[str, bytes], *said):
    assert done.returncode == 0, done.stderr
    assert snapshot(root) == expected
    for words in said:
        assert words in done.stdout, done.stdout


def assert_error(done, *words):
    """Standard error is one message that contains these words."""
    assert done.returncode == 2, done.stdout + done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in message, done.stderr


# A download


def test_a_fresh_download_is_what_the_hub_has_and_the_trainer_reads_it(hub, run, root):
    done = run()
    knobs = f"DATA_PATH={root}/datasets/{NAME} TOKENIZER_PATH={root}/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024"
    said = ["3 of 3 training shards, all 2 of validation (--train-shards 80 is more than there are)"]
    said += [f"{REPO} at commit {hub.commit}", "0 of 7 files are in place", f"next: {knobs} python train_gpt.py"]
    assert_done(done, root, expected_files(hub), *said)
    assert done.stderr == ""
    for split in ("train", "val"):
        stream = TokenStream(str(root / "datasets" / NAME), split, 1024)
        published = [data[1024:] for path, data in sorted(hub.files.items()) if f"{NAME}/fineweb_{split}" in path]
        assert stream.read(0, len(stream)).tobytes() == b"".join(published)
    kept = [path for path in (root / "downloads").rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 10_000 for path in kept), "stored a second time"


def test_more_shards_come_on_top_nothing_comes_twice_and_validation_is_never_cut(hub, run, root):
    for asked, fetched, there in [(1, 5, 1), (2, 1, 2), (2, 0, 2), (0, 0, 2)]:
        times = {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")}
        hub.log.clear()
        done = run("--train-shards", str(asked))
        assert_done(done, root, expected_files(hub, train=there))
        assert len(hub.fetched()) == fetched and times.items() <= {p: p.stat().st_mtime_ns for p in times}.items()
    assert len(hub.log) <= 3 and done.stdout.count("is here from before and whole; the trainer reads it too") == 2


@pytest.mark.parametrize("variant", ["byte260", "fineweb10B_byte260"])
def test_another_variant_by_short_or_full_name(hub, run, root, variant):
    done = run("--variant", variant)
    assert done.returncode == 0 and "VOCAB_SIZE=260" in done.stdout
    names = [f"datasets/fineweb10B_byte260/fineweb_{split}_000000.bin" for split in ("train", "val")]
    assert sorted(snapshot(root)) == [*names, "tokenizers/fineweb_pure_byte_260.json"]


@pytest.mark.parametrize("prefix", ["", "a/b"])
def test_another_repository_and_prefix(hub, run, root, prefix):
    hub.repo, expected = "someone/golf-data", expected_files(hub, train=1)
    hub.files = {f"{prefix}/{path.removeprefix('datasets/')}".strip("/"): data for path, data in hub.files.items()}
    environ = {"MATCHED_FINEWEB_REPO_ID": hub.repo, "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": prefix}
    assert_done(run("--train-shards", "1", **environ), root, expected)


def test_the_text_itself_and_a_vocab_file_that_only_the_manifest_has(hub, run, root):
    hub.files["datasets/docs_selected.jsonl"] = docs = b'{"text": "x"}\n' * 5000
    del hub.files["datasets/tokenizers/fineweb_1024_bpe.vocab"]
    expected = expected_files(hub, train=0) | {"downloads/docs_selected.jsonl": docs}
    assert_done(run("--with-docs", "--train-shards", "0"), root, expected, "lacks tokenizers/fineweb_1024_bpe.vocab")


# Interrupted, damaged, changed


@pytest.mark.parametrize("answer", [(503, {}, b""), (200, {"Content-Length": 301_024}, b"")])
def test_a_server_in_trouble_ends_the_run_and_the_next_one_goes_on(hub, run, root, answer):
    hub.status["/" + FIRST] = answer
    assert_error(run(), "start the same command again")
    hub.status.clear()
    hub.log.clear()
    assert_done(run(), root, expected_files(hub))
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
    assert_done(run(), root, expected_files(hub), f"{len(left)} of 7 files are in place")
    assert len(hub.fetched()) == 7 - len(left)


def test_two_downloads_into_one_folder_do_not_mix(run, root):
    assert run("--train-shards", "0").returncode == 0
    with filelock.FileLock(root / "downloads" / "fineweb.lock"):
        assert_error(run(), "another download", str(root), "fineweb.lock")
    assert run().returncode == 0


def flip(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


DAMAGES = {"empty": lambda data: b"", "a flipped bit": flip, "cut": lambda data: data[:-2]}
DAMAGES |= {"an error page": lambda data: b"<html>404</html>", "too long": lambda data: data + b"\0\0"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_arrives_or_becomes_damaged_is_replaced_whatever_its_size_and_time(hub, run, root, damage):
    hub.content[FIRST] = DAMAGES[damage](hub.files[FIRST])
    done = run()
    assert_error(done, FIRST.removeprefix("datasets/"), "start the command again")
    if damage == "a flipped bit":
        assert_error(done, sha256(hub.files[FIRST]), sha256(hub.content[FIRST]), "was not put in place")
    assert snapshot(root).items() <= expected_files(hub).items()
    hub.content.clear()
    assert_done(run(), root, expected_files(hub))
    damaged = ["fineweb_1024_bpe.model", "fineweb_1024_bpe.vocab", "fineweb_val_000001.bin"]
    for name in damaged:
        (path,) = root.rglob(name)
        stat, data = path.stat(), path.read_bytes()
        path.write_bytes(b"\0" + data[1:] if name.endswith("vocab") else DAMAGES[damage](data))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    hub.log.clear()
    done = run()
    assert_done(done, root, expected_files(hub))
    assert hub.fetched() == damaged and done.stdout.count("it is replaced") == 3


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
    assert_done(run(), root, expected_files(hub, train=4), "4 of 4 training shards")
    assert hub.fetched() == ["fineweb_train_000003.bin", "fineweb_val_000001.bin"]
    assert hub.commit in run(HF_HUB_OFFLINE="1").stdout, "the record is that of the new version"


def test_a_manifest_that_counts_more_shards_than_there_are(hub, run):
    hub.publish(make_manifest(train=5))
    assert_error(run(), "fineweb_train_000003.bin", "--train-shards 3")
    assert run("--train-shards", "3").returncode == 0


# Disk and network


def test_too_little_disk_is_said_before_anything_is_fetched(hub, run, root):
    needed = sum(map(len, expected_files(hub).values()))
    words = [f"{needed:,} bytes are missing", f"{needed - 1:,} free", "--train-shards", "--out"]
    assert_error(run(free=needed - 1), *words)
    assert not hub.fetched() and not snapshot(root)
    assert run(free=needed).returncode == 0
    assert run(free=0).returncode == 0, "nothing is missing"


def test_offline_with_everything_here_is_proved_by_the_record(hub, run, root):
    one = "--train-shards", "1"
    assert run(*one).returncode == 0
    commit = hub.commit
    hub.log.clear()
    done = run(*one, HF_HUB_OFFLINE="1")
    assert_done(done, root, expected_files(hub, train=1), "offline", commit, "5 of 5 files are in place")
    assert not hub.log
    assert_error(run(HF_HUB_OFFLINE="1"), "2 files of 602,048 bytes are missing", "fineweb_train_000001.bin", "connect")
    (path,) = root.rglob("fineweb_val_000000.bin")
    path.write_bytes(flip(path.read_bytes()))
    assert_error(run(*one, HF_HUB_OFFLINE="1"), "1 files", "fineweb_val_000000.bin")


def test_a_hub_that_cannot_be_reached_is_offline(hub, run, root):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert_error(run(HF_ENDPOINT=nobody), nobody, "no earlier run", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    assert run().returncode == 0
    assert_done(run(HF_ENDPOINT=nobody), root, expected_files(hub), "offline")
    hub.status["/api/"] = (503, {}, b"")
    assert_done(run(), root, expected_files(hub), "503")
    (record,) = root.glob("downloads/fineweb--*.json")
    for damaged in ("", "{}", "[1]", '{"commit": "x", "files": {"a": [1]}, "manifest": {}}'):
        record.write_text(damaged)
        assert_error(run(HF_ENDPOINT=nobody), "no earlier run")


# A refused request changes nothing


def answers(status: int, body=b"", part="/api/datasets/", **headers):
    """The hub answers matching requests like this."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda hub: hub.status.update({part: (status, headers, body)})


def has(data: bytes | None, path=FIRST):
    """The repository has this file, or lacks it."""
    return lambda hub: hub.files.pop(path) if data is None else hub.files.update({path: data})


def lists(**entry):
    return lambda hub: hub.entry.update({FIRST: entry})


def lfs(digest, size=1):
    return lists(lfs={"sha256": digest, "size": size, "pointerSize": 1})


def sends_another_manifest(hub):
    hub.content[MANIFEST] = hub.files[MANIFEST].replace(b"sp_bpe", b"sp_BPE")


def nothing(hub):
    """The hub is unchanged; the mistake is the user's."""


ODD_COMMIT = b'{"id": "x", "sha": "../../x", "siblings": [{"rfilename": "a", "size": 1, "blobId": "%s"}]}' % (b"0" * 40)
ID, PREFIX, VARIANTS = "MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "fineweb10B_byte260, " + NAME
PLACED, SHARD, MANIFEST = "was not put in place", FIRST.removeprefix("datasets/"), "datasets/manifest.json"
REFUSALS = [  # change to the hub; options and environment of the command; the message
    (answers(401, b'{"error": "Invalid username or password."}'), [], {}, ["401", ID, "HF_TOKEN"]),
    (answers(403, X_Error_Code="GatedRepo"), [], {}, ["403", "gated", "HF_TOKEN"]),
    (answers(403, X_Error_Code="GatedRepo", part=FIRST), [], {}, [FIRST, "403", "HF_TOKEN"]),
    (answers(404, X_Error_Code="RepoNotFound"), [], {}, ["404", f"{ID}={REPO}"]),
    (answers(400), [], {}, ["400", "HF_ENDPOINT"]),
    (answers(200, b"<html>log in</html>", Content_Type="text/html"), [], {}, ["hub", "HF_ENDPOINT", "log-in page"]),
    (answers(200, b"[1, 2]"), [], {}, ["hub", "HF_ENDPOINT"]),
    (answers(200, ODD_COMMIT), [], {}, ["../../x", "HF_ENDPOINT"]),
    (lfs("../../x"), [], {}, ["HF_ENDPOINT"]),
    (lfs("0" * 64, "1"), [], {}, ["HF_ENDPOINT"]),
    (lfs("0" * 64, -1), [], {}, ["HF_ENDPOINT"]),
    (lfs(None), [], {}, ["HF_ENDPOINT"]),
    (lists(lfs=None, blobId="x"), [], {}, ["HF_ENDPOINT"]),
    (lists(lfs=None, size=None), [], {}, ["HF_ENDPOINT"]),
    (lists(rfilename=3), [], {}, ["HF_ENDPOINT"]),
    (has(make_shard(0, magic=20240521)), [], {}, [SHARD, "header [20240521, 1, 150000]", PLACED]),
    (has(b""), [], {}, [SHARD, "0 bytes", PLACED]),
    (sends_another_manifest, [], {}, [MANIFEST, "has the hash", git_oid(json.dumps(make_manifest()).encode())]),
    (has(None, MANIFEST), [], {}, [MANIFEST, f"{PREFIX}=datasets"]),
    (has(json.dumps(make_manifest(val=3)).encode(), MANIFEST), [], {}, ["fineweb_val_000002.bin"]),
    (nothing, [], {PREFIX: "nowhere"}, [f"{PREFIX}=nowhere"]),
    (nothing, ["--variant", "sp8192"], {}, ["sp8192", REPO, f"{VARIANTS}; ", f"{ID}=kevclark/"]),
    (nothing, ["--variant", "sp4096"], {}, ["sp4096", VARIANTS]),
    (nothing, ["--with-docs"], {}, ["--with-docs", REPO, "docs_selected.jsonl"]),
    (nothing, ["--train-shards", "-1"], {}, ["--train-shards -1", "0"]),
    (nothing, ["--workers", "0"], {}, ["--workers 0", "1 to 64"]),
    (nothing, ["--out", os.devnull], {}, ["--out DIR"]),
    (nothing, [], {"HF_ENDPOINT": "huggingface.co"}, ["HF_ENDPOINT='huggingface.co'", "https://"]),
    (nothing, [], {ID: "a/b/c"}, [f"{ID}='a/b/c'", "owner/name"]),
    (nothing, [], {PREFIX: "a/../.."}, [f"{PREFIX}='a/../..'"]),
    (nothing, [], {"NO_PROXY": "", "all_proxy": "socks5://localhost:1"}, ["all_proxy", "socks5"]),
    (nothing, [], {"NO_PROXY": "", "HTTPS_PROXY": "odd://localhost:1"}, ["HTTPS_PROXY", "odd"]),
]


def short(value) -> str:
    """For a test's name: without the address of a function, which differs between two workers."""
    return getattr(value, "__name__", str(value))[:40]


@pytest.mark.parametrize("change, options, environ, words", REFUSALS, ids=short)
def test_a_refusal_is_one_message_that_says_what_to_do(hub, run, root, change, options, environ, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)  # as if it was not installed
    assert run("--train-shards", "0").returncode == 0
    before = snapshot(root)
    change(hub)
    done = run(*options, **environ)
    assert_error(done, *words)
    assert ("kevclark" in done.stderr) == ("sp8192" in options)
    assert before.items() <= snapshot(root).items() and not [*root.rglob(Path(FIRST).name)]


def test_without_the_library_or_with_variables_that_it_cannot_read(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("")  # a version that lacks what the script needs
    for name, value, *words in (
        ("HF_HUB_DOWNLOAD_TIMEOUT", "long", "'long'", "HF_HUB_DOWNLOAD_TIMEOUT"),
        ("PYTHONPATH", str(tmp_path), "huggingface-hub", "pip install -r requirements.txt"),
    ):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
        done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, check=False)
        assert_error(done, *words)


# A malicious repository


ODD = ["..", ".", "a", "a/b", "../a", "/a", "a\\b", "C:", "a\0", "", "tokenizers/t", NAME]
OTHERS = st.text(max_size=4) | st.none() | st.integers() | st.lists(st.text(max_size=2), max_size=2)
NAMES = st.sampled_from(ODD) | OTHERS
COUNTS = st.integers(-1, 2) | NAMES
STATS = st.fixed_dictionaries({"files_train": COUNTS, "files_val": COUNTS}) | NAMES
FIELDS = dict.fromkeys(["name", "tokenizer_name", "model_path", "path"], NAMES)
ENTRIES = st.fixed_dictionaries(FIELDS | {"stats": STATS})


@settings(max_examples=200)
@given(st.lists(ENTRIES, max_size=3), st.lists(ENTRIES, max_size=3), st.data())
def test_no_manifest_leads_out_of_the_data_root(script, datasets, tokenizers, data):
    """Whatever its content and the repository's files: a UserError, or files in their folders."""

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
    except UserError:
        return
    assert len(plan.wanted) == len({remote.path for remote in plan.wanted.values()}), "two files never have one place"
    for target in plan.wanted:
        resolved = Path(os.path.normpath(target))
        below = resolved.relative_to("/root/data").parts
        assert resolved == target and (below[0], len(below)) in {("datasets", 3), ("tokenizers", 2)}
