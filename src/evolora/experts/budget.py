"""Budgets of experts: which sites get one, and what experts cost a training step.

Sites compete inside their tower by score; towers share the budget B by mass, S_M = sum of scores:

    next site: the best one left in the tower M with the largest  S_M / (used_M + cost / 2)

For sites of equal cost this is Sainte-Lague's rule: with two towers, B_M = round(B S_M / S), halves
to the tower that is named first. A floor is filled before anything else, a tower with fewer sites
than its share leaves the rest to the others, and one may get nothing; so no scores can break it.

    cost of a step = parameters + price * (depth - lowest)

A parameter of an expert costs three multiply-adds per token (forward, gradient of its input and of
itself), a parameter of a frozen block that gradients pass through costs one, or two where a prefix
cache would have spared its forward as well. So the price of a block, in parameters of experts, is a
third (or two thirds) of its own parameters. Half the layers spread out cost nearly as much as all
of them; the same number on top does not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from evolora.errors import ConfigError, unknown_name

TIE_SEED = 42
CLOSE = 1e-9
"""Towers whose turn it is by less than this share are level: sums of scores round."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What may get experts: a site, or a block with all of its sites.

    Args:
        name: unique.
        tower: where it competes.
        score: importance, at least 0.
        cost: what it takes of the budget, at least 1.
    """

    name: str
    tower: str
    score: float
    cost: int = 1


def choose_experts(
    candidates: Sequence[Candidate],
    budget: int,
    *,
    curriculum: bool = True,
    floors: Mapping[str, float] | None = None,
    tie_seed: int = TIE_SEED,
) -> list[str]:
    """Return the names of the candidates that get experts, in the order they were given.

    With equal costs exactly ``budget`` are chosen (or all, if there are fewer), and in every tower
    those of the highest scores. With others the chosen ones cost at most ``budget``, and none that
    is left would still fit.

    Args:
        candidates: sites or blocks; towers take turns in the order in which they appear.
        budget: sum of the costs.
        curriculum: towers share by their sums of scores; False: by the costs of their candidates.
        floors: tower -> share of the budget, in [0, 1], that it gets whatever its scores. Rounded
            down where costs are equal; a tower never gets more than it has candidates.
        tie_seed: of candidates with the same score, the first of
            ``numpy.random.RandomState(tie_seed).permutation`` win, in each tower anew.

    Raises:
        ConfigError: a score that is no number from 0, an unknown tower, or floors above 1.
    """
    floors = floors or {}
    towers = list(dict.fromkeys(candidate.tower for candidate in candidates))
    _check(candidates, towers, floors)
    own = {tower: [c for c in candidates if c.tower == tower] for tower in towers}
    mass = {tower: sum(c.score for c in own[tower]) for tower in towers}
    if not curriculum or not any(mass.values()):
        mass = {tower: float(sum(c.cost for c in own[tower])) for tower in towers}
    waiting = {tower: deque(_ranked(own[tower], tie_seed)) for tower in towers}
    used = dict.fromkeys(towers, 0)
    chosen: set[str] = set()

    def take(tower: str) -> None:
        best = waiting[tower].popleft()
        used[tower] += best.cost
        chosen.add(best.name)

    def fits(tower: str) -> bool:
        left = budget - sum(used.values())
        while waiting[tower] and waiting[tower][0].cost > left:
            waiting[tower].popleft()  # what does not fit now never will
        return bool(waiting[tower])

    for tower, share in floors.items():
        floor = math.floor(share * budget + CLOSE)
        while used[tower] < floor and fits(tower):
            take(tower)
    while able := [tower for tower in towers if fits(tower)]:
        turn = {t: mass[t] / (used[t] + waiting[t][0].cost / 2) for t in able}
        largest = max(turn.values())
        take(next(t for t in able if math.isclose(turn[t], largest, rel_tol=CLOSE)))
    return [candidate.name for candidate in candidates if candidate.name in chosen]


def _ranked(candidates: Sequence[Candidate], tie_seed: int) -> list[Candidate]:
    """Return candidates by falling score, those of one score in the drawn order."""
    ordered = sorted(candidates, key=lambda candidate: -candidate.score)
    ranked: list[Candidate] = []
    for _, group in groupby(ordered, key=lambda candidate: candidate.score):
        level = list(group)
        draw = np.random.RandomState(tie_seed).permutation(len(level))
        ranked += [level[place] for place in draw]
    return ranked


def _check(
    candidates: Sequence[Candidate], towers: Sequence[str], floors: Mapping[str, float]
) -> None:
    for candidate in candidates:
        if not 0.0 <= candidate.score < math.inf:
            raise ConfigError(
                f"the score of {candidate.name!r} is {candidate.score}; scores are finite numbers "
                "from 0"
            )
    for tower in floors:
        if tower not in towers:
            raise unknown_name("tower in floors", tower, towers)
    check_floors(floors)


def check_floors(floors: Mapping[str, float]) -> None:
    """Refuse shares outside [0, 1] and floors that leave nothing to share: more than all."""
    for tower, share in floors.items():
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"floors[{tower!r}] must be in [0, 1]; got {share}")
    if sum(floors.values()) > 1.0 + CLOSE:
        raise ConfigError(f"floors must not exceed 1 together; got {dict(floors)}")


def depth_price(block_parameters: int, *, cached: bool = False) -> float:
    """Return what a block that gradients pass through costs, in parameters of experts.

    Args:
        block_parameters: parameters of a frozen block.
        cached: whether activations below the lowest expert are kept.
    """
    return block_parameters * (2 if cached else 1) / 3


def allocation_cost(parameters: int, lowest: int | None, depth: int, price: float) -> float:
    """Return the cost of a tower's experts, in parameters.

    Args:
        parameters: of all experts that train in the tower.
        lowest: lowest block with an expert; None if there is none.
        depth: blocks of the tower.
        price: of each block from the lowest on, see :func:`depth_price`.
    """
    return parameters + price * (0 if lowest is None else depth - lowest)
