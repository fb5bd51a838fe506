"""MODE=eval reproduces the run's score from the artifact, the data and the machine settings alone; MODE=sample prints
only the text that the model generates."""

import copy
import hashlib
import json
import math
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import exact_line, process, tree

import train_gpt
from train_gpt import GPT, Config, TokenBytes, UserError

kernels, artifacts = train_gpt.tool("kernels"), train_gpt.tool("artifact")
SampleKnobs = artifacts.SampleKnobs
CHECKED = settings()  # from the profile that conftest.py loads


def logged(run: Path) -> str:
    """The digits of the score that a run has logged."""
    return exact_line((run / "train.log").read_text())


def assumed(text: str) -> set[str]:
    """The model settings that the file did not state."""
    return set(re.search(r"^assumed, since the file does not tell: (.*)$", text, re.MULTILINE)[1].split())


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_processes_give_the_same_digits(trained, corpus, tmp_path, ranks):
    """Given only the artifact, the data and the machine settings; and they leave nothing behind."""
    here = tmp_path / "here"
    here.mkdir()
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", here / "some.name"))
    before, environ = tree(here), models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact)
    assert set(environ) == {"MODE", "ARTIFACT", *models.MACHINE}
    done = process(environ, here, ranks=ranks, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = exact_line(done.stdout.decode())
    if ranks == 1:
        assert found == logged(trained)
    (*scores, tokens, size), (*expected, all_tokens, all_bytes) = (
        map(float, re.findall(r":([\d.]+)", line)) for line in (found, logged(trained))
    )
    assert (tokens, size) == (all_tokens, all_bytes) and scores == pytest.approx(expected, abs=2e-6)
    assert tree(here) == before


@pytest.mark.parametrize(
    "knobs",
    [
        {"EVAL_STRIDE": 7, "VAL_BATCH_SIZE": 100, "GRAD_ACCUM_STEPS": 4},
        {"TIE_EMBEDDINGS": 0, "NUM_LAYERS": 1, "MICRO_BATCH_TOKENS": 64, "NUM_KV_HEADS": 4},
        {"MLP_MULT": 3, "NUM_LAYERS": 3, "TRAIN_SEQ_LEN": 64, "NUM_KV_HEADS": 1},
    ],
    ids=str,
)
def test_an_artifact_tells_all_that_its_score_needs(corpus, tmp_path, bare, call, knobs):
    run = models.train_tiny(corpus, tmp_path, ITERATIONS=2, **knobs)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=run / "final_model.int8.ptz"))
    assert code == 0 and exact_line(out) == logged(run) and "assumed" not in out


def test_the_digits_depend_on_what_the_artifact_tells(trained, corpus, tmp_path, bare, call):
    """So equal digits are meaningful. A stride does not affect training: the score is that of a run with it."""
    found = {}
    for name, value in {"ROPE_BASE": 10_000, "LOGIT_SOFTCAP": 30, "EVAL_STRIDE": 8, "TRAIN_SEQ_LEN": 64}.items():
        code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", **{name: value}))
        found[name] = exact_line(out)
        assert code == 0 and found[name] != logged(trained), name
    assert found["EVAL_STRIDE"] == logged(models.train_tiny(corpus, tmp_path, ITERATIONS=60, EVAL_STRIDE=8))
    code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", VAL_TOKENS_LIMIT=500))
    whole = logged(trained).split("tokens:")[1].split()[0]
    assert code == 0 and exact_line(out).endswith(f" partial:500/{whole}")


PT_KNOBS = {
    "TRAIN_SEQ_LEN": 32,
    "ROPE_BASE": 5000,
    "LOGIT_SOFTCAP": 20,
    "VAL_BATCH_SIZE": 512,
    "TRAIN_BATCH_TOKENS": 256,
}


def test_the_model_before_quantization_gives_the_digits_of_before(trained, bare, call):
    result = json.loads((trained / "result.json").read_text())
    code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.pt", **PT_KNOBS))
    line = exact_line(out, "final_model")
    assert code == 0 and "final_int8" not in out
    assert line.startswith(f"val_loss:{result['pre_quant_val_loss']:.8f} val_bpb:{result['pre_quant_val_bpb']:.8f} ")
    assert result["pre_quant_val_loss"] != result["val_loss"], "or this would not tell which was scored"
    assert {"ROPE_BASE=5000.0", "LOGIT_SOFTCAP=20.0", "TRAIN_SEQ_LEN=32"} < assumed(out)


def reference_artifact(state: dict) -> dict:
    """An artifact by the public reference's description; its large matrices are deliberately coarser than ours."""
    names = {"tok_emb.weight", "blocks.0.mlp.fc.weight", "blocks.1.mlp.proj.weight"}
    scales = {name: (state[name].abs().amax(1) / 100).half() for name in names}
    kept = {name: tensor for name, tensor in state.items() if name not in names}
    control = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")
    small = {name for name in kept if not name.endswith(control)}
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {name: (state[name] / scales[name].float()[:, None]).round().to(torch.int8) for name in names},
        "scales": scales,
        "dtypes": dict.fromkeys(names, "bfloat16"),
        "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in names},
        "passthrough": {name: t.half() if name in small else t for name, t in kept.items()},
        "passthrough_orig_dtypes": dict.fromkeys(small, "float32"),
    }


def test_an_artifact_of_the_public_reference(trained, tmp_path, bare, call):
    """No configuration, no checksum; the score is that of the weights its numbers represent."""
    artifact = reference_artifact(models.load((trained / "final_model.pt").read_bytes()))
    (tmp_path / "foreign.ptz").write_bytes(zlib.compress(models.torch_bytes(artifact), 9))
    meant = {name: tensor.float() for name, tensor in artifact["passthrough"].items()}
    for name, q in artifact["quantized"].items():
        meant[name] = (q.float() * artifact["scales"][name].float()[:, None]).bfloat16().float()
    (tmp_path / "meant.pt").write_bytes(models.torch_bytes(meant))
    code, out, err = call(bare(MODE="eval", ARTIFACT=tmp_path / "foreign.ptz", **PT_KNOBS))
    assert code == 0, err
    assert {"ROPE_BASE=5000.0", "LOGIT_SOFTCAP=20.0", "TRAIN_SEQ_LEN=32"} < assumed(out)
    assert "VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2.0 TIE_EMBEDDINGS=1" in out
    line = exact_line(out)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=tmp_path / "meant.pt", **PT_KNOBS))
    assert line == exact_line(out, "final_model") != logged(trained)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=tmp_path / "foreign.ptz", TRAIN_SEQ_LEN=32))
    assert {"ROPE_BASE=10000.0", "LOGIT_SOFTCAP=30.0", "TRAIN_SEQ_LEN=32"} < assumed(out)
    assert code == 0 and exact_line(out) != line


def test_eval_audits_the_data_as_a_run_does_and_needs_no_training_text(trained, corpus, tmp_path, bare, call):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(corpus / "data" / "fineweb_val_000000.bin", data)
    environ = bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", DATA_PATH=data)
    assert call(environ)[0] == 0
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 1}}}')
    code, _, err = call(environ)
    assert code == 2 and "manifest.json says 1:" in err


# Model files

MODEL = """import train_gpt
from train_gpt import knob


class Small(train_gpt.GPT):
    def logits(self, x_BTD):
        return super().logits(x_BTD) * 0.9


class Config(train_gpt.Config):
    shrink: float = knob(0.9, "what the logits are multiplied by", artifact=True)

    @classmethod
    def model_class(cls):
        return Small
"""


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """The folder of a run of a model file that is in none of the places searched for it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.py").write_text(MODEL)
    return models.train_tiny(corpus, folder, MODEL_FILE=folder / "small.py")


@pytest.fixture
def artifact(small, tmp_path):
    """A copy of its artifact and its model file in their own folder."""
    (tmp_path / "copy").mkdir()
    shutil.copy(small / "small.py", tmp_path / "copy")
    return Path(shutil.copy(small / "final_model.int8.ptz", tmp_path / "copy"))


def changed(artifact: Path, **parts):
    """Replace parts of the artifact, and update its checksum."""
    artifact.write_bytes(models.seal(models.torch_bytes(models.open_artifact(artifact) | parts)))


def test_an_artifact_names_its_model_file_by_a_hash_and_another_file_must_be_asked_for(artifact, small, bare, call):
    digest = hashlib.sha256((small / "small.py").read_bytes()).hexdigest()
    assert models.open_artifact(artifact)["source"] == {"file": "small.py", "sha256": digest}
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 0 and exact_line(out) == logged(small) and "SHRINK=0.9" in out, err
    assert f"source:{artifact.parent / 'small.py'} sha256:{digest}" in out
    (artifact.parent / "small.py").write_text(MODEL + "\n# one more line\n")
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 2 and err.count("\n") == 1
    assert f"{artifact.parent / 'small.py'} has sha256 " in err and "or set MODEL_FILE to use another" in err
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact, MODEL_FILE=artifact.parent / "small.py"))
    assert code == 0 and exact_line(out) == logged(small), err


def test_a_model_file_is_looked_for_in_a_few_places_alone(artifact, small, bare, call, tmp_path):
    (artifact.parent / "small.py").unlink()
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 2 and err.count("\n") == 1
    assert f"{artifact} is a model of small.py, which is neither next to it nor in " in err
    shutil.copy(small / "small.py", tmp_path)  # the working directory
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 0 and exact_line(out) == logged(small), err
    (artifact.parent / "small.py").write_text("raise SystemExit('another file of that name')")
    assert call(bare(MODE="eval", ARTIFACT=artifact))[0] == 0, "the one with the right hash is taken"
    trap = tmp_path / "elsewhere" / "trap.py"
    trap.parent.mkdir()
    trap.write_text("raise SystemExit('it ran')")
    digest = hashlib.sha256(trap.read_bytes()).hexdigest()
    for name in (trap, "elsewhere/trap.py", "../elsewhere/trap.py"):
        changed(artifact, source={"file": str(name), "sha256": digest})
        code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
        assert code == 2 and "is a model of trap.py, which is neither" in err


def test_an_old_artifact_may_hold_knobs_that_moved_to_a_model_file_and_are_off(trained, tmp_path, bare, call):
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path))
    told = models.open_artifact(artifact)["config"] | {"xsa_layers": 0, "x0_mix": True, "loop_layers": ""}
    changed(artifact, config=told | {"mlp_slope": 0.5})
    hint = "a knob of a model file: set MODEL_FILE=records/models/frontier.py"
    assert call(bare(MODE="eval", ARTIFACT=artifact))[::2] == (2, f"error: {artifact} records MLP_SLOPE=0.5, {hint}\n")
    changed(artifact, config=told | {"mlp_slope": 0.0})
    for more in ({}, {"MODEL_FILE": ROOT / models.FRONTIER}):  # the frontier's parameters have the same names
        code, out, err = call(bare(MODE="eval", ARTIFACT=artifact, **more))
        assert code == 0 and exact_line(out) == logged(trained), err


def test_a_claim_that_cannot_be_true_is_one_line(trained, tmp_path, bare, call):
    """tests/test_bad_input.py has more of them."""
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path))
    whole = artifact.read_bytes()
    sources = [5, ["small.py"], {"sha256": "x"}, {"file": 5}, {"file": ""}]
    # Tensors that unpack to huge sizes: a stride of 0, or many tensors sharing one storage.
    large = [{"x": torch.zeros(1).expand(2**20)}, {"x": torch.zeros(1).expand(2**34)}]
    large += [dict.fromkeys(map(str, range(20)), torch.zeros(2**24))]
    for parts in [{"source": source} for source in sources] + [{"a part of another coder": part} for part in large]:
        artifact.write_bytes(whole)
        changed(artifact, **parts)
        code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
        assert code == 2 and err.count("\n") == 1 and str(artifact) in err
        assert "source" in parts or "larger than its data" in err


# MODE=sample


@pytest.fixture(scope="module")
def words(corpus):
    """The tokenizer."""
    return TokenBytes(str(corpus / "tok.model"), int((corpus / "vocab_size").read_text()))


@pytest.fixture(scope="module")
def model(trained):
    """(model, configuration) of the artifact, with longer texts than it was trained on."""
    state, told, _ = artifacts.read_model((trained / "final_model.int8.ptz").read_bytes(), "artifact")
    config = Config.load([], told | {"TRAIN_SEQ_LEN": "160", "TRAIN_BATCH_TOKENS": "160"})
    gpt = GPT(config, kernels.blocked_attention)
    gpt.load_state_dict(state)
    return gpt, config


def generate(model, config: Config, words, **changes) -> list[str]:
    """The pieces of a sample. `changes` are knobs of the sample or of the configuration."""
    knobs = {name: changes.pop(name) for name in list(changes) if name.upper() in SampleKnobs.knobs()}
    return list(artifacts.generate(model, replace(config, **changes), SampleKnobs(**knobs), words))


def text_of(words, prompt: str, tokens: list[int]) -> str:
    """The text of the tokens after the prompt."""
    before = [words.model.bos_id(), *words.model.encode(prompt)]
    return words.model.decode(before + tokens).removeprefix(words.model.decode(before))


@torch.no_grad()
def greedy(model, words, prompt: str, count: int, length: int) -> str:
    """The most likely continuation, each token by a forward pass over exactly its past: no padding."""
    tokens = [words.model.bos_id(), *words.model.encode(prompt)]
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(int(model(torch.tensor([tokens[-length:]]))[0, -1].argmax()))
        if words.model.is_control(tokens[-1]) or words.model.is_unknown(tokens[-1]):
            return text_of(words, prompt, tokens[start:-1])
    return text_of(words, prompt, tokens[start:])


LONG = "the king of the sea sleeps and the night of love is caf\u00e9 na\u00efve \u6d77 " * 8


@pytest.mark.parametrize(
    "prompt", ["", "the king of", "sea\nthe", LONG[:120], LONG], ids=lambda value: f"{len(value)} letters"
)
@pytest.mark.parametrize("length", [32, 160])
def test_without_temperature_it_is_the_likeliest_continuation(model, words, prompt, length):
    """For contexts of every length up to the maximum and beyond, padded or not."""
    options = {"sample_prompt": prompt, "sample_tokens": 70, "train_seq_len": length, "train_batch_tokens": length}
    pieces = generate(*model, words, temperature=0.0, **options)
    expected = greedy(model[0], words, prompt, 70, length).rstrip("\ufffd")
    assert pieces[0] == prompt and "".join(pieces[1:]) == expected and expected


def test_the_best_of_one_is_the_likeliest_and_a_seed_gives_one_text(model, words):
    options = {"sample_prompt": "the king", "sample_tokens": 40}
    likeliest = generate(*model, words, temperature=0.0, **options)
    for changes in (
        {"top_k": 1},
        {"top_k": 1, "temperature": 2.0, "seed": 5},
        {"temperature": 1e-4},
        {"temperature": 5e-324},
    ):
        assert generate(*model, words, **options, **changes) == likeliest, changes
    texts = ["".join(generate(*model, words, seed=seed, **options)) for seed in (1, 2, 1, 2, 3)]
    assert texts[:2] == texts[2:4] and len(set(texts)) == 3


class Script:
    """A model that generates these tokens regardless of its input, and records the input."""

    def __init__(self, says: list[int], vocab_size: int):
        self.says, self.vocab_size, self.got = says, vocab_size, []

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, tokens):
        logits = torch.zeros(1, tokens.size(1), self.vocab_size)
        logits[..., self.says[min(len(self.got), len(self.says) - 1)]] = 1000.0
        self.got.append(tokens[0].tolist())
        return logits


def say(words, tokens: list[int], prompt="", length=160, count=None) -> tuple[list[str], Script]:
    script = Script(tokens, words.size)
    config = Config(train_seq_len=length, train_batch_tokens=length)
    return generate(script, config, words, sample_prompt=prompt, sample_tokens=count or len(tokens)), script


def assert_streamed(pieces: list[str], prompt: str, expected: str):
    """The complete text is printed except for a broken character at its end, and no piece ends within a character."""
    streamed = "".join(pieces[1:])
    assert pieces[0] == prompt and expected.startswith(streamed) and not expected[len(streamed) :].strip("\ufffd")
    assert expected.endswith("\ufffd") or streamed == expected
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def byte_tokens(words, text: str) -> list[int]:
    return [words.model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@CHECKED
@given(data=st.data(), prompt=st.sampled_from(["", "the king", "caf\u00e9", " a", "\u6d77 ", "x" * 300]))
def test_what_is_streamed_is_what_the_tokens_decode_to(words, data, prompt):
    """For any tokens, including broken characters: nothing is lost, duplicated or retracted."""
    boundary = set(np.flatnonzero(words.boundary).tolist())
    any_token = st.integers(0, words.size - 1) | st.sampled_from(byte_tokens(words, "\u00e9\u6d77\U0001f600z"))
    tokens = data.draw(st.lists(any_token.filter(lambda token: token not in boundary), min_size=1, max_size=25))
    assert_streamed(say(words, tokens, prompt)[0], prompt, text_of(words, prompt, tokens))


@CHECKED
@given(data=st.binary(min_size=1, max_size=20), prompt=st.sampled_from(["", "na\u00efve"]))
@example(data="\U0001f600".encode()[:3] + "\u6d77".encode(), prompt="")
def test_any_bytes_of_a_model_of_bytes(data, prompt):
    """Without a tokenizer every byte is a token, and text is whatever the bytes decode to together."""
    pieces, script = say(TokenBytes("bytes", 260), [byte + 4 for byte in data], prompt, length=32)
    assert_streamed(pieces, prompt, data.decode(errors="replace"))
    assert script.got[0][: 1 + len(prompt.encode())] == [1, *(byte + 4 for byte in prompt.encode())]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A tokenizer with case marks."""
    sys.path.insert(0, str(ROOT / "data"))
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
    """The prompt exactly as given, and no printed character is changed later."""
    prompt, text = texts
    tokens = marked.encode(text)
    pieces, script = say(marked, tokens or [marked.model.eos_id()], prompt)
    both = marked.decode([*marked.encode(prompt), *tokens]).decode()
    assert pieces[0] == prompt and both.startswith(prompt) and "".join(pieces) == both
    assert script.got[0][: 1 + len(marked.encode(prompt))] == [marked.start, *marked.encode(prompt)]
    if not prompt or prompt[-1] == " ":  # after a letter, T or A may continue its word
        assert both == prompt + text


@pytest.mark.parametrize("prompt, length", [("the king\nof", 160), (LONG, 32), ("", 32)], ids=lambda value: "")
def test_the_model_gets_at_most_its_length_until_the_document_or_the_sample_ends(words, prompt, length):
    (token,) = words.model.encode("e")
    pieces, script = say(words, [token], prompt, length=length, count=7)
    assert "".join(pieces) == prompt + 7 * "e" and len(script.got) == 7
    for number, got in enumerate(script.got):
        past = [words.model.bos_id(), *words.model.encode(prompt), *[token] * number][-length:]
        assert got[: len(past)] == past and len(got) <= length
    for end in ("<s>", "</s>", "<unk>"):
        pieces, script = say(words, [token, words.model.piece_to_id(end), token], prompt, length)
        assert "".join(pieces) == prompt + "e" and len(script.got) == 2


def test_without_a_start_token_a_document_begins_with_another_boundary(words):
    words = copy.copy(words)
    words.start = -1
    _, script = say(words, words.model.encode("e"), "the king")
    assert words.boundary[script.got[0][0]] and script.got[0][1:] == words.model.encode("the king") + script.got[0][3:]


class Dice(Script):
    """A model that always has the same logits."""

    def __init__(self, logits):
        super().__init__([0], len(logits))
        self.logits = logits

    def __call__(self, tokens):
        self.got.append(tokens[0].tolist())
        return self.logits.expand(1, tokens.size(1), -1).clone()


SHORT = Config(train_seq_len=32, train_batch_tokens=32)


@pytest.mark.parametrize("temperature, top_k", [(0.5, 0), (3.0, 0), (1.0, 10**6), (2.0, 2)])
def test_tokens_are_drawn_from_the_softmax(words, temperature, top_k):
    single = [t for t in range(words.size) if len(words.model.decode([t])) == 1 and t not in words.byte_ids]
    letters, count = [token for token in single if not words.boundary[token]][:5], 3000
    logits = torch.full((words.size,), -1e4)
    logits[letters] = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    options = {"sample_tokens": count, "temperature": temperature, "top_k": top_k}
    counts = Counter("".join(generate(Dice(logits), SHORT, words, **options)))
    kept = letters[: top_k or None]
    weights = [math.exp(float(logits[token]) / temperature) for token in kept]
    expected = {words.model.decode([t]): w / sum(weights) for t, w in zip(kept, weights, strict=True)}
    assert counts.keys() <= expected.keys()
    for letter, share in expected.items():
        assert counts[letter] / count == pytest.approx(share, abs=5 * math.sqrt(share / count))


def test_ids_that_only_pad_the_vocabulary_are_never_drawn_and_logits_must_be_numbers(corpus, words):
    """However likely the model considers them."""
    padded, logits = TokenBytes(str(corpus / "tok.model"), 384), torch.zeros(384)
    logits[words.size :] = 50.0
    logits[words.boundary.nonzero()[0]] = -50.0
    for knobs in ({"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 2}, {"top_k": 400}):
        model = Dice(logits)
        assert len("".join(generate(model, SHORT, padded, sample_tokens=60, **knobs))) > 10
        assert len(model.got) == 60 and max(map(max, model.got)) < words.size
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not numbers.*use another ARTIFACT"):
            generate(Dice(torch.full((320,), math.nan)), SHORT, words, temperature=temperature)


# The knobs of a sample


def env_file(folder: Path, prompt: str) -> Path:
    """A FILE.env whose prompt uses escapes for characters that a line cannot hold."""
    odd = r'["\\\x00-\x1f\x7f-\x9f\u2028\u2029]'
    text = re.sub(odd, lambda match: f"\\u{ord(match[0]):04x}", prompt)
    (folder / "x.env").write_text(f'SAMPLE_PROMPT="{text}"\nSEED=3\n', encoding="utf-8")
    return folder / "x.env"


LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\\") | st.sampled_from("'\" #\n\t")


@CHECKED
@given(prompt=st.text(LETTERS))
@example(prompt="""say "it's" ""\"""")
@example(prompt="  spaces at both ends  ")
@example(prompt="\ttab\x0b\x07 two\nlines\r\n\u2028\u2029\x85")
@example(prompt="# KEY=VALUE\nSEED=3 $HOME `x` %s {y}")
def test_any_prompt_comes_from_the_environment_and_from_a_configuration_file(tmp_path_factory, prompt):
    """Regression: both kinds of quotes and control characters were refused, spaces at the ends were lost."""
    folder = tmp_path_factory.mktemp("prompts")
    assert SampleKnobs.load([], {"SAMPLE_PROMPT": prompt}).sample_prompt == prompt
    assert SampleKnobs.load([str(env_file(folder, prompt))], {}).sample_prompt == prompt
    shutil.rmtree(folder)


def test_escapes_in_a_prompt_and_what_goes_first(tmp_path):
    for text, prompt in ((r"a\nb", "a\nb"), (r"\u6d77\u0041", "\u6d77A"), (r"\u12 \x41 \t", r"\u12 \x41 \t")):
        assert SampleKnobs.load([], {"SAMPLE_PROMPT": text}).sample_prompt == prompt
    (tmp_path / "x.env").write_text("SAMPLE_TOKENS=7\nTOP_K=3\nSEED=5\n")
    assert SampleKnobs.load([], {}) == SampleKnobs("", 200, 0.8, 0)
    assert SampleKnobs.load([str(tmp_path / "x.env")], {"TOP_K": "4"}) == SampleKnobs("", 7, 0.8, 4)


BAD = {
    "SAMPLE_TOKENS=5000000000": "is too large: the maximum is 4294967296",
    "TEMPERATURE='nan'": "is not a finite number: the default is 0.8",
    "TOP_K=-1": "is too small: the minimum is 0",
    r"SAMPLE_PROMPT='a\udcffb'": "is not UTF-8: give it in that encoding",
}


@pytest.mark.parametrize("given, said", BAD.items())
def test_a_bad_knob_is_one_line(trained, bare, call, given, said):
    name, text = given.split("=")
    text = text.strip("'").replace(r"\udcff", "\udcff")
    environ = bare(MODE="sample", ARTIFACT=trained / "final_model.int8.ptz", **{name: text})
    assert call(environ) == (2, "", f"error: {given} {said}\n")


def test_only_the_text_goes_to_stdout_and_a_run_ignores_the_knobs_of_a_sample(trained, corpus, tmp_path, bare):
    """A FILE.env may hold both. Works without data, and on a terminal that lacks characters."""
    (tmp_path / "x.env").write_text(r'SAMPLE_PROMPT="the king\nof"' + '\nSAMPLE_TOKENS="20"\nTEMPERATURE="0"\n')
    values = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", ITERATIONS=1)
    assert models.call_main(values, tmp_path / "x.env") == 0
    log = (tmp_path / "logs" / "run" / "train.log").read_text()
    assert "sample: " not in log and "SAMPLE_PROMPT" not in log
    environ, before = bare(MODE="sample", ARTIFACT=trained / "final_model.int8.ptz"), tree(tmp_path)
    del environ["DATA_PATH"]
    done = process(environ, tmp_path, args=[tmp_path / "x.env"], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"the king\nof") and done.stdout.endswith(b"\n") and len(done.stdout) < 200
    assert done.stdout.isascii() and b"device:" not in done.stdout
    assert b"Traceback" not in done.stderr and b"device:cpu" in done.stderr and tree(tmp_path) == before
