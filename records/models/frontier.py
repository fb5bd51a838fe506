"""The script's GPT with the techniques of the public frontier: one knob each, all off by default.

    MODEL_FILE=records/models/frontier.py XSA_LAYERS=4 XSA_GATE=1 python train_gpt.py records/recipes/demo_cpu.env
    MODEL_FILE=records/models/frontier.py python train_gpt.py --help

With every knob off it trains bit for bit as the script does. Test-time training (TTT_*) is in score_first.py, the coder
of the artifact in coder.py, the canonical mask in canonical.py; the last two are imported only where a knob needs them.
records/LOG.md says what each technique was measured to be worth.
"""

import math
import re

import torch
import torch.nn.functional as F
from score_first import Config as ScoreFirstConfig
from score_first import ScoreFirst
from torch import Tensor, nn

import train_gpt
from train_gpt import ParameterRule, grouped_attention, knob, require

GATE_INPUTS = 12  # channels that ATTN_GATE and SMEAR_GATE read
MOST_CONTEXTS = 5  # torch.compile keeps eight graphs of a model, and LOOP_LAYERS and evaluation need some
NO_PREFIX = -100  # F.cross_entropy gives 0 for this target


class Config(ScoreFirstConfig):
    # MLP
    mlp_slope: float = knob(0.0, "slope below 0 of the MLP's leaky ReLU, before the square", 0, 1, artifact=True)
    # Attention
    rope_dims: int = knob(0, "first dimensions of each head that rotate; 0: all", 0, artifact=True)
    xsa_layers: int = knob(0, "last blocks whose heads exclude the token's own value (XSA)", 0, artifact=True)
    xsa_gate: bool = knob(False, "a learned gate per head on what XSA_LAYERS exclude", artifact=True)
    attn_gate: bool = knob(False, "a gate on the output of each attention head", artifact=True)
    fuse_qkv: bool = knob(False, "one matmul for queries, keys and values", free=True, artifact=True)
    # Residual stream
    x0_mix: bool = knob(True, "each block mixes its input with the embedding, by learned vectors", artifact=True)
    ln_scale: bool = knob(False, "divide the norms of block n, counted from 1, by sqrt(n)", artifact=True)
    parallel_from: int = knob(-1, "first block whose MLP reads the same input as its attention", -1, artifact=True)
    gated_skips: bool = knob(False, "learned gates between the stream and the U-net's skips", artifact=True)
    fold_scales: bool = knob(
        False, "attn_scale and mlp_scale multiply weights instead of activations", free=True, artifact=True
    )
    # Embedding
    smear_gate: bool = knob(False, "a gate adds some of the previous token's embedding", artifact=True)
    start_token: int = knob(1, "id of the token that begins a document, for SMEAR_GATE", 0, artifact=True)
    # Depth recurrence
    loop_layers: str = knob("", "FIRST-LAST blocks that run several times; empty: none", artifact=True)
    loop_passes: int = knob(3, "times that LOOP_LAYERS run", 2, 100, artifact=True)
    loop_start: float = knob(0.35, "progress of the run from which LOOP_LAYERS repeat", 0, 1)
    # Training objective and context
    contexts: str = knob("", "LENGTH@PROGRESS,...: context length from that progress on; empty: full")
    prefix_loss: float = knob(0.0, "initial weight of the loss on the target's longest prefix", 0, 10)
    # The canonical mask
    canonical: bool = knob(False, "no probability for tokens that never follow the previous one", artifact=True)
    canonical_train: bool = knob(False, "the mask of CANONICAL=1 in training, too")
    # Muon
    muon_row_norm: bool = knob(False, "normalize the rows of Muon's update before it is orthogonalized")
    muon_heads: int = knob(0, "heads of q, k or v that Muon orthogonalizes as one matrix; 0: all", 0)
    polar_express: bool = knob(False, "Polar Express coefficients in place of Muon's usual ones")
    # The coder of the artifact
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

    def check_text(self, stream, token_bytes) -> str:
        line = super().check_text(stream, token_bytes)
        require(
            not self.smear_gate or token_bytes.start in (self.start_token, -1),
            f"START_TOKEN={self.start_token}, but documents begin with token {token_bytes.start}: set that",
        )
        if not self.canonical:
            return line
        import canonical  # late: it counts as code

        return canonical.check_text(self, stream)

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
        """CONTEXTS as (progress, context length from there on), in order."""
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


# ---------- Attention and MLP -----------------------------------------------------------------------------------------


class RoPE(train_gpt.RoPE):
    """Partial rotation (ROPE_DIMS = r): only the first r dimensions of a head rotate, i with i + r/2, by frequencies
    spread over r. The rest carries no position, so a head can match content at any distance. Source: GPT-J's partial
    rotary embedding; public parameter-golf records."""


class GatedExclusion(nn.Module):
    """Gated XSA (XSA_GATE): attention that excludes a learned share of the direction of the token's own value.

    y = y - tanh(g) * (y . v^) v^ for each head, where v^ is the token's own value at length 1 and g [H] is 0 at first:
    it starts as plain attention, and tanh(g) = 1 is XSA. It stands in for the attention function, in its layout.
    Source: public parameter-golf records."""

    def __init__(self, attend, heads: int):
        super().__init__()
        self.attend = attend
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
        groups = v_BKTd.size(1)
        y_BKGTd = self.attend(q_BHTd, k_BKTd, v_BKTd).unflatten(1, (groups, -1))
        v_BK1Td = F.normalize(v_BKTd, dim=-1).unsqueeze(2)
        share_KG11 = torch.tanh(self.gate).to(y_BKGTd.dtype).view(groups, -1, 1, 1)
        return (y_BKGTd - share_KG11 * (y_BKGTd * v_BK1Td).sum(-1, keepdim=True) * v_BK1Td).flatten(1, 2)


class FoldedLinear(train_gpt.Linear):
    """A projection whose output scale multiplies its weights (FOLD_SCALES).

    scale * (W x) = (scale * W) x, with the product of scale [out] and W in fp32. So there is one pass less over the
    tokens, the backward pass needs no sum over tokens for the gradient of the scale, and no output is kept for it. The
    parameters are the same, so that the knob may change for an existing checkpoint or artifact."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, (scale[:, None] * self.weight).to(x.dtype))


class Attention(train_gpt.Attention):
    """Four options on the script's attention.

    FUSE_QKV: one matmul by the concatenated weights of queries, keys and values, which remain three parameters.
    XSA_LAYERS (exclusive self-attention): the output of each head loses its component along the token's own value,
    y = y - (y . v^) v^ with v^ = v / |v|, in the last n blocks. The residual stream carries a token's own content
    anyway; heads are left to what comes from other tokens. XSA_GATE makes a learned share of it, see GatedExclusion.
    ATTN_GATE: y_h = y_h * 2 sigmoid(W_h . x[:12]) for each head h. W [H, 12] is 0 at first, so the gate is 1.
    FOLD_SCALES: the output projection is left to the block, which knows the scale to fold into it.
    Source: public parameter-golf records."""

    def __init__(self, config: Config, attend, layer: int):
        super().__init__(config, attend, layer)
        D = config.model_dim
        exclusive = layer >= config.num_layers - config.xsa_layers
        self.exclusive = exclusive and not config.xsa_gate
        if exclusive and config.xsa_gate:
            self.attend = GatedExclusion(attend, config.num_heads)
        self.gate = nn.Parameter(torch.empty(config.num_heads, min(GATE_INPUTS, D))) if config.attn_gate else None
        self.fused = config.fuse_qkv
        # The coder's Hessians come from the inputs of modules that are called. These three are not: their input is
        # that of this module.
        self.multiplies = ("c_q", "c_k", "c_v") if config.fuse_qkv else ()
        self.folded = config.fold_scales
        if self.folded:
            self.proj = FoldedLinear(D, D, bias=False)

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        if not self.fused:
            return super().qkv(x_BTD)
        weights = [part.weight for part in (self.c_q, self.c_k, self.c_v)]
        return F.linear(x_BTD, torch.cat(weights).to(x_BTD.dtype)).split([*map(len, weights)], dim=-1)

    def mix(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, x_BTD: Tensor) -> Tensor:
        y_BTHd = super().mix(q_BTHd, k_BTKd, v_BTKd, x_BTD)
        if self.exclusive:
            y_BTKGd = y_BTHd.unflatten(2, (v_BTKd.size(2), -1))
            v_BTK1d = F.normalize(v_BTKd, dim=-1).unsqueeze(3)
            y_BTHd = (y_BTKGd - (y_BTKGd * v_BTK1d).sum(-1, keepdim=True) * v_BTK1d).flatten(2, 3)
        if self.gate is not None:
            gate_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], self.gate.to(y_BTHd.dtype)))
            y_BTHd = y_BTHd * gate_BTH[..., None]
        return y_BTHd

    def project(self, y_BTHd: Tensor) -> Tensor:
        return y_BTHd.flatten(2) if self.folded else super().project(y_BTHd)


class MLP(train_gpt.MLP):
    """A leaky ReLU in place of the ReLU, then squared (MLP_SLOPE): h^2 where h > 0, (slope * h)^2 elsewhere, so that
    negative inputs get a gradient. With FOLD_SCALES the output projection is left to the block. Source: public
    parameter-golf records."""
