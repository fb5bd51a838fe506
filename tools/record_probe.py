"""The child of record_rescore.py: loads a record's own script and artifact, scores it, and tests the rules on it.

    python record_probe.py RECORD DATA_PATH TOKENIZER_PATH ARTIFACT PLACES

It prints progress to stderr, and what it found as JSON in the last line of stdout. The record's code runs here, and may
be anyone's: connections are refused from within, and DATA_PATH holds the validation shards alone.
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

OPENED, REFUSED = [], []
LARGEST = 1e4  # nats, in the place of infinity


def guard(event: str, arguments: tuple):
    """An audit hook of the interpreter, which no Python code can take away: notes files, refuses connections."""
    if event == "open" and isinstance(arguments[0], str) and "fineweb_train" in arguments[0]:
        OPENED.append(arguments[0])
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        REFUSED.append(str(arguments[1:])[:100])
        raise ConnectionRefusedError("an evaluation needs no network")


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Patched:
    """A stream whose tokens from `start` on are others; all else is the original's."""

    def __init__(self, stream, start: int, others):
        self.stream, self.start, self.others, self.pattern = stream, start, others, stream.pattern

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
    """Stands in for the model in Evaluator.score, beside which it keeps what was scored: losses by target, how often
    each target was scored, whether its token was the text's, and whether anything was learned: whether gradients were
    asked for, or the weights have changed between two calls."""

    def __init__(self, model, evaluator, stream, keep: bool):
        self.model, self.evaluator, self.stream = model, evaluator, stream
        self.counts = np.zeros(evaluator.targets, np.uint8)
        self.losses = np.full(evaluator.targets if keep else 0, np.nan, np.float32)
        self.nats, self.wrong, self.learned, self.batch, self.mark = 0.0, 0, False, None, None
        batch_at = evaluator.batch_at

        def noted(index):
            self.batch = batch_at(index)
            return self.batch

        evaluator.batch_at = noted

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, inputs, targets):
        mark = fingerprint(self.model) if self.batch is not None else None  # before the first batch is a warm-up
        self.learned |= torch.is_grad_enabled() or (self.mark is not None and mark != self.mark)
        self.mark = mark
        losses = self.model(inputs, targets)
        if len(self.losses):  # of tokens at random, to some of which a mask may give no probability
            losses = losses.clamp(max=LARGEST)
        if self.batch is None or torch.is_grad_enabled():
            return losses
        _, _, mask, scored = self.batch
        chosen = losses.detach()[mask].double().cpu().numpy()
        self.nats += float(chosen.sum())
        if len(chosen) == len(scored):
            self.counts[scored.start : scored.stop] += 1
            text = self.stream.read(scored.start + 1, len(scored))
            self.wrong += int((targets[mask].cpu().numpy() != text).sum())
            if len(self.losses):
                self.losses[scored.start : scored.stop] = chosen
        else:  # a mask that scores other targets than it says
            self.wrong += abs(len(chosen) - len(scored))
        return losses


@torch.no_grad()
def fingerprint(model) -> float:
    """Of the weights of a model, if it has any: another as soon as they move."""
    sums = [p.double().abs().sum() for p in getattr(model, "parameters", list)()]
    return float(torch.stack(sums).sum()) if sums else 0.0


def final_score(model, evaluator, recorder):
    """The score of record, by the model's own way if it has one: scripts before the seam had none for it."""
    own = getattr(model, "final_score", None)
    return own(evaluator, recorder, print) if own else evaluator.score(recorder, print)


def open_record(record: Path, data: str, tokenizer: str, artifact: Path):
    """(train_gpt as the record has it, configuration, model with the artifact's weights, compiled model, folder, which
    kernels it chose)."""
    train_gpt = load("train_gpt", record / "train_gpt.py")
    load("train_gpt.tools.tokenizers", Path(__file__).with_name("tokenizers.py"))
    held = train_gpt.unpack(artifact.read_bytes())
    source = held.get("source")
    config_class = train_gpt.Config
    if source:
        module = load(Path(source["file"]).stem, record / Path(source["file"]).name)
        config_class = getattr(module, source["config_class"])
    environ = {"DATA_PATH": data, "TOKENIZER_PATH": tokenizer, "VAL_TOKENS_LIMIT": "0", "DEVICE": "auto"}
    texts = train_gpt.read_env_file(record / "config.env")
    told = {name: texts[name] for name in texts.keys() & config_class.knobs().keys()}
    config = config_class.load([], environ, told)
    folder = train_gpt.RunFolder(train_gpt.Runtime(config, {}))
    model, compiled_model, note = build_model(train_gpt, config, folder.runtime)
    model.load_state_dict(train_gpt.dequantize(held, config))
    print(note, flush=True)
    return train_gpt, config, model.eval(), compiled_model, folder, note


def build_model(train_gpt, config, runtime):
    """With the kernels that the run had, to the last digit. A script of another time may not fit those of today: it
    then does what it does alone, and its score differs by rounding."""
    names = [f"train_gpt.tools.{name}" for name in ("cpu_kernels", "kernels")]
    try:
        for name in names:
            load(name, Path(__file__).with_name(f"{name.rpartition('.')[2]}.py"))
        return train_gpt.build_model(config, runtime)
    except Exception as error:  # whatever the one lacks of the other
        print(f"scored without tools/kernels.py, which this script does not fit: {error!r:.120}", flush=True)
        for name in names:
            sys.modules.pop(name, None)
        return train_gpt.build_model(config, runtime)


def evaluator_of(train_gpt, config, stream, token_bytes, runtime):
    accum_steps = config.accumulation_steps(1, runtime.device.type)
    return train_gpt.Evaluator(stream, token_bytes, config, runtime, accum_steps)


def rescore(train_gpt, config, model, compiled_model, stream, token_bytes, runtime) -> dict:
    """The whole text again, and what was counted beside it."""
    evaluator = evaluator_of(train_gpt, config, stream, token_bytes, runtime)
    recorder = Recorder(compiled_model, evaluator, stream, keep=False)
    score = final_score(model, evaluator, recorder)
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


def flips_in_windows(model, config, stream, runtime, places: int, rng) -> list[float]:
    """Largest change of a loss before a random place, when all tokens from that place on are replaced.

    Position i predicts token i + 1 from tokens up to i: with input j and all later ones replaced, losses 0 to j - 1
    must stay, target j - 1 (the old token j) being kept."""
    T, moved = min(config.train_seq_len, len(stream) - 1), []
    for _ in range(places):
        begin = int(rng.integers(max(1, len(stream) - T - 1)))
        tokens = stream.read(begin, T + 1).astype(np.int64)
        place = int(rng.integers(1, T)) if T > 1 else 1
        others = rng.integers(config.vocab_size, size=T + 1)
        inputs, targets = tokens[:-1].copy(), tokens[1:].copy()
        before = losses_of(model, inputs, targets, runtime)
        inputs[place:], targets[place:] = others[place:-1], others[place + 1 :]
        after = losses_of(model, inputs, targets, runtime)
        moved.append(float(np.abs(before[:place] - after[:place]).max()))
    return moved


def losses_of(model, inputs, targets, runtime):
    rows = [torch.from_numpy(row)[None].to(runtime.device) for row in (inputs, targets)]
    return model(*rows)[0].double().cpu().numpy()


def flips_in_evaluation(train_gpt, config, model, stream, token_bytes, runtime, places, rng, learns) -> list[float]:
    """The same through the whole evaluation of a beginning of the text: batches, windows that overlap, learning while
    scoring. The model gets its weights back each time. The beginning is eight windows, and for a model that learns so
    much more that it does."""
    limit = min(len(stream) - 1, 8 * config.train_seq_len)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def recorded(text):
        model.load_state_dict(weights)
        short = dataclasses.replace(config, val_tokens_limit=limit)
        evaluator = evaluator_of(train_gpt, short, text, token_bytes, runtime)
        recorder = Recorder(model, evaluator, text, keep=True)
        final_score(model, evaluator, recorder)
        return recorder

    before, moved = recorded(stream), []
    while learns and not before.learned and limit < len(stream) - 1:
        limit = min(len(stream) - 1, 2 * limit)
        before = recorded(stream)
    for _ in range(places):
        place = int(rng.integers(2, limit))  # token `place` is target place - 1
        after = recorded(Patched(stream, place, rng.integers(config.vocab_size, size=997)))
        moved.append(float(np.nanmax(np.abs(before.losses[: place - 1] - after.losses[: place - 1]))))
    model.load_state_dict(weights)
    return moved


def sums_of_probabilities(model, config, stream, runtime, places: int) -> list[float]:
    """At the first `places` positions of the text, cut into windows: the sum of exp(-loss) over every token of the
    vocabulary as the target. It is asked of the very function that scores, but for a kernel in its place."""
    found, T = [], config.train_seq_len
    while len(found) < places and len(found) + 1 < len(stream):
        for length in dict.fromkeys([min(places, T), T]):
            context = stream.read(len(found), length).astype(np.int64)
            try:
                found += sums_in(model, torch.from_numpy(context).to(runtime.device), config.vocab_size)
                break
            except RuntimeError:  # a model of one length only
                if length == T:
                    raise
    return found[:places]


def sums_in(model, context_T, vocab_size: int) -> list[float]:
    """The sum at each position of one context: a batch of its copies, each with one token as all of its targets."""
    rows, total = max(1, 2**14 // len(context_T)), 0.0
    for first in range(0, vocab_size, rows):
        targets = torch.arange(first, min(first + rows, vocab_size), device=context_T.device)[:, None]
        targets = targets.expand(-1, len(context_T)).contiguous()
        total += torch.exp(-model(context_T.expand_as(targets).contiguous(), targets).double()).sum(0)
    return total.tolist()


def main(record: Path, data: str, tokenizer: str, artifact: Path, places: int) -> dict:
    train_gpt, config, model, compiled_model, folder, note = open_record(record, data, tokenizer, artifact)
    stream, token_bytes, _ = train_gpt.open_text(config, folder)
    runtime, rng = folder.runtime, np.random.default_rng(0)
    found = {"device": runtime.device_name(), "torch": torch.__version__, "dtype": str(runtime.dtype), "note": note}
    found["score"] = rescore(train_gpt, config, model, compiled_model, stream, token_bytes, runtime)
    model.load_state_dict(train_gpt.dequantize(train_gpt.unpack(artifact.read_bytes()), config))
    model.eval()
    # A kernel of this machine stands for the record's own losses where it scores: these are asked for themselves.
    kernel, model.fused_loss = getattr(model, "fused_loss", None), None
    with torch.no_grad():
        found["moved"] = flips_in_windows(model, config, stream, runtime, places, rng)
        found["sums"] = sums_of_probabilities(model, config, stream, runtime, places)
    model.fused_loss = kernel
    found["moved_in_evaluation"] = flips_in_evaluation(
        train_gpt, config, model, stream, token_bytes, runtime, min(4, places), rng, found["score"]["learned"]
    )
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
