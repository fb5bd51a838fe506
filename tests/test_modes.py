"""MODE=eval scores as the run did, MODE=sample writes what the model says, MODE=check tells what would go wrong."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import check
import eval as eval_mode
import sample
import train_gpt
from train_gpt import GPT, KNOBS, Config, TokenBytes

CHECKED = settings()  # those of the profile that conftest.py loads


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a finished run, which ends with a sample."""
    folder = tmp_path_factory.mktemp("trained")
    return models.train_tiny(corpus, folder, ITERATIONS=60, SAMPLE_PROMPT=r"the king\nof", SAMPLE_TOKENS=30)


@pytest.fixture
def bare(corpus, tmp_path, monkeypatch):
    """Function: the environment of a call with nothing but what the machine and the data need."""
    monkeypatch.chdir(tmp_path)
    return lambda **knobs: models.machine_settings(corpus, **knobs)


@pytest.fixture
def call(capfd):
    """Function: (exit code, stdout, stderr) of main() in this environment."""

    def run(environ):
        capfd.readouterr()
        return models.call_main(environ), *capfd.readouterr()

    return run


def process(environ: dict[str, str], cwd: Path, ranks=1, **more) -> subprocess.CompletedProcess:
    """train_gpt.py in a process of its own, or under torchrun."""
    others = {name: text for name, text in os.environ.items() if name not in KNOBS and name not in models.LAUNCHER}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train_gpt.py")]
    return subprocess.run(command, env=others | environ | more, cwd=cwd, capture_output=True, timeout=300, check=False)


def exact_line(text: str, label="final_int8_zlib_roundtrip") -> str:
    (line,) = re.findall(rf"^{label}_exact (.*)$", text, re.MULTILINE)
    assert re.match(r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} tokens:\d+ bytes:\d+", line)
    return line


def assumed(text: str) -> set[str]:
    """What the file did not tell of its model."""
    return set(re.search(r"^assumed, since the file does not tell: (.*)$", text, re.MULTILINE)[1].split())


def tree(path: Path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


# MODE=eval


def test_another_process_gives_the_same_digits(trained, corpus, tmp_path):
    """With nothing but the artifact, the data and the machine; and it leaves nothing behind."""
    (tmp_path / "elsewhere").mkdir()
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path / "elsewhere" / "some.name"))
    before = tree(tmp_path)
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact)
    assert set(environ) == {"MODE", "ARTIFACT", *models.MACHINE}
    done = process(environ, tmp_path)
    assert done.returncode == 0, done.stderr
    assert exact_line(done.stdout.decode()) == exact_line((trained / "train.log").read_text())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("knobs", [
    {}, {"EVAL_STRIDE": 8}, {"EVAL_STRIDE": 7, "VAL_BATCH_SIZE": 100}, {"TIE_EMBEDDINGS": 0, "NUM_LAYERS": 1},
    {"GRAD_ACCUM_STEPS": 4}, {"MICRO_BATCH_TOKENS": 64, "NUM_KV_HEADS": 4}, {"MLP_MULT": 3, "NUM_LAYERS": 3},
    {"TRAIN_SEQ_LEN": 64, "NUM_KV_HEADS": 1},
], ids=str)  # fmt: skip
def test_an_artifact_tells_all_that_its_score_needs(corpus, tmp_path, bare, call, knobs):
    run = models.train_tiny(corpus, tmp_path, ITERATIONS=2, **knobs)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=run / "final_model.int8.ptz"))
    assert code == 0 and exact_line(out) == exact_line((run / "train.log").read_text())
    assert "assumed" not in out


def test_the_digits_depend_on_what_the_artifact_tells(trained, corpus, bare, call):
    """So that equal digits above prove something: each of these knobs changes them, where it is given."""
    artifact, own = trained / "final_model.int8.ptz", exact_line((trained / "train.log").read_text())
    for knobs in ({"ROPE_BASE": 10_000}, {"LOGIT_SOFTCAP": 30}, {"EVAL_STRIDE": 8}, {"TRAIN_SEQ_LEN": 64}):
        code, out, _ = call(bare(MODE="eval", ARTIFACT=artifact, **knobs))
        assert code == 0 and exact_line(out) != own, knobs


def test_a_stride_given_at_the_evaluation_scores_as_a_run_with_it(trained, corpus, tmp_path, bare, call):
    """The stride is no part of training, so the weights are the same."""
    run = models.train_tiny(corpus, tmp_path, ITERATIONS=60, EVAL_STRIDE=8)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", EVAL_STRIDE=8))
    assert code == 0 and exact_line(out) == exact_line((run / "train.log").read_text())


def test_a_part_of_the_text_is_labelled(trained, bare, call):
    code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", VAL_TOKENS_LIMIT=500))
    whole = exact_line((trained / "train.log").read_text()).split("tokens:")[1].split()[0]
    assert code == 0 and exact_line(out).endswith(f" partial:500/{whole}")


PT_KNOBS = {"TRAIN_SEQ_LEN": 32, "ROPE_BASE": 5000, "LOGIT_SOFTCAP": 20, "VAL_BATCH_SIZE": 512,
            "TRAIN_BATCH_TOKENS": 256}  # fmt: skip


def test_the_model_before_quantisation_gives_the_digits_of_before(trained, bare, call):
    result = json.loads((trained / "result.json").read_text())
    code, out, _ = call(bare(MODE="eval", ARTIFACT=trained / "final_model.pt", **PT_KNOBS))
    line = exact_line(out, "final_model")
    assert code == 0 and "final_int8" not in out
    assert line.startswith(f"val_loss:{result['pre_quant_val_loss']:.8f} val_bpb:{result['pre_quant_val_bpb']:.8f} ")
    assert result["pre_quant_val_loss"] != result["val_loss"], "or this would not tell which was scored"
    assert {"ROPE_BASE=5000.0", "LOGIT_SOFTCAP=20.0", "TRAIN_SEQ_LEN=32"} < assumed(out)


def reference_artifact(state: dict) -> dict:
    """As the public reference writes it, by its description; the large matrices on purpose coarser than ours."""
    names = {"tok_emb.weight", "blocks.0.mlp.fc.weight", "blocks.1.mlp.proj.weight"}
    scales = {name: (state[name].abs().amax(1) / 100).half() for name in names}
    quantized = {name: (state[name] / scales[name].float()[:, None]).round().to(torch.int8) for name in names}
    kept = {name: tensor for name, tensor in state.items() if name not in names}
    control = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")
    small = {name for name in kept if not name.endswith(control)}
    return {"__quant_format__": "int8_clean_per_row_v1", "quantized": quantized, "scales": scales,
            "dtypes": dict.fromkeys(names, "bfloat16"), "qmeta": {n: {"scheme": "per_row", "axis": 0} for n in names},
            "passthrough": {name: t.half() if name in small else t for name, t in kept.items()},
            "passthrough_orig_dtypes": dict.fromkeys(small, "float32")}  # fmt: skip


def test_an_artifact_of_the_public_reference(trained, tmp_path, bare, call):
    """No configuration, no checksum; its score is that of the weights that its numbers stand for."""
    artifact = reference_artifact(models.load((trained / "final_model.pt").read_bytes()))
    (tmp_path / "foreign.ptz").write_bytes(zlib.compress(models.torch_bytes(artifact), 9))
    meant = {name: tensor.float() for name, tensor in artifact["passthrough"].items()} | {
        name: (q.float() * artifact["scales"][name].float()[:, None]).bfloat16().float()
        for name, q in artifact["quantized"].items()}  # fmt: skip
    (tmp_path / "meant.pt").write_bytes(models.torch_bytes(meant))
    code, out, err = call(bare(MODE="eval", ARTIFACT=tmp_path / "foreign.ptz", **PT_KNOBS))
    assert code == 0, err
    assert {"ROPE_BASE=5000.0", "LOGIT_SOFTCAP=20.0", "TRAIN_SEQ_LEN=32"} < assumed(out)
    assert "VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2.0 TIE_EMBEDDINGS=1" in out
    line = exact_line(out)
    code, out, _ = call(bare(MODE="eval", ARTIFACT=tmp_path / "meant.pt", **PT_KNOBS))
    assert line == exact_line(out, "final_model")
    assert line != exact_line((trained / "train.log").read_text())
    code, out, _ = call(bare(MODE="eval", ARTIFACT=tmp_path / "foreign.ptz", TRAIN_SEQ_LEN=32))
    assert {"ROPE_BASE=10000.0", "LOGIT_SOFTCAP=30.0", "TRAIN_SEQ_LEN=32"} < assumed(out)
    assert code == 0 and exact_line(out) != line


def test_two_ranks_score_as_one(trained, corpus, tmp_path):
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=trained / "final_model.int8.ptz")
    done = process(environ, tmp_path, ranks=2, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    numbers = [re.findall(r":([\d.]+)", exact_line(text))
               for text in (done.stdout.decode(), (trained / "train.log").read_text())]  # fmt: skip
    assert numbers[0][2:] == numbers[1][2:]
    assert [float(n) for n in numbers[0][:2]] == pytest.approx([float(n) for n in numbers[1][:2]], abs=2e-6)


def test_eval_finds_data_that_is_not_what_it_should_be(trained, corpus, tmp_path, bare, call):
    """The audit of the data is that of a run."""
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 1}}}')
    code, _, err = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", DATA_PATH=data))
    assert code == 2 and "manifest.json states 1:" in err
    shutil.rmtree(data)
    data.mkdir()
    shutil.copy(corpus / "data" / "fineweb_val_000000.bin", data)
    code, _, err = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", DATA_PATH=data))
    assert code == 0, "the training text is not needed"


# MODE=sample


@pytest.fixture(scope="module")
def words(corpus):
    """The tokenizer."""
    return TokenBytes(str(corpus / "tok.model"), int((corpus / "vocab_size").read_text()))


@pytest.fixture(scope="module")
def model(trained):
    """(model, configuration) of the artifact, with longer texts than it was trained on."""
    state, told = eval_mode.read_model((trained / "final_model.int8.ptz").read_bytes(), "artifact", train_gpt)
    config = Config.load([], told | {"TRAIN_SEQ_LEN": "160", "TRAIN_BATCH_TOKENS": "160"})
    gpt = GPT(config, train_gpt.blocked_attention)  # which no switch of torch turns off
    gpt.load_state_dict(state)
    return gpt, config


def generate(model, config: Config, words, **changes) -> list[str]:
    return list(sample.generate(model, dataclasses.replace(config, **changes), words))


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


@pytest.mark.parametrize("prompt", ["", "the", "the king of", "caf\u00e9 \u6d77\u6d77", "sea\nthe", LONG[:120], LONG],
                         ids=lambda prompt: f"{len(prompt)} letters")  # fmt: skip
@pytest.mark.parametrize("length", [32, 160])
def test_without_temperature_it_is_the_likeliest_continuation(model, words, prompt, length):
    """Over contexts of every length up to the longest and beyond, padded or not."""
    gpt, config = model
    pieces = generate(gpt, config, words, sample_prompt=prompt.replace("\n", "\\n"), temperature=0.0, sample_tokens=70,
                      train_seq_len=length, train_batch_tokens=length)  # fmt: skip
    expected = text_of(words, prompt, greedy(gpt, words, prompt, 70, length)).rstrip("\ufffd")
    assert pieces[0] == prompt and "".join(pieces[1:]) == expected and expected


def test_the_best_of_one_is_the_likeliest(model, words):
    for prompt in ("the king", ""):
        likeliest = generate(*model, words, sample_prompt=prompt, sample_tokens=40, temperature=0.0)
        for changes in ({"top_k": 1}, {"top_k": 1, "temperature": 2.0, "seed": 5}, {"temperature": 1e-4},
                        {"temperature": 1e-30}, {"temperature": 1e-45}, {"temperature": 5e-324}):  # fmt: skip
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
    config = Config(sample_prompt=prompt, sample_tokens=count or len(tokens), train_seq_len=length,
                    train_batch_tokens=length)  # fmt: skip
    script = Script(tokens, words.model.vocab_size())
    return list(sample.generate(script, config, words)), script


def byte_tokens(words, text: str) -> list[int]:
    return [words.model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize("text", ["\u00e9", "\u6d77", "\U0001f600", "x\U0001f600y\u00e9", "\ufffd"])
def test_a_character_of_many_bytes_is_never_split(words, text):
    """A terminal that gets half a character shows rubbish."""
    pieces, _ = say(words, [*byte_tokens(words, text), *words.model.encode("end")])
    assert "".join(pieces) == text + "end"
    assert set(pieces) <= {"", *text, *(words.model.decode([t]) for t in words.model.encode("end")), text + "e",
                           text + words.model.decode(words.model.encode("end")[:1])}  # fmt: skip
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


@CHECKED
@given(data=st.binary(min_size=1, max_size=20), prompt=st.sampled_from(["", "na\u00efve"]))
@example(data="\U0001f600".encode()[:3] + "\u6d77".encode(), prompt="")
def test_any_bytes_of_a_model_of_bytes(data, prompt):
    """Without a tokenizer every byte is a token, and text is whatever they make together."""
    letters = TokenBytes("bytes", 260)
    config = Config(sample_prompt=prompt, sample_tokens=len(data), train_seq_len=32, train_batch_tokens=32)
    script = Script([byte + 4 for byte in data], 260)
    streamed = "".join(sample.generate(script, config, letters))
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
    _, script = say(words, [token], r"the king\nof", length=160, count=3)
    for number, heard in enumerate(script.heard):
        past = [words.model.bos_id(), *prompt, *[token] * number]
        assert heard[: len(past)] == past and len(heard) <= 160
    _, script = say(words, [token], LONG, length=32, count=3)
    everything = [words.model.bos_id(), *words.model.encode(LONG)]
    assert script.heard == [(everything + [token] * number)[-32:] for number in range(3)]
    _, script = say(words, [token], "", length=32, count=1)
    assert script.heard[0][0] == words.model.bos_id()


class Dice(Script):
    """A model with the same logits always."""

    def __init__(self, logits):
        super().__init__([0], len(logits))
        self.logits = logits

    def __call__(self, tokens):
        return self.logits.expand(1, tokens.size(1), -1).clone()


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (3.0, 0), (1.0, 3), (2.0, 2), (1.0, 10**6)])
def test_tokens_are_drawn_from_the_softmax(words, temperature, top_k):
    size, count = words.model.vocab_size(), 3000
    letters = [token for token in range(size) if len(words.model.decode([token])) == 1 and not words.boundary[token]
               and not words.is_byte[token]][:5]  # fmt: skip
    logits = torch.full((size,), -1e4)
    logits[letters] = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    config = Config(sample_tokens=count, temperature=temperature, top_k=top_k, train_seq_len=32, train_batch_tokens=32)
    counts = Counter("".join(sample.generate(Dice(logits), config, words)))
    kept = letters[: top_k or None]
    weights = [math.exp(float(logits[token]) / temperature) for token in kept]
    expected = {words.model.decode([t]): w / sum(weights) for t, w in zip(kept, weights, strict=True)}
    assert counts.keys() <= expected.keys()
    for letter, share in expected.items():
        assert counts[letter] / count == pytest.approx(share, abs=5 * math.sqrt(share / count))


def test_logits_that_are_not_numbers_are_an_error(words):
    for temperature in (0.0, 1.0):
        config = Config(train_seq_len=32, train_batch_tokens=32, temperature=temperature)
        with pytest.raises(train_gpt.UserError, match="not numbers.*use another ARTIFACT"):
            list(sample.generate(Dice(torch.full((320,), math.nan)), config, words))


def test_a_tokenizer_without_a_start_token(tmp_path):
    """Its documents begin with another boundary, as they do where bytes are weighed."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king of the sea and the night"] * 20), model_prefix=str(tmp_path / "nobos"),
        vocab_size=320, bos_id=-1, eos_id=-1, hard_vocab_limit=False, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "nobos.model"))
    words = TokenBytes(str(tmp_path / "nobos.model"), model.vocab_size())
    for prompt in ("", "the king"):
        pieces, script = say(words, [model.encode("king")[-1]], prompt, count=2)
        assert pieces[0] == prompt and all(0 <= heard < model.vocab_size() for heard in script.heard[0])
        assert words.boundary[script.heard[0][0]]


def test_only_the_text_goes_to_stdout(trained, corpus, tmp_path):
    environ = models.machine_settings(corpus, MODE="sample", ARTIFACT=trained / "final_model.int8.ptz", TEMPERATURE=0,
                                      SAMPLE_PROMPT=r"the king\nof", SAMPLE_TOKENS=20)  # fmt: skip
    del environ["DATA_PATH"]
    before = tree(tmp_path)
    done = process(environ, tmp_path, PYTHONIOENCODING="ascii")  # a terminal that lacks letters gets what it has
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"the king\nof") and done.stdout.endswith(b"\n") and b"device:" not in done.stdout
    assert done.stdout.isascii() and b"Traceback" not in done.stderr and b"device:cpu" in done.stderr
    assert tree(tmp_path) == before


def test_a_run_with_a_prompt_ends_with_a_sample(trained, bare, call):
    log = (trained / "train.log").read_text(encoding="utf-8")
    head, _, ending = log.rpartition("\nsample: ")
    assert ending.startswith("the king\nof") and exact_line(head)
    code, out, err = call(bare(MODE="sample", ARTIFACT=trained / "final_model.int8.ptz", SAMPLE_PROMPT=r"the king\nof",
                               SAMPLE_TOKENS=30))  # fmt: skip
    assert code == 0 and out == ending, "the artifact writes what the run wrote"
    assert "artifact:" in err and "error" not in err


def test_a_run_without_a_prompt_has_no_sample(corpus, tmp_path, bare):
    run = models.train_tiny(corpus, tmp_path, ITERATIONS=1)
    assert "sample: " not in (run / "train.log").read_text()


# MODE=check


@pytest.fixture
def checked(corpus, tmp_path, monkeypatch, call):
    """Function: (exit code, facts, problems, stdout) of MODE=check, which writes nothing."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(**knobs):
        before = tree(tmp_path)
        code, out, err = call(models.tiny_settings(corpus, **{"MODE": "check", "LOG_DIR": here / "logs"} | knobs))
        assert tree(tmp_path) == before and not err
        last = out.splitlines()[-1]
        assert last.startswith("check_json:")
        facts = json.loads(last.removeprefix("check_json:"), parse_constant=pytest.fail)
        problems = facts.pop("problems")
        for number, problem in enumerate(problems, 1):
            assert f"\nproblem {number}: {problem}\n" in out
        for name, value in facts.items():
            assert f"{name}: {value}\n" in out
        assert code == (1 if problems else 0), (problems, facts)
        return code, facts, problems, out

    return run


def test_check_of_good_data(checked, corpus, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    code, facts, problems, out = checked(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=1000)
    assert code == 0 and not problems
    config = Config.load([], models.tiny_settings(corpus))
    params = sum(p.numel() for p in GPT(config).parameters())
    sizes = [len((ROOT / "train_gpt.py").read_bytes()), check.projected_bytes(config, train_gpt, GPT(config))]
    assert facts["model_params"] == params
    assert [facts["bytes_code"], facts["bytes_artifact_projected"]] == sizes
    assert facts["bytes_total_projected"] == sum(sizes) and facts["bytes_limit"] == 16_000_000
    shards = {split: [np.fromfile(path, "<u2", offset=1024) for path in sorted((corpus / "data").glob(f"*_{split}_*"))]
              for split in ("train", "val")}  # fmt: skip
    assert facts["train_shards"] == len(shards["train"]) and facts["val_shards"] == 1
    assert facts["train_tokens"] == sum(map(len, shards["train"])) and facts["val_tokens"] == len(shards["val"][0])
    assert facts["val_bytes"] == json_bytes(corpus) and facts["bytes_proved"] is False
    assert facts["tokens_per_step"] == 256 and facts["micro_batch_tokens"] * facts["grad_accum_steps"] == 256
    assert facts["device_type"] == "cpu" and facts["ranks"] == 1 and facts["torch"] == torch.__version__
    assert facts["seconds_per_token"] > 0 and facts["memory_estimate_mib"] >= 0
    assert facts["seconds_per_step"] == pytest.approx(256 * facts["seconds_per_token"])
    assert facts["steps_in_budget"] == min(1000, int(600 / facts["seconds_per_step"]))
    assert facts["nccl_environment"] == {"NCCL_DEBUG": "WARN"}
    assert "attention:" in facts["kernels"] and "compile:0" in facts["kernels"]


def json_bytes(corpus) -> int:
    """Bytes of the validation text, by decoding it."""
    import sentencepiece as spm

    model = spm.SentencePieceProcessor(model_file=str(corpus / "tok.model"))
    tokens = np.fromfile(corpus / "data" / "fineweb_val_000000.bin", "<u2", offset=1024)
    documents = np.split(tokens, np.flatnonzero(tokens == model.bos_id()))
    return sum(len(model.decode(document.tolist()).encode()) for document in documents)


def test_check_before_the_data_is_there(checked, tmp_path):
    code, facts, problems, _ = checked(DATA_PATH=tmp_path / "nowhere", TOKENIZER_PATH=tmp_path / "none.model")
    assert code == 1 and len(problems) == 1
    assert f"DATA_PATH={tmp_path / 'nowhere'}" in problems[0]
    assert "python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env" in problems[0]
    assert facts["model_params"] > 0 and facts["schedule"] and facts["disk_free_mib"] > 0, "the rest is checked"


def half_a_shard(data: Path):
    path = data / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:5000])


def token_at(name: str, place: int):
    def change(data: Path):
        tokens = np.fromfile(data / name, "<u2", offset=1024)
        tokens[place] = 60_000
        write_shard(data / name, tokens)

    return change


def manifest(data: Path):
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 5}}}')


@pytest.mark.parametrize("damage, said", [
    (half_a_shard, "make or fetch it again"), (manifest, "manifest.json states 5"),
    (token_at("fineweb_train_000000.bin", 0), "token 60000"), (token_at("fineweb_train_000001.bin", -1), "token 60000"),
    (token_at("fineweb_val_000000.bin", 1000), "token 60000"),
    (lambda data: (data / "fineweb_val_000000.bin").unlink(), "holds no fineweb_val_"),
    (lambda data: (data / "fineweb_train_000000.bin").rename(data / "fineweb_train_000005.bin"), "is missing"),
], ids=["half", "manifest", "first", "last", "validation", "none", "gap"])  # fmt: skip
def test_check_of_bad_data(checked, corpus, tmp_path, damage, said):
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    damage(data)
    code, facts, problems, _ = checked(DATA_PATH=data)
    assert code == 1 and len(problems) == 1 and said in problems[0] and facts["model_params"]


def test_check_labels_what_it_only_sampled(checked, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SAMPLED", 100)
    _, facts, _, _ = checked()
    assert facts["train_tokens_checked"].startswith(f"400 of {facts['train_tokens']}, ")
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    token_at("fineweb_train_000001.bin", -100)(data)
    assert "token 60000" in checked(DATA_PATH=data)[2][0]
    monkeypatch.setattr(check, "SAMPLED", 2**16)
    _, facts, _, _ = checked()
    assert facts["train_tokens_checked"].startswith(f"{facts['train_tokens']} of {facts['train_tokens']}, ")


def test_check_of_a_wrong_tokenizer(checked, corpus, tmp_path):
    size = (corpus / "vocab_size").read_text()
    code, _, problems, _ = checked(VOCAB_SIZE=2048)
    assert code == 1 and f"set VOCAB_SIZE={size}" in problems[0]
    code, _, problems, _ = checked(TOKENIZER_PATH=corpus / "data" / "fineweb_val_000000.bin")
    assert code == 1 and "no SentencePiece model" in problems[0]
    code, _, problems, _ = checked(TOKENIZER_PATH=tmp_path / "nowhere.model")
    assert code == 1 and "prepare_shakespeare" in problems[0]


def test_check_of_an_artifact_over_the_limit(checked):
    total = checked()[1]["bytes_total_projected"]
    for limit, code in ((total, 0), (total - 1, 1)):
        assert checked(SIZE_LIMIT=limit)[0] == code
    problem = checked(SIZE_LIMIT=total - 1)[2][0]
    assert str(total) in problem and str(total - 1) in problem and "lower MODEL_DIM" in problem


def test_check_of_a_full_disk(checked, monkeypatch):
    usage = shutil.disk_usage
    asked = []

    def little(path):
        asked.append(path)
        return SimpleNamespace(**usage(path)._asdict() | {"free": 2**20})

    monkeypatch.setattr(shutil, "disk_usage", little)
    code, _, problems, _ = checked()
    assert code == 1 and len(problems) == 1 and asked
    assert "has 1 MiB free" in problems[0] and "LOG_DIR=" in problems[0] and "make room" in problems[0]


def test_check_of_a_place_that_is_none(checked, corpus):
    code, _, problems, _ = checked(LOG_DIR=corpus / "tok.model")
    assert code == 1 and f"LOG_DIR={corpus / 'tok.model'}" in problems[0] and "choose another" in problems[0]


def test_check_of_a_clock_shorter_than_a_step(checked):
    code, facts, problems, _ = checked(MAX_WALLCLOCK_SECONDS="1e-6")
    assert code == 1 and facts["steps_in_budget"] == 0
    assert "one step takes" in problems[0] and "raise MAX_WALLCLOCK_SECONDS" in problems[0]


def test_check_of_a_batch_that_ranks_cannot_share(checked):
    code, _, problems, _ = checked(TARGET_WORLD_SIZE=3)
    assert code == 1 and "3 ranks cannot share" in problems[0] and "use 288 tokens" in problems[0]


def test_check_of_several_problems(checked, tmp_path):
    code, _, problems, _ = checked(DATA_PATH=tmp_path / "nowhere", MAX_WALLCLOCK_SECONDS="1e-6", SIZE_LIMIT=10)
    assert code == 1 and len(problems) == 3


def test_check_here_of_a_run_on_eight_gpus(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, facts, problems, _ = checked(TARGET_WORLD_SIZE=8, DEVICE="cuda", TRAIN_BATCH_TOKENS=1024, NUM_LAYERS=1,
                                       MAX_WALLCLOCK_SECONDS=600)  # fmt: skip
    assert code == 0 and not problems
    assert facts["target_ranks"] == 8 and facts["ranks"] == 1 and facts["device_type"] == "cpu"
    assert facts["grad_accum_steps"] == 1 and facts["micro_batch_tokens"] == 128
    assert "no cuda device here" in facts["steps_in_budget"] and facts["seconds_per_step"] is None
    assert facts["memory_mib"] is None
    _, facts, _, _ = checked(TARGET_WORLD_SIZE=2, DEVICE="cuda", TRAIN_BATCH_TOKENS=1024, NUM_LAYERS=1)
    assert facts["grad_accum_steps"] == 4, "eight micro-batches on any number of GPUs"


def test_check_in_a_process_of_its_own(corpus, tmp_path):
    environ = models.tiny_settings(corpus, MODE="check", DATA_PATH=tmp_path / "nowhere", LOG_DIR=tmp_path / "logs")
    done = process(environ | {"ITERATION": "7"}, tmp_path)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1 and not done.stderr and lines[-1].startswith("check_json:{")
    assert json.loads(lines[-1].removeprefix("check_json:"))["problems"]
    assert "warning: the environment variable ITERATION is no knob: did you mean ITERATIONS?" in lines
    assert not list(tmp_path.iterdir())


# The schedule in words

SCHEDULES = [{}, {"WARMDOWN_FRAC": 0}, {"WARMDOWN_FRAC": 1}, {"WARMDOWN_FRAC": 0.5}, {"WARMDOWN_FRAC": 0.3526}]


@pytest.mark.parametrize("knobs", SCHEDULES, ids=str)
@pytest.mark.parametrize("clock", [0, 600, 7200])
def test_the_schedule_in_words_is_that_of_the_run(knobs, clock):
    """Every number in the words is where the learning rate turns."""
    config = Config.load([], {name: str(v) for name, v in (
        knobs | {"MAX_WALLCLOCK_SECONDS": clock, "ITERATIONS": 2000}).items()})  # fmt: skip
    words = check.schedule(config)
    rate = train_gpt.lr_scale
    pattern = r"full until ((?:step )?)(\d+)(?: s|), then linear to 0 at (?:step )?(\d+)(?: s|)"
    found = re.findall(pattern, words)
    assert len(found) == (2 if clock else 1)
    assert bool(clock) == words.endswith(", if that comes first") and bool(found[0][0]) != bool(clock)
    ends = [(int(turn), int(end)) for _, turn, end in found]
    by_step = [lambda step: rate(config, train_gpt.progress_at(config, step, 0.0))]
    by_clock = [lambda s: rate(config, train_gpt.progress_at(config, 10, s))]
    points = by_clock + by_step if clock else by_step
    assert ends[-1][1] == 2000 and (not clock or ends[0][1] == clock)
    for at, (turn, end) in zip(points, ends, strict=True):
        assert all(at(x) == 1 for x in range(1, turn, 7))
        if turn < end:
            assert at(end) == 0 and at((turn + end) / 2) == pytest.approx(0.5, abs=0.01)
            assert at(turn + 0.02 * (end - turn) + 1) < 1
        else:
            assert at(end - 1) == 1


# Typos


def neighbours(name: str, rng: random.Random) -> set[str]:
    """All deletions and transpositions, and at every place an insertion and a substitution."""
    letters, places = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", range(len(name))
    found = {name[:i] + name[i + 1 :] for i in places}
    found |= {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :] for i in places}
    found |= {name[:i] + rng.choice(letters) + name[i + 1 :] for i in places}
    found |= {name[:i] + rng.choice(letters) + name[i:] for i in range(len(name) + 1)}
    return found - KNOBS.keys()


@pytest.mark.parametrize("name", KNOBS)
def test_every_slip_of_a_knob_draws_a_warning(name):
    slips = neighbours(name, random.Random(name))
    assert len(slips) >= 3 * len(name)
    for slip in slips:
        (warning,) = check.typo_warnings({slip: "1", "PATH": "/bin", name: "2"}, KNOBS)
        match = re.fullmatch(rf"warning: the environment variable {slip} is no knob: did you mean (\w+)\?", warning)
        assert match[1] in KNOBS
        near = neighbours_of_all(match[1])
        assert slip in near or match[1] == name or match[1] in neighbours_of_all(name), "another only if it is as near"


def neighbours_of_all(name: str) -> set[str]:
    """Every name that is one edit away."""
    letters, places = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", range(len(name))
    return ({name[:i] + name[i + 1 :] for i in places}
            | {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :] for i in places}
            | {name[:i] + letter + name[i + 1 :] for i in places for letter in letters}
            | {name[:i] + letter + name[i:] for i in range(len(name) + 1) for letter in letters})  # fmt: skip


def test_lower_case_draws_a_warning():
    for name in KNOBS:
        assert f"did you mean {name}?" in check.typo_warnings({name.lower(): "1"}, KNOBS)[0]


def test_what_launchers_and_shells_set_draws_no_warning():
    torchrun = "LOCAL_RANK RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE GROUP_WORLD_SIZE " \
        "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS " \
        "TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING " \
        "OMP_NUM_THREADS"  # fmt: skip
    shell = "_ PATH HOME USER SHELL PWD TERM LANG EDITOR SHLVL LOGNAME MAIL DISPLAY TMPDIR HOSTNAME PS1 LC_ALL"
    slurm = "SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_NODEID SLURM_NNODES SLURM_LOCALID SLURM_STEP_ID"
    names = f"{torchrun} {shell} {slurm}".split()
    assert check.typo_warnings(dict.fromkeys([*names, *KNOBS], "1"), KNOBS) == []


@CHECKED
@given(names=st.lists(st.text(max_size=12)))
@example(names=["ITERATION\udcff", "SEEDS\n", "", "\x1b[2J"])
def test_a_warning_can_always_be_printed(names):
    """Also about names that are not text."""
    for warning in check.typo_warnings(dict.fromkeys(names, "1"), KNOBS):
        assert warning.isprintable() and warning.encode()


def test_a_mode_whose_file_is_missing():
    assert train_gpt.beside("check") is check and train_gpt.beside("sample") is sample
    with pytest.raises(train_gpt.UserError, match="nothing.py is not beside train_gpt.py"):
        train_gpt.beside("nothing")


def test_the_script_alone_trains_exports_and_scores(corpus, tmp_path):
    """What a submission ships. It says what the files beside it would add."""
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    environ = {k: v for k, v in os.environ.items() if k not in KNOBS and k not in models.LAUNCHER}
    environ |= models.tiny_settings(corpus)

    def run(**more):
        return subprocess.run([sys.executable, "train_gpt.py"], env=environ | more, cwd=tmp_path, capture_output=True,
                              text=True, timeout=300, check=False)  # fmt: skip

    done = run()
    assert done.returncode == 0, done.stderr
    warnings = re.findall(r"^warning: (\w+\.py) is not beside train_gpt.py: .+$", done.stdout, re.MULTILINE)
    assert warnings == ["check.py", "lifeline.py", "audit.py"]
    made = {path.name for path in (tmp_path / "logs" / "run").iterdir()}
    models_made, texts_made = {"final_model.int8.ptz", "final_model.pt"}, {"config.env", "metrics.jsonl", "train.log"}
    assert made == models_made | texts_made | {"train_gpt.py"}
    assert exact_line(done.stdout) in (tmp_path / "logs" / "run" / "train.log").read_text()
    again = run()
    assert again.returncode == 2 and "logs/run exists, or RESUME is set: without lifeline.py" in again.stderr
    resumed = run(RUN_ID="other", RESUME="logs/run")
    assert resumed.returncode == 2 and "without lifeline.py give a new RUN_ID and no RESUME" in resumed.stderr
    other = run(MODE="eval", ARTIFACT="logs/run/final_model.int8.ptz")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "eval.py is not beside" in other.stderr
