"""The matrix: filling, JSON, files that somebody else wrote, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evolora.errors import ConfigError, DataError, StorageError
from evolora.evaluation.matrix import Matrix, read_matrix

VALUES = np.array([[0.8, 0.5, 0.2], [0.6, 0.9, 0.4], [0.4, 0.7, 1.0]])


def write(tmp_path, text, name="m.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_are_filled_by_name_or_by_position():
    matrix = Matrix.empty(("a", "b", "c"))
    assert matrix.rows_done == 0
    matrix.set_row(0, {"a": 0.5, "c": 0.25}, counts={"a": 10, "c": 20})
    matrix.set_row(1, [0.1, 0.2, float("nan")])
    assert matrix.rows_done == 2
    assert matrix.counts.tolist() == [10, 0, 20]
    np.testing.assert_array_equal(matrix.values[0], [0.5, np.nan, 0.25])
    np.testing.assert_array_equal(matrix.values[1], [0.1, 0.2, np.nan])


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({"a": 1.5}, DataError, r"'a'.*1\.5; a score is in \[0, 1\]"),
        ({"a": -0.1}, DataError, r"-0\.1"),
        ({"a": float("inf")}, DataError, "inf"),
        ({"aa": 0.5}, ConfigError, "unknown task 'aa'; did you mean 'a'"),
        ([0.5, 0.5], DataError, "shape"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_changes_nothing(scores, error, message):
    matrix = Matrix.empty(("a", "b", "c"))
    with pytest.raises(error, match=message):
        matrix.set_row(0, scores)
    assert np.isnan(matrix.values).all()


def test_a_task_judged_by_cider_d_may_score_above_one_and_the_file_keeps_it(tmp_path):
    matrix = Matrix.empty(("vqa", "captions"), largest=(1, 10))
    matrix.set_row(0, {"vqa": 1.0, "captions": 1.4877})
    with pytest.raises(DataError, match=r"'captions'.* is 10\.5; a score is in \[0, 10\]"):
        matrix.set_row(1, {"captions": 10.5})
    with pytest.raises(DataError, match=r"'vqa'.* is 1\.5; a score is in \[0, 1\]"):
        matrix.set_row(1, {"vqa": 1.5})
    matrix.save(tmp_path / "matrix.json")
    again = Matrix.load(tmp_path / "matrix.json")
    np.testing.assert_array_equal(again.values, matrix.values)
    assert again.largest.tolist() == [1, 10]
    older = Matrix.empty(("a",)).to_json()
    del older["largest"]
    assert Matrix.from_json(older).largest.tolist() == [1]


@pytest.mark.parametrize("largest", [(1,), (1, 0), (1, float("nan"))])
def test_largest_scores_that_do_not_fit_are_refused(largest):
    with pytest.raises(DataError, match="largest must be 2 numbers > 0"):
        Matrix.empty(("a", "b"), largest=largest)


def test_a_row_outside_the_matrix_is_refused():
    with pytest.raises(DataError, match="row 3"):
        Matrix.empty(("a", "b", "c")).set_row(3, [0.0, 0.0, 0.0])


def test_a_matrix_keeps_its_own_copy_of_what_it_was_given():
    values = VALUES.copy()
    matrix = Matrix(tasks=("a", "b", "c"), values=values, counts=[1, 2, 3])
    values[0, 0] = 0.0
    assert matrix.values[0, 0] == 0.8


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            arrays(np.float64, (n, n), elements=st.floats(0, 1) | st.just(float("nan"))),
            st.none() | arrays(np.float64, n, elements=st.floats(0, 1)),
        )
    )
)
def test_json_keeps_every_bit(pair):
    values, baseline = pair
    names = tuple(f"task {i}" for i in range(len(values)))
    matrix = Matrix(tasks=names, values=values, counts=range(len(values)), baseline=baseline)
    text = json.dumps(matrix.to_json(), allow_nan=False)
    back = Matrix.from_json(json.loads(text))
    assert back.tasks == names
    np.testing.assert_array_equal(back.values, values)
    np.testing.assert_array_equal(back.counts, matrix.counts)
    assert (back.baseline is None) == (baseline is None)
    if baseline is not None:
        np.testing.assert_array_equal(back.baseline, baseline)


def test_save_and_load_keep_the_matrix_and_leave_no_other_file(tmp_path):
    matrix = Matrix(
        tasks=("a", "b", "c"), values=VALUES, counts=[1, 2, 3], baseline=[0.1, 0.2, 0.3]
    )
    path = tmp_path / "deep" / "matrix.json"
    matrix.save(path)
    matrix.save(path)
    back = Matrix.load(path)
    np.testing.assert_array_equal(back.values, matrix.values)
    np.testing.assert_array_equal(back.baseline, matrix.baseline)
    assert os.listdir(path.parent) == ["matrix.json"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "matrix.json"
    Matrix.empty(("old",)).save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="disk full"):
        Matrix.empty(("new",)).save(path)
    assert Matrix.load(path).tasks == ("old",)
    assert os.listdir(tmp_path) == ["matrix.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format 2"),
        ({"values": [[0.5]]}, "shape"),
        ({"values": [["x", 0.5], [0.5, 0.5]]}, "not a matrix"),
        ({"values": [[7.0, 0.5], [0.5, 0.5]]}, "7"),
        ({"tasks": ["a", "a"]}, "unique"),
        ({"counts": [-1, 2]}, "counts"),
        ({"counts": None}, "not a matrix"),
    ],
)
def test_a_corrupt_matrix_file_is_named_in_one_line(tmp_path, change, message):
    data = Matrix.empty(("a", "b")).to_json() | change
    path = write(tmp_path, json.dumps(data), "matrix.json")
    with pytest.raises(StorageError, match=message) as caught:
        Matrix.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '{"format_version": 1}'])
def test_a_truncated_matrix_file_is_refused(tmp_path, text):
    with pytest.raises(StorageError, match=r"matrix\.json"):
        Matrix.load(write(tmp_path, text, "matrix.json"))


FORMS = {
    "plain": "0.8,0.5,0.2\n0.6,0.9,0.4\n0.4,0.7,1.0\n",
    "percent": "80,50,20\n60,90,40\n40,70,100\n",
    "percent signs": "80%,50%,20%\n60%,90%,40%\n40%,70%,100%\n",
    "header": "a,b,c\n0.8,0.5,0.2\n0.6,0.9,0.4\n0.4,0.7,1.0\n",
    "header and names": "after,a,b,c\na,0.8,0.5,0.2\nb,0.6,0.9,0.4\nc,0.4,0.7,1.0\n",
    "names only": "a,0.8,0.5,0.2\nb,0.6,0.9,0.4\nc,0.4,0.7,1.0\n",
    "index with empty corner": ",a,b,c\n0,0.8,0.5,0.2\n1,0.6,0.9,0.4\n2,0.4,0.7,1.0\n",
    "index with a corner": "step,a,b,c\n1,0.8,0.5,0.2\n2,0.6,0.9,0.4\n3,0.4,0.7,1.0\n",
    "header without corner": "a,b,c\nx,0.8,0.5,0.2\ny,0.6,0.9,0.4\nz,0.4,0.7,1.0\n",
    "semicolons, decimal commas": "a;b;c\n0,8;0,5;0,2\n0,6;0,9;0,4\n0,4;0,7;1,0\n",
    "tabs": "0.8\t0.5\t0.2\n0.6\t0.9\t0.4\n0.4\t0.7\t1.0\n",
    "spaces": "  0.8  0.5 0.2\n0.6 0.9 0.4\n0.4 0.7 1.0",
    "comment, blank, BOM, CRLF": "\ufeff# x\r\n.8, .5, .2\r\n\r\n.6,.9,.4\r\n.4,.7,1\r\n",
    "quoted": '"a","b, or so","c"\n0.8,0.5,0.2\n0.6,0.9,0.4\n0.4,0.7,1.0\n',
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_table_is_read_however_it_was_written(tmp_path, form):
    matrix = read_matrix(write(tmp_path, FORMS[form]))
    np.testing.assert_allclose(matrix.values, VALUES, atol=1e-12)
    named = any(word in form for word in ("header", "names", "semicolons", "index"))
    if named:
        assert matrix.tasks == ("a", "b", "c")


def test_a_first_line_called_zero_shot_is_the_baseline(tmp_path):
    text = "after,a,b\nzero-shot,10,20\na,80,50\nb,60,90\n"
    matrix = read_matrix(write(tmp_path, text))
    np.testing.assert_allclose(matrix.baseline, [0.1, 0.2])
    np.testing.assert_allclose(matrix.values, [[0.8, 0.5], [0.6, 0.9]])
    assert matrix.tasks == ("a", "b")


def test_cells_above_the_diagonal_may_be_empty(tmp_path):
    matrix = read_matrix(write(tmp_path, "0.8,,nan\n0.6,0.9,-\n0.4,0.7,1.0\n"))
    np.testing.assert_array_equal(np.isnan(matrix.values), np.triu(np.ones((3, 3), bool), 1))


@pytest.mark.parametrize("scale", [1, 100])
def test_tasks_judged_by_cider_end_at_ten_times_the_others(tmp_path, scale):
    values = np.array([[1.5, 0.5, 0.2], [1.2, 0.9, 9.9], [10.0, 0.7, 3.0]])
    np.savetxt(tmp_path / "m.csv", scale * values, delimiter=",", fmt="%.6f")
    matrix = read_matrix(tmp_path / "m.csv", ["task 1", "task 3"])
    np.testing.assert_allclose(matrix.values, values)
    assert matrix.largest.tolist() == [10, 1, 10]
    (tmp_path / "n.csv").write_text("#CIDEr: task 1, task 3\n" + (tmp_path / "m.csv").read_text())
    np.testing.assert_allclose(read_matrix(tmp_path / "n.csv").values, values)
    (tmp_path / "n.csv").write_text("# cider: task 1\n50,50,1\n1,1,1\n1,1,150\n")
    with pytest.raises(DataError, match=r"'150' is outside 0 to 100 .*# cider: NAME"):
        read_matrix(tmp_path / "n.csv")
    matrix.save(tmp_path / "m.json")
    with pytest.raises(DataError, match=r"a matrix\.json says itself"):
        read_matrix(tmp_path / "m.json", ["task 1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.8,0.5\n0.6,abc\n", r"row 2, column 2 \(line 2\): 'abc' is not a number"),
        ("a,b\n0.8,0.5\n0.6,0.9x\n", r"row 2, column 2 \(line 3\): '0\.9x' is not a number"),
        ("x,0.5\n0.6,0.9\n", r"row 1, column 1 \(line 1\): 'x' is not a number"),
        ("0.8,0.5\ny,0.9\n", r"row 2, column 1 \(line 2\): 'y' is not a number"),
        ("0.8,0.5\n0.6\n", r"row 2, column 2 \(line 2\) is missing; this row has 1 cells, 2"),
        ("0.8,0.5\n0.6,0.7,0.9\n", r"row 2, column 3 \(line 2\): '0\.9' is one too many"),
        ("0.8,0.5,0.1\n0.6,0.7,0.9\n", "2 rows and 3 columns; a matrix is square"),
        ("0.8,0.5\n,0.9\n", r"row 2, column 1 \(line 2\): '' is not a score; .*above the diagonal"),
        ("0.8,0.5\n0.6,nan\n", r"row 2, column 2 \(line 2\): 'nan' is not a score"),
        ("80,50\n60,101\n", r"row 2, column 2 \(line 2\): '101' is outside 0 to 100 \(percent\)"),
        ("0.8,-0.5\n0.6,0.9\n", r"row 1, column 2 \(line 1\): '-0\.5' is outside 0 to 1 "),
        ("0.8,inf\n0.6,0.9\n", r"row 1, column 2 \(line 1\): 'inf' is outside"),
        ("a,b\nb,0.8,0.5\na,0.6,0.9\n", "rows are in the order b, a but columns in a, b"),
        ("a,a\n0.8,0.5\n0.6,0.9\n", "unique"),
        ("after,a,b\nzero-shot,10\na,80,50\nb,60,90\n", "baseline line has 1 cells"),
        ("zero-shot,1,200\na,80,50\nb,60,90\n", "baseline line has a cell outside"),
        ("a,b\n", "holds no numbers"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
    ],
)
def test_a_wrong_table_is_refused_with_the_cell_that_is_wrong(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read_matrix(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(b"0.5\xff\xfe,0.5\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_matrix(path)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_an_array_file_is_read_as_fraction_or_percent(tmp_path, scale):
    np.save(tmp_path / "m.npy", (VALUES * scale).astype(np.float32))
    np.testing.assert_allclose(read_matrix(tmp_path / "m.npy").values, VALUES, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, None], [2, 3]], dtype=object), "pickled objects are refused"),
        (np.array([["a", "b"], ["c", "d"]]), "numbers are needed"),
        (np.ones((2, 2), dtype=bool), "numbers are needed"),
        (np.ones(4), r"shape \(4,\)"),
        (np.ones((2, 3)), "2 rows and 3 columns"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), "row 2, column 1: 'nan' is not a score"),
        (np.array([[0.5, -3.0], [0.5, 0.5]]), "row 1, column 2: '-3' is outside"),
        (np.empty((0, 0)), "holds no numbers"),
    ],
)
def test_a_wrong_array_is_refused(tmp_path, array, message):
    np.save(tmp_path / "m.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_matrix(tmp_path / "m.npy")


def test_a_text_file_called_npy_and_a_cut_array_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"m\.npy: not a plain numeric"):
        read_matrix(write(tmp_path, "0.5,0.5", "m.npy"))
    np.save(tmp_path / "cut.npy", VALUES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cut\.npy"):
        read_matrix(tmp_path / "cut.npy")


def test_a_runs_own_file_is_read_too(tmp_path):
    Matrix(tasks=("a", "b", "c"), values=VALUES, counts=[1, 1, 1]).save(tmp_path / "matrix.json")
    np.testing.assert_array_equal(read_matrix(tmp_path / "matrix.json").values, VALUES)


def test_a_missing_file_a_folder_and_another_kind_of_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_matrix(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="no such file"):
        read_matrix(tmp_path / "folder.csv")
    with pytest.raises(DataError, match=r"got '\.npz'; did you mean '\.npy'"):
        read_matrix(tmp_path / "m.npz")
