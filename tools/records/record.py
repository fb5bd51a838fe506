"""Records as pull requests: pack run folders, check, rescore, compare, and keep the board.

    python tools/records/record.py new logs/a logs/b --track track_10min_16mb --slug wider --author A --github-id a
    python tools/records/record.py check records/track_10min_16mb/2026-01-31_wider     or --all, or --base origin/main
    python tools/records/record.py rescore records/track_10min_16mb/2026-01-31_wider   the artifact, by its own script
    python tools/records/record.py compare A B                                         records or run folders
    python tools/records/record.py board                                               the table in records/README.md

This file only dispatches; each command is in record_<command>.py. Needs requirements-dev.txt.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # also under python -P: the parts of this tool, and train_gpt

COMMANDS = {
    "new": ("record_pack", "a record folder from run folders, one per seed; ends with check"),
    "check": ("record_check", "everything a program can judge about a record; exit code 1 if it finds a fault"),
    "rescore": ("record_rescore", "score the artifact again by the record's own script, and test the rules on it"),
    "compare": ("record_compare", "is B better than A: Welch's test, effect, cost"),
    "board": ("record_board", "the table and the pictures of records/README.md, from the folders alone"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = (sys.argv[1:] if argv is None else argv)[:1]
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if chosen == [name]:  # the others' libraries are not wanted
            try:
                importlib.import_module(module).add_arguments(command)
            except ModuleNotFoundError as error:
                print(f"error: {error}: pip install -r requirements-dev.txt", file=sys.stderr)
                return 2
    arguments = parser.parse_args(argv)
    from train_gpt import UserError  # late: it takes a second, and --help without a command needs no torch

    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)
    except BrokenPipeError:  # a reader like `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
