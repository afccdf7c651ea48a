"""Rules of the mosaic build that can be checked without any download."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evolora.errors import DataError
from evolora.streams.mosaic import build_domains, drawings, families, render, sources
from evolora.streams.mosaic.samples import Sample, shape_facts


def _sample(name: str, split: str, family: str = "a") -> Sample:
    return Sample(name, split, family, lambda: Image.new("RGB", (64, 64)))


def test_wide_pictures_are_padded_with_white_and_not_stretched() -> None:
    padded = np.asarray(render.pad_to_square(Image.new("RGB", (40, 20), "red"), 64))
    assert (padded[:15] == 255).all() and (padded[-15:] == 255).all()
    assert (padded[20:44] == [255, 0, 0]).all()


def test_transparent_pixels_become_white() -> None:
    assert (np.asarray(render.pad_to_square(Image.new("RGBA", (8, 8)), 8)) == 255).all()


def test_sizes_with_units_and_no_view_box_become_a_square_view_box() -> None:
    text = '<!DOCTYPE svg PUBLIC "x" "y"><svg width="30mm" height="10mm"><path/></svg>'
    squared = render.square_svg(text)
    assert 'viewBox="0 -10 30 30"' in squared
    assert "DOCTYPE" not in squared and "mm" not in squared


def test_stroke_width_survives_the_size_fix() -> None:
    squared = render.square_svg('<svg viewBox="0 0 4 4" stroke-width="2"><path/></svg>')
    assert 'stroke-width="2"' in squared


def test_a_file_without_svg_element_is_refused() -> None:
    with pytest.raises(DataError, match="no <svg>"):
        render.square_svg("<html></html>")


def test_icon_svg_uses_the_sets_size_where_the_icon_has_none() -> None:
    icons = {"width": 24, "height": 24, "icons": {"x": {"body": "<path/>", "height": 12}}}
    assert 'viewBox="0 0 24 12"' in render.icon_svg(icons, "x")


def test_resvg_draws_a_wide_drawing_centered() -> None:
    pytest.importorskip("resvg_py")
    drawing = '<svg viewBox="0 0 20 10"><rect width="20" height="10" fill="#00f"/></svg>'
    drawn = np.asarray(
        render.render_svg(drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"'))
    )
    assert drawn.shape == (64, 64, 3)
    assert (drawn[2] == 255).all() and (drawn[32, 32] == [0, 0, 255]).all()


CUBE = "\n".join(
    [f"v {x} {y} {z}" for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    + [
        "usemtl red",
        "f 1 2 4 3",
        "f 5 7 8 6",
        "f 1 5 6 2",
        "f 3 4 8 7",
        "f 1 3 7 5",
        "f -7 -3 -1 -5",
    ]
)


def test_polygons_are_split_into_triangles_with_their_material() -> None:
    mesh = render.parse_obj(CUBE, {"red": (1, 0, 0)})
    assert mesh.triangles.shape == (12, 3, 3)
    assert (mesh.colors == [1, 0, 0]).all()


def test_a_rendered_cube_has_no_pinholes() -> None:
    picture = np.asarray(render.render_mesh(render.parse_obj(CUBE, {"red": (1, 0, 0)}), yaw=0.5))
    paper = (picture == 255).all(axis=2)
    for row in paper:
        drawn = np.flatnonzero(~row)
        if len(drawn):
            assert not row[drawn[0] : drawn[-1] + 1].any()
    assert 0.3 < 1 - paper.mean() < 0.9


def test_nearer_faces_hide_farther_ones() -> None:
    text = "v -1 -1 0\nv 1 -1 0\nv 0 1 0\nv -1 -1 1\nv 1 -1 1\nv 0 1 1\n"
    text += "usemtl far\nf 1 2 3\nusemtl near\nf 4 5 6\n"
    mesh = render.parse_obj(text, {"far": (1, 0, 0), "near": (0, 1, 0)})
    center = np.asarray(render.render_mesh(mesh, yaw=0, pitch=0))[32, 32]
    assert center[1] > center[0]


def test_an_obj_without_faces_is_refused() -> None:
    with pytest.raises(DataError, match="no faces"):
        render.parse_obj("v 0 0 0", {})


def test_classes_need_two_train_and_one_test_picture() -> None:
    samples = [_sample("good", s) for s in ("train", "train", "test")]
    samples += [_sample("few", s) for s in ("train", "test")]
    samples += [_sample("untested", s) for s in ("train", "train", "val")]
    assert {s.name for s in build_domains.keep_usable(samples)} == {"good"}


def test_the_cap_takes_turns_among_classes_then_families() -> None:
    samples = [_sample("big", "train", "a") for _ in range(50)]
    samples += [_sample("big", "train", "b"), _sample("small", "train", "a")]
    chosen = build_domains.balanced(samples, 3, "seed")
    assert sorted((s.name, s.family) for s in chosen) == [
        ("big", "a"),
        ("big", "b"),
        ("small", "a"),
    ]
    assert chosen == build_domains.balanced(samples, 3, "seed")


def test_no_cap_keeps_everything_in_a_seeded_order() -> None:
    samples = [_sample(str(i), "train") for i in range(20)]
    kept = build_domains.balanced(samples, None, "a")
    assert sorted(s.name for s in kept) == sorted(s.name for s in samples)
    assert kept != build_domains.balanced(samples, None, "b")


@pytest.mark.parametrize(
    "table", [families.EMOJI_SPLITS, families.FLAG_SPLITS, families.ICON_SPLITS]
)
def test_no_vendor_family_is_on_two_sides(table: dict[str, tuple[str, ...]]) -> None:
    sides = [{families.family_of(prefix) for prefix in group} for group in table.values()]
    assert len(set.union(*sides)) == sum(map(len, sides))


def test_pretraining_families_of_emoji_and_flags_are_not_in_the_stream() -> None:
    for table, own in (
        (families.EMOJI_SPLITS, families.EMOJI_PRETRAIN),
        (families.FLAG_SPLITS, families.FLAG_PRETRAIN),
    ):
        used = {families.family_of(p) for group in table.values() for p in group}
        assert not used & {families.family_of(p) for p in own}


@pytest.mark.parametrize(
    ("prefix", "family"),
    [
        ("mdi-light", "material"),
        ("fa6-solid", "font-awesome"),
        ("streamline-ultimate-color", "streamline"),
        ("heroicons-solid", "heroicons"),
        ("tabler", "tabler"),
    ],
)
def test_sibling_sets_share_a_family(prefix: str, family: str) -> None:
    assert families.family_of(prefix) == family


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("bell-outline-24", "bell"),
        ("baseline-arrow-left", "arrow-left"),
        ("bold", "bold"),
        ("text-bold", "text-bold"),
        ("eye-off", "eye-off"),
    ],
)
def test_style_words_are_taken_off_icon_names(key: str, name: str) -> None:
    assert families.icon_base_name(key) == name


def test_letters_of_a_script_never_cross_splits() -> None:
    letters = [chr(0x3B1 + i) for i in range(24)]
    parts = families.split_letters(letters, 1)
    assert sorted(letter for part in parts.values() for letter in part) == letters
    assert [len(parts[split]) for split in ("train", "val", "test")] == [14, 4, 6]


@pytest.mark.parametrize(
    ("question", "answer", "facts"),
    [
        ("what color is the circle?", "red", {"circle", "red"}),
        ("is there a teal shape?", "no", set()),
        ("is there not a teal shape?", "no", {"teal"}),
        ("does the image contain a triangle?", "yes", {"triangle"}),
        ("is no yellow shape present?", "yes", set()),
    ],
)
def test_questions_prove_colors_and_shapes(question: str, answer: str, facts: set[str]) -> None:
    assert shape_facts(question, answer) == facts


def test_country_spellings_of_vendors_agree() -> None:
    keys = {drawings.country_key(k) for k in ("Antigua & Barbuda", "flag-for-antigua-and-barbuda")}
    assert len(keys) == 1
    assert drawings.country_key("Åland Islands") == drawings.country_key("flag-aland-islands")


def test_encoding_is_lossless() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for pixels in (noise, np.zeros_like(noise)):
        data = build_domains.encode(Image.fromarray(pixels))
        assert (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == pixels).all()


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"@iconify/json.*'npm'"):
        sources.fetch("iconify", tmp_path)


def test_an_unpacked_source_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "iconify").mkdir()
    assert sources.fetch("iconify", tmp_path) == tmp_path / "iconify"


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="iconify"):
        sources.fetch("nothing", tmp_path)
