"""Hyperparameter search with optuna: its samplers, its median pruner on live training losses, and its storage.

    python tools/experiments/sweep.py space.toml             start or resume; several workers may run at once
    python tools/experiments/sweep.py space.toml --show      print the results so far

space.toml:
    name = "rates"
    trials = 30                                      # total over all workers
    config = "records/recipes/demo_cpu.env"          # optional; script = "train_gpt.py" is the default
    objective = "val_bpb"                            # a field of result.json; lower is better
    storage = "sqlite:///logs/rates/study.db"        # the default; see below
    sampler = "TPESampler"                           # any of optuna.samplers without required arguments
    seed = 1                                         # of the sampler; omit it with several workers
    [fixed]
    SEED = 1337
    [space]
    MATRIX_LR = {low = 0.01, high = 0.1, log = true}
    NUM_LAYERS = {low = 3, high = 6}                 # integers, because both bounds are
    MLP_SLOPE = [0, 0.5]                             # categorical
    [pruner]
    startup_trials = 5                               # trials completed before any is pruned
    after = 0.2                                      # never prune before this fraction of a run; off = true disables

Each trial runs the script in logs/<name>/ with its knobs as environment variables. During the run, train_loss from
metrics.jsonl, averaged over each 5% of the run, is reported to the median pruner, which stops a trial that is worse
than the median of the others at that stage. Failed trials are kept with their error. If a worker is killed, its
unfinished trial is retried with the same knobs the next time a worker starts on that machine.

On several machines, run the same command on each, with a shared database (storage = "postgresql://..." or
"mysql://...", with the driver installed) or a journal on a shared disk (storage = "/shared/rates.journal"). SQLite only
supports workers on one machine. `optuna-dashboard <storage>` (a separate package) shows a study live.
"""

import argparse
import contextlib
import os
import re
import socket
import sys
import time
import tomllib
import warnings
from pathlib import Path

import launcher  # first: it adds the folders of the other tools to sys.path
from record_read import Run, is_number

from train_gpt import UserError, read_env_file

try:
    import optuna
    from optuna.trial import TrialState
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: pip install optuna (it is in requirements-dev.txt)") from None

KEYS = dict.fromkeys(["name", "config", "script", "objective", "storage", "sampler"], str)
KEYS |= dict.fromkeys(["trials", "seed"], int) | dict.fromkeys(["fixed", "space", "pruner"], dict)
SAID = {str: "a text", int: "a whole number", dict: "a table"}
OWN = {"RUN_ID", "LOG_DIR"}  # knobs set by this tool
PRUNER = {
    "startup_trials": lambda n: type(n) is int and n >= 0,
    "after": lambda x: is_number(x) and 0 <= x <= 1,
    "off": lambda x: isinstance(x, bool),
}
FACTS = {"step_ms": ".1f", "steps": "", "bytes_total": ",", "seconds": ".1f"}  # table columns: {attribute: format}
STAGES = 20  # per run; the pruner is called after each
POLL_SECONDS = 0.5


def read_space(path: Path) -> dict:
    try:
        space = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: see `python tools/experiments/sweep.py --help` for its form") from error
    if problem := fault(space):
        raise UserError(f"{path}: {problem}")
    return {"name": path.stem, "trials": 20, "objective": "val_bpb", "fixed": {}, "pruner": {}} | space


def fault(space: dict) -> str:
    """Return the first error in a space.toml, or ""."""
    odd = space.keys() - KEYS.keys()
    if odd or not space.get("space"):
        return f"{f'unknown keys {sorted(odd)}' if odd else 'no [space]'}: expected {sorted(KEYS)}"
    for key, value in space.items():
        kind = KEYS[key]
        if type(value) is not kind or (kind is int and value < (key == "trials")):
            return f"{key} = {value!r}: expected {SAID[kind]}{' over 0' if key == 'trials' else ''}"
    if not re.fullmatch(r"\w[\w.-]*", space.get("name", "x")):
        return f"name = {space['name']!r}: expected letters, digits, dots, - and _, as it names a folder"
    fixed, searched = space.get("fixed", {}), space["space"]
    if both := sorted(fixed.keys() & searched.keys()):
        return f"both fixed and searched: {', '.join(both)}: leave out one"
    if own := sorted((fixed.keys() | searched.keys()) & OWN):
        return f"{', '.join(own)}: leave it out, as each trial gets its own"
    for name, value in fixed.items():
        if not isinstance(value, str | int | float):
            return f"fixed.{name} = {value!r}: expected a text, a number, true or false"
    for name, value in space.get("pruner", {}).items():
        if not PRUNER.get(name, lambda _: False)(value):
            return (
                f"pruner.{name} = {value!r}: expected startup_trials (a whole number), after (a share of a run, "
                "0 to 1) or off (true or false)"
            )
    for knob, form in searched.items():
        try:
            distribution(form)
        except (ValueError, TypeError, OverflowError) as error:
            return f"{knob} = {form}: {error}: expected {{low = ..., high = ...}} or a list of choices"
    return ""


def distribution(form):
    """Return a knob's optuna distribution: categorical for a list, else a range, of integers if all bounds are."""
    if isinstance(form, list):
        if not form or not all(isinstance(choice, str | int | float) for choice in form):
            raise ValueError("no choices, or choices that are no text, number, true or false")
        return optuna.distributions.CategoricalDistribution(form)
    if not isinstance(form, dict) or not {"low", "high"} <= form.keys() <= {"low", "high", "log", "step"}:
        raise ValueError("not low and high, with log and step where wanted")
    bounds = [form[name] for name in ("low", "high", "step") if name in form]
    if not all(map(is_number, bounds)) or not isinstance(form.get("log", False), bool):
        raise ValueError("bounds are finite numbers, and log is true or false")
    whole = all(isinstance(bound, int) for bound in bounds)
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    return kind(**form)


def open_storage(where: str):
    """Open a database given by URL or a journal given by file path."""
    if "://" in where:
        if where.startswith("sqlite:///"):
            Path(where.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            # If two workers write at once, wait up to 60 s for the lock instead of failing.
            return optuna.storages.RDBStorage(where, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.storages.RDBStorage(where)
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(where))


def open_study(space: dict) -> optuna.Study:
    name, options = space.get("sampler", "TPESampler"), {"seed": space["seed"]} if "seed" in space else {}
    try:
        sampler = getattr(optuna.samplers, name)(**options)
        if not isinstance(sampler, optuna.samplers.BaseSampler):
            raise TypeError("no sampler")
    except (AttributeError, TypeError, ImportError) as error:
        raise UserError(
            f"sampler = {name!r} {options}: {error}: expected one of optuna.samplers that needs no more, "
            "like TPESampler, RandomSampler or BruteForceSampler (a grid)"
        ) from error
    options = space["pruner"]
    pruner = (
        optuna.pruners.NopPruner()
        if options.get("off")
        else optuna.pruners.MedianPruner(options.get("startup_trials", 5), round(STAGES * options.get("after", 0.2)))
    )
    where = space.get("storage", f"sqlite:///logs/{space['name']}/study.db")
    for patience in range(10):  # workers that start together may both try to create the tables
        try:
            about = {"study_name": space["name"], "sampler": sampler, "pruner": pruner, "load_if_exists": True}
            return optuna.create_study(storage=open_storage(where), **about)
        except Exception as error:
            if patience == 9 or isinstance(error, ImportError | TypeError | IsADirectoryError):
                raise UserError(f"storage = {where!r} cannot be opened: {error!r:.200}") from error
            time.sleep(0.2 * (patience + 1))


def check_same_space(study: optuna.Study, space: dict):
    """Check that no knob changed its type or choices since the study began; bounds may change."""
    for trial in study.get_trials(deepcopy=False):
        for knob, old in trial.distributions.items():
            try:
                new = distribution(space["space"][knob]) if knob in space["space"] else old
                optuna.distributions.check_distribution_compatibility(old, new)
            except ValueError as error:
                changed = f"{knob} = {space['space'][knob]}: the study {space['name']!r} has trials with {old}"
                raise UserError(f"{changed}: give the new search another name") from error


@contextlib.contextmanager
def one_at_a_time(folder: Path):
    """Let only one worker on this machine sample at a time: a grid would give two workers the same values."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "asking.lock", "w") as file:
        launcher.lock(file, wait=True)
        yield


def suggest(trial: optuna.Trial, space: dict) -> dict[str, str]:
    """Sample a trial's knobs. Returns {KNOB: value as a string}, including the fixed ones."""
    knobs = {}
    with one_at_a_time(Path("logs") / space["name"]):
        for name, form in space["space"].items():
            if isinstance(form, list):
                value = trial.suggest_categorical(name, form)
            elif isinstance(distribution(form), optuna.distributions.IntDistribution):
                value = trial.suggest_int(name, **form)
            else:
                value = trial.suggest_float(name, **form)
            knobs[name] = text_of(value)
    return {name: text_of(value) for name, value in space["fixed"].items()} | knobs


def text_of(value) -> str:
    return str(int(value) if isinstance(value, bool) else value)


def stages(run: Run, config: dict[str, str]) -> dict[int, float]:
    """Return {stage: mean train_loss} for finished stages, numbered from 1. Progress is by steps or by the clock,
    whichever is further, as in the script, so runs are compared at equal fractions of their budgets."""
    iterations, clock = (float(config.get(name, 0)) for name in ("ITERATIONS", "MAX_WALLCLOCK_SECONDS"))
    losses = {}
    for line in run.metrics():
        if "train_loss" in line:
            by_clock = line.get("train_seconds", 0.0) / clock if clock else 0.0
            progress = max(line["step"] / iterations if iterations else 0.0, by_clock)
            losses.setdefault(min(int(progress * STAGES), STAGES), []).append(line["train_loss"])
    return {stage + 1: sum(of) / len(of) for stage, of in losses.items() if stage < max(losses)}


def watch(trial: optuna.Trial, process, folder: Path, run_id: str) -> bool:
    """Report losses to the pruner until the run ends. Returns True if the pruner stopped it."""
    reported = 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        config = folder / run_id / "config.env"
        run = Run(run_id, metrics_path=folder / run_id / "metrics.jsonl")
        for stage, loss in sorted(stages(run, read_env_file(config)).items() if config.is_file() else ()):
            if stage > reported:
                trial.report(loss, stage)
                reported = stage
                if trial.should_prune():
                    launcher.stop(process)
                    return True
    return False


class TrialFailed(Exception):
    """Raised when a run ends without a score."""


def run_trial(trial: optuna.Trial, space: dict, target: launcher.Target, ranks: int) -> float:
    """Run one trial and return its objective. Raises TrialPruned or TrialFailed."""
    knobs, run_id = suggest(trial, space), f"trial{trial.number:04d}"
    folder = Path("logs") / space["name"]
    # Set the host last: another worker on this host reads the pid as soon as it sees the host.
    for name, value in (("pid", os.getpid()), ("run_id", run_id), ("host", socket.gethostname())):
        trial.set_user_attr(name, value)
    process = launcher.start(target, knobs | {"RUN_ID": run_id}, folder, ranks)
    try:
        pruned = watch(trial, process, folder, run_id)
    except BaseException:
        launcher.stop(process)
        raise
    if pruned:
        raise optuna.TrialPruned
    try:
        run = launcher.read_finished(folder, run_id)
    except UserError as error:
        trial.set_user_attr("error", str(error))
        raise TrialFailed from error
    for name in FACTS:
        trial.set_user_attr(name, run.train_seconds if name == "seconds" else getattr(run, name))
    value = (run.result or {}).get(space["objective"], getattr(run, space["objective"], None))
    if process.returncode or not is_number(value):
        why = launcher.last_words(folder / f"{run_id}.out")
        trial.set_user_attr("error", why if process.returncode else f"no {space['objective']} in its result: {why}")
        raise TrialFailed(why)
    return value


def search(study: optuna.Study, space: dict, target: launcher.Target, ranks: int):
    """Run trials until all workers together reach the requested number or the sampler is exhausted."""

    def after(study: optuna.Study, trial):
        print(f"trial {trial.number} {trial.state.name}: {begun(study)} of {space['trials']}", flush=True)
        if begun(study) >= space["trials"]:
            study.stop()

    reclaim(study)
    if begun(study) < space["trials"]:
        study.optimize(lambda trial: run_trial(trial, space, target, ranks), callbacks=[after], catch=TrialFailed)


def reclaim(study: optuna.Study):
    """Re-enqueue the knobs of trials whose worker on this machine died."""
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        about = frozen.user_attrs
        if about.get("host") == socket.gethostname() and not is_alive(about["pid"]):
            try:
                study.tell(frozen.number, state=TrialState.FAIL)
            except (ValueError, RuntimeError):  # another worker reclaimed it first
                continue
            study.enqueue_trial(frozen.params, user_attrs={"again": frozen.number}, skip_if_exists=False)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def begun(study: optuna.Study) -> int:
    """Return the number of trials that count toward the requested total: all except waiting and reclaimed ones."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get("again") for trial in trials}
    return sum(trial.state != TrialState.WAITING and trial.number not in again for trial in trials)


def table(study: optuna.Study, objective: str) -> str:
    """Return a Markdown table: completed trials, best first, then pruned ones, then failed ones."""
    trials = study.get_trials(deepcopy=False)
    order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
    ranked = sorted(
        (trial for trial in trials if trial.state in order),
        key=lambda t: (order[t.state], t.value if t.value is not None else 0.0, t.number),
    )
    lines = [f"| rank | {objective} | trial | knobs | ms a step | steps | bytes | seconds |", "|" + "---|" * 8]
    for rank, trial in enumerate(ranked, 1):
        about, last = trial.user_attrs, max(trial.intermediate_values, default=0)
        score = {
            TrialState.COMPLETE: f"{trial.value:.5f}" if trial.value is not None else "",
            TrialState.PRUNED: f"pruned at {last / STAGES:.0%}",
            TrialState.FAIL: f"failed: {about.get('error', 'its worker died')}",
        }[trial.state]
        values = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in trial.params.items()}
        knobs = " ".join(f"{name}={value}" for name, value in values.items())
        cells = [rank if trial.state == TrialState.COMPLETE else "", score, trial.number, f"`{knobs}`"]
        cells += [format(about[name], form) if about.get(name) else "" for name, form in FACTS.items()]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", type=Path, metavar="SPACE.toml")
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument("--ranks", type=launcher.at_least(1), default=1, help="processes per run, under torchrun")
    arguments = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # failures appear in the table
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

    def tool():
        space = read_space(arguments.space)
        spec = ",".join(space[key] for key in ("script", "config") if key in space)
        target = launcher.parse_target(spec) if spec else launcher.Target(launcher.REPOSITORY_SCRIPT, None)
        study = open_study(space)
        if not arguments.show:
            check_same_space(study, space)
            search(study, space, target, arguments.ranks)
        print(table(study, space["objective"]))

    return launcher.run_tool(tool, "the same command continues the search")


if __name__ == "__main__":
    sys.exit(main())
