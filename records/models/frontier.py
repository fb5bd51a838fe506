"""The script's own model with what newer public runs add: more knobs, each off by default, those of score_first.py
(test-time training) among them. With none of them set this trains bit for bit as train_gpt.py does.

    MODEL_FILE=records/models/frontier.py XSA_LAYERS=4 XSA_GATE=1 python train_gpt.py records/recipes/demo_cpu.env
    MODEL_FILE=records/models/frontier.py python train_gpt.py --help

records/LOG.md has what each was measured to be worth.
"""

import dataclasses
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

places = [folder for folder in Path(__file__).resolve().parents if (folder / "train_gpt.py").is_file()]
sys.path[:0] = [str(places[0]), str(Path(__file__).resolve().parent)]  # beside this file or above it; beside it

from score_first import ScoreFirst, ScoreFirstConfig  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import Row, knob, require  # noqa: E402

MOST_CONTEXTS = 5  # torch.compile keeps eight graphs of a model: of these, of depth recurrence, and of the evaluation
NO_PREFIX = -100  # the target for which F.cross_entropy gives 0


@dataclasses.dataclass(frozen=True)
class FrontierConfig(ScoreFirstConfig):
    xsa_gate: bool = knob(False, "a learned gate per head on what XSA_LAYERS leave out", arch=True)
    muon_heads: int = knob(0, "heads of q, k or v that Muon takes as one matrix; 0: all", 0)
    polar_express: bool = knob(False, "its coefficients in the place of Muon's usual ones")
    prefix_loss: float = knob(0.0, "initial weight of the loss on the target's longest prefix", 0, 10)
    contexts: str = knob("", "LENGTH@SHARE,...: tokens of context from that share of the run on; empty: all")
    canonical_train: bool = knob(False, "the mask of CANONICAL=1 in training, too")
    fold_scales: bool = knob(False, "attn_scale and mlp_scale multiply weights, not tokens", free=True, arch=True)
    fuse_qkv: bool = knob(False, "one product for queries, keys and values", free=True, arch=True)

    @classmethod
    def model_class(cls):
        return FrontierGPT

    def check(self):
        super().check()
        kv_heads, heads = self.num_kv_heads, self.muon_heads
        require(self.xsa_layers or not self.xsa_gate, "XSA_GATE=1 gates the last XSA_LAYERS=0 blocks: set XSA_LAYERS")
        require(
            not heads or kv_heads % heads == 0,
            f"MUON_HEADS={heads} does not divide NUM_KV_HEADS={kv_heads}: "
            f"use 0 or one of {train_gpt.divisors(kv_heads)}",
        )
        require(self.canonical or not self.canonical_train, "CANONICAL_TRAIN=1 needs the mask: set CANONICAL=1")
        self.context_starts()

    def context_starts(self) -> list[tuple[float, int]]:
        """(share of the run, tokens of context from there on) of CONTEXTS."""
        T, text = self.train_seq_len, self.contexts
        lengths, example = train_gpt.divisors(T), f"such as {-(-T // 2)}@0,{T}@0.5"
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
            f"CONTEXTS={text} ends with a length of {starts[-1][1]}: end with TRAIN_SEQ_LEN={T}"
            ", by which the model is scored",
        )
        require(
            len(starts) <= MOST_CONTEXTS,
            f"CONTEXTS={text} has {len(starts)} lengths, each of which is compiled: use at most {MOST_CONTEXTS}",
        )
        return starts


# FOLD_SCALES and FUSE_QKV: the same sums in fewer passes over the tokens. The parameters are the same, so that either
# may be switched for a checkpoint or an artifact that is there.


class FoldedLinear(train_gpt.Linear):
    """Its weights are multiplied by a `scale` [out] in fp32 where its outputs would be, token by token: backward, too,
    no scale needs a sum over tokens, and no output is kept for it."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, (scale[:, None] * self.weight).to(x.dtype))


class FusedAttention(train_gpt.Attention):
    multiplies = ("c_q", "c_k", "c_v")  # without calling them: GPTQ looks at the input of this

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        weights = [part.weight for part in (self.c_q, self.c_k, self.c_v)]
        return F.linear(x_BTD, torch.cat(weights).to(x_BTD.dtype)).split([*map(len, weights)], dim=-1)


class LeanBlock(train_gpt.Block):
    """The script's own block while neither knob is set."""

    def __init__(self, config: FrontierConfig, attend, layer: int):
        super().__init__(config, attend, layer)
        self.folds = config.fold_scales
        if config.fuse_qkv:
            self.attn = FusedAttention(config, attend, layer)
        for part in (self.attn, self.mlp) if self.folds else ():
            part.proj = FoldedLinear(part.proj.in_features, config.model_dim, bias=False)

    def scaled(self, scale_D: Tensor, part: nn.Module, x: Tensor, *tables: Tensor) -> Tensor:
        return part(x, *tables, scale_D) if self.folds else super().scaled(scale_D, part, x, *tables)


class GatedExclusion(nn.Module):
    """Causal attention that leaves out of each head some of the direction of the token's own value: all of it is XSA.

    The share is tanh of a learned gate per head [H], 0 at first."""

    def __init__(self, attend, heads: int):
        super().__init__()
        self.attend, self.gate = attend, nn.Parameter(torch.zeros(heads))

    def forward(self, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
        y_BHTd, groups = self.attend(q_BHTd, k_BKTd, v_BKTd), v_BKTd.size(1)
        y_BKGTd, v_BK1Td = y_BHTd.unflatten(1, (groups, -1)), F.normalize(v_BKTd, dim=-1).unsqueeze(2)
        share_KG11 = torch.tanh(self.gate).to(y_BHTd.dtype).view(groups, -1, 1, 1)
        return (y_BKGTd - share_KG11 * (y_BKGTd * v_BK1Td).sum(-1, keepdim=True) * v_BK1Td).flatten(1, 2)


def longest_prefixes(token_bytes: train_gpt.TokenBytes, vocab_size: int) -> Tensor:
    """[V]: of each token the one with the longest text that its own text begins with and goes on after; NO_PREFIX
    where there is none. Of two with the same text it is the one that is no byte."""
    ids = range(token_bytes.size)
    texts = [
        None if token_bytes.pieces[i] is None else b" " * (i in token_bytes.leading) + token_bytes.pieces[i]
        for i in ids
    ]
    bytes_first = sorted((i for i in ids if texts[i]), key=lambda i: i not in token_bytes.byte_ids)
    token_of, table = {texts[i]: i for i in bytes_first}, torch.full((vocab_size,), NO_PREFIX)
    for i in filter(texts.__getitem__, ids):
        prefixes = (texts[i][:length] for length in reversed(range(1, len(texts[i]))))
        table[i] = next((token_of[prefix] for prefix in prefixes if prefix in token_of), NO_PREFIX)
    return table


class FrontierGPT(ScoreFirst, train_gpt.GPT):
    block_class = LeanBlock
    needs_logits = False  # unless there is a loss on prefixes
    PARAMETERS = train_gpt.GPT.PARAMETERS | {"blocks.attn.attend.gate": Row(0.0, "scalar", "attn", fp32=True)}

    def __init__(self, config: FrontierConfig, attend=train_gpt.grouped_attention, dtype=torch.float32):
        super().__init__(config, attend, dtype)
        for block in self.blocks:
            if config.xsa_gate and block.attn.exclusive:
                block.attn.attend, block.attn.exclusive = GatedExclusion(attend, config.num_heads), False
        self.mask_in_training = config.canonical_train
        # In training a sequence is cut into contexts of so many tokens. A graph is compiled for each.
        self.context_starts, self.loop_start = config.context_starts(), self.graph_starts[-1]
        self.graph_starts = tuple(sorted({*self.graph_starts, *(share for share, _ in self.context_starts)}))
        self.context = self.whole = config.train_seq_len
        self.prefix_loss, self.needs_logits = config.prefix_loss, bool(config.prefix_loss)
        for name in ("longest_prefix", "prefix_weight"):
            self.register_buffer(name, None, persistent=False)
        if config.prefix_loss:
            token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
            self.longest_prefix = longest_prefixes(token_bytes, config.vocab_size)
            self.prefix_weight = torch.zeros(())  # a number would be a constant, and each a graph of its own

    def advance(self, progress: float):
        self.looping = self.has_loops and progress >= self.loop_start
        self.context = [length for share, length in self.context_starts if share <= progress][-1]
        if self.longest_prefix is not None:
            self.prefix_weight.fill_(self.prefix_loss * (1 - progress))

    def features(self, tokens_BT: Tensor) -> Tensor:
        if self.training and self.context != self.whole:
            return super().features(tokens_BT.view(-1, self.context)).view(*tokens_BT.shape, -1)
        return super().features(tokens_BT)

    def losses(self, logits_BTV: Tensor, targets_BT: Tensor):
        losses_BT = super().losses(logits_BTV, targets_BT)
        if self.training and self.mask_in_training:  # where a text begins anew the mask may exclude what is there
            losses_BT = losses_BT.masked_fill(losses_BT == math.inf, 0.0)
        if not self.training or self.longest_prefix is None:
            return losses_BT
        prefix_BT = super().losses(logits_BTV, self.longest_prefix[targets_BT])
        prefix_BT = prefix_BT.masked_fill(prefix_BT == math.inf, 0.0)  # it may be excluded where the target is not
        return losses_BT, self.prefix_weight * prefix_BT.mean()

    def optimizers(self, config: FrontierConfig, runtime) -> list[torch.optim.Optimizer]:
        if not config.muon_heads and not config.polar_express:
            return super().optimizers(config, runtime)
        adam, _ = super().optimizers(config, runtime)
        names = ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight") if config.muon_heads else ()
        groups = [{"params": [], "rows": 0}, {"params": [], "rows": config.muon_heads * self.blocks[0].attn.head_dim}]
        for name, p in self.named_parameters():
            if self.row(name).group == "matrix":
                groups[name.endswith(names)]["params"].append(p)
        return [adam, FrontierMuon([group for group in groups if group["params"]], config, runtime)]


# The paper's iterations, each the best for the singular values that those before it leave; the last goes on as it is.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # keeps what rounding adds within the interval where the iterations converge


def polar_express(steps: int) -> list[tuple[float, float, float]]:
    """The polynomials a s + b s^3 + c s^5 of singular values for matrices whose Frobenius norm is 1. Source: Amsel,
    Persson, Musco and Gower 2025, The Polar Express; with their SAFETY on the norm and on all steps but the last."""
    polynomials = []
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        safety = SAFETY ** ((step == 0) + (step + 1 < len(POLAR_EXPRESS)))
        polynomials.append((a / safety, b / safety**3, c / safety**5))
    return polynomials


class FrontierMuon(train_gpt.Muon):
    """Muon whose parameter groups say in `rows` how many rows of a matrix are orthogonalised as one; 0: all."""

    def __init__(self, groups: list[dict], config: FrontierConfig, runtime):
        super().__init__(
            groups,
            config.matrix_lr,
            config.muon_momentum,
            config.muon_backend_steps,
            runtime,
            config.muon_row_norm,
            config.muon_weight_decay,
        )
        self.polar_express = config.polar_express

    def polynomials(self, steps: int) -> list[tuple[float, float, float]]:
        return polar_express(steps) if self.polar_express else super().polynomials(steps)

    def orthogonal(self, u: Tensor, group: dict, dtype: torch.dtype) -> Tensor:
        n, rows, cols = u.shape
        return super().orthogonal(u.reshape(-1, group["rows"] or rows, cols), group, dtype).reshape(n, rows, cols)


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=FrontierConfig))
