"""Runs benches by name; an interruption keeps what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evolora.bench import BENCHES
from evolora.bench.goals import Verdict, judge
from evolora.bench.results import Result
from evolora.errors import ConfigError, unknown_name
from evolora.training.progress import Reporter

if TYPE_CHECKING:
    from evolora.bench.session import Session
    from evolora.bench.settings import Settings


@dataclass
class Report:
    """Results of the benches that ran, and whether they were interrupted."""

    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self, slack: float = 0.0) -> dict[str, Any]:
        """Return JSON values: results, and the goals that they measured."""
        goals = [
            {
                "goal": verdict.goal.key,
                "what": verdict.goal.what,
                "bound": verdict.goal.bound,
                "measured": verdict.value,
                "met": verdict.met,
                "within_slack": verdict.within_slack,
            }
            for verdict in self.verdicts(slack)
        ]
        results = [result.to_json() for result in self.results]
        return {"results": results, "goals": goals, "interrupted": self.interrupted}

    def verdicts(self, slack: float = 0.0) -> list[Verdict]:
        """Return the goals that were measured and whether each was met."""
        return judge({k: v for result in self.results for k, v in result.measured.items()}, slack)


def names_of(bench: str) -> list[str]:
    """Return the benches that a name stands for; "all" stands for every one.

    Raises:
        ConfigError: there is no such bench.
    """
    if bench == "all":
        return list(BENCHES)
    if bench not in BENCHES:
        raise unknown_name("bench", bench, [*BENCHES, "all"])
    return [bench]


def run(
    names: Sequence[str],
    settings: Settings,
    reporter: Reporter | None = None,
    *,
    fit: bool = False,
) -> Report:
    """Run benches one after another.

    Args:
        names: of benches.
        settings: of all of them.
        reporter: shows progress.
        fit: let "route" fit the dispatcher's thresholds to this machine and keep them.

    Raises:
        ConfigError: ``fit`` without the bench "route".
    """
    if fit and "route" not in names:
        raise ConfigError(f"--fit is for bench 'route'; got {', '.join(names)}")
    from evolora.bench.session import Session

    report = Report()
    for name in names:
        session = Session(name, settings, reporter)
        report.results.append(session.result)
        try:
            with session.running():
                _measure(name, session, fit)
        except KeyboardInterrupt:
            report.interrupted = True
            break
    return report


def _measure(name: str, session: Session, fit: bool) -> None:
    from evolora.bench import data, growth, layer, pairs, resora, route, serve, tower, train

    if name == "route":
        route.measure(session, fit=fit)
        return
    modules = {
        "tower": tower,
        "layer": layer,
        "train": train,
        "serve": serve,
        "pairs": pairs,
        "growth": growth,
        "resora": resora,
        "data": data,
    }
    modules[name].measure(session)
