"""recipes/: curves.py, main.py and exact.py by hand, tokens.py beside training's, flags of recipes."""

import json
import re
from pathlib import Path

import pytest
import tyro

import annotate
import train_hiper
import train_o2o
from batches import collate
from data import Episode, Transition, Turn, read_episodes, transitions, write_episodes
from model import load_backbone
from recipes import curves, exact, tokens
from recipes import main as main_table

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


# --- the main table -----------------------------------------------------------------------------------------
def evaluated(
    folder: Path, seed: int, name: str, benchmark: str, panel: str, split: str, scores: list, **kept
):
    path = folder / f"seed{seed}" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"benchmark": benchmark, "panel": panel, "split": split, "scores": scores, "limit": 0}
    row |= {"max_steps": 50, "tokens_per_step": 300 + seed, "command": "c", "commit": "k", "per_type": {}}
    path.write_text(json.dumps(row | kept))


def test_a_row_is_the_mean_over_seeds_of_types_or_of_games_and_what_is_missing_is_named(tmp_path, capsys):
    tasks = [task for task, _ in main_table.read_panel("scienceworld", "boil", "dev")]
    types = {task: {"mean": 50.0} for task in tasks}
    for seed, score in ((0, 40.0), (1, 60.0)):
        scores = [score] * len(tasks)
        evaluated(tmp_path / "glider", seed, "sft", "scienceworld", "boil", "dev", scores, per_type=types)
    games = main_table.read_panel("alfworld", "demo", "valid_seen")
    won = [100.0] * 15 + [-100.0] * (len(games) - 15)  # no macro mean: the share of all games
    evaluated(tmp_path / "alfworld", 0, "sft_seen", "alfworld, generated games", "demo", "valid_seen", won)
    result = main_table.main(main_table.Config(tmp_path, tmp_path / "main.json"))
    first, second = result["rows"]
    assert (first["score"], first["seeds"], first["ci95"]) == (50, [40, 60], [40, 60])
    assert first["per_type"] == dict.fromkeys(tasks, 50) and first["tokens_per_step"] == 300.5
    assert second["score"] == round(100 * 15 / len(games), 2) and second["episodes"] == len(games)
    assert second["ci95"][0] < second["score"] < second["ci95"][1]
    assert json.loads((tmp_path / "main.json").read_text())["rows"][0] == first
    said = capsys.readouterr().out
    assert "| scienceworld boil, dev | SFT | 50.0 | 40.0 to 60.0 | 40.0, 60.0 |" in said
    assert f"not run yet: {tmp_path}/glider/seed*/results/orl.json" in said
    with pytest.raises(ValueError, match="run recipes/main.sh first"):
        main_table.main(main_table.Config(tmp_path / "empty", tmp_path / "x.json"))


# --- tokens per step ----------------------------------------------------------------------------------------
def test_a_step_costs_what_its_decisions_read_and_write(tmp_path, capsys):
    turns = [
        Turn(
            f"{'It is warm.' * (t > 0)}\n\nThis room is called the kitchen.\n\nIn your inventory, you see:",
            a,
            "",
            0.0,
            t == 2,
            False,
        )
        for t, a in enumerate(["wait", "wait", "wait"])
    ]
    episode = Episode(
        "scienceworld", "boil", 0, "Boil it.", turns, final_obs="The end.", score=100.0, success=True
    )
    write_episodes(tmp_path / "gold.jsonl", [annotate.annotate(episode)])
    out = tmp_path / "tokens.json"
    result = tokens.main(tokens.Config(tmp_path / "gold.jsonl", out, steps=(1, 2, 3)))
    assert (
        json.loads(out.read_text())["agents"] == result["agents"]
        and "full history, flat: " in capsys.readouterr().out
    )
    _, tokenizer = load_backbone("base")
    (stored,) = read_episodes(tmp_path / "gold.jsonl")
    for agent, (history, is_flat) in tokens.AGENTS.items():
        asked = transitions(annotate.flat(stored) if is_flat else stored, history, flat=is_flat)
        batch = collate(asked, tokenizer)
        total = sum(r["tokens"] + r["cached"] for r in result["agents"][agent])
        assert total == batch.attention_mask.sum(), "as many as training sees"
    flat = [r["tokens"] for r in result["agents"]["full history, flat"]]
    assert flat[0] < flat[1] < flat[2], "it grows"
    with pytest.raises(ValueError, match="no episode of .* has 9 steps: lower --steps"):
        tokens.main(tokens.Config(tmp_path / "gold.jsonl", out, steps=(9,)))


# --- exact answers ------------------------------------------------------------------------------------------
def test_exact_answers_are_averaged_over_episodes_and_types_and_mistakes_are_counted():
    def decision(level, completion):
        return Transition(level, "p", completion, [], [], 0.0, 1, True, False, "", level, "expert", "e", 0)

    episodes = [Episode("scienceworld", task, k, "") for k, task in enumerate(["boil", "boil", "melt"])]
    decisions = [
        [decision("planner", " get the soap"), decision("executor", " pick up soap; True")],
        [decision("planner", " get the soap"), decision("planner", " open the oven")],
        [decision("planner", " get the pot")],
    ]
    answers = [["get the soap", "pick up soap; False"], ["get the pan", "open the oven"], ["get the pan"]]
    found = exact.agreement(episodes, decisions, answers)
    assert set(found) == {"planner", "executor"}
    planner = found["planner"]
    assert planner["per_type"] == {"boil": 75, "melt": 0} and planner["exact"] == 37.5  # (100 + 50) / 2, 0
    assert planner["decisions"] == 4 and planner["ci95"] == [25, 50]
    assert planner["mistakes"] == [
        [1, "boil", "get the soap", "get the pan"],
        [1, "melt", "get the pot", "get the pan"],
    ]
    assert found["executor"]["exact"] == 0
