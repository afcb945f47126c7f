"""The slow phase: found from few patterns, the same however it is summed, and kept only if judges agree."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts, footprint_corners
from ptychodask.probes import disc_probe
from ptychodask.reassembly import Box
from ptychodask.refinement import kernels, slow_phase
from ptychodask.refinement.judges import curve_rank, is_judge, judge, judge_index
from ptychodask.refinement.slow_phase import (
    NodeGrid,
    NormalEquations,
    apply_phase,
    merge,
    node_grid,
    node_spacing_px,
    normal_equations,
    phase_on,
    refine_slow_phase,
    slow_phase_patterns,
    solve,
)
from ptychodask.scan import Scan
from ptychodask.simulate import make_positions, simulate

N = 32


def structured_probe(n_modes=1, seed=5):
    """Smooth random light, strong and weak spots and phases within it."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((N, N)) - N // 2
    noise = gaussian_filter(rng.standard_normal((2, n_modes, N, N)), (0, 0, 2, 2))
    return (noise[0] + 1j * noise[1]) * np.exp(-(y**2 + x**2) / (2 * (N / 6) ** 2))


PROBES = {"disc": "disc", "zone_plate": "zone_plate", "structured": structured_probe(), "modes": structured_probe(2)}


@pytest.fixture(scope="module")
def scan_of(tmp_path_factory):
    """Simulated scans of patterns of N x N, by their options; each made once."""
    made = {}

    def make(probe="disc", n_patterns=200, dose=1e6, step_px=4.0, path="raster"):
        key = probe, n_patterns, dose, step_px, path
        if key not in made:
            store = tmp_path_factory.mktemp("slow") / "scan.zarr"
            options = {"n_patterns": n_patterns, "dose": dose, "step_px": step_px, "path": path}
            made[key] = simulate(
                store, n_pixels=N, object="field", probe=PROBES[probe], seed=2, progress=False, **options
            )
        return made[key]

    return make


def corner_of(scan):
    return tuple(int(value) for value in scan.truth.corner_yx_px)


def slow_field(shape):
    y, x = (np.arange(size) / size for size in shape)
    return 0.7 * np.sin(7 * y[:, None] + 0.4) * np.cos(6 * x) + 0.5 * np.cos(6 * (y[:, None] + x))


def lit_part(scan):
    """The part of the truth that the positions enclose."""
    relative = scan.position_yx_px - scan.truth.corner_yx_px
    (y0, x0), (y1, x1) = np.ceil(relative.min(axis=0)).astype(int), relative.max(axis=0).astype(int)
    return slice(y0, y1), slice(x0, x1)


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def without_noise(scan, domain="counts", flux=None, mask=None):
    """A scan of exact patterns; bad pixels hold NaN."""
    truth = scan.truth
    counts = np.stack(
        [expected_counts(truth.object, truth.corner_yx_px, scan.probe, position) for position in scan.position_yx_px]
    )
    if flux is not None:
        counts = counts * flux[:, None, None]
    if mask is not None:
        counts[:, ~mask] = np.nan
    diffraction = (counts if domain == "counts" else np.sqrt(counts)).astype(np.float32)
    return replace(scan, diffraction=diffraction, domain=domain, flux=flux, mask=mask)


def some_flux(scan):
    flux = np.random.default_rng(1).uniform(0.5, 1.5, scan.n_patterns)
    return (flux / flux.mean()).astype(np.float32)


def some_mask():
    mask = np.random.default_rng(2).random((N, N)) > 0.1
    mask[N // 2, N // 2] = False
    return mask


def grid_of(scan):
    corner = footprint_corners(scan.position_yx_px, N)
    (y0, x0), (y1, x1) = corner.min(axis=0).tolist(), (corner.max(axis=0) + N).tolist()
    return node_grid(Box(y0, y1, x0, x1), node_spacing_px(scan.probe))


def blank_scan(n_patterns, step_px, path="raster", **fields):
    """Positions and probe, with patterns that nobody reads."""
    position = make_positions(path, n_patterns, step_px, np.random.default_rng(0))
    diffraction = np.broadcast_to(np.uint16(1), (n_patterns, N, N))
    probe = disc_probe(N, diameter_px=14)
    return Scan(
        diffraction=diffraction, position_yx_px=position, probe=probe, domain="counts", normalization=1.0, **fields
    )


@pytest.mark.parametrize("probe", PROBES)
def test_a_slow_phase_is_recovered(scan_of, probe):
    scan = scan_of(probe)
    truth = scan.truth.object
    added = slow_field(truth.shape)
    found = refine_slow_phase(scan, apply_phase(truth, added), corner_of(scan))
    part = lit_part(scan)
    assert found.record.kept
    assert found.record.misfit_after < 0.5 * found.record.misfit_before
    assert correlation(found.phase[part], -added[part]) >= 0.99
    np.testing.assert_array_equal(found.object, apply_phase(apply_phase(truth, added), found.phase))


@pytest.mark.parametrize("domain", ["counts", "amplitude"])
def test_flux_mask_and_modes_are_part_of_the_model(scan_of, domain):
    scan = scan_of("modes")
    scan = without_noise(scan, domain, some_flux(scan), some_mask())
    added = slow_field(scan.truth.object.shape)
    found = refine_slow_phase(scan, apply_phase(scan.truth.object, added), corner_of(scan))
    part = lit_part(scan)
    assert found.record.kept
    assert correlation(found.phase[part], -added[part]) >= 0.99


@pytest.mark.parametrize("domain", ["counts", "amplitude"])
@pytest.mark.parametrize("case", ["plain", "flux", "mask", "modes"])
def test_the_equations_are_those_of_finite_differences(scan_of, domain, case):
    scan = scan_of("modes" if case == "modes" else "structured")
    flux = some_flux(scan) if case == "flux" else None
    mask = some_mask() if case == "mask" else None
    scan = without_noise(scan, domain, flux, mask)
    object_ = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    corner, nodes, pattern = corner_of(scan), grid_of(scan), 77
    matrix, slope, _ = slow_phase._add_blocks(
        normal_equations(object_, corner, scan, nodes, np.array([pattern])), nodes
    )
    matrix = matrix.toarray()
    nodes_met = np.flatnonzero(matrix.diagonal())
    box = Box(corner[0], corner[0] + object_.shape[0], corner[1], corner[1] + object_.shape[1])
    good = np.ones((N, N), bool) if mask is None else mask

    def model(coefficients):
        phase = phase_on(box, nodes, coefficients.reshape(nodes.shape))
        turned = object_.astype(np.complex128) * np.exp(1j * phase)
        counts = expected_counts(turned, corner, scan.probe.astype(np.complex128), scan.position_yx_px[pattern])
        return np.sqrt(counts * (1 if flux is None else float(flux[pattern])))[good]

    step = 1e-4
    unit = step * np.eye(nodes.n_nodes)[nodes_met]
    jacobian = np.stack([(model(one) - model(-one)) / (2 * step) for one in unit])
    expected = model(np.zeros(nodes.n_nodes))
    measured = scan.diffraction[pattern][good].astype(np.float64)
    residual = (
        measured - expected if domain == "amplitude" else (measured - expected**2) / (2 * np.maximum(expected, 0.3))
    )
    assert len(nodes_met) >= 9
    # Single precision of the fields; a pixel without light has no derivative, which finite differences do not see.
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(matrix[np.ix_(nodes_met, nodes_met)], jacobian @ jacobian.T, atol=2e-4 * scale)
    wanted = jacobian @ residual
    np.testing.assert_allclose(slope[nodes_met], wanted, atol=1e-3 * np.abs(wanted).max())


def test_nodes_that_hardly_meet_a_pattern_hold_none_of_its_light(scan_of):
    scan = scan_of("zone_plate")
    nodes = grid_of(scan)
    block = normal_equations(scan.truth.object, corner_of(scan), scan, nodes, np.array([60])).blocks[0]
    total = (np.abs(scan.probe) ** 2).sum()
    # Shares are read at the next whole pixel, half a pixel away at most.
    assert block.illumination_sum[block.illumination_sum > 0].min() > 0.3 * slow_phase.MET_SHARE * total
    assert block.illumination_sum.sum() == pytest.approx(total, rel=0.02)


def parts_of(scan, n_parts=5):
    nodes = grid_of(scan)
    object_ = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    index = np.arange(0, scan.n_patterns, 2)
    index = index[np.argsort(curve_rank(scan, index))]
    sums = [normal_equations(object_, corner_of(scan), scan, nodes, part) for part in np.array_split(index, n_parts)]
    return nodes, sums


def test_parts_merged_in_any_order_give_the_same_bits(scan_of):
    nodes, parts = parts_of(scan_of("structured"))
    wanted = solve(merge(*parts), nodes)
    nested = merge(merge(parts[4], parts[1]), NormalEquations(), merge(parts[2], merge(parts[0], parts[3])))
    for merged in (merge(*reversed(parts)), reduce(merge, parts), nested):
        np.testing.assert_array_equal(solve(merged, nodes), wanted)


def test_other_parts_give_the_same_phase(scan_of):
    nodes, parts = parts_of(scan_of("structured"))
    wanted = solve(merge(*parts), nodes)
    for n_parts in (1, 13, 100):
        # Sums in double precision, rounded otherwise.
        np.testing.assert_allclose(solve(merge(*parts_of(scan_of("structured"), n_parts)[1]), nodes), wanted, atol=1e-9)


def test_a_part_that_is_merged_twice_is_refused(scan_of):
    _, parts = parts_of(scan_of("structured"))
    with pytest.raises(PtychodaskError, match="two parts begin with pattern"):
        merge(parts[0], merge(parts[1], parts[0]))


def test_a_patterns_share_does_not_depend_on_what_is_read_with_it(scan_of, monkeypatch):
    nodes, parts = parts_of(scan_of("structured"), 1)
    monkeypatch.setattr(kernels, "READ_BATCH", 3)
    np.testing.assert_array_equal(
        parts_of(scan_of("structured"), 1)[1][0].blocks[0].curvature, parts[0].blocks[0].curvature
    )
    monkeypatch.setattr(slow_phase, "BLOCK_VALUES", 1)
    # Lines of one pattern are summed as float32.
    np.testing.assert_allclose(
        solve(parts_of(scan_of("structured"), 1)[1][0], nodes), solve(parts[0], nodes), atol=2e-5
    )


def test_a_part_needs_only_the_object_in_its_frames(scan_of):
    scan = scan_of("structured")
    nodes, (y, x) = grid_of(scan), corner_of(scan)
    index = np.argsort(curve_rank(scan, np.arange(scan.n_patterns)))[:20]
    corner = footprint_corners(scan.position_yx_px[index], N)
    (y0, x0), (y1, x1) = corner.min(axis=0), corner.max(axis=0) + N
    piece = scan.truth.object[y0 - y : y1 - y, x0 - x : x1 - x]
    one = normal_equations(piece, (y0, x0), scan, nodes, index).blocks[0]
    other = normal_equations(scan.truth.object, (y, x), scan, nodes, index).blocks[0]
    np.testing.assert_array_equal(one.curvature, other.curvature)
    np.testing.assert_array_equal(one.slope, other.slope)


def test_conjugate_gradients_agree_with_the_direct_solve(scan_of):
    nodes, parts = parts_of(scan_of("structured"))
    direct, iterated = (solve(merge(*parts), nodes, direct_unknowns=most) for most in (10**6, 0))
    # Tolerance of the residual, times the spread of the system's eigenvalues.
    np.testing.assert_allclose(iterated, direct, atol=1e-5 * np.abs(direct).max())


def test_conjugate_gradients_that_do_not_converge_are_an_error(scan_of, monkeypatch):
    nodes, parts = parts_of(scan_of("structured"))
    monkeypatch.setattr(slow_phase, "CG_STEPS", 2)
    with pytest.raises(PtychodaskError, match="did not reach 1e-08 in 2 steps; pass slow_phase=False"):
        solve(merge(*parts), nodes, direct_unknowns=0)


def test_without_patterns_the_phase_is_zero():
    nodes = NodeGrid((0, 0), 8.0, (3, 4))
    np.testing.assert_array_equal(solve(merge(), nodes), np.zeros((3, 4)))


def test_the_mean_weighted_by_light_is_zero(scan_of):
    scan = scan_of("structured")
    nodes, parts = parts_of(scan)
    coefficients = solve(merge(*parts), nodes)
    illumination_sum = slow_phase._add_blocks(merge(*parts), nodes)[2].reshape(nodes.shape)
    assert abs((illumination_sum * coefficients).sum()) < 1e-9 * (illumination_sum * np.abs(coefficients)).sum()


def test_nodes_without_light_follow_their_neighbours(scan_of):
    nodes, parts = parts_of(scan_of("disc"))
    wide = NodeGrid((nodes.corner[0], nodes.corner[1]), nodes.spacing_px, (nodes.shape[0] + 4, nodes.shape[1] + 3))
    coefficients = solve(merge(*parts), wide)
    slope = slow_phase._add_blocks(merge(*parts), wide)[1].reshape(wide.shape)
    lit = slope != 0
    inside = tuple(slice(size) for size in nodes.shape)
    np.testing.assert_allclose(coefficients[lit], solve(merge(*parts), nodes)[lit[inside]], atol=1e-9)
    # The discrete Laplace equation has its extremes at the rim, and its rim has light.
    assert (~lit).sum() > 50
    assert coefficients[lit].min() - 1e-9 <= coefficients[~lit].min()
    assert coefficients[~lit].max() <= coefficients[lit].max() + 1e-9


@pytest.mark.parametrize("direct_unknowns", [10**6, 0])
def test_islands_are_zero_mean_each_and_do_not_act_on_each_other(scan_of, direct_unknowns):
    scan = scan_of("structured")
    far_px = 400
    nodes = node_grid(Box(-200, 200, -200, 200 + far_px), node_spacing_px(scan.probe))
    moved = replace(scan, position_yx_px=scan.position_yx_px + np.array([0.0, far_px]))
    index = np.arange(0, scan.n_patterns, 2)
    here = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    # A constant between islands, and another phase in the second.
    there = apply_phase(scan.truth.object, 1.5 + 0.5 * slow_field(scan.truth.object.shape)[::-1])
    y, x = corner_of(scan)
    one = normal_equations(here, (y, x), scan, nodes, index)
    other = normal_equations(there, (y, x + far_px), moved, nodes, index)
    both = merge(one, NormalEquations((replace(other.blocks[0], order=1),)))
    together, alone = (solve(each, nodes, direct_unknowns=direct_unknowns) for each in (both, one))
    met = one.blocks[0].illumination_sum > 0
    first = one.blocks[0].first
    island = tuple(slice(first[axis], first[axis] + met.shape[axis]) for axis in (0, 1))
    # The regulariser's scale is the mean of both islands, hence not the same to the last digit.
    np.testing.assert_allclose(together[island][met], alone[island][met], atol=1e-3 * np.ptp(alone))
    for block in both.blocks:
        part = tuple(
            slice(block.first[axis], block.first[axis] + block.illumination_sum.shape[axis]) for axis in (0, 1)
        )
        assert (
            abs((block.illumination_sum * together[part]).sum())
            < 1e-6 * (block.illumination_sum * np.abs(together[part])).sum()
        )
    added = 0.5 * slow_field(scan.truth.object.shape)[::-1]
    (y0, y1), (x0, x1) = (part.indices(10**9)[:2] for part in lit_part(scan))
    phase = phase_on(Box(y + y0, y + y1, x + x0 + far_px, x + x1 + far_px), nodes, together)
    assert correlation(phase, -added[lit_part(scan)]) > 0.98


def test_the_phase_of_a_tile_is_that_of_the_whole_to_the_last_bit():
    nodes = NodeGrid((-7, 3), 5.37, (9, 7))
    coefficients = np.random.default_rng(0).standard_normal(nodes.shape)
    whole = phase_on(Box(-7, 36, 3, 35), nodes, coefficients)
    for y0, y1, x0, x1 in ((-7, 0, 3, 35), (0, 1, 4, 35), (5, 36, 17, 18), (-3, 30, 8, 31)):
        tile = phase_on(Box(y0, y1, x0, x1), nodes, coefficients)
        np.testing.assert_array_equal(tile, whole[y0 + 7 : y1 + 7, x0 - 3 : x1 - 3])


def test_the_phase_is_the_sum_of_hats():
    nodes = NodeGrid((2, -3), 4.6, (4, 5))
    coefficients = np.random.default_rng(0).standard_normal(nodes.shape)
    box = Box(2, 2 + 13, -3, -3 + 18)
    hats = []
    for axis, pixels in enumerate((np.arange(box.y0, box.y1), np.arange(box.x0, box.x1))):
        at = nodes.coordinate_px(axis, np.arange(nodes.shape[axis]))
        hats.append(np.maximum(1 - np.abs(pixels - at[:, None]) / nodes.spacing_px, 0))
    wanted = np.einsum("ij,iy,jx->yx", coefficients, *hats)
    np.testing.assert_allclose(phase_on(box, nodes, coefficients), wanted, atol=1e-12)


def test_the_spacing_is_a_quarter_of_the_frame_or_the_probes_rms_diameter():
    # A uniform disc of diameter d has the rms diameter d/√2.
    assert node_spacing_px(disc_probe(64, diameter_px=16)) == pytest.approx(16 / np.sqrt(2), rel=0.03)
    assert node_spacing_px(disc_probe(64, diameter_px=60)) == 16


def test_a_step_that_does_not_help_is_rejected(scan_of):
    scan = scan_of("structured", dose=300)
    found = refine_slow_phase(scan, scan.truth.object, corner_of(scan))
    assert not found.record.kept
    assert "less than 0.0001 of itself lower" in found.record.reason
    assert found.object is scan.truth.object
    assert not found.phase.any()
    assert found.record.misfit_after > (1 - 1e-4) * found.record.misfit_before


def test_few_patterns_have_no_judges_and_all_take_part(scan_of):
    scan = scan_of("disc", n_patterns=63)
    added = slow_field(scan.truth.object.shape)
    found = refine_slow_phase(scan, apply_phase(scan.truth.object, added), corner_of(scan))
    assert (found.record.n_judges, found.record.n_patterns, found.record.kept) == (0, 63, True)
    assert found.record.misfit_before is found.record.misfit_after is None
    assert found.record.reason == "63 patterns are too few to judge by"
    assert correlation(found.phase[lit_part(scan)], -added[lit_part(scan)]) > 0.98


def test_parts_of_the_convenience_do_not_matter(scan_of):
    scan = scan_of("disc")
    object_ = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    one, other = (refine_slow_phase(scan, object_, corner_of(scan), part_patterns=size) for size in (500, 11))
    np.testing.assert_allclose(one.phase, other.phase, atol=1e-9)


def test_unseen_pixels_stay_unseen_and_transmit_nothing(scan_of):
    scan = scan_of("disc")
    (y, x), shape = corner_of(scan), scan.truth.object.shape
    object_ = apply_phase(scan.truth.object, slow_field(shape))
    hole = np.zeros(shape, bool)
    hole[shape[0] // 2 :, : shape[1] // 3] = True
    holed, dark = np.where(hole, np.complex64(np.nan), object_), np.where(hole, np.complex64(0), object_)
    found, wanted = (refine_slow_phase(scan, each, (y, x)) for each in (holed, dark))
    np.testing.assert_array_equal(np.isnan(found.object), hole)
    np.testing.assert_array_equal(found.phase, wanted.phase)
    assert np.isfinite(found.phase).all()
    assert found.record == wanted.record


def test_frames_may_reach_beyond_the_object(scan_of):
    scan = scan_of("disc")
    y, x = corner_of(scan)
    object_ = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    found = refine_slow_phase(scan, object_[8:-9, 7:-8], (y + 8, x + 7))
    assert found.object.shape == object_[8:-9, 7:-8].shape
    assert found.record.kept


def test_judges_are_ranks_along_the_curve_of_each_experiment():
    experiment = np.repeat([0, 1, 2], [200, 60, 100])
    scan = blank_scan(360, 4.0, scan_index=experiment)
    index = np.arange(360)
    rank, judges = curve_rank(scan, index), judge_index(scan, index)
    for one, size in ((0, 200), (1, 60), (2, 100)):
        np.testing.assert_array_equal(np.sort(rank[experiment == one]), np.arange(size))
    np.testing.assert_array_equal(judges, np.flatnonzero((rank % 16 == 8) & (experiment != 1)))
    half = index[::2]
    assert set(judge_index(scan, half)) <= set(half)
    np.testing.assert_array_equal(is_judge(scan, half), np.isin(half, judge_index(scan, half)))


@pytest.mark.parametrize(
    ("n_patterns", "step_px", "share"), [(4000, 2.0, 8), (1500, 2.0, 4), (700, 2.0, 2), (700, 7.0, 1), (50, 2.0, 1)]
)
def test_the_smallest_share_that_covers_the_nodes_takes_part(n_patterns, step_px, share):
    scan = blank_scan(n_patterns, step_px)
    nodes, index = grid_of(scan), np.arange(n_patterns)
    chosen = slow_phase_patterns(scan, nodes, index)
    rank = curve_rank(scan, index)
    judges = judge_index(scan, index)
    wanted = index[rank % share == share // 2] if share > 1 else np.setdiff1d(index, judges)
    np.testing.assert_array_equal(np.sort(chosen), wanted)
    assert (np.diff(rank[chosen]) > 0).all()
    assert not np.isin(chosen, judges).any()
    if share > 1:
        met, _ = slow_phase._meetings(scan, nodes, chosen)
        _, illumination_sum = slow_phase._meetings(scan, nodes, np.setdiff1d(index, judges))
        assert len(chosen) >= 256
        assert met[illumination_sum >= 0.25 * np.median(illumination_sum[illumination_sum > 0])].min() >= 3


def test_patterns_of_several_experiments_are_refused():
    scan = blank_scan(100, 4.0, scan_index=np.arange(100) % 2)
    with pytest.raises(PtychodaskError, match="needs the patterns of one experiment, found 2; pass index= of one"):
        refine_slow_phase(scan, np.ones((99, 99), np.complex64), (-50, -50))


@pytest.mark.parametrize("domain", ["counts", "amplitude"])
def test_the_misfit_is_that_of_its_formula_and_adds_up(scan_of, domain):
    scan = scan_of("modes")
    scan = without_noise(scan, domain, some_flux(scan), some_mask())
    corner, good = corner_of(scan), scan.mask
    object_ = apply_phase(scan.truth.object, slow_field(scan.truth.object.shape))
    index = np.array([3, 50, 51, 120])
    wanted = 0.0
    for j in index:
        expected = scan.flux[j] * expected_counts(object_, corner, scan.probe, scan.position_yx_px[j])[good]
        measured = scan.diffraction[j][good].astype(np.float64)
        if domain == "amplitude":
            wanted += ((measured - np.sqrt(expected)) ** 2).sum()
        else:
            expected = np.maximum(expected.astype(np.float64), 1e-3)
            wanted += 2 * (measured * np.log(measured / expected) - measured + expected).sum()
    found = judge(object_, corner, scan, index).misfit
    assert found == pytest.approx(wanted, rel=1e-4)
    parts = judge(object_, corner, scan, index[:1]) + judge(object_, corner, scan, index[1:])
    assert parts.misfit == pytest.approx(found)
    # Rounding is left, and what counts below the least model counts give.
    assert judge(scan.truth.object, corner, scan, index).misfit < 2e-3 * len(index) * N * N


def test_patterns_without_photons_have_a_finite_misfit(scan_of):
    scan = scan_of("disc")
    empty = replace(scan, diffraction=np.zeros((scan.n_patterns, N, N), np.uint16))
    corner, index = corner_of(scan), np.arange(2)
    assert np.isfinite(judge(scan.truth.object, corner, empty, index).misfit)
    assert judge(0 * scan.truth.object, corner, empty, index).misfit == pytest.approx(2 * 1e-3 * 2 * N * N)
