"""Judging of results: metrics, comparison, residuals, resolution, figures, reports."""
