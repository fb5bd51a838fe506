"""MODE=sample of train_gpt.py: text from a trained model, streamed.

    MODE=sample ARTIFACT=logs/<run_id>/final_model.int8.ptz SAMPLE_PROMPT="To be" python train_gpt.py

SAMPLE_TOKENS, TEMPERATURE, TOP_K and SEED shape it; DATA_PATH is not needed, TOKENIZER_PATH is. A run with a
SAMPLE_PROMPT ends with a sample in its log.
"""

import contextlib
import math
import os
import sys

import torch

import train_gpt


@torch.no_grad()
def generate(model, config, token_bytes):
    """Yield the prompt, then pieces of the text that the model continues it with; ends with the document.

    Each token is a forward pass over the last TRAIN_SEQ_LEN tokens: simple, and fast enough for a few hundred."""
    prompt = config.sample_prompt
    generator = torch.Generator().manual_seed(config.seed)
    device, T = next(model.parameters()).device, config.train_seq_len
    start = token_bytes.start if token_bytes.start >= 0 else int(token_bytes.boundary.argmax())  # another boundary
    tokens = [start, *token_bytes.encode(prompt)]
    text = shown = token_bytes.decode(tokens[1:]).decode(errors="replace")
    yield prompt
    for _ in range(config.sample_tokens):
        window = tokens[-T:]
        padding = [0] * min(-len(window) % 64, T - len(window))  # few lengths for the kernels; the past is blind to it
        logits = model(torch.tensor([window + padding], device=device))[0, len(window) - 1].float().cpu()
        logits[token_bytes.size :] = -math.inf  # ids that only fill the vocabulary up
        train_gpt.require(not logits.isnan().any(), "the model's logits are not numbers: use another ARTIFACT")
        if config.top_k:
            logits[logits < logits.topk(min(config.top_k, len(logits))).values[-1]] = -math.inf
        logits -= logits.max()  # so that no temperature makes them infinite
        weights = (logits / max(config.temperature, 1e-9)).softmax(-1)
        tokens.append(int(weights.multinomial(1, generator=generator)))
        if token_bytes.boundary[tokens[-1]]:
            break
        text = token_bytes.decode(tokens[1:]).decode(errors="replace")
        # A part of a character waits for its other bytes. Of case marks an escape may go on after its first code.
        last = token_bytes.decode([*tokens[1:], *token_bytes.unweighed[2:]]).decode(errors="replace")
        if not text.endswith("\ufffd") and last.startswith(text):
            yield text[len(shown) :]
            shown = text
    if not text.endswith("\ufffd"):
        yield text[len(shown) :]


def main(config, folder, argv: list[str]):
    """The text alone goes to standard output; what is known of the model goes to standard error."""
    os.environ["COMPILE"] = "0"  # the lengths of a growing text would each be compiled anew
    with contextlib.redirect_stdout(sys.stderr):
        config, model, _ = train_gpt.tool("evaluate", required=True).open_model(config, folder, argv)
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    if folder.runtime.is_master:
        for piece in generate(model, config, token_bytes):
            print(piece, end="", flush=True)
        print()
