"""Objects on objects: found to a fraction of a pixel, whatever the gauge, the shapes and what is unseen."""

from __future__ import annotations

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.forward import shift_probe
from ptychodask.judging.registration import find_corner, on_whole_pixels, seen_box
from ptychodask.simulate import crossing_lines, random_field, siemens_star

NAN = np.complex64(complex(np.nan, np.nan))

OBJECTS = {
    "lines": lambda: crossing_lines((160, 160), np.random.default_rng(1)),
    "field": lambda: random_field((160, 160), np.random.default_rng(1)),
    "star": lambda: siemens_star((160, 160)),
    "phase": lambda: np.exp(1j * np.angle(crossing_lines((160, 160), np.random.default_rng(2)))),
}


def part_of(reference, corner, shape, *, phase=0.0, ramp=0.0, noise=0.0):
    """A part whose pixel [0, 0] lies at `corner` of the reference, in another gauge and with noise."""
    whole, fraction = np.divmod(corner, 1)
    moved = shift_probe(reference, (-fraction[0], -fraction[1]))
    y, x = (int(value) for value in whole)
    part = moved[y : y + shape[0], x : x + shape[1]]
    rows, columns = np.indices(shape)
    rng = np.random.default_rng(5)
    scatter = noise * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)
    return (part * np.exp(1j * (phase + ramp * (rows - 0.5 * columns))) + scatter).astype(np.complex64)


@pytest.mark.parametrize("corner", [(20.0, 37.0), (20.3, 36.55), (11.5, 40.17)])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_part_is_found_on_the_whole(name, corner):
    reference = OBJECTS[name]()
    found = find_corner(part_of(reference, corner, (100, 90), phase=2.0, ramp=0.03), reference)
    # A star has edges that are sharper than pixels, which no shift meets exactly.
    np.testing.assert_allclose(found, corner, atol=0.06 if name == "star" else 0.02)


def test_unseen_pixels_do_not_matter():
    reference = OBJECTS["lines"]()
    part = part_of(reference, (20.25, 36.5), (100, 90))
    part[:8], part[40:60, :30] = NAN, NAN
    hidden = reference.copy()
    hidden[:, 120:] = NAN
    np.testing.assert_allclose(find_corner(part, hidden), (20.25, 36.5), atol=0.02)


def test_noise_and_a_ramp_cost_little():
    reference = OBJECTS["lines"]()
    part = part_of(reference, (20.25, 36.5), (100, 90), phase=-1.0, ramp=0.08, noise=0.1)
    np.testing.assert_allclose(find_corner(part, reference), (20.25, 36.5), atol=0.15)


@pytest.mark.parametrize("corner", [(-30.0, 12.5), (50.25, -30.0)])
def test_objects_that_overlap_in_part_are_found(corner):
    world = random_field((300, 300), np.random.default_rng(4))
    reference = world[80:200, 80:200]
    part = part_of(world, (corner[0] + 80, corner[1] + 80), (110, 120))
    np.testing.assert_allclose(find_corner(part, reference), corner, atol=0.02)


def test_a_start_saves_the_search():
    reference = OBJECTS["star"]()
    part = part_of(reference, (20.3, 36.55), (100, 90))
    np.testing.assert_allclose(find_corner(part, reference, start_yx_px=(22.0, 35.0)), (20.3, 36.55), atol=0.06)


def test_what_does_not_match_is_refused():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 70)) + 1j * rng.normal(size=(60, 70))
    with pytest.raises(PtychodaskError, match=r"at the best shift the correlation of the two objects is 0\.\d\d, exp"):
        find_corner(noise, OBJECTS["field"]())
    with pytest.raises(PtychodaskError, match=r"the shift still changes by \d\.\d px after 5 steps"):
        find_corner(crossing_lines((60, 70), np.random.default_rng(8)), OBJECTS["field"]())
    with pytest.raises(PtychodaskError, match="one of the objects has no seen pixel, so they cannot be registered"):
        find_corner(np.full((50, 60), NAN), OBJECTS["field"]())
    with pytest.raises(PtychodaskError, match="with this start_yx_px the objects do not overlap"):
        find_corner(OBJECTS["star"](), OBJECTS["star"](), start_yx_px=(500.0, 0.0))


def test_moving_onto_whole_pixels_keeps_the_object():
    field = random_field((64, 64), np.random.default_rng(3))
    moved, corner = on_whole_pixels(shift_probe(field, (0.25, -0.5)), (-0.25, 7.5))
    assert (moved.shape, corner) == ((63, 63), (0, 8))
    np.testing.assert_allclose(moved[8:56, 8:56], field[8:56, 9:57][:, :48], atol=2e-3)


def test_what_lies_on_whole_pixels_stays_as_it_is():
    field = random_field((16, 20), np.random.default_rng(3))
    same, corner = on_whole_pixels(field, (-3.0, 2.0 + 1e-9))
    assert corner == (-3, 2)
    np.testing.assert_array_equal(same, field)


def test_a_moved_pixel_is_seen_where_both_that_it_lies_between_are():
    field = random_field((12, 12), np.random.default_rng(3))
    field[4, 5] = NAN
    moved, _ = on_whole_pixels(field, (0.5, 0.0))
    assert np.argwhere(np.isnan(moved)).tolist() == [[3, 5], [4, 5]]


def test_a_box_holds_all_that_is_seen():
    seen = np.zeros((6, 8), bool)
    seen[2, 3] = seen[4, 6] = True
    assert seen_box(seen) == (slice(2, 5), slice(3, 7))
    with pytest.raises(PtychodaskError, match="no pixel is seen in both"):
        seen_box(np.zeros((3, 3), bool))
