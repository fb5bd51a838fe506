"""MODE=eval scores as the run did, with nothing but the artifact, the data and the machine."""

import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path

import models
import pytest
import torch
from models import exact_line, process, tree


def assumed(text: str) -> set[str]:
    """What the file did not tell of its model."""
    return set(re.search(r"^assumed, since the file does not tell: (.*)$", text, re.MULTILINE)[1].split())


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


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"EVAL_STRIDE": 8},
        {"EVAL_STRIDE": 7, "VAL_BATCH_SIZE": 100},
        {"TIE_EMBEDDINGS": 0, "NUM_LAYERS": 1},
        {"GRAD_ACCUM_STEPS": 4},
        {"MICRO_BATCH_TOKENS": 64, "NUM_KV_HEADS": 4},
        {"MLP_MULT": 3, "NUM_LAYERS": 3},
        {"TRAIN_SEQ_LEN": 64, "NUM_KV_HEADS": 1},
    ],
    ids=str,
)
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


PT_KNOBS = {
    "TRAIN_SEQ_LEN": 32,
    "ROPE_BASE": 5000,
    "LOGIT_SOFTCAP": 20,
    "VAL_BATCH_SIZE": 512,
    "TRAIN_BATCH_TOKENS": 256,
}


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
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dict.fromkeys(names, "bfloat16"),
        "qmeta": {n: {"scheme": "per_row", "axis": 0} for n in names},
        "passthrough": {name: t.half() if name in small else t for name, t in kept.items()},
        "passthrough_orig_dtypes": dict.fromkeys(small, "float32"),
    }


def test_an_artifact_of_the_public_reference(trained, tmp_path, bare, call):
    """No configuration, no checksum; its score is that of the weights that its numbers stand for."""
    artifact = reference_artifact(models.load((trained / "final_model.pt").read_bytes()))
    (tmp_path / "foreign.ptz").write_bytes(zlib.compress(models.torch_bytes(artifact), 9))
    meant = {name: tensor.float() for name, tensor in artifact["passthrough"].items()} | {
        name: (q.float() * artifact["scales"][name].float()[:, None]).bfloat16().float()
        for name, q in artifact["quantized"].items()
    }
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
    numbers = [
        re.findall(r":([\d.]+)", exact_line(text))
        for text in (done.stdout.decode(), (trained / "train.log").read_text())
    ]
    assert numbers[0][2:] == numbers[1][2:]
    assert [float(n) for n in numbers[0][:2]] == pytest.approx([float(n) for n in numbers[1][:2]], abs=2e-6)


def test_eval_finds_data_that_is_not_what_it_should_be(trained, corpus, tmp_path, bare, call):
    """The audit of the data is that of a run."""
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 1}}}')
    code, _, err = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", DATA_PATH=data))
    assert code == 2 and "manifest.json says 1:" in err
    shutil.rmtree(data)
    data.mkdir()
    shutil.copy(corpus / "data" / "fineweb_val_000000.bin", data)
    code, _, err = call(bare(MODE="eval", ARTIFACT=trained / "final_model.int8.ptz", DATA_PATH=data))
    assert code == 0, "the training text is not needed"


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
    """The folder of a run of a model file, which is in none of the places where it would be looked for."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.py").write_text(MODEL)
    return models.train_tiny(corpus, folder, MODEL_FILE=folder / "small.py")


@pytest.fixture
def artifact(small, tmp_path):
    """A copy of its artifact and its model file in a folder of their own."""
    (tmp_path / "copy").mkdir()
    shutil.copy(small / "small.py", tmp_path / "copy")
    return Path(shutil.copy(small / "final_model.int8.ptz", tmp_path / "copy"))


def changed(artifact: Path, **parts) -> Path:
    """The artifact with other parts and a checksum that holds."""
    content = models.open_artifact(artifact) | parts
    artifact.write_bytes(models.seal(models.torch_bytes(content)))
    return artifact


def test_an_artifact_of_a_model_file_names_it_by_its_hash(artifact, small, bare, call):
    digest = hashlib.sha256((small / "small.py").read_bytes()).hexdigest()
    assert models.open_artifact(artifact)["source"] == {"file": "small.py", "sha256": digest}
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 0, err
    assert exact_line(out) == exact_line((small / "train.log").read_text()) and "SHRINK=0.9" in out
    assert f"source:{artifact.parent / 'small.py'} sha256:{digest}" in out


def test_a_model_file_of_another_hash_is_refused_unless_it_is_named(artifact, small, bare, call):
    (artifact.parent / "small.py").write_text(MODEL + "\n# one more line\n")
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 2 and err.count("\n") == 1
    assert f"{artifact.parent / 'small.py'} has sha256 " in err and "or set MODEL_FILE to use another" in err
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact, MODEL_FILE=artifact.parent / "small.py"))
    assert code == 0 and exact_line(out) == exact_line((small / "train.log").read_text()), err


def test_the_model_file_is_looked_for_like_model_file(artifact, small, bare, call, tmp_path):
    (artifact.parent / "small.py").unlink()
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 2 and err.count("\n") == 1
    assert f"{artifact} is a model of small.py, which is neither next to it nor in " in err
    shutil.copy(small / "small.py", tmp_path)  # the working directory
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 0 and exact_line(out) == exact_line((small / "train.log").read_text()), err
    (artifact.parent / "small.py").write_text("raise SystemExit('another file of that name')")
    assert call(bare(MODE="eval", ARTIFACT=artifact))[0] == 0, "the one with the right hash is taken"


def test_an_artifact_cannot_point_to_a_file_elsewhere(artifact, small, bare, call, tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('it ran')")
    (artifact.parent / "small.py").unlink()
    digest = hashlib.sha256((tmp_path / "trap.py").read_bytes()).hexdigest()
    monkey = tmp_path / "elsewhere"
    monkey.mkdir()
    shutil.move(tmp_path / "trap.py", monkey)
    for name in (monkey / "trap.py", "elsewhere/trap.py", "../elsewhere/trap.py"):
        changed(artifact, source={"file": str(name), "sha256": digest})
        code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
        assert code == 2 and "is a model of trap.py, which is neither" in err


@pytest.mark.parametrize("source", [5, "small.py", ["small.py"], {"sha256": "x"}, {"file": 5}, {"file": ""}], ids=str)
def test_a_source_that_is_none_is_one_line(artifact, bare, call, source):
    changed(artifact, source=source)
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 2 and err.count("\n") == 1 and str(artifact) in err


# Artifacts of before, and of other coders


def test_an_artifact_of_before_may_hold_moved_knobs_that_are_off(trained, tmp_path, bare, call):
    """The names of the parameters are the same, so its score is, too."""
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path))
    told = models.open_artifact(artifact)["config"]
    off = {"xsa_layers": 0, "mlp_slope": 0.0, "attn_gate": False, "x0_mix": True, "loop_layers": "", "codec": "zlib"}
    changed(artifact, config=told | off)
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact))
    assert code == 0 and exact_line(out) == exact_line((trained / "train.log").read_text()), err
    changed(artifact, config=told | off | {"mlp_slope": 0.5})
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    hint = "a knob of a model file: set MODEL_FILE=records/models/frontier.py"
    assert (code, err) == (2, f"error: {artifact} records MLP_SLOPE=0.5, {hint}\n")
    frontier = models.SCRIPT.parent / "records" / "models" / "frontier.py"
    changed(artifact, config=told | off)
    code, out, err = call(bare(MODE="eval", ARTIFACT=artifact, MODEL_FILE=frontier))
    assert code == 0 and exact_line(out) == exact_line((trained / "train.log").read_text()), err


def test_a_format_that_the_coder_does_not_know_is_named(trained, tmp_path, bare, call):
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path))
    changed(artifact, __quant_format__="rans_per_row_v1")
    code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
    said = "is of format 'rans_per_row_v1', known are int8_clean_per_row_v1: set MODEL_FILE to its model"
    assert (code, err) == (2, f"error: {artifact} {said}\n")


@pytest.mark.parametrize("part", ["quantized", "passthrough", "a part of another coder"])
def test_tensors_that_are_larger_than_their_data_are_refused(trained, tmp_path, bare, call, part):
    """By a stride of 0, or by many of one storage: whatever the coder would do with them."""
    artifact = Path(shutil.copy(trained / "final_model.int8.ptz", tmp_path))
    content = models.open_artifact(artifact)
    many = torch.zeros(2**24)
    for tensors in ({"x": torch.zeros(1).expand(2**34)}, {f"x{number}": many for number in range(20)}):
        changed(artifact, **{part: content.get(part, {}) | tensors})
        code, _, err = call(bare(MODE="eval", ARTIFACT=artifact))
        assert code == 2 and err.count("\n") == 1 and "larger than its data" in err
