"""Does it help to keep the ranks of an adapter apart? Classification and image-text retrieval.

The top block of each tower of the embedded CLIP gets adapters (LoRA, DoRA, AdaLoRA, bottleneck),
which are trained under each regulariser of `evolora.regularizers`, under GOR and DropLoRA, and
without any. Every condition may try four strengths on the validation split, and is tested once,
with five seeds.

  python tools/study_resora.py run --out cells.jsonl           # all; goes on where it stopped
  python tools/study_resora.py run --out cells.jsonl --tasks retrieval --hosts dora
  python tools/study_resora.py table cells.jsonl               # the tables of docs/resora.md

A cell takes about a second on one core, all of them less than half an hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from resora_study.cells import Book, plan, read
from resora_study.data import TASKS, data_of
from resora_study.hosts import HOSTS
from resora_study.model import Tops
from resora_study.table import tables
from resora_study.training import run


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="run the cells that are not finished")
    running.add_argument("--out", type=Path, required=True, help="file of finished cells")
    running.add_argument("--cache", type=Path, help="folder of activations (default: beside --out)")
    running.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    running.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    running.add_argument("--most", type=int, help="stop after so many cells")
    showing = verbs.add_parser("table", help="print the tables of finished cells")
    showing.add_argument("cells", type=Path)
    args = parser.parse_args(words)
    if args.verb == "table":
        print(tables(read(args.cells)))
        return
    torch.set_num_threads(1)
    _run(args)


def _run(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    book, tops, done = Book(args.out), Tops(), 0
    for host in args.hosts:
        for task in args.tasks:
            data = data_of(task, args.cache or args.out.parent)
            for cell in plan(task, host, book):
                if book.get(cell) is not None:
                    continue
                if done == args.most:
                    return
                line = run(cell, data, tops)
                book.put(cell, line)
                done += 1
                print(
                    f"{task} {host} {cell.stage} {cell.condition} {cell.strength:g} "
                    f"seed {cell.seed}: {line['score']:.1f} ({line['seconds']} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
