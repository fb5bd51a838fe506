"""Capital letters as marks: a lossless rewriting of text, after which a word and its capitalised form share pieces.

    "The NASA McDonald iPhone"  ->  T "the" A " nasa" T " mc" M "donald i" M "phone"

Each run of ASCII letters: a capital and then none but small ones become the mark T and small letters; two or more
capitals alone, A; any other run with capitals has T where it begins with one, and M before each later one. T and A
stand before the single space next to the word where there is one, so that the word keeps its piece with the space. The
marks are private-use characters and pieces of their own; E spells them and U+2581, the space of SentencePiece, where
the text itself has them. E weighs the three bytes of what it spells, T, A and M weigh nothing: the weights of the
tokens add up to the bytes of the original text.
"""

import re

T, A, M, E = MARKS = "\ue001", "\ue002", "\ue003", "\ue004"
UNWEIGHED = T, A, M
SPACE_MARK = "\u2581"
SPELLED = {T: E + T, A: E + A, M: E + M, E: E + M + M, SPACE_MARK: E + A + M}  # M follows nothing but letters otherwise
MEANT = {code: char for char, code in SPELLED.items()} | {E: "\ufffd"}  # as half a character is decoded

# The lookbehind and the possessive run (*+) keep long runs of small letters from being tried at each of their letters.
CODED = re.compile(rf"[{T}{A}{M}{E}{SPACE_MARK}]|( ?)(?<![A-Za-z])([a-z]*+[A-Z][A-Za-z]*)")
MARKED = re.compile(rf"{E}(?:{M}{M}|{A}{M}|[{T}{A}{M}])|{T}( ?[a-z])|{A}( ?[a-z]+)|{M}([a-z])|[{T}{A}{M}{E}]")


def encode(text: str) -> str:
    """Marks for capitals; `decode` gives the text back."""

    def code(match: re.Match) -> str:
        space, word = match.groups()
        if word is None:
            return SPELLED[match[0]]
        if len(word) > 1 and word.isupper():
            return A + space + word.lower()
        rest = re.sub("[A-Z]", lambda capital: M + capital[0].lower(), word[1:])
        return (T if word[0].isupper() else "") + space + word[0].lower() + rest

    return CODED.sub(code, text)


def decode(text: str) -> str:
    """The text of which `text` is the encoding. Of any other, such as a sampled one, marks without a letter vanish, and
    E alone is U+FFFD: so the weights add up to the bytes of whatever tokens spell."""

    def mean(match: re.Match) -> str:
        letters = match[1] or match[2] or match[3]
        return letters.upper() if letters else MEANT.get(match[0], "")

    return MARKED.sub(mean, text)
