"""Gates that follow their own certainty: unsure tokens ask all experts, sure ones a few.

    S_q(p) = (1 - sum_i p_i^q) / (q - 1) ,  S_1(p) = -sum_i p_i ln p_i        (Tsallis; Shannon)
    S_q(p) > H : gates p ;  else : the smallest prefix of sorted p of mass >= P, renormalised

Pure functions of probabilities over experts (the last axis), for any router. Source: DynMoLE,
arXiv 2504.00661.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def tsallis_entropy(probabilities: Tensor, q: float) -> Tensor:
    """Return S_q (...) of probabilities (..., e); smooth in q, Shannon's (in nats) at 1.

    Written as -sum p * ((p^(q-1) - 1) / (q - 1)), whose two differences are one ``expm1``: near
    q = 1 the textbook form loses all its digits. An expert of probability 0 adds nothing.

    Args:
        probabilities: sum to 1.
        q: above 0.
    """
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    generalized = logs if q == 1.0 else torch.expm1((q - 1.0) * logs) / (q - 1.0)
    return -(probabilities * generalized).sum(dim=-1)


def top_p_gates(probabilities: Tensor, mass: float, least: int) -> Tensor:
    """Return gates (..., e): the most probable experts that reach ``mass``, renormalised to 1.

    The expert with which the mass is reached belongs to them. Equal ones: the smaller index first.

    Args:
        probabilities: (..., e), sum to 1.
        mass: in (0, 1].
        least: so many experts are kept in any case.
    """
    values, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    reached = values.cumsum(dim=-1)
    kept = F.pad(reached[..., :-1], (1, 0)) < mass
    kept[..., :least] = True
    chosen = torch.zeros_like(kept).scatter(-1, order, kept)
    gates = probabilities * chosen
    return gates / gates.sum(dim=-1, keepdim=True)


def entropy_gates(
    probabilities: Tensor, entropy: Tensor, *, threshold: float, mass: float, least: int
) -> Tensor:
    """Return gates (..., e): all probabilities where the entropy is above the threshold, else few.

    Args:
        probabilities: (..., e).
        entropy: (...) of them.
        threshold: H; a token that reaches it exactly is routed to few.
        mass: P, see :func:`top_p_gates`.
        least: k, see :func:`top_p_gates`.
    """
    few = top_p_gates(probabilities, mass, least)
    return torch.where((entropy > threshold).unsqueeze(-1), probabilities, few)


def top_k_balance(probabilities: Tensor, k: int, real: Tensor | None = None) -> Tensor:
    """Return e * sum_i f_i P_i, 1 where experts are used evenly: the balance loss of top-k routing.

    f_i is the share of expert i among the tokens' k most probable experts (they sum to 1), P_i its
    mean probability; the gradient flows through P.

    Args:
        probabilities: (..., e).
        k: experts that count per token.
        real: (...) bool, which tokens count; None counts all. Without any, 0.
    """
    tokens = probabilities.flatten(0, -2) if real is None else probabilities[real]
    experts = probabilities.shape[-1]
    if len(tokens) == 0:
        return probabilities.sum() * 0.0
    order = torch.sort(tokens.detach(), dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(tokens).scatter(-1, order[:, :k], 1.0)
    share = chosen.mean(dim=0) / min(k, experts)
    return experts * (share * tokens.mean(dim=0)).sum()


def masked_mean(values: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the mean of values (...) over the tokens that count, (...) bool; 0 without any."""
    if real is None:
        return values.mean()
    return (values * real).sum() / real.sum().clamp_min(1)
