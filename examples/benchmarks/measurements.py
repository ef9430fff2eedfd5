"""What the scripts here have measured: a line of JSON for each script, in one file."""

import json
from pathlib import Path
from typing import Any

from latent_aug.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "measurements.jsonl"


def read_all() -> dict[str, Any]:
    """The figures of every script, by its name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["script"]: line["figures"] for line in map(json.loads, lines)}


def read_measurement(script: str) -> Any:
    """The figures of one script; None if it has left none."""
    return read_all().get(script)


def keep_measurement(script: str, figures: Any) -> None:
    """Replace the figures of one script."""
    found = sorted({**read_all(), script: figures}.items())
    lines = [json.dumps({"script": name, "figures": own}) + "\n" for name, own in found]
    write_whole(RESULTS, "".join(lines).encode())
