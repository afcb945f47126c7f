"""A client that reconstructs into a result, for others to break: ``python -m tests.campaigns.victim JSON``.

It ends as the command line does: 0 when the result is there, 2 with one line on standard error, 143 after SIGTERM.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from models_for_tests import LinearModel, SlowModel

from ptychodask.cli import stopping_on_sigterm
from ptychodask.cluster.clients import connected_client
from ptychodask.errors import PtychodaskError
from ptychodask.reconstruction import reconstruct, scheduler

FIELDS = {"groups_per_chunk": 5, "batch_size": 5, "tile": 16}


def model_of(name: str, noted_in: str | None = None) -> Any:
    """The network that a run asks for: in NumPy, or a bundle that Keras opens."""
    if name == "plain":
        return LinearModel(content_hash="slow")
    return SlowModel(noted_in=noted_in) if name == "slow" else name


def main() -> None:
    """Run what the only argument says."""
    asked = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    scheduler.STRAGGLER_S = scheduler.STRAGGLER_TIMES = asked["straggler"]
    with stopping_on_sigterm(), connected_client(asked["scheduler"]) as client:
        model = model_of(asked["model"], asked.get("noted_in"))
        reconstruct(asked["store"], model, out=asked["out"], client=client, progress=False, **FIELDS, **asked["fields"])


if __name__ == "__main__":
    try:
        main()
    except PtychodaskError as error:
        print(f"PtychodaskError: {error}", file=sys.stderr)
        sys.exit(2)
