"""MODE=sample writes what the model says, letter by letter, and nothing else."""

import dataclasses
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import process, tree

import train_gpt
from train_gpt import GPT, Config, TokenBytes

kernels = train_gpt.tool("kernels")
evaluate = train_gpt.tool("artifact")
sample = train_gpt.tool("artifact")
SampleKnobs = sample.SampleKnobs
CHECKED = settings()  # those of the profile that conftest.py loads
SHORT = Config(train_seq_len=32, train_batch_tokens=32)


@pytest.fixture(scope="module")
def words(corpus):
    """The tokenizer."""
    return TokenBytes(str(corpus / "tok.model"), int((corpus / "vocab_size").read_text()))


@pytest.fixture(scope="module")
def model(trained):
    """(model, configuration) of the artifact, with longer texts than it was trained on."""
    state, told, _ = evaluate.read_model((trained / "final_model.int8.ptz").read_bytes(), "artifact")
    config = Config.load([], told | {"TRAIN_SEQ_LEN": "160", "TRAIN_BATCH_TOKENS": "160"})
    gpt = GPT(config, kernels.blocked_attention)  # which no switch of torch turns off
    gpt.load_state_dict(state)
    return gpt, config


def generate(model, config: Config, words, **changes) -> list[str]:
    """The pieces of a sample. `changes` are knobs of the sample or of the configuration."""
    knobs = {name: changes.pop(name) for name in list(changes) if name.upper() in SampleKnobs.knobs()}
    return list(sample.generate(model, dataclasses.replace(config, **changes), SampleKnobs(**knobs), words))


@torch.no_grad()
def greedy(model, words, prompt: str, count: int, length: int) -> list[int]:
    """The tokens of the likeliest continuation, each by a forward pass over exactly its past: no padding."""
    tokens = [words.model.bos_id(), *words.model.encode(prompt)]
    start = len(tokens)
    while len(tokens) < start + count:
        logits = model(torch.tensor([tokens[-length:]]))[0, -1]
        tokens.append(int(logits.argmax()))
        if words.model.is_control(tokens[-1]) or words.model.is_unknown(tokens[-1]):
            return tokens[start:-1]
    return tokens[start:]


def text_of(words, prompt: str, tokens: list[int]) -> str:
    """What the tokens say after the prompt."""
    before = [words.model.bos_id(), *words.model.encode(prompt)]
    return words.model.decode(before + tokens).removeprefix(words.model.decode(before))


LONG = "the king of the sea sleeps and the night of love is caf\u00e9 na\u00efve \u6d77 " * 8


@pytest.mark.parametrize(
    "prompt",
    ["", "the", "the king of", "caf\u00e9 \u6d77\u6d77", "sea\nthe", LONG[:120], LONG],
    ids=lambda prompt: f"{len(prompt)} letters",
)
@pytest.mark.parametrize("length", [32, 160])
def test_without_temperature_it_is_the_likeliest_continuation(model, words, prompt, length):
    """Over contexts of every length up to the longest and beyond, padded or not."""
    gpt, config = model
    pieces = generate(
        gpt,
        config,
        words,
        sample_prompt=prompt,
        temperature=0.0,
        sample_tokens=70,
        train_seq_len=length,
        train_batch_tokens=length,
    )
    expected = text_of(words, prompt, greedy(gpt, words, prompt, 70, length)).rstrip("\ufffd")
    assert pieces[0] == prompt and "".join(pieces[1:]) == expected and expected


def test_the_best_of_one_is_the_likeliest(model, words):
    for prompt in ("the king", ""):
        likeliest = generate(*model, words, sample_prompt=prompt, sample_tokens=40, temperature=0.0)
        for changes in (
            {"top_k": 1},
            {"top_k": 1, "temperature": 2.0, "seed": 5},
            {"temperature": 1e-4},
            {"temperature": 1e-30},
            {"temperature": 1e-45},
            {"temperature": 5e-324},
        ):
            assert generate(*model, words, sample_prompt=prompt, sample_tokens=40, **changes) == likeliest, changes


def test_a_seed_gives_one_text(model, words):
    options = {"sample_prompt": "the", "sample_tokens": 40}
    texts = ["".join(generate(*model, words, seed=seed, **options)) for seed in (1, 2, 1, 2, 3)]
    assert texts[:2] == texts[2:4] and len(set(texts)) == 3


def test_the_past_is_blind_to_the_padding(model):
    gpt, _ = model
    tokens = torch.randint(0, 320, (1, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for length in (1, 2, 31, 63, 64, 65, 127, 150):
            alone = gpt(tokens[:, :length])[0, -1]
            padding = torch.zeros(1, min(-length % 64, 160 - length), dtype=torch.long)
            padded = torch.cat([tokens[:, :length], padding], dim=1)
            torch.testing.assert_close(gpt(padded)[0, length - 1], alone, rtol=0, atol=2e-5)


class Script:
    """A model that says these tokens, whatever it hears; it keeps what it heard."""

    def __init__(self, says: list[int], vocab_size: int):
        self.says, self.vocab_size, self.heard = says, vocab_size, []

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, tokens):
        logits = torch.zeros(1, tokens.size(1), self.vocab_size)
        logits[..., self.says[min(len(self.heard), len(self.says) - 1)]] = 1000.0
        self.heard.append(tokens[0].tolist())
        return logits


def say(words, tokens: list[int], prompt="", length=160, count=None) -> tuple[list[str], Script]:
    config = Config(train_seq_len=length, train_batch_tokens=length)
    script = Script(tokens, words.model.vocab_size())
    return generate(script, config, words, sample_prompt=prompt, sample_tokens=count or len(tokens)), script


def byte_tokens(words, text: str) -> list[int]:
    return [words.model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("text", ["\u00e9", "\u6d77", "\U0001f600", "x\U0001f600y\u00e9", "\ufffd"])
def test_a_character_of_many_bytes_is_never_split(words, text):
    """A terminal that gets half a character shows rubbish."""
    pieces, _ = say(words, [*byte_tokens(words, text), *words.model.encode("end")])
    assert "".join(pieces) == text + "end"
    assert set(pieces) <= {
        "",
        *text,
        *(words.model.decode([t]) for t in words.model.encode("end")),
        text + "e",
        text + words.model.decode(words.model.encode("end")[:1]),
    }
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text


def test_half_a_character_at_the_end_is_left_out(words):
    for count in (1, 2, 3):
        pieces, _ = say(words, [*words.model.encode("the"), *byte_tokens(words, "\U0001f600")[:count]])
        assert "".join(pieces) == "the"
    assert "".join(say(words, byte_tokens(words, "\U0001f600"))[0]) == "\U0001f600"


@CHECKED
@given(data=st.data(), prompt=st.sampled_from(["", "the king", "caf\u00e9", " a", "\u6d77 ", "x" * 300]))
def test_what_is_streamed_is_what_the_tokens_decode_to(words, data, prompt):
    """Any tokens at all, broken characters among them: nothing is lost, doubled or taken back."""
    size, boundary = words.model.vocab_size(), set(np.flatnonzero(words.boundary).tolist())
    pieces_and_bytes = st.integers(0, size - 1) | st.sampled_from(byte_tokens(words, "\u00e9\u6d77\U0001f600z"))
    tokens = data.draw(st.lists(pieces_and_bytes.filter(lambda token: token not in boundary), min_size=1, max_size=25))
    pieces, _ = say(words, tokens, prompt)
    assert pieces[0] == prompt
    expected, streamed = text_of(words, prompt, tokens), "".join(pieces[1:])
    assert expected.startswith(streamed) and not expected[len(streamed) :].strip("\ufffd")
    assert expected.endswith("\ufffd") or streamed == expected


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A tokenizer with case marks."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
    import vocab

    path = tmp_path_factory.mktemp("marked") / "tok.model"
    path.write_bytes(vocab.train_sentencepiece([b"the king of the sea"] * 50, 290, "test", vocab.MARKS_OPTIONS))
    return TokenBytes(str(path), 290)


MARKED = ["The", "Sea", "king", "KING", " ", "OF", "Mc", "I", "x", "\u00c9", "\u2581", *"\ue001\ue002\ue003\ue004"]


@CHECKED
@given(texts=st.lists(st.lists(st.sampled_from(MARKED), max_size=6).map("".join), min_size=2, max_size=2))
@example(texts=["", "\ue004\u2581\ue003\ue002"])
@example(texts=["The K", "ing NASA"])
def test_what_is_streamed_has_capitals_for_case_marks(marked, texts):
    """The prompt as it was asked for, and never a character that turns into another."""
    prompt, text = texts
    tokens = marked.encode(text)
    pieces, script = say(marked, tokens or [marked.model.eos_id()], prompt)
    both = marked.decode([*marked.encode(prompt), *tokens]).decode()
    assert pieces[0] == prompt and both.startswith(prompt) and "".join(pieces) == both
    assert script.heard[0][: 1 + len(marked.encode(prompt))] == [marked.start, *marked.encode(prompt)]
    if not prompt or prompt[-1] == " ":  # after a letter, T or A may go on with its word
        assert both == prompt + text


@CHECKED
@given(data=st.binary(min_size=1, max_size=20), prompt=st.sampled_from(["", "na\u00efve"]))
@example(data="\U0001f600".encode()[:3] + "\u6d77".encode(), prompt="")
def test_any_bytes_of_a_model_of_bytes(data, prompt):
    """Without a tokenizer every byte is a token, and text is whatever they make together."""
    letters = TokenBytes("bytes", 260)
    config = Config(train_seq_len=32, train_batch_tokens=32)
    script = Script([byte + 4 for byte in data], 260)
    streamed = "".join(generate(script, config, letters, sample_prompt=prompt, sample_tokens=len(data)))
    expected = prompt + data.decode(errors="replace")
    assert expected.startswith(streamed) and not expected[len(streamed) :].strip("\ufffd")
    assert expected.endswith("\ufffd") or streamed == expected
    assert script.heard[0][: 1 + len(prompt.encode())] == [1, *(byte + 4 for byte in prompt.encode())]


@pytest.mark.parametrize("end", ["<s>", "</s>", "<unk>"])
def test_it_ends_with_the_document(words, end):
    king = words.model.encode("the king")
    pieces, script = say(words, [*king, words.model.piece_to_id(end), *king])
    assert "".join(pieces) == "the king" and len(script.heard) == len(king) + 1
    assert "".join(say(words, [words.model.piece_to_id(end)], "night")[0]) == "night"


def test_it_ends_after_so_many_tokens(words):
    (token,) = words.model.encode("e")
    pieces, script = say(words, [token], count=7)
    assert "".join(pieces) == 7 * "e" and len(script.heard) == 7


def test_the_model_hears_the_start_the_prompt_and_at_most_its_length(words):
    (token,) = words.model.encode("e")
    prompt = words.model.encode("the king\nof")
    _, script = say(words, [token], "the king\nof", length=160, count=3)
    for number, heard in enumerate(script.heard):
        past = [words.model.bos_id(), *prompt, *[token] * number]
        assert heard[: len(past)] == past and len(heard) <= 160
    _, script = say(words, [token], LONG, length=32, count=3)
    everything = [words.model.bos_id(), *words.model.encode(LONG)]
    assert script.heard == [(everything + [token] * number)[-32:] for number in range(3)]
    _, script = say(words, [token], "", length=32, count=1)
    assert script.heard[0][0] == words.model.bos_id()


def env_file(folder: Path, prompt: str) -> Path:
    """A FILE.env whose prompt is written with escapes for what a line cannot hold."""
    odd = r'["\\\x00-\x1f\x7f-\x9f\u2028\u2029]'
    text = re.sub(odd, lambda match: f"\\u{ord(match[0]):04x}", prompt)
    (folder / "x.env").write_text(f'SAMPLE_PROMPT="{text}"\nSEED=3\n', encoding="utf-8")
    return folder / "x.env"


def prompt_read(argv, environ) -> str:
    return SampleKnobs.load(list(map(str, argv)), environ).sample_prompt


@pytest.mark.parametrize(
    "prompt",
    [
        """say "it's" ""\"""",
        "'\"'",
        '"',
        "two\nlines\r\n",
        "  spaces at both ends  ",
        " ",
        "a # b",
        "#",
        "\ttab\x0b\x07",
        "\u2028\u2029\x85",
        "KEY=VALUE\nSEED=3",
        "caf\u00e9 \u6d77 \U0001f600",
        "$HOME `x` %s {y}",
    ],
)
def test_any_prompt_comes_from_the_environment_and_from_a_configuration_file(tmp_path, prompt):
    """Regression: both kinds of quotes and control characters were refused, spaces at the ends were lost."""
    assert prompt_read([], {"SAMPLE_PROMPT": prompt}) == prompt
    assert prompt_read([env_file(tmp_path, prompt)], {}) == prompt


LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\\") | st.sampled_from("'\" #\n\t")


@CHECKED
@given(prompt=st.text(LETTERS))
def test_any_prompt_at_all_comes_from_a_configuration_file(tmp_path_factory, prompt):
    folder = tmp_path_factory.mktemp("prompts")
    assert prompt_read([], {"SAMPLE_PROMPT": prompt}) == prompt
    assert prompt_read([env_file(folder, prompt)], {}) == prompt
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "text, prompt",
    [
        (r"a\nb", "a\nb"),
        (r"say \u0022it's\u0022", """say "it's\""""),
        (r"\u6d77\u0041", "\u6d77A"),
        (r"\u12", r"\u12"),
        (r"\x41 \t", r"\x41 \t"),
    ],
)
def test_what_may_be_written_in_a_prompt_by_its_number(tmp_path, text, prompt):
    quote = '"' if "'" in text else ""
    (tmp_path / "x.env").write_text(f"SAMPLE_PROMPT={quote}{text}{quote}\n", encoding="utf-8")
    assert prompt_read([], {"SAMPLE_PROMPT": text}) == prompt
    assert prompt_read([tmp_path / "x.env"], {}) == prompt


def test_its_knobs_come_from_file_and_environment_which_wins(tmp_path):
    (tmp_path / "x.env").write_text("SAMPLE_TOKENS=7\nTOP_K=3\nSEED=5\n")
    assert SampleKnobs.load([], {}) == SampleKnobs("", 200, 0.8, 0)
    assert SampleKnobs.load([str(tmp_path / "x.env")], {"TOP_K": "4"}) == SampleKnobs("", 7, 0.8, 4)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("SAMPLE_TOKENS", "0", "SAMPLE_TOKENS=0 is too small: the minimum is 1"),
        ("SAMPLE_TOKENS", "5000000000", "SAMPLE_TOKENS=5000000000 is too large: the maximum is 4294967296"),
        ("TEMPERATURE", "-0.1", "TEMPERATURE=-0.1 is too small: the minimum is 0"),
        ("TEMPERATURE", "nan", "TEMPERATURE='nan' is not a finite number: the default is 0.8"),
        ("TOP_K", "x", "TOP_K='x' is not a whole number: the default is 0"),
        ("SAMPLE_PROMPT", "a\udcffb", "SAMPLE_PROMPT='a\\udcffb' is not UTF-8: give it in that encoding"),
    ],
)
def test_its_knobs_have_the_errors_of_all_knobs(name, text, said):
    with pytest.raises(train_gpt.UserError) as caught:
        SampleKnobs.load([], {name: text})
    assert str(caught.value) == said


class Dice(Script):
    """A model with the same logits always."""

    def __init__(self, logits):
        super().__init__([0], len(logits))
        self.logits = logits

    def __call__(self, tokens):
        self.heard.append(tokens[0].tolist())
        return self.logits.expand(1, tokens.size(1), -1).clone()


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (3.0, 0), (1.0, 3), (2.0, 2), (1.0, 10**6)])
def test_tokens_are_drawn_from_the_softmax(words, temperature, top_k):
    size, count = words.model.vocab_size(), 3000
    letters = [
        token
        for token in range(size)
        if len(words.model.decode([token])) == 1 and not words.boundary[token] and token not in words.byte_ids
    ][:5]
    logits = torch.full((size,), -1e4)
    logits[letters] = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    options = {"sample_tokens": count, "temperature": temperature, "top_k": top_k}
    counts = Counter("".join(generate(Dice(logits), SHORT, words, **options)))
    kept = letters[: top_k or None]
    weights = [math.exp(float(logits[token]) / temperature) for token in kept]
    expected = {words.model.decode([t]): w / sum(weights) for t, w in zip(kept, weights, strict=True)}
    assert counts.keys() <= expected.keys()
    for letter, share in expected.items():
        assert counts[letter] / count == pytest.approx(share, abs=5 * math.sqrt(share / count))


@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (1.0, 0), (5.0, 0), (1.0, 2), (1.0, 400)])
def test_ids_that_only_fill_the_vocabulary_up_never_win(corpus, words, temperature, top_k):
    """However likely a model finds them."""
    padded = TokenBytes(str(corpus / "tok.model"), 384)
    logits = torch.zeros(384)
    logits[words.size :] = 50.0
    logits[words.boundary.nonzero()[0]] = -50.0
    model = Dice(logits)
    assert len("".join(generate(model, SHORT, padded, sample_tokens=60, temperature=temperature, top_k=top_k))) > 10
    assert len(model.heard) == 60 and max(map(max, model.heard)) < words.size


def test_logits_that_are_not_numbers_are_an_error(words):
    for temperature in (0.0, 1.0):
        with pytest.raises(train_gpt.UserError, match="not numbers.*use another ARTIFACT"):
            generate(Dice(torch.full((320,), math.nan)), SHORT, words, temperature=temperature)


def test_a_tokenizer_without_a_start_token(tmp_path):
    """Its documents begin with another boundary, as they do where bytes are weighed."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king of the sea and the night"] * 20),
        model_prefix=str(tmp_path / "nobos"),
        vocab_size=320,
        bos_id=-1,
        eos_id=-1,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "nobos.model"))
    words = TokenBytes(str(tmp_path / "nobos.model"), model.vocab_size())
    for prompt in ("", "the king"):
        pieces, script = say(words, [model.encode("king")[-1]], prompt, count=2)
        assert pieces[0] == prompt and all(0 <= heard < model.vocab_size() for heard in script.heard[0])
        assert words.boundary[script.heard[0][0]]


def test_only_the_text_goes_to_stdout(trained, corpus, tmp_path):
    environ = models.machine_settings(
        corpus,
        MODE="sample",
        ARTIFACT=trained / "final_model.int8.ptz",
        TEMPERATURE=0,
        SAMPLE_PROMPT=r"the king\nof",
        SAMPLE_TOKENS=20,
    )
    del environ["DATA_PATH"]
    before = tree(tmp_path)
    done = process(environ, tmp_path, PYTHONIOENCODING="ascii")  # a terminal that lacks letters gets what it has
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"the king\nof") and done.stdout.endswith(b"\n") and b"device:" not in done.stdout
    assert done.stdout.isascii() and b"Traceback" not in done.stderr and b"device:cpu" in done.stderr
    assert tree(tmp_path) == before


def test_a_bad_knob_is_one_line(trained, bare, call):
    code, out, err = call(bare(MODE="sample", ARTIFACT=trained / "final_model.int8.ptz", TOP_K=-1))
    assert (code, out, err) == (2, "", "error: TOP_K=-1 is too small: the minimum is 0\n")


def test_a_file_of_a_run_may_hold_its_knobs(trained, corpus, tmp_path, bare):
    """Files of before do; a run ignores them, and does not end with a sample any more."""
    (tmp_path / "x.env").write_text('SAMPLE_PROMPT="the king"\nSAMPLE_TOKENS="3"\nTEMPERATURE="0"\nTOP_K="1"\n')
    settings = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", ITERATIONS=1)
    assert models.call_main(settings, tmp_path / "x.env") == 0
    log = (tmp_path / "logs" / "run" / "train.log").read_text()
    assert "sample: " not in log and "SAMPLE_PROMPT" not in log
    done = process(bare(MODE="sample", ARTIFACT=trained / "final_model.int8.ptz"), tmp_path, args=[tmp_path / "x.env"])
    assert done.returncode == 0 and done.stdout.startswith(b"the king") and len(done.stdout) < 100
