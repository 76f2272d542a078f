"""Steps of a run that was killed and continued, beside those of one that was not."""

import json
from pathlib import Path

from bench.peer_million import seconds


def test_the_first_step_of_neither_session_counts(tmp_path: Path) -> None:
    """Of 6 steps, saved after 3: 1 and 4 are a session's first."""
    lines = [{"step": step, "loss": 1.0, "time": {"step_seconds": float(step)}} for step in range(1, 7)]
    text = "\n".join(map(json.dumps, [*lines[:3], {"step": 3, "eval": {"loss": 1.0}}, *lines[3:]]))
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n")
    assert seconds(tmp_path, saved=3) == [2.0, 3.0, 5.0, 6.0]
