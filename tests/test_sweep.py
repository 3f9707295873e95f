"""recipes/sweep.py: its commands are commands, arms share what they can, what is done is not done again."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

import collect
import eval as evaluation
import train_orl
import train_sft
from envs import read_panel
from recipes import sweep

SCRIPTS = {
    "collect.py": collect, "train_sft.py": train_sft, "train_orl.py": train_orl, "eval.py": evaluation
}  # fmt: skip
ARMS = [(name, arm) for name, arms in sweep.SWEEPS.items() for arm in arms]


def parsed(command):
    """(script, its Config) of a command; a flag that does not exist ends the test."""
    script, *flags = shlex.split(command)
    return script, tyro.cli(SCRIPTS[script].Config, args=flags)


def plan(name, arm, seed=0, **config):
    return sweep.stages(sweep.SWEEPS[name][arm], seed, sweep.Config(name, **config))


@pytest.mark.parametrize("budget", sweep.BUDGETS)
@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_command_is_one_that_its_script_understands(name, arm, budget):
    stages = plan(name, arm, seed=3, budget=budget, panel="glider")
    for stage, (done, command) in stages.items():
        script, config = parsed(command)
        if script == "train_orl.py":
            config = train_orl.with_preset(config)  # refuses flags that contradict the preset
        assert (config.seed == 3) or stage == "gold"
        assert str(config.out) in str(done) or done.suffix in (".done", ".json")
    assert ("orl" in stages) == (sweep.SWEEPS[name][arm].orl is not None)


def test_the_flags_of_an_arm_win_over_those_of_its_budget():
    _, config = parsed(plan("temperature", "inf")["orl"][1])
    assert config.rl.temperature == float("inf") and config.rl.critic_lr == 1e-3
    _, config = parsed(plan("released", "as released step hrl")["orl"][1])
    assert config.rl.temperature == 0.99 and config.preset == "as_released_step_hrl"


def test_arms_of_a_sweep_differ_in_what_they_run():
    for name, arms in sweep.SWEEPS.items():
        commands = {plan(name, arm)["eval"][1] for arm in arms}
        assert len(commands) == len(arms), name


def test_arms_share_gold_paths_sft_and_rollouts_but_not_what_their_flags_change():
    a, b = plan("ratio", "1:2"), plan("temperature", "inf")
    assert [a[s] for s in ("gold", "sft", "rollouts")] == [b[s] for s in ("gold", "sft", "rollouts")]
    assert a["orl"][0] != b["orl"][0]
    flat, untrained = plan("hierarchy", "flat, SFT+ORL"), plan("hierarchy", "flat, ORL")
    assert flat["sft"] == untrained["sft"] != a["sft"] and flat["rollouts"] == untrained["rollouts"]
    _, start = parsed(untrained["init"][1])
    _, orl = parsed(untrained["orl"][1])
    assert (start.epochs, start.flat, orl.init) == (0, True, start.out)
    played = plan("completion", "judge ends in play")
    assert played["sft"] == a["sft"] and played["rollouts"] != a["rollouts"]
    assert plan("ratio", "1:2", seed=1)["sft"] != a["sft"]


def test_the_nine_ratios_are_those_of_the_paper():
    shares = []
    for arm in sweep.SWEEPS["ratio"]:
        _, config = parsed(plan("ratio", arm)["orl"][1])
        shares.append(config.expert_share / (config.expert_share + config.rollout_share))
    assert sorted(shares) == pytest.approx([0, 1 / 11, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 10 / 11, 1])


def test_differences_are_paired_with_the_first_arm_by_hand():
    def row(*values):
        return {
            "scores": list(values), "macro_mean": sum(map(abs, values)) / 2, "success_rate": 0.0,
            "tokens_per_step": 1.0, "subtasks": {},
        }  # fmt: skip

    rows = {"a": [row(10, 30), row(20, 40)], "b": [row(15, 30), row(20, 50)]}
    table = sweep.compare(rows, ["boil", "melt"])  # one episode of a type, but two seeds to draw from
    assert table["a"]["difference"] == 0 and table["a"]["difference_ci95"] == [0, 0]
    assert table["a"]["macro_mean"] == 25 and table["b"]["macro_mean"] == 28.75
    assert table["b"]["difference"] == 3.75 and table["b"]["macro_means"] == [22.5, 35]
    low, high = table["b"]["difference_ci95"]
    assert 0 <= low < 3.75 < high
    below = sweep.compare({"a": [row(10, 30)], "b": [row(-100, 30)]}, ["boil", "melt"])
    assert below["b"]["difference"] == -5, "a negative score counts as 0"
    assert below["b"]["ci95"] is None, "one episode of each type and one seed have no interval"
    two = sweep.compare({"a": [row(10, 30)]}, ["boil", "boil"])
    assert two["a"]["ci95"] == [10, 30]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """sweep.main with stages that write their product at once; returns the commands that ran."""
    ran = []

    def stage(command, **_):
        script, *flags = command[1:]
        ran.append(" ".join([script, *flags]))
        if script == "plot.py":
            return
        config = tyro.cli(SCRIPTS[script].Config, args=[f for f in flags if f != "--resume"])
        if script == "eval.py":
            (config.out / "episodes").mkdir(parents=True, exist_ok=True)
            (config.out / "episodes" / f"{config.name}.jsonl").touch()
            (config.out / "results").mkdir(exist_ok=True)
            episodes = read_panel("scienceworld", config.panel, "dev", config.limit)
            row = {
                "scores": [50.0] * len(episodes), "macro_mean": 50.0, "ci95": [50, 50], "success_rate": 0.0,
                "tokens_per_step": 1.0, "subtasks": {}, "limit": config.limit,
            }  # fmt: skip
            (config.out / "results" / f"{config.name}.json").write_text(json.dumps(row))
        elif script.startswith("train"):
            config.out.mkdir(parents=True, exist_ok=True)
            for name in ("policy.json", "metrics.csv", "config.json"):
                (config.out / name).write_text("")

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=stage))
    return ran


def test_a_sweep_leaves_json_and_figure_and_the_same_command_runs_nothing_twice(made_up, tmp_path):
    config = sweep.Config("history", seeds=(0, 1), out=tmp_path / "out", results=tmp_path / "results")
    result = sweep.main(config)
    path = tmp_path / "results" / "wiring" / "history_demo.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert path.with_suffix(".svg").read_text().count("<svg") == 1
    assert "no evidence" in result["label"] and "no evidence" in path.with_suffix(".svg").read_text()
    assert list(result["arms"]) == ["progress", "full", "window"] and result["seeds"] == [0, 1]
    assert result["arms"]["full"]["commands"]["sft"].startswith("train_sft.py")
    # gold once; SFT, rollouts, ORL and evaluation for each of 3 arms and 2 seeds; the report
    assert len(made_up) == 1 + 4 * 3 * 2 + 1
    shown = {p.stem for p in (tmp_path / "out/demo-wiring/history/results").iterdir()}
    assert shown == {f"{arm}__seed_{seed}" for arm in ("progress", "full", "window") for seed in (0, 1)}
    sweep.main(config)
    assert made_up[1 + 24 + 1 :] == [made_up[-1]] and "plot.py" in made_up[-1]


def test_an_interrupted_training_run_is_resumed(made_up, tmp_path):
    config = sweep.Config("history", out=tmp_path / "out", results=tmp_path / "results")
    started = Path(sweep.stages(sweep.SWEEPS["history"]["full"], 0, config)["sft"][0]).parent
    started.mkdir(parents=True)
    (started / "config.json").touch()
    sweep.main(config)
    resumed = [command for command in made_up if "--resume" in command]
    assert len(resumed) == 1 and "--history full" in resumed[0] and resumed[0].startswith("train_sft.py")
