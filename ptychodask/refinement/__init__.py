"""Refinement of a stitched object: pattern-local sums and small global steps."""
