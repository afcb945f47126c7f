"""Coarse Gauss-Newton solve for the slowly varying part of the phase.

A pattern fixes the slow part of the phase only through a small shift, so that networks and sweeps are weak there; with
the fine detail known it is a linear least-squares problem with few unknowns. The phase is φ = Σ_k a_k B_k with bilinear
hats B_k on a grid of nodes. Each part of the patterns adds JᵀJ and Jᵀr of its own patterns to small blocks of the grid
(`normal_equations`), blocks are collected in any way (`merge`), added in one order and solved once (`solve`), and each
tile is multiplied by its piece of the phase (`phase_on`). Patterns that had no part in it judge the step (`judge`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, cg, splu

from ptychodask.errors import PtychodaskError
from ptychodask.forward import footprint_corners
from ptychodask.probes import probe_centroid_px, squared_modulus
from ptychodask.reassembly import Box
from ptychodask.refinement.judges import LEAST_FALL, Judgement, curve_rank, is_better, is_judge, judge, judge_index
from ptychodask.refinement.kernels import READ_BATCH, ExitWaves, amplitude_derivative, model_amplitude, under_hats
from ptychodask.scan import Scan

logger = logging.getLogger(__name__)

SHARES = (8, 4, 2)
"""Shares of the patterns to try, one in so many, smallest first; all of them last."""

LEAST_PATTERNS = 256
"""Patterns that a share must take."""

LEAST_MEETINGS = 3
"""Chosen patterns that each lit node must meet."""

MET_SHARE = 1e-3
"""Share of a pattern's light within a hat from which the pattern meets the node, and counts in its equation."""

LIT_SHARE = 0.25
"""Light of a lit node, relative to the median of the nodes with any."""

REGULARISATION = 1e-3
"""Weight λ of the squared differences between neighbouring nodes, relative to the mean diagonal of JᵀJ."""

TINY = 1e-8
"""Weight of the squared coefficients, relative to the mean diagonal: it fixes the constant, which no pattern does."""

DARK_AMPLITUDE = 0.3
"""Least model amplitude, square root of photons, that a residual of counts is divided by."""

DIRECT_UNKNOWNS = 20_000
"""Unknowns up to which a system is factorised; larger ones are solved by conjugate gradients."""

CG_TOLERANCE = 1e-8
"""Norm of the residual, relative to that of the right side, at which conjugate gradients stop."""

CG_STEPS = 2000
"""Most steps of conjugate gradients."""

ROW_BLOCK = 1 << 14
"""Nodes whose neighbours' numbers are in memory at a time."""

COARSENING = 8
"""Nodes along an axis for each node of the preconditioner's coarse grid."""

LEAST_SPACING_PX = 1.0
"""Least distance of nodes, pixels: a narrower hat meets no pixel."""

BLOCK_VALUES = 1 << 16
"""Far-field values of all nodes and modes of a pattern that are in memory at a time, or those of one line."""

PART_PATTERNS = 512
"""Patterns in a part of `refine_slow_phase`."""

MEETING_BATCH = 1 << 14
"""Patterns whose light on nodes is counted at a time."""


class NotConvergedError(PtychodaskError):
    """The equations of a slow phase were not solved to the tolerance."""


@dataclass(frozen=True)
class NodeGrid:
    """Nodes of the slow phase: a regular grid over the object.

    Examples
    --------
    >>> NodeGrid((-3, 0), 2.5, (3, 2)).coordinate_px(0, np.arange(3)).tolist()
    [-3.0, -0.5, 2.0]
    """

    corner: tuple[int, int]
    """Coordinates (y, x) of node [0, 0] in the scan's frame, pixels."""

    spacing_px: float
    """Distance of neighbouring nodes along an axis, pixels."""

    shape: tuple[int, int]
    """Nodes (y, x)."""

    @property
    def n_nodes(self) -> int:
        """Nodes in it."""
        return self.shape[0] * self.shape[1]

    def coordinate_px(self, axis: int, node: NDArray[np.int64]) -> NDArray[np.float64]:
        """Coordinates of nodes, on the grid or off, along an axis, pixels."""
        return self.corner[axis] + self.spacing_px * node.astype(np.float64)


def node_spacing_px(probe: NDArray[np.complex64]) -> float:
    """Distance of nodes that suits a probe.

    Parameters
    ----------
    probe : complex64 array (mode, N, N)

    Returns
    -------
    float
        min(N/4, rms diameter of the intensity), pixels; `LEAST_SPACING_PX` or more. The rms diameter is twice the
        root-mean-square distance of the light from its centroid.

    Examples
    --------
    >>> y, x = np.indices((64, 64)) - 32
    >>> round(node_spacing_px((np.hypot(y, x) < 8).astype(np.complex64)[None]), 1)
    11.1
    """
    intensity_share = squared_modulus(probe).sum(axis=0, dtype=np.float64)
    intensity_share /= intensity_share.sum()
    y, x = np.indices(intensity_share.shape) - probe_centroid_px(probe)[:, None, None]
    diameter = 2 * np.sqrt((intensity_share * (y**2 + x**2)).sum())
    return float(max(min(probe.shape[-1] / 4, diameter), LEAST_SPACING_PX))


def node_grid(box: Box, spacing_px: float) -> NodeGrid:
    """Grid of nodes whose hats cover a box.

    Parameters
    ----------
    box : Box
        Holds the object and the frames of all patterns that take part.
    spacing_px : float
        See `node_spacing_px`.

    Returns
    -------
    NodeGrid
        From the first pixel of the box on; two nodes or more along each axis.

    Examples
    --------
    >>> node_grid(Box(0, 17, -4, 14), 8.0)
    NodeGrid(corner=(0, -4), spacing_px=8.0, shape=(3, 4))
    """
    ny, nx = (max(int(np.ceil((size - 1) / spacing_px)) + 1, 2) for size in box.shape)
    return NodeGrid(box.corner, float(spacing_px), (ny, nx))


@dataclass(frozen=True, eq=False)
class _HatIllumination:
    """Share of a probe's light within a hat at each whole pixel."""

    share: NDArray[np.float64]
    """Shares (v, u); those below `MET_SHARE` at the edges cut off."""

    first: NDArray[np.int64]
    """Pixel (y, x) of share [0, 0], from the frame's first."""

    window: tuple[int, int]
    """Nodes (y, x) that one pattern reaches, at most."""


def _hat_illumination(probe: NDArray[np.complex64], spacing_px: float) -> _HatIllumination:
    """Table of a probe's light within hats around its frame."""
    n_pixels = probe.shape[-1]
    margin = int(np.ceil(spacing_px))
    lit = squared_modulus(probe).sum(axis=0, dtype=np.float64)
    hat = _hats(np.arange(-margin, n_pixels + margin), spacing_px, n_pixels)
    share = hat @ (lit / lit.sum()) @ hat.T
    bounds = [np.flatnonzero((share >= MET_SHARE).any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]
    (y0, y1), (x0, x1) = bounds
    # A node counts by the share at the whole pixel next to it, hence half a pixel more at either end.
    wy, wx = (int((last - first + 1) / spacing_px) + 1 for first, last in bounds)
    return _HatIllumination(share[y0 : y1 + 1, x0 : x1 + 1], np.array([y0, x0]) - margin, (wy, wx))


def _hats(node_px: NDArray[Any], spacing_px: float, n_pixels: int) -> NDArray[np.float64]:
    """Hats along an axis (node, N); `node_px` counts from the first pixel."""
    return np.maximum(1 - np.abs(np.arange(n_pixels) - node_px[:, None]) / spacing_px, 0)


def _nodes_reached(
    nodes: NodeGrid, hat_illumination: _HatIllumination, frame_corner: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Nodes around each pattern, and the share of its light on them.

    The first node (k, 2) of a window, and the shares within it (k, wy, wx): 0 off the grid.
    """
    first = np.empty_like(frame_corner)
    pixel = []
    for axis, size in enumerate(hat_illumination.window):
        start = frame_corner[:, axis] + hat_illumination.first[axis] - nodes.corner[axis]
        first[:, axis] = np.ceil((start - 0.5) / nodes.spacing_px)
        node = first[:, axis, None] + np.arange(size)
        near = np.rint(nodes.spacing_px * node - start[:, None]).astype(np.int64)
        outside = (near < 0) | (near >= hat_illumination.share.shape[axis]) | (node < 0) | (node >= nodes.shape[axis])
        pixel.append(np.where(outside, -1, near))
    y, x = pixel[0][:, :, None], pixel[1][:, None, :]
    return first, np.where((y < 0) | (x < 0), 0.0, hat_illumination.share[y, x])


def slow_phase_patterns(scan: Scan, nodes: NodeGrid, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Patterns whose equations are summed: the smallest share that covers the nodes.

    Parameters
    ----------
    scan : Scan
    nodes : NodeGrid
    index : int64 array (k,)
        Patterns of one experiment (or of one half of it).

    Returns
    -------
    int64 array
        In the order of the curve, no judges. Ranks along the curve of one in eight, four or two, else all: the smallest
        share of `LEAST_PATTERNS` or more in which every lit node meets `LEAST_MEETINGS` or more.

    Notes
    -----
    A pattern meets a node if the node's hat holds `MET_SHARE` of its light. A node is lit if its hat holds
    `LIT_SHARE` of the median of nodes that any pattern meets: nodes at the rim, which even all patterns hardly light,
    do not decide.
    """
    rank = curve_rank(scan, index)
    order = np.argsort(rank)
    index, rank = index[order], rank[order]
    free = ~is_judge(scan, index)
    met, illumination_sum = _meetings(scan, nodes, index[free])
    if not met.any():
        return index[free]
    lit = illumination_sum >= LIT_SHARE * np.median(illumination_sum[met > 0])
    for share in SHARES:
        # These ranks differ from those of the judges, and from share to share.
        chosen = index[free & (rank % share == share // 2)]
        if len(chosen) >= LEAST_PATTERNS and _meetings(scan, nodes, chosen)[0][lit].min() >= LEAST_MEETINGS:
            return chosen
    return index[free]


def _meetings(scan: Scan, nodes: NodeGrid, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Patterns that meet each node (y, x), and their light there, summed."""
    met, illumination_sum = np.zeros(nodes.n_nodes, np.int64), np.zeros(nodes.n_nodes)
    hat_illumination = _hat_illumination(scan.probe, nodes.spacing_px)
    for start in range(0, len(index), MEETING_BATCH):
        corner = footprint_corners(scan.position_yx_px[index[start : start + MEETING_BATCH]], scan.n_pixels)
        first, share = _nodes_reached(nodes, hat_illumination, corner)
        pattern, y, x = np.nonzero(share >= MET_SHARE)
        flat = (first[pattern, 0] + y) * nodes.shape[1] + first[pattern, 1] + x
        met += np.bincount(flat, minlength=nodes.n_nodes)
        illumination_sum += np.bincount(flat, share[pattern, y, x], minlength=nodes.n_nodes)
    return met.reshape(nodes.shape), illumination_sum.reshape(nodes.shape)


@dataclass(frozen=True, eq=False)
class EquationBlock:
    """Sums over the patterns of one part, on nodes around them."""

    order: int
    """First pattern of the part; blocks are added in this order."""

    first: tuple[int, int]
    """Node (y, x) of the grid that element [0, 0] belongs to; it may be off the grid, and the sums there are 0."""

    curvature: NDArray[np.float64]
    """JᵀJ (y, x, dy, dx) of each node with the nodes around it, itself in the middle of the last two axes."""

    slope: NDArray[np.float64]
    """Jᵀr (y, x)."""

    illumination_sum: NDArray[np.float64]
    """Σ |P|² within each hat (y, x)."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Normal equations of the slow phase, in blocks that `solve` adds."""

    blocks: tuple[EquationBlock, ...] = ()
    """In ascending order, each once."""


def merge(*equations: NormalEquations) -> NormalEquations:
    """Normal equations of several parts of the patterns together.

    Parameters
    ----------
    *equations : NormalEquations
        Of parts that share no pattern.

    Returns
    -------
    NormalEquations
        The same for any order and nesting of merges, to the last bit: blocks are collected, and added when solved.

    Raises
    ------
    PtychodaskError
        If two parts begin with the same pattern.
    """
    blocks = sorted((block for one in equations for block in one.blocks), key=lambda block: block.order)
    for block, after in pairwise(blocks):
        if block.order == after.order:
            raise PtychodaskError(
                f"slow phase: two parts begin with pattern {block.order}, expected each pattern once; merge parts once"
            )
    return NormalEquations(tuple(blocks))


def normal_equations(
    object_: NDArray[np.complex64], corner: tuple[int, int], scan: Scan, nodes: NodeGrid, index: NDArray[np.int64]
) -> NormalEquations:
    """Sums JᵀJ and Jᵀr of some patterns, linearised around an object.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Holds the whole frame at each of these positions; NaN counts as 0, a pixel that transmits nothing.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    scan : Scan
    nodes : NodeGrid
        Covers the frames.
    index : int64 array (k,)
        Patterns of the part; some of them are in memory at a time.

    Returns
    -------
    NormalEquations
        Of one block, or of none without patterns.

    Notes
    -----
    Gauss-Newton for the amplitude M = √μ of a pattern (J. Nocedal and S. Wright, Numerical Optimization, 2nd ed.,
    section 10.3). With exit waves ψ_m, far fields Ψ_m = Fψ_m and the pattern's flux f: μ = f Σ_m |Ψ_m|² and
    J_k = ∂M/∂a_k = √f Σ_m Re(Ψ_m* F[i B_k ψ_m]) / (Σ_m |Ψ_m|²)^½ on good pixels. The residual r is √n − M for
    amplitudes and (n − μ)/(2 max(M, 0.3)) for counts, which keeps its mean where photons are few.
    """
    if not len(index):
        return NormalEquations()
    n_pixels = scan.n_pixels
    position = scan.position_yx_px[index]
    frame_corner = footprint_corners(position, n_pixels)
    first, share = _nodes_reached(nodes, _hat_illumination(scan.probe, nodes.spacing_px), frame_corner)
    window = np.array(share.shape[1:])
    low = first.min(axis=0)
    shape = first.max(axis=0) + window - low
    curvature = np.zeros((*shape, *(2 * window - 1)))
    slope, illumination_sum = np.zeros(shape), np.zeros(shape)
    illumination = float(squared_modulus(scan.probe).sum(dtype=np.float64))
    waves = ExitWaves(np.where(np.isfinite(object_), object_, np.complex64(0)), corner, scan, index)
    for rows, measured in waves.batches():
        exit_waves = waves.of(rows, waves.shifted_probes(rows))
        directions, models = _far_fields(waves, rows, exit_waves)
        residuals = _residual(scan, measured, models)
        for number, j in enumerate(range(rows.start, rows.stop)):
            hat_y, hat_x = (
                _hats(nodes.coordinate_px(axis, first[j, axis] + np.arange(size)) - start, nodes.spacing_px, n_pixels)
                for axis, (size, start) in enumerate(zip(window, frame_corner[j], strict=True))
            )
            y, x = np.nonzero(share[j] >= MET_SHARE)
            products = _products(exit_waves[number], directions[number], residuals[number], (hat_y, hat_x), (y, x))
            row, column = y + first[j, 0] - low[0], x + first[j, 1] - low[1]
            near = y - y[:, None] + window[0] - 1, x - x[:, None] + window[1] - 1
            curvature[row[:, None], column[:, None], *near] += products[0]
            slope[row, column] += products[1]
            illumination_sum[row, column] += illumination * share[j, y, x]
    block = EquationBlock(int(index[0]), (int(low[0]), int(low[1])), curvature, slope, illumination_sum)
    return NormalEquations((block,))


def _far_fields(
    waves: ExitWaves, rows: slice, exit_waves: NDArray[np.complex64]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Derivatives of amplitudes by their far fields, and the amplitudes.

    The first, Ψ_m √f / (Σ|Ψ|²)^½ (n, mode, N, N), are 0 on bad pixels; the others are √μ (n, N, N).
    """
    far = waves.far_fields(exit_waves)
    model = np.empty((len(far), *far.shape[2:]), np.float32)
    model_amplitude(far, model)
    root_flux = waves.root_flux[rows, None, None]
    # A pixel without model light has no phase, as in `project_modulus`.
    floor = np.float32(1e-6) * model.max(axis=(1, 2), keepdims=True) + np.finfo(np.float32).eps ** 2
    far *= (root_flux * waves.good / np.maximum(model, floor))[:, None]
    model *= root_flux
    return far, model


def _products(
    wave: NDArray[np.complex64],
    direction: NDArray[np.complex64],
    residual: NDArray[np.float32],
    hats: tuple[NDArray[np.float64], NDArray[np.float64]],
    at: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """JᵀJ (node, node) and Jᵀr (node,) of one pattern.

    Exit waves, `_far_fields` and `_residual` of the pattern; hats along y and x, and those of each node.
    """
    n_nodes, (n_modes, n_pixels) = len(at[0]), wave.shape[:2]
    hat_y, hat_x = (hat.astype(np.float32) for hat in hats)
    # A hat is a product of two, so that nodes of a row share the transform along y.
    halfway = scipy.fft.fft(hat_y[:, None, :, None] * wave, axis=-2, norm="ortho", overwrite_x=True)
    numbers = np.array(at)
    products, slopes = np.zeros((n_nodes, n_nodes)), np.zeros(n_nodes)
    for top, bottom in _line_blocks(n_pixels, n_nodes * n_modes * n_pixels):
        under = np.empty((n_nodes, n_modes, bottom - top, n_pixels), np.complex64)
        under_hats(halfway, top, hat_x, numbers, under)
        far = scipy.fft.fft(under, axis=-1, norm="ortho", overwrite_x=True)
        jacobian = np.empty((n_nodes, bottom - top, n_pixels), np.float32)
        amplitude_derivative(far, top, direction, jacobian)
        flat = jacobian.reshape(n_nodes, -1)
        # Within a pattern float32 is exact enough, and twice as fast; patterns are summed as float64.
        products += flat @ flat.T
        slopes += flat @ residual[top:bottom].ravel()
    return products, slopes


def _line_blocks(n_lines: int, n_values: int) -> list[tuple[int, int]]:
    """Ends of blocks of lines of `n_values` each (see `BLOCK_VALUES`)."""
    size = max(BLOCK_VALUES // n_values, 1)
    return [(start, min(start + size, n_lines)) for start in range(0, n_lines, size)]


def _residual(scan: Scan, amplitude: NDArray[np.float32], model: NDArray[np.float32]) -> NDArray[np.float32]:
    """Residuals of amplitudes (..., N, N)."""
    if scan.domain == "amplitude":
        return amplitude - model
    # The difference of squares, without squaring what is nearly equal.
    return (amplitude - model) * (amplitude + model) / (2 * np.maximum(model, np.float32(DARK_AMPLITUDE)))


def solve(
    equations: NormalEquations,
    nodes: NodeGrid,
    *,
    regularisation: float = REGULARISATION,
    direct_unknowns: int = DIRECT_UNKNOWNS,
) -> NDArray[np.float64]:
    """Coefficients of the slow phase by one Gauss-Newton step.

    Parameters
    ----------
    equations : NormalEquations
    nodes : NodeGrid
        The grid they were made on.
    regularisation : float
        See `REGULARISATION`.
    direct_unknowns : int
        See `DIRECT_UNKNOWNS`.

    Returns
    -------
    float64 array (y, x)
        Phase at each node, radians. Nodes that no pattern reached continue the others as smoothly as their gradient
        allows (the discrete Laplace equation). Zero mean, weighted by light, in each island: nodes that patterns
        connect. All 0 where no pattern reached any.

    Raises
    ------
    NotConvergedError
        If conjugate gradients do not converge.

    Notes
    -----
    (JᵀJ + λ mean(diag JᵀJ) ∇ᵀ∇ + tiny) a = Jᵀr over the nodes that patterns reached; ∇ are differences between
    neighbours among them, so that islands do not act on each other.
    """
    matrix, slope, illumination_sum = _add_blocks(equations, nodes)
    diagonal = matrix.diagonal()
    lit = np.flatnonzero(diagonal > 0)
    coefficients = np.zeros(nodes.n_nodes)
    if not len(lit):
        return coefficients.reshape(nodes.shape)
    data = matrix[lit][:, lit]
    scale = float(diagonal[lit].mean())
    smooth = _laplacian(nodes, diagonal > 0)[lit][:, lit]
    system = data + regularisation * scale * smooth + TINY * scale * scipy.sparse.eye_array(len(lit))
    solution = _solve_positive(system, slope[lit], np.divmod(lit, nodes.shape[1]), direct_unknowns)
    n_islands, island = connected_components(data, directed=False)
    weighted = np.bincount(island, illumination_sum[lit] * solution, minlength=n_islands)
    coefficients[lit] = solution - (weighted / np.bincount(island, illumination_sum[lit], minlength=n_islands))[island]
    dark = np.flatnonzero(~(diagonal > 0))
    if len(dark):
        everywhere = _laplacian(nodes, np.ones(nodes.n_nodes, bool))[dark]
        pull = -(everywhere[:, lit] @ coefficients[lit])
        coefficients[dark] = _solve_positive(
            everywhere[:, dark], pull, np.divmod(dark, nodes.shape[1]), direct_unknowns
        )
    return coefficients.reshape(nodes.shape)


def _add_blocks(equations: NormalEquations, nodes: NodeGrid) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
    """JᵀJ (sparse, node, node), Jᵀr and light (node,) of all blocks."""
    slope, illumination_sum = np.zeros(nodes.shape), np.zeros(nodes.shape)
    ny, nx = nodes.shape
    if not equations.blocks:
        return scipy.sparse.csr_array((nodes.n_nodes, nodes.n_nodes)), slope.ravel(), illumination_sum.ravel()
    wide_y, wide_x = equations.blocks[0].curvature.shape[2:]
    # A band of neighbours for each node, in which blocks are added in their order: always alike, to the last bit.
    band = np.zeros((ny, nx, wide_y, wide_x))
    for block in equations.blocks:
        (y0, x0), size = block.first, block.slope.shape
        (y1, x1) = y0 + size[0], x0 + size[1]
        inside = slice(max(-y0, 0), size[0] - max(y1 - ny, 0)), slice(max(-x0, 0), size[1] - max(x1 - nx, 0))
        within = slice(max(y0, 0), min(y1, ny)), slice(max(x0, 0), min(x1, nx))
        slope[within] += block.slope[inside]
        illumination_sum[within] += block.illumination_sum[inside]
        band[within] += block.curvature[inside]
    flat = band.reshape(nodes.n_nodes, -1)
    has_value = flat != 0
    # Neighbours in the order of the band have ascending numbers, so that each row is one of a sorted sparse matrix.
    offset = (np.arange(wide_y)[:, None] - wide_y // 2) * nx + np.arange(wide_x) - wide_x // 2
    index = np.int64 if nodes.n_nodes * flat.shape[1] > np.iinfo(np.int32).max else np.int32
    ends = np.concatenate([[0], np.cumsum(has_value.sum(axis=1))]).astype(index)
    number = np.arange(nodes.n_nodes, dtype=index)
    columns = np.concatenate(
        [(number[rows, None] + offset.ravel().astype(index))[has_value[rows]] for rows in _row_blocks(nodes.n_nodes)]
    )
    matrix = scipy.sparse.csr_array((flat[has_value], columns, ends), shape=(nodes.n_nodes, nodes.n_nodes))
    return matrix, slope.ravel(), illumination_sum.ravel()


def _row_blocks(n_rows: int) -> list[slice]:
    """Slices of rows whose column numbers are made at a time."""
    return [slice(first, first + ROW_BLOCK) for first in range(0, n_rows, ROW_BLOCK)]


def _laplacian(nodes: NodeGrid, kept: NDArray[np.bool_]) -> Any:
    """∇ᵀ∇ (sparse, node, node) of the differences between neighbouring kept nodes."""
    number = np.arange(nodes.n_nodes).reshape(nodes.shape)
    one = np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()])
    other = np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])
    both = kept[one] & kept[other]
    one, other = one[both], other[both]
    edge = np.arange(len(one))
    at = np.concatenate([edge, edge]), np.concatenate([one, other])
    sign = np.repeat([1.0, -1.0], len(edge))
    gradient = scipy.sparse.coo_array((sign, at), shape=(len(edge), nodes.n_nodes)).tocsr()
    return (gradient.T @ gradient).tocsr()


def _solve_positive(
    system: Any, right: NDArray[np.float64], at: tuple[NDArray[np.int64], NDArray[np.int64]], direct_unknowns: int
) -> NDArray[np.float64]:
    """Solution of a symmetric positive definite system of nodes `at` (y, x)."""
    if len(right) <= direct_unknowns:
        return splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right)
    solution, failed = cg(
        system, right, rtol=CG_TOLERANCE, maxiter=CG_STEPS, M=LinearOperator(system.shape, _two_levels(system, at))
    )
    if failed:
        raise NotConvergedError(
            f"slow phase: conjugate gradients for {len(right)} nodes did not reach {CG_TOLERANCE} in {CG_STEPS} steps; "
            "pass slow_phase=False"
        )
    return solution  # type: ignore[no-any-return]


def _two_levels(
    system: Any, at: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Preconditioner: the inverse diagonal plus a solve on a coarser grid.

    Additive two-level Schwarz (B. Smith, P. Bjørstad and W. Gropp, Domain Decomposition, 1996, section 2.2): the
    diagonal alone is blind to slow modes, of which a large field has many.
    """
    weight, column = np.ones((len(at[0]), 1)), np.zeros((len(at[0]), 1), np.int64)
    across = int(at[1].max()) // COARSENING + 2
    for axis, stride in ((0, across), (1, 1)):
        whole, part = np.divmod(at[axis], COARSENING)
        part = part[:, None] / COARSENING
        weight = np.hstack([weight * (1 - part), weight * part])
        column = np.hstack([column + whole[:, None] * stride, column + (whole[:, None] + 1) * stride])
    used, compact = np.unique(column, return_inverse=True)
    row = np.repeat(np.arange(len(weight)), weight.shape[1])
    spread = scipy.sparse.coo_array((weight.ravel(), (row, compact.ravel())), shape=(len(weight), len(used))).tocsr()
    spread = spread[:, np.flatnonzero(abs(spread).sum(axis=0) > 0)]
    coarse = splu((spread.T @ system @ spread).tocsc())
    diagonal = system.diagonal()
    return lambda residual: residual / diagonal + spread @ coarse.solve(spread.T @ residual)


def phase_on(box: Box, nodes: NodeGrid, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slow phase over part of the object.

    Parameters
    ----------
    box : Box
        Within the box of the grid; beyond it the phase is that of the edge.
    nodes : NodeGrid
    coefficients : float64 array (y, x)
        Phase at each node, radians.

    Returns
    -------
    float64 array (y, x)
        Bilinear between nodes, radians. A pixel's bits do not depend on the box.

    Examples
    --------
    >>> phase_on(Box(0, 1, 0, 5), NodeGrid((0, 0), 4.0, (2, 2)), np.array([[0.0, 2.0], [0.0, 2.0]])).tolist()
    [[0.0, 0.5, 1.0, 1.5, 2.0]]
    """
    whole, part = [], []
    for axis, (start, stop) in enumerate(((box.y0, box.y1), (box.x0, box.x1))):
        last = nodes.shape[axis] - 1
        along = np.clip((np.arange(start, stop) - nodes.corner[axis]) / nodes.spacing_px, 0, last)
        whole.append(np.minimum(along.astype(np.int64), last - 1))
        part.append(along - whole[-1])
    y, x = part[0][:, None], part[1]
    rows = (1 - y) * coefficients[whole[0]] + y * coefficients[whole[0] + 1]
    return (1 - x) * rows[:, whole[1]] + x * rows[:, whole[1] + 1]


def apply_phase(object_: NDArray[np.complex64], phase: NDArray[np.float64]) -> NDArray[np.complex64]:
    """Object times exp(i phase), both (y, x); NaN stays NaN."""
    return (object_ * np.exp(1j * phase)).astype(np.complex64)


@dataclass(frozen=True)
class SlowPhaseRecord:
    """Outcome of a slow-phase step, as results record it."""

    kept: bool
    """True if the object was multiplied by the phase."""

    reason: str
    """Why it was kept or rejected."""

    misfit_before: float | None
    """Misfit of the judges (see `Judgement`); None without judges."""

    misfit_after: float | None
    """Their misfit with the phase, kept or not."""

    n_patterns: int
    """Patterns whose equations were summed."""

    n_judges: int
    """Patterns that judged."""

    n_nodes: int
    """Nodes of the grid."""

    spacing_px: float
    """Distance of nodes, pixels."""


@dataclass(frozen=True, eq=False)
class SlowPhasePlan:
    """Nodes of a slow phase, and its patterns."""

    nodes: NodeGrid

    chosen: NDArray[np.int64]
    """Patterns whose equations are summed (see `slow_phase_patterns`)."""

    judges: NDArray[np.int64]
    """Patterns that judge the step (see `judge_index`)."""

    n_candidates: int
    """Patterns that these were chosen from."""

    def rejected(self, reason: str) -> SlowPhaseRecord:
        """Outcome of a step that was not solved for."""
        logger.warning("slow phase: left out: %s", reason)
        sizes = len(self.chosen), len(self.judges), self.nodes.n_nodes, self.nodes.spacing_px
        return SlowPhaseRecord(False, reason, None, None, *sizes)

    def record(self, before: float, after: float) -> SlowPhaseRecord:
        """Outcome, from the judges' misfit without and with the step."""
        n_judges = len(self.judges)
        record = SlowPhaseRecord(
            kept=not n_judges or is_better(before, after),
            reason=_reason(before, after, n_judges, self.n_candidates),
            misfit_before=before if n_judges else None,
            misfit_after=after if n_judges else None,
            n_patterns=len(self.chosen),
            n_judges=n_judges,
            n_nodes=self.nodes.n_nodes,
            spacing_px=self.nodes.spacing_px,
        )
        logger.info("slow phase: %d patterns, %d nodes; %s", record.n_patterns, record.n_nodes, record.reason)
        return record


def plan_slow_phase(scan: Scan, object_box: Box, index: NDArray[np.int64]) -> SlowPhasePlan:
    """Nodes and patterns of the slow phase of an object.

    Parameters
    ----------
    scan : Scan
    object_box : Box
        Extent of the object.
    index : int64 array (k,)
        Patterns of one experiment.

    Returns
    -------
    SlowPhasePlan
    """
    around = frames_box(scan, index)
    box = Box(*(f(a, b) for f, a, b in zip((min, max, min, max), object_box, around, strict=True)))
    nodes = node_grid(box, node_spacing_px(scan.probe))
    return SlowPhasePlan(nodes, slow_phase_patterns(scan, nodes, index), judge_index(scan, index), len(index))


def judged(
    piece: NDArray[np.complex64],
    box: Box,
    scan: Scan,
    nodes: NodeGrid,
    coefficients: NDArray[np.float64],
    index: NDArray[np.int64],
) -> tuple[Judgement, Judgement]:
    """Agreement of some judges without and with the slow phase.

    Parameters
    ----------
    piece : complex64 array (y, x)
        Object in the frames of these patterns.
    box : Box
        Extent of `piece`.
    scan, nodes, coefficients
        See `phase_on`.
    index : int64 array (k,)

    Returns
    -------
    (Judgement, Judgement)
    """
    turned = apply_phase(piece, phase_on(box, nodes, coefficients))
    return judge(piece, box.corner, scan, index), judge(turned, box.corner, scan, index)


@dataclass(frozen=True, eq=False)
class SlowPhase:
    """Object after a slow-phase step, and the step."""

    object: NDArray[np.complex64]
    """The object (y, x), as given where the step was rejected."""

    phase: NDArray[np.float64]
    """Phase (y, x) that it was multiplied by, radians; 0 where the step was rejected."""

    record: SlowPhaseRecord


def refine_slow_phase(
    scan: Scan,
    object_: NDArray[np.complex64],
    corner: tuple[int, int],
    index: NDArray[np.int64] | None = None,
    *,
    part_patterns: int = PART_PATTERNS,
) -> SlowPhase:
    """Correct the slow part of an object's phase, in memory.

    Parameters
    ----------
    scan : Scan
        Patterns, positions, probe, mask and flux.
    object_ : complex64 array (y, x)
        NaN where unseen; such pixels, and all beyond the edges, count as 0 and stay as they are.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    index : int64 array (k,), optional
        Patterns of one experiment; all by default.
    part_patterns : int
        Patterns in one part of the sums.

    Returns
    -------
    SlowPhase

    Raises
    ------
    PtychodaskError
        If the patterns belong to several experiments.
    """
    index = np.arange(scan.n_patterns) if index is None else np.asarray(index, np.int64)
    if scan.scan_index is not None and len(np.unique(scan.scan_index[index])) > 1:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: the slow phase of one object needs the patterns of one experiment, found "
            f"{len(np.unique(scan.scan_index[index]))}; pass index= of one"
        )
    (height, width), (y, x) = object_.shape, corner
    object_box = Box(y, y + height, x, x + width)
    plan = plan_slow_phase(scan, object_box, index)
    nodes = plan.nodes
    sums = []
    for start in range(0, len(plan.chosen), part_patterns):
        part = plan.chosen[start : start + part_patterns]
        box = frames_box(scan, part)
        sums.append(normal_equations(_cut(object_, object_box, box), box.corner, scan, nodes, part))
    coefficients = solve(merge(*sums), nodes)
    before = after = 0.0
    for start in range(0, len(plan.judges), READ_BATCH):
        part = plan.judges[start : start + READ_BATCH]
        box = frames_box(scan, part)
        one, other = judged(_cut(object_, object_box, box), box, scan, nodes, coefficients, part)
        before, after = before + one.misfit, after + other.misfit
    record = plan.record(before, after)
    if not record.kept:
        return SlowPhase(object_, np.zeros(object_.shape), record)
    phase = phase_on(object_box, nodes, coefficients)
    return SlowPhase(apply_phase(object_, phase), phase, record)


def _reason(before: float, after: float, n_judges: int, n_patterns: int) -> str:
    """Reason why a step is kept or rejected."""
    if not n_judges:
        return f"{n_patterns} patterns are too few to judge by"
    change = f"misfit of {n_judges} judges from {before:.6g} to {after:.6g}"
    return change if is_better(before, after) else f"{change}, less than {LEAST_FALL} of itself lower"


def frames_box(scan: Scan, index: NDArray[np.int64]) -> Box:
    """Box around the frames of some patterns."""
    corner = footprint_corners(scan.position_yx_px[index], scan.n_pixels)
    (y0, x0), (y1, x1) = corner.min(axis=0).tolist(), (corner.max(axis=0) + scan.n_pixels).tolist()
    return Box(y0, y1, x0, x1)


def _cut(object_: NDArray[np.complex64], object_box: Box, box: Box) -> NDArray[np.complex64]:
    """Object over a box (y, x); 0 beyond its edges."""
    piece = np.zeros(box.shape, np.complex64)
    shared = object_box.overlap(box)
    if shared.n_pixels:
        at, source = (
            (slice(shared.y0 - one.y0, shared.y1 - one.y0), slice(shared.x0 - one.x0, shared.x1 - one.x0))
            for one in (box, object_box)
        )
        piece[at] = object_[source]
    return piece
