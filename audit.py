"""Proof of the byte count that a score of train_gpt.py divides by, and the run's result.json. It loads this file when
it stands beside it.

A tokenizer and what its tokens weigh come from one file, so they cannot prove each other: only data whose manifest.json
states the true bytes of its text is proved, or the published text whose bytes are known.
"""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch

FINEWEB_TARGETS, FINEWEB_BYTES = 62_021_632, 151_080_363  # the challenge's validation text in its 1,024 pieces
AUDIT_TOKENS = 1_000_000  # that are decoded


def audit(require, token_bytes, stream, stated: dict | None) -> tuple[str, dict]:
    """Prove that the first tokens decode to what they weigh, and that all weigh what a manifest states.

    A line for the log, and facts for the result. `require` is train_gpt.py's, for what does not agree."""
    path, pattern = token_bytes.path, stream.pattern
    tokens = stream.read(0, min(AUDIT_TOKENS, len(stream)))
    if len(tokens) < len(stream):  # not after half a character, which would not decode
        tokens = tokens[: np.flatnonzero(~token_bytes.is_byte[tokens])[-1:].sum() + 1]
    starts = np.flatnonzero(token_bytes.boundary[tokens])
    decoded = sum(len(token_bytes.decode(document.tolist())) for document in np.split(tokens, starts))
    weighed = token_bytes.weigh(np.concatenate([np.flatnonzero(token_bytes.boundary)[:1], tokens]))
    require(weighed == decoded, f"{pattern}: {path} decodes the first {len(tokens)} tokens to {decoded} bytes, but "
            f"weighs them as {weighed}: use the tokenizer of the shards")
    text_bytes, digest, most = 0, hashlib.sha256(), 0
    for start in range(0, len(stream), 2**24):
        chunk = stream.read(start, min(2**24 + 1, len(stream) - start))
        text_bytes, most = text_bytes + token_bytes.weigh(chunk), max(most, int(chunk.max()))
        digest.update(chunk[: 2**24].tobytes())
    require(most < token_bytes.size, f"{pattern}: {path} has no token {most}: use the tokenizer of the shards")
    require(text_bytes, f"{pattern}: {len(stream)} tokens weigh no bytes: make or fetch it again")
    published = token_bytes.weigh(stream.read(0, min(FINEWEB_TARGETS + 1, len(stream)))) == FINEWEB_BYTES
    fineweb = published if token_bytes.size == 1024 else abs(text_bytes - 151.08e6) < 6e3
    source = f"{'' if fineweb else 'not '}canonical FineWeb, not proved: no manifest.json states the true bytes"
    if stated:
        require(text_bytes == stated["token_bytes"], f"{pattern}: weighs {text_bytes} bytes, but manifest.json states "
                f"{stated['token_bytes']}: make or fetch the data again")
        lossy = stated["token_bytes"] != stated["bytes"]
        source = f"bytes:lossy: of {stated['bytes']} in the text" if lossy else "bytes:proved by manifest.json"
    line = (f"byte_audit: {len(tokens)} tokens in {len(starts)} documents decode to the {decoded} bytes they weigh; "
            f"all {len(stream)} tokens weigh {text_bytes} bytes ({source})")
    proved = stated is not None and stated["bytes"] == text_bytes
    return line, {"val_bytes": text_bytes, "bytes_proved": proved, "sha256_val_tokens": digest.hexdigest()}


def report(folder, require, token_bytes, stream, data_path: str) -> dict:
    """Rank 0 audits, logs a line, and gets the facts; the others get nothing."""
    if not folder.runtime.is_master:
        return {}
    line, facts = audit(require, token_bytes, stream, manifest_bytes(require, data_path))
    folder.log(line)
    return facts


def manifest_bytes(require, folder: str) -> dict[str, int] | None:
    """The `bytes` of the validation text, and the `token_bytes` that its tokenizer keeps, if a manifest states them."""
    path = Path(folder) / "manifest.json"
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        return {"bytes": int(split["bytes"]), "token_bytes": int(split.get("token_bytes", split["bytes"]))}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        require(False, f"{path} states no splits.val.bytes ({error!r:.60}): prepare the data again, or move it")


def write_result(require, trainer, before, after, facts: dict):
    """result.json of a finished run: the Scores of the weights and of the artifact, time, machine, and more `facts`."""
    config, runtime, folder, watch = trainer.config, trainer.runtime, trainer.folder, trainer.watch
    require(after.label or after.bytes == facts["val_bytes"],
            f"scored {after.bytes} bytes, but the text has {facts['val_bytes']}: a fault of this script")
    limit, trained = config.max_wallclock_seconds, watch.seconds["training"]
    result = {
        "run_id": folder.run_id, "seed": config.seed, "steps": trainer.steps,
        "model_params": sum(p.numel() for p in trainer.model.parameters()),
        "val_loss": after.loss, "val_bpb": after.bpb, "pre_quant_val_loss": before.loss,
        "pre_quant_val_bpb": before.bpb, "partial": bool(after.label), "scored_tokens": after.tokens,
        "scored_bytes": after.bytes, "val_tokens": after.of, "eval_stride": config.eval_stride,
        "eval_seconds": round(after.seconds, 3), "train_tokens": trainer.steps * config.train_batch_tokens,
        "over_clock": bool(limit and trained > limit),
        "seconds": {phase: round(seconds, 3) for phase, seconds in watch.seconds.items()},
        "step_avg_ms": 1000 * trained / max(trainer.steps, 1), "world_size": runtime.world_size,
        "resumed_at": getattr(trainer.lifeline, "resumed_at", []), "grad_accum_steps": trainer.loader.accum_steps,
        "device": runtime.device_name(), "dtype": str(runtime.dtype), "note": trainer.note, "cuda": torch.version.cuda,
        "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "platform": platform.platform(), **facts,
    }  # fmt: skip
    folder.write("result.json", (json.dumps(result, indent=1) + "\n").encode())
