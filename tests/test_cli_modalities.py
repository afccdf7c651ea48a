"""`evolora predict` and `Learner.predict` about any modality: what works, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.backbones.qformers import saved_qformer

from evolora.cli import main
from evolora.errors import DataError
from evolora.learner import Learner

CONFIG = """
backbone:
  name_or_path: {folder}/model
  modalities:
    video: {{encoder: vision, frames: 3}}
    audio: {{encoder: features, width: 20, tokens: 3, frames: 2}}
    pc: {{encoder: features, width: 12, tokens: 1}}
    depth: {{encoder: vision, frames: 2}}
stream: {{name: mcl, root: {folder}/data, order: [image, video, audio, pc], max_new_tokens: 3}}
method: {{type: pathweave, r: 2}}
training:
  {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-2, warmup_steps: 0,
   augment: false, label_smoothing_factor: 0}}
"""
QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, files of its modalities, and the run that learned all but depth."""
    place = tmp_path_factory.mktemp("user")
    saved_qformer(place / "model")
    draw = np.random.default_rng(0)
    for number in range(3):
        Image.new("RGB", (12, 12), (90 * number, 0, 200)).save(place / f"{number}.png")
        np.save(place / f"a{number}.npy", draw.normal(size=(2, 3, 20)).astype(np.float32))
        np.save(place / f"p{number}.npy", draw.normal(size=(1, 1, 12)).astype(np.float32))
    files: dict[str, Any] = {
        "image": ["../../0.png", "../../1.png"],
        "video": [["../../0.png", "../../1.png"], ["../../2.png"]],
        "audio": ["../../a0.npy", "../../a1.npy"],
        "pc": ["../../p0.npy", "../../p1.npy"],
    }
    for modality, names in files.items():
        rows = [{modality: one, "question": QUESTION, "answer": "red dot"} for one in names]
        (place / "data" / modality).mkdir(parents=True)
        for split in ("train", "test"):
            (place / "data" / modality / f"{split}.json").write_text(json.dumps(rows))
    (place / "config.yaml").write_text(CONFIG.format(folder=place))
    assert call("run", str(place / "config.yaml"), "--out", str(place / "run"), "--quiet") == 0
    return place


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert call("predict", str(folder / "run"), *words, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    capsys.readouterr()
    assert call("predict", str(folder / "run"), *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    return said.err


def test_each_modality_is_answered_on_its_own_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, cloud, picture = (str(folder / name) for name in ("a2.npy", "p2.npy", "2.png"))
    frames = f"{picture},{folder / '0.png'}"
    given = {"audio": sound, "points": cloud, "image": picture, "video": frames}
    for option, file in given.items():
        (found,) = asked(capsys, folder, f"--{option}", file, QUESTION)
        name = "pc" if option == "points" else option
        task = "base" if name == "image" else name
        assert found["file"] == file and found["task"] == task and found["score"] is None
        assert found["used"] == [name, "text"] and isinstance(found["label"], str)
    (plain,) = asked(capsys, folder, picture, QUESTION)
    assert plain == asked(capsys, folder, "--image", picture, "--text", QUESTION)[0]
    (own,) = asked(capsys, folder, "--input", f"audio={sound}", QUESTION)
    assert own == asked(capsys, folder, "--audio", sound, QUESTION)[0]
    assert call("predict", str(folder / "run"), "--audio", sound, QUESTION) == 0
    assert capsys.readouterr().out.endswith("by audio from audio and text\n")


def test_two_modalities_are_one_input_and_a_repeated_one_is_several(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds, cloud = [str(folder / f"a{i}.npy") for i in (0, 1)], str(folder / "p0.npy")
    words = ("--audio", sounds[0], "--audio", sounds[1], "--points", cloud, QUESTION)
    found = asked(capsys, folder, *words)
    assert [one["file"] for one in found] == [f"{sound}, {cloud}" for sound in sounds]
    assert all(one["used"] == ["audio", "pc", "text"] for one in found)
    assert all(one["task"] == "pc" for one in found)
    frames = ",".join(str(folder / f"{number}.png") for number in (0, 1, 2))
    (moving,) = asked(capsys, folder, "--video", frames, QUESTION)
    assert moving["used"] == ["video", "text"]


def test_both_soft_prompts_are_read_each_on_its_own_path(folder: Path) -> None:
    learner = Learner.from_pretrained(folder / "run")
    audio, cloud = str(folder / "a0.npy"), str(folder / "p0.npy")
    method = learner.method
    prompts: list[int | None] = []
    layer = method.layers["qformer/0/attention/query"]
    handle = layer.register_forward_pre_hook(lambda _, args: prompts.append(args[2].uniform))
    answers = learner.predict(texts=QUESTION, audio=audio, pc=cloud)
    handle.remove()
    assert method.paths == ["video", "audio", "pc"] and prompts == [1, 2]
    assert [answer.used for answer in answers] == [("audio", "pc", "text")]
    several = learner.predict(texts=QUESTION, audio=[audio, None], pc=[cloud, cloud])
    assert [answer.used for answer in several] == [("audio", "pc", "text"), ("pc", "text")]
    assert several[0].label == answers[0].label


def test_faults_are_one_line_that_says_what_is_known(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, picture = str(folder / "a0.npy"), str(folder / "0.png")
    for words, said in (
        (("--depth", picture, QUESTION), "has not learned depth; it knows image, video, audio, pc"),
        (
            ("--input", f"thermal={sound}", QUESTION),
            "this model sees no thermal, only image, video",
        ),
        (("--input", "thermal", QUESTION), "--input takes NAME=FILE"),
        (("--audio", sound), f"what is asked about {sound}? Give the question last"),
        ((QUESTION,), "there is nothing to be asked about: give a file"),
        (("--audio", picture, QUESTION), picture),
        (("--video", sound, QUESTION), f"{Path(sound).name} is an array; video takes videos"),
        (("--image", sound, QUESTION), sound),
        (("--audio", sound, "gone.png"), "no file 'gone.png'"),
        (("--audio", sound, "what", QUESTION), "no file 'what'; one question is asked at a time"),
        (("--audio", str(folder / "gone.npy"), QUESTION), "gone.npy"),
        (
            ("--audio", sound, "--audio", sound, *("--image", picture) * 3, QUESTION),
            "2 files of audio and 3 of another modality",
        ),
    ):
        assert said in refused(capsys, folder, *words), words


def test_python_refuses_what_the_command_line_refuses(folder: Path) -> None:
    learner = Learner.from_pretrained(folder / "run")
    sound = str(folder / "a0.npy")
    with pytest.raises(DataError, match="has not learned depth; it knows image, video, audio, pc"):
        learner.predict(texts=QUESTION, depth=str(folder / "0.png"))
    with pytest.raises(DataError, match="this model sees no sound, only image, video, audio"):
        learner.predict(texts=QUESTION, sound=sound)
    with pytest.raises(DataError, match="no question was given beside audio"):
        learner.predict(audio=sound)
    with pytest.raises(DataError, match=r"2 audios and 3 pcs were given"):
        learner.predict(texts=QUESTION, audio=[sound] * 2, pc=[None] * 3)


def test_a_run_is_tested_again_from_its_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("eval", str(folder / "run"), "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((folder / "run" / "matrix.json").read_text())["values"][-1]
    assert [one["score"] for one in found.values()] == last
    assert [*found["audio"]["routes"]] == ["audio"] and [*found["image"]["routes"]] == ["base"]
