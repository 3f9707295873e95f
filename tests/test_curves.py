"""recipes/curves.py: what the seeds reached, by hand; the flags that the online recipes set exist."""

import json
import re
from pathlib import Path

import pytest
import tyro

import train_hiper
import train_o2o
from recipes import curves

ROOT = Path(__file__).parent.parent


def write(folder: Path, seed: int, points: list[tuple[int, list[float]]], x: str = "env_steps") -> None:
    (folder / f"seed{seed}").mkdir(parents=True)
    panel = [["boil", 0], ["boil", 1], ["melt", 0]]
    evals = [{x: steps, "panel": panel, "scores": scores} for steps, scores in points]
    (folder / f"seed{seed}" / "evals.json").write_text(json.dumps({"evals": evals, "command": f"c{seed}"}))


def test_the_mean_over_types_and_seeds_by_hand_and_what_all_seeds_have(tmp_path, capsys):
    write(tmp_path / "glider", 0, [(0, [10.0, 30.0, -100.0]), (100, [100.0, 100.0, 50.0]), (200, [0.0] * 3)])
    write(tmp_path / "glider", 1, [(0, [0.0, 0.0, 40.0]), (120, [100.0, 0.0, 100.0])])
    out = tmp_path / "results" / "o2o_boil"
    curves.main(curves.Config(tmp_path, ("glider",), out))
    found = json.loads(out.with_suffix(".json").read_text())["curves"]["glider"]
    assert found["seeds"] == 2 and found["episodes"] == 3 and found["commands"] == ["c0", "c1"]
    first, last = found["points"]
    assert first["seeds"] == [10, 20] and first["score"] == 15
    assert last["env_steps"] == 110 and last["seeds"] == [75, 75] and last["success"] == 62.5
    assert first["ci95"][0] <= 15 <= first["ci95"][1]
    assert last["success_ci95"][0] <= 62.5 <= last["success_ci95"][1]
    assert "glider" in out.with_suffix(".svg").read_text() and "2 seeds" in capsys.readouterr().out


def test_training_episodes_are_an_axis_too_and_missing_runs_are_one_line(tmp_path):
    write(tmp_path / "gae", 0, [(0, [0.0] * 3), (500, [100.0] * 3)], "episodes")
    result = curves.main(curves.Config(tmp_path, ("gae",), tmp_path / "x"))
    assert [p["episodes"] for p in result["curves"]["gae"]["points"]] == [0, 500]
    with pytest.raises(ValueError, match="no .*group/seed.*evals.json: run recipes"):
        curves.main(curves.Config(tmp_path, ("group",), tmp_path / "x"))


@pytest.mark.parametrize("script, module", [("o2o.sh", train_o2o), ("hiper.sh", train_hiper)])
def test_the_flags_of_the_recipes_are_those_of_the_scripts(script, module):
    """Every flag of RL that a recipe sets, as one command."""
    text = (ROOT / "recipes" / script).read_text()
    flags = set(
        re.findall(
            r"--(?:(?:rl|credit)\.[\w-]+|frozen|give-up|planning-ratio|(?:off|on)line-share) [\w.-]+", text
        )
    )
    given = [word for flag in flags for word in flag.split()]
    required = ["--init", "x", "--out", "x"] + (["--offline", "x"] if module is train_o2o else [])
    assert flags and tyro.cli(module.Config, args=[*required, *given])
