"""The script's GPT with the techniques of the public frontier: one knob each, all off by default.

    MODEL_FILE=records/models/frontier.py XSA_LAYERS=4 XSA_GATE=1 python train_gpt.py records/recipes/demo_cpu.env
    MODEL_FILE=records/models/frontier.py python train_gpt.py --help

With every knob off it trains bit for bit as the script does. Test-time training (TTT_*) is in score_first.py, the coder
of the artifact in coder.py, the canonical mask in canonical.py. The last two are loaded only where a knob needs them.
records/LOG.md says what each technique was measured to be worth.
"""

import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from score_first import Config as ScoreFirstConfig
from score_first import ScoreFirst
from torch import Tensor, nn

import train_gpt
from train_gpt import Linear, ParameterRule, grouped_attention, knob, require, rms_norm

GATE_INPUTS = 12  # channels that ATTN_GATE and SMEAR_GATE read
MOST_CONTEXTS = 5  # torch.compile keeps eight graphs of a model, and LOOP_LAYERS and evaluation need some
NO_PREFIX = -100  # F.cross_entropy gives 0 for this target


class Config(ScoreFirstConfig):
    """A knob or two for each technique. The class that uses them has formula, reason and source."""

    # -- MLP
    mlp_slope: float = knob(0.0, "slope below 0 of the MLP's leaky ReLU, before the square", 0, 1, artifact=True)
    # -- Attention
    rope_dims: int = knob(0, "first dimensions of each head that rotate; 0: all", 0, artifact=True)
    xsa_layers: int = knob(0, "last blocks whose heads exclude the token's own value (XSA)", 0, artifact=True)
    xsa_gate: bool = knob(False, "a learned gate per head on what XSA_LAYERS exclude", artifact=True)
    attn_gate: bool = knob(False, "a gate on the output of each attention head", artifact=True)
    fuse_qkv: bool = knob(False, "one matmul for queries, keys and values", free=True, artifact=True)
    # -- Residual stream
    x0_mix: bool = knob(True, "each block mixes its input with the embedding, by learned vectors", artifact=True)
    ln_scale: bool = knob(False, "divide the norms of block n, counted from 1, by sqrt(n)", artifact=True)
    parallel_from: int = knob(-1, "first block whose MLP reads the same input as its attention", -1, artifact=True)
    gated_skips: bool = knob(False, "learned gates between the stream and the U-net's skips", artifact=True)
    fold_scales: bool = knob(
        False, "attn_scale and mlp_scale multiply weights instead of activations", free=True, artifact=True
    )
    # -- Embedding
    smear_gate: bool = knob(False, "a gate adds some of the previous token's embedding", artifact=True)
    start_token: int = knob(1, "id of the token that begins a document, for SMEAR_GATE", 0, artifact=True)
    # -- Depth recurrence
    loop_layers: str = knob("", "FIRST-LAST blocks that run several times; empty: none", artifact=True)
    loop_passes: int = knob(3, "times that LOOP_LAYERS run", 2, 100, artifact=True)
    loop_start: float = knob(0.35, "fraction of the run after which LOOP_LAYERS repeat", 0, 1)
    # -- Training objective and context
    contexts: str = knob("", "LENGTH@SHARE,...: context length from that fraction of the run on; empty: full")
    prefix_loss: float = knob(0.0, "initial weight of the loss on the target's longest prefix", 0, 10)
    # -- The canonical mask
    canonical: bool = knob(False, "no probability for tokens that never follow the previous one", artifact=True)
    canonical_train: bool = knob(False, "the mask of CANONICAL=1 in training, too")
    # -- Muon
    muon_row_norm: bool = knob(False, "normalize the rows of Muon's update before it is orthogonalized")
    muon_heads: int = knob(0, "heads of q, k or v that Muon orthogonalizes as one matrix; 0: all", 0)
    polar_express: bool = knob(False, "Polar Express coefficients in place of Muon's usual ones")
    # -- The coder of the artifact
    codec: str = knob("zlib", "entropy coder; rans is smaller", choices=("zlib", "rans"), artifact=True)
    weight_bits: int = knob(8, "bits per weight of the blocks and of an untied output projection", 2, 8, artifact=True)
    embed_bits: int = knob(8, "bits per weight of the embedding", 2, 8)
    clip_attn: float = knob(0.0, "clip of attention matrices, in standard deviations; 0: a high percentile", 0)
    clip_mlp: float = knob(0.0, "clip of MLP matrices", 0)
    clip_embed: float = knob(0.0, "clip of the embedding and an untied output projection", 0)
    gptq_batches: int = knob(0, "training batches that calibrate GPTQ; 0: plain rounding", 0)
    fit_size: bool = knob(False, "scale all clips so that the submission just fits SIZE_LIMIT")

    @classmethod
    def model_class(cls):
        return GPT

    def coder_class(self) -> type[train_gpt.Coder]:
        """The script's own coder, unless a knob asks for more than it has."""
        fewer_bits = min(self.weight_bits, self.embed_bits) < 8
        clips = self.clip_attn or self.clip_mlp or self.clip_embed
        if self.codec == "zlib" and not (fewer_bits or clips or self.gptq_batches or self.fit_size):
            return super().coder_class()
        return sibling("coder").FrontierCoder

    def check(self):
        super().check()
        head_dim = self.model_dim // self.num_heads
        kv_heads = self.num_kv_heads
        heads = self.muon_heads
        require(
            self.rope_dims % 2 == 0 and self.rope_dims <= head_dim,
            f"ROPE_DIMS={self.rope_dims}: expected an even number up to the width of a head, {head_dim}",
        )
        require(
            self.xsa_layers or not self.xsa_gate,
            "XSA_GATE=1 gates the last XSA_LAYERS=0 blocks: set XSA_LAYERS",
        )
        require(self.start_token < self.vocab_size, f"START_TOKEN={self.start_token} is outside VOCAB_SIZE")
        require(
            not heads or kv_heads % heads == 0,
            f"MUON_HEADS={heads} does not divide NUM_KV_HEADS={kv_heads}: use 0 or one of "
            f"{train_gpt.divisors(kv_heads)}",
        )
        require(self.canonical or not self.canonical_train, "CANONICAL_TRAIN=1 needs the mask: set CANONICAL=1")
        require(
            not self.fit_size or min(self.clip_attn, self.clip_mlp, self.clip_embed) > 0,
            "FIT_SIZE=1 scales clips, and CLIP_ATTN, CLIP_MLP or CLIP_EMBED is 0: set each, to about 13",
        )
        self.loop_range()
        self.context_starts()
        # Files that knobs need are loaded here, before the script collects the sources of the run.
        self.coder_class()
        if self.canonical:
            sibling("canonical")

    def check_text(self, stream, token_bytes) -> str:
        require(
            not self.smear_gate or token_bytes.start in (self.start_token, -1),
            f"START_TOKEN={self.start_token}, but documents begin with token {token_bytes.start}: set that",
        )
        return sibling("canonical").check_text(self, stream) if self.canonical else ""

    def loop_range(self) -> range:
        """The blocks of LOOP_LAYERS; empty without."""
        text = self.loop_layers
        layers = self.num_layers
        if not text:
            return range(0)
        match = re.fullmatch("([0-9]{1,4})-([0-9]{1,4})", text)
        blocks = range(int(match[1]), int(match[2]) + 1) if match else range(0)
        # With a single block there would be skips that get no gradient while the recurrence is off.
        fits = blocks and blocks.stop <= layers and layers > 1
        require(fits, f"LOOP_LAYERS={text}: expected FIRST-LAST of 2 or more blocks 0 to {layers - 1}")
        return blocks

    def context_starts(self) -> list[tuple[float, int]]:
        """CONTEXTS as (fraction of the run, context length from there on), in order."""
        T = self.train_seq_len
        text = self.contexts
        lengths = train_gpt.divisors(T)
        example = f"such as {-(-T // 2)}@0,{T}@0.5"
        parts = [part.strip() for part in (text or f"{T}@0").split(",")]
        matches = [re.fullmatch(r"([0-9]{1,9})@([0-9]*\.?[0-9]+)", part) for part in parts]
        require(all(matches), f"CONTEXTS={text}: expected LENGTH@SHARE,... {example}")
        starts = [(float(match[2]), int(match[1])) for match in matches]
        shares = [share for share, _ in starts]
        require(
            shares == sorted({0.0, *shares}) and shares[-1] < 1,
            f"CONTEXTS={text}: the shares must rise from 0 to less than 1, {example}",
        )
        require(
            all(length in lengths for _, length in starts),
            f"CONTEXTS={text}: each length must divide TRAIN_SEQ_LEN={T}: use some of {lengths}",
        )
        require(
            starts[-1][1] == T,
            f"CONTEXTS={text} ends with a length of {starts[-1][1]}: end with TRAIN_SEQ_LEN={T}, by which the model "
            "is scored",
        )
        require(
            len(starts) <= MOST_CONTEXTS,
            f"CONTEXTS={text} has {len(starts)} lengths, each of which is compiled: use at most {MOST_CONTEXTS}",
        )
        return starts


def sibling(name: str):
    """The module NAME.py next to this file. It is loaded only where a knob needs it, since it then counts as code."""
    path = Path(__file__).resolve().with_name(f"{name}.py")
    require(path.is_file(), f"{path} is missing: put it there, or set MODEL_FILE=records/models/frontier.py")
    key = f"{__name__}.{name}"
    return sys.modules.get(key) or train_gpt.load_module(path, key)


# ---------- Attention and MLP -----------------------------------------------------------------------------------------


class RoPE(train_gpt.RoPE):
    """Partial rotation (ROPE_DIMS = r): only the first r dimensions of a head rotate, with the frequencies of a head
    that is r wide. The others carry no position, so that a head can match content at any distance. Source: partial
    rotary embeddings of GPT-J; public parameter-golf records."""

    def __init__(self, config: Config):
        super().__init__(config, config.rope_dims)


class GatedExclusion(nn.Module):
    """Gated XSA (XSA_GATE): attention without a learned share of the direction of the token's own value.

    y = y - tanh(g) (y . v^) v^ for each head, where v^ is the token's own value at length 1 and g [H] is 0 at first: it
    starts as plain attention, and tanh(g) = 1 is XSA. It takes the place of the attention function. Source: public
    parameter-golf records."""

    def __init__(self, attend, heads: int):
        super().__init__()
        self.attend = attend
        self.gate = nn.Parameter(torch.empty(heads))

    def forward(self, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
        groups = v_BKTd.size(1)
        y_BKGTd = self.attend(q_BHTd, k_BKTd, v_BKTd).unflatten(1, (groups, -1))
        v_BK1Td = F.normalize(v_BKTd, dim=-1).unsqueeze(2)
        share_KG11 = torch.tanh(self.gate).to(y_BKGTd.dtype).view(groups, -1, 1, 1)
        return (y_BKGTd - share_KG11 * (y_BKGTd * v_BK1Td).sum(-1, keepdim=True) * v_BK1Td).flatten(1, 2)


class FoldedLinear(Linear):
    """A projection whose weights are multiplied by a scale [out] in fp32, where its outputs would be (FOLD_SCALES).

    s * (W x) = (s * W) x. This saves a pass over the tokens, backward needs no sum over tokens for the gradient of the
    scale, and no output is kept for it: a gain for GPUs that wait for their memory. The parameters are the same, so the
    knob may change for a checkpoint or an artifact that exists."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, (scale[:, None] * self.weight).to(x.dtype))


class Attention(train_gpt.Attention):
    """The script's attention with options, each of which is off by default.

    FUSE_QKV: one matmul with the concatenated weights of queries, keys and values, which remain three parameters.
    XSA_LAYERS (exclusive self-attention): in the last n blocks the output of each head loses its component along the
    token's own value, y = y - (y . v^) v^ with v^ = v / |v|. The residual stream carries a token's own content anyway,
    so heads are left to what comes from other tokens. With XSA_GATE see GatedExclusion.
    ATTN_GATE: y_h = 2 sigmoid(W_h . x[:12]) y_h for each head h. W [H, 12] is 0 at first, so that the gate is 1.
    FOLD_SCALES: the block passes the scale of the output, see FoldedLinear.
    Source: public parameter-golf records."""

    def __init__(self, config: Config, attend, layer: int):
        super().__init__(config, attend, layer)
        D = config.model_dim
        exclusive = layer >= config.num_layers - config.xsa_layers
        self.exclusive = exclusive and not config.xsa_gate
        if exclusive and config.xsa_gate:
            self.attend = GatedExclusion(attend, config.num_heads)
        self.gate = nn.Parameter(torch.empty(config.num_heads, min(GATE_INPUTS, D))) if config.attn_gate else None
        if config.fold_scales:
            self.proj = FoldedLinear(D, D, bias=False)
        self.fused = config.fuse_qkv
        # GPTQ collects the inputs of modules that are called. These are not: their input is that of this module.
        self.multiplies = ("c_q", "c_k", "c_v") if self.fused else ()

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        if not self.fused:
            return self.c_q(x_BTD), self.c_k(x_BTD), self.c_v(x_BTD)
        weights = [part.weight for part in (self.c_q, self.c_k, self.c_v)]
        return F.linear(x_BTD, torch.cat(weights).to(x_BTD.dtype)).split([*map(len, weights)], dim=-1)

    def forward(self, x_BTD: Tensor, rotate, *scale: Tensor) -> Tensor:
        q_BTHd, k_BTKd, v_BTKd = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BTD))
        q_BTHd = rotate(rms_norm(q_BTHd)) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTKd = rotate(rms_norm(k_BTKd))
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2))
        y_BTHd = y_BHTd.transpose(1, 2)
        if self.exclusive:
            y_BTKGd = y_BTHd.unflatten(2, (v_BTKd.size(2), -1))
            v_BTK1d = F.normalize(v_BTKd, dim=-1).unsqueeze(3)
            y_BTHd = (y_BTKGd - (y_BTKGd * v_BTK1d).sum(-1, keepdim=True) * v_BTK1d).flatten(2, 3)
        if self.gate is not None:
            gate_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], self.gate.to(y_BTHd.dtype)))
            y_BTHd = y_BTHd * gate_BTH[..., None]
        return self.proj(y_BTHd.flatten(2), *scale)


class MLP(train_gpt.MLP):
    """A squared leaky ReLU (MLP_SLOPE): h^2 for h > 0 and (slope * h)^2 for h < 0, so that hidden channels get a
    gradient there, too. A slope of 0 is the script's squared ReLU. FOLD_SCALES: see FoldedLinear. Source: public
    parameter-golf records."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.slope = config.mlp_slope
        if config.fold_scales:
            self.proj = FoldedLinear(self.fc.out_features, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor, *scale: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x_BTD), self.slope).square(), *scale)


# ---------- Blocks and the model --------------------------------------------------------------------------------------


class Block(train_gpt.Block):
    """The script's block with options on the residual stream.

    X0_MIX=0: the input is not mixed with the embedding; the two vectors are gone.
    LN_SCALE: what the norms of block n give is divided by sqrt(n), counted from 1, since the stream grows with depth.
    PARALLEL_FROM: from that block on the MLP reads the same input as the attention,
    x = x + a * attn(norm(x)) + m * mlp(norm(x)).
    FOLD_SCALES: a and m multiply weights instead of activations, see FoldedLinear.
    Source: public parameter-golf records; Wang and Komatsuzaki 2021 (GPT-J) for the parallel form."""

    def __init__(self, config: Config, attend, layer: int, parts: "GPT"):
        super().__init__(config, attend, layer, parts)
        if not config.x0_mix:
            self.resid_mix = None
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.parallel = 0 <= config.parallel_from <= layer
        self.folded = config.fold_scales

    def scaled(self, scale_D: Tensor, part: nn.Module, x_BTD: Tensor, *rotate) -> Tensor:
        if self.folded:
            return part(x_BTD, *rotate, scale_D)
        return scale_D.to(x_BTD.dtype) * part(x_BTD, *rotate)

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rotate) -> Tensor:
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x_BTD.dtype)
            x_BTD = mix[0] * x_BTD + mix[1] * x0_BTD
        y_BTD = x_BTD + self.scaled(self.attn_scale, self.attn, self.attn_norm(x_BTD) * self.norm_scale, rotate)
        mlp_input = self.mlp_norm(x_BTD if self.parallel else y_BTD) * self.norm_scale
        return y_BTD + self.scaled(self.mlp_scale, self.mlp, mlp_input)


class GPT(ScoreFirst, train_gpt.GPT):
    """The script's GPT with options around its blocks, and test-time training (score_first.py).

    LOOP_LAYERS (depth recurrence): from LOOP_START on, blocks FIRST to LAST run LOOP_PASSES times in a row. The model
    is deeper for the same bytes; skips connect the blocks as they run, so there are more skip_weights.
    GATED_SKIPS: x = s x + (1 - s) w skip with s = sigmoid(g) per channel, g = 0 at first, instead of x + w skip.
    SMEAR_GATE: x_t = x_t + l sigmoid(W . x_t[:12]) x_(t-1) after the embedding's norm, except where a document begins;
    l = 0 and W = 0 at first. A token sees its predecessor before any attention.
    CONTEXTS: in training a sequence is cut into shorter ones, of a length that grows with the progress of the run.
    Short contexts train faster at first, when long ones are of little use.
    PREFIX_LOSS: w (1 - progress) times the cross-entropy on the longest token whose text is a prefix of the target's.
    CANONICAL: the mask of canonical.py in evaluation and samples, with CANONICAL_TRAIN in training, too.
    Source: public parameter-golf records and modded-nanogpt; Dehghani et al. 2018 (Universal Transformers)."""

    PARAMETERS = train_gpt.GPT.PARAMETERS | {
        "smear": ParameterRule(0.0, "scalar", fp32=True),
        "skip_gates": ParameterRule(0.0, "scalar", fp32=True),
        "blocks.attn.gate": ParameterRule(0.0, "scalar", fp32=True),
        "blocks.attn.attend.gate": ParameterRule(0.0, "scalar", fp32=True),
    }
    block_class = Block
    attention_class = Attention
    mlp_class = MLP
    positions_class = RoPE
    calls_fused_loss = True

    def __init__(self, config: Config, attend=grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__(config, attend, dtype)
        D = config.model_dim
        # The order of the blocks before LOOP_START, and from there on.
        loop = config.loop_range()
        self.straight = [*range(config.num_layers)]
        self.looped = [*range(loop.stop), *[*loop] * (config.loop_passes - 1), *range(loop.stop, config.num_layers)]
        self.has_loops = bool(loop)
        self.looping = self.has_loops
        self.loop_start = config.loop_start if loop else 0.0
        skips = len(self.looped) // 2
        # DDP waits for every gradient that is required, and a single block has no skips.
        self.skip_weights = nn.Parameter(torch.empty(skips, D), requires_grad=skips > 0)
        gated = config.gated_skips
        self.skip_gates = nn.Parameter(torch.empty(skips, D), requires_grad=skips > 0) if gated else None
        self.smear = nn.Parameter(torch.empty(1 + min(GATE_INPUTS, D))) if config.smear_gate else None
        self.start_token = config.start_token
        self.context_starts = config.context_starts()
        self.context = self.whole_context = config.train_seq_len
        self.graph_starts = tuple(sorted({0.0, self.loop_start, *(start for start, _ in self.context_starts)}))
        self.mask = None
        self.mask_in_training = config.canonical_train
        self.prefix_loss = config.prefix_loss
        # A weight in a tensor: as a number it would be a constant of the graph, and each value a graph of its own.
        self.register_buffer("longest_prefix", None, persistent=False)
        self.register_buffer("prefix_weight", None, persistent=False)
        if config.prefix_loss:
            token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
            self.longest_prefix = longest_prefixes(token_bytes, config.vocab_size)
            self.prefix_weight = torch.zeros(())

    def prepare(self, config: Config, runtime: train_gpt.Runtime):
        super().prepare(config, runtime)
        if config.canonical:
            name = type(self).__name__
            reaches = type(self).forward is GPT.forward
            require(reaches, f"CANONICAL=1 does not reach the forward that {name} has of its own: set CANONICAL=0")
            self.mask = sibling("canonical").Mask(config, runtime)

    def advance(self, progress: float):
        self.looping = self.has_loops and progress >= self.loop_start
        self.context = [length for start, length in self.context_starts if start <= progress][-1]
        if self.longest_prefix is not None:
            self.prefix_weight.fill_(self.prefix_loss * (1 - progress))

    def order(self) -> list[int]:
        """The blocks as they run."""
        return self.looped if self.looping else self.straight

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x = super().embed(tokens_BT)
        if self.smear is None:
            return x
        share = self.smear[0].to(x.dtype)
        weights = self.smear[1:].to(x.dtype)
        gate_BT = share * torch.sigmoid(x[:, 1:, :GATE_INPUTS] @ weights) * (tokens_BT[:, 1:] != self.start_token)
        return torch.cat([x[:, :1], x[:, 1:] + gate_BT[..., None] * x[:, :-1]], dim=1)

    def features(self, tokens_BT: Tensor) -> Tensor:
        if self.training and self.context != self.whole_context:
            return self.run_blocks(tokens_BT.view(-1, self.context)).view(*tokens_BT.shape, -1)
        return self.run_blocks(tokens_BT)

    def run_blocks(self, tokens_BT: Tensor) -> Tensor:
        """The script's U-net, over the blocks as they run."""
        rotate = self.positions.rotation(tokens_BT.size(1), self.dtype)
        x_BTD = x0_BTD = self.embed(tokens_BT)
        order = self.order()
        half = len(order) // 2
        skips = []
        for i, layer in enumerate(order):
            if i >= half and skips:
                x_BTD = self.add_skip(x_BTD, skips.pop(), i - half)
            x_BTD = self.blocks[layer](x_BTD, x0_BTD, rotate)
            if i < half:
                skips.append(x_BTD)
        return self.norm(x_BTD)

    def add_skip(self, x_BTD: Tensor, skip_BTD: Tensor, i: int) -> Tensor:
        skip_BTD = self.skip_weights[i].to(x_BTD.dtype) * skip_BTD
        if self.skip_gates is None:
            return x_BTD + skip_BTD
        return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(self.skip_gates[i]).to(x_BTD.dtype))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        x_BTD = self.features(tokens_BT)
        masked = self.mask is not None and (self.mask_in_training or not self.training)
        with_prefixes = self.training and self.longest_prefix is not None
        if self.fused_loss and targets_BT is not None and not with_prefixes:
            return self.fused_loss(self, x_BTD, targets_BT, tokens_BT if masked else None)
        logits_BTV = self.mask(self.logits(x_BTD), tokens_BT) if masked else self.logits(x_BTD)
        if targets_BT is None:
            return logits_BTV
        losses_BT = self.losses(logits_BTV, targets_BT)
        if self.training and masked:
            # Where a training sequence is not tokenized from its beginning, the mask may exclude what is there.
            losses_BT = losses_BT.masked_fill(losses_BT == math.inf, 0.0)
        if not with_prefixes:
            return losses_BT
        prefix_BT = self.losses(logits_BTV, self.longest_prefix[targets_BT])
        prefix_BT = prefix_BT.masked_fill(prefix_BT == math.inf, 0.0)  # the mask may exclude a prefix
        return losses_BT, self.prefix_weight * prefix_BT.mean()

    def flops_per_token(self, seq_len: int) -> int:
        order = self.order()
        modules = [module for layer in order for module in self.blocks[layer].modules() if isinstance(module, Linear)]
        weights = self.output_weight()[1].numel() + sum(module.weight.numel() for module in modules)
        return 6 * weights + 12 * seq_len * self.tok_emb.embedding_dim * len(order)

    def optimizers(self, config: Config, runtime: train_gpt.Runtime) -> list[torch.optim.Optimizer]:
        optimizers = super().optimizers(config, runtime)
        if config.muon_heads or config.muon_row_norm or config.polar_express:
            optimizers[1] = Muon(self, config, runtime)
        return optimizers


def longest_prefixes(token_bytes: train_gpt.TokenBytes, vocab_size: int) -> Tensor:
    """[V]: for each token, the token with the longest text that is a proper prefix of its text; NO_PREFIX if none is.

    Of two tokens with the same text it is the one that is not a byte."""
    ids = range(token_bytes.size)
    texts = [None] * token_bytes.size
    for i in ids:
        if token_bytes.pieces[i] is not None:
            texts[i] = b" " * (i in token_bytes.leading) + token_bytes.pieces[i]
    bytes_first = sorted((i for i in ids if texts[i]), key=lambda i: i not in token_bytes.byte_ids)
    token_of = {texts[i]: i for i in bytes_first}
    table = torch.full((vocab_size,), NO_PREFIX)
    for i in ids:
        lengths = reversed(range(1, len(texts[i]))) if texts[i] else ()
        prefixes = (texts[i][:length] for length in lengths)
        table[i] = next((token_of[prefix] for prefix in prefixes if prefix in token_of), NO_PREFIX)
    return table


# ---------- Muon ------------------------------------------------------------------------------------------------------

# Quintic polynomials of the paper: each is the best for the singular values that those before it leave. The last one
# is repeated.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # keeps singular values that rounding has raised in the interval where the iterations converge


def polar_express(steps: int) -> list[tuple[float, float, float]]:
    """Coefficients of a s + b s^3 + c s^5 for each step, for matrices whose Frobenius norm is 1.

    SAFETY divides the norm, and the singular values in all steps but the last of the table. Source: Amsel, Persson,
    Musco and Gower 2025, The Polar Express."""
    polynomials = []
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        safety = SAFETY ** ((step == 0) + (step + 1 < len(POLAR_EXPRESS)))
        polynomials.append((a / safety, b / safety**3, c / safety**5))
    return polynomials


class Muon(train_gpt.Muon):
    """The script's Muon with options, for the momentum u [rows, cols] of a matrix.

    MUON_ROW_NORM: the rows of u get norm 1 before it is orthogonalized, so that small rows count as much as large ones.
    MUON_HEADS: q, k and v matrices are cut into pieces of n heads, each of which is orthogonalized on its own.
    POLAR_EXPRESS: iterations that converge to 1, in place of five equal ones that give 0.7 to 1.2.
    Source: public parameter-golf records; see polar_express."""

    def __init__(self, model: GPT, config: Config, runtime: train_gpt.Runtime):
        heads = ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight") if config.muon_heads else ()
        whole = {"params": [], "rows": 0}
        pieces = {"params": [], "rows": config.muon_heads * model.blocks[0].attn.head_dim}
        for name, p in model.named_parameters():
            if model.rule(name).group == "matrix":
                group = pieces if name.endswith(heads) else whole
                group["params"].append(p)
        groups = [group for group in (whole, pieces) if group["params"]]
        rates = (config.matrix_lr, config.muon_momentum, config.muon_backend_steps)
        super().__init__(groups, *rates, runtime, config.muon_weight_decay)
        self.row_norm = config.muon_row_norm
        self.polar_express = config.polar_express

    def polynomials(self, steps: int) -> list[tuple[float, float, float]]:
        return polar_express(steps) if self.polar_express else super().polynomials(steps)

    def orthogonal(self, u: Tensor, group: dict) -> Tensor:
        n, rows, cols = u.shape
        pieces = u.reshape(-1, group["rows"] or rows, cols)  # rows = 0: the whole matrix
        if self.row_norm:
            pieces = pieces / pieces.norm(dim=2, keepdim=True).clamp_min(1e-7)
        return super().orthogonal(pieces, group).reshape(n, rows, cols)
