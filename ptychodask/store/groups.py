"""Group tables of a scan, drawn and stored."""

from __future__ import annotations

import logging

import numpy as np
import zarr

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, Groups
from ptychodask.storage.atomic import READ_ONLY_ERRORS
from ptychodask.storage.location import LocationLike, on_disk, parse_location
from ptychodask.storage.zarr_checks import consolidate
from ptychodask.store import GroupTable, StoredScan
from ptychodask.store.write import _write_array, changing_root, update_node

logger = logging.getLogger(__name__)


def group(store: LocationLike, spec: GroupingSpec = GroupingSpec(), *, name: str | None = None) -> Groups:
    """Stored group table of a scan, drawn and stored if missing.

    Parameters
    ----------
    store : path or ``s3://`` URL
    spec : GroupingSpec
    name : str, optional
        Name of the table; by default the spec's.

    Returns
    -------
    Groups

    Raises
    ------
    PtychodaskError
        If the name is taken by another spec, the scan has too few patterns, or the store cannot be written.
    """
    table = stored_table(StoredScan(store), spec, name)
    return Groups(table.rows(0, len(table)), spec, table.name)


def stored_table(stored: StoredScan, spec: GroupingSpec, name: str | None = None) -> GroupTable:
    """`group` for an open scan, which then has the table too."""
    name = spec.name if name is None else name
    table = stored.same_table(spec, name)
    if table is not None:
        return table
    try:
        table = _store_table(stored, spec, name)
    except OSError as error:
        if error.errno not in READ_ONLY_ERRORS:
            raise
        raise PtychodaskError(
            f"{stored.label}: cannot be written ({error.strerror}), and its groups are stored in it; copy the scan to "
            f"where you can write, or have its owner run: ptychodask group {stored.path} --members {spec.members}"
        ) from error
    logger.info("%s: stored %d groups of %d as '%s'", stored.label, len(table), spec.members, name)
    return stored.add_table(table)


def _store_table(stored: StoredScan, spec: GroupingSpec, name: str) -> GroupTable:
    """Draw groups, and store their table."""
    # Only a scan on a disk can grow. While a segment is appended its arrays are longer than readers may know:
    # consolidating would publish them unfinished, so only the nodes of the new table are added to the metadata.
    if stored.attributes["state"] == "growing":
        path = on_disk(stored.path, "a growing scan")
        with changing_root(path) as root:
            # Opened again under the lock, since another segment may have been appended.
            table = _write_table(StoredScan(path), spec, name)
            for node in ("groups", f"groups/{name}", f"groups/{name}/member"):
                update_node(root, path, node)
    else:
        table = _write_table(stored, spec, name)
        consolidate(parse_location(stored.path))
    return table


def _write_table(stored: StoredScan, spec: GroupingSpec, name: str) -> GroupTable:
    """Draw groups and write their table, without the consolidated metadata."""
    tables = stored.draw(spec)
    groups, segments = Groups(np.concatenate(tables), spec, name), [len(part) for part in tables]
    # A killed run may have left a table that the consolidated metadata do not list: it is overwritten.
    root = zarr.open_group(parse_location(stored.path).zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)
    table = root.require_group("groups").create_group(name, overwrite=True)
    is_growing = stored.attributes["state"] == "growing"
    member = _write_array(table, "member", groups.member, ("group", "channel"), is_growing)
    rows = {"segment_groups": segments} if "segments" in stored.attributes else {}
    table.attrs.update({"spec": groups.attributes(), "state": "complete", **rows})
    return GroupTable(stored.label, name, spec, member, stored.n_patterns, segments)
