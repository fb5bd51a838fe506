"""Score-first test-time training: a model that trains on the validation text, but only on what has been scored.

    export MODEL_FILE=records/models/score_first.py TTT_CHUNK=32768
    python train_gpt.py FILE.env                          train the script's GPT and score it this way
    MODE=eval ARTIFACT=FILE.ptz python train_gpt.py       score a finished one

The text is read once, in chunks of TTT_CHUNK targets. First the windows of a chunk are scored without gradients. Then
all weights take TTT_EPOCHS passes of SGD over the chunk. Then the next chunk is scored by the new weights. The last
chunk is not trained on. The artifact holds the weights of training, and the model gets them back after the score.

This is legal by the four rules of records/README.md, because the script's evaluator calls `observe` only with tokens
that it has scored. The loss is the one that is scored: no dropout, no extra loss, and the canonical mask if it is on.

To combine it with another model, inherit from both, as frontier.py does:

    class Config(score_first.Config): ...
    class MyGPT(score_first.ScoreFirst, train_gpt.GPT): ...
"""

import copy
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import train_gpt
from train_gpt import knob, require


class Config(train_gpt.Config):
    # -- Test-time training
    # The score depends on all of these except the last, so an artifact records them. Training does not depend on them.
    ttt_chunk: int = knob(0, "targets scored before they are trained on; 0: no training", 0, free=True, artifact=True)
    ttt_lr: float = knob(0.005, "SGD rate at the first chunk; a cosine takes it to 0", 0, free=True, artifact=True)
    ttt_epochs: int = knob(3, "passes over a chunk that has been scored", 1, free=True, artifact=True)
    ttt_momentum: float = knob(0.9, "momentum of that SGD, kept across chunks", 0, 0.99999, free=True, artifact=True)
    ttt_clip: float = knob(1.0, "limit of the global gradient norm there; 0: off", 0, free=True, artifact=True)
    ttt_batch_tokens: int = knob(2**15, "tokens per step over all ranks; at most a chunk", 1, free=True, artifact=True)
    eval_wallclock_seconds: float = knob(600.0, "limit of the clock of the final score; 0: none", 0, free=True)

    @classmethod
    def model_class(cls):
        return ScoreFirstGPT

    def check(self):
        super().check()
        if self.mode != "eval":  # there the artifact has yet to provide TRAIN_SEQ_LEN
            self.check_chunks()

    def check_chunks(self):
        T = self.train_seq_len
        for name in ("TTT_CHUNK", "TTT_BATCH_TOKENS") if self.ttt_chunk else ():
            tokens = getattr(self, name.lower())
            whole = -(-tokens // T) * T
            require(tokens == whole, f"{name}={tokens} is not whole TRAIN_SEQ_LEN={T}: use {whole}")


class ScoreFirst:
    """Test-time training for any model: a mixin that goes before the model in the bases of a class.

    It is the scoring interface of train_gpt.Model: the evaluator calls `begin`, then alternates between scoring
    observe_every targets and `observe`, and calls `end`."""

    def __init__(self, config: Config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.config = config
        self.observe_every = config.ttt_chunk

    def prepare(self, config: Config, runtime: train_gpt.Runtime):
        super().prepare(config, runtime)
        self.runtime = runtime

    def test_time_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that trains on scored text. Its learning rate is set before each chunk."""
        params = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(params, lr=self.config.ttt_lr, momentum=self.config.ttt_momentum)

    def begin(self, targets: int, forward) -> str | None:
        """Compile what is to come, before the clock of the evaluation starts. Returns a line for the log."""
        if not self.config.ttt_chunk:
            return None
        self.trainer = TestTimeTrainer(self, targets, forward)
        self.trainer.warm_up()
        return self.trainer.describe()

    def observe(self, tokens: np.ndarray):
        self.trainer.train(tokens)

    def end(self, score: train_gpt.Score | None) -> str | None:
        """Restore the weights. Returns a line for the log if the score took too long."""
        if not self.config.ttt_chunk:
            return None
        self.trainer.restore()
        del self.trainer
        limit = self.config.eval_wallclock_seconds
        if not score or not limit or score.seconds <= limit:
            return None
        over = f"{score.seconds - limit:.3f}s OVER EVAL_WALLCLOCK_SECONDS={limit}"
        return f"eval_clock_verdict:{over}, NOT A VALID SUBMISSION"


class TestTimeTrainer:
    """The training of one final score: its chunks, and the SGD steps on each of them."""

    __test__ = False  # for pytest, which takes any class Test...

    def __init__(self, model: nn.Module, targets: int, forward):
        self.model = model
        self.forward = forward
        self.config = model.config
        self.runtime = model.runtime
        self.config.check_chunks()
        T = self.config.train_seq_len
        ranks = self.runtime.world_size
        self.weights = copy.deepcopy(model.state_dict())
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = model.test_time_optimizer()
        # A chunk is scored by the windows whose first scored target is in it; window w > 0 scores the last S targets.
        stride = self.config.eval_stride or T
        self.windows = 1 + max(0, math.ceil((targets - T) / stride))
        last_start = (self.windows - 1) * stride + T - stride if self.windows > 1 else 0
        self.chunks = 1 + last_start // self.config.ttt_chunk
        self.trained = 0  # chunks
        # Sequences per chunk, per step, and per micro-step. A micro-step is no larger than those of training.
        self.sequences = self.config.ttt_chunk // T
        self.rows = min(self.config.ttt_batch_tokens // T, self.sequences)
        accum_steps = self.config.accumulation_steps(ranks, self.runtime.device.type)
        training_rows = self.config.train_batch_tokens // (T * ranks * accum_steps)
        self.micro_rows = min(training_rows, math.ceil(self.rows / ranks))
        # Windows that a rank scores at once, as train_gpt.Evaluator has it.
        batch = max(1, self.config.val_batch_size // (T * ranks * accum_steps))
        self.scored_rows = min(
            batch, math.ceil(self.windows / ranks), math.ceil(math.ceil(self.config.ttt_chunk / stride) / ranks)
        )

    def describe(self) -> str:
        """A line for the log. The cost counts forward passes; a backward pass takes two."""
        trained = (self.chunks - 1) * self.config.ttt_chunk * self.config.ttt_epochs
        steps = (self.chunks - 1) * self.config.ttt_epochs * math.ceil(self.sequences / self.rows)
        cost = 1 + 3 * trained / (self.windows * self.config.train_seq_len)
        return f"score_first: chunks:{self.chunks} steps:{steps} cost:{cost:.2f} of a plain evaluation"

    def warm_up(self):
        """Compile a batch of windows and a training step, on random tokens; then restore the weights."""
        # Training may have used up the eight graphs that torch.compile keeps of a model.
        torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
        rows = train_gpt.to_device(self.random_sequences(self.scored_rows), self.runtime.device)
        self.forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        if self.chunks > 1:
            self.step(self.model.test_time_optimizer(), self.random_sequences(self.rows))
            self.restore()

    def random_sequences(self, count: int) -> np.ndarray:
        random = np.random.default_rng(self.config.seed)
        shape = (count, self.config.train_seq_len + 1)
        return random.integers(self.config.vocab_size, size=shape, dtype=np.uint16)

    def train(self, tokens: np.ndarray):
        """TTT_EPOCHS passes over the sequences of a chunk, uint16 [TTT_CHUNK + 1], in their order."""
        lr = self.config.ttt_lr * 0.5 * (1 + math.cos(math.pi * self.trained / (self.chunks - 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        T = self.config.train_seq_len
        sequences = np.stack([tokens[start : start + T + 1] for start in range(0, len(tokens) - 1, T)])
        for _ in range(self.config.ttt_epochs):
            for start in range(0, len(sequences), self.rows):
                self.step(self.optimizer, sequences[start : start + self.rows])
        self.trained += 1

    @torch.enable_grad()  # the evaluator has turned it off
    def step(self, optimizer: torch.optim.Optimizer, sequences: np.ndarray):
        """One step on uint16 sequences [n, T + 1], which the ranks share.

        Every rank takes the same number of micro-steps of one shape, so that only one is compiled. Rows that only fill
        a micro-step up have weight 0."""
        n = len(sequences)
        ranks = self.runtime.world_size
        own = sequences[self.runtime.rank :: ranks]
        for start in range(0, math.ceil(n / ranks), self.micro_rows):
            real = own[start : start + self.micro_rows]
            filling = np.repeat(sequences[:1], self.micro_rows - len(real), axis=0)
            rows = train_gpt.to_device(np.concatenate([real, filling]), self.runtime.device)
            losses = self.forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
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

    def restore(self):
        """Give the model the weights that it had at the beginning."""
        self.model.load_state_dict(self.weights)
        self.model.zero_grad(set_to_none=True)


class ScoreFirstGPT(ScoreFirst, train_gpt.GPT):
    """The script's own model with test-time training."""
