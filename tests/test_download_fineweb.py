"""data/download_fineweb.py against a hub made here: proved or absent, resumed, nothing fetched twice, errors that help.

The script runs as its users run it, in a process of its own with HF_ENDPOINT set to a local server, which speaks the
part of the hub's protocol that is needed; that huggingface_hub's own download understands it too is a test below.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import filelock
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import TokenStream

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "download_fineweb.py"
REPO = "willdepueoai/parameter-golf"
NAME = "fineweb10B_sp1024"
SHARD_TOKENS = 150_000
CHUNK = 100_000  # bytes of a shard of 301,024 that arrive before its connection is cut


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
    """A hub of one repository. Large files are answered with a redirect to a second server, as the real one does."""

    def __init__(self):
        self.repo, self.page, self.files = REPO, 1000, make_repo()
        self.content = {}  # path -> what is sent instead of the bytes that the listing describes
        self.status = {}  # what a URL contains -> (status, headers, body) that answer it
        self.entry = {}  # path -> what the listing says instead
        self.cuts = {}  # path -> how many answers end after `chunk` bytes
        self.chunk = CHUNK
        self.reset = False  # whether a connection is cut by a reset, and not by its end
        self.stalls = set()  # paths whose answers stop after `chunk` bytes until `release`
        self.release = threading.Event()
        self.ranges = True
        self.log = []  # (path asked for, Range, Authorization)
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self.handler()) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        hub, cdn = (server.server_port for server in self.servers)
        self.url, self.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"  # two hosts, as theirs are

    def close(self):
        self.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def commit(self) -> str:
        return git_oid(repr(sorted((path, sha256(data)) for path, data in self.files.items())).encode())

    def publish(self, manifest: dict):
        self.files["datasets/manifest.json"] = json.dumps(manifest).encode()

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for since the last `log.clear()`, but for the manifest."""
        names = [Path(path).name for path, *_ in self.log if "/resolve/" in path]
        return sorted(name for name in names if name != "manifest.json")

    def ranges_of(self, name: str) -> list[str | None]:
        return [asked for path, asked, _ in self.log if path.startswith("/cdn/") and path.endswith(name)]

    def handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                url = urlsplit(self.path)
                path = unquote(url.path)
                if path.startswith(("/api/datasets/", "/datasets/", "/cdn/")):  # the library asks for more, on its own
                    hub.log.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
                for part, answer in hub.status.items():
                    if part in path:
                        return self.answer(*answer)
                api, resolve = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/{hub.commit}/"
                if path in (api, f"{api}/revision/main"):
                    return self.answer_json({"id": hub.repo, "sha": hub.commit, "siblings": []})
                if path.startswith(f"{api}/tree/{hub.commit}"):
                    return self.answer_tree(path.removeprefix(f"{api}/tree/{hub.commit}").strip("/"), url.query)
                if path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
                    return self.answer_resolve(path.removeprefix(resolve))
                if path.startswith("/cdn/") and path.removeprefix("/cdn/") in hub.files:
                    return self.answer_content(path.removeprefix("/cdn/"), {})
                code = "EntryNotFound" if path.startswith((api, resolve)) else "RepoNotFound"
                self.answer(404, {"X-Error-Code": code, "X-Error-Message": code}, b"")

            def answer(self, status: int, headers: dict, body: bytes):
                self.send_response(status)
                for key, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def answer_json(self, value, headers=()):
                self.answer(200, {"Content-Type": "application/json"} | dict(headers), json.dumps(value).encode())

            def answer_tree(self, prefix: str, query: str):
                start, query = f"{prefix}/" if prefix else "", parse_qs(query)
                entries = [hub.describe(path) for path in sorted(hub.files) if path.startswith(start)]
                if not entries:
                    return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
                folders = {str(Path(path).parent) for path in hub.files if path.startswith(start)} - {prefix, "."}
                entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
                at = int(query.get("cursor", ["0"])[0])
                more = f"{hub.url}{urlsplit(self.path).path}?recursive=true&cursor={at + hub.page}"
                headers = {"Link": f'<{more}>; rel="next"'} if at + hub.page < len(entries) else {}
                self.answer_json(entries[at : at + hub.page], headers)

            def answer_resolve(self, path: str):
                data, headers = hub.files[path], {"X-Repo-Commit": hub.commit}
                if not hub.is_lfs(path):
                    return self.answer_content(path, headers | {"ETag": f'"{git_oid(data)}"'})
                headers |= {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{sha256(data)}"', "X-Xet-Hash": "ab" * 32}
                self.answer(302, headers | {"Location": f"{hub.cdn}/cdn/{path}"}, b"")

            def answer_content(self, path: str, headers: dict):
                data, asked = hub.content.get(path, hub.files[path]), self.headers.get("Range")
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and hub.ranges else 0
                if start >= len(data) > 0:
                    return self.answer(416, headers, b"")
                if asked and hub.ranges:
                    headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                self.send_response(206 if asked and hub.ranges else 200)
                for key, value in (headers | {"Content-Length": len(data) - start, "Accept-Ranges": "bytes"}).items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command == "HEAD":
                    return
                cut, stall = hub.cuts.get(path, 0) > 0, path in hub.stalls
                hub.cuts[path] = hub.cuts.get(path, 0) - cut
                try:
                    self.wfile.write(data[start : start + hub.chunk] if cut or stall else data[start:])
                    if cut and hub.reset:
                        linger = struct.pack("ii", 1, 0)  # close() resets
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        self.wfile = io.BytesIO()
                        self.connection.close()
                    if stall:
                        self.wfile.flush()
                        hub.release.wait()
                except ConnectionError:
                    pass  # the other side was killed

        return Handler

    def is_lfs(self, path: str) -> bool:
        return path.endswith((".bin", ".model", ".jsonl"))

    def describe(self, path: str) -> dict:
        """The tree's entry of a file."""
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if self.is_lfs(path):
            entry["oid"] = git_oid(b"pointer to " + data)
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entry["xetHash"] = "ab" * 32
        return entry | self.entry.get(path, {})


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("download_fineweb", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, hub, root, tmp_path, monkeypatch, capfd):
    """Function: run the script in this process, with these options and environment variables, until its last thread
    has ended; returncode, stdout and stderr. `free` is what the disk is said to have. Waits between retries are left
    out."""
    for name in [name for name in os.environ if name.startswith(("HF_", "MATCHED_"))]:
        monkeypatch.delenv(name)
    resolve = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from the environment before this test began
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for module in (script, sys.modules[http_backoff.__module__]):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))

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
            code = script.main([*out, *options])
        for thread in set(threading.enumerate()) - before:
            if "worker" in thread.name:
                thread.join(timeout=10)
                assert not thread.is_alive()
        captured = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

    return start


@pytest.fixture
def environment(hub, tmp_path):
    """The environment of a process of its own: this hub, nothing of the user's."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MATCHED_"))}
    return inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*", "PYTHONUTF8": "1"}


@pytest.fixture
def launch(environment, root):
    """Function: the script as its users run it, in a process of its own; the Popen."""

    def start(*options, **environ):
        line = [sys.executable, str(SCRIPT), "--out", str(root), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(line, env=environment | environ, **pipes, text=True, encoding="utf-8")

    return start


def finish(process) -> SimpleNamespace:
    stdout, stderr = process.communicate(timeout=60)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


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
    """Local path -> content of everything below the data root but record and lock."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    own = ("downloads/fineweb--", "downloads/fineweb.lock")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(own)}


def assert_error(done, *words, code=2):
    """One message on standard error, with these words in it."""
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


SHARDS = [f"fineweb_train_{i:06d}.bin" for i in range(3)] + [f"fineweb_val_{i:06d}.bin" for i in range(2)]
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
    assert not any(path.stat().st_size > 1000 for path in (tmp_path / "hf").rglob("*")), "stored a second time"


def test_a_second_run_fetches_nothing(hub, run, root):
    assert run().returncode == 0
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")}
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and "7 of 7 files are in place" in done.stdout
    paths = [path for path, *_ in hub.log]
    commit = hub.commit
    assert paths == [
        f"/api/datasets/{REPO}",
        f"/api/datasets/{REPO}/tree/{commit}/datasets",
        f"/datasets/{REPO}/resolve/{commit}/datasets/manifest.json",
    ]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")} == times


def test_a_listing_of_many_pages_is_read_to_its_end(hub, run, root):
    hub.page = 2
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)
    assert sum("/tree/" in path for path, *_ in hub.log) > 5


def test_more_shards_come_on_top_and_validation_is_never_cut(hub, run, root):
    for asked, fetched, there in [(1, 5, 1), (2, 1, 2), (0, 0, 2)]:
        hub.log.clear()
        done = run("--train-shards", str(asked))
        assert done.returncode == 0 and len(hub.fetched()) == fetched
        assert snapshot(root) == expected_files(hub, train=there)
    assert "2 more shards are here from before and whole; the trainer reads them too" in done.stdout


def test_validation_alone(hub, run, root):
    assert run("--train-shards", "0").returncode == 0
    assert snapshot(root) == expected_files(hub, train=0)


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


def test_the_text_itself(hub, run, root):
    assert_error(run("--with-docs"), "--with-docs", REPO, "docs_selected.jsonl")
    hub.files["datasets/docs_selected.jsonl"] = b'{"text": "x"}\n' * 5000
    hub.files["datasets/docs_selected.source_manifest.json"] = b"{}\n"
    assert run("--with-docs", "--train-shards", "0").returncode == 0
    names = ["docs_selected.jsonl", "docs_selected.source_manifest.json"]
    docs = {f"downloads/{name}": hub.files[f"datasets/{name}"] for name in names}
    assert snapshot(root) == expected_files(hub, train=0) | docs


def test_a_vocab_file_that_only_the_manifest_has_is_no_obstacle(hub, run, root):
    del hub.files["datasets/tokenizers/fineweb_1024_bpe.vocab"]
    done = run("--train-shards", "0")
    assert done.returncode == 0 and "lacks tokenizers/fineweb_1024_bpe.vocab" in done.stdout
    assert snapshot(root) == expected_files(hub, train=0)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, run):
    assert run("--train-shards", "1", HF_TOKEN="hf_secret").returncode == 0
    asked = {path.startswith("/cdn/"): set() for path, *_ in hub.log}
    for path, _, authorization in hub.log:
        asked[path.startswith("/cdn/")].add(authorization)
    assert asked == {False: {"Bearer hf_secret"}, True: {None}}


def test_huggingface_hubs_own_download_understands_this_hub(hub, environment, tmp_path):
    """The oracle of the server above: the library lists and downloads from it, to the same bytes."""
    code = "import sys; from huggingface_hub import snapshot_download as get\n"
    code += f"get({REPO!r}, repo_type='dataset', local_dir=sys.argv[1])"
    folder, env = tmp_path / "snapshot", environment | {"HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=env, check=True, capture_output=True, timeout=60)
    assert {path: (folder / path).read_bytes() for path in hub.files} == hub.files


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted
# ----------------------------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_taken_up_where_it_ended(hub, run, root):
    hub.cuts[FIRST] = 2
    assert run().returncode == 0
    assert hub.ranges_of("train_000000.bin") == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]
    assert snapshot(root) == expected_files(hub)


def test_a_connection_may_be_cut_ever_so_often_if_each_brings_something(hub, run, root):
    hub.cuts[FIRST], hub.chunk = 15, 20_000
    assert run().returncode == 0
    assert hub.ranges_of("train_000000.bin") == [None, *(f"bytes={20_000 * i}-" for i in range(1, 16))]
    assert snapshot(root) == expected_files(hub)


def test_a_connection_that_is_reset_is_made_again(hub, run, root):
    hub.cuts[FIRST], hub.reset = 2, True
    assert run().returncode == 0
    assert len(hub.ranges_of("train_000000.bin")) == 3
    assert snapshot(root) == expected_files(hub)


def test_a_server_in_trouble_ends_the_run_and_the_next_one_goes_on(hub, run, root):
    hub.status["/cdn/" + FIRST] = (503, {}, b"")
    done = run()
    assert done.returncode == 2 and "503" in done.stderr and "start the same command again" in done.stderr
    hub.status.clear()
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)


def test_a_server_without_ranges_sends_the_file_anew(hub, run, root):
    hub.cuts[FIRST], hub.ranges = 1, False
    assert run().returncode == 0
    assert hub.ranges_of("train_000000.bin") == [None, f"bytes={CHUNK}-"]
    assert snapshot(root) == expected_files(hub)


def test_a_connection_that_stays_dead_ends_the_run_and_the_next_one_goes_on(hub, run, root):
    hub.cuts[FIRST] = 1
    hub.status["/cdn/" + FIRST] = (200, {"Content-Length": 301_024}, b"")  # which promises more than it sends
    done = run()
    assert_error(done, "fineweb_train_000000.bin", hub.url, "start the same command again")
    assert len(hub.ranges_of("train_000000.bin")) == 6
    hub.status.clear()
    before = hub.fetched()
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)
    assert hub.fetched().count("fineweb_val_000000.bin") == before.count("fineweb_val_000000.bin") == 1


@pytest.fixture
def stalled(hub, launch, root):
    """A run whose first training shard has stopped after CHUNK bytes, all other files being there."""

    def sizes(pattern):
        for path in root.rglob(pattern):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                yield path.stat().st_size

    hub.stalls.add(FIRST)
    process = launch()
    deadline = time.monotonic() + 60
    while [*sizes("*.part")] != [CHUNK] or len([*sizes("*/fineweb_*_*")]) != 7:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def assert_goes_on(hub, launch, root):
    left = snapshot(root)
    whole = {name: data for name, data in left.items() if not name.endswith(".part")}
    assert whole == {name: data for name, data in expected_files(hub).items() if name in whole} and len(whole) == 6
    hub.stalls.clear()
    hub.release.set()
    hub.log.clear()
    done = finish(launch())
    assert done.returncode == 0 and "6 of 7 files are in place" in done.stdout
    assert hub.fetched() == ["fineweb_train_000000.bin"] and hub.ranges_of("train_000000.bin") == [f"bytes={CHUNK}-"]
    assert snapshot(root) == expected_files(hub)


def test_a_killed_run_started_again_ends_with_the_same_files(hub, launch, root, stalled):
    stalled.kill()
    stalled.wait()
    assert_goes_on(hub, launch, root)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_does_not_wait_for_the_server_and_says_how_to_go_on(hub, launch, root, stalled):
    stalled.send_signal(signal.SIGINT)
    _, stderr = stalled.communicate(timeout=30)
    assert stalled.returncode == 130
    assert stderr == "interrupted; what has arrived is kept: start the same command again to go on\n"
    assert_goes_on(hub, launch, root)


def test_two_downloads_into_one_folder_do_not_mix(hub, run, root):
    assert run("--train-shards", "0").returncode == 0
    with filelock.FileLock(root / "downloads" / "fineweb.lock"):
        assert_error(run(), "another download", str(root), "fineweb.lock")
    assert run().returncode == 0


def test_what_another_version_left_is_not_continued(hub, run, root):
    hub.status["/cdn/" + FIRST] = (404, {}, b"")
    folder = root / "datasets" / NAME
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin.0123456789abcdef.part").write_bytes(b"another version")
    assert run().returncode == 2
    hub.status.clear()
    hub.log.clear()
    assert run().returncode == 0
    assert hub.ranges_of("train_000000.bin") == [None]
    assert snapshot(root) == expected_files(hub), "and what it left is gone"


# ----------------------------------------------------------------------------------------------------------------------
# Nothing unproved is in place
# ----------------------------------------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


DAMAGES = {
    "empty": lambda data: b"",
    "a flipped bit": flip,
    "cut": lambda data: data[:-2],
    "too long": lambda data: data + b"\0\0",
    "an error page": lambda data: b"<html>404</html>",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_local_file_is_replaced_whatever_its_size_and_time(hub, run, root, damage):
    assert run().returncode == 0
    for name in ("fineweb_val_000001.bin", "fineweb_1024_bpe.model"):
        (path,) = root.rglob(name)
        stat = path.stat()
        path.write_bytes(damage(path.read_bytes()))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    hub.log.clear()
    done = run()
    assert done.returncode == 0 and done.stdout.count("it is replaced") == 2
    assert hub.fetched() == ["fineweb_1024_bpe.model", "fineweb_val_000001.bin"]
    assert snapshot(root) == expected_files(hub)


def test_a_damaged_file_of_git_is_replaced_too(hub, run, root):
    assert run("--train-shards", "0").returncode == 0
    (path,) = root.rglob("*.vocab")
    path.write_bytes(path.read_bytes().replace(b"the", b"teh"))
    assert run("--train-shards", "0").returncode == 0
    assert snapshot(root) == expected_files(hub, train=0)


@pytest.mark.parametrize("damage, said", [
    (flip, "arrived damaged"), (DAMAGES["cut"], "416"), (DAMAGES["too long"], "more than its 301024 bytes")
], ids=["bit", "short", "long"])  # fmt: skip
def test_a_file_that_arrives_damaged_is_not_put_in_place(hub, run, root, damage, said):
    hub.content[FIRST] = damage(hub.files[FIRST])
    assert_error(run(), FIRST, said)
    assert "fineweb_train_000000.bin" not in [path.name for path in root.rglob("*.bin")]
    left = {name: data for name, data in snapshot(root).items() if not name.endswith(".part")}
    assert left and left.items() <= expected_files(hub).items()
    hub.content.clear()
    assert run().returncode == 0
    assert snapshot(root) == expected_files(hub)


def test_a_manifest_other_than_the_listing_says_is_refused(hub, run, root):
    hub.content["datasets/manifest.json"] = json.dumps(make_manifest(val=1)).encode()
    right, wrong = (git_oid(files["datasets/manifest.json"]) for files in (hub.files, hub.content))
    assert_error(run(), "datasets/manifest.json", right, wrong)
    assert not root.exists()


def test_a_wrong_hash_is_named(hub, run):
    hub.content[FIRST] = flip(hub.files[FIRST])
    right, wrong = sha256(hub.files[FIRST]), sha256(hub.content[FIRST])
    assert_error(run(), FIRST, right, wrong, "was not put in place")


def test_a_beginning_that_is_bad_is_thrown_away_once(hub, run, root):
    """As a loss of power may leave it: some bytes of the right length, which are not those of the file."""
    folder = root / "datasets" / NAME
    folder.mkdir(parents=True)
    part = folder / f"fineweb_train_000000.bin.{sha256(hub.files[FIRST])[:16]}.part"
    for left in (bytes(CHUNK), bytes(len(hub.files[FIRST])), bytes(10**6)):
        part.write_bytes(left)
        (folder / "fineweb_train_000000.bin").unlink(missing_ok=True)
        assert run("--train-shards", "1").returncode == 0
        assert snapshot(root) == expected_files(hub, train=1)
    hub.content[FIRST] = flip(hub.files[FIRST])
    (folder / "fineweb_train_000000.bin").unlink()
    part.write_bytes(bytes(CHUNK))
    hub.log.clear()
    assert_error(run("--train-shards", "1"), FIRST, "was not put in place")
    assert hub.ranges_of("train_000000.bin") == [f"bytes={CHUNK}-", None], "and not for ever"


@pytest.mark.parametrize("shard, said", [
    (make_shard(0, magic=20240521), "magic 20240521"), (make_shard(0, version=2), "version 2"),
    (make_shard(0, count=SHARD_TOKENS - 1), "149999 tokens"), (make_shard(0, count=-1), "-1 tokens"),
    (make_shard(0)[:1000], "1000 bytes, less than a header"), (b"", "0 bytes, less than a header"),
])  # fmt: skip
def test_a_published_file_that_is_no_shard_is_refused(hub, run, root, shard, said):
    hub.files[FIRST] = shard
    assert_error(run("--train-shards", "1"), FIRST, said, "was not put in place")
    assert not [path for path in root.rglob("fineweb_train_*")]


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


# ----------------------------------------------------------------------------------------------------------------------
# The repository changes
# ----------------------------------------------------------------------------------------------------------------------


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
    assert_error(run(), "counts 5 train shards", "fineweb_train_000003.bin", "--train-shards 3")
    assert not root.exists()
    assert run("--train-shards", "3").returncode == 0
    hub.publish(make_manifest(val=3))
    assert_error(run(), "counts 3 val shards", "fineweb_val_000002.bin")


def test_a_missing_variant_names_what_there_is(hub, run, root):
    done = run("--variant", "sp8192")
    assert_error(done, "sp8192", REPO, "fineweb10B_byte260, fineweb10B_sp1024", "MATCHED_FINEWEB_REPO_ID=kevclark/")
    done = run("--variant", "sp4096")
    assert_error(done, "sp4096", "fineweb10B_byte260, fineweb10B_sp1024")
    assert "kevclark" not in done.stderr and not root.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Disk, network, permission
# ----------------------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_anything_is_fetched(hub, run, root):
    needed = sum(map(len, expected_files(hub).values()))
    done = run(free=needed - 1)
    assert_error(done, f"{needed:,} bytes are missing", f"{needed - 1:,} free", "--train-shards", "--out")
    assert not hub.fetched() and not snapshot(root)
    assert run(free=needed).returncode == 0
    assert run(free=0).returncode == 0, "nothing is missing"
    (path,) = root.rglob("fineweb_val_000000.bin")
    path.write_bytes(b"")
    part = path.with_name(f"{path.name}.{sha256(make_shard(10))[:16]}.part")
    part.write_bytes(make_shard(10)[:CHUNK])
    assert_error(run(free=301_024 - CHUNK - 1), f"{301_024 - CHUNK:,} bytes are missing")
    assert run(free=301_024 - CHUNK).returncode == 0
    assert snapshot(root) == expected_files(hub)


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
    assert not root.exists()
    assert run().returncode == 0
    done = run(HF_ENDPOINT=nobody)
    assert done.returncode == 0 and "offline" in done.stdout
    hub.status["/api/"] = (503, {}, b"")
    done = run()
    assert done.returncode == 0 and "503" in done.stdout
    (record,) = root.glob("downloads/fineweb--*.json")
    for damaged in ("", "{}", "[1]", record.read_text().replace('"sha256"', '"md5"')):
        record.write_text(damaged)
        assert_error(run(HF_ENDPOINT=nobody), "no earlier run")


REFUSALS = {
    "401": ((401, {}, b'{"error": "Invalid username or password."}'), ["401", "MATCHED_FINEWEB_REPO_ID", "HF_TOKEN"]),
    "403": ((403, {"X-Error-Code": "GatedRepo"}, b""), ["403", "gated", "HF_TOKEN"]),
    "404": ((404, {"X-Error-Code": "RepoNotFound"}, b""), ["404", "MATCHED_FINEWEB_REPO_ID=" + REPO]),
    "400": ((400, {}, b""), ["400", "HF_ENDPOINT"]),
    "html": ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), ["hub", "HF_ENDPOINT", "log-in page"]),
    "list": ((200, {}, b"[1, 2]"), ["hub", "HF_ENDPOINT"]),
    "no commit": ((200, {}, b'{"id": "x", "sha": "../../x"}'), ["../../x", "HF_ENDPOINT"]),
}


@pytest.mark.parametrize("answer, words", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_says_what_to_do(hub, run, root, answer, words):
    assert run("--train-shards", "0").returncode == 0
    before = snapshot(root)
    hub.status["/api/datasets/"] = answer
    assert_error(run(), *words)
    assert snapshot(root) == before


def test_a_gated_file(hub, run):
    hub.status[f"/resolve/{hub.commit}/{FIRST}"] = (403, {"X-Error-Code": "GatedRepo"}, b"")
    assert_error(run(), FIRST, "403", "HF_TOKEN")


def test_a_repository_without_the_prefix_or_the_manifest(hub, run):
    assert_error(run(MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="nowhere"), "404", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=nowhere")
    del hub.files["datasets/manifest.json"]
    assert_error(run(), "datasets/manifest.json", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX=datasets")


MISTAKES = [
    (["--train-shards", "-1"], {}, ["--train-shards -1", "0"]),
    (["--workers", "0"], {}, ["--workers 0", "1 to 64"]),
    ([], {"HF_ENDPOINT": "huggingface.co"}, ["HF_ENDPOINT='huggingface.co'", "https://"]),
    ([], {"MATCHED_FINEWEB_REPO_ID": "a/b/c"}, ["MATCHED_FINEWEB_REPO_ID='a/b/c'", "owner/name"]),
    ([], {"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "a/../.."}, ["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX='a/../..'"]),
    (["--out", os.devnull], {}, ["--out DIR"]),
]


@pytest.mark.parametrize("options, environ, words", MISTAKES, ids=[str(options or env) for options, env, _ in MISTAKES])
def test_a_mistake_is_one_message(run, root, options, environ, words):
    assert_error(run(*options, **environ), *words)
    assert not root.exists()


def test_without_the_library_the_message_says_how_to_get_it(launch, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("")  # a version without what is needed
    done = finish(launch(PYTHONPATH=str(tmp_path)))
    assert_error(done, "huggingface-hub", "pip install -r requirements.txt")


def test_variables_that_the_library_cannot_read(launch):
    assert_error(finish(launch(HF_HUB_DOWNLOAD_TIMEOUT="long")), "'long'", "HF_HUB_DOWNLOAD_TIMEOUT")


def test_the_offline_variable_works(launch, hub, run, root):
    assert run("--train-shards", "0").returncode == 0
    hub.log.clear()
    done = finish(launch("--train-shards", "0", HF_HUB_OFFLINE="1"))
    assert done.returncode == 0 and "offline" in done.stdout and not hub.log


# ----------------------------------------------------------------------------------------------------------------------
# A repository that means harm
# ----------------------------------------------------------------------------------------------------------------------


def change(path: list, value):
    """Manifest with the value at `path` replaced."""
    manifest = make_manifest()
    at = manifest
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return manifest


FIRST_DATASET, FIRST_TOKENIZER = ["datasets", 0], ["tokenizers", 0]
HOSTILE = [
    (change([*FIRST_DATASET, "name"], "../x"), "../x"),
    (change([*FIRST_DATASET, "name"], "/etc"), "/etc"),
    (change([*FIRST_DATASET, "name"], ".."), ".."),
    (change([*FIRST_DATASET, "name"], "C:x"), "C:x"),
    (change([*FIRST_DATASET, "name"], 7), "sp1024"),
    (change([*FIRST_DATASET, "stats"], None), "sp1024"),
    (change([*FIRST_DATASET, "stats", "files_train"], "3"), "sp1024"),
    (change([*FIRST_DATASET, "stats", "files_train"], 10**30), "sp1024"),
    (change([*FIRST_DATASET, "stats", "files_val"], 0), "sp1024"),
    (change([*FIRST_DATASET, "stats", "files_val"], True), "sp1024"),
    (change([*FIRST_DATASET, "tokenizer_name"], ["x"]), "sp1024"),
    (change([*FIRST_TOKENIZER, "model_path"], "../../x.model"), "sp1024"),
    (change([*FIRST_TOKENIZER, "model_path"], "/etc/passwd"), "sp1024"),
    (change([*FIRST_TOKENIZER, "model_path"], "tokenizers\\..\\x"), "sp1024"),
    (change([*FIRST_TOKENIZER, "model_path"], ["x"]), "sp1024"),
    (change([*FIRST_TOKENIZER, "model_path"], None), "sp1024"),
    (change([*FIRST_TOKENIZER, "vocab_path"], "../x"), "sp1024"),
    (change(["datasets"], {"name": NAME}), "sp1024"),
    (change(["tokenizers"], "x"), "sp1024"),
    ([1], "sp1024"),
]


@pytest.mark.parametrize("manifest, variant", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_a_hostile_manifest_is_refused_before_anything_is_written(hub, run, root, tmp_path, manifest, variant):
    hub.publish(manifest)
    assert_error(run("--variant", variant), "manifest")
    assert not root.exists() and not hub.fetched()
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


def test_two_files_never_have_one_place(hub, run, root):
    model = "tokenizers/fineweb_1024_bpe.model"
    hub.publish(change([*FIRST_TOKENIZER, "vocab_path"], "old/fineweb_1024_bpe.model"))
    hub.files["datasets/old/fineweb_1024_bpe.model"] = b"another"
    assert_error(run(), "manifest", str(root / model))
    assert not root.exists()
    hub.publish(change([*FIRST_TOKENIZER, "vocab_path"], model))
    assert run("--train-shards", "0").returncode == 0
    assert hub.fetched().count("fineweb_1024_bpe.model") == 1


@pytest.mark.parametrize("entry", [
    {"lfs": {"oid": "../../x", "size": 1, "pointerSize": 1}}, {"lfs": {"oid": "0" * 64, "size": "1", "pointerSize": 1}},
    {"lfs": {"oid": "0" * 64, "size": -1, "pointerSize": 1}}, {"lfs": {"oid": None, "size": 1, "pointerSize": 1}},
    {"lfs": {}}, {"lfs": None, "oid": "x"}, {"lfs": None, "size": None}, {"path": 3},
])  # fmt: skip
def test_a_hostile_listing_is_refused(hub, run, root, entry):
    hub.entry[FIRST] = entry
    assert_error(run(), "HF_ENDPOINT")
    assert not root.exists()


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
        def get(self, key, default=None):
            return self[key]

        def __contains__(self, key):
            return True

        def __missing__(self, key):
            return script.Remote(key, 1, "sha256", "0" * 64)

    variant = data.draw(st.sampled_from([e["name"] for e in datasets if isinstance(e["name"], str)] or ["sp1024"]))
    args = SimpleNamespace(variant=variant, train_shards=2, with_docs=False, out=Path("/root/data"))
    manifest = json.dumps({"datasets": datasets, "tokenizers": tokenizers}).encode()
    try:
        listing = script.Listing("0" * 40, Everything(), script.parse_manifest(manifest, "manifest.json"))
        wanted, _ = script.plan(listing, SimpleNamespace(repo_id="a/b"), args)
    except script.UserError:
        return
    assert len({item.target for item in wanted}) == len(wanted)
    for item in wanted:
        resolved = Path(os.path.normpath(item.target))
        below = resolved.relative_to("/root/data").parts
        assert resolved == item.target and (below[0], len(below)) in {("datasets", 3), ("tokenizers", 2)}
