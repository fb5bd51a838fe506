"""Export: bounds of the quantization error, the object format, the round trip from weights to a file, refusal of files
that are not artifacts, and sizes that match the files."""

import hashlib
import re
import zlib

import numpy as np
import pytest
import torch
from models import Canary, artifact_knobs, load, new_model, torch_bytes

import train_gpt
from train_gpt import Coder, RunFolder, UserError, export, quantize_rows

kernels, artifacts = train_gpt.tool("kernels"), train_gpt.tool("artifact")
# Kinds of parameters, to which tensors of unusual shapes are assigned.
A, B, C = "blocks.0.attn.c_q.weight", "blocks.0.mlp.fc.weight", "blocks.1.mlp.fc.weight"
D, E = "blocks.0.mlp.proj.weight", "blocks.0.attn.c_k.weight"
QUANTILE = 0.9999984  # by design, rows are clipped at the 99.99984th percentile


def quantize_matrix(w):
    return Coder(train_gpt.Config()).quantize_matrix("a matrix", w)


def quantize(state, config):
    return Coder(config).quantize(state)


def dequantize(artifact, config):
    return Coder(config).dequantize(artifact)


def unpack(blob):
    return load(zlib.decompress(blob[:-32]))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("std", [1e-4, 0.02, 1.0])
def test_the_error_is_at_most_half_the_stored_scale(std):
    w = std * randn(64, 1500)
    w[7] = 0
    q, scale = quantize_matrix(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16 and q.shape == w.shape and scale.shape == (64,)
    assert (q[7] == 0).all() and scale[7] == 1 and (scale > 0).all()
    stored, w = scale.double()[:, None], w.double()
    error, inside = (w - q.double() * stored).abs(), w.abs() <= 127 * stored
    assert inside.double().mean() > 0.998
    assert (error <= stored / 2 * (1 + 1e-6)).where(inside, error <= w.abs() - 127 * stored + 1e-12).all()
    assert q.abs().max() <= 127 and (q.abs() >= 125).any(1).sum() == 63, "the range is used in every row"
    assert (error.square().mean(1) / w.square().mean(1).clamp_min(1e-30)).sqrt().max() < 0.012


def assert_scales_are(scale, expected):
    """Equal to fp16 rounding."""
    assert scale.dtype == torch.float16 and scale.double().numpy() == pytest.approx(expected, rel=2.0**-11)


def test_the_clip_is_the_percentile_of_the_magnitudes():
    """For rows long enough that it differs from the maximum by more than fp16 rounding, and for short ones."""
    w = 0.02 * randn(2, 700_000)
    w[0, 5], w[1, 9] = 40.0, -3.0
    q, scale = quantize_matrix(w)
    clip = np.quantile(w.abs().double().numpy(), QUANTILE, axis=1)
    assert (clip < 0.9 * w.abs().amax(1).numpy()).all()
    assert_scales_are(scale, clip / 127)
    assert q[0, 5] == 127 and q[1, 9] == -127
    w = randn(16, 512)
    assert_scales_are(quantize_matrix(w)[1], np.quantile(w.abs().double().numpy(), QUANTILE, axis=1) / 127)


def test_rows_of_one_value_and_tiny_rows():
    w = torch.stack([torch.full((9,), -0.5), torch.full((9,), 1e-9), torch.zeros(9)])
    q, scale = quantize_matrix(w)
    assert q[0].tolist() == [-127] * 9 and float(scale[0]) * 127 == pytest.approx(0.5, rel=2.0**-11)
    assert scale[1] > 0 and q[1].tolist() == [0] * 9, "fp16 holds no scale this small, but must not divide by zero"
    assert scale[2] == 1 and q[2].tolist() == [0] * 9


def test_a_matrix_of_more_than_2_to_the_24_elements_is_quantized_row_by_row():
    w = randn(8193, 64).repeat_interleave(32, dim=1)
    assert w.numel() > 2**24
    q, scale = quantize_matrix(w)
    for rows in (slice(0, 2), slice(2000, 2100), slice(-3, None)):
        part_q, part_scale = quantize_matrix(w[rows])
        assert torch.equal(q[rows], part_q) and torch.equal(scale[rows], part_scale)


@pytest.mark.parametrize("qmax", [1, 15, 31, 127])
def test_any_clip_and_any_number_of_steps(qmax):
    w, clip = 0.02 * randn(32, 3000), 0.02 * (0.5 + randn(32, seed=1).abs())
    w[4], w[9] = 0, 0.25
    clip[4], clip[9] = 0, 0.25
    q, scale = quantize_rows(w, clip, qmax)
    expected = clip.double().numpy() / qmax
    expected[4] = 1
    assert_scales_are(scale, expected)
    assert q.dtype == torch.int8 and q.abs().max() == qmax and (q[4] == 0).all() and (q[9] == qmax).all()
    stored = scale.double()[:, None]
    error = (w.double() - q.double() * stored).abs()
    assert (error <= stored / 2 * (1 + 1e-6)).where(w.double().abs() <= qmax * stored, True).all()


@pytest.mark.parametrize("shape", [(300, 300), (8, 8)])
def test_weights_that_fp16_does_not_hold_are_refused(make_config, shape):
    for value in (float("nan"), float("inf"), -float("inf"), 1e8):
        tensor = randn(*shape)
        tensor.view(-1)[3] = value
        with pytest.raises(UserError, match=f"{B} is not finite in fp16"):
            quantize({B: tensor}, make_config())


def odd_state():
    return {
        A: randn(256, 256),
        B: randn(256, 257),
        C: randn(70_000).bfloat16(),
        D: randn(3, 200, 200),
        E: randn(5, 5).bfloat16(),
        "skip_weights": randn(2, 50_000)[:, :8],
        "blocks.0.attn.q_gain": randn(8),
        "blocks.0.resid_mix": randn(2, 8),
        "counter": torch.arange(4),
        "tok_emb.weight": randn(1000, 100).bfloat16(),
    }


def test_the_object_has_the_keys_and_types_of_the_format(make_config):
    config, state = make_config(), odd_state()
    artifact = quantize(state, config)
    parts = "__quant_format__ quantized scales dtypes passthrough qmeta passthrough_orig_dtypes config"
    assert set(artifact) == set(parts.split())
    assert artifact["__quant_format__"] == "int8_clean_per_row_v1"
    big = {B, C, D, "tok_emb.weight"}  # A has 65,536 elements exactly: kept
    assert set(artifact["quantized"]) == set(artifact["scales"]) == set(artifact["dtypes"]) == big
    assert set(artifact["passthrough"]) == set(state) - big
    assert artifact["qmeta"] == {name: {"scheme": "per_row", "axis": 0} for name in (B, "tok_emb.weight")}
    assert artifact["dtypes"] == {name: "float32" if name in (B, D) else "bfloat16" for name in big}
    assert artifact["passthrough_orig_dtypes"] == {A: "float32", E: "bfloat16"}
    for name in big:
        q, scale = artifact["quantized"][name], artifact["scales"][name]
        assert q.dtype == torch.int8 and q.shape == state[name].shape
        assert scale.dtype == torch.float16
        assert scale.shape == ((len(state[name]),) if state[name].ndim == 2 else ())
    for name, tensor in artifact["passthrough"].items():
        small = name in (A, E)
        assert tensor.dtype == (torch.float16 if small else torch.int64 if name == "counter" else torch.float32)
        assert torch.equal(tensor, state[name].half() if small else state[name])
    told = artifact_knobs()
    assert artifact["config"] == {name.lower(): getattr(config, name.lower()) for name in told}
    assert {"NUM_LAYERS", "NUM_HEADS", "ROPE_BASE", "LOGIT_SOFTCAP", "EVAL_STRIDE"} <= set(told)


def packed(artifact):
    """The file: ours ends in its stream's checksum; one without `config`, as from the public reference, does not."""
    stream = zlib.compress(torch_bytes(artifact), level=9)
    return stream + hashlib.sha256(stream).digest() * ("config" in list(artifact))


def test_every_tensor_comes_back_in_its_type_within_half_a_scale(make_config):
    state = odd_state()
    artifact = unpack(packed(quantize(state, make_config())))
    restored = dequantize(artifact, make_config())
    assert {name: (t.dtype, t.shape) for name, t in restored.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }
    for name, tensor in state.items():
        error = (restored[name].double() - tensor.double()).abs()
        if name in artifact["scales"]:
            scale = artifact["scales"][name].double()
            scale = scale[:, None] if scale.ndim else scale
            clipped = (tensor.double().abs() - 127 * scale).clamp_min(0)
            rounding = restored[name].double().abs() * 2.0**-8 if tensor.dtype == torch.bfloat16 else 0
            assert (error <= scale / 2 * 1.00001 + clipped + rounding).all(), name
        elif name in artifact["passthrough_orig_dtypes"]:
            assert (error <= tensor.double().abs() * 2.0**-10 + 1e-7).all(), name
        else:
            assert (error == 0).all(), name


def test_a_model_survives_the_round_trip(make_config, runtime):
    """Also at width 512, where the attention matrices are large enough to be quantized."""
    shape = {"MODEL_DIM": 512, "NUM_HEADS": 8, "NUM_KV_HEADS": 4}
    config = make_config(**shape, MUON_BACKEND_STEPS=2)
    model = new_model(config, kernels.blocked_attention)
    optimizers = model.optimizers(config, runtime)
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    artifact = unpack(packed(quantize(model.state_dict(), config)))
    matrices = {name for name, p in model.named_parameters() if p.numel() > 65_536}
    assert set(artifact["quantized"]) == matrices and len(matrices) == 1 + 2 * 6
    back = new_model(make_config(**shape, SEED=9), kernels.blocked_attention)
    back.load_state_dict(dequantize(artifact, config), strict=True)
    with torch.no_grad():
        before, after = (m(tokens[:, :-1], tokens[:, 1:]) for m in (model, back))
    assert 0 < (before - after).abs().max() < 0.05 and before.mean() < 5.5, "it did learn, and quantization must show"


def foreign_artifact():
    """An artifact as the public reference writes it: without empty fields and without this project's additions."""
    q = torch.tensor([[127, -127, 64], [0, 1, -1]], dtype=torch.int8)
    return {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": {"w": q, "v": q[0]},
        "scales": {"w": torch.tensor([0.5, 0.25], dtype=torch.float16), "v": torch.tensor(2.0)},
        "dtypes": {"w": "float32", "v": "bfloat16"},
        "passthrough": {"blocks.0.attn_scale": torch.tensor([1.5, 2.5])},
    }


@pytest.mark.parametrize("orig", [None, {}, {"blocks.0.attn_scale": "bfloat16"}])
def test_an_artifact_of_the_public_reference_is_readable(make_config, orig):
    artifact = foreign_artifact() | ({} if orig is None else {"passthrough_orig_dtypes": orig, "qmeta": {}})
    state = artifacts.dequantize(artifacts.unpack(packed(artifact), "foreign"), make_config(), "foreign")
    torch.testing.assert_close(state["w"], torch.tensor([[63.5, -63.5, 32.0], [0.0, 0.25, -0.25]]), rtol=0, atol=0)
    torch.testing.assert_close(state["v"], torch.tensor([254.0, -254.0, 128.0]).bfloat16(), rtol=0, atol=0)
    kept = state["blocks.0.attn_scale"]
    assert kept.tolist() == [1.5, 2.5] and kept.dtype == (torch.bfloat16 if orig else torch.float32)


def test_what_is_no_artifact_is_refused_and_runs_no_code(make_config, tmp_path):
    """tests/test_bad_input.py and tests/test_properties.py have more cases."""
    good, ours = packed(foreign_artifact()), packed(foreign_artifact() | {"config": {}})
    trap = packed(foreign_artifact() | {"config": Canary(tmp_path / "trapped")})
    unnamed = {name: part for name, part in foreign_artifact().items() if name != "__quant_format__"}
    other = foreign_artifact() | {"__quant_format__": "int4"}
    flipped = ours[:-1] + bytes([ours[-1] ^ 1])
    blobs = [
        b"",
        b"garbage",
        good[:-20],
        zlib.compress(b"garbage"),
        trap,
        packed([1, 2]),
        packed(other),
        packed(unnamed),
    ]
    for number, blob in enumerate([*blobs, ours[:-1], ours[:-32], flipped, ours + b"\0", good + b"\0"]):
        with pytest.raises(UserError, match=f"^file{number} (is|holds) [^\n]*$"):
            artifacts.dequantize(artifacts.unpack(blob, f"file{number}"), make_config(), f"file{number}")
    artifacts.unpack(ours, "ours"), artifacts.unpack(good, "of the reference")
    assert not (tmp_path / "trapped").exists()


def test_the_script_reads_back_its_own_file_or_none(make_config):
    """If the disk returns different bytes, they must not be scored."""
    coder = Coder(make_config())
    blob, facts = coder.encode({B: randn(300, 300)}, 0)
    assert [*coder.decode(blob)] == [B]
    assert len(zlib.decompress(blob[:-32])) == facts["raw_torch"] and list(unpack(blob)["quantized"]) == [B]
    assert list(artifacts.unpack(blob, "file")["quantized"]) == [B], "and others read it too"
    for place in (0, 5, len(blob) // 2, len(blob) - 33, len(blob) - 1):
        with pytest.raises(UserError, match="the artifact and its checksum differ: check the disk"):
            coder.decode(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
    for damaged in (b"", blob[:-1], blob[:-32], blob + b"\0"):
        with pytest.raises(UserError, match="its checksum differ"):
            coder.decode(damaged)


def exported(config, runtime, state, code_bytes):
    folder = RunFolder(runtime)
    folder.choose(config, None, {})
    folder.create(config, {"train_gpt.py": b"code"})
    sizes = export(state, Coder(config), folder, code_bytes)
    folder.close()
    return folder.path, sizes, (folder.path / "train.log").read_text()


def number(pattern, text):
    (found,) = re.findall(f"^{pattern}", text, re.MULTILINE)
    return int(found)


def test_the_logged_sizes_are_those_of_the_files(make_config, runtime):
    config = make_config()
    state = new_model(config).state_dict() | {"tok_emb.weight": randn(700, 100)}
    path, sizes, log = exported(config, runtime, state, code_bytes=1234)
    raw, blob = ((path / f"final_model.{kind}").read_bytes() for kind in ("pt", "int8.ptz"))
    assert number(r"Serialized model: (\d+) bytes$", log) == len(raw)
    assert number(r"Code size: (\d+) bytes$", log) == 1234
    assert number(r"Total submission size: (\d+) bytes$", log) == len(raw) + 1234
    assert number(r"Serialized model int8\+zlib: (\d+) bytes \(payload:", log) == len(blob)
    assert number(r"Total submission size int8\+zlib: (\d+) bytes$", log) == len(blob) + 1234
    numbers = re.search(r"\(payload:(\d+) raw_torch:(\d+) payload_ratio:(\d+\.\d\d)x\)$", log, re.MULTILINE)
    payload, raw_torch, ratio = numbers.groups()
    artifact = unpack(blob)
    tensors = [*artifact["quantized"].values(), *artifact["scales"].values(), *artifact["passthrough"].values()]
    assert int(payload) == sum(t.numel() * t.element_size() for t in tensors)
    assert int(raw_torch) == len(zlib.decompress(blob[:-32]))
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:], "the stream, then its checksum"
    assert float(ratio) == pytest.approx(sum(4 * t.numel() for t in state.values()) / int(payload), abs=0.005)
    assert re.search(rf"^size_verdict:OK limit:16000000 spare:{16_000_000 - len(blob) - 1234}$", log, re.MULTILINE)
    assert sizes == {
        "bytes_model": len(raw),
        "bytes_artifact": len(blob),
        "bytes_code": 1234,
        "bytes_total": len(blob) + 1234,
        "bytes_limit": 16_000_000,
        "sha256_artifact": hashlib.sha256(blob).hexdigest(),
    }
    saved = torch.load(path / "final_model.pt", weights_only=True)
    assert list(saved) == list(state) and all(torch.equal(saved[name], state[name]) for name in state)


def test_the_verdict_counts_every_byte(make_config, runtime):
    state = {"blocks.0.attn_scale": torch.ones(8)}
    total = exported(make_config(RUN_ID="first"), runtime, state, code_bytes=10)[1]["bytes_total"]
    for limit, verdict in ((total, "OK"), (total - 1, "TOO LARGE, NOT A VALID SUBMISSION")):
        log = exported(make_config(RUN_ID=f"limit{limit}", SIZE_LIMIT=limit), runtime, state, code_bytes=10)[2]
        assert f"\nsize_verdict:{verdict} limit:{limit} spare:{limit - total}\n" in log


def test_the_same_weights_give_the_same_bytes(make_config):
    config, state = make_config(), odd_state()
    assert packed(quantize(state, config)) == packed(quantize({name: t.clone() for name, t in state.items()}, config))
