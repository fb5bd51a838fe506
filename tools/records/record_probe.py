"""The child of record_rescore.py: loads a record's own script and artifact, scores it, and tests the rules on it.

    python record_probe.py RECORD DATA_PATH TOKENIZER_PATH ARTIFACT PLACES

It prints progress to stderr, and its findings as JSON in the last line of stdout. The record's code runs here and may
be anyone's: connections are refused from within, and DATA_PATH holds only the validation shards.

Records are snapshots, so there are two generations of scripts. The class Script hides the difference: the first names
its parameters' rows Row and scores by Model.final_score or Evaluator.score(forward); the second has ParameterRule, a
Coder, and a model that may return distributions and observe what was scored.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

TOOLS = Path(__file__).resolve().parents[1]
OPENED = []  # training shards that were opened
REFUSED = []  # connections that were tried
LARGEST = 1e4  # nats, in place of infinity


def guard(event: str, arguments: tuple):
    """An audit hook of the interpreter, which no Python code can remove: it notes files and refuses connections."""
    if event == "open" and isinstance(arguments[0], str) and "fineweb_train" in arguments[0]:
        OPENED.append(arguments[0])
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        REFUSED.append(str(arguments[1:])[:100])
        raise ConnectionRefusedError("an evaluation needs no network")


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---------- The record's script ---------------------------------------------------------------------------------------


class Script:
    """A record's train_gpt.py with its configuration, its model and the text."""

    def __init__(self, record: Path, data: str, tokenizer: str, artifact: Path):
        self.module = load("train_gpt", record / "train_gpt.py")
        self.second = hasattr(self.module, "ParameterRule")
        blob = artifact.read_bytes()
        texts = self.module.read_env_file(record / "config.env")
        config_class = self.config_class(record, texts, blob)
        environ = {"DATA_PATH": data, "TOKENIZER_PATH": tokenizer, "VAL_TOKENS_LIMIT": "0", "DEVICE": "auto"}
        told = {name: texts[name] for name in texts.keys() & config_class.knobs().keys()}
        self.config = config_class.load([], environ, told)
        self.build()
        self.state = self.decode(blob)
        self.restore(self.state)
        print(self.note, flush=True)

    def config_class(self, record: Path, texts: dict[str, str], blob: bytes) -> type:
        """The Config of the record's model file, or the script's own."""
        if self.second:
            file = texts.get("MODEL_FILE")
            return self.module.load_model_file(str(record / Path(file).name)) if file else self.module.Config
        load_tokenizers()  # which a record of the first generation does not hold
        source = self.module.unpack(blob).get("source")
        if not source:
            return self.module.Config
        return getattr(load(Path(source["file"]).stem, record / Path(source["file"]).name), source["config_class"])

    def build(self):
        """Choose the device and build the model, with the kernels that the run had, to the last digit.

        A script of another time may not fit those of today. It then uses what it has by itself, and its score differs
        by rounding.
        """
        names = ("cpu/cpu_kernels", "kernels")
        try:
            for name in names:
                load(f"train_gpt.tools.{name}", TOOLS / f"{name}.py")
            self.build_with_what_is_loaded()
        except Exception as error:  # whatever the one lacks of the other
            print(f"scored without tools/kernels.py, which this script does not fit: {error!r:.120}", flush=True)
            for name in names:
                sys.modules.pop(f"train_gpt.tools.{name}", None)
            self.build_with_what_is_loaded()

    def build_with_what_is_loaded(self):
        self.runtime = self.module.Runtime(self.config, {})
        self.folder = self.module.RunFolder(self.runtime)
        self.model, self.compiled_model, self.note = self.module.build_model(self.config, self.runtime)

    @property
    def device_name(self) -> str:
        name = self.runtime.device_name
        return name if self.second else name()

    def decode(self, blob: bytes) -> dict[str, torch.Tensor]:
        """The weights in the artifact."""
        if self.second:
            return self.config.coder_class()(self.config).decode(blob)
        return self.module.dequantize(self.module.unpack(blob), self.config)

    def restore(self, state: dict[str, torch.Tensor]):
        self.model.load_state_dict(state)
        self.model.eval()

    def open_text(self):
        """The validation text and the bytes of its tokens, after the record's own audit."""
        if self.second:
            config = self.config
            token_bytes = self.module.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
            return self.module.open_text(config, token_bytes, self.folder)[0], token_bytes
        return self.module.open_text(self.config, self.folder)[:2]

    def evaluator(self, stream, token_bytes, **changes):
        """The record's Evaluator, with changes of the configuration."""
        config = dataclasses.replace(self.config, **changes)
        accum_steps = config.accumulation_steps(1, self.runtime.device.type)
        return self.module.Evaluator(stream, token_bytes, config, self.runtime, accum_steps)

    @property
    def own_distributions(self) -> bool:
        """Whether the model is scored by its method `distributions`, and not by its losses."""
        return self.second and type(self.model).distributions is not self.module.Model.distributions

    def score(self, evaluator, recorder):
        """The score of record. The first scripts had no way for a model of its own to be scored."""
        if self.second:
            return evaluator.score(self.model, recorder, print, final=True)
        own = getattr(self.model, "final_score", None)
        return own(evaluator, recorder, print) if own else evaluator.score(recorder, print)

    def losses(self, inputs_BT, targets_BT) -> torch.Tensor:
        """Losses [B, T] by what scores: the distributions of a model that has its own, else its losses."""
        if not self.own_distributions:
            return self.model(inputs_BT, targets_BT)
        everywhere = torch.ones_like(targets_BT, dtype=torch.bool)
        chosen = self.model.distributions(inputs_BT, everywhere).gather(1, targets_BT.flatten()[:, None])
        return -chosen.view(targets_BT.shape)


def load_tokenizers():
    """Today's tools/vocabularies.py, as a script of the first generation calls it."""
    vocabularies = load("train_gpt.tools.tokenizers", TOOLS / "vocabularies.py")

    def use_case_marks(table):
        table.unmark = vocabularies.unmark
        table.encode = lambda text: table.model.encode(vocabularies.mark(text))

    vocabularies.use_case_marks = use_case_marks


class Patched:
    """A stream with other tokens from position `start` on."""

    def __init__(self, stream, start: int, others):
        self.stream = stream
        self.start = start
        self.others = others
        self.pattern = stream.pattern

    def __len__(self):
        return len(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def read(self, start: int, count: int):
        tokens = self.stream.read(start, count).copy()
        position = start + np.arange(count)
        changed = position >= self.start
        tokens[changed] = self.others[position[changed] % len(self.others)]
        return tokens


class Recorder:
    """Stands in for the model while it is scored, and keeps what was scored independently of the record's script.

    That is: the loss of each target, how often it was scored, whether its token was that of the text, and whether the
    model learned: whether gradients were asked for, the weights changed between two calls, or text was observed.
    """

    def __init__(self, script: Script, forward, evaluator, stream, keep: bool):
        self.forward = forward
        self.stream = stream
        self.counts = np.zeros(evaluator.targets, np.uint8)
        self.losses = np.full(evaluator.targets if keep else 0, np.nan, np.float32)
        self.nats = 0.0
        self.wrong = 0
        self.learned = False
        self.batch = None  # inputs, targets, mask and range of the batch that is being scored
        self.mark = None  # the weights at the last call
        if script.second:
            self.watch(evaluator, "batches", self.note_batches)
            self.watch(script.model, "observe", self.note_observed)
        else:
            self.watch(evaluator, "batch_at", self.note_batch)
        if script.own_distributions:
            self.watch(script.model, "distributions", self.note_distributions)

    def watch(self, thing, name: str, note):
        """Replace a method by one that calls it, then `note` with the result and the arguments."""
        method = getattr(type(thing), name).__get__(thing)  # of the class: another recorder may have replaced it
        setattr(thing, name, lambda *arguments: note(method(*arguments), *arguments))

    def __getattr__(self, name):
        return getattr(self.forward, name)

    def note_batch(self, batch, *arguments):
        self.batch = batch
        return batch

    def note_batches(self, batches, *arguments):
        for batch in batches:
            yield self.note_batch(batch)

    def note_observed(self, result, tokens):
        self.learned = True
        return result

    def note_weights(self):
        mark = fingerprint(self.forward) if self.batch is not None else None  # before the first batch is a warm-up
        self.learned |= torch.is_grad_enabled() or (self.mark is not None and mark != self.mark)
        self.mark = mark

    def note_distributions(self, distributions, inputs, scored):
        self.note_weights()
        _, targets, mask, _ = self.batch
        losses = torch.zeros(targets.shape, dtype=distributions.dtype, device=targets.device)
        losses[scored] = -distributions.gather(1, targets[scored][:, None])[:, 0]
        self.note_losses(losses, targets, mask & scored)
        return distributions

    def __call__(self, inputs, targets):
        self.note_weights()
        losses = self.forward(inputs, targets)
        if len(self.losses):  # of random tokens, to some of which a mask may give no probability
            losses = losses.clamp(max=LARGEST)
        if self.batch is not None and not torch.is_grad_enabled():
            self.note_losses(losses, targets, self.batch[2])
        return losses

    def note_losses(self, losses, targets, mask):
        scored = self.batch[3]
        chosen = losses.detach()[mask].double().cpu().numpy()
        self.nats += float(chosen.sum())
        if len(chosen) != len(scored):  # a mask that scores other targets than it claims
            self.wrong += abs(len(chosen) - len(scored))
            return
        self.counts[scored.start : scored.stop] += 1
        text = self.stream.read(scored.start + 1, len(scored))
        self.wrong += int((targets[mask].cpu().numpy() != text).sum())
        if len(self.losses):
            self.losses[scored.start : scored.stop] = np.minimum(chosen, LARGEST)


@torch.no_grad()
def fingerprint(model) -> float:
    """A number that changes as soon as the weights of a model do, if it has any."""
    sums = [p.double().abs().sum() for p in getattr(model, "parameters", list)()]
    return float(torch.stack(sums).sum()) if sums else 0.0


# ---------- The rules -------------------------------------------------------------------------------------------------


def rescore(script: Script, stream, token_bytes) -> dict:
    """Score the whole text again, and what was counted meanwhile."""
    evaluator = script.evaluator(stream, token_bytes)
    recorder = Recorder(script, script.compiled_model, evaluator, stream, keep=False)
    score = script.score(evaluator, recorder)
    return {
        "val_loss": score.loss,
        "val_bpb": score.bpb,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "seconds": score.seconds,
        "of": len(stream) - 1,
        "once": int((recorder.counts == 1).sum()),
        "twice": int((recorder.counts > 1).sum()),
        "wrong": recorder.wrong,
        "learned": recorder.learned,
        "summed_loss": recorder.nats / max(score.tokens, 1),
    }


def flips_in_windows(script: Script, stream, places: int, rng) -> list[float]:
    """The largest change of a loss before a random place when all tokens from that place on are replaced.

    Position i predicts token i + 1 from tokens up to i. With input j and all later ones replaced, losses 0 to j - 1
    must stay: target j - 1, which is the old token j, is kept.
    """
    T = min(script.config.train_seq_len, len(stream) - 1)
    moved = []
    for _ in range(places):
        begin = int(rng.integers(max(1, len(stream) - T - 1)))
        tokens = stream.read(begin, T + 1).astype(np.int64)
        place = int(rng.integers(1, T)) if T > 1 else 1
        others = rng.integers(script.config.vocab_size, size=T + 1)
        inputs = tokens[:-1].copy()
        targets = tokens[1:].copy()
        before = losses_of(script, inputs, targets)
        inputs[place:] = others[place:-1]
        targets[place:] = others[place + 1 :]
        after = losses_of(script, inputs, targets)
        moved.append(float(np.abs(before[:place] - after[:place]).max()))
    return moved


def losses_of(script: Script, inputs, targets) -> np.ndarray:
    rows = [torch.from_numpy(row)[None].to(script.runtime.device) for row in (inputs, targets)]
    return script.losses(*rows)[0].double().cpu().numpy()


def flips_in_evaluation(script: Script, stream, token_bytes, places: int, rng, learns: bool) -> list[float]:
    """The same through the whole evaluation of the beginning of the text: batches, overlapping windows, learning.

    The model gets its weights back each time. The beginning is eight windows, or as many more as a model that learns
    needs to do so.
    """
    limit = min(len(stream) - 1, 8 * script.config.train_seq_len)
    weights = {name: tensor.clone() for name, tensor in script.model.state_dict().items()}

    def recorded(text):
        script.restore(weights)
        evaluator = script.evaluator(text, token_bytes, val_tokens_limit=limit)
        recorder = Recorder(script, script.model, evaluator, text, keep=True)
        script.score(evaluator, recorder)
        return recorder

    before = recorded(stream)
    while learns and not before.learned and limit < len(stream) - 1:
        limit = min(len(stream) - 1, 2 * limit)
        before = recorded(stream)
    moved = []
    for _ in range(places):
        place = int(rng.integers(2, limit))  # token `place` is target place - 1
        after = recorded(Patched(stream, place, rng.integers(script.config.vocab_size, size=997)))
        moved.append(float(np.nanmax(np.abs(before.losses[: place - 1] - after.losses[: place - 1]))))
    script.restore(weights)
    return moved


def sums_of_probabilities(script: Script, stream, places: int) -> list[float]:
    """The sum of exp(-loss) over every token of the vocabulary as the target, at the first `places` positions.

    It is asked of the function that scores, without a kernel in its place.
    """
    T = script.config.train_seq_len
    found = []
    while len(found) < places and len(found) + 1 < len(stream):
        for length in dict.fromkeys([min(places, T), T]):
            context = torch.from_numpy(stream.read(len(found), length).astype(np.int64)).to(script.runtime.device)
            try:
                found += sums_in(script, context)
                break
            except RuntimeError:  # a model of one length only
                if length == T:
                    raise
    return found[:places]


def sums_in(script: Script, context_T) -> list[float]:
    """The sum at each position of one context: a batch of its copies, each with one token as all of its targets."""
    rows = max(1, 2**14 // len(context_T))
    V = script.config.vocab_size
    total = 0.0
    for first in range(0, V, rows):
        targets = torch.arange(first, min(first + rows, V), device=context_T.device)[:, None]
        targets = targets.expand(-1, len(context_T)).contiguous()
        total += torch.exp(-script.losses(context_T.expand_as(targets).contiguous(), targets).double()).sum(0)
    return total.tolist()


def main(record: Path, data: str, tokenizer: str, artifact: Path, places: int) -> dict:
    script = Script(record, data, tokenizer, artifact)
    stream, token_bytes = script.open_text()
    rng = np.random.default_rng(0)
    found = {"device": script.device_name, "torch": torch.__version__, "dtype": str(script.runtime.dtype)}
    found["note"] = script.note
    found["score"] = rescore(script, stream, token_bytes)
    script.restore(script.state)
    # A kernel of this machine computes what scores, in place of the record's own losses, which are tested here.
    kernel = getattr(script.model, "fused_loss", None)
    script.model.fused_loss = None
    vars(script.model).pop("distributions", None)
    with torch.no_grad():
        found["moved"] = flips_in_windows(script, stream, places, rng)
        found["sums"] = sums_of_probabilities(script, stream, places)
    script.model.fused_loss = kernel
    learns = found["score"]["learned"]
    found["moved_in_evaluation"] = flips_in_evaluation(script, stream, token_bytes, min(4, places), rng, learns)
    return found | {"opened": OPENED, "refused": REFUSED}


if __name__ == "__main__":
    sys.addaudithook(guard)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
    except ValueError as error:
        if type(error).__name__ != "UserError":  # the record's own class; all else is a fault in its code, and shown
            raise
        sys.exit(f"error: {error}")
    if not math.isfinite(answer["score"]["val_bpb"]):
        sys.exit(f"error: the artifact scores {answer['score']['val_bpb']} BPB")
    print(json.dumps(answer), flush=True)
    os._exit(0)  # threads of the record's code need not be waited for
