"""What train_gpt.py needs of tokenizers beside SentencePiece's: vocabularies of bytes and of tiktoken; case marks.

Where TOKENIZER_PATH names such a vocabulary, this file says what its tokens weigh: it is a source of the run, as the
script is. Of a .model with case marks the script knows the weights; `mark` and `unmark` here turn capitals into marks
and back, as data/case_marks.py does for the shards."""

import os
import re

from train_gpt import UserError


def load(table):
    """Fill a TokenBytes whose path is no .model: `pieces`, None for a special token; `start`, `encode` and `decode`."""
    if re.fullmatch(r"bytes|.*byte_?260.*", table.path):
        load_bytes(table)
        return
    model = table.model = load_tiktoken(table.path)
    special = set(map(model.encode_single_token, model.special_tokens_set))
    piece, table.start = model.decode_single_token_bytes, model.eot_token
    table.pieces = [None if token in special else piece(token) for token in range(model.n_vocab)]
    table.encode = model.encode_ordinary
    table.decode = lambda tokens: model.decode_bytes([token for token in tokens if token not in special])


def load_bytes(table):
    """pad, bos, eos, unk, then byte b as id b + 4."""
    table.pieces, table.start = [None] * 4 + [bytes([byte]) for byte in range(256)], 1
    table.encode = lambda text: [byte + 4 for byte in text.encode()]
    table.decode = lambda tokens: bytes(token - 4 for token in tokens if token >= 4)


def load_tiktoken(name: str, folder: str | None = None):
    """An encoding of tiktoken; gpt2 from a folder with vocab.bpe and encoder.json: `folder`, or GPT2_BPE_DIR if set."""
    folder = folder or os.environ.get("GPT2_BPE_DIR")
    try:
        import tiktoken.load
        from tiktoken_ext.openai_public import r50k_pat_str

        if name != "gpt2" or not folder:
            return tiktoken.get_encoding(name)
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(f"{folder}/vocab.bpe", f"{folder}/encoder.json")
        special = {"<|endoftext|>": 50256}
        return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # of names, files and the network
        remedy = "give a .model, gpt2 or bytes; without a network set TIKTOKEN_CACHE_DIR, or for gpt2 GPT2_BPE_DIR"
        raise UserError(f"TOKENIZER_PATH={name} is nothing tiktoken can load ({error!r:.120}): {remedy}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Case marks
# ----------------------------------------------------------------------------------------------------------------------

T, A, M, E = "\ue001", "\ue002", "\ue003", "\ue004"  # a capital follows; a word of them; one in a word; an escape
SPACE_MARK = "\u2581"  # a space to SentencePiece, so E spells it
ESCAPED = {T: T, A: A, M: M, E: M + M, SPACE_MARK: A + M}  # what follows an E
MARKABLE = re.compile(f"[{''.join(ESCAPED)}]|( ?)(?<![A-Za-z])([a-z]*+[A-Z][A-Za-z]*)")
# In bytes, for a stream of tokens may end inside a character. So it may after an E: half of an escape is U+FFFD.
MARKED = re.compile(f"{E}({M}{M}|{A}{M}|{T}|{A}|{M}|)|{T}(?: ?[a-z])?|{A}(?: ?[a-z]+)?|{M}[a-z]?".encode())
SPELLED = {code.encode(): char.encode() for char, code in ESCAPED.items()} | {b"": "\ufffd".encode()}


def mark(text: str) -> str:
    """Text as a model with case marks is given it."""

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
    """The text of which this is the marked form. A mark that stands before no letter vanishes."""
    return MARKED.sub(lambda match: SPELLED.get(match[1], match[0][len(T.encode()) :].upper()), text)


def use_case_marks(table, texts: list[str]):
    """Give a TokenBytes whose pieces have these `texts` the meaning of case marks, if its model writes them.

    T, A and M stand for no text. E spells them all, and has its three bytes. What the table encodes, decodes and spells
    is then text with its capitals.
    """
    model = table.model
    if not all(mark in texts for mark in (T, A, M, E)):
        return
    marks = [texts.index(mark) for mark in (T, A, M, E)]
    symbols = not any(model.get_score(token) for token in marks)  # a user-defined symbol has score 0
    exact = len(table.byte_ids) == 256 and model.normalize("  a\n\ufb01 ") == "\u2581\u2581a\n\ufb01\u2581"
    if symbols and exact:
        table.zero_bytes = marks[:3]
        table.unmark = unmark
        table.encode = lambda text: model.encode(mark(text))
