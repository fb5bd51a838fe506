"""Measure what GPTQ gains over plain rounding at equal entropy, for several bit widths, on a trained model. Not a test.

    DATA_PATH=... TOKENIZER_PATH=... python tests/bench/gptq.py logs/<run_id>/config.env logs/<run_id>/final_model.pt

The configuration is the run's; knobs in the environment take precedence (VAL_TOKENS_LIMIT; GPTQ_BATCHES, default 16).
Every matrix has the same bits and the same clip k in standard deviations. If the entropies of the two differ by more
than 0.5%, plain rounding uses the k that makes them equal. Excess is the loss in nats above that of the float model.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_tools import FRONTIER, entropy  # noqa: E402
from bench_tools import train_gpt as tg  # noqa: E402

CLIPS = {4: 5.0, 5: 8.5, 6: 12.85, 7: 15.0, 8: 20.0}  # standard deviations


def main():
    config_file, model_file = sys.argv[1:]
    environ = {"GPTQ_BATCHES": "16", "MODEL_FILE": ""} | dict(os.environ)
    config = tg.load_model_file(str(FRONTIER)).load([config_file], environ)
    coding = sys.modules[config.coder_class().__module__]
    runtime = tg.Runtime(config, {})
    model, scorer, note = tg.build_model(config, runtime)
    state = tg.tool("artifact").load_tensors(Path(model_file), model_file)
    model.load_state_dict(state)
    accum_steps = config.accumulation_steps(1, runtime.device.type)
    loader = tg.TrainLoader(tg.TokenStream(config.data_path, "train", config.vocab_size), config, runtime, accum_steps)
    val = tg.TokenStream(config.data_path, "val", config.vocab_size)
    token_bytes = tg.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    evaluator = tg.Evaluator(val, token_bytes, config, runtime)
    hessians = coding.collect_hessians(model, loader, config.gptq_batches, runtime)

    def score(bits: int, k: float, hessians) -> tuple[float, float]:
        clips = {f"clip_{kind}": k for kind in coding.TENSOR_CLASSES}
        coder = coding.FrontierCoder(replace(config, weight_bits=bits, embed_bits=bits, **clips))
        coder.hessians = hessians
        quantized = coder.quantize(state)
        model.load_state_dict(coder.dequantize(quantized))
        return entropy(quantized["quantized"], coder.table_numbers(quantized["quantized"])), evaluator.score(
            model, scorer
        ).loss

    unquantized = evaluator.score(model, scorer)
    weights = sum(t.numel() for t in state.values() if t.numel() > tg.INT8_MIN_NUMEL)
    print(f"{note}\n{weights} quantized weights of {sum(t.numel() for t in state.values())}")
    print(f"{unquantized.tokens} tokens, unquantized loss {unquantized.loss:.6f}")
    print("bits      k  bits/weight GPTQ  plain   excess GPTQ    plain   ratio")
    for bits, k in CLIPS.items():
        gptq_bits, gptq_loss = score(bits, k, hessians)
        plain_bits, plain_loss = score(bits, k, {})
        if abs(plain_bits / gptq_bits - 1) > 0.005:
            plain_bits, plain_loss = score(bits, k * 2 ** (plain_bits - gptq_bits), {})
        gptq, plain = gptq_loss - unquantized.loss, plain_loss - unquantized.loss
        ratio = gptq / plain if plain > 0 else math.nan
        print(f"{bits:4} {k:6.2f} {gptq_bits:17.4f} {plain_bits:6.4f} {gptq:13.6f} {plain:8.6f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
