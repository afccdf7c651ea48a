"""Rebuilds the embedded `mosaic` files, or the large ones, or the pretraining corpus.

python tools/build_mosaic.py compact src/evolora/assets/mosaic
python tools/build_mosaic.py large ~/data/mosaic
python tools/build_mosaic.py corpus build/corpus
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evolora.streams.mosaic import (
    build_domains,
    build_instructions,
    build_missing,
    build_modalities,
)
from evolora.streams.mosaic.corpus import build_pretraining_corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compact", "large", "corpus"))
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--stream",
        choices=("domains", "missing", "instructions", "modalities"),
        help="this one only",
    )
    parser.add_argument("--cache", type=Path, help="folder of the registry packages")
    args = parser.parse_args()
    if args.what == "corpus":
        build_pretraining_corpus(args.out, args.cache, print)
        return
    builders = {
        "domains": build_domains.build,
        "missing": build_missing.build,
        "instructions": build_instructions.build,
        "modalities": build_modalities.build,
    }
    for name in [args.stream] if args.stream else builders:
        builders[name](args.out, args.what, args.cache, print)


if __name__ == "__main__":
    main()
