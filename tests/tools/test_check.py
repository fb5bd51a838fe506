"""MODE=check tells what would go wrong, what a run would take, and which variables are almost knobs."""

import datetime
import json
import random
import re
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import process, tree

import train_gpt
from train_gpt import GPT, Config

KNOBS = Config.knobs()
HOUR = datetime.timedelta(hours=1)
check = train_gpt.tool("check")
CHECKED = settings()  # those of the profile that conftest.py loads


@pytest.fixture
def checked(corpus, tmp_path, monkeypatch, call):
    """Function: (exit code, facts, problems, stdout) of MODE=check, which writes nothing."""
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
        for name, value in facts.items():
            assert f"{name}: {value}\n" in out
        assert code == (1 if problems else 0), (problems, facts)
        return code, facts, problems, out

    return run


def test_check_of_good_data(checked, corpus, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    code, facts, problems, out = checked(MAX_WALLCLOCK_SECONDS=600, ITERATIONS=1000)
    assert code == 0 and not problems
    config = Config.load([], models.tiny_settings(corpus))
    params = sum(p.numel() for p in GPT(config).parameters())
    sizes = [len((ROOT / "train_gpt.py").read_bytes()), check.projected_bytes(train_gpt.Coder(config), GPT(config))]
    assert facts["model_params"] == params
    assert [facts["bytes_code"], facts["bytes_artifact_projected"]] == sizes
    assert facts["bytes_total_projected"] == sum(sizes) and facts["bytes_limit"] == 16_000_000
    shards = {
        split: [np.fromfile(path, "<u2", offset=1024) for path in sorted((corpus / "data").glob(f"*_{split}_*"))]
        for split in ("train", "val")
    }
    assert facts["train_shards"] == len(shards["train"]) and facts["val_shards"] == 1
    assert facts["train_tokens"] == sum(map(len, shards["train"])) and facts["val_tokens"] == len(shards["val"][0])
    assert facts["val_bytes"] == json_bytes(corpus) and facts["bytes_proved"] is False
    assert facts["tokens_per_step"] == 256 and facts["micro_batch_tokens"] * facts["grad_accum_steps"] == 256
    assert facts["device_type"] == "cpu" and facts["ranks"] == 1 and facts["torch"] == torch.__version__
    assert facts["seconds_per_token"] > 0 and facts["memory_estimate_mib"] >= 0
    assert facts["seconds_per_step"] == pytest.approx(256 * facts["seconds_per_token"])
    assert facts["steps_in_budget"] == min(1000, int(600 / facts["seconds_per_step"]))
    assert facts["tokens_in_budget"] == 256 * facts["steps_in_budget"] and "ran here" in facts["step_time_rests_on"]
    assert facts["nccl_environment"] == {"NCCL_DEBUG": "WARN"}
    assert "attention:" in facts["kernels"] and "compile:0" in facts["kernels"]


def json_bytes(corpus) -> int:
    """Bytes of the validation text, by decoding it."""
    import sentencepiece as spm

    model = spm.SentencePieceProcessor(model_file=str(corpus / "tok.model"))
    tokens = np.fromfile(corpus / "data" / "fineweb_val_000000.bin", "<u2", offset=1024)
    documents = np.split(tokens, np.flatnonzero(tokens == model.bos_id()))
    return sum(len(model.decode(document.tolist()).encode()) for document in documents)


def test_check_before_the_data_is_there(checked, tmp_path):
    code, facts, problems, _ = checked(DATA_PATH=tmp_path / "nowhere", TOKENIZER_PATH=tmp_path / "none.model")
    assert code == 1 and len(problems) == 1
    assert f"DATA_PATH={tmp_path / 'nowhere'}" in problems[0]
    assert "python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env" in problems[0]
    assert facts["model_params"] > 0 and facts["schedule"] and facts["disk_free_mib"] > 0, "the rest is checked"


def half_a_shard(data: Path):
    path = data / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:5000])


def token_at(name: str, place: int):
    def change(data: Path):
        tokens = np.fromfile(data / name, "<u2", offset=1024)
        tokens[place] = 60_000
        write_shard(data / name, tokens)

    return change


def manifest(data: Path):
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 5}}}')


@pytest.mark.parametrize(
    "damage, said",
    [
        (half_a_shard, "make or fetch it again"),
        (manifest, "manifest.json says 5"),
        (token_at("fineweb_train_000000.bin", 0), "token 60000"),
        (token_at("fineweb_train_000001.bin", -1), "token 60000"),
        (token_at("fineweb_val_000000.bin", 1000), "token 60000"),
        (lambda data: (data / "fineweb_val_000000.bin").unlink(), "holds no fineweb_val_"),
        (lambda data: (data / "fineweb_train_000000.bin").rename(data / "fineweb_train_000005.bin"), "is missing"),
    ],
    ids=["half", "manifest", "first", "last", "validation", "none", "gap"],
)
def test_check_of_bad_data(checked, corpus, tmp_path, damage, said):
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    damage(data)
    code, facts, problems, _ = checked(DATA_PATH=data)
    assert code == 1 and len(problems) == 1 and said in problems[0] and facts["model_params"]


def test_check_labels_what_it_only_sampled(checked, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SAMPLED", 100)
    _, facts, _, _ = checked()
    assert facts["train_tokens_checked"].startswith(f"400 of {facts['train_tokens']}, ")
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    token_at("fineweb_train_000001.bin", -100)(data)
    assert "token 60000" in checked(DATA_PATH=data)[2][0]
    monkeypatch.setattr(check, "SAMPLED", 2**16)
    _, facts, _, _ = checked()
    assert facts["train_tokens_checked"].startswith(f"{facts['train_tokens']} of {facts['train_tokens']}, ")


def test_check_of_a_wrong_tokenizer(checked, corpus, tmp_path):
    size = (corpus / "vocab_size").read_text()
    code, _, problems, _ = checked(VOCAB_SIZE=2048)
    assert code == 1 and f"has {size} pieces: set that" in problems[0]
    code, _, problems, _ = checked(TOKENIZER_PATH=corpus / "data" / "fineweb_val_000000.bin")
    assert code == 1 and "not a SentencePiece model" in problems[0]
    code, _, problems, _ = checked(TOKENIZER_PATH=tmp_path / "nowhere.model")
    assert code == 1 and "prepare_shakespeare" in problems[0]


def test_check_of_an_artifact_over_the_limit(checked):
    total = checked()[1]["bytes_total_projected"]
    for limit, code in ((total, 0), (total - 1, 1)):
        assert checked(SIZE_LIMIT=limit)[0] == code
    problem = checked(SIZE_LIMIT=total - 1)[2][0]
    assert str(total) in problem and str(total - 1) in problem and "lower MODEL_DIM" in problem


def test_check_of_a_full_disk(checked, monkeypatch):
    usage = shutil.disk_usage
    asked = []

    def little(path):
        asked.append(path)
        return SimpleNamespace(**usage(path)._asdict() | {"free": 2**20})

    monkeypatch.setattr(shutil, "disk_usage", little)
    code, _, problems, _ = checked()
    assert code == 1 and len(problems) == 1 and asked
    assert "has 1 MiB free" in problems[0] and "LOG_DIR=" in problems[0] and "make room" in problems[0]


def test_check_of_a_place_that_is_none(checked, corpus):
    code, _, problems, _ = checked(LOG_DIR=corpus / "tok.model")
    assert code == 1 and f"LOG_DIR={corpus / 'tok.model'}" in problems[0] and "choose another" in problems[0]


def test_check_of_a_clock_shorter_than_a_step(checked):
    code, facts, problems, _ = checked(MAX_WALLCLOCK_SECONDS="1e-6")
    assert code == 1 and facts["steps_in_budget"] == 0
    assert "one step takes" in problems[0] and "raise MAX_WALLCLOCK_SECONDS" in problems[0]


def test_check_of_a_batch_that_ranks_cannot_share(checked):
    code, _, problems, _ = checked(TARGET_WORLD_SIZE=3)
    assert code == 1 and "on 3 ranks: use 288" in problems[0]


def test_check_of_several_problems(checked, tmp_path):
    code, _, problems, _ = checked(DATA_PATH=tmp_path / "nowhere", MAX_WALLCLOCK_SECONDS="1e-6", SIZE_LIMIT=10)
    assert code == 1 and len(problems) == 3


def test_check_here_of_a_run_on_eight_gpus(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, facts, problems, _ = checked(
        TARGET_WORLD_SIZE=8, DEVICE="cuda", TRAIN_BATCH_TOKENS=1024, NUM_LAYERS=1, MAX_WALLCLOCK_SECONDS=600
    )
    assert code == 0 and not problems
    assert facts["target_ranks"] == 8 and facts["ranks"] == 1 and facts["device_type"] == "cpu"
    assert facts["grad_accum_steps"] == 1 and facts["micro_batch_tokens"] == 128
    assert facts["seconds_per_step"] > 0 and "public runs on 8xH100" in facts["step_time_rests_on"]
    assert facts["memory_mib"] is None
    _, facts, _, _ = checked(TARGET_WORLD_SIZE=2, DEVICE="cuda", TRAIN_BATCH_TOKENS=1024, NUM_LAYERS=1)
    assert facts["grad_accum_steps"] == 4, "eight micro-batches on any number of GPUs"


def test_check_on_a_host_whose_name_does_not_resolve(checked, monkeypatch):
    def unknown(name):
        raise socket.gaierror(-2, f"Name or service not known: {name}")

    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert checked()[0] == 0, "one process meets nobody"
    code, _, problems, _ = checked(TARGET_WORLD_SIZE=2)
    assert code == 1 and len(problems) == 1
    assert "node-17, does not resolve" in problems[0] and "set GLOO_SOCKET_IFNAME" in problems[0]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert checked(TARGET_WORLD_SIZE=2)[0] == 0


# The meeting of the ranks


def launched(rank: int, world_size=2, **more) -> dict[str, str]:
    """The variables that torchrun sets."""
    place = {"MASTER_ADDR": "node-17", "MASTER_PORT": "29500"}
    return place | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "GROUP_WORLD_SIZE": "1"} | more


def test_ranks_that_cannot_meet_say_where_and_what_to_set(monkeypatch):
    def fail(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(check.dist, "rendezvous", fail)
    with pytest.raises(train_gpt.UserError, match="node-17:29500 .*not known.*GLOO_SOCKET_IFNAME"):
        check.meet(launched(0), HOUR)


@pytest.fixture
def store(monkeypatch):
    """A store that is met at once, and an alarm that does not wait."""
    made = torch.distributed.HashStore()
    monkeypatch.setattr(check.dist, "rendezvous", lambda *args, **options: iter([(made, 0, 2)]))
    alarm = SimpleNamespace(start=lambda: None, cancel=lambda: None)
    monkeypatch.setattr(check.threading, "Timer", lambda *args: alarm)
    return made


def test_ranks_that_are_all_there_meet_without_a_word(store, capsys):
    """Each at its own time: rank 1 came first, and waited."""
    first = threading.Thread(target=check.meet, args=(launched(1), HOUR))
    first.start()
    met = check.meet(launched(0), HOUR)
    first.join(20)
    assert not first.is_alive() and met.get("here 1") == b"" and not capsys.readouterr().out


def test_a_restart_does_not_take_the_dead_for_the_living(store):
    """Regression: the store of a launch on one host outlives its ranks, and still holds that they were here."""
    check.meet(launched(0, 1, TORCHELASTIC_RESTART_COUNT="0"), HOUR)
    met = check.meet(launched(0, 1, TORCHELASTIC_RESTART_COUNT="1"), HOUR)
    assert not met.check(["here 5"]) and met.check(["here 0"])
    met.set("x", "1")
    other = check.meet(launched(0, 1, TORCHELASTIC_RESTART_COUNT="2"), HOUR)
    assert not other.check(["x"])


def test_a_rank_that_waits_for_another_says_for_whom(store, monkeypatch, capsys):
    """After ten seconds, which are none here, for each rank that is late."""
    late = [2, 1]

    class Slow:
        def __init__(self, real):
            self.real = real

        def set(self, key, value):
            self.real.set(key, value)

        def check(self, keys):
            return self.real.check(keys)

        def wait(self, keys, timeout):
            assert timeout.total_seconds() == 10
            if late.pop() == 2:
                self.real.set(keys[0], "")
                return
            raise RuntimeError("the ten seconds are over")

    monkeypatch.setattr(check.dist, "PrefixStore", lambda prefix, real: Slow(real))
    check.meet(launched(0), HOUR)
    assert capsys.readouterr().out == "rank 0 of 2 waits at node-17:29500 for rank 1\n" and not late


def test_a_cpu_does_not_compile_what_gpus_elsewhere_are_to_train(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, facts, _, _ = checked(TARGET_WORLD_SIZE=8, TRAIN_BATCH_TOKENS=1024, COMPILE=1)
    assert code == 0 and facts["micro_step"].endswith("eager: runs")


def test_check_in_a_process_of_its_own(corpus, tmp_path):
    environ = models.tiny_settings(corpus, MODE="check", DATA_PATH=tmp_path / "nowhere", LOG_DIR=tmp_path / "logs")
    done = process(environ | {"ITERATION": "7"}, tmp_path)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1 and not done.stderr and lines[-1].startswith("check_json:{")
    assert json.loads(lines[-1].removeprefix("check_json:"))["problems"]
    assert "warning: the environment variable ITERATION is no knob: did you mean ITERATIONS?" in lines
    assert not list(tmp_path.iterdir())


# The schedule in words

SCHEDULES = [{}, {"WARMDOWN_FRAC": 0}, {"WARMDOWN_FRAC": 1}, {"WARMDOWN_FRAC": 0.5}, {"WARMDOWN_FRAC": 0.3526}]


@pytest.mark.parametrize("knobs", SCHEDULES, ids=str)
@pytest.mark.parametrize("clock", [0, 600, 7200])
def test_the_schedule_in_words_is_that_of_the_run(knobs, clock):
    """Every number in the words is where the learning rate turns."""
    config = Config.load(
        [], {name: str(v) for name, v in (knobs | {"MAX_WALLCLOCK_SECONDS": clock, "ITERATIONS": 2000}).items()}
    )
    words = check.schedule(config)

    def rate(config, progress):
        return train_gpt.Model().lr_scale(config, 0, progress)

    pattern = r"full until ((?:step )?)(\d+)(?: s|), then linear to 0 at (?:step )?(\d+)(?: s|)"
    found = re.findall(pattern, words)
    assert len(found) == (2 if clock else 1)
    assert bool(clock) == words.endswith(", if that comes first") and bool(found[0][0]) != bool(clock)
    ends = [(int(turn), int(end)) for _, turn, end in found]
    by_step = [lambda step: rate(config, train_gpt.progress_at(config, step, 0.0))]
    by_clock = [lambda s: rate(config, train_gpt.progress_at(config, 10, s))]
    points = by_clock + by_step if clock else by_step
    assert ends[-1][1] == 2000 and (not clock or ends[0][1] == clock)
    for at, (turn, end) in zip(points, ends, strict=True):
        assert all(at(x) == 1 for x in range(1, turn, 7))
        if turn < end:
            assert at(end) == 0 and at((turn + end) / 2) == pytest.approx(0.5, abs=0.01)
            assert at(turn + 0.02 * (end - turn) + 1) < 1
        else:
            assert at(end - 1) == 1


# Typos


def neighbours(name: str, rng: random.Random) -> set[str]:
    """All deletions and transpositions, and at every place an insertion and a substitution."""
    letters, places = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", range(len(name))
    found = {name[:i] + name[i + 1 :] for i in places}
    found |= {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :] for i in places}
    found |= {name[:i] + rng.choice(letters) + name[i + 1 :] for i in places}
    found |= {name[:i] + rng.choice(letters) + name[i:] for i in range(len(name) + 1)}
    return found - KNOBS.keys()


@pytest.mark.parametrize("name", KNOBS)
def test_every_slip_of_a_knob_draws_a_warning(name):
    slips = neighbours(name, random.Random(name))
    assert len(slips) >= 3 * len(name)
    for slip in slips:
        (warning,) = check.typo_warnings({slip: "1", "PATH": "/bin", name: "2"}, KNOBS)
        match = re.fullmatch(rf"warning: the environment variable {slip} is no knob: did you mean (\w+)\?", warning)
        assert match[1] in KNOBS
        near = neighbours_of_all(match[1])
        assert slip in near or match[1] == name or match[1] in neighbours_of_all(name), "another only if it is as near"


def neighbours_of_all(name: str) -> set[str]:
    """Every name that is one edit away."""
    letters, places = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", range(len(name))
    return (
        {name[:i] + name[i + 1 :] for i in places}
        | {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :] for i in places}
        | {name[:i] + letter + name[i + 1 :] for i in places for letter in letters}
        | {name[:i] + letter + name[i:] for i in range(len(name) + 1) for letter in letters}
    )


def test_lower_case_draws_a_warning():
    for name in KNOBS:
        assert f"did you mean {name}?" in check.typo_warnings({name.lower(): "1"}, KNOBS)[0]


def test_what_launchers_and_shells_set_draws_no_warning():
    torchrun = (
        "LOCAL_RANK RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE GROUP_WORLD_SIZE "
        "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS "
        "TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING "
        "OMP_NUM_THREADS"
    )
    shell = "_ PATH HOME USER SHELL PWD TERM LANG EDITOR SHLVL LOGNAME MAIL DISPLAY TMPDIR HOSTNAME PS1 LC_ALL"
    slurm = "SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_NODEID SLURM_NNODES SLURM_LOCALID SLURM_STEP_ID"
    names = f"{torchrun} {shell} {slurm}".split()
    assert check.typo_warnings(dict.fromkeys([*names, *KNOBS], "1"), KNOBS) == []


@CHECKED
@given(names=st.lists(st.text(max_size=12)))
@example(names=["ITERATION\udcff", "SEEDS\n", "", "\x1b[2J"])
def test_a_warning_can_always_be_printed(names):
    """Also about names that are not text."""
    for warning in check.typo_warnings(dict.fromkeys(names, "1"), KNOBS):
        assert warning.isprintable() and warning.encode()


# Knobs that moved to a model file


FRONTIER = "records/models/frontier.py"


@pytest.mark.parametrize("name", check.MOVED)
def test_a_moved_knob_is_no_knob_and_says_where_it_went(name, tmp_path):
    """At the value at which it did nothing it is accepted without a word: files of before hold all knobs."""
    assert name not in KNOBS
    path = tmp_path / "x.env"
    path.write_text(f'{name}="{check.MOVED[name]}"\nSEED=3\n')
    assert Config.load([str(path)], {}).seed == 3
    path.write_text(f"{name}=77\n")
    with pytest.raises(train_gpt.UserError) as caught:
        Config.load([str(path)], {})
    assert str(caught.value) == f"{path}: {name} is not a knob: it is one of a model file: set MODEL_FILE={FRONTIER}"
    assert check.typo_warnings({name: check.MOVED[name]}, KNOBS) == []
    (warning,) = check.typo_warnings({name: "77"}, KNOBS)
    assert warning.endswith(f"{name} is no knob: it is one of a model file: set MODEL_FILE={FRONTIER}")


@pytest.mark.parametrize("name", check.MOVED)
def test_a_moved_knob_is_one_of_the_model_file_with_that_default(name):
    field = train_gpt.load_model_file(str(ROOT / FRONTIER)).knobs()[name]
    assert train_gpt.parse(field, check.MOVED[name]) == field.default


@pytest.mark.parametrize(
    "name, text, off",
    [
        ("CLIP_ATTN", "0", True),
        ("CLIP_ATTN", "0.0", True),
        ("CLIP_ATTN", "0e5", True),
        ("CLIP_ATTN", "13", False),
        ("XSA_LAYERS", "0.0", True),
        ("LOOP_LAYERS", "", True),
        ("LOOP_LAYERS", "3-4", False),
        ("CODEC", "zlib", True),
        ("CODEC", "rans", False),
        ("CODEC", "0", False),
        ("LOOP_START", "0.350", True),
        ("SAMPLE_PROMPT", "anything", True),
        ("TOP_K", "5", True),
        ("XYZZY", "0", False),
    ],
)
def test_numbers_are_compared_as_numbers(name, text, off):
    """Regression: 0 was taken for another value than 0.0."""
    assert check.is_moved_and_off(name, text) == off
    assert check.drop_moved_knobs({name: text, "SEED": "1"}, KNOBS) == ({} if off else {name: text}) | {"SEED": "1"}
    assert check.drop_moved_knobs({name: text}, {name: None}) == {name: text}, "of a model that has this knob it stays"


def test_files_of_all_records_load(monkeypatch):
    """Their config.env is that of the old script: it loads as it is, or says which model file to name."""
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


def help_of(capsys, monkeypatch, model_file="") -> dict[str, list[str]]:
    """{heading: lines} of --help."""
    monkeypatch.setenv("MODEL_FILE", str(model_file))
    assert train_gpt.main(["--help"]) == 0
    _, _, knobs = capsys.readouterr().out.partition("\nKnobs. ")
    groups = [group.strip().splitlines() for group in knobs.split("\n\n")[1:]]
    return {heading: lines for heading, *lines in groups}


def test_help_has_the_groups_of_config_in_order(capsys, monkeypatch):
    groups = help_of(capsys, monkeypatch)
    headings = re.findall(r"^    # -- (.+)$", (ROOT / "train_gpt.py").read_text(), re.MULTILINE)
    assert len(headings) > 5 and list(groups)[: len(headings)] == headings
    names = [line.split("=")[0] for heading in headings for line in groups[heading]]
    assert names == list(KNOBS)
    assert [line.split("=")[0] for line in groups["MODE=sample"]] == list(check.SAMPLE_KNOBS)
    assert all(lines for lines in groups.values())


def test_help_lists_the_knobs_of_the_model_files_without_running_them(capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_module", pytest.fail)
    groups = help_of(capsys, monkeypatch)
    monkeypatch.undo()
    for path in (ROOT / "records" / "models").glob("*.py"):
        module = path.relative_to(ROOT).as_posix()
        lines = groups.get(f"MODEL_FILE={module}", [])
        if "class Config(" not in path.read_text():
            assert not lines
            continue
        config_class = train_gpt.load_model_file(str(path))
        added = set(config_class.knobs()) - KNOBS.keys()
        added -= {name for base in config_class.__mro__[1:] for name in getattr(base, "knobs", dict)()}
        assert {line.split("=")[0] for line in lines} == added
        for line in lines:
            field = config_class.knobs()[line.split("=")[0]]
            default = int(field.default) if isinstance(field.default, bool) else field.default
            assert line.startswith(f"{field.name.upper()}={default}  {field.metadata['meaning']}")
            assert line.endswith(" [free]") == field.metadata["free"]


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
    """A graph counts by the steps that are taken with it, until the clock has come to the next one."""
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
    """Against an experiment; with a clip in standard deviations, and with that of the script's coder."""
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
    code, facts, problems, _ = checked(MODEL_FILE=tmp_path / "small.py")
    code_bytes = sum(len(path.read_bytes()) for path in (ROOT / "train_gpt.py", tmp_path / "small.py"))
    assert code == 1 and facts["bytes_artifact_projected"] == 10**9 and facts["bytes_code"] == code_bytes
    assert len(problems) == 1 and "take about 1000000000 bytes as dots" in problems[0]
