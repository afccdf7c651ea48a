"""Grounding: a box written as text is right if it overlaps enough with the box of a person.

Source: the accuracy of RefCOCO (Yu et al., ECCV 2016, arXiv 1608.00272) and SK-VG: intersection
over union of at least 0.5. Boxes are x1, y1, x2, y2; answer and reference in the same units.
D-MoLE's code reads an answer below 4 in sum as fractions of the image, any other as thousandths.
"""

from __future__ import annotations

import re

from evolora.errors import DataError
from evolora.evaluation.answers.contract import References, per_sample

ENOUGH = 0.5

Box = tuple[float, float, float, float]

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"{_NUMBER}\s*,\s*{_NUMBER}\s*\)?\s*,\s*\(?\s*{_NUMBER}\s*,\s*{_NUMBER}")


def read_box(text: str) -> Box | None:
    """Return the first box in a text, "[[x1, y1, x2, y2]]" or "(x1,y1),(x2,y2)", or None."""
    found = _BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def overlap(one: Box, other: Box) -> float:
    """Return intersection over union in [0, 1]; 0 for boxes without area (or turned over)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(other) - shared)


@per_sample("iou-accuracy", summary="grounding: the box overlaps by at least half (IoU >= 0.5)")
def iou_accuracy(prediction: str, references: References) -> float:
    """Return 1 if the first box of the text overlaps with a reference's, 0 also without a box.

    Raises:
        DataError: a reference holds no box.
    """
    accepted = [_reference_box(text) for text in references]
    given = read_box(prediction)
    return float(given is not None and any(overlap(given, one) >= ENOUGH for one in accepted))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _reference_box(text: str) -> Box:
    box = read_box(text)
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(f"a reference must hold a box, [x1, y1, x2, y2]; got {text!r}")
    return box
