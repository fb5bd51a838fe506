"""Score-first test-time training: a model that learns from the validation text, but only from what has been scored.

    export MODEL_FILE=records/models/score_first.py TTT_CHUNK=32768
    python train_gpt.py FILE.env                          train the script's GPT, and score it so
    MODE=eval ARTIFACT=FILE.ptz python train_gpt.py       a finished one

The text is walked once, in chunks of TTT_CHUNK targets. The windows of a chunk are scored without gradients; then all
weights take TTT_EPOCHS passes of SGD over that chunk; then the next chunk is scored by what they have become. The last
chunk is never learned. The artifact is what training gave: after the score the weights are what they were before it.

Legal by the four rules of records/README.md. Evaluator.score asks for the next windows only after it has scored those
before, and it is in between that `walk` learns. What is minimised is the loss as it is scored: no dropout, no auxiliary
term, and the mask of CANONICAL=1 where it is set.

To combine with another model file, take a Config and a model that are both:

    class BothConfig(ScoreFirstConfig, OtherConfig): ...    with @dataclasses.dataclass(frozen=True), and model_class
    class Both(ScoreFirst, Other): ...
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

places = [folder for folder in Path(__file__).resolve().parents if (folder / "train_gpt.py").is_file()]
sys.path.insert(0, str(places[0]))  # beside this file, or above it

import train_gpt  # noqa: E402
from train_gpt import knob, require  # noqa: E402


@dataclasses.dataclass(frozen=True)
class ScoreFirstConfig(train_gpt.Config):
    # The score depends on all but the last: an artifact tells them. Training does not: a resume may change them.
    ttt_chunk: int = knob(0, "targets scored before they are learned; 0: nothing is learned", 0, free=True, arch=True)
    ttt_lr: float = knob(0.005, "SGD rate at the first chunk; a cosine takes it to 0", 0, free=True, arch=True)
    ttt_epochs: int = knob(3, "passes over a chunk that has been scored", 1, free=True, arch=True)
    ttt_momentum: float = knob(0.9, "of that SGD, kept from chunk to chunk", 0, 0.99999, free=True, arch=True)
    ttt_clip: float = knob(1.0, "most global gradient norm there; 0: off", 0, free=True, arch=True)
    ttt_batch_tokens: int = knob(2**15, "tokens of a step, over all ranks; a chunk at most", 1, free=True, arch=True)
    eval_wallclock_seconds: float = knob(600.0, "clock of the final evaluation; 0: none", 0, free=True)

    @classmethod
    def model_class(cls):
        return ScoreFirstGPT

    def check(self):
        super().check()
        if self.mode != "eval":  # where the artifact has yet to tell TRAIN_SEQ_LEN
            self.check_chunks()

    def check_chunks(self):
        T = self.train_seq_len
        for name in ("TTT_CHUNK", "TTT_BATCH_TOKENS") if self.ttt_chunk else ():
            tokens = getattr(self, name.lower())
            whole = -(-tokens // T) * T
            require(tokens == whole, f"{name}={tokens} is not whole TRAIN_SEQ_LEN={T}: use {whole}")


class Walk:
    """One evaluation that learns: its chunks, the windows of each, and the steps of SGD after it."""

    def __init__(self, model: nn.Module, evaluator: train_gpt.Evaluator, compiled_model: nn.Module):
        self.model, self.evaluator, self.compiled_model = model, evaluator, compiled_model
        self.config, self.runtime = model.config, evaluator.runtime
        self.config.check_chunks()
        T, stride, ranks = evaluator.length, evaluator.stride, self.runtime.world_size
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.windows = 1 + max(0, math.ceil((evaluator.targets - T) / stride))
        last = (self.windows - 1) * stride + T - stride if self.windows > 1 else 0  # first target of the last window
        self.chunks = 1 + last // self.config.ttt_chunk
        # Sequences of a chunk; of a step; of one of its micro-steps, which are no more than training holds in memory.
        self.sequences = self.config.ttt_chunk // T
        self.rows = min(self.config.ttt_batch_tokens // T, self.sequences)
        accum_steps = self.config.accumulation_steps(ranks, self.runtime.device.type)
        held = self.config.train_batch_tokens // (T * ranks * accum_steps)
        self.micro_rows = min(held, math.ceil(self.rows / ranks))
        evaluator.batch = min(evaluator.batch, math.ceil(math.ceil(self.config.ttt_chunk / stride) / ranks))

    def first_window(self, chunk: int) -> int:
        """The first window whose first scored target is in this chunk or after it: window w > 0 scores from
        w * stride + T - stride on."""
        T, stride = self.evaluator.length, self.evaluator.stride
        return min(max(0, math.ceil((chunk * self.config.ttt_chunk - T + stride) / stride)), self.windows)

    def __iter__(self):
        """This rank's first windows of batches, for Evaluator.score, which has scored one when it asks for the next."""
        rank, ranks = self.runtime.rank, self.runtime.world_size
        optimizer = self.model.test_time_optimizer()
        for chunk in range(self.chunks):
            begin, end = self.first_window(chunk), self.first_window(chunk + 1)
            count = end - begin
            self.evaluator.windows = range(begin + count * rank // ranks, begin + count * (rank + 1) // ranks)
            yield from self.evaluator.windows[:: self.evaluator.batch]
            if chunk + 1 < self.chunks:
                for group in optimizer.param_groups:
                    group["lr"] = self.config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (self.chunks - 1)))
                begin = chunk * self.config.ttt_chunk
                self.learn(optimizer, self.evaluator.stream.read(begin, self.config.ttt_chunk + 1))

    def learn(self, optimizer: torch.optim.Optimizer, tokens: np.ndarray):
        """TTT_EPOCHS passes over the sequences of a chunk [TTT_CHUNK + 1], in their order."""
        T = self.evaluator.length
        sequences = np.stack([tokens[start : start + T + 1] for start in range(0, len(tokens) - 1, T)])
        for _ in range(self.config.ttt_epochs):
            for start in range(0, len(sequences), self.rows):
                self.step(optimizer, sequences[start : start + self.rows])

    @torch.enable_grad()  # Evaluator.score has turned it off
    def step(self, optimizer: torch.optim.Optimizer, sequences: np.ndarray):
        """One step on sequences [n, T + 1], which the ranks share. Each rank takes the same number of micro-steps of
        the same shape, so that it is compiled once; a sequence that only fills one up weighs nothing."""
        n, ranks, micro = len(sequences), self.runtime.world_size, self.micro_rows
        mine = sequences[self.runtime.rank :: ranks]
        for start in range(0, math.ceil(n / ranks), micro):
            real = mine[start : start + micro]
            rows = np.concatenate([real, np.repeat(sequences[:1], micro - len(real), axis=0)])
            rows = train_gpt.to_device(rows, self.runtime.device)
            losses = self.compiled_model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            weights = torch.zeros_like(losses)
            weights[: len(real)] = 1 / (n * losses.size(1))
            (losses * weights).sum().backward()
        grads = [p.grad for p in self.params if p.grad is not None]
        if ranks > 1:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        if self.config.ttt_clip:
            nn.utils.clip_grad_norm_(self.params, self.config.ttt_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def warm_up(self):
        """Compile what is to come, on tokens at random: the clock of the evaluation is not to wait for it."""
        T, draw = self.evaluator.length, np.random.default_rng(self.config.seed)
        self.compiled_model.eval()
        rows = draw.integers(self.config.vocab_size, size=(self.evaluator.batch, T + 1), dtype=np.uint16)
        rows = train_gpt.to_device(rows, self.runtime.device)
        with torch._dynamo.config.patch(recompile_limit=16):  # training may have left no room among its eight graphs
            with torch.no_grad():
                self.compiled_model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            if self.chunks > 1:
                rows = draw.integers(self.config.vocab_size, size=(self.rows, T + 1), dtype=np.uint16)
                self.step(self.model.test_time_optimizer(), rows)

    def told(self) -> str:
        """For the log; the cost is in passes forward, of which one backward takes two."""
        learned = (self.chunks - 1) * self.config.ttt_chunk * self.config.ttt_epochs
        steps = (self.chunks - 1) * self.config.ttt_epochs * math.ceil(self.sequences / self.rows)
        cost = 1 + 3 * learned / (self.windows * self.evaluator.length)
        return f"score_first: chunks:{self.chunks} steps:{steps} cost:{cost:.2f} of a plain evaluation"


class ScoreFirst:
    """To stand before a train_gpt.Model in the bases of a class, whose artifact is then scored while it learns."""

    def __init__(self, config: ScoreFirstConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.config = config

    def test_time_optimizer(self) -> torch.optim.Optimizer:
        """What learns from scored text; its rate is set for each chunk."""
        params = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(params, lr=self.config.ttt_lr, momentum=self.config.ttt_momentum)

    def final_score(self, evaluator: train_gpt.Evaluator, compiled_model: nn.Module, log) -> train_gpt.Score:
        config = self.config
        if not config.ttt_chunk:
            return super().final_score(evaluator, compiled_model, log)
        weights, kept = copy.deepcopy(self.state_dict()), (evaluator.windows, evaluator.batch)
        try:
            walk = Walk(self, evaluator, compiled_model)
            log(walk.told())
            walk.warm_up()
            self.load_state_dict(weights)
            score = evaluator.score(compiled_model, log, order=walk)
        finally:
            self.load_state_dict(weights)
            self.zero_grad(set_to_none=True)
            evaluator.windows, evaluator.batch = kept
        limit = config.eval_wallclock_seconds
        if limit and score.seconds > limit:
            log(
                f"eval_clock_verdict:{score.seconds - limit:.3f}s OVER EVAL_WALLCLOCK_SECONDS={limit}, "
                "NOT A VALID SUBMISSION"
            )
        return score


class ScoreFirstGPT(ScoreFirst, train_gpt.GPT):
    """The script's own model."""


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=ScoreFirstConfig))
