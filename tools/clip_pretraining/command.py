"""The command line that the pretraining scripts share: one of several stages, and its options."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip_pretraining.loop import add_loop_options, start_processes
from evolora.errors import EvoloraError

Stage = Callable[[argparse.Namespace], None]


def parser_of(
    description: str | None, stages: Mapping[str, Stage], out: str
) -> argparse.ArgumentParser:
    """Returns a parser with the options that all scripts have; ``out`` is the embedded name."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    assets = Path("src/evolora/assets")
    parser.add_argument("stage", choices=tuple(stages))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--corpus", type=Path, help="folder of build_pretraining_corpus")
    parser.add_argument("--domains", type=Path, default=assets / "mosaic")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=assets / out)
    parser.add_argument("--name", default="main", help="name of the checkpoint")
    add_loop_options(parser)
    return parser


def run_stage(
    parser: argparse.ArgumentParser,
    stages: Mapping[str, Stage],
    needed: Mapping[str, Sequence[str]],
    words: Sequence[str] | None,
) -> None:
    """Runs the stage that the words ask for.

    Args:
        parser: of the words.
        stages: by name.
        needed: stage -> options that it cannot do without.
        words: of the command line; None takes those of the process.
    """
    args = parser.parse_args(words)
    for option in needed.get(args.stage, ()):
        if getattr(args, option) is None:
            parser.error(f"the stage {args.stage!r} needs --{option}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    start_processes(args)
    stages[args.stage](args)


def start(main: Callable[[], None]) -> None:
    """Runs a script's ``main``; what a user can mend is told in one line."""
    try:
        main()
    except EvoloraError as error:
        sys.exit(f"error: {error}")
