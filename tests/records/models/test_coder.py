"""The coder of the frontier: bits and clips of each matrix, the round trip through a file, clips that fit the size, and
the size that MODE=check projects. test_rans.py covers the entropy coder, test_gptq.py the rounding."""

import re
from types import SimpleNamespace

import models
import pytest
import torch

import train_gpt
from train_gpt import RunFolder, UserError

FrontierConfig, frontier = models.model_file("frontier")
coder = frontier.sibling("coder")
check = train_gpt.tool("check")


@pytest.fixture
def coder_of(tiny):
    """Function: the coder of `tiny` with MODEL_FILE=frontier.py and these knobs."""

    def build(**knobs):
        config = FrontierConfig.load([], tiny(**knobs))
        return config.coder_class()(config)

    return build


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large_state():
    names = ("blocks.0.attn.c_q", "blocks.0.mlp.fc", "tok_emb", "lm_head")
    state = {f"{name}.weight": 0.02 * randn(400, 400, seed=i) for i, name in enumerate(names)}
    return state | {"blocks.0.attn_scale": randn(8).half().float()}


def exported(made, runtime, state, code_bytes):
    folder = RunFolder(runtime)
    folder.choose(made.config, None, {})
    folder.create(made.config, {"train_gpt.py": b"code"})
    sizes = train_gpt.export(state, made, folder, code_bytes)
    folder.close()
    return folder.path, sizes, (folder.path / "train.log").read_text()


def number(pattern, text):
    (found,) = re.findall(f"^{pattern}", text, re.MULTILINE)
    return int(found)


# Which coder is used, and what it does with a matrix


NEEDED_BY = {"CODEC": "rans", "WEIGHT_BITS": 7, "EMBED_BITS": 7, "CLIP_ATTN": 13, "CLIP_MLP": 12, "CLIP_EMBED": 15}
NEEDED_BY |= {"GPTQ_BATCHES": 1}


@pytest.mark.parametrize("name", NEEDED_BY)
def test_only_knobs_that_need_it_load_this_coder(tiny, name):
    """Its file counts as code. Loading a configuration loads it, before the sources of a run are collected."""
    for asked in ({}, {name: NEEDED_BY[name]}):
        with models.no_siblings():
            config = FrontierConfig.load([], tiny(**asked))
            assert ("coder.py" in train_gpt.source_paths(config)) is bool(asked)
            assert (config.coder_class() is train_gpt.Coder) is (not asked)


def test_file_and_tag_are_named_by_codec_and_bits(coder_of):
    for knobs, names in (
        ({"EMBED_BITS": 5}, ("final_model.int8.ptz", "int8+zlib")),
        ({"WEIGHT_BITS": 6}, ("final_model.int8.ptz", "int6+zlib")),
        ({"CODEC": "rans", "WEIGHT_BITS": 6}, ("final_model.rans.ptz", "int6+rans")),
    ):
        made = coder_of(**knobs)
        assert (made.file, made.tag) == names


@pytest.mark.parametrize("bits, k", [(2, 2.0), (5, 9.0), (6, 12.85), (8, 20.0)])
def test_a_clip_in_standard_deviations(coder_of, bits, k):
    qmax = 2 ** (bits - 1) - 1
    w = 0.02 * randn(32, 3000)
    w[4], w[9] = 0, 0.25
    q, scale = coder_of(WEIGHT_BITS=bits, CLIP_MLP=k).quantize_matrix("blocks.0.mlp.fc.weight", w)
    expected = k * w.double().numpy().std(axis=1) / qmax
    expected[4], expected[9] = 1, 0.25 / qmax  # a row of zeros; a row of one value, whose deviation is 0
    assert scale.double().numpy() == pytest.approx(expected, rel=2.0**-11)
    assert q.abs().max() == qmax and (q[4] == 0).all() and (q[9] == qmax).all()
    stored = scale.double()[:, None]
    error = (w.double() - q.double() * stored).abs()
    assert (error <= stored / 2 * (1 + 1e-6)).where(w.double().abs() <= qmax * stored, True).all()


@pytest.mark.parametrize("codec", ["zlib", "rans"])
def test_each_matrix_has_the_bits_and_the_clip_of_its_class(coder_of, codec):
    made = coder_of(CODEC=codec, WEIGHT_BITS=6, EMBED_BITS=7, CLIP_ATTN=13, CLIP_MLP=12, CLIP_EMBED=15)
    state = large_state()
    artifact = made.quantize(state)
    assert artifact["__quant_format__"] == "int8_clean_per_row_v1", "which foreign readers know"
    expected = {"blocks.0.attn.c_q": (31, 13), "blocks.0.mlp.fc": (31, 12), "tok_emb": (63, 15), "lm_head": (31, 15)}
    for name, (qmax, k) in expected.items():
        w = state[f"{name}.weight"]
        q, scale = train_gpt.quantize_rows(w, k * torch.std_mean(w, dim=1, correction=0)[0], qmax)
        assert torch.equal(artifact["quantized"][f"{name}.weight"], q)
        assert torch.equal(artifact["scales"][f"{name}.weight"], scale)
    restored = made.dequantize(artifact if codec == "zlib" else made.rans_pack(artifact))
    for name, q in artifact["quantized"].items():
        assert torch.equal(restored[name], q.float() * artifact["scales"][name].float()[:, None])
    assert torch.equal(restored["blocks.0.attn_scale"], state["blocks.0.attn_scale"])


def test_the_class_of_a_matrix_follows_from_its_name_and_an_unknown_one_raises(coder_of):
    made = coder_of(CODEC="rans")
    names = ["blocks.0.attn.proj.weight", "blocks.11.mlp.proj.weight", "tok_emb.weight", "lm_head.weight"]
    assert [made.tensor_class(name) for name in names] == ["attn", "mlp", "embed", "embed"]
    with pytest.raises(UserError, match=r"GPT.PARAMETERS has no rule blocks.mlp.gate for blocks.0.mlp.gate.weight"):
        made.tensor_class("blocks.0.mlp.gate.weight")


def test_without_a_clip_a_matrix_is_quantized_as_by_the_script(coder_of):
    made, w = coder_of(EMBED_BITS=5), randn(20, 300)
    name = "blocks.0.attn.c_q.weight"
    assert all(map(torch.equal, made.quantize_matrix(name, w), train_gpt.Coder(made.config).quantize_matrix(name, w)))


# The file


def test_rans_gives_back_every_type_and_shape(coder_of):
    none, vector = "blocks.0.attn.c_v.weight", "blocks.0.attn.q_gain"
    state = {
        "blocks.0.attn.c_q.weight": randn(256, 256),
        "blocks.0.mlp.fc.weight": randn(256, 257),
        "blocks.1.mlp.fc.weight": randn(70_000).bfloat16(),
        "blocks.0.mlp.proj.weight": randn(3, 200, 200),
        "blocks.0.attn.c_k.weight": randn(5, 5).bfloat16(),
        "skip_weights": randn(2, 50_000)[:, :8],
        vector: randn(8),
        "blocks.0.resid_mix": randn(2, 8),
        "counter": torch.arange(4),
        "tok_emb.weight": randn(1000, 100).bfloat16(),
        none: torch.empty(0, 8),
    }
    plain = train_gpt.Coder(coder_of().config)
    expected = plain.dequantize(plain.quantize(state))
    made = coder_of(CODEC="rans")
    blob, _ = made.encode(state, 0)
    restored = made.decode(blob)
    assert set(restored) == set(expected)
    for name, tensor in expected.items():
        assert restored[name].dtype == tensor.dtype and restored[name].shape == tensor.shape
        large = tensor.numel() > 65_536
        assert torch.equal(restored[name], tensor if large else tensor.half().to(tensor.dtype))


def test_the_logged_sizes_are_those_of_the_file(coder_of, runtime):
    made, state = coder_of(CODEC="rans", WEIGHT_BITS=6, CLIP_ATTN=13), large_state()
    path, sizes, log = exported(made, runtime, state, code_bytes=1234)
    blob = (path / "final_model.rans.ptz").read_bytes()
    assert not (path / "final_model.int8.ptz").exists() and "clip_multiplier" not in log + str(sizes)
    assert number(r"Serialized model int6\+rans: (\d+) bytes \(payload:", log) == len(blob) == sizes["bytes_artifact"]
    assert number(r"Total submission size int6\+rans: (\d+) bytes$", log) == len(blob) + 1234
    parts = made.rans_pack(made.quantize(state))
    payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(parts) if isinstance(t, torch.Tensor))
    assert number(r"Serialized model .* \(payload:(\d+) ", log) == payload
    assert abs(len(blob) - payload) < 1000, "the container costs little"
    restored, expected = made.decode(blob), made.dequantize(made.quantize(state))
    assert all(torch.equal(restored[name], expected[name]) for name in state)


# FIT_SIZE

CLIPS = {"CLIP_ATTN": 12.85, "CLIP_MLP": 12.0, "CLIP_EMBED": 14.0, "WEIGHT_BITS": 6, "EMBED_BITS": 6, "FIT_SIZE": 1}


@pytest.mark.parametrize("codec, limit", [("rans", 320_000), ("rans", 250_000), ("rans", 180_000), ("zlib", 290_000)])
def test_fitted_clips_land_just_under_the_limit(coder_of, runtime, codec, limit):
    made, state, tried = coder_of(CODEC=codec, SIZE_LIMIT=limit, **CLIPS), large_state(), []
    quantize, made.quantize = made.quantize, lambda state: tried.append(made.clip_multiplier) or quantize(state)
    path, sizes, log = exported(made, runtime, state, code_bytes=1234)
    assert 0 <= limit - sizes["bytes_total"] < 0.002 * limit and "size_verdict:OK" in log
    multiplier = sizes["clip_multiplier"]
    assert 0.5 < multiplier < 8 and multiplier != 1 and tried[0] == 1 and multiplier in tried and len(tried) <= 6
    assert f" clip_multiplier:{multiplier:.4f}\n" in log and made.clip_multiplier == multiplier
    restored = made.decode((path / made.file).read_bytes())
    expected = made.dequantize(quantize(state))
    assert all(torch.equal(restored[name], expected[name]) for name in state)


@pytest.mark.parametrize("limit, multiplier, verdict", [(16_000_000, 0.5, "OK"), (20_000, 8.0, "TOO LARGE")])
def test_clips_are_not_stretched_beyond_reason(coder_of, runtime, limit, multiplier, verdict):
    made = coder_of(CODEC="rans", SIZE_LIMIT=limit, **CLIPS)
    _, sizes, log = exported(made, runtime, large_state(), 10)
    assert sizes["clip_multiplier"] == multiplier and f"size_verdict:{verdict}" in log
    small = {"blocks.0.attn_scale": torch.ones(8)}  # nothing to quantize, so nothing to fit
    made = coder_of(CODEC="rans", SIZE_LIMIT=limit, RUN_ID="small", **CLIPS)
    assert exported(made, runtime, small, 10)[1]["bytes_total"] < 20_000


def test_what_fitted_is_kept_when_nothing_else_does(coder_of, runtime):
    """The sizes follow no law."""
    noise = torch.randint(256, (400_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = iter([260_000, 150_000, 170_000, *[290_000] * 5])
    made = coder_of(CODEC="rans", SIZE_LIMIT=200_000, **CLIPS)
    made.rans_pack = lambda artifact: {"x": noise[: next(sizes)].clone()}
    assert 170_000 < exported(made, runtime, large_state(), 10)[1]["bytes_artifact"] < 175_000


def test_a_size_that_fits_already_is_left_alone(coder_of, runtime):
    base = coder_of(CODEC="rans", **CLIPS | {"FIT_SIZE": 0})
    total = exported(base, runtime, large_state(), 10)[1]["bytes_total"]
    made = coder_of(CODEC="rans", RUN_ID="fit", SIZE_LIMIT=total + 100, **CLIPS)
    assert exported(made, runtime, large_state(), 10)[1]["clip_multiplier"] == 1


def test_fitting_needs_clips(coder_of):
    for name in ("CLIP_ATTN", "CLIP_MLP", "CLIP_EMBED"):
        with pytest.raises(UserError, match="FIT_SIZE=1 .*CLIP_ATTN.* is 0: set each"):
            coder_of(**CLIPS | {name: 0})


# The projected size


@pytest.mark.parametrize("knobs", [{}, {"CODEC": "rans"}, {"CLIP_ATTN": 0, "CLIP_MLP": 0, "CLIP_EMBED": 0}], ids=str)
def test_the_projected_size_is_that_of_gaussian_weights(coder_of, knobs):
    made, state = coder_of(**CLIPS | {"FIT_SIZE": 0} | knobs), large_state()
    model = SimpleNamespace(state_dict=lambda: state, rule=frontier.GPT.rule)
    assert made.projected_size(model, check) == pytest.approx(len(made.encode(state, 0)[0]), rel=0.015)


def test_with_fit_size_the_projected_size_is_what_the_limit_leaves(coder_of):
    state = large_state()
    model = SimpleNamespace(state_dict=lambda: state, rule=frontier.GPT.rule)
    code = sum(path.stat().st_size for path in train_gpt.source_paths(coder_of(**CLIPS).config).values())
    for free in (180_000, 250_000, 10**7, 1000):
        made = coder_of(CODEC="rans", SIZE_LIMIT=code + free, **CLIPS)
        projected = made.projected_size(model, check)
        assert (projected + code <= made.config.size_limit) is (free > 1000)
        # Beyond the widest clips the law does not hold, but then the size misses the limit by far.
        assert free == 1000 or projected == pytest.approx(len(made.encode(state, code)[0]), rel=0.015)


def test_without_these_knobs_the_projection_is_that_of_int8_and_zlib(coder_of):
    state, made = large_state(), coder_of()
    model = SimpleNamespace(state_dict=lambda: state, rule=frontier.GPT.rule)
    assert type(made) is train_gpt.Coder
    assert check.projected_bytes(made, model) == coder.FrontierCoder(made.config).projected_size(model, check)
