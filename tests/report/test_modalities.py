"""The report's table of continual learning of modalities."""

from __future__ import annotations

import json
import re

import numpy as np

from evolora.evaluation.matrix import Matrix
from evolora.report import RunRecord, write_report

STAGES = ("image", "video", "audio")


def test_each_stage_shows_what_it_learned_and_lost(make_run, tmp_path):
    folder = make_run("lora", tasks=STAGES)
    values = np.array([[60, 0, 0], [58, 40, 0], [54, 39, 30]]) / 100
    Matrix(tasks=STAGES, values=values, counts=np.array([9, 9, 9])).save(folder / "matrix.json")
    plain = write_report([RunRecord.load(folder)], tmp_path / "a.html").read_text()
    assert "Modality after modality" not in plain
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "backbone": {"type": "qformer"}}))
    page = write_report([RunRecord.load(folder)], tmp_path / "b.html").read_text()
    part = page[page.index("Modality after modality") :]
    row = part[part.index("<tbody>") : part.index("</tbody>")]
    cells = [re.sub("<[^>]+>", "", one) for one in re.findall(r"<td.*?</td>", row)]
    assert cells == ["lora", "40.0", "2.0", "30.0", "3.5"]
