"""Compare rANS with zlib and lzma on the same quantized weights: sizes, times, and the prediction of the size law.

    python tests/bench/export.py --model logs/<run_id>/final_model.pt      the weights of a run
        python tests/bench/export.py --gaussian 17e6                           this many normally distributed weights
        PAIRS=5 python tests/bench/export.py --gaussian 17e6                   rounds (default 3); medians are printed

Export knobs may be set (WEIGHT_BITS, EMBED_BITS, CLIP_ATTN, CLIP_MLP, CLIP_EMBED); the defaults are 6 bits and
clips of 12.85 standard deviations. The coders take turns. Each codes the values as bytes, one per weight; "entropy" is
the zeroth-order entropy, for attention, MLP and embedding separately. Finally the complete artifact of CODEC=rans is
compared with the size that MODE=check projects.
"""

import argparse
import lzma
import os
import statistics
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_tools import FRONTIER, RANS, entropy, random_weights, timed, train_gpt  # noqa: E402


def gaussian_state(weights: int) -> dict[str, torch.Tensor]:
    """A fifth attention, three fifths MLP, one fifth embedding, width 512, and one vector that is kept unquantized."""
    shares = {"blocks.0.attn.c_q.weight": 1, "blocks.0.mlp.fc.weight": 3, "tok_emb.weight": 1}
    state = random_weights({name: (share * weights // 5 // 512, 512) for name, share in shares.items()})
    return state | {"blocks.0.attn_scale": torch.ones(512)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="final_model.pt of a run")
    source.add_argument("--gaussian", type=float, help="number of weights of random matrices")
    options = parser.parse_args()
    config = train_gpt.load_model_file(str(FRONTIER)).load([], RANS | dict(os.environ))
    coder = config.coder_class()(config)
    rans = sys.modules[type(coder).__module__]
    if options.model:
        state = train_gpt.tool("artifact").load_tensors(options.model, options.model)
    else:
        state = gaussian_state(int(options.gaussian))
    plain = coder.quantize(state)
    container = coder.rans_pack(plain)
    kinds = coder.table_numbers(plain["quantized"])
    groups = [q.flatten().numpy().view(np.uint8) for q in plain["quantized"].values()]
    lengths_of, tables, raw = [*map(len, groups)], container["tables"].numpy()[kinds], b"".join(map(bytes, groups))
    bits = entropy(plain["quantized"], kinds)
    coders = {
        "rANS": (
            lambda: rans.rans_encode(groups, tables).tobytes(),
            lambda data: np.concatenate(rans.rans_decode(np.frombuffer(data, "<u2"), lengths_of, tables)),
        ),
        "zlib -9": (lambda: zlib.compress(raw, 9), zlib.decompress),
        "lzma": (lambda: lzma.compress(raw), lzma.decompress),
    }
    taken = {name: [] for name in coders}
    for _ in range(int(os.environ.get("PAIRS", "3"))):
        for name, (encode, decode) in coders.items():
            data, seconds = timed(encode)
            back, more = timed(decode, data)
            assert bytes(back) == raw, name
            taken[name].append((len(data), seconds, more))
    print(f"{len(raw)} weights, entropy {bits * len(raw) / 8:.0f} bytes = {bits:.4f} bits per weight")
    print(f"{'coder':8} {'bytes':>10} {'over entropy':>12} {'encode s':>9} {'decode s':>9}")
    for name, rounds in taken.items():
        length, encode, decode = map(statistics.median, zip(*rounds, strict=True))
        print(f"{name:8} {length:10.0f} {8 * length / bits / len(raw) - 1:12.3%} {encode:9.3f} {decode:9.3f}")
    size = len(train_gpt.Coder.pack(coder, container)[0])
    model = SimpleNamespace(state_dict=lambda: state)
    projected = coder.projected_size(model, train_gpt.tool("check", required=True))
    print(f"artifact: {size} bytes; the size law says {projected}, {projected / size - 1:+.3%}")


if __name__ == "__main__":
    main()
