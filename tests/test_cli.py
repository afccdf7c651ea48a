"""The command line, driven as a user drives it: in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def evolora(
    *words: str, cwd: Path | None = None, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evolora", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, evolora.cli as c\n"
        "try:\n    c.main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in (
        "demo",
        "run",
        "eval",
        "predict",
        "report",
        "inspect",
        "metrics",
        "bench",
        "ls",
        "data",
        "doctor",
    ):
        assert verb in done.stdout


@pytest.mark.parametrize(
    "kind", ["methods", "streams", "backbones", "metrics", "regularizers", "encoders"]
)
def test_ls_json_is_a_list_of_names_and_summaries(kind: str) -> None:
    rows = json.loads(evolora("ls", kind, "--json").stdout)
    assert rows and all(set(row) == {"name", "summary"} and row["summary"] for row in rows)
    names = {row["name"] for row in rows}
    expected = {
        "methods": {
            "moe-adapters",
            "zero-shot",
            "linear-probe",
            "full-finetuning",
            "sequential-lora",
        },
        "streams": {
            *("mosaic/domains", "mosaic/missing", "mtil", "class-incremental", "folder", "csv"),
            *("image-text", "upmc-food101-cmml", "mm-imdb-cmml", "conversations", "mcl"),
            *("cmit", "coin", "ucit"),
        },
        "backbones": {
            *("dual-encoder", "vilt", "image-text", "qformer"),
            *("clip-tiny", "vilt-tiny", "llava-tiny", "qformer-tiny"),
        },
        "metrics": {"cider-d", "exact-match", "vqa-accuracy"},
        "regularizers": {"resora"},
        "encoders": {"vision", "features"},
    }[kind]
    assert expected <= names


def test_inspect_counts_the_published_model() -> None:
    found = json.loads(
        evolora("inspect", "configs/moe_adapters/mtil.yaml", "--json", cwd=ROOT).stdout
    )
    assert found["parameters"]["experts"] == 43_625_472
    assert found["parameters"]["gates_and_noise"] == 7_434_240
    assert found["totals"]["adapters_and_routers"] == 51_059_712
    assert found["totals"]["autoencoder"] == 8_696_164
    assert found["backbone_parameters"] == 149_620_737
    assert sum(site["parameters"] for site in found["sites"]) == 51_059_712


def test_inspect_counts_the_class_incremental_model() -> None:
    words = ("inspect", "configs/moe_adapters/class_incremental.yaml", "--json")
    found = json.loads(evolora(*words, cwd=ROOT).stdout)
    assert found["totals"]["adapters_and_routers"] == 4_027_392 == found["trainable"][0]


def test_inspect_counts_the_baseline_of_instruction_tuning() -> None:
    words = ("inspect", "configs/sequential_lora/cmit.yaml", "--json")
    found = json.loads(evolora(*words, cwd=ROOT).stdout)
    assert found["tasks"] == 9 and set(found["trainable"]) == {5_505_024}


def test_inspect_counts_d_mole_on_its_benchmark() -> None:
    found = json.loads(evolora("inspect", "configs/d_mole/cmit.yaml", "--json", cwd=ROOT).stdout)
    assert found["totals"]["autoencoder"] == 789_632
    assert found["parameters"]["autoencoders"] == 9 * 789_632
    for task, trainable in zip(found["allocation"]["tasks"], found["trainable"], strict=True):
        blocks = {name.rpartition(".")[0] for name in task["experts"]}
        language = sum(block.startswith("language") for block in blocks)
        assert len(blocks) == 24
        assert trainable == 789_632 + 3_145_728 + 196_608 * language  # 5,505,024 where it is 12


def test_metrics_of_a_csv_and_an_npy(tmp_path: Path) -> None:
    matrix = np.array([[0.5, 0.4], [0.3, 0.9]])
    np.save(tmp_path / "m.npy", matrix)
    (tmp_path / "m.csv").write_text("50,40\n30,90\n")
    for name in ("m.npy", "m.csv"):
        values = json.loads(evolora("metrics", str(tmp_path / name), "--json").stdout)["metrics"]
        assert values["transfer"] == pytest.approx(0.40)
        assert values["avg"] == pytest.approx((0.4 + 0.65) / 2)
        assert values["last"] == pytest.approx(0.60)
        assert values["bwt"] == pytest.approx(-0.2)
        assert values["cmml_fg"] == pytest.approx(0.2) and values["cmml_last"] == 0.9


def test_metrics_of_the_golden_matrix_of_instruction_tuning(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("80 50 30\n70 90 40\n60 85 95\n")
    found = json.loads(evolora("metrics", str(tmp_path / "m.txt"), "--json").stdout)
    names = ("last", "bwt", "bwt_over_all", "average_incremental_accuracy", "avg", "avg_seen")
    golden = (80.0, -12.5, -8.333, 80.0, 66.667, 84.167)
    for name, value in zip(names, golden, strict=True):
        assert 100 * found["metrics"][name] == pytest.approx(value, abs=5e-4)
    assert "MAA" in found["definitions"]["average_incremental_accuracy"]
    assert "avg_all" in found["definitions"]["avg"]
    table = evolora("metrics", str(tmp_path / "m.txt")).stdout
    assert "84.17" in table and "-8.33" in table


def test_metrics_of_a_table_with_cider_above_100(tmp_path: Path) -> None:
    rows = "caption,question\n151.36,20\n148.77,60.5\n"
    (tmp_path / "m.csv").write_text(rows)
    words = ("metrics", str(tmp_path / "m.csv"), "--json")
    found = json.loads(evolora(*words, "--cider", "caption").stdout)["metrics"]
    assert found["last"] == pytest.approx((1.4877 + 0.605) / 2)
    assert found["bwt"] == pytest.approx(-0.0259)
    refused = evolora(*words)
    assert refused.returncode == 2 and "'151.36' is outside 0 to 100 (percent)" in refused.stderr
    assert "CIDEr ends at 1000" in refused.stderr
    misspelt = evolora(*words, "--cider", "captain")
    assert misspelt.returncode == 2 and "did you mean 'caption'" in misspelt.stderr
    (tmp_path / "m.csv").write_text("# cider: caption\n" + rows)
    assert json.loads(evolora(*words).stdout)["metrics"] == found


def test_data_missing_writes_a_manifest_that_a_stream_takes(tmp_path: Path) -> None:
    from evolora.config import load_stream

    rows = [f"words {row},{'ab'[row % 2]},{'train' if row < 13 else 'test'}" for row in range(23)]
    for row in range(23):
        Image.new("RGB", (2, 2), (row, 0, 0)).save(tmp_path / f"{row}.png")
    lines = [f"{row}.png,{text}" for row, text in enumerate(rows)]
    (tmp_path / "own.csv").write_text("image,text,label,split\n" + "\n".join(lines))
    words = ("data", "missing", "own.csv", "--out", "m.json", "--set", "val_fraction=0")
    more = ("--per-split", "test.kind=text", "--per-split", "test.rate=0.5")
    found = json.loads(evolora(*words, *more, "--json", cwd=tmp_path).stdout)
    train, test = (found["counts"]["own"][split] for split in ("train", "test"))
    assert train == {"samples": 13, "complete": 4, "text_missing": 5, "image_missing": 4}
    assert test == {"samples": 10, "complete": 5, "text_missing": 5, "image_missing": 0}
    stream = load_stream(
        "image-text",
        path=str(tmp_path / "own.csv"),
        val_fraction=0,
        missing=str(tmp_path / "m.json"),
    )
    assert stream.tasks[0].train.codes.count(2) == 4

    before = (tmp_path / "m.json").read_text()
    refused = evolora(*words, cwd=tmp_path)
    assert refused.returncode == 2 and "m.json is there already" in refused.stderr
    assert (tmp_path / "m.json").read_text() == before
    done = evolora(*words, "--overwrite", "--rate", "0", cwd=tmp_path)
    assert done.returncode == 0 and "image missing" in done.stdout and "m.json" in done.stdout
    assert json.loads((tmp_path / "m.json").read_text())["counts"]["own"]["train"]["complete"] == 13


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("run", "no-such.yaml"), "no configuration file"),
        (("ls", "method"), "did you mean 'methods'"),
        (("predict", "nowhere", "x.png"), "no run or artefact at nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("metrics", "nowhere.csv"), "nowhere.csv"),
        (("demo", "--methods", "moe-adapter"), "did you mean 'moe-adapters'"),
        (("data", "build", "mosaic/domain"), "did you mean 'mosaic/domains'"),
        (("data", "missing", "x.csv", "--out", "m.json"), "no such file: x.csv"),
        (("data", "missing", "mtl", "--out", "m.json"), "did you mean 'mtil'"),
        (("data", "missing", "mtil", "--out", "m.json", "--rate", "7"), "got 7.0"),
        (("data", "missing", "mosaic/domains", "--out", "m.json"), "has only image"),
        (("data", "build", "mosaic/mising"), "did you mean 'mosaic/missing'"),
    ],
)
def test_a_users_fault_is_one_line_and_exit_code_2(
    words: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    done = evolora(*words, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and hint in lines[0]
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = evolora("--debug", "run", "no-such.yaml", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_ctrl_c_says_how_to_go_on() -> None:
    code = (
        "import os, signal, time, evolora.doctor, evolora.cli\n"
        # A shell starts its background jobs with the interrupt ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stop = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(30))\n"
        "evolora.doctor.examine = stop\n"
        "evolora.cli.main(['doctor'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


def test_doctor_finds_what_is_embedded() -> None:
    done = evolora("doctor", "--json")
    findings = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0 and findings["embedded assets"]["ok"]
