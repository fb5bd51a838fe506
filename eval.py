"""MODE=eval of train_gpt.py: the score of a model with nothing but the script, the tokenizer and the validation text.

    MODE=eval ARTIFACT=logs/<run_id>/final_model.int8.ptz DATA_PATH=... TOKENIZER_PATH=... python train_gpt.py

An artifact tells its own configuration. A state dict (.pt) and an artifact of the public reference tell their shape;
the knobs give the rest, and what was assumed is printed.
"""

import hashlib
import os
import sys
from pathlib import Path

import torch

SHAPE_KNOBS = ("VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "TIE_EMBEDDINGS")

SWITCHES = {"X0_MIX": "blocks.0.resid_mix", "ATTN_GATE": "blocks.0.attn.gate", "GATED_SKIPS": "skip_gates",
            "SMEAR_GATE": "smear"}  # whose tensors are there or not


def read_model(blob: bytes, source, trainer) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state dict, {KNOB: text} that the file tells of itself) of an artifact or a .pt; the shape is the tensors'."""
    with trainer.reading(source):
        artifact = {} if blob[:2] == b"PK" else trainer.unpack(blob, source)
        state = trainer.dequantize(artifact) if artifact else trainer.load_tensors(blob, source)
        odd = [name for name, t in state.items()
               if not (t.is_floating_point() and t.is_contiguous() and t.isfinite().all())]
        trainer.require(not odd, f"{', '.join(odd[:3])}: not finite numbers, or larger than the data")
        (V, D), H = state["tok_emb.weight"].shape, len(state["blocks.0.attn.q_gain"])
        hidden = len(state["blocks.0.mlp.fc.weight"])
        shape = (V, len({name.split(".")[1] for name in state if name.startswith("blocks.")}), D, H,
                 len(state["blocks.0.attn.c_k.weight"]) * H // D, hidden / D,
                 int("lm_head.weight" not in state))
        shape = dict(zip(SHAPE_KNOBS, map(str, shape), strict=True))
        shape |= {name: str(int(sign in state)) for name, sign in SWITCHES.items()}
        plain = {bool: int, int: int, float: float, str: str}  # of anything else, only the type is told
        told = {k.upper(): str(plain.get(type(v), type)(v)) for k, v in artifact.get("config", {}).items()}
        if round(float(told.get("MLP_MULT", shape["MLP_MULT"])) * D) == hidden:  # it may say 2, or a fraction
            told = told | {"MLP_MULT": shape["MLP_MULT"]} if "MLP_MULT" in told else told
        odd = [k for k, text in told.items() if k not in trainer.TOLD_KNOBS or shape.get(k, text) != text]
        trainer.require(not odd, f"its tensors or this script contradict its config: {', '.join(odd)}")
        trainer.Config.load([], told | shape)
        return state, told | shape


def open_model(config, folder, argv: list[str]):
    """ARTIFACT as a model: (the configuration, which what the file tells of itself has completed; model; scorer)."""
    runtime, trainer = folder.runtime, sys.modules[type(config).__module__]
    trainer.require(config.artifact, f"MODE={config.mode} needs ARTIFACT=logs/<run_id>/final_model.int8.ptz, or a .pt")
    blob = runtime.share(Path(config.artifact).read_bytes() if runtime.is_master else None)
    state, told = read_model(blob, config.artifact, trainer)
    config = trainer.Config.load(argv, os.environ, told)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in trainer.GPT(config).state_dict().items()}
    odd = sorted(dict({name: tensor.shape for name, tensor in state.items()}.items() ^ expected.items()))
    trainer.require(not odd, f"{config.artifact} and the knobs disagree on {', '.join(odd[:3])}: unset what sets the "
                    "shape")
    model, scorer, note = trainer.build_model(config, runtime)
    model.load_state_dict(state)
    folder.log(f"{note}\nartifact:{config.artifact} bytes:{len(blob)} "
               f"sha256:{hashlib.sha256(blob).hexdigest()}\n{' '.join(f'{name}={told[name]}' for name in told)}")
    assumed = [f"{name}={config.texts()[name]}" for name in trainer.MODEL_KNOBS if name not in told]
    if assumed:
        folder.log(f"assumed, since the file does not tell: {' '.join(assumed)}")
    return config, model, scorer


def main(config, folder, argv: list[str]):
    """Log the final lines of a run again."""
    runtime, trainer = folder.runtime, sys.modules[type(config).__module__]
    config, _, scorer = open_model(config, folder, argv)
    stream, token_bytes, _ = trainer.open_text(config, folder)
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    score = trainer.Evaluator(stream, token_bytes, config, runtime, accum_steps).score(scorer, folder.log)
    tag = trainer.artifact_names(config)[1].replace("+", "_")
    label = "final_model" if config.artifact.endswith(".pt") else f"final_{tag}_roundtrip"
    trainer.log_final(label, score, folder)
