"""Inspection of files and stores: contents, `ingest` command, orientation of the positions."""

from ptychodask.inspection.files import inspect_file
from ptychodask.inspection.findings import Finding, Inspection, plot_preview
from ptychodask.inspection.orientation import AxesVerdict, check_axes

__all__ = ["AxesVerdict", "Finding", "Inspection", "check_axes", "inspect_file", "plot_preview"]
