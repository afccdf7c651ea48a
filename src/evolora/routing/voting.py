"""Votes for tasks: from errors under thresholds to at most two tasks, per row or per batch.

    C_i = {k : e_ik < tau_k} ;  v_i = argmin over C_i of e_ik, or nobody

The rule of D-MoLE (ICML 2025, arXiv 2506.11672), whose authors' code lets the rows of a batch elect
the tasks of all of them: rows that vote for nobody do not count, the task with the most votes
answers (of equals the first), and a second one joins it from a share of 0.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolora.routing.route import BASE

SHARE = 0.3
"""Of the valid votes, from which a task joins another in a batch (the authors')."""


def ballots(errors: Tensor, passing: Tensor) -> Tensor:
    """Return the vote (b,) of each row: the task of the least error (b, t) that passes, or BASE."""
    if errors.shape[1] == 0:
        return torch.full((len(errors),), BASE, device=errors.device)
    votes = errors.masked_fill(~passing, torch.inf).argmin(dim=1)
    return votes.masked_fill(~passing.any(dim=1), BASE)


def elected(votes: Tensor, share: float = SHARE) -> list[int]:
    """Return the tasks elected by votes (b,), the first of them and whoever joins it; maybe none.

    Args:
        votes: a task of each row, or BASE.
        share: of the valid votes, that the second needs.
    """
    counts = torch.bincount(votes[votes != BASE]).tolist()
    valid = sum(counts)
    ranked = sorted((task for task, count in enumerate(counts) if count), key=lambda t: -counts[t])
    return ranked[:1] + [task for task in ranked[1:2] if counts[task] >= share * valid]


def elected_helper(votes: Tensor, share: float = SHARE) -> int:
    """Return who helps a task that is known: the elected one if its share suffices, or BASE."""
    valid = votes[votes != BASE]
    first = elected(votes, share)
    enough = first and int((valid == first[0]).sum()) >= share * len(valid)
    return first[0] if enough else BASE
