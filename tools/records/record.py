"""Manage records: build them from run folders, check, rescore and compare them, and update the board.

    python tools/records/record.py new logs/a logs/b --track track_10min_16mb --slug wider --author A --github-id a
    python tools/records/record.py check records/track_10min_16mb/2026-01-31_wider     or --all, or --base origin/main
    python tools/records/record.py rescore records/track_10min_16mb/2026-01-31_wider   rescore the artifact
    python tools/records/record.py compare A B                                         records or run folders
    python tools/records/record.py board                                               the table in records/README.md

This file only dispatches to the record_*.py modules. Requires the packages in requirements-dev.txt.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # for record_*.py and train_gpt, also under python -P

COMMANDS = {
    "new": ("record_pack", "build a record folder from run folders, one per seed, and check it"),
    "check": ("record_check", "run all automatic checks on a record; exits with 1 if there are findings"),
    "rescore": ("record_rescore", "rescore the artifact with the record's own script and test it against the rules"),
    "compare": ("record_compare", "test whether B is better than A: Welch's t-test, effect size, cost"),
    "board": ("record_board", "generate the table and plots of records/README.md from the record folders"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = (sys.argv[1:] if argv is None else argv)[:1]
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if chosen == [name]:  # avoid importing the other commands' dependencies
            try:
                importlib.import_module(module).add_arguments(command)
            except ModuleNotFoundError as error:
                print(f"error: {error}: pip install -r requirements-dev.txt", file=sys.stderr)
                return 2
    arguments = parser.parse_args(argv)
    from train_gpt import UserError  # imported late: takes a second, and --help works without torch

    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)
    except BrokenPipeError:  # stdout was closed, for example by `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
