"""The command line: one program with verbs. Heavy imports happen inside the verbs.

Every fault that is the user's to mend is one line on standard error with exit code 2; ``--debug``
before the verb shows the traceback. Results go to standard output, progress to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from evolora.bench import BENCHES
from evolora.cli_compare import compare, report_comparison
from evolora.cli_data import data_app
from evolora.cli_eval import evaluate
from evolora.cli_parts import AsJson, Quiet, print_json
from evolora.cli_predict import predict
from evolora.cli_redundancy import show_redundancy
from evolora.errors import ConfigError, EvoloraError, unknown_name

app = typer.Typer(
    name="evolora",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Teach a frozen, pretrained multimodal model task after task with low-rank experts.",
)
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings to change, e.g. training.max_steps=50")
]
INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; the process ends with 0, 2 for a user's fault, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(words) and words[0] == "--debug"
    if debug:
        words = words[1:]
    try:
        app(words, standalone_mode=True)
    except EvoloraError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt, without a word
            _fail(
                "interrupted; `evolora run` goes on from its last checkpoint with --resume, "
                "`evolora compare` by itself",
                INTERRUPTED,
            )
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (evolora --debug ... shows where)", 1)


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo's runs and report")] = Path(
        "runs/demo"
    ),
    methods: Annotated[
        str, typer.Option(help="comma-separated methods; the default compares all")
    ] = "",
    seed: Annotated[int, typer.Option(help="run seed")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn the embedded image domains, then pairs of image and text, with several methods."""
    from evolora.demo import run_demo

    chosen = [word.strip() for word in methods.split(",") if word.strip()]
    result = run_demo(out, methods=chosen or None, seed=seed, progress=not quiet)
    if as_json:
        print_json(result.to_json())
    else:
        result.print()


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="run folder; default runs/<config's name>")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn one stream with one method, task after task."""
    from evolora.config import read_config

    settings = read_config(config, overrides or [])
    folder = out or Path("runs") / config.stem
    from evolora.training.continual import ContinualRun
    from evolora.training.progress import Reporter, terminal_progress

    first_process = os.environ.get("RANK", "0") == "0"
    with terminal_progress(first_process and not quiet) as bars:
        job = ContinualRun(settings, folder, reporter=Reporter(bars))
        job.run(resume=resume)
    if job.accelerator.is_main_process:
        _print_runs([folder], as_json)


app.command("compare")(compare)
app.command("eval")(evaluate)


app.command("predict")(predict)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders, or the folder of one comparison")
    ],
    out: Annotated[Path, typer.Option(help="HTML file")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="heading")] = "Evolora report",
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page of tables and figures about runs, or of a comparison."""
    if len(runs) == 1 and (runs[0] / "comparison.json").exists():
        report_comparison(runs[0], out, as_json)
        return
    from evolora.report.page import write_report
    from evolora.report.records import RunRecord

    records = [RunRecord.load(folder) for folder in runs]
    path = write_report(records, out, title)
    _print_runs(runs, as_json)
    if not as_json:
        print(f"report: {path}")


@app.command()
def inspect(
    config: Annotated[Path, typer.Argument(help="YAML file, or the folder of a run")],
    overrides: Overrides = None,
    tasks: Annotated[int | None, typer.Option(help="number of tasks; default the stream's")] = None,
    redundancy: Annotated[
        bool, typer.Option("--redundancy", help="of a run or a PEFT adapter: how ranks are used")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="with --redundancy: HTML page of maps to write")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, bytes and FLOPs of a configuration, without weights or data, or of a run.

    Where experts stand under a budget is shown as a map of layers and tasks. With --redundancy:
    effective rank, stable rank and likeness of ranks of what a run or a PEFT adapter has learned.
    """
    if redundancy or figure is not None:
        if overrides or tasks is not None or not redundancy:
            raise ConfigError("--redundancy goes with a folder, and --figure with --redundancy")
        show_redundancy(config, figure, as_json)
        return
    from evolora.config import read_config
    from evolora.evaluation.inspection import inspect_config, inspect_run

    if config.is_dir():
        if overrides or tasks is not None:
            raise ConfigError(f"{config} is a run, whose settings are fixed; name a YAML file")
        result = inspect_run(config)
    else:
        result = inspect_config(read_config(config, overrides or []), tasks=tasks)
    if as_json:
        print_json(result.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{result.method} on {result.backbone}, {result.tasks} tasks")
    table = Table("part", "values", title="stored after the last task")
    for part, count in result.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_row("trainable in the first task", f"{result.trainable[0]:,}")
    table.add_row("backbone (frozen)", f"{result.backbone_parameters:,}")
    console.print(table)
    for task, (count, full) in enumerate(zip(result.trainable, result.full_tuning, strict=True)):
        if full:
            saved = f"{100 * (1 - count / full):.2f} % fewer than {full:,} in full"
            console.print(f"task {task + 1} trains {count:,}, {saved}")
    for tower, counts in result.flops.items():
        share = 100 * counts["experts"] / counts["base"] if counts["base"] else 0.0
        console.print(f"{tower}: {counts['base']:,} FLOPs per row, experts add {share:.1f} %")
        step = result.training[tower]
        where = "no experts" if step.lowest is None else f"experts from block {step.lowest} on"
        console.print(
            f"  {where} ({step.depth} blocks); a training step takes {step.flops:,} FLOPs per row, "
            f"{step.flops_cached:,} with what lies below kept",
            soft_wrap=True,
        )
    if result.allocation is not None:
        console.print(result.allocation.table(), markup=False, highlight=False, soft_wrap=True)


@app.command()
def metrics(
    matrix: Annotated[Path, typer.Argument(help="CSV or .npy accuracy matrix")],
    cider: Annotated[
        list[str] | None,
        typer.Option(help="task judged by CIDEr, whose scores may exceed 100; may be repeated"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print Transfer, Avg, Last, average accuracy, BWT, FWT, forgetting and CMML's AP and FG."""
    from evolora.evaluation.matrix import read_matrix
    from evolora.evaluation.metrics import DEFINITIONS, summary

    values = summary(read_matrix(matrix, cider or ()))
    if as_json:
        print_json({"metrics": values, "definitions": DEFINITIONS})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "definition")
    for name, value in values.items():
        shown = "-" if value is None else f"{100 * value:.2f}"
        table.add_row(name, shown, DEFINITIONS.get(name, ""))
    Console().print(table)


KINDS = ("methods", "streams", "backbones", "metrics", "regularizers", "encoders", "parts")


@app.command("ls")
def list_kind(
    kind: Annotated[
        str,
        typer.Argument(
            help="methods, streams, backbones, metrics, regularizers, encoders or parts"
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List what is there."""
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    rows = _entries(kind)
    if as_json:
        print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['summary']}")


def _entries(kind: str) -> list[dict[str, str]]:
    from evolora.assets import embedded_backbones
    from evolora.registry import (
        ANSWER_METRICS,
        BACKBONES,
        ENCODERS,
        METHODS,
        PARTS,
        REGULARIZERS,
        STREAMS,
    )

    if kind == "parts":
        return [
            {"name": f"{setting}: {entry.name}", "summary": entry.summary}
            for setting, registry in PARTS.items()
            for entry in registry
        ]
    registries = (METHODS, STREAMS, BACKBONES, ANSWER_METRICS, REGULARIZERS, ENCODERS)
    registry = dict(zip(KINDS, registries, strict=False))[kind]
    rows = [{"name": entry.name, "summary": entry.summary} for entry in registry]
    if kind == "backbones":
        rows += [
            {"name": name, "summary": "embedded weights, works offline"}
            for name in embedded_backbones()
        ]
    return rows


app.add_typer(data_app, name="data")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"{', '.join(BENCHES)} or all")],
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, under 2 minutes")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="exit code 1 when a goal is missed by more than 25 %")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="transformer blocks")] = None,
    batch: Annotated[int | None, typer.Option(help="samples per batch")] = None,
    rounds: Annotated[int | None, typer.Option(help="shuffled rounds")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    wall: Annotated[bool, typer.Option("--wall", help="wall-clock, not process CPU time")] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="route: fit the dispatcher to this machine, and keep it")
    ] = False,
    seed: Annotated[int, typer.Option(help="order of rounds, weights, inputs")] = 0,
    write: Annotated[
        Path | None, typer.Option(help="Markdown page to write, e.g. docs/performance.md")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time experts against the frozen base, full fine-tuning, PEFT and loops, side by side."""
    from evolora.bench.runner import names_of

    names = names_of(name)  # a wrong name need not wait for torch
    if quick and write is not None:
        raise ConfigError("--write states the goals' own sizes; leave out --quick")
    from evolora.bench.goals import SLACK
    from evolora.bench.runner import run as run_benches
    from evolora.bench.settings import Settings
    from evolora.training.progress import Reporter, terminal_progress

    settings = Settings(
        layers=layers,
        batch=batch,
        rounds=rounds,
        dtype=dtype,
        device=device,
        quick=quick,
        wall=wall,
        seed=seed,
    )
    with terminal_progress(not quiet) as bars:
        result = run_benches(names, settings, Reporter(bars), fit=fit)
    slack = SLACK if check else 0.0
    if as_json:
        print_json(result.to_json(slack))
    else:
        from rich.console import Console

        from evolora.bench.console import print_report

        print_report(result, Console(), slack)
    if write is not None:
        from evolora.bench.page import write_page

        print(f"page: {write_page(result.results, write)}", file=sys.stderr)
    if result.interrupted:
        raise typer.Exit(130)
    if check and not all(verdict.within_slack for verdict in result.verdicts(slack)):
        raise typer.Exit(1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the machine: versions, threads, devices, embedded assets, optional packages."""
    from evolora.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            print(f"{'ok  ' if finding['ok'] else 'MISS'}  {finding['name']}: {finding['detail']}")
    if not all(finding["ok"] or finding["optional"] for finding in findings):
        raise typer.Exit(1)


def _print_runs(folders: Sequence[Path], as_json: bool) -> None:
    from evolora.report.records import RunRecord

    records = [RunRecord.load(folder) for folder in folders]
    if as_json:
        from evolora.evaluation.metrics import summary
        from evolora.report.modalities import stages_json

        print_json(
            [
                {
                    "run": str(folder),
                    "name": record.run.name,
                    "metrics": summary(record.matrix),
                    **({"stages": stages} if (stages := stages_json(record)) else {}),
                }
                for folder, record in zip(folders, records, strict=True)
            ]
        )
        return
    from rich.console import Console

    from evolora.report.modalities import stage_table
    from evolora.report.tables import summary_table

    Console().print(summary_table(records))
    if (table := stage_table(records)) is not None:
        Console().print(table)


if __name__ == "__main__":
    main()
