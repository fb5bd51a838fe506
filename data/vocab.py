"""Tokenizers of text data sets: text to tokens by the libraries' own batches, tokens to the bytes they stand for, and a
SentencePiece model learned from documents."""

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import case_marks
import numpy as np
import sentencepiece as spm
from common import UserError, sha256

MAX_VOCAB = 65536  # tokens are uint16
PART_CHARACTERS = 2**19  # of a long document, encoded at a time; at most twice as many

SPACE_MARK = "\u2581"  # how SentencePiece spells a space inside a piece
UNLEARNED = "\u2581\u2585"  # its trainer takes the one for a space, and drops every text with the other
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_OFFSET = 4  # of the tokenizer `bytes`: pad, bos, eos and unk come first

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
MARKS_OPTIONS = TOKENIZER_OPTIONS | {"user_defined_symbols": list(case_marks.MARKS)}

GPT2_FILES = {  # name: sha256, as tiktoken pins them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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
    """Tokens are uint16; the token `start` stands before a document.

    pieces: bytes of text per token, empty for a boundary, which stands for no text; leading: tokens that lose their
    first byte, a space, right after a boundary; unweighed: tokens that spell bytes but stand for none of the text;
    about: what a manifest says of it.
    """

    start: int
    about: dict

    def __init__(self, label: str, pieces: list[bytes], boundary: np.ndarray, leading=(), unweighed=()):
        if len(pieces) > MAX_VOCAB:
            raise UserError(f"{label}: {len(pieces):,} tokens, but tokens are uint16; expected at most {MAX_VOCAB:,}")
        self.label, self.vocab_size, self.boundary = label, len(pieces), boundary
        self.leading = np.isin(np.arange(len(pieces)), leading)
        self.length = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self.weight = self.length.copy()
        self.weight[list(unweighed)] = 0
        self.first = np.cumsum(self.length, dtype=np.int32) - self.length
        self.flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Tokens of every text, by the library's own batch."""
        raise NotImplementedError

    def parts(self, text: str) -> Iterator[str | np.ndarray]:
        """What of a document is encoded on its own, and tokens that are given."""
        return cut_parts(text)

    def encode(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        plans = [list(self.parts(text)) for text in texts]
        encoded = iter(self.encode_batch([part for plan in plans for part in plan if isinstance(part, str)], threads))
        filled = [[next(encoded) if isinstance(part, str) else part for part in plan] for plan in plans]
        nothing = np.empty(0, np.uint16)
        return [np.concatenate([nothing, *plan], dtype=np.uint16, casting="unsafe") for plan in filled]

    def spell(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
        """What tokens spell, how many bytes each, and how many bytes of the text it stands for; the first token counts
        as after a boundary."""
        cut = self.leading[tokens]
        cut[1:] &= self.boundary[tokens[:-1]]
        lengths, first, text = self.length[tokens] - cut, self.first[tokens] + cut, []
        for at in range(0, len(tokens), 2**16):  # small enough for the processor's cache
            part = slice(at, at + 2**16)
            ends = np.cumsum(lengths[part], dtype=np.int32)
            source = np.repeat(first[part] - (ends - lengths[part]), lengths[part])
            text.append(self.flat.take(source + np.arange(ends[-1], dtype=np.int32)).tobytes())
        return b"".join(text), lengths, self.weight[tokens] - cut

    def restore(self, spelled: bytes) -> bytes:
        """The text of a document, given what its tokens spell."""
        return spelled


class SentencePiece(Tokenizer):
    """A SentencePiece model: bytes of its .model file.

    exact: it changes nothing before it looks for pieces and can spell every byte; only then can every text be kept.
    case_marks: the four marks are symbols of it, so it is given text whose capitals are marks. The trainer goes by the
    same rule.
    """

    PROBE = "  a\n\ufb01 "
    IN_BYTES = re.compile(f"(^ |{SPACE_MARK})")

    def __init__(self, model: bytes, label: str = "model"):
        self.model, self.sp = model, (sp := spm.SentencePieceProcessor())
        try:
            sp.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"{label}: no SentencePiece model; make or get it again") from None
        ids = range(sp.vocab_size())
        names = [sp.id_to_piece(i) for i in ids]
        if SPACE_MARK not in names:
            raise UserError(f"{label}: has no piece for a single space (U+2581), which the trainer needs; use another")
        boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        text = [b"" if boundary[i] else name.replace(SPACE_MARK, " ").encode("utf-8") for i, name in enumerate(names)]
        pieces = [bytes([int(names[i][3:5], 16)]) if sp.is_byte(i) else text[i] for i in ids]
        unchanged = sp.normalize(self.PROBE) == self.PROBE.replace(" ", SPACE_MARK)
        self.exact = unchanged and sum(map(sp.is_byte, ids)) == 256
        # The score of a user-defined symbol is 0, and that of no two other pieces.
        marks = [names.index(mark) for mark in case_marks.MARKS if mark in names]
        self.case_marks = self.exact and len(marks) == 4 and not any(map(sp.get_score, marks))
        # A model that puts a space of its own before a text, or strips spaces: the first space of a document is none of
        # the text. With any other model it is.
        own = sp.normalize("a").startswith(SPACE_MARK) or not sp.normalize(" a").startswith(SPACE_MARK)
        leading = [i for i in ids if own and names[i].startswith(SPACE_MARK) and not boundary[i]]
        super().__init__(
            label,
            pieces,
            boundary,
            leading,
            [sp.piece_to_id(mark) for mark in case_marks.UNWEIGHED] if self.case_marks else [],
        )
        # Without <s> another token that stands for no text separates the documents; <unk> is in every model.
        self.start = next(i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id()) if i >= 0)
        self.about = {
            "kind": "sentencepiece",
            "file": None,
            "vocab_size": len(ids),
            "start": self.start,
            "sha256": sha256(model),
        }

    def in_bytes(self, text: str) -> np.ndarray:
        return np.array([self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")], np.uint16)

    def parts(self, text: str) -> Iterator[str | np.ndarray]:
        """Of an exact model, byte pieces spell what other pieces cannot: a first space, which weighs nothing to readers
        that take every model for one of the published kind, and U+2581, which means a space in every other piece."""
        if not self.exact:  # it might put a space of its own before each part
            yield text
            return
        text = case_marks.encode(text) if self.case_marks else text
        for i, between in enumerate(self.IN_BYTES.split(text)):
            if i % 2:
                yield self.in_bytes(between)
            elif between:
                yield from cut_parts(between)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return self.sp.encode(texts, num_threads=threads, return_type="numpy") if texts else []

    def restore(self, spelled: bytes) -> bytes:
        return case_marks.decode(spelled.decode("utf-8", "replace")).encode("utf-8") if self.case_marks else spelled


class Tiktoken(Tokenizer):
    """An encoding of tiktoken by name; gpt2 from GPT2_BPE_DIR where that is set. Documents start with <|endoftext|>."""

    def __init__(self, name: str):
        import tiktoken

        folder = os.environ.get("GPT2_BPE_DIR") if name == "gpt2" else None
        try:
            self.encoding = gpt2_in(folder) if folder else tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            remedy = "set TIKTOKEN_CACHE_DIR to a folder with room, where tiktoken has kept it or may"
            remedy += ", or GPT2_BPE_DIR to one with vocab.bpe and encoder.json" if name == "gpt2" else ""
            reason = str(error).splitlines()[0][:250]
            raise UserError(f"--tokenizer {name}: cannot be loaded ({reason}); {remedy}") from None
        self.start = self.encoding.eot_token
        special = {self.encoding.encode_single_token(text) for text in self.encoding.special_tokens_set}
        pieces = [b"" if i in special else self.piece(i) for i in range(self.encoding.n_vocab)]
        super().__init__(f"--tokenizer {name}", pieces, np.array([not piece for piece in pieces]))
        digest = sha256(b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces))
        self.about = {
            "kind": "tiktoken",
            "name": name,
            "vocab_size": len(pieces),
            "start": self.start,
            "sha256": digest,
        }

    def piece(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap in the numbering
            return b""

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return [np.array(ids, np.uint16) for ids in self.encoding.encode_ordinary_batch(texts, num_threads=threads)]


def gpt2_in(folder: str):
    """GPT-2's encoding from vocab.bpe and encoder.json in a folder, as tiktoken makes it from its downloads."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

    for name, expected in GPT2_FILES.items():
        found = sha256(Path(folder, name).read_bytes())
        if found != expected:
            raise ValueError(f"GPT2_BPE_DIR: {Path(folder, name)} has sha256 {found}, expected {expected}")
    ranks = data_gym_to_mergeable_bpe_ranks(*(os.path.join(folder, name) for name in GPT2_FILES))
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


class Bytes(Tokenizer):
    """byte260: pad 0, bos 1, eos 2, unk 3; byte b is token b + 4."""

    start = BOS_ID
    about = {"kind": "bytes", "name": "byte260", "vocab_size": 260, "start": BOS_ID}

    def __init__(self):
        pieces = [b""] * BYTE_OFFSET + [bytes([byte]) for byte in range(256)]
        super().__init__("--tokenizer bytes", pieces, np.arange(len(pieces)) < BYTE_OFFSET)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) + np.uint16(BYTE_OFFSET) for text in texts]


# ----------------------------------------------------------------------------------------------------------------------
# Learn a model
# ----------------------------------------------------------------------------------------------------------------------


def in_thread(task: Callable, *arguments) -> Future:
    """`task` at work beside this thread, which Ctrl+C reaches all the same, and which need not wait for it to end."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def train_sentencepiece(
    documents: list[bytes], vocab_size: int, option: str, options: dict = TOKENIZER_OPTIONS
) -> bytes:
    """A lossless SentencePiece BPE model learned from UTF-8 documents, the same bytes every time; UserError if
    impossible, which names the `option` that asked for it.

    Newlines are learned like other characters, so a document is fed as one "sentence": lines would lose their ends. It
    is cut only at characters that the trainer keeps for itself. The length beyond which the trainer silently drops a
    sentence is that of the longest document.
    """
    rewrite = case_marks.encode if options is MARKS_OPTIONS else str
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
