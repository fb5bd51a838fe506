"""Requirements for every model on the seam, and the models of this repository in MODELS. Their knobs enable as much of
each model as possible."""

import hashlib
from typing import NamedTuple

import models
import runs

import train_gpt

GPT = models.knobs(
    "NUM_LAYERS=3 MLP_MULT=1.7 ROPE_BASE=900 LOGIT_SOFTCAP=25 TIE_EMBEDDINGS=0 EVAL_STRIDE=12 LR_FLOOR=0.1 "
    "EMBED_WEIGHT_DECAY=0.1 SCALAR_WEIGHT_DECAY=0.1 MUON_WEIGHT_DECAY=0.1 EMA_DECAY=0.9 EMA_SHARE=0.7 "
    "LOADER=shuffle GRAD_CLIP_NORM=0.3"
)
TTT = models.knobs("TTT_CHUNK=64 TTT_LR=0.05 TTT_BATCH_TOKENS=64")
TECHNIQUES = models.knobs(
    "MLP_SLOPE=0.5 ROPE_DIMS=4 XSA_LAYERS=2 XSA_GATE=1 ATTN_GATE=1 FUSE_QKV=1 X0_MIX=0 LN_SCALE=1 PARALLEL_FROM=2 "
    "GATED_SKIPS=1 FOLD_SCALES=1 SMEAR_GATE=1 LOOP_LAYERS=0-1 LOOP_PASSES=2 LOOP_START=0.5 PREFIX_LOSS=0.5 "
    "CONTEXTS=8@0,16@0.3,32@0.6 CANONICAL=1 CANONICAL_TRAIN=1 MUON_ROW_NORM=1 MUON_HEADS=1 POLAR_EXPRESS=1 CODEC=rans "
    "WEIGHT_BITS=6 EMBED_BITS=7 CLIP_ATTN=13 CLIP_MLP=12 CLIP_EMBED=15 GPTQ_BATCHES=3"
)
FRONTIER = GPT | TTT | TECHNIQUES
SMALL = models.knobs("NUM_KV_HEADS=4 FF_DIM=24 LR_WARMUP_STEPS=2")
LATER = SMALL | models.knobs(
    "FEED_FORWARD=swiglu POSITIONS=learned PRE_NORM=1 OPTIMIZER=adam LEARNING_RATE=0.01 COSINE=1 WEIGHT_DECAY=0.1 "
    "EMA_DECAY=0.9"
)
LATENT = models.knobs(
    "NUM_KV_HEADS=4 ROPE_DIMS=4 KV_LATENT=12 Q_LATENT=10 PLACES=40 EXPERTS=5 EXPERT_DIM=24 LEARNING_RATE=0.01 "
    "LR_WARMUP_STEPS=2 BALANCE_RATE=0.05"
)
NO_DROPOUT = {"DROPOUT": 0}


class Case(NamedTuple):
    file: str
    knobs: dict
    sources: tuple[str, ...]  # in addition to train_gpt.py
    exact: dict = {}  # overrides where two calls are compared: no random numbers
    smooth: dict = {}  # overrides where rounding must not cause a jump
    counted: dict = {}  # overrides where FLOPs are counted: no gates, since the model does not count their FLOPs
    rounding: float = 0.0  # tolerance for changes caused by the other tokens of a batch
    ranks: bool = False  # also train on two ranks, which takes longer


LADDERS = "records/ladders"
MODELS = {
    "gpt": Case("", GPT, (), ranks=True),
    "frontier": Case(
        models.FRONTIER,
        FRONTIER,
        ("frontier.py", "score_first.py", "coder.py", "canonical.py"),
        counted={"ATTN_GATE": 0, "SMEAR_GATE": 0},
        ranks=True,
    ),
    "score_first": Case("records/models/score_first.py", TTT, ("score_first.py",)),
    "tiny": Case("records/models/tiny.py", {"HIDDEN": 40, "DROPOUT": 0.2}, ("tiny.py",), NO_DROPOUT),
    "small": Case(f"{LADDERS}/small/small.py", SMALL, ("small.py",), NO_DROPOUT),
    "small, later rungs": Case(f"{LADDERS}/small/small.py", LATER, ("small.py",), NO_DROPOUT),
    "gpt2": Case(f"{LADDERS}/gpt2/model.py", {"NUM_KV_HEADS": 4, "CONTEXT": 40, "LR_WARMUP": 3}, ("model.py",)),
    "latent_moe": Case(
        f"{LADDERS}/latent_moe/latent_moe.py",
        LATENT,
        ("latent_moe.py",),
        NO_DROPOUT,
        smooth={"EXPERTS_PER_TOKEN": 5},  # expert selection is discontinuous
        rounding=1e-5,  # the size of an expert's matmul depends on all tokens
        ranks=True,
    ),
}


def config_of(corpus, case: Case, **knobs):
    values = models.tiny_settings(corpus, MODEL_FILE=case.file, **case.knobs | knobs)
    return train_gpt.Config.load([], values)


def assert_sources(run, case: Case):
    """All sources of a run are listed, hashed, copied and counted."""
    paths = [models.SCRIPT, *((models.SCRIPT.parent / case.file).with_name(name) for name in case.sources)]
    contents = {path.name: path.read_bytes() for path in paths}
    listed = {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in contents.items()}
    assert run.result["sources"] == listed
    assert all((run.path / name).read_bytes() == content for name, content in contents.items())
    assert run.result["bytes_code"] == sum(map(len, contents.values()))
    assert run.result["bytes_total"] == run.result["bytes_code"] + run.result["bytes_artifact"]


def assert_life(case: Case, corpus, tmp_path, capsys, monkeypatch):
    """A run stopped twice equals an uninterrupted one. The artifact, scored in its own process without other settings,
    and the .pt reproduce the run's digits. Both can be sampled from."""
    go = runs.starter(corpus, tmp_path, MODEL_FILE=case.file)
    run = runs.assert_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch, case.knobs)
    assert_sources(run, case)
    (artifact,) = run.path.glob("final_model.*.ptz")
    config_class = type(config_of(corpus, case))
    given = models.tiny_settings(corpus) | case.knobs | {"MODEL_FILE": case.file}
    shape = {name: given[name] for name in [*models.artifact_knobs(config_class), "MODEL_FILE"] if name in given}
    if "TTT_CHUNK" in shape:
        shape["TTT_CHUNK"] = 0  # the score before the export is without test-time training
    runs.assert_scored_again(run, artifact, corpus, tmp_path, capsys, shape)
