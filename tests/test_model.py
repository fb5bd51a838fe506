"""The script's model: names and counts, initial values, RoPE, attention functions and how one is chosen, FLOPs.

The contract (test_contract.py) and test_knobs.py cover causality, one graph, precision and the float64 reference."""

import math
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import oracle
import pytest
import torch
from models import new_model
from oracle import random_tokens, scatter

import train_gpt
from train_gpt import UserError, grouped_attention, rope_tables

kernels = train_gpt.tool("kernels")

ATTENTIONS = [kernels.blocked_attention, kernels.expanded_attention, grouped_attention]
SWITCHES = ("flash", "cudnn", "mem_efficient", "math")


@pytest.mark.parametrize("tied", [True, False])
def test_default_model_has_the_reference_names_shapes_and_count(tied):
    model = new_model(train_gpt.Config(tie_embeddings=tied))
    D, F, KV = 512, 1024, 256
    block = {"attn_scale": (D,), "mlp_scale": (D,), "resid_mix": (2, D), "attn.q_gain": (8,)}
    block |= {"attn.c_q.weight": (D, D), "attn.c_k.weight": (KV, D), "attn.c_v.weight": (KV, D)}
    block |= {"attn.proj.weight": (D, D), "mlp.fc.weight": (F, D), "mlp.proj.weight": (D, F)}
    expected = {"tok_emb.weight": (1024, D), "skip_weights": (4, D)} | ({} if tied else {"lm_head.weight": (1024, D)})
    expected |= {f"blocks.{i}.{name}": shape for i in range(9) for name, shape in block.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected  # no buffer is saved
    assert sum(p.numel() for p in model.parameters()) == 17_059_912 + (0 if tied else 1024 * D)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied, tolerance", [(1, 5e-3), (0, 1e-6)])  # an untied head starts at zero
def test_untrained_loss_is_log_of_the_vocabulary(make_config, tied, tolerance):
    config = make_config(TIE_EMBEDDINGS=tied)
    tokens = random_tokens(config, 8, 33)
    with torch.no_grad():
        loss = new_model(config)(tokens[:, :-1], tokens[:, 1:]).mean()
    assert float(loss) == pytest.approx(math.log(config.vocab_size), abs=tolerance)


def test_losses_are_those_of_a_probability_distribution(make_config):
    """Summed over every possible target, exp(-loss) is 1 at every position."""
    config = make_config()
    model, V = scatter(new_model(config)), config.vocab_size
    inputs = random_tokens(config, 1, 6).expand(V, -1)
    targets = torch.arange(V)[:, None].expand(-1, 6)
    with torch.no_grad():
        total = model(inputs, targets).double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_rope_tables_are_float64_to_fp32_rounding_and_tell_all_positions_apart():
    cos, sin = rope_tables(4096, 64, 10_000.0)
    assert cos.shape == sin.shape == (4096, 32) and cos.dtype == sin.dtype == torch.float32
    angles = [[t * 10_000.0 ** (-2 * i / 64) for i in range(32)] for t in range(4096)]
    angles = torch.tensor(angles, dtype=torch.float64)
    # An angle in fp32 is off by a few half-ulps of itself (position times rounded frequency), its cosine by one more.
    bound = angles * 3 * 2.0**-24 + 2.0**-23
    assert ((cos - angles.cos()).abs() <= bound).all() and ((sin - angles.sin()).abs() <= bound).all()
    for dtype in (torch.float32, torch.bfloat16):  # cast last: even in bf16 no two positions become equal
        rows = torch.cat([cos, sin], dim=1).to(dtype).float().numpy()
        assert len({row.tobytes() for row in rows}) == 4096


def test_a_bf16_model_keeps_its_rope_tables_in_fp32(make_config):
    model = new_model(make_config(TRAIN_SEQ_LEN=1024, TRAIN_BATCH_TOKENS=1024), grouped_attention, torch.bfloat16)
    cos, sin = rope_tables(1024, 8, 10_000.0)
    tables = model.positions
    assert torch.equal(tables.cos.view_as(cos), cos) and torch.equal(tables.sin.view_as(sin), sin)


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129])
def test_attention_forward_and_backward_equal_float64(attend, kv_heads, length):
    generator = torch.Generator().manual_seed(length)
    # As the model passes them: [B, T, heads, d] transposed, hence not contiguous.
    q, k, v = (torch.randn(2, length, n, 8, generator=generator).requires_grad_() for n in (4, kv_heads, kv_heads))
    upstream = torch.randn(2, 4, length, 8, generator=generator)
    y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    (y * upstream).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    past = torch.ones(length, length, dtype=torch.float64).tril()
    heads = []
    for h in range(4):
        qh, kh, vh = (x[:, :, n] for x, n in zip(wide, (h, h * kv_heads // 4, h * kv_heads // 4), strict=True))
        e = torch.exp(qh @ kh.mT / math.sqrt(8)) * past
        heads.append(e / e.sum(-1, keepdim=True) @ vh)
    expected = torch.stack(heads, dim=1)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for x, reference in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-5, atol=2e-5)


def named(model, *endings):
    found = [p.detach() for name, p in model.named_parameters() if name.removesuffix(".weight").endswith(endings)]
    assert found
    return found


@pytest.mark.parametrize("tied, std", [(1, 0.005), (0, 1.0)])
def test_initial_values_follow_the_rules(make_config, tied, std):
    model = new_model(make_config(TIE_EMBEDDINGS=tied, MODEL_DIM=128, QK_GAIN_INIT=2.5))
    (embedding,) = named(model, "tok_emb")
    assert float(embedding.std()) == pytest.approx(std, rel=0.03) and abs(float(embedding.mean())) < 0.03 * std
    assert float(embedding.abs().max()) > 3.5 * std, "normal, not uniform"
    for w in named(model, "c_q", "c_k", "c_v", "fc"):
        bound = w.size(1) ** -0.5
        assert 0.99 * bound < w.abs().max() <= bound and abs(float(w.mean())) < 0.03 * bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for w in named(model, "attn.proj", "mlp.proj", *([] if tied else ["lm_head"])):
        assert (w == 0).all()
    for w in named(model, "attn_scale", "mlp_scale", "skip_weights"):
        assert (w == 1).all()
    for w in named(model, "resid_mix"):
        assert (w[0] == 1).all() and (w[1] == 0).all()
    for w in named(model, "q_gain"):
        assert (w == 2.5).all()
    stds = named(new_model(make_config(TIED_EMBED_INIT_STD=0.5)), "tok_emb")[0].std()
    assert float(stds) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_bf16_is_close_to_fp32(make_config, attend):
    oracle.assert_bf16_is_close(make_config(LOGIT_SOFTCAP=5), attend)


def test_with_our_own_attention_it_is_one_graph(make_config):
    oracle.assert_one_graph(make_config(), kernels.blocked_attention)


def test_logits_stay_within_the_softcap(make_config):
    config = make_config(LOGIT_SOFTCAP=7)
    model = scatter(new_model(config))
    with torch.no_grad():
        model.tok_emb.weight.mul_(50)
        logits = model(random_tokens(config, 2, 16))
    assert 6.99 < logits.abs().max() <= 7


WORKS = {"auto": True, "flash": True, "math": True, "blocked": True, "cudnn": False, "efficient": False}


@pytest.mark.parametrize("name, works", WORKS.items())
def test_each_attention_backend_on_the_cpu_works_or_is_a_user_error(make_config, runtime, name, works):
    config = make_config(ATTENTION=name)
    if not works:
        with pytest.raises(UserError, match=f"ATTENTION={name} .*cpu.*{name} grouped_attention failed: .+") as error:
            kernels.choose_attention(config, runtime, compiled=False)
        assert f"{name} expanded_attention failed: " in str(error.value)
        return
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    chosen = "blocked" if name == "auto" else name  # the fastest on a CPU at this length
    assert note.startswith(f"attention:{chosen} by {attend.__name__}")
    enabled = [switch for switch in SWITCHES if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]
    assert enabled == (list(SWITCHES) if chosen == "blocked" else [chosen]), "our own kernel needs no switch"
    model, tokens = scatter(new_model(config, attend)), random_tokens(config, 2, 9)
    other = scatter(new_model(config, kernels.blocked_attention))
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-5, atol=1e-5)


def test_auto_on_the_cpu_avoids_quadratic_memory_for_long_sequences(make_config, runtime):
    config = make_config(TRAIN_SEQ_LEN=2112, TRAIN_BATCH_TOKENS=2112)
    assert kernels.choose_attention(config, runtime, compiled=False)[1].startswith("attention:flash")


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward kernel\nfor this")


def test_a_backend_that_fails_is_passed_over_and_the_log_says_why(make_config, runtime, monkeypatch):
    tried = []

    def broken(q, k, v):
        tried.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype))
        return FailsBackward.apply(kernels.expanded_attention(q, k, v))

    monkeypatch.setattr(kernels, "grouped_attention", broken)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert attend is kernels.expanded_attention
    assert note == (
        "attention:math by expanded_attention; math broken failed: RuntimeError('no backward kernel\\nfor this')"
    )
    assert tried == [((8, 4, 32, 8), (8, 2, 32, 8), (8, 2, 32, 8), torch.float32)], "proved on a real micro-batch"


def test_a_backend_that_gives_other_values_is_passed_over(make_config, runtime, monkeypatch):
    """Regression: not failing was enough to be chosen, but a mask that lets a token see the next one does not fail."""

    def sees_the_next(q, k, v):
        seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril(1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    monkeypatch.setattr(kernels, "grouped_attention", sees_the_next)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert attend is kernels.expanded_attention
    assert re.search(r"; math sees_the_next failed: RuntimeError\('it errs by [\d.]+ of the largest value'\)$", note)


def test_the_proof_of_a_backend_takes_fewer_sequences_where_memory_is_short(make_config, runtime, monkeypatch):
    tried = []

    def small(q, k, v):
        tried.append(len(q))
        if len(q) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return kernels.expanded_attention(q, k, v)

    monkeypatch.setattr(kernels, "grouped_attention", small)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert (attend, note, tried) == (small, "attention:math by small", [8, 4, 2])


# ATTENTION=fastest, and the log of why the other backends were not chosen


@pytest.fixture
def gpu(make_config, monkeypatch):
    """Function: choose_attention on a simulated GPU whose backends fail or take the given seconds. Returns (function,
    its log lines, the backends tried). SDPA's switches, or the function itself, show which backend was chosen."""

    def choose(asked, seconds, capability=(9, 0), others=None):
        tried = []

        def name_of(attend):
            if attend is kernels.flash3_attention:
                return "flash3"
            (switch,) = [switch for switch in SWITCHES if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]
            return switch.removeprefix("mem_")

        def prove(attend, config, runtime, rows):
            tried.append(name_of(attend))
            if tried[-1] not in seconds:
                raise RuntimeError("no kernel")

        config, names = make_config(ATTENTION=asked), train_gpt.Config.knobs()["ATTENTION"].metadata["allowed"][2]
        theirs = [others.get(name, math.inf) if others else 0.0 for name in names]
        runtime = SimpleNamespace(
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            world_size=2 if others else 1,
            all_reduce=lambda ours: [a + b for a, b in zip(ours, theirs, strict=True)],
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels, "prove_attention", prove)
        attend, note = kernels.choose_attention(config, runtime, False, lambda attend, *_: seconds[name_of(attend)])
        assert name_of(attend) == re.match(r"attention:(\w+) by ", note)[1], "SDPA is pinned to what is chosen"
        return attend, note, tried

    return choose


TIMES = "; forward and backward of a sequence in a layer, ms: "


FASTEST = {  # milliseconds: the expected log text
    (3, 1.1, 2, 4.44): f"cudnn by grouped_attention{TIMES}cudnn 1.1, flash 2, flash3 3, efficient 4.44",
    (1, 1.1, 2, 4): f"flash3 by flash3_attention{TIMES}flash3 1, cudnn 1.1, flash 2, efficient 4",
    (None, 1.1, 1, 4): f"flash by grouped_attention{TIMES}flash 1, cudnn 1.1, efficient 4; flash3 flash3_attention "
    "failed: RuntimeError('no kernel')",
}


@pytest.mark.parametrize("milliseconds, expected", FASTEST.items())
def test_the_fastest_attention_of_those_that_are_proved_is_taken_and_all_times_are_told(gpu, milliseconds, expected):
    names = zip(("flash3", "cudnn", "flash", "efficient"), milliseconds, strict=True)
    _, note, tried = gpu("fastest", {name: ms / 1000 for name, ms in names if ms})
    assert note == f"attention:{expected}", "without a warning: what failed cannot be faster than cuDNN was here"
    assert list(dict.fromkeys(tried)) == ["flash3", "cudnn", "flash", "efficient"], "math keeps all scores"


def test_ranks_choose_the_attention_that_all_of_them_have_and_that_is_the_fastest_for_all(gpu):
    note = gpu("fastest", {"math": 0.5}, capability=(8, 0))[1]
    assert note.startswith(f"attention:math by grouped_attention{TIMES}math 500; flash grouped_attention failed")
    ours = {"flash3": 0.001, "cudnn": 0.002, "flash": 0.003, "efficient": 0.004}
    note = gpu("fastest", ours, others={"cudnn": 0.009, "flash": 0.003, "efficient": 0.004})[1]
    assert note == f"attention:flash by grouped_attention{TIMES}flash 3, efficient 4, cudnn 5.5"


HOPPER = [
    ("auto", "flash efficient", 9, True),
    ("fastest", "flash efficient", 9, True),
    ("auto", "cudnn flash", 9, False),
    ("auto", "flash3 flash", 9, False),
    ("flash", "flash cudnn", 9, False),
    ("auto", "flash", 8, False),
    ("auto", "flash", 10, False),
]


@pytest.mark.parametrize("asked, works, capability, warned", HOPPER)
def test_a_hopper_gpu_without_its_own_attention_is_warned_of(gpu, asked, works, capability, warned):
    note = gpu(asked, dict.fromkeys(works.split(), 1.0), (capability, 0))[1]
    assert ("\nwarning: attention by flash, since neither FlashAttention 3 nor cuDNN works" in note) == warned
    assert ("10 to 20 ms a step" in note and "install flash_attn_interface" in note) == warned


@pytest.mark.parametrize("function", ["prove_attention", "time_attention"])
def test_attention_is_proved_and_timed_with_the_shapes_and_strides_of_the_model(make_config, runtime, function):
    config, seen = make_config(TRAIN_BATCH_TOKENS=96), []

    def attend(q, k, v):
        seen.append([(x.shape, x.stride()) for x in (q, k, v)])
        y = kernels.expanded_attention(q, k, v)
        y.requires_grad and y.register_hook(lambda dy: seen[-1].append((dy.shape, dy.stride())))
        return y

    losses = new_model(config, attend)(*(random_tokens(config, 3, 32),) * 2)
    model, seen[:] = seen[:], []
    getattr(kernels, function)(attend, config, runtime, 3)
    if function == "time_attention":  # what the output projection returns
        losses.mean().backward()
        assert seen[0][3] == (torch.Size([3, 4, 32, 8]), (1024, 8, 32, 1))
    assert len(model) == 2 and all(shapes[:3] == model[0][:3] for shapes in (*model, *seen))


def test_the_time_of_attention_is_the_median_for_one_sequence_of_synchronized_rounds(make_config, runtime, monkeypatch):
    events, clock = [], iter([0.0, 90.0, 100.0, 103.0, 200.0, 206.0, 300.0, 330.0])
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: events.append("time") or next(clock)))
    monkeypatch.setattr(runtime, "synchronize", lambda: events.append("synchronize"))
    seconds = kernels.time_attention(kernels.blocked_attention, make_config(), runtime, 2, rounds=3)
    assert seconds == 3.0, "of 3, 6 and 30 seconds for two sequences; the first round only warms up"
    assert events == ["synchronize", "time"] * 8


def test_the_fastest_attention_of_this_machine(make_config, runtime):
    config = make_config(ATTENTION="fastest")
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    name, function, times = re.fullmatch(rf"attention:(\w+) by (\w+){TIMES}([^;]*)", note).groups()
    times = {name: float(ms) for name, ms in (text.split(" ") for text in times.split(", "))}
    assert set(times) == {"blocked", "flash"} and times[name] == min(times.values()) and function == attend.__name__


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_code_that_is_kept_does_not_bring_back_another_backend():
    """torch's cache key does not include SDPA's switches: pytorch issue 185449."""
    inputs = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    for name in ("flash", "math", "flash"):
        kernels.pin_attention(name)
        torch._dynamo.reset()
        y = torch.compile(grouped_attention, fullgraph=True, dynamic=False)(*inputs)
        with torch.autograd.profiler.profile() as profile:
            y.sum().backward()
        ran = any("flash_attention_for_cpu_backward" in event.key for event in profile.key_averages())
        assert ran == (name == "flash"), f"{name} was asked for"
    torch._dynamo.reset()


def test_flash_attention_3_is_one_graph_with_the_model(make_config, runtime, monkeypatch):
    """Regression: its import must be traceable, or the first step ends the run on any GPU that has it."""
    calls = []

    def flash_attn_func(q_BTHd, k_BTKd, v_BTKd, causal):
        calls.append(causal)
        return kernels.blocked_attention(*(x.transpose(1, 2) for x in (q_BTHd, k_BTKd, v_BTKd))).transpose(1, 2), None

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    config = make_config(ATTENTION="flash3")
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    assert note == "attention:flash3 by flash3_attention" and calls == [True]
    ours, other = (scatter(new_model(config, attention)) for attention in (attend, kernels.blocked_attention))
    tokens = random_tokens(config, 2, 32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), other(tokens, tokens))
    torch._dynamo.reset()


def test_flash_attention_3_that_is_not_there_is_said_so(make_config, runtime):
    with pytest.raises(train_gpt.UserError, match="flash3 flash3_attention failed: ModuleNotFoundError"):
        kernels.choose_attention(make_config(ATTENTION="flash3"), runtime, compiled=False)


# FLOPs

FLOPS = [{}, {"NUM_LAYERS": 1}, {"NUM_KV_HEADS": 4}, {"NUM_KV_HEADS": 1}, {"MLP_MULT": 2.6}, {"TIE_EMBEDDINGS": 0}]


@pytest.mark.parametrize("knobs", FLOPS, ids=str)
def test_flops_per_token_are_those_that_torch_counts(make_config, knobs):
    oracle.assert_flops(make_config(**knobs))


def test_the_default_model_takes_what_its_parameters_and_its_attention_say():
    """17.04 M of 17.06 M parameters are used in matmuls; at length 4,096 attention takes over twice their FLOPs."""
    with torch.device("meta"):
        model = new_model(train_gpt.Config())
    matrices = 1024 * 512 + 9 * (2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 1024)
    assert kernels.flops_per_token(model, 4096) == 6 * matrices + 12 * 4096 * 512 * 9
