"""The canonical mask (CANONICAL=1): tokens that the tokenizer would never write after the previous token get
probability 0, in evaluation and in samples.

If the tokenizer writes "hello" as one piece, then no text contains the pieces "hel" and "lo" in a row. Without such
pairs the rest is still a distribution that sums to 1, and it depends on the previous token alone. frontier.py loads
this file only where CANONICAL=1. Because it affects the score, it then counts as submission code: it is hashed, copied
into the run folder, and included in the code size.

This is for SentencePiece models of type BPE. Such a model cuts a text into letters (U+2581 is one of them). It then
merges two neighbors as long as any two of them form a piece: the pair with the best score first, the leftmost of equal
ones. Tokens a and b can be neighbors if and only if the concatenation of both is tokenized as a, b again:
- If it is, no merge crosses the boundary, and each side merges as it does alone.
- If a merge crosses the boundary there, the same happens in every text. What is further away can only cross the outer
  ends of a and b, and the text has kept those apart.
"""

import functools
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt
from train_gpt import UserError, require

# TrainerSpec.ModelType in sentencepiece_model.proto.
UNIGRAM = 1
BPE = 2
# SentencePiece.Type in the same file.
NORMAL = 1
USER_DEFINED = 4
UNUSED = 5


def parse_message(message: bytes) -> dict[int, list]:
    """{field number: values} of a protocol buffer message; values are integers or bytes.

    Source: protobuf.dev, Encoding."""
    found = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        # Wire type 0 is a number, 2 is a length and so many bytes; 1 and 5 are 8 and 4 bytes.
        value = varint() if wire_type in (0, 2) else {1: 8, 5: 4}[wire_type]
        if wire_type:
            end = position + value
            value = message[position:end]
            position = end
        found.setdefault(number, []).append(value)
    return found


def parse_piece(message: bytes) -> tuple[str, float, int]:
    """(text, score, type) of one SentencePiece message."""
    piece = parse_message(message)
    (score,) = struct.unpack("<f", piece.get(2, [bytes(4)])[0])
    return piece[1][0].decode(), score, piece.get(3, [NORMAL])[0]


def read_pieces(path: str) -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece of a SentencePiece BPE model; a UserError for any other file."""
    wanted = f"CANONICAL=1 needs the merges of a SentencePiece BPE model, and TOKENIZER_PATH={path}"
    require(Path(path).is_file(), f"{wanted} is not such a file: set CANONICAL=0, or another tokenizer")
    try:
        model = parse_message(Path(path).read_bytes())
        pieces = [parse_piece(message) for message in model[1]]
        model_type = parse_message(model[2][0]).get(3, [UNIGRAM])[0]
    except (LookupError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{wanted} is not one ({error!r:.60}): set CANONICAL=0, or another tokenizer") from error
    name = {1: "unigram", 3: "word", 4: "char"}.get(model_type, model_type)
    require(model_type == BPE, f"{wanted} is of type {name}: set CANONICAL=0, or another tokenizer")
    return pieces


def merge(symbols: list, scores: dict) -> list[tuple]:
    """The states that a text goes through while its symbols merge.

    Each state is (first symbol, last symbol, score of the next merge or -inf at the end, number of symbols)."""
    symbols = list(symbols)
    states = []
    while True:
        found = [scores.get(x + y, -math.inf) for x, y in zip(symbols, symbols[1:], strict=False)]
        best = max(found, default=-math.inf)
        states.append((symbols[0], symbols[-1], best, len(symbols)))
        if best == -math.inf:
            return states
        leftmost = found.index(best)
        symbols[leftmost : leftmost + 2] = [symbols[leftmost] + symbols[leftmost + 1]]


class Spans:
    """For tokens that merge alone: how long each symbol is at one end of them, in terms of merge scores.

    `rows` is {symbol: rows of (token, enter, leave, least)}. Merges run in the order of their scores, except for merges
    that an earlier merge has made possible. `enter` and `leave` are the least score up to the merge that creates the
    symbol and up to the merge that consumes it; inf and -inf where there is no such merge. `least` is the least score
    of the merges from the first one to the other."""

    def __init__(self):
        self.rows = {}

    def add(self, token: int, symbols: list, scores: list[float]):
        """Add a token, given the symbol at this end and the score of the next merge in each of its states."""
        enter = math.inf
        least = math.inf
        for i, symbol in enumerate(symbols):
            least = min(least, scores[i])
            if i + 1 == len(symbols) or symbols[i + 1] != symbol:
                leave = min(enter, least)
                self.rows.setdefault(symbol, []).append((token, enter, leave, least))
                enter = leave
                least = math.inf

    def arrays(self) -> dict:
        """{symbol: [4, rows] array}."""
        return {symbol: np.array(rows).T for symbol, rows in self.rows.items()}


def crossed(tokens: dict[int, str], scores: dict, size: int) -> np.ndarray:
    """bool [size, size]: pairs of tokens where a merge crosses the boundary, or where one of them is never produced.

    The merge of x and y with score c crosses the boundary if x ends a while y begins b, and neither has a better merge
    to do first. Among equal scores, merges inside a come first, being further left, and merges inside b come last."""
    right_ends = Spans()
    left_ends = Spans()
    produced = np.zeros(size, bool)
    for token, text in tokens.items():
        states = merge(text, scores)
        produced[token] = states[-1][3] == 1
        if produced[token]:
            firsts, lasts, merges, _ = zip(*states, strict=True)
            right_ends.add(token, lasts, merges)
            left_ends.add(token, firsts, merges)
    right = right_ends.arrays()
    left = left_ends.arrays()
    never = np.zeros((size, size), bool)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            x = right.get(piece[:cut])
            y = left.get(piece[cut:])
            if x is not None and y is not None:
                a, a_enter, a_leave, _ = x[:, x[3] < score, None]
                b, b_enter, b_leave, _ = y[:, y[3] <= score]
                at_the_same_time = (a_leave < b_enter) & (b_leave <= a_enter)
                never[a.astype(int), b.astype(int)] |= at_the_same_time
    exclude_both_ways(never, [token for token in tokens if not produced[token]], tokens)
    return never


def exclude_both_ways(never: np.ndarray, some: list[int], tokens: dict[int, str]):
    """Exclude each pair of one of `some` and one of `tokens`, in either order."""
    never[np.ix_(some, [*tokens])] = True
    never[np.ix_([*tokens], some)] = True


@functools.cache
def allowed_pairs(path: str, vocab_size: int) -> np.ndarray:
    """Packed bits [V, V / 8] in uint8, the lowest bit first: whether token b can follow token a in any text.

    Pairs are always allowed if one of the two is a special token, a byte, a user-defined piece, an unused piece, one
    end of an unused piece (the model splits those again after all merges), or an id beyond the tokenizer's own."""
    pieces = read_pieces(path)
    require(len(pieces) <= vocab_size, f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has {len(pieces)} pieces")
    scores = {text: score for text, score, kind in pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    unused = [text for text, _, kind in pieces if kind == UNUSED]
    ends = {end for text in unused for cut in range(len(text)) for end in (text[:cut], text[cut:])}
    tokens = {token: text for token, (text, _, kind) in enumerate(pieces) if kind == NORMAL and text not in ends}
    never = crossed(tokens, scores, vocab_size)
    # User-defined pieces are cut out of the text before all merges.
    for whole in (text for text, _, kind in pieces if kind == USER_DEFINED):
        exclude_both_ways(never, [token for token, text in tokens.items() if whole in text], tokens)
        for cut in range(1, len(whole)):
            a = [token for token, text in tokens.items() if text.endswith(whole[:cut])]
            b = [token for token, text in tokens.items() if text.startswith(whole[cut:])]
            never[np.ix_(a, b)] = True
    return np.packbits(~never, axis=1, bitorder="little")


class Mask:
    """Sets logits to -inf where the tokenizer would never write that token after the previous one.

    The table comes from rank 0 and is kept on the device, one bit per pair: 8 MiB for 8,192 tokens."""

    def __init__(self, config, runtime):
        table = allowed_pairs(config.tokenizer_path, config.vocab_size) if runtime.is_master else None
        self.bits = torch.from_numpy(runtime.broadcast(table)).to(runtime.device)
        self.shifts = torch.arange(8, dtype=torch.uint8, device=runtime.device)

    def __call__(self, logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
        """Masked logits [B, T, V], given the tokens that precede the predicted ones."""
        allowed = (self.bits[tokens_BT].unsqueeze(-1) >> self.shifts & 1).flatten(-2)[..., : logits_BTV.size(-1)]
        return logits_BTV.masked_fill(allowed == 0, -math.inf)


def check_text(config, stream: train_gpt.TokenStream) -> str:
    """Check that the text contains no excluded pair, which would cost infinitely many bits; a line for the log."""
    table = allowed_pairs(config.tokenizer_path, config.vocab_size)
    excluded = 0
    example = ""
    for start in range(0, len(stream) - 1, 2**24):
        tokens = stream.read(start, min(2**24 + 1, len(stream) - start))
        before = tokens[:-1]
        target = tokens[1:]
        bits = table[before, target >> 3] >> (target & 7).astype(np.uint8) & 1
        odd = np.flatnonzero(bits == 0)
        if len(odd) and not excluded:
            first = int(odd[0])
            pieces = read_pieces(config.tokenizer_path)
            pair = f"{pieces[before[first]][0]!r} and {pieces[target[first]][0]!r}"
            example = f"the first after token {start + first}, {pair}"
        excluded += len(odd)
    require(
        not excluded,
        f"CANONICAL=1: {excluded} of {len(stream) - 1} pairs of tokens in {stream.pattern} are none that "
        f"{config.tokenizer_path} writes, {example}: make the shards with it, or set CANONICAL=0",
    )
    share = 1 - int(np.unpackbits(table).sum()) / config.vocab_size**2
    return f"canonical: {share:.2%} of all pairs of tokens are excluded, none of the {len(stream) - 1} in the text"
