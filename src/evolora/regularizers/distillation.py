"""Distillation: a model answers as another one does, in all its chances, not in the best alone.

    d = sum_c q_c (log q_c - log p_c),  q = softmax(z' / T),  p = softmax(z / T)

z' are the logits of the teacher, z those that learn, T the temperature. With several labels per
sample each class is a coin of its own (sigmoids in place of softmax). No factor T^2 is applied: the
gradient is that of cross-entropy against q.

Source: Hinton et al., 2015, arXiv 1503.02531; Li & Hoiem, ECCV 2016, arXiv 1606.09282.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation(
    logits: Tensor, teacher: Tensor, *, temperature: float = 2.0, several: bool = False
) -> Tensor:
    """Return the divergence of answers from the teacher's, (...), at least 0.

    Args:
        logits: (..., c).
        teacher: (..., c); no gradient goes there.
        temperature: T, above 0; the higher, the more the improbable classes count.
        several: a sample may have several of the classes.
    """
    own, wanted = logits.float() / temperature, teacher.detach().float() / temperature
    if several:
        own, wanted = (torch.stack([each, -each], dim=-1) for each in (own, wanted))
        terms = F.logsigmoid(wanted).exp() * (F.logsigmoid(wanted) - F.logsigmoid(own))
        return terms.sum(dim=(-2, -1))
    own, wanted = own.log_softmax(dim=-1), wanted.log_softmax(dim=-1)
    return (wanted.exp() * (wanted - own)).sum(dim=-1)
