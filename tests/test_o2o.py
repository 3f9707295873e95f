"""train_o2o.py: three ways to hold the executor, its budget, going on after a stop; on generated games."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import annotate
import collect
import train_o2o
import train_orl
import train_sft
from data import Credit, read_episodes
from model import load_policy
from readings import RLConfig
from train_o2o import Config, split_adapter

COMMON = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A barely trained policy with critics, made by the scripts before this one."""
    folder = tmp_path_factory.mktemp("o2o")
    play = {"env": "alfworld", "panel": "demo", "limit": 2, "workers": 0, **COMMON}
    collect.main(collect.Config(out=folder / "gold.jsonl", **play))
    train_sft.main(train_sft.Config(data=folder / "gold.jsonl", out=folder / "sft", epochs=0.5, **COMMON))
    files = {"expert": folder / "gold.jsonl", "rollouts": folder / "gold.jsonl"}
    orl = train_orl.Config(
        init=folder / "sft", out=folder / "orl", steps=2, warmup_steps=1, **files, **COMMON
    )
    train_orl.main(orl)
    return folder


def config(start: Path, name: str, **changes) -> Config:
    config = Config(
        init=start / "orl", offline=(start / "gold.jsonl",), out=start / name, env="alfworld", panel="demo",
        dev="valid_seen", dev_limit=1, limit=2, env_steps=18, episodes=2, buffer=4, max_steps=6,
        eval_every=12, batch_size=4, workers=0, slots=8, **COMMON,
    )  # fmt: skip
    return replace(config, **changes)


def metrics(folder: Path) -> dict[str, list[float]]:
    found = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["metric"], []).append(float(row["value"]))
    return found


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: p.detach() for n, p in load_policy(folder, trainable=True)[0].named_parameters() if "lora_" in n
    }


@pytest.fixture(scope="module")
def frozen(start) -> Path:
    train_o2o.main(config(start, "frozen"))
    return start / "frozen"


def test_a_split_adapter_is_the_same_policy(start):
    shared, tokenizer, _ = load_policy(start / "orl", trainable=True)
    ids = torch.tensor([tokenizer("go to desk 1").input_ids] * 3)
    before = train_o2o.hidden_states(shared, ids, torch.arange(3))
    parted = split_adapter(shared)
    assert set(parted.peft_config) == {"planner", "executor", "progress"}
    after = train_o2o.hidden_states(parted, ids, torch.arange(3))
    assert torch.allclose(after, before, atol=1e-3)  # rows of other batches round otherwise


def test_a_frozen_executor_stays_bit_for_bit_while_the_planner_learns(start, frozen):
    before, after = adapters(start / "orl"), adapters(frozen)
    changed = {"planner": 0, "executor": 0, "progress": 0}
    for name, parameter in after.items():
        role = next(role for role in changed if f".{role}." in name)
        changed[role] += not torch.equal(parameter, before[name.replace(f".{role}.", ".shared.")])
    assert changed["planner"] > 0 and changed["executor"] == changed["progress"] == 0
    held = metrics(frozen)["executor/logp_held"]
    assert len(held) >= 3 and len(set(held)) == 1


@pytest.mark.parametrize("way", ["replay", "nothing"])
def test_a_shared_adapter_drifts_and_the_drift_is_reported(start, way):
    train_o2o.main(config(start, way, frozen=way, env_steps=6))
    assert all(".shared." in name for name in adapters(start / way))
    assert len(set(metrics(start / way)["executor/logp_held"])) > 1
    assert "executor/actor_loss" in metrics(start / way)


def test_it_plays_its_budget_evaluates_at_the_start_and_the_end_and_keeps_what_it_played(frozen):
    rows, episodes = metrics(frozen), read_episodes(frozen / "online.jsonl")
    steps = sum(len(e.turns) for e in episodes)
    assert steps >= 18 > steps - 2 * 6
    assert rows["online/env_steps"][0] == 0 and rows["online/env_steps"][-1] == steps
    assert len(rows["dev/score"]) == len(rows["executor/logp_held"]) >= 3
    assert "executor/q_loss" not in rows and "planner/q_loss" in rows
    assert {e.source for e in episodes} == {f"o2o-{r}" for r in range(len(episodes) // 2)}


def test_the_step_size_falls_to_0_over_the_environment_steps(frozen):
    before_last = sum(len(e.turns) for e in read_episodes(frozen / "online.jsonl")[:-2])  # 2 a round
    (group,) = torch.load(frozen / "state.pt", weights_only=True)["learner"]["actor"]["param_groups"]
    assert 0 < before_last < 18
    assert group["lr"] == pytest.approx(config(Path(), "").rl.actor_lr * (1 - before_last / 18))


def test_the_executor_plays_at_the_temperature_the_planner_at_its_ratio_and_an_evaluation_is_greedy(
    start, monkeypatch
):
    heats = []

    class Spy(train_o2o.Policy):
        def answer(self, requests):
            heats.append((self.temperature["executor"], self.temperature["planner"]))
            return super().answer(requests)

    monkeypatch.setattr(train_o2o, "Policy", Spy)
    train_o2o.main(config(start, "heat", env_steps=6, max_steps=2, temperature=0.5, planning_ratio=1.5))
    assert set(heats) == {(0.5, 0.75), (0.0, 0.0)}


def test_a_stopped_run_goes_on_to_the_same_policy(start, frozen, monkeypatch):
    whole, rounds = config(start, "stopped"), []

    def stop(self, step, **state):
        save(self, step, **state)
        rounds.append(step)
        if len(rounds) == 1:
            raise KeyboardInterrupt

    save = train_o2o.Run.save_state
    monkeypatch.setattr(train_o2o.Run, "save_state", stop)
    with pytest.raises(SystemExit, match="go on with --resume"):
        train_o2o.main(whole)
    train_o2o.main(replace(whole, resume=True))
    again, once = adapters(start / "stopped"), adapters(frozen)
    assert all(torch.equal(again[name], once[name]) for name in once)
    assert metrics(start / "stopped") == metrics(frozen)


def test_exploring_and_giving_up_are_for_training_and_need_an_experts_plans(start, monkeypatch):
    made = []

    class Spy(train_o2o.Curious):
        def __init__(self, *args, **fields):
            made.append((fields["epsilon"], fields["give_up"], fields["plans"]))
            super().__init__(*args, **fields)

    monkeypatch.setattr(train_o2o, "Curious", Spy)
    train_o2o.main(config(start, "curious", env_steps=6, episodes=1, max_steps=2, explore=0.5, give_up=3))
    plans = [s.subtask for e in read_episodes(start / "gold.jsonl") for s in e.segments]
    assert {times for epsilon, times, _ in made if epsilon} == {3}, "in training"
    assert {epsilon for epsilon, times, _ in made if not times} == {0.0}, "not in evaluation"
    epsilons = sorted({epsilon for epsilon, times, _ in made if times}, reverse=True)
    assert epsilons[0] == 0.5 and len(epsilons) > 1, "it falls"
    assert all(sorted(found) == sorted(plans) for _, _, found in made)
    played = start / "curious" / "online.jsonl"
    with pytest.raises(ValueError, match="--explore needs an expert's plans"):
        train_o2o.main(config(start, "no-plans", explore=0.5, offline=(played,)))


def test_what_exploration_said_is_left_out_where_it_returned_less_than_usual(start):
    gold = read_episodes(start / "gold.jsonl")
    (t, *_) = annotate.decisions_of(gold, {"history": "progress"}, Credit(), RLConfig())
    assert t.level == "planner"
    own = [replace(t, source="o2o-0", completion_ids=[1], mc_return=value) for value in (0.0, 0.5, math.nan)]
    said = [replace(t, source="o2o-0", completion_ids=[], mc_return=v) for v in (0.2, 0.25, 0.3, math.nan)]
    kept = train_o2o.without_poor_tries([*own, *said])
    assert [id(t) for t in kept] == [id(t) for t in (*own, *said[1:])], "the mean of its own is 0.25"
    assert train_o2o.without_poor_tries(said) == said, "nothing of its own: 0 is usual"
    below = [replace(t, level="executor") for t in said]
    assert train_o2o.without_poor_tries([*own, *below]) == [*own, *below], "exploration is the planner's"


def test_what_cannot_be_frozen_is_refused(start):
    sft = train_sft.Config(data=start / "gold.jsonl", out=start / "full", epochs=0.0, rank=0, **COMMON)
    train_sft.main(sft)
    with pytest.raises(ValueError, match="--frozen adapter needs LoRA"):
        split_adapter(load_policy(start / "full", trainable=True)[0])
    with pytest.raises(ValueError, match="no critic at"):
        train_o2o.main(config(start, "none", init=start / "sft"))
