"""MODE=check reports problems and requirements of a run in advance; warnings about misspelled knobs; --help.

Missing and damaged data in MODE=check: tests/test_bad_input.py."""

import datetime
import json
import random
import re
import shutil
import socket
import threading
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from hypothesis import example, given
from hypothesis import strategies as st
from models import process, tree

import train_gpt
from train_gpt import GPT, Config

KNOBS = Config.knobs()
HOUR = datetime.timedelta(hours=1)
check = train_gpt.tool("check")


@pytest.fixture
def checked(corpus, tmp_path, monkeypatch, call):
    """Function: (facts, problems) of MODE=check, which must write nothing."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(**knobs):
        before = tree(tmp_path)
        code, out, err = call(models.tiny_settings(corpus, **{"MODE": "check", "LOG_DIR": here / "logs"} | knobs))
        assert tree(tmp_path) == before and not err
        last = out.splitlines()[-1]
        assert last.startswith("check_json:")
        facts = json.loads(last.removeprefix("check_json:"), parse_constant=pytest.fail)
        problems = facts.pop("problems")
        for number, problem in enumerate(problems, 1):
            assert f"\nproblem {number}: {problem}\n" in out
        assert all(f"{name}: {value}\n" in out for name, value in facts.items())
        assert code == (1 if problems else 0), (problems, facts)
        return facts, problems

    return run


def decoded_bytes(corpus) -> int:
    """Bytes of the validation text, by decoding it."""
    import sentencepiece as spm

    model = spm.SentencePieceProcessor(model_file=str(corpus / "tok.model"))
    tokens = np.fromfile(corpus / "data" / "fineweb_val_000000.bin", "<u2", offset=1024)
    documents = np.split(tokens, np.flatnonzero(tokens == model.bos_id()))
    return sum(len(model.decode(document.tolist()).encode()) for document in documents)


def test_facts_of_good_data(checked, corpus, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    facts, problems = checked(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=1000)
    config = Config.load([], models.tiny_settings(corpus))
    sizes = [len((ROOT / "train_gpt.py").read_bytes()), check.projected_bytes(train_gpt.Coder(config), GPT(config))]
    tokens = {
        split: sum(path.stat().st_size // 2 - 512 for path in (corpus / "data").glob(f"*_{split}_*"))
        for split in ("train", "val")
    }
    expected = {
        "model_params": sum(p.numel() for p in GPT(config).parameters()),
        "bytes_code": sizes[0],
        "bytes_artifact_projected": sizes[1],
        "bytes_total_projected": sum(sizes),
        "bytes_limit": 16_000_000,
        "train_shards": 2,
        "val_shards": 1,
        "train_tokens": tokens["train"],
        "train_tokens_checked": f"{tokens['train']} of {tokens['train']}, at both ends of each shard",
        "val_tokens": tokens["val"],
        "val_bytes": decoded_bytes(corpus),
        "bytes_proved": False,
        "tokens_per_step": 256,
        "micro_batch_tokens": 256 // facts["grad_accum_steps"],
        "device_type": "cpu",
        "ranks": 1,
        "torch": torch.__version__,
        "seconds_per_step": pytest.approx(256 * facts["seconds_per_token"]),
        "steps_in_budget": min(1000, int(600 / facts["seconds_per_step"])),
        "tokens_in_budget": 256 * facts["steps_in_budget"],
        "nccl_environment": {"NCCL_DEBUG": "WARN"},
    }
    assert not problems and {name: facts[name] for name in expected} == expected
    assert facts["seconds_per_token"] > 0 and facts["memory_estimate_mib"] >= 0
    assert "ran here" in facts["step_time_rests_on"]
    assert "attention:" in facts["kernels"] and "compile:0" in facts["kernels"]


def test_only_the_ends_of_training_shards_are_read(checked, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SAMPLED", 100)
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    path = data / "fineweb_train_000001.bin"
    tokens = np.fromfile(path, "<u2", offset=1024)
    for place, found in ((1000, False), (0, True), (-100, True), (-1, True)):
        changed = tokens.copy()
        changed[place] = 60_000
        write_shard(path, changed)
        facts, problems = checked(DATA_PATH=data)
        assert ["token 60000" in problem for problem in problems] == [True] * found
    write_shard(path, tokens)
    facts, _ = checked(DATA_PATH=data)
    assert facts["train_tokens_checked"].startswith(f"400 of {facts['train_tokens']}, ")


PROBLEMS = [
    ({"MAX_WALLCLOCK_SECONDS": "1e-6"}, ["one step takes .*raise MAX_WALLCLOCK_SECONDS"]),
    ({"TARGET_WORLD_SIZE": 3}, ["on 3 ranks: use 288"]),
    ({"VOCAB_SIZE": 2048}, [r"has \d+ pieces: set that"]),
    ({"LOG_DIR": "/dev/null"}, ["LOG_DIR=/dev/null: .*choose another"]),
    (
        {"DATA_PATH": "nowhere", "TOKENIZER_PATH": "none", "MAX_WALLCLOCK_SECONDS": "1e-6", "SIZE_LIMIT": 10},
        ["(?s)DATA_PATH=nowhere .*python data/prepare_shakespeare.py\n", "parameters take", "one step takes"],
    ),
]


@pytest.mark.parametrize("knobs, said", PROBLEMS)
def test_problems_are_listed_once_and_the_rest_is_checked(checked, knobs, said):
    facts, problems = checked(**knobs)
    assert len(problems) == len(said)
    assert all(re.search(*pair) for pair in zip(said, problems, strict=True)), problems
    assert facts.get("schedule") or "TARGET_WORLD_SIZE" in knobs


def test_an_artifact_over_the_limit(checked):
    total = checked()[0]["bytes_total_projected"]
    assert not checked(SIZE_LIMIT=total)[1]
    (problem,) = checked(SIZE_LIMIT=total - 1)[1]
    assert str(total) in problem and str(total - 1) in problem and "lower MODEL_DIM" in problem


def test_a_full_disk(checked, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(**usage(path)._asdict() | {"free": 2**20}))
    (problem,) = checked()[1]
    assert "has 1 MiB free" in problem and "LOG_DIR=" in problem and "make room" in problem


def test_a_run_on_eight_gpus_is_checked_here(checked, monkeypatch):
    """Without compiling, which takes a CPU longer than all the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    knobs = {"DEVICE": "cuda", "TRAIN_BATCH_TOKENS": 1024, "NUM_LAYERS": 1, "COMPILE": 1}
    facts, problems = checked(TARGET_WORLD_SIZE=8, MAX_WALLCLOCK_SECONDS=600, **knobs)
    assert not problems and facts["micro_step"].endswith("eager: runs")
    assert facts["target_ranks"] == 8 and facts["ranks"] == 1 and facts["device_type"] == "cpu"
    assert facts["grad_accum_steps"] == 1 and facts["micro_batch_tokens"] == 128
    assert facts["seconds_per_step"] > 0 and "public runs on 8xH100" in facts["step_time_rests_on"]
    assert facts["memory_mib"] is None
    assert checked(TARGET_WORLD_SIZE=2, **knobs)[0]["grad_accum_steps"] == 4, "eight micro-batches on any number"


def test_a_host_whose_name_does_not_resolve(checked, monkeypatch):
    def unknown(name):
        raise socket.gaierror(-2, f"Name or service not known: {name}")

    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert not checked()[1], "one process meets nobody"
    (problem,) = checked(TARGET_WORLD_SIZE=2)[1]
    assert "node-17, does not resolve" in problem and "set GLOO_SOCKET_IFNAME" in problem
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert not checked(TARGET_WORLD_SIZE=2)[1]


def test_check_in_a_process_of_its_own(corpus, tmp_path):
    environ = models.tiny_settings(corpus, MODE="check", DATA_PATH=tmp_path / "nowhere", LOG_DIR=tmp_path / "logs")
    done = process(environ | {"ITERATION": "7"}, tmp_path)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1 and not done.stderr and lines[-1].startswith("check_json:{")
    assert json.loads(lines[-1].removeprefix("check_json:"))["problems"]
    assert "warning: the environment variable ITERATION is no knob: did you mean ITERATIONS?" in lines
    assert not list(tmp_path.iterdir())


# Rendezvous of the ranks


def meet(rank=0, world_size=2, restarts=0):
    """With the variables that torchrun sets."""
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": restarts}
    place = {"MASTER_ADDR": "node-17", "MASTER_PORT": "29500"}
    return check.meet(place | {name: str(number) for name, number in numbers.items()}, HOUR)


@pytest.fixture
def store(monkeypatch):
    """A store that connects at once, and an alarm that does not wait."""
    made = torch.distributed.HashStore()
    monkeypatch.setattr(check.dist, "rendezvous", lambda *args, **options: iter([(made, 0, 2)]))
    alarm = SimpleNamespace(start=lambda: None, cancel=lambda: None)
    monkeypatch.setattr(check.threading, "Timer", lambda *args: alarm)
    return made


def test_ranks_that_cannot_meet_say_where_and_what_to_set(monkeypatch):
    def fail(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(check.dist, "rendezvous", fail)
    with pytest.raises(train_gpt.UserError, match="node-17:29500 .*not known.*GLOO_SOCKET_IFNAME"):
        meet()


def test_ranks_that_meet_print_nothing(store, capsys):
    """At different times: rank 1 came first, and waited."""
    first = threading.Thread(target=meet, args=(1,))
    first.start()
    met = meet()
    first.join(20)
    assert not first.is_alive() and met.get("here 1") == b"" and not capsys.readouterr().out


def test_a_restart_does_not_take_the_dead_for_the_living(store):
    """Regression: the store of a launch on one host outlives its ranks, and still lists them as present."""
    meet(world_size=1)
    met = meet(world_size=1, restarts=1)
    assert not met.check(["here 5"]) and met.check(["here 0"])
    met.set("x", "1")
    assert not meet(world_size=1, restarts=2).check(["x"])


def test_a_rank_that_waits_for_another_names_it(store, monkeypatch, capsys):
    """After ten seconds, which are skipped here."""
    late = [2, 1]

    def wait(keys, timeout):
        assert timeout.total_seconds() == 10
        if late.pop() == 1:
            raise RuntimeError("the ten seconds are over")
        store.set(keys[0], "")

    slow = SimpleNamespace(set=store.set, check=store.check, wait=wait)
    monkeypatch.setattr(check.dist, "PrefixStore", lambda prefix, real: slow)
    meet()
    assert capsys.readouterr().out == "rank 0 of 2 waits at node-17:29500 for rank 1\n" and not late


# The schedule described in words


@pytest.mark.parametrize("clock", [0, 600, 7200])
def test_the_schedule_in_words_is_that_of_the_run(clock):
    """Every number in the description is a point where the learning rate changes slope."""
    for fraction in (0, 0.3526, 0.5, 1):
        config = Config(warmdown_frac=fraction, max_wallclock_seconds=clock, iterations=2000)
        words = check.schedule(config)
        found = re.findall(r"full until (step )?(\d+)(?: s|), then linear to 0 at (?:step )?(\d+)(?: s|)", words)
        assert len(found) == (2 if clock else 1)
        assert bool(clock) == words.endswith(", if that comes first") and bool(found[0][0]) != bool(clock)
        ends = [(int(turn), int(end)) for _, turn, end in found]
        assert ends[-1][1] == 2000 and (not clock or ends[0][1] == clock)
        progress = [lambda step, config=config: train_gpt.progress_at(config, step, 0.0)]
        if clock:
            progress.insert(0, lambda seconds, config=config: train_gpt.progress_at(config, 10, seconds))
        for progress_at, (turn, end) in zip(progress, ends, strict=True):
            rates = [train_gpt.Model().lr_scale(config, 0, progress_at(x)) for x in range(end + 1)]
            assert set(rates[1:turn]) <= {1} and (turn == end or rates[turn + (end - turn) // 50 + 1] < 1)
            assert rates[end - (turn == end)] == (turn == end)
            assert turn == end or rates[(turn + end) // 2] == pytest.approx(0.5, abs=0.01)


# Typos


def edits(name: str, letters: str) -> set[str]:
    """Every name that is one deletion, transposition, substitution or insertion away."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    found = {a + b[1:] for a, b in cuts} | {a + b[1:2] + b[:1] + b[2:] for a, b in cuts}
    return found | {a + letter + b[skip:] for a, b in cuts for letter in letters for skip in (0, 1)}


def test_a_slip_of_any_knob_draws_a_warning():
    rng = random.Random(0)
    for name in KNOBS:
        slips = sorted(edits(name, rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789")) - KNOBS.keys())
        for slip in [*rng.sample(slips, 10), name.lower()]:
            (warning,) = check.typo_warnings({slip: "1", "PATH": "/bin", name: "2"}, KNOBS)
            match = re.fullmatch(rf"warning: the environment variable {slip} is no knob: did you mean (\w+)\?", warning)
            near = slip in edits(match[1], slip) or match[1] in edits(name, match[1])
            assert match[1] == name or (match[1] in KNOBS and near), "another only if it is as near"


HINTS = [  # settings in the environment or in FILE.env; the hint in the warning and in the error
    ("ITERATION", "did you mean ITERATIONS?"),
    ("MATRXI_LR", "did you mean MATRIX_LR?"),
    ("iterations", "did you mean ITERATIONS?"),
    ("TRAIN_SEQ_LENGTH", "did you mean TRAIN_SEQ_LEN?"),
    ("CONTEXTS", "it is one of a model file: set MODEL_FILE=records/models/frontier.py"),
    ("TTT_CHUNK", "it is one of a model file: set MODEL_FILE=records/models/score_first.py"),
    *((name, "it is one of a model file: set MODEL_FILE=records/models/frontier.py") for name in check.MOVED),
]


@pytest.mark.parametrize("name, hint", HINTS)
def test_what_is_almost_a_knob_is_a_warning_and_in_a_file_an_error(tmp_path, name, hint):
    path = tmp_path / "x.env"
    path.write_text(f"{name}=77\n")
    (warning,) = check.typo_warnings({name: "77", "HOME": "/root", "SEED": "2"}, KNOBS)
    assert warning == f"warning: the environment variable {name} is no knob: {hint}"
    with pytest.raises(train_gpt.UserError) as caught:
        Config.load([str(path)], {})
    assert str(caught.value) == f"{path}: {name} is not a knob: {hint}"


def test_a_knob_of_other_trainers_draws_a_warning():
    for name, remedy in {
        "WARMDOWN_ITERS": "WARMDOWN_FRAC",
        "MUON_WD": "MUON_WEIGHT_DECAY",
        "XSA_LAST_N": "XSA_LAYERS",
        "INT8_SCALE_FLOOR": "CLIP_MLP",
    }.items():
        (warning,) = check.typo_warnings({name: "1"}, KNOBS)
        assert f" {name} is no knob: set" in warning and remedy in warning


def test_what_launchers_and_shells_set_draws_no_warning():
    ordinary = """PATH HOME USER SHELL PWD OLDPWD LANG LC_ALL TERM TMPDIR HOSTNAME LOGNAME MAIL EDITOR DISPLAY SHLVL _
        PS1 TZ PYTHONPATH VIRTUAL_ENV CONDA_PREFIX CUDA_HOME CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH OMP_NUM_THREADS
        MKL_NUM_THREADS RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK
        ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS
        TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING
        NCCL_DEBUG NCCL_P2P_DISABLE TORCH_LOGS SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_NODEID SLURM_NNODES
        SLURM_LOCALID SLURM_STEP_ID CI GITHUB_ACTIONS XDG_RUNTIME_DIR SSH_CLIENT SSH_TTY""".split()
    assert check.typo_warnings(dict.fromkeys([*ordinary, *KNOBS], "1"), KNOBS) == []


@given(names=st.lists(st.text(max_size=12)))
@example(names=["ITERATION\udcff", "SEEDS\n", "", "\x1b[2J"])
def test_a_warning_can_always_be_printed(names):
    """Even about names that are not valid text."""
    for warning in check.typo_warnings(dict.fromkeys(names, "1"), KNOBS):
        assert warning.isprintable() and warning.encode()


# Knobs that moved to a model file


FRONTIER = "records/models/frontier.py"


def test_a_moved_knob_is_accepted_at_the_value_at_which_it_does_nothing(tmp_path):
    """Files written before the move contain all knobs."""
    path = tmp_path / "x.env"
    path.write_text("".join(f'{name}="{text}"\n' for name, text in check.MOVED.items()) + "SEED=3\n")
    assert Config.load([str(path)], {}) == Config(seed=3)
    assert check.typo_warnings(check.MOVED, KNOBS) == []
    knobs = train_gpt.load_model_file(str(ROOT / FRONTIER)).knobs()
    for name, text in check.MOVED.items():
        assert name not in KNOBS and train_gpt.parse(knobs[name], text) == knobs[name].default


OFF = "CLIP_ATTN=0 CLIP_ATTN=0.0 CLIP_ATTN=0e5 XSA_LAYERS=0.0 LOOP_LAYERS= CODEC=zlib LOOP_START=0.350 SAMPLE_PROMPT=x"
ON = "CLIP_ATTN=13 LOOP_LAYERS=3-4 CODEC=rans CODEC=0 XYZZY=0"


def test_numbers_are_compared_as_numbers():
    """Regression: 0 was considered different from 0.0."""
    for off, text in [*((True, text) for text in OFF.split()), *((False, text) for text in ON.split())]:
        name, value = text.split("=")
        assert check.is_moved_and_off(name, value) == off, text
        kept = check.drop_moved_knobs({name: value, "SEED": "1"}, KNOBS)
        assert kept == ({} if off else {name: value}) | {"SEED": "1"}
        assert check.drop_moved_knobs({name: value}, {name: None}) == {name: value}, "a model with this knob keeps it"


def test_files_of_all_records_load(monkeypatch):
    """Their config.env is the old script's: it loads unchanged, or the error says which model file to name."""
    monkeypatch.chdir(ROOT)
    for path in sorted(ROOT.glob("records/track_*/*/config.env")):
        moved = {name for name, text in train_gpt.read_env_file(path).items() if name in check.MOVED}
        assert moved == check.MOVED.keys() - {"CANONICAL"} or moved == check.MOVED.keys()
        try:
            Config.load([str(path)], {"MODEL_FILE": ""})
        except train_gpt.UserError as error:
            assert re.search(r"set MODEL_FILE=records/models/(frontier|score_first)\.py$", str(error))
            Config.load([str(path)], {"MODEL_FILE": FRONTIER})


# --help


def help_of(capsys, monkeypatch, model_file="", flag="--help") -> dict[str, list[str]]:
    """{heading: lines} of --help."""
    monkeypatch.setenv("MODEL_FILE", str(model_file))
    assert train_gpt.main([flag]) == 0
    launch, _, knobs = capsys.readouterr().out.partition("\nKnobs. ")
    assert "torchrun" in launch and ".env" in launch
    groups = [group.strip().splitlines() for group in knobs.split("\n\n")[1:]]
    return {heading: lines for heading, *lines in groups}


def assert_explains(lines, knobs):
    """Each line has name, default, meaning, choices, and whether the knob may change on resume."""
    assert [line.split("=")[0] for line in lines] == list(knobs)
    for line, (name, field) in zip(lines, knobs.items(), strict=True):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        assert line.startswith(f"{name}={default}  {field.metadata['meaning']}")
        assert line.endswith(" [free]") == field.metadata["free"]
        assert all(choice in line for choice in field.metadata["allowed"][2])


def test_help_explains_every_knob_in_the_groups_of_config(capsys, monkeypatch):
    groups = help_of(capsys, monkeypatch, flag="-h")
    headings = re.findall(r"^    # -- (.+)$", (ROOT / "train_gpt.py").read_text(), re.MULTILINE)
    assert len(headings) > 5 and list(groups)[: len(headings)] == headings and all(groups.values())
    assert_explains([line for heading in headings for line in groups[heading]], KNOBS)
    assert [line.split("=")[0] for line in groups["MODE=sample"]] == list(check.SAMPLE_KNOBS)


def test_help_lists_the_knobs_of_the_model_files_without_running_them(capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_module", pytest.fail)
    groups = help_of(capsys, monkeypatch)
    monkeypatch.undo()
    for path in (ROOT / "records" / "models").glob("*.py"):
        lines = groups.get(f"MODEL_FILE={path.relative_to(ROOT).as_posix()}", [])
        if "class Config(" not in path.read_text():
            assert not lines
            continue
        config_class = train_gpt.load_model_file(str(path))
        inherited = {name for base in config_class.__mro__[1:] for name in getattr(base, "knobs", dict)()}
        assert_explains(lines, {name: f for name, f in config_class.knobs().items() if name not in inherited})


MODEL = """import train_gpt
from train_gpt import knob


class Config(train_gpt.Config):
    vocab_size = 1025
    plain: int = knob(1, "before any heading")
    # -- Squares
    side: int = knob(
        2**3,
        "length of a side",
        free=True,
    )
"""


def test_help_with_a_model_file_explains_its_config(capsys, monkeypatch, tmp_path):
    (tmp_path / "squares.py").write_text(MODEL)
    groups = help_of(capsys, monkeypatch, tmp_path / "squares.py")
    assert groups["Knobs of squares.py"] == ["PLAIN=1  before any heading"]
    assert groups["Squares"] == ["SIDE=8  length of a side [free]"]
    assert any(line.startswith("VOCAB_SIZE=1025 ") for line in groups["Model"]), "a new default, in its old place"
    assert not [heading for heading in groups if heading.startswith("MODEL_FILE=")]


# Graphs of a model that changes during the run


def test_every_graph_is_timed_and_counts_by_its_share_of_the_run(runtime, monkeypatch):
    """A graph's weight is the number of steps taken with it, until the clock reaches the start of the next one."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(check.time, "perf_counter", lambda: clock.now)

    class Growing(train_gpt.Model):
        graph_starts = (0.0, 0.25, 0.5)
        asked = []

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def advance(self, progress):
            self.seconds = {0.0: 1.0, 0.25: 2.0, 0.5: 4.0}[progress]
            self.asked.append(progress)

        def forward(self, tokens, targets):
            clock.now += self.seconds
            losses = self.weight * targets.float()
            return losses, self.weight * 2  # with an extra loss

    model = Growing()
    tokens = torch.ones(2, 5, dtype=torch.long)
    found = check.seconds_per_token(model, model, tokens, runtime)
    assert model.asked == [0.0, 0.25, 0.5]
    assert found == pytest.approx(1 / (0.25 / 1 + 0.25 / 2 + 0.5 / 4) / 10)


# Projected sizes


@pytest.mark.parametrize("columns", [64, 512, 2048])
def test_bits_per_weight_are_the_entropy_of_quantized_gaussians(columns):
    """Compared with an experiment, for a clip in standard deviations and for the script's coder."""
    w = torch.randn(2**22 // columns, columns, generator=torch.Generator().manual_seed(columns))

    def entropy(q):
        counts = torch.bincount((q.int() + 128).flatten()).double()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * p.log2()).sum())

    q, _ = train_gpt.Coder(Config()).quantize_matrix("w", w)
    assert check.bits_per_weight(columns) == pytest.approx(entropy(q), abs=0.06)
    for qmax, clip in ((31, 4.0), (127, 13.0), (7, 3.0)):
        q, _ = train_gpt.quantize_rows(w, torch.full((len(w),), clip), qmax)
        assert check.bits_per_weight(columns, qmax, clip) == pytest.approx(entropy(q), abs=0.06)


def test_the_projected_size_is_that_of_an_artifact_of_gaussian_weights(make_config):
    config = make_config(NUM_LAYERS=2, MODEL_DIM=256, VOCAB_SIZE=1024)
    model = models.new_model(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(generator=generator)
    coder = train_gpt.Coder(config)
    blob, _ = coder.encode(model.state_dict(), 0)
    assert check.projected_bytes(coder, model) == pytest.approx(len(blob), rel=0.02)


def test_the_size_is_asked_of_the_coder(checked, tmp_path):
    """A model file may have its own coder, which knows its own format."""
    (tmp_path / "small.py").write_text(
        "import train_gpt\n\n\n"
        "class Coder(train_gpt.Coder):\n"
        "    tag = 'dots'\n\n"
        "    def projected_size(self, model, check):\n"
        "        return 10**9\n\n\n"
        "class Config(train_gpt.Config):\n"
        "    @classmethod\n"
        "    def coder_class(cls):\n"
        "        return Coder\n"
    )
    facts, problems = checked(MODEL_FILE=tmp_path / "small.py")
    code_bytes = sum(len(path.read_bytes()) for path in (ROOT / "train_gpt.py", tmp_path / "small.py"))
    assert facts["bytes_artifact_projected"] == 10**9 and facts["bytes_code"] == code_bytes
    assert len(problems) == 1 and "take about 1000000000 bytes as dots" in problems[0]
