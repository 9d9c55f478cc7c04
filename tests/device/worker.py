"""Makes the steps of some cases on one kind of fake device and writes what they did as JSON.

python -m tests.device.worker fake|cuda OUT CASE...
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.device.cases import CASES
from tests.device.fake_device import Record, install
from tests.device.steps import open_case, run_case


def main(kind: str, out: str, *names: str) -> None:
    device = install(kind)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            record, outcome = run_case(CASES[name], open_case(CASES[name], Path(directory)), device)
        found[name] = {
            "gradients": sorted(map(str, outcome.gradients)),
            "states": sorted(map(str, outcome.states)),
            "devices": sorted(outcome.devices),
            "num_trained": outcome.num_trained,
            "live": dict(outcome.live),
            "rows": dict(outcome.rows),
            "stage": outcome.stage,
            **{kind: record.count(kind) for kind in ("wait", "copy", "offload")},
            "pinned": Counter(event.where for event in record.events if event.kind == "copy" and event.pinned),
            "late_gathers": late_gathers(record),
        }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def late_gathers(record: Record) -> int:
    """Layers' weights that were asked for only after the host had waited for their own layer's sizes, in a forward.

    The device is idle then: nothing is queued for it while the weights are on their way.
    """
    late = 0
    for pack in {event.pack for event in record.events if event.phase == "decoder forward"}:
        num_waits = 0
        for event in record.events:
            if (event.pack, event.phase) != (pack, "decoder forward"):
                continue
            if event.kind == "wait":
                num_waits += 1
            elif event.kind == "gather" and event.where.startswith("layers."):
                late += num_waits > int(event.where.split(".")[1])
    return late


if __name__ == "__main__":
    arguments: Any = sys.argv[1:]
    main(*arguments)
