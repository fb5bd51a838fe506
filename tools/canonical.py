"""The canonical mask, for CANONICAL=1: a token that the tokenizer would never write after the last one gets
probability 0, in evaluation and in samples.

After "hel" no text has "lo", if its tokenizer writes "hello" as one piece. What is left is a distribution that sums to
1 and looks at the previous token alone. train_gpt.py loads this file where CANONICAL asks for it. It shapes the score,
and so it is a source of that run like the script itself: hashed, copied into the run folder, counted in the bytes of
code.

For SentencePiece models of BPE. Such a model cuts a text into letters, U+2581 being one, and merges two neighbours as
long as any two make a piece: those with the best score first, the leftmost of equals. Tokens a and b can stand side by
side if and only if the text of both together comes out as a and b again. For then no merge crosses the join, and
either side merges as it does alone; and if one crosses it there, it does so in every text, since what is further away
can only cross the outer ends of a and b, which the text has kept apart.
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

UNIGRAM, BPE = 1, 2  # of TrainerSpec.ModelType in sentencepiece_model.proto, as those of SentencePiece.Type here:
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


def fields(message: bytes) -> dict[int, list]:
    """{number: values} of a protocol buffer, numbers or bytes. Source: protobuf.dev, Encoding."""
    at, found = 0, {}

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]  # the number, or the bytes that follow
        if kind:
            value, at = message[at : at + value], at + value
        found.setdefault(number, []).append(value)
    return found


def read_pieces(path: str) -> list[tuple[str, float, int]]:
    """(text, score, type) of each piece of a SentencePiece BPE model."""
    wanted = f"CANONICAL=1 needs the merges of a SentencePiece BPE model, and TOKENIZER_PATH={path}"
    require(Path(path).is_file(), f"{wanted} is not such a file: set CANONICAL=0, or another tokenizer")
    try:
        model = fields(Path(path).read_bytes())
        pieces = [fields(piece) for piece in model[1]]
        kind = fields(model[2][0]).get(3, [UNIGRAM])[0]
        found = [
            (piece[1][0].decode(), *struct.unpack("<f", piece.get(2, [bytes(4)])[0]), piece.get(3, [NORMAL])[0])
            for piece in pieces
        ]
    except (LookupError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{wanted} is not one ({error!r:.60}): set CANONICAL=0, or another tokenizer") from error
    name = {1: "unigram", 3: "word", 4: "char"}.get(kind, kind)
    require(kind == BPE, f"{wanted} is of type {name}: set CANONICAL=0, or another tokenizer")
    return found


def merge(symbols: list, scores: dict) -> list[tuple]:
    """The states through which symbols merge into one or more: (first symbol, last symbol, score of the next merge,
    -inf at the end, number of symbols)."""
    symbols, states = list(symbols), []
    while True:
        found = [scores.get(x + y, -math.inf) for x, y in zip(symbols, symbols[1:], strict=False)]
        best = max(found, default=-math.inf)
        states.append((symbols[0], symbols[-1], best, len(symbols)))
        if best == -math.inf:
            return states
        at = found.index(best)  # the leftmost
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


class Spans:
    """Of tokens that merge alone, how long each symbol stands at one of their ends, by the score of the merges.

    {symbol: arrays of token, enter, leave, least}. Merges come in the order of their scores, but for those that another
    has made possible: `enter` and `leave` are the least score up to the merge that makes the symbol and to the one that
    takes it away, inf and -inf where there is none; `least` is that of the merges from the first on up to the other."""

    def __init__(self):
        self.rows = {}

    def add(self, token: int, symbols: list, scores: list[float]):
        """The symbol at this end and the next merge, state by state."""
        enter = least = math.inf
        for i, symbol in enumerate(symbols):
            least = min(least, scores[i])
            if i + 1 == len(symbols) or symbols[i + 1] != symbol:
                leave = min(enter, least)
                self.rows.setdefault(symbol, []).append((token, enter, leave, least))
                enter, least = leave, math.inf

    def arrays(self) -> dict:
        return {symbol: np.array(rows).T for symbol, rows in self.rows.items()}


def crossed(tokens: dict[int, str], scores: dict, size: int) -> np.ndarray:
    """[size, size] pairs of tokens in whose join a merge crosses the boundary, or of which one is never made.

    The merge of x and y, of score c, crosses if x ends a while y begins b, and neither has a better merge to do first.
    Among equals those of a come before it, being further left, and those of b after."""
    right, left, made = Spans(), Spans(), np.zeros(size, bool)
    for token, text in tokens.items():
        states = merge(text, scores)
        made[token] = states[-1][3] == 1
        if made[token]:
            firsts, lasts, merges, _ = zip(*states, strict=True)
            right.add(token, lasts, merges)
            left.add(token, firsts, merges)
    right, left, never = right.arrays(), left.arrays(), np.zeros((size, size), bool)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            x, y = right.get(piece[:cut]), left.get(piece[cut:])
            if x is not None and y is not None:
                a, a_enter, a_leave, _ = x[:, x[3] < score, None]
                b, b_enter, b_leave, _ = y[:, y[3] <= score]
                at_one_time = (a_leave < b_enter) & (b_leave <= a_enter)
                never[a.astype(int), b.astype(int)] |= at_one_time
    unmade = [token for token in tokens if not made[token]]
    never[np.ix_(unmade, [*tokens])] = never[np.ix_([*tokens], unmade)] = True
    return never


@functools.cache
def allowed_pairs(path: str, vocab_size: int) -> np.ndarray:
    """Bits [V, V / 8] in uint8, the lowest first: whether token b can follow token a in any text.

    It can, if one of them is a special token, a byte, a user-defined piece, an unused one, or one end of an unused one,
    which the model splits again after all merges, or an id beyond the tokenizer's own."""
    pieces = read_pieces(path)
    require(len(pieces) <= vocab_size, f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has {len(pieces)} pieces")
    scores = {text: score for text, score, kind in pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    unused = [text for text, _, kind in pieces if kind == UNUSED]
    ends = {end for text in unused for cut in range(len(text)) for end in (text[:cut], text[cut:])}
    tokens = {token: text for token, (text, _, kind) in enumerate(pieces) if kind == NORMAL and text not in ends}
    never = crossed(tokens, scores, vocab_size)
    for whole in (text for text, _, kind in pieces if kind == USER_DEFINED):  # cut out of the text before all merges
        inside = [token for token, text in tokens.items() if whole in text]
        never[np.ix_(inside, [*tokens])] = never[np.ix_([*tokens], inside)] = True
        for cut in range(1, len(whole)):
            a = [token for token, text in tokens.items() if text.endswith(whole[:cut])]
            b = [token for token, text in tokens.items() if text.startswith(whole[cut:])]
            never[np.ix_(a, b)] = True
    return np.packbits(~never, axis=1, bitorder="little")


class Mask:
    """Called with logits [B, T, V] and the tokens [B, T] after which they stand: the logits, -inf where the tokenizer
    would never write that token there. Its table is on the device, rank 0's everywhere."""

    def __init__(self, model, config, runtime):
        require(
            type(model).forward is train_gpt.Model.forward,
            f"CANONICAL=1 does not reach the forward that {type(model).__name__} has of its own: set CANONICAL=0",
        )
        table = allowed_pairs(config.tokenizer_path, config.vocab_size) if runtime.is_master else None
        self.bits = torch.from_numpy(runtime.broadcast(table)).to(runtime.device)
        self.shifts = torch.arange(8, dtype=torch.uint8, device=runtime.device)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        allowed = (self.bits[tokens].unsqueeze(-1) >> self.shifts & 1).flatten(-2)[..., : logits.size(-1)]
        return logits.masked_fill(allowed == 0, -math.inf)


def check_text(config, stream) -> str:
    """That the text has no pair that is excluded, which would cost infinitely many bits: a line for the log."""
    table = allowed_pairs(config.tokenizer_path, config.vocab_size)
    excluded, example = 0, ""
    for start in range(0, len(stream) - 1, 2**24):
        tokens = stream.read(start, min(2**24 + 1, len(stream) - start))
        before, target = tokens[:-1], tokens[1:]
        odd = np.flatnonzero(table[before, target >> 3] >> (target & 7).astype(np.uint8) & 1 == 0)
        if len(odd) and not excluded:
            texts = [text for text, *_ in read_pieces(config.tokenizer_path)]
            at = int(odd[0])
            example = f"the first after token {start + at}, {texts[before[at]]!r} and {texts[target[at]]!r}"
        excluded += len(odd)
    require(
        not excluded,
        f"CANONICAL=1: {excluded} of {len(stream) - 1} pairs of tokens in {stream.pattern} are "
        f"none that {config.tokenizer_path} writes, {example}: make the shards with it, or set CANONICAL=0",
    )
    share = 1 - int(np.unpackbits(table).sum()) / config.vocab_size**2
    return f"canonical: {share:.2%} of all pairs of tokens are excluded, none of the {len(stream) - 1} in the text"
