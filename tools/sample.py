"""MODE=sample of train_gpt.py: text from a trained model, streamed to standard output.

    MODE=sample ARTIFACT=logs/<run_id>/final_model.int8.ptz SAMPLE_PROMPT="To be" python train_gpt.py

DATA_PATH is not needed, TOKENIZER_PATH is. SAMPLE_PROMPT, SAMPLE_TOKENS, TEMPERATURE and TOP_K are knobs of this file
alone; SEED is the script's. Like all knobs they come from a FILE.env and from the environment, which wins.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
from pathlib import Path

import torch

import train_gpt
from train_gpt import knob, require


@dataclasses.dataclass(frozen=True)
class SampleKnobs:
    # -- MODE=sample
    sample_prompt: str = knob("", r"text to continue; \n is a line break, \u0022 a quote", free=True)
    sample_tokens: int = knob(200, "maximum number of tokens", 1, free=True)
    temperature: float = knob(0.8, "temperature of the softmax; 0: the likeliest token", 0, free=True)
    top_k: int = knob(0, "sample from the likeliest k tokens; 0: from all", 0, free=True)

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        return {field.name.upper(): field for field in dataclasses.fields(cls)}

    @classmethod
    def load(cls, argv: list[str], environ) -> "SampleKnobs":
        texts = train_gpt.read_env_file(Path(argv[0])) if argv else {}
        values = {}
        for name, field in cls.knobs().items():
            text = environ.get(name, texts.get(name))
            if text is not None:
                values[field.name] = unescape(text) if name == "SAMPLE_PROMPT" else train_gpt.parse(field, text)
        made = cls(**values)
        made.check()
        return made

    def check(self):
        for name, field in self.knobs().items():
            value = getattr(self, field.name)
            low, high, _ = field.metadata["allowed"]
            require(low is None or value >= low, f"{name}={value} is too small: the minimum is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the maximum is {high}")
        text = not re.search("[\ud800-\udfff]", self.sample_prompt)  # what is no UTF-8 in the environment
        require(text, f"SAMPLE_PROMPT={self.sample_prompt!r} is not UTF-8: give it in that encoding")


def unescape(text: str) -> str:
    r"""A prompt keeps its spaces. \n is a line break in it, and \u with four hexadecimal digits any character."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text.replace(r"\n", "\n"))


@torch.no_grad()
def generate(model, config, knobs: SampleKnobs, token_bytes):
    """Yield the prompt, then pieces of the text by which the model continues it. It ends with the document.

    Each token is a forward pass over the last TRAIN_SEQ_LEN tokens: simple, and fast enough for a few hundred.
    """
    generator = torch.Generator().manual_seed(config.seed)
    device = next(model.parameters()).device
    T = config.train_seq_len
    # Documents begin with the start token, or with another boundary if the tokenizer has none.
    start = token_bytes.start if token_bytes.start >= 0 else int(token_bytes.boundary.argmax())
    tokens = [start, *token_bytes.encode(knobs.sample_prompt)]
    text = token_bytes.decode(tokens[1:]).decode(errors="replace")
    shown = text
    yield knobs.sample_prompt
    for _ in range(knobs.sample_tokens):
        window = tokens[-T:]
        # Padding makes few lengths for the kernels. It comes after the window, so nothing in the window sees it.
        padding = [0] * min(-len(window) % 64, T - len(window))
        logits = model(torch.tensor([window + padding], device=device))[0, len(window) - 1].float().cpu()
        tokens.append(draw(logits, token_bytes.size, knobs, generator))
        if token_bytes.boundary[tokens[-1]]:
            break
        text = token_bytes.decode(tokens[1:]).decode(errors="replace")
        # Part of a character waits for its other bytes. An escape of case marks may continue after its first code.
        last = token_bytes.decode([*tokens[1:], *token_bytes.zero_bytes[2:]]).decode(errors="replace")
        if not text.endswith("\ufffd") and last.startswith(text):
            yield text[len(shown) :]
            shown = text
    if not text.endswith("\ufffd"):
        yield text[len(shown) :]


def draw(logits: torch.Tensor, size: int, knobs: SampleKnobs, generator: torch.Generator) -> int:
    """A token drawn by its logit [V]. Ids from `size` on only pad the vocabulary and are never drawn."""
    logits[size:] = -math.inf
    require(not logits.isnan().any(), "the model's logits are not numbers: use another ARTIFACT")
    if knobs.top_k:
        logits[logits < logits.topk(min(knobs.top_k, len(logits))).values[-1]] = -math.inf
    logits = logits - logits.max()  # so that no temperature makes them infinite
    weights = (logits / max(knobs.temperature, 1e-9)).softmax(-1)
    return int(weights.multinomial(1, generator=generator))


def main(config, folder, argv: list[str]):
    """Print only the text to standard output. What is known of the model goes to standard error."""
    knobs = SampleKnobs.load(argv, os.environ)
    os.environ["COMPILE"] = "0"  # every length of the growing text would be compiled anew
    with contextlib.redirect_stdout(sys.stderr):
        config, model, _ = train_gpt.tool("evaluate", required=True).open_model(config, folder, argv)
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    if folder.runtime.is_master:
        for piece in generate(model, config, knobs, token_bytes):
            print(piece, end="", flush=True)
        print()
