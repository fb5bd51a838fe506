"""Runs a record's own code, isolated, for record_judge.py: once with the text and once without it.

    python record_child.py claim OPTIONS    score the whole text as the record does; write every loss to losses.npy
    python record_child.py blind OPTIONS    answer contexts from standard input with log-probabilities

OPTIONS is a JSON object: record (folder of the script), artifact, tokenizer, tools, and for `claim` data (the shards).
Nothing that this process says is taken for a verdict: the record's code may change anything in it.

Records are snapshots, so there are two generations of scripts. The class Script hides the difference: the first names
its parameters' rows Row and scores by Model.final_score or Evaluator.score(forward); the second has ParameterRule, a
Coder, and a model that may return distributions and observe what was scored.
"""

import contextlib
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import torch

BEGIN, CONTEXT, OBSERVE = range(3)  # kinds of a request
HEADER = "<BI"  # kind, and the number of uint16 tokens that follow; for BEGIN: of targets in the text, and no tokens


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---------- The record's script ---------------------------------------------------------------------------------------


class Script:
    """A record's train_gpt.py with its configuration and its model, which has the weights of the artifact."""

    def __init__(self, options: dict, **knobs: str):
        record = Path(options["record"])
        self.tools = Path(options["tools"])
        self.module = load("train_gpt", record / "train_gpt.py")
        self.second = hasattr(self.module, "ParameterRule")
        blob = Path(options["artifact"]).read_bytes()
        texts = self.module.read_env_file(record / "config.env")
        config_class = self.config_class(record, texts, blob)
        environ = {"TOKENIZER_PATH": options["tokenizer"], "VAL_TOKENS_LIMIT": "0", "DEVICE": "auto"}
        environ |= {"DATA_PATH": options.get("data", "")} | knobs
        told = {name: texts[name] for name in texts.keys() & config_class.knobs().keys()}
        self.config = config_class.load([], environ, told)
        self.build()
        self.state = self.decode(blob)
        self.model.load_state_dict(self.state)
        self.model.eval()

    def config_class(self, record: Path, texts: dict[str, str], blob: bytes) -> type:
        """The Config of the record's model file, or the script's own."""
        if self.second:
            file = texts.get("MODEL_FILE")
            return self.module.load_model_file(str(record / Path(file).name)) if file else self.module.Config
        load_vocabularies(self.tools)  # which a record of the first generation does not hold
        source = self.module.unpack(blob).get("source")
        if not source:
            return self.module.Config
        return getattr(load(Path(source["file"]).stem, record / Path(source["file"]).name), source["config_class"])

    def build(self):
        """Choose the device and build the model, with the kernels that the run had, to the last digit.

        A script of another time may not fit those of today. It then uses what it has by itself, and its score differs
        by rounding.
        """
        cpu, old, kernels = (f"train_gpt.tools.{name}" for name in ("cpu/cpu_kernels", "cpu_kernels", "kernels"))
        try:
            sys.modules[old] = load(cpu, self.tools / "cpu" / "cpu_kernels.py")  # loaded once: it registers operators
            load(kernels, self.tools / "kernels.py")
            self.build_with_what_is_loaded()
        except Exception as error:  # whatever the one lacks of the other
            print(f"scored without tools/kernels.py, which this script does not fit: {error!r:.120}", flush=True)
            for name in (cpu, old, kernels):
                sys.modules.pop(name, None)
            self.build_with_what_is_loaded()
        print(self.note, flush=True)

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

    def evaluator(self):
        """The record's Evaluator of the validation text, after the record's own audit."""
        config = self.config
        if self.second:
            token_bytes = self.module.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
            stream = self.module.open_text(config, token_bytes, self.folder)[0]
        else:
            stream, token_bytes = self.module.open_text(config, self.folder)[:2]
        accum_steps = config.accumulation_steps(1, self.runtime.device.type)
        return self.module.Evaluator(stream, token_bytes, config, self.runtime, accum_steps)

    @property
    def own_distributions(self) -> bool:
        """Whether the model is scored by its method `distributions`, and not by its losses."""
        return self.second and type(self.model).distributions is not self.module.Model.distributions

    @property
    def observe_every(self) -> int | None:
        """Targets between two calls of `observe`; 0: it never learns; None: it learns without that interface."""
        if self.second:
            return self.model.observe_every
        return None if hasattr(self.model, "final_score") else 0

    def score(self, evaluator, recorder):
        """The score of record. The first scripts had no way for a model of its own to be scored."""
        if self.second:
            return evaluator.score(self.model, recorder, print, final=True)
        own = getattr(self.model, "final_score", None)
        return own(evaluator, recorder, print) if own else evaluator.score(recorder, print)

    def next_token(self, inputs_BT: torch.Tensor, scored_BT: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [n, V] of the token after each of the n positions in a mask.

        By the compiled model if its losses are scored. It rounds like the claim, so less of a difference is noise.
        """
        if self.own_distributions:
            return self.model.distributions(inputs_BT, scored_BT)
        return torch.log_softmax(self.compiled_model(inputs_BT)[scored_BT].float(), dim=-1)


def load_vocabularies(tools: Path):
    """Today's tools/vocabularies.py, under the name and with the calls of a script of the first generation."""
    vocabularies = load("train_gpt.tools.tokenizers", tools / "vocabularies.py")

    def use_case_marks(table):
        table.unmark = vocabularies.unmark
        table.encode = lambda text: table.model.encode(vocabularies.mark(text))

    vocabularies.use_case_marks = use_case_marks


# ---------- With the text ---------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for the compiled model while it is scored, and keeps the loss of every target."""

    def __init__(self, script: Script, evaluator):
        self.forward = script.compiled_model
        self.stream = evaluator.stream
        self.counts = np.zeros(evaluator.targets, np.uint8)
        self.losses = np.full(evaluator.targets, np.nan, np.float32)
        self.wrong = {"targets": 0, "inputs": 0}
        self.batch = None  # inputs, targets, mask and range of the batch that is being scored
        self.weights = None  # whether the weights of the first batch were those of the artifact
        self.script = script
        self.watch(evaluator, "batches" if script.second else "batch_at")
        if script.own_distributions:
            self.watch_distributions(script.model)

    def __getattr__(self, name):
        return getattr(self.forward, name)

    def watch(self, evaluator, name: str):
        method = getattr(evaluator, name)
        if name == "batches":

            def noted(*arguments):
                for batch in method(*arguments):
                    self.begin(batch)
                    yield batch
        else:

            def noted(*arguments):
                return self.begin(method(*arguments))

        setattr(evaluator, name, noted)

    def begin(self, batch):
        self.batch = batch
        return batch

    def watch_distributions(self, model):
        method = model.distributions

        def noted(inputs, scored):
            found = method(inputs, scored)
            _, targets, mask, _ = self.batch
            losses = torch.zeros(targets.shape, dtype=found.dtype, device=targets.device)
            losses[scored] = -found.gather(1, targets[scored][:, None])[:, 0]
            self.note(inputs, losses, targets, mask & scored)
            return found

        model.distributions = noted

    def __call__(self, inputs, targets):
        losses = self.forward(inputs, targets)
        if self.batch is not None and not torch.is_grad_enabled():
            self.note(inputs, losses, targets, self.batch[2])
        return losses

    def note(self, inputs, losses, targets, mask):
        if self.weights is None:
            state, own = self.script.state, self.script.model.state_dict()
            self.weights = all(torch.equal(state[name].to(own[name]), own[name]) for name in state)
        scored = self.batch[3]
        chosen = losses.detach()[mask].float().cpu().numpy()
        if len(chosen) != len(scored):  # a mask that scores other targets than it claims
            self.wrong["targets"] += abs(len(chosen) - len(scored))
            return
        self.counts[scored.start : scored.stop] += 1
        self.losses[scored.start : scored.stop] = chosen
        self.wrong["targets"] += int((targets[mask].cpu().numpy() != self.text(scored.start + 1, len(scored))).sum())
        # Row r reads the text up to its last scored target. Targets are counted in the order of the rows.
        done = scored.start
        for row, in_row in zip(inputs.cpu().numpy(), mask.cpu().numpy(), strict=True):
            if in_row.any():
                last = int(np.flatnonzero(in_row)[-1])
                done += int(in_row.sum())
                self.wrong["inputs"] += int((row[: last + 1] != self.text(done - 1 - last, last + 1)).sum())

    def text(self, start: int, count: int) -> np.ndarray:
        return self.stream.read(start, count)


def claim(options: dict):
    script = Script(options)
    evaluator = script.evaluator()
    recorder = Recorder(script, evaluator)
    score = script.score(evaluator, recorder)
    np.save("losses.npy", recorder.losses)
    answer = {
        "device": script.device_name,
        "torch": torch.__version__,
        "dtype": str(script.runtime.dtype),
        "note": script.note,
        "val_loss": float(score.loss),
        "val_bpb": float(score.bpb),
        "seconds": score.seconds,
        "twice": int((recorder.counts > 1).sum()),
        "wrong_targets": recorder.wrong["targets"],
        "wrong_inputs": recorder.wrong["inputs"],
        "weights": bool(recorder.weights),
        "seq_len": script.config.train_seq_len,
        "stride": script.config.eval_stride or script.config.train_seq_len,
        "vocab_size": script.config.vocab_size,
        "observe_every": script.observe_every,
    }
    Path("answer.json").write_text(json.dumps(answer))


# ---------- Without the text ------------------------------------------------------------------------------------------


def blind(options: dict):
    """Answer requests until standard input ends: log-probabilities [V] in fp32 for a context, one byte for the rest.

    A context is shorter than a window if the target is not its last one. Random tokens fill it, so that the model gets
    a window of the length that it was evaluated with. A causal model does not see them.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the record prints goes to standard error
    script = Script(options)
    length, device = script.config.train_seq_len, script.runtime.device
    generator = torch.Generator().manual_seed(0)
    while header := sys.stdin.buffer.read(struct.calcsize(HEADER)):
        kind, count = struct.unpack(HEADER, header)
        if kind == BEGIN:
            script.model.begin(count, script.compiled_model)
            answer = b"."
        else:
            tokens = np.frombuffer(sys.stdin.buffer.read(2 * count), "<u2")
            if kind == OBSERVE:
                script.model.observe(tokens.copy())
                answer = b"."
            else:
                window = torch.randint(script.config.vocab_size, (1, length), generator=generator)
                window[0, :count] = torch.from_numpy(tokens.astype(np.int64))
                scored = torch.zeros(1, length, dtype=torch.bool)
                scored[0, count - 1] = True
                with torch.no_grad():
                    found = script.next_token(window.to(device), scored.to(device))
                answer = found[0].float().cpu().numpy().tobytes()
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    role = {"claim": claim, "blind": blind}[sys.argv[1]]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            role(json.loads(sys.argv[2]))
    except ValueError as error:
        if type(error).__name__ != "UserError":  # the record's own class; all else is a fault in its code, and shown
            raise
        sys.exit(f"error: {error}")
    os._exit(0)  # threads of the record's code need not be waited for
