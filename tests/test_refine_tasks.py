"""Patterns that tasks of refinement keep in memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from ptychodask.reconstruction import refine_tasks


def test_patterns_are_kept_up_to_the_bound(monkeypatch):
    read = []
    stored = SimpleNamespace(data_hash="one", pattern_itemsize=2)

    def part_of(_, index):
        read.append(index.tolist())
        return SimpleNamespace(n_patterns=len(index), n_pixels=8)

    monkeypatch.setattr(refine_tasks, "open_stored", lambda job: stored)
    monkeypatch.setattr(refine_tasks, "part_of", part_of)
    monkeypatch.setattr(refine_tasks, "RECENT_BYTES", 3 * 8 * 8 * 2)
    recent = refine_tasks._RecentParts()
    small, large = np.arange(2), np.arange(2, 4)
    for index in (small, large, small, large):
        recent.read(None, index)
    assert read == [[0, 1], [2, 3], [2, 3]]
    stored.data_hash = "other"
    recent.read(None, small)
    assert read[-1] == [0, 1]
