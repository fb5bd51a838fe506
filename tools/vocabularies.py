"""Tokenizers other than plain SentencePiece models: vocabularies of bytes and of tiktoken, and case marks.

train_gpt.py loads this file if TOKENIZER_PATH names such a vocabulary or a .model with case marks. It then determines
how many bytes a token has, so it counts as submission code: it is hashed, copied into the run folder, and included in
the code size. The data tools use it too when they make shards.
"""

import contextlib
import os
import re

from train_gpt import UserError

GPT2_FILES = "vocab.bpe", "encoder.json"
GPT2_SHA256 = (  # as in tiktoken
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


def load(table):
    """Fill a TokenBytes whose path is no .model: `pieces` (None for a special token), `start`, `encode`, `decode`."""
    if re.fullmatch(r"bytes|.*byte_?260.*", table.path):
        load_bytes(table)
        return
    model = load_tiktoken(table.path)
    special = set(map(model.encode_single_token, model.special_tokens_set))
    table.model = model
    table.start = model.eot_token
    table.pieces = [None] * model.n_vocab
    for token in set(range(model.n_vocab)) - special:
        with contextlib.suppress(KeyError):  # some encodings skip numbers
            table.pieces[token] = model.decode_single_token_bytes(token)
    table.encode = model.encode_ordinary
    table.decode = lambda tokens: model.decode_bytes([token for token in tokens if token not in special])


def load_bytes(table):
    """The vocabulary pad, bos, eos, unk, then byte b as id b + 4."""
    table.pieces = [None] * 4 + [bytes([byte]) for byte in range(256)]
    table.start = 1
    table.encode = lambda text: [byte + 4 for byte in text.encode()]
    table.decode = lambda tokens: bytes(token - 4 for token in tokens if token >= 4)


def load_tiktoken(name: str, folder: str | None = None):
    """An encoding of tiktoken; gpt2 from vocab.bpe and encoder.json in `folder` or GPT2_BPE_DIR, if one is given."""
    folder = folder or os.environ.get("GPT2_BPE_DIR")
    try:
        import tiktoken.load
        from tiktoken_ext.openai_public import r50k_pat_str

        if name != "gpt2" or not folder:
            return tiktoken.get_encoding(name)
        files = [os.path.join(folder, name) for name in GPT2_FILES]
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*files, *GPT2_SHA256)
        special = {"<|endoftext|>": 50256}
        return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # of the name, of a file or of the network
        remedy = "give a .model, gpt2 or bytes; without a network set TIKTOKEN_CACHE_DIR, or for gpt2 GPT2_BPE_DIR"
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:250]
        raise UserError(f"TOKENIZER_PATH={name} is nothing tiktoken can load ({reason}): {remedy}") from error


# ---------- Case marks ------------------------------------------------------------------------------------------------
# Capitals are written as marks and small letters, so that a word has the same pieces in either case:
#
#     "The NASA McDonald iPhone"  ->  T "the" A " nasa" T " mc" M "donald i" M "phone"
#
# The marks are pieces of their own. T and A stand before the space next to the word, so that it keeps its piece with
# the space. T, A and M have no bytes and E has its three, so the bytes of the tokens add up to those of the text.

T = "\ue001"  # a capital follows, and then small letters or none
A = "\ue002"  # a word of two or more capitals follows
M = "\ue003"  # a capital follows inside a word
E = "\ue004"  # an escape: a character of this list follows, spelled in marks
SPACE_MARK = "\u2581"  # a space to SentencePiece, so E spells it
ESCAPED = {T: T, A: A, M: M, E: M + M, SPACE_MARK: A + M}  # {character: what follows an E}
# The lookbehind and the possessive *+ keep the search from trying each letter of a long word in small letters.
MARKABLE = re.compile(f"[{''.join(ESCAPED)}]|( ?)(?<![A-Za-z])([a-z]*+[A-Z][A-Za-z]*)")
# In bytes, since a stream of tokens may end inside a character, or after an E: half of an escape is U+FFFD.
MARKED = re.compile(f"{E}({M}{M}|{A}{M}|{T}|{A}|{M}|)|{T}(?: ?[a-z])?|{A}(?: ?[a-z]+)?|{M}[a-z]?".encode())
SPELLED = {code.encode(): char.encode() for char, code in ESCAPED.items()} | {b"": "\ufffd".encode()}


def mark(text: str) -> str:
    """Text in the form that a model with case marks reads."""

    def code(match: re.Match) -> str:
        space, word = match.groups()
        if word is None:
            return E + ESCAPED[match[0]]
        if len(word) > 1 and word.isupper():
            return A + space + word.lower()
        rest = re.sub("[A-Z]", lambda capital: M + capital[0], word[1:])
        return T * word[0].isupper() + space + (word[0] + rest).lower()

    return MARKABLE.sub(code, text)


def unmark(text: bytes) -> bytes:
    """The text whose marked form this is. A mark that is followed by no letter vanishes."""
    return MARKED.sub(lambda match: SPELLED.get(match[1], match[0][len(T.encode()) :].upper()), text)


def is_exact(table) -> bool:
    """Whether the SentencePiece model of a TokenBytes changes nothing in a text and can spell every byte."""
    unchanged = table.model.normalize("  a\n\ufb01 ") == "\u2581\u2581a\n\ufb01\u2581"
    return unchanged and len(table.byte_ids) == 256


def use_case_marks(table, texts: list[str]):
    """Give a TokenBytes whose pieces have these `texts` the meaning of case marks, if its model writes them.

    What the table encodes, decodes and spells is then text with its capitals.
    """
    model = table.model
    if not {T, A, M, E} <= {*texts}:
        return
    marks = [texts.index(code) for code in (T, A, M, E)]
    symbols = not any(model.get_score(token) for token in marks)  # a user-defined symbol has score 0
    if symbols and is_exact(table):
        table.zero_bytes = marks[:3]
        table.unmark = unmark
        table.encode = lambda text: model.encode(mark(text))
