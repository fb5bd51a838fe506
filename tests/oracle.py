"""A float64 reference for the script's GPT and records/models/frontier.py: one sequence, head and token at a time.
Also checks that need a model of any model file but no run."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import new_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from train_gpt import grouped_attention, rope_tables

kernels = train_gpt.tool("kernels")
# Small blocks, so that a short sequence has several.
ATTENTIONS = [functools.partial(kernels.blocked_attention, block=4), kernels.expanded_attention]
# The frontier's techniques, named as in the script's own model.
OFF = {
    "mlp_slope": 0.0,
    "rope_dims": 0,
    "xsa_layers": 0,
    "xsa_gate": False,
    "attn_gate": False,
    "x0_mix": True,
    "ln_scale": False,
    "gated_skips": False,
    "parallel_from": -1,
    "smear_gate": False,
    "loop_layers": "",
}


def label(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def scatter(model, seed=0):
    """Randomize every parameter: at the initial values half of the knobs have no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("tok_emb.weight", "lm_head.weight")):
                p.copy_(0.4 * noise)
            elif name.endswith((".gate", "skip_gates", "smear")):
                p.copy_(0.6 * noise)
            elif name.endswith(".weight") and p.ndim == 2:
                p.copy_(noise * p.size(1) ** -0.5)
            else:
                p.copy_(0.8 + 0.4 * noise)
    return model


def random_tokens(config, batch, length, seed=0):
    """With the frontier a third of the tokens start a document: the smear gate sees every kind of start, also runs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
    if not hasattr(config, "start_token"):
        return tokens
    return torch.where(torch.rand(batch, length, generator=generator) < 1 / 3, config.start_token, tokens)


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def turn(x_Td, dims, base):
    """RoPE on the first `dims` dimensions: i and i + dims/2 are the real and imaginary parts, rotated by -t * f.

    Uses the model's own fp32 tables, which test_rope_tables_are_those_of_float64 checks."""
    cos, sin = (table.double() for table in rope_tables(len(x_Td), dims, base))
    rows = []
    for t, x in enumerate(x_Td):
        z = torch.complex(x[: dims // 2], x[dims // 2 : dims]) * torch.complex(cos[t], -sin[t])
        rows.append(torch.cat([z.real, z.imag, x[dims:]]))
    return torch.stack(rows)


def slow_attention(w, u_TD, config, layer):
    d, group = config.model_dim // config.num_heads, config.num_heads // config.num_kv_heads
    turned, heads = config.rope_dims or d, []
    for h in range(config.num_heads):
        kv = slice(h // group * d, (h // group + 1) * d)
        q = turn(norm(u_TD @ w["attn.c_q.weight"][h * d : (h + 1) * d].T), turned, config.rope_base)
        k = turn(norm(u_TD @ w["attn.c_k.weight"][kv].T), turned, config.rope_base)
        q, v = q * w["attn.q_gain"][h], u_TD @ w["attn.c_v.weight"][kv].T
        rows = []
        for t, u in enumerate(u_TD):
            e = torch.exp(k[: t + 1] @ q[t] / math.sqrt(d))
            y = e / e.sum() @ v[: t + 1]
            if layer >= config.num_layers - config.xsa_layers:
                share = torch.tanh(w["attn.attend.gate"][h]) if config.xsa_gate else 1
                y = y - share * (y @ v[t]) / (v[t] @ v[t]) * v[t]
            if config.attn_gate:
                y = y * 2 * sigmoid(w["attn.gate"][h] @ u[:12])
            rows.append(y)
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ w["attn.proj.weight"].T


def slow_mlp(w, u, config):
    hidden = u @ w["mlp.fc.weight"].T
    assert hidden.size(-1) == round(config.mlp_mult * config.model_dim)
    return torch.where(hidden > 0, hidden, config.mlp_slope * hidden) ** 2 @ w["mlp.proj.weight"].T


def slow_block(w, layer, x, x0, config):
    b = {name.removeprefix(f"blocks.{layer}."): p for name, p in w.items() if name.startswith(f"blocks.{layer}.")}
    scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
    if config.x0_mix:
        x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
    attended = b["attn_scale"] * slow_attention(b, scale * norm(x), config, layer)
    if 0 <= config.parallel_from <= layer:
        return x + attended + b["mlp_scale"] * slow_mlp(b, scale * norm(x), config)
    x = x + attended
    return x + b["mlp_scale"] * slow_mlp(b, scale * norm(x), config)


def layer_order(config, looping) -> list[int]:
    layers = list(range(config.num_layers))
    if not (looping and config.loop_layers):
        return layers
    a, b = map(int, config.loop_layers.split("-"))
    return layers[: b + 1] + layers[a : b + 1] * (config.loop_passes - 1) + layers[b + 1 :]


def slow_logits(w, tokens_T, config, looping=True):
    config = SimpleNamespace(**OFF | {field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    x = norm(w["tok_emb.weight"][tokens_T])
    if config.smear_gate:
        rows = [x[0]]
        for t in range(1, len(x)):
            gate = w["smear"][0] * sigmoid(w["smear"][1:] @ x[t, :12])
            rows.append(x[t] if tokens_T[t] == config.start_token else x[t] + gate * x[t - 1])
        x = torch.stack(rows)
    x0, pushed, pops, order = x, [], 0, layer_order(config, looping)
    for position, layer in enumerate(order):
        if position >= len(order) // 2 and pushed:
            skip = w["skip_weights"][pops] * pushed.pop()
            if config.gated_skips:
                s = sigmoid(w["skip_gates"][pops])
                x = (1 - s) * skip + s * x
            else:
                x = x + skip
            pops += 1
        x = slow_block(w, layer, x, x0, config)
        if position < len(order) // 2:
            pushed.append(x)
    assert not pushed
    z = norm(x) @ (w["tok_emb.weight"] if config.tie_embeddings else w["lm_head.weight"]).T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap)


def assert_equals_the_reference(config, attend, looping=True, seed=0, length=9):
    """Both sides are float64, so that rounding does not hide an error."""
    model = scatter(new_model(config, attend, torch.float64).double(), seed)
    tokens = random_tokens(config, 2, length + 1, seed)
    loops = getattr(config, "loop_layers", "")
    if loops:
        model.looping = looping
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = torch.stack([slow_logits(w, row, config, looping) for row in inputs])
    losses = torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[..., None])[..., 0]
    losses.mean().backward()
    ours = model(inputs, targets)
    ours.mean().backward()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(model(inputs), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        if p.numel():  # a single layer has no skips
            # The last row of the looped order's parameters may be unused while the plain order runs.
            assert p.grad is not None, f"{name} has no gradient"
            scale = w[name].grad.abs().max()
            unused = loops and name in ("skip_weights", "skip_gates")
            assert scale > 0 or unused, f"the reference does not use {name}"
            assert (p.grad - w[name].grad).abs().max() <= 1e-9 * scale, name


# Checks for any model. Dropout must be off where two calls are compared.


def prepared(config, attend=grouped_attention, dtype=torch.float32):
    """A model with randomized parameters, ready to be called."""
    model = scatter(new_model(config, attend, dtype))
    model.prepare(config, train_gpt.Runtime(config, {}))
    return model


def losses_and_gradients(run, model, tokens):
    """Losses, the extra loss if there is one, and the gradients of their sum. `run` is the model, maybe compiled."""
    model.zero_grad()
    output = run(tokens[:, :-1], tokens[:, 1:])
    losses, *extra = output if isinstance(output, tuple) else (output,)
    (losses.mean() + sum(extra)).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return losses.detach(), [part.detach() for part in extra], grads


def assert_bf16_is_close(config, attend=kernels.expanded_attention):
    """Losses and gradients in bf16 are close to those in fp32; parameters and gradients stay fp32."""
    tokens, losses, grads = random_tokens(config, 8, 17), [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = prepared(config, attend, dtype)
        losses.append(losses_and_gradients(model, model, tokens)[0])
        grads.append({name: p.grad for name, p in model.named_parameters() if p.numel()})
        assert {p.dtype for p in model.parameters()} == {g.dtype for g in grads[-1].values()} == {torch.float32}
        assert losses[-1].dtype == model(tokens[:, 1:]).dtype == torch.float32
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.2  # not 0: bf16 was actually used
    assert losses[0].mean().item() == pytest.approx(losses[1].mean().item(), abs=0.01)
    for name, grad in grads[0].items():
        assert F.cosine_similarity(grad.flatten(), grads[1][name].flatten(), dim=0) > 0.99, name


def assert_causal(config, attend=grouped_attention, length=10, rounding=0.0):
    """Changing a token affects its own and later logits, but no earlier ones and no other sequence."""

    def same(one, other):
        return torch.allclose(one, other, rtol=0, atol=rounding)

    model = prepared(config, attend).eval()
    tokens = random_tokens(config, 2, length)
    with torch.no_grad():
        before = model(tokens)
        for t in range(length):
            now = int(tokens[0, t])
            for new in {getattr(config, "start_token", now), (now + 7) % config.vocab_size} - {now}:
                changed = tokens.clone()
                changed[0, t] = new
                after = model(changed)
                assert same(after[0, :t], before[0, :t]) and same(after[1], before[1])
                assert not same(after[0, t], before[0, t]), "the present must see it"


def assert_no_gradient_from_the_future(config, length=10):
    """The logits at t depend on all embeddings up to t and on none after it."""
    model, seen = prepared(config, ATTENTIONS[0]).eval(), []
    model.tok_emb.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(random_tokens(config, 1, length))
    for t in range(length):
        finite = logits[0, t][logits[0, t].isfinite()]  # the canonical mask excludes some tokens
        (grad,) = torch.autograd.grad(finite.square().sum(), seen[0], retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).tolist() == [i <= t for i in range(length)]


def graphs_of(model):
    """(model compiled without code generation, the list of its graphs)."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), graphs


def assert_one_graph(config, attend=grouped_attention):
    """Compiled without code generation, the model is one graph with equal losses and gradients."""
    model = prepared(config, attend)
    compiled, graphs = graphs_of(model)
    for seed in (1, 2):  # the second batch must reuse the first one's graph
        tokens = random_tokens(config, 2, config.train_seq_len + 1, seed)
        eager, traced = (losses_and_gradients(run, model, tokens) for run in (model, compiled))
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def assert_inductor_agrees(config):
    model, tokens = scatter(new_model(config)), random_tokens(config, 2, 17)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    eager, fused = (losses_and_gradients(run, model, tokens) for run in (model, compiled))
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=2e-6)


def counted_flops(model, config, rows=2) -> float:
    """FLOPs per token, forward and backward, from torch's counter, which counts only matmuls. Attention uses plain
    matmuls, including those whose results the mask hides."""
    tokens = torch.randint(config.vocab_size, (rows, config.train_seq_len + 1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses_and_gradients(model, model, tokens)
    return counter.get_total_flops() / (rows * config.train_seq_len)


def assert_flops(config):
    """The FLOPs behind the logged MFU match torch's count."""
    model = new_model(config, kernels.expanded_attention)
    assert kernels.flops_per_token(model, config.train_seq_len) == counted_flops(model, config)


def assert_parameters(config):
    """Every parameter is initialized by a rule in the table, from the seed alone; has a gradient, which DDP waits for;
    and is trained by exactly one group of one optimizer."""
    made = []
    for seed, noise in ((config.seed, 0), (config.seed, 99), (config.seed + 1, 0)):
        torch.manual_seed(noise)
        model = config.model_class()(config)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        model.init_weights(dataclasses.replace(config, seed=seed))
        made.append(dict(model.named_parameters()))
    first, same, other = made
    assert all(p.isfinite().all() for p in first.values())
    assert all(torch.equal(p, same[name]) for name, p in first.items())
    drawn = [name for name, p in first.items() if p.unique().numel() > 2]
    assert "tok_emb.weight" in drawn and not any(torch.equal(first[name], other[name]) for name in drawn)
    model = prepared(config)
    groups = [group for o in model.optimizers(config, train_gpt.Runtime(config, {})) for group in o.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    losses_and_gradients(model, model, random_tokens(config, 4, config.train_seq_len + 1))
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and (p.grad is not None if p.requires_grad else p.numel() == 0), name
    model.mystery = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(train_gpt.UserError, match="PARAMETERS has no rule mystery for mystery: add one"):
        model.init_weights(config)


def scored_losses(model, evaluator, stream):
    """The loss of each target of this stream, in order, in a final score."""
    pending, found, batches = [], [], train_gpt.Evaluator.batches

    def watched(*args):
        for batch in batches(evaluator, *args):
            pending.append(batch[2])
            yield batch

    def forward(inputs, targets):
        losses = model(inputs, targets)
        if pending:
            found.append(losses[pending.pop()].detach())
        return losses

    evaluator.batches, evaluator.stream = watched, stream
    score = evaluator.score(model, forward, final=True)
    losses = torch.cat(found)
    assert len(losses) == score.tokens and losses.double().mean().item() == pytest.approx(score.loss, rel=1e-6)
    return losses


def moved_before_a_changed_token(model, evaluator, places) -> list[float]:
    """For each of these tokens: how much the losses of earlier targets in a final score change if the token changes."""
    stream, moved = evaluator.stream, []
    before = scored_losses(model, evaluator, stream)
    for place in places:
        tokens = stream.read(0, len(stream))
        tokens[place] = 1  # starts a document, and the canonical mask allows it everywhere
        changed = copy.copy(stream)
        changed.read = lambda start, count, tokens=tokens: tokens[start : start + count].copy()
        after = scored_losses(model, evaluator, changed)
        assert not torch.equal(after[place - 1 :], before[place - 1 :]), "the text was really changed"
        moved.append((after[: place - 1] - before[: place - 1]).abs().max().item())
    evaluator.stream = stream
    return moved
