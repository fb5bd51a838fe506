"""Tokenizers for text data sets: text to tokens in batches, and SentencePiece models trained on documents.

train_gpt.TokenBytes knows what a token weighs and spells. This file adds what makes encoding fast and lossless.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm
from common import in_thread, sha256

from train_gpt import TokenBytes, UserError, require, tool

vocabularies = tool("vocabularies", required=True)

MAX_VOCAB = 65536  # tokens are uint16
PART_CHARACTERS = 2**19  # of a long document, encoded at a time; at most twice as many

SPACE_MARK = "\u2581"  # how SentencePiece spells a space inside a piece
UNLEARNED = "\u2581\u2585"  # its trainer takes the one for a space, and drops every text with the other
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# Bytes per token on 4.6 MB of Shakespeare at 1024 pieces: 2.54 as here; split by script 2.47; documents fed as
# paragraphs 2.52, as lines 2.49; newline as a symbol of its own 2.36; coverage 1 2.52 (below 1 the rarest characters
# become byte pieces, in ASCII one token either way). Pieces that reach across spaces: 2.56, but a small transformer
# scored worse with them (2.258 bits per byte against 2.252, and 2.264 with the split by script; one seed).
TOKENIZER_OPTIONS = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_by_unicode_script=False,
    character_coverage=0.999,
    pad_id=-1,
    unk_id=UNK_ID,
    bos_id=BOS_ID,
    eos_id=EOS_ID,
)
MARKS = [vocabularies.T, vocabularies.A, vocabularies.M, vocabularies.E]
MARKS_OPTIONS = TOKENIZER_OPTIONS | {"user_defined_symbols": MARKS}


def tokenizer_options(case_marks: bool) -> dict:
    return MARKS_OPTIONS if case_marks else TOKENIZER_OPTIONS


def cut_parts(text: str) -> Iterator[str]:
    """A long text in parts, which bounds the memory of encoding it. The cuts are where a space follows what is no
    whitespace: no token of GPT-2, and none of a model that splits by whitespace, reaches across. Where there is no such
    place for long, they are elsewhere, which may give other tokens, but of the same text."""
    start, place = 0, re.compile(r"(?<=\S) ")
    while len(text) - start > 2 * PART_CHARACTERS:
        cut = place.search(text, start + PART_CHARACTERS, start + 2 * PART_CHARACTERS)
        end = cut.start() if cut else start + 2 * PART_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """Encodes texts, with `table`, which knows what the tokens weigh and spell. Tokens are uint16.

    start: the token before a document; about: what a manifest says of the tokenizer.
    """

    def __init__(self, path: str, label: str):
        self.label = label
        try:
            self.table = TokenBytes(path)
        except UserError as error:
            raise UserError(f"{label}: {str(error).replace('TOKENIZER_PATH=', '')}") from None
        self.size, self.start = self.table.size, self.table.start
        limit = f"tokens are uint16; expected at most {MAX_VOCAB:,}"
        require(self.size <= MAX_VOCAB, f"{label}: {self.size:,} tokens, but {limit}")

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Tokens of every text, by the library's own batch."""
        raise NotImplementedError

    def parts(self, text: str) -> Iterator[str | np.ndarray]:
        """The parts of a document that are encoded on their own, and tokens where these are given."""
        return cut_parts(text)

    def encode(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        plans = [list(self.parts(text)) for text in texts]
        encoded = iter(self.encode_batch([part for plan in plans for part in plan if isinstance(part, str)], threads))
        filled = [[next(encoded) if isinstance(part, str) else part for part in plan] for plan in plans]
        nothing = np.empty(0, np.uint16)
        return [np.concatenate([nothing, *plan], dtype=np.uint16, casting="unsafe") for plan in filled]


class SentencePiece(Tokenizer):
    """A SentencePiece .model file; `model` has its bytes.

    exact: it changes nothing before it looks for pieces and can spell every byte; only then can every text be kept.
    case_marks: it reads texts whose capitals are marks.
    """

    IN_BYTES = re.compile(f"(^ |{SPACE_MARK})")

    def __init__(self, path: str, label: str = "model"):
        self.model = Path(path).read_bytes()
        super().__init__(str(path), label)
        self.sp = sp = self.table.model
        self.exact, self.case_marks = vocabularies.is_exact(self.table), bool(self.table.zero_bytes)
        # Without <s> another token that stands for no text separates the documents; <unk> is in every model.
        self.start = next(i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id()) if i >= 0)
        about = {"kind": "sentencepiece", "file": None, "vocab_size": self.size, "start": self.start}
        self.about = about | {"sha256": sha256(self.model)}

    def in_bytes(self, text: str) -> np.ndarray:
        return np.array([self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")], np.uint16)

    def parts(self, text: str) -> Iterator[str | np.ndarray]:
        """Of an exact model, byte pieces spell what other pieces cannot: a first space, which weighs nothing to readers
        that take every model for one of the published kind, and U+2581, which means a space in every other piece."""
        if not self.exact:  # it might put a space of its own before each part
            yield text
            return
        text = vocabularies.mark(text) if self.case_marks else text
        for i, between in enumerate(self.IN_BYTES.split(text)):
            if i % 2:
                yield self.in_bytes(between)
            elif between:
                yield from cut_parts(between)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return self.sp.encode(texts, num_threads=threads, return_type="numpy") if texts else []


class Tiktoken(Tokenizer):
    """An encoding of tiktoken by name. Documents start with <|endoftext|>."""

    def __init__(self, name: str):
        super().__init__(name, f"--tokenizer {name}")
        pieces = [piece or b"" for piece in self.table.pieces]
        digest = sha256(b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces))
        self.about = {"kind": "tiktoken", "name": name, "vocab_size": self.size, "start": self.start, "sha256": digest}

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        batch = self.table.model.encode_ordinary_batch(texts, num_threads=threads)
        return [np.array(ids, np.uint16) for ids in batch]


class Bytes(Tokenizer):
    """byte260: byte b is token b + 4, after the special tokens."""

    def __init__(self):
        super().__init__("bytes", "--tokenizer bytes")
        self.about = {"kind": "bytes", "name": "byte260", "vocab_size": self.size, "start": self.start}
        self.offset = self.table.pieces.index(b"\0")

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) + np.uint16(self.offset) for text in texts]


def choose_tokenizer(spec: str) -> tuple[str, Tokenizer | int]:
    """A tokenizer's name for folders and itself, or the number of pieces to train it with."""
    if trained := re.fullmatch(r"train:sp(\d+)", spec):
        size = int(trained[1])
        if not 1 <= size <= MAX_VOCAB:
            raise UserError(f"--tokenizer {spec}: expected 1 to {MAX_VOCAB} pieces, as tokens are uint16")
        return f"sp{size}", size
    if spec == "bytes":
        return "byte260", Bytes()
    if spec.endswith(".model"):
        try:
            return Path(spec).stem, SentencePiece(spec, f"--tokenizer {spec}")
        except OSError as error:
            raise UserError(f"--tokenizer {spec}: {error.strerror}; name a SentencePiece .model") from None
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--tokenizer {spec}: needs the package tiktoken: pip install tiktoken") from None
    if spec not in tiktoken.list_encoding_names():
        names = ", ".join(sorted(tiktoken.list_encoding_names()))
        raise UserError(f"--tokenizer {spec}: expected train:spN, a .model file, bytes, or one of tiktoken's: {names}")
    return spec, Tiktoken(spec)


# ----------------------------------------------------------------------------------------------------------------------
# Train a model
# ----------------------------------------------------------------------------------------------------------------------


def train_sentencepiece(
    documents: list[bytes], vocab_size: int, option: str, options: dict = TOKENIZER_OPTIONS
) -> bytes:
    """A lossless SentencePiece BPE model learned from UTF-8 documents, the same bytes every time; UserError if
    impossible, which names the `option` that asked for it.

    Newlines are learned like other characters, so a document is fed as one "sentence": lines would lose their ends. It
    is cut only at characters that the trainer keeps for itself. The length beyond which the trainer silently drops a
    sentence is that of the longest document.
    """
    rewrite = vocabularies.mark if options is MARKS_OPTIONS else str
    longest = max(10, *(len(raw) for raw in documents)) * (4 if options is MARKS_OPTIONS else 1)  # 10 is the least
    limits = dict(vocab_size=vocab_size, max_sentence_length=longest, num_threads=1, minloglevel=2)

    def learn(**extra) -> bytes:
        parts = (part for raw in documents for part in re.split(f"[{UNLEARNED}]", rewrite(raw.decode("utf-8"))))
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=filter(None, parts), model_writer=model, **options, **limits, **extra
        )
        return model.getvalue()

    try:
        model = in_thread(learn).result()
        if spm.SentencePieceProcessor(model_proto=model).piece_to_id(SPACE_MARK) == UNK_ID:  # too rare to be learned
            model = in_thread(lambda: learn(required_chars=SPACE_MARK)).result()
    except RuntimeError as error:
        # Without the line of C++ that raised it, and without its advice on options that this script does not have.
        reason = " ".join(str(error).split()).rpartition("] ")[2].partition(" Increase")[0]
        raise UserError(f"{option}: the trainer refused it; choose another size ({reason})") from None
    return model


def train_tokenizer(documents: list[bytes], vocab_size: int, option: str, options: dict, work: Path) -> SentencePiece:
    """The tokenizer of `train_sentencepiece`. Its model is no file afterwards; the folder `work` holds it meanwhile."""
    path = work / "tokenizer.model"
    path.write_bytes(train_sentencepiece(documents, vocab_size, option, options))
    tokenizer = SentencePiece(path, option)
    path.unlink()
    return tokenizer
