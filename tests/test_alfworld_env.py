"""alfworld_env.py and alfworld_rules.py: ALFWorld as a text world, its labels, and both engines behind it."""

import copy
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

import alfworld_rules
import annotate
import collect
import demo
import eval as eval_
import prompts
import scripted
from alfworld_env import AlfWorld
from alfworld_games import TASK_TYPES, find_game
from data import read_episodes, transitions, write_episodes
from envs import EnvPool, make_world, read_panel
from labels import ambiguity, check, leaks

ROOT = Path(__file__).parent.parent
MUG = ("pick_and_place_simple", read_panel("alfworld", "demo", "valid_seen")[10][1])


@pytest.fixture(scope="module")
def panel() -> list:
    return read_panel("alfworld", "demo", "train", limit=8)


@pytest.fixture(scope="module")
def gold(panel) -> list:
    with EnvPool("alfworld", 16, workers=0, max_steps=10**6) as pool:
        return [annotate.annotate(e) for e in scripted.play_gold(pool, panel, "alfworld")]


# --- the world ----------------------------------------------------------------------------------------------
def test_an_observation_is_the_answer_the_receptacles_and_what_is_carried(gold):
    for episode in gold:
        rooms = {turn.obs.split("\n\n")[1] for turn in episode.turns}
        assert len(rooms) == 1 and "you see a" in rooms.pop()
        carried = ""
        for i, turn in enumerate(episode.turns):
            feedback, _, inventory = episode.obs_after(i).split("\n\n")
            if taken := re.match(r"take (.+) from", turn.action):
                carried = taken[1]
            elif turn.action.startswith("move"):
                carried = ""
            assert inventory == (
                f"You are carrying: a {carried}." if carried else "You are not carrying anything."
            )
            assert "Your task" not in feedback
        assert episode.description.startswith("Your task is to: ")


def test_the_world_terminates_with_the_goal_and_truncates_at_the_limit():
    world = AlfWorld(max_steps=3)
    first = world.reset(0, *MUG)
    assert (first.score, first.terminated, first.truncated) == (0, False, False)
    results = [world.step(0, "look") for _ in range(3)]
    assert [r.truncated for r in results] == [False, False, True]
    assert not any(r.terminated or r.success or r.reward for r in results)
    world = AlfWorld(max_steps=50)
    world.reset(0, *MUG)
    *before, last = [world.step(0, action) for action in world.oracle_path(1, *MUG)]
    assert (last.reward, last.score, last.terminated, last.truncated, last.success) == (
        1,
        100,
        True,
        False,
        True,
    )
    assert not any(r.reward or r.terminated for r in before)


def test_invalid_actions_change_nothing_and_are_known_as_such():
    world = AlfWorld()
    world.reset(0, *MUG)
    feedback = prompts.split_obs(world.step(0, "fly to the moon").obs)[0]
    assert feedback.startswith(prompts.NOT_UNDERSTOOD)


def test_slots_are_episodes_of_their_own_and_the_list_of_valid_actions_belongs_to_one():
    world, other = AlfWorld(), read_panel("alfworld", "demo", "valid_seen")[0]
    world.reset(0, *MUG)
    world.reset(1, *other)
    go = next(a for a in world.valid_actions(0) if a.startswith("go to"))
    world.step(0, go)
    assert go not in world.valid_actions(0) and "look" in world.valid_actions(1)


def test_a_panel_that_names_another_type_or_no_game_is_refused(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ValueError, match="is of type pick_and_place_simple, not pick_two_obj_and_place"):
        AlfWorld().reset(0, "pick_two_obj_and_place", MUG[1])
    with pytest.raises(FileNotFoundError, match="export ALFWORLD_DATA"):
        AlfWorld().reset(0, *read_panel("alfworld", "official", "valid_seen")[0])
    with pytest.raises(ValueError, match="expected one of .*alfworld-reference"):
        make_world("alfword", 50)


def test_panels_have_the_official_sizes_and_say_what_is_generated():
    sizes = {
        split: len(read_panel("alfworld", "official", split))
        for split in ("train", "valid_seen", "valid_unseen")
    }
    assert sizes == {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
    for split in sizes:
        assert all("/generated_" in game for _, game in read_panel("alfworld-reference", "demo", split))
        assert {task for task, _ in read_panel("alfworld", "demo", split)} == set(TASK_TYPES)


# --- the labels ---------------------------------------------------------------------------------------------
def test_labels_of_the_searching_expert_are_honest_and_learnable(gold):
    assert len(gold) == 48 and all(episode.success for episode in gold)
    assert [problem for episode in gold for problem in check(episode)] + leaks(gold) == []
    assert ambiguity(gold, "executor") == ambiguity(gold, "planner") == 0
    for episode in gold:
        assert all(turn.verified_done == turn.claimed_done for turn in episode.turns)


def test_subtasks_are_the_steps_of_the_task(gold):
    by_type = {e.task: [s.subtask for s in e.segments] for e in gold}
    assert [s.split()[0] for s in by_type["pick_two_obj_and_place"]] == ["find", "put", "find", "put"]
    assert [s.split()[0] for s in by_type["pick_heat_then_place_in_recep"]] == ["find", "heat", "put"]
    assert [s.split()[0] for s in by_type["look_at_obj_in_light"]] == ["find", "use"]
    assert ", not from" in by_type["pick_two_obj_and_place"][0]
    assert ", not from" not in by_type["pick_and_place_simple"][0]


@pytest.mark.parametrize(
    "subtask, previous, action, feedback, expected",
    [
        ("find and take mug", "None", "go to desk 2", "desk 2: nothing",
         "Is there mug? no. searched desk 2."),
        ("find and take mug", "searched desk 2.", "go to desk 1", "desk 1: pen 1",
         "Is there mug? no. searched desk 1."),
        ("find and take mug", "searched desk 1.", "go to safe 1", "safe 1 is closed",
         "searched desk 1. at safe 1, closed."),
        ("find and take mug", "searched desk 1. at safe 1, closed.", "open safe 1",
         "safe 1: mug 2, mug 1, mugs 3",
         "Is there mug? mug 1. searched desk 1, safe 1."),
        ("find and take mug", "Is there mug? no. searched desk 1, safe 2.", "go to desk 3", "desk 3: pen 1",
         "Is there mug? no. searched safe 2, desk 3."),
        ("use desklamp", "None", "go to desk 1", "desk 1: desklamp 1, mug 1",
         "Is there desklamp? desklamp 1. searched desk 1."),
        ("find and take mug", "searched desk 1.", "go to bed 1", "Nothing happens",
         "searched desk 1. go to bed 1: nothing happened."),
        ("find and take mug", "searched desk 1.", "take mug 1 from desk 1", "You pick up mug 1 from desk 1",
         "picked up mug 1 from desk 1."),
        ("find and take mug", "searched desk 1.", "take pen 1 from desk 1", "You pick up pen 1 from desk 1",
         "searched desk 1. picked up pen 1 from desk 1."),
        ("put mug in safe 1", "None", "go to safe 1", "safe 1 is closed", "at safe 1, closed."),
        ("put mug in safe 1", "at safe 1, closed.", "open safe 1", "safe 1: nothing", "at safe 1."),
        ("heat mug", "at microwave 1.", "heat mug 1 with microwave 1", "You heat mug 1 using microwave 1",
         "heated mug 1 using microwave 1."),
    ],
)  # fmt: skip
def test_progress_by_hand(subtask, previous, action, feedback, expected):
    assert alfworld_rules.progress_text(subtask, previous, action, feedback) == expected


@pytest.mark.parametrize(
    "subtask, complete, misses",
    [
        ("find and take mug", "You pick up the mug 2 from the desk 1.",
         ["You pick up the mugs 2 from the desk 1.", "You pick up the pen 1 from the desk 1.",
          "Nothing happens.", "On the desk 1, you see a mug 1."]),
        ("find and take cd, not from safe 1", "You pick up the cd 1 from the safe 10.",
         ["You pick up the cd 1 from the safe 1."]),
        ("clean mug", "You clean the mug 1 using the sinkbasin 1.",
         ["You heat the mug 1 using the microwave 1."]),
        ("put mug in safe 1", "You move the mug 1 to the safe 1.",
         ["You move the mug 1 to the safe 10.", "You move the cup 1 to the safe 1."]),
        ("use desklamp", "You turn on the desklamp 1.", ["You turn on the floorlamp 1."]),
        ("try another action", None, ["You turn on the desklamp 1."]),
    ],
)  # fmt: skip
def test_verdicts_by_hand(subtask, complete, misses):
    rest = "\n\nYou are in the middle of a room. Looking quickly around you, you see a safe 1.\n\nNothing."
    assert complete is None or alfworld_rules.judge(subtask, complete + rest)
    assert not any(alfworld_rules.judge(subtask, miss + rest) for miss in misses)


def test_texts_are_compacted_without_losing_a_thing():
    room = "You are in the middle of a room. Looking quickly around you, you see a safe 2, a safe 1, and a "
    assert prompts.compact(room + "bed 1.") == "room: safe 2, bed 1"
    seen = "You arrive at bed 1. On the bed 1, you see a cd 2, a cd 1, and a book 1."
    assert prompts.compact(seen) == "bed 1: cd 2, cd 1, book 1"
    opened = "You open the safe 2. The safe 2 is open. In it, you see nothing."
    assert prompts.compact(opened) == "safe 2: nothing"
    assert prompts.compact("You arrive at safe 2. The safe 2 is closed.") == "safe 2 is closed"
    assert prompts.compact("You are carrying: a cd 2.") == "carrying cd 2"


def test_a_flat_agent_and_all_three_levels_can_be_trained_on_them(gold):
    episode = next(e for e in gold if e.task == "pick_two_obj_and_place")
    assert {t.level for t in transitions(episode, "progress")} == {"planner", "executor", "progress"}
    whole = annotate.flat(episode)
    assert [s.subtask for s in whole.segments] == [prompts.compact(episode.description)]


@pytest.mark.parametrize("env", ["scienceworld", "alfworld"])
def test_every_command_of_the_demo_is_understood_by_its_script(env):
    commands = [command.split() for _, command in demo.stages(demo.Config(env=env, out=Path("out/x")))]
    assert len(commands) >= 7
    for script, *flags in commands:
        config = tyro.cli(importlib.import_module(script.removesuffix(".py")).Config, args=flags)
        assert getattr(config, "env", env) == env


def test_a_demo_runs_what_is_missing_and_deletes_nothing(tmp_path, monkeypatch, capsys):
    config, ran = demo.Config(out=tmp_path / "demo"), []
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: ran.append(command[1]))
    made = [Path(done) for done, _ in demo.stages(config)]
    for path in made[:-1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (config.out / "report.html").write_text("plotted too early")
    demo.main(config)
    assert ran == ["eval.py", "plot.py"] and "finished" not in capsys.readouterr().out
    made[-1].touch()
    demo.main(config)
    assert ran[2:] == ["plot.py"] and "remove that folder" in capsys.readouterr().out
    assert all(path.exists() for path in made)


def test_gold_paths_that_the_rules_would_label_otherwise_are_refused(tmp_path):
    flags = {"env": "alfworld", "panel": "demo", "limit": 1, "workers": 0, "threads": 1}
    gold = collect.Config(out=tmp_path / "gold.jsonl", **flags)
    collect.main(gold)
    episodes = read_episodes(gold.out)
    episodes[0].segments[0].subtask = "stroll"
    write_episodes(gold.out, episodes)
    with pytest.raises(ValueError, match="labelled by other rules: choose another --out"):
        collect.main(gold)


def test_the_scripts_collect_every_kind_of_player_and_evaluate_with_the_games_named(tmp_path, capsys):
    flags = {"env": "alfworld", "panel": "demo", "limit": 1, "workers": 0, "device": "cpu", "threads": 1}
    collect.main(collect.Config(out=tmp_path / "o.jsonl", source="oracle", **flags))
    collect.main(collect.Config(out=tmp_path / "e.jsonl", source="explore", max_steps=10, **flags))
    lengths = {n: [len(e.turns) for e in read_episodes(tmp_path / f"{n}.jsonl")] for n in "oe"}
    assert len(lengths["o"]) == 6 and max(lengths["o"]) <= 12 and max(lengths["e"]) <= 10
    with pytest.raises((ValueError, FileNotFoundError), match="ALFWORLD_DATA|only official train games"):
        collect.main(collect.Config(out=tmp_path / "r.jsonl", source="recorded", **flags))
    with pytest.raises(ValueError, match="scienceworld has no 'oracle' paths, ALFWorld has: use 'gold'"):
        next(scripted.play_gold(None, [], "scienceworld", "oracle"))
    rows = {"random": 0.0, "gold": 1.0}
    for agent, success in rows.items():
        evaluation = eval_.Config(out=tmp_path, name=agent, agent=agent, split="valid_seen", **flags)
        result = eval_.main(evaluation)
        assert result["benchmark"] == "alfworld, generated games" and result["success_rate"] == success
    assert "(alfworld, generated games)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a test split is reported once"):
        eval_.main(replace(evaluation, split="valid_unseen"))


# --- the real engine ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("alfworld", reason="the real engine is not installed: make alfworld")
    return make_world("alfworld-reference", 50)


def test_the_real_engine_behind_the_same_interface_gives_the_same_episodes(reference):
    fast = make_world("alfworld", 50)
    for episode in (MUG, read_panel("alfworld", "demo", "valid_seen")[-1]):
        assert reference.reset(0, *episode) == fast.reset(0, *episode)
        for action in ["fly", "look", *fast.gold_path(1, *episode)]:
            assert reference.valid_actions(0) == fast.valid_actions(0)
            assert reference.step(0, action) == fast.step(0, action)
        assert fast.step(0, "look").success


def test_the_real_engine_plays_one_game_at_a_time_and_says_so(reference):
    reference.reset(0, *MUG)
    with pytest.raises(ValueError, match="as many workers as slots, e.g. --slots 2 --workers 2"):
        reference.reset(1, *MUG)


def test_the_older_grammar_is_played_by_both_engines():
    pytest.importorskip("alfworld", reason="the real engine is not installed: make alfworld")
    real, fast = AlfWorld(engine="reference", grammar="put"), AlfWorld(grammar="put")
    assert real.reset(0, *MUG) == fast.reset(0, *MUG)
    path = fast.gold_path(1, *MUG)
    assert [real.step(0, action) for action in path] == [fast.step(0, action) for action in path]
    assert path[-1].startswith("put ") and " in/on " in path[-1] and fast.step(0, "look").success


def test_episodes_replayed_in_the_real_engine_are_confirmed_and_a_changed_one_is_not(tmp_path, gold):
    pytest.importorskip("alfworld", reason="the real engine is not installed: make alfworld")
    good, bad = copy.deepcopy(gold[0]), copy.deepcopy(gold[-1])
    bad.turns[1].obs = bad.turns[1].obs.replace("carrying", "holding")
    for name, episodes in {"good": [good, gold[9]], "bad": [good, bad]}.items():
        write_episodes(tmp_path / f"{name}.jsonl", episodes)
        script = "recipes/alfworld_replay.py --workers 1 --max-steps 1000000 --episodes"
        files = [tmp_path / f"{name}.jsonl", "--out", tmp_path / "r.json"]
        done = subprocess.run([sys.executable, *script.split(), *files], cwd=ROOT, capture_output=True)
        (row,) = json.loads((tmp_path / "r.json").read_text())["files"]
        assert (row["episodes"], row["won"], row["mismatches"]) == (2, 2, int(name == "bad"))
        assert done.returncode == (name == "bad"), done.stderr


def test_the_real_engine_leaves_the_command_line_alone_patched_or_as_shipped(reference):
    before, engine = list(sys.argv), reference.reference
    for patched in (False, True):
        engine.patch(patched)
        engine.reset(find_game(MUG[1]))
        assert sys.argv == before
