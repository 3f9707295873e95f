"""notebooks/tour.py runs from its first cell to its last, with tiny trainings, and makes its figures."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tour_runs_to_its_end(tmp_path):
    env = os.environ | {"TOUR": "short", "TOUR_OUT": str(tmp_path / "tour")}
    env.pop("ALFWORLD_DATA", None)
    command = [sys.executable, str(ROOT / "notebooks" / "tour.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (":[[ ", "log pi of four answers", "V by expectile", "gain", "of each action"):
        assert text in done.stdout
    made = {path.name for path in (tmp_path / "tour").iterdir()}
    assert {"offline_rl.svg", "gain.svg", "sft", "orl", "results"} <= made
