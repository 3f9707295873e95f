"""Names of things, and texts under other names."""

import random
from dataclasses import replace

import pytest

import renaming
import train_sft
from data import Episode, Segment, Transition, Turn
from renaming import new_names, rename, visible

OBS = (
    "You look around.\n\nThis room is called the workshop. In it, you see: \n\tthe agent\n\ta table. "
    "On the table is: a red wire, a battery.\n\tunknown substance B\nYou also see:\n"
    "\tA door to the hallway (that is open)\n\n\nIn your inventory, you see:\n\tan orange"
)


def test_names_are_those_of_the_room_without_letters_and_rooms_are_not_among_them():
    turns = [Turn(OBS, "look around", "", 0.0, False, False)]
    seen = visible(Episode("scienceworld", "boil", 1, "", turns))
    assert seen == ["battery", "red wire", "table", "unknown substance"]


def test_whole_words_are_replaced_longest_name_first_and_a_letter_goes_with_its_name():
    new = {"wire": "zu", "red wire": "mug", "unknown substance": "lamp"}
    text = "connect red wire to wire; wires; unknown substance B in unknown substance; Borg"
    assert rename(text, new) == "connect mug to zu; wires; lamp in lamp; Borg"
    assert rename(text, {}) == text


def test_about_half_of_the_names_get_one_or_two_words_and_a_seed_says_which():
    names = [f"thing{i}" for i in range(400)]
    new = new_names(names, ["mug", "lamp", "pen"], random.Random(0))
    assert 160 < len(new) < 240 and {len(name.split()) for name in new.values()} == {1, 2}
    assert new == new_names(names, ["mug", "lamp", "pen"], random.Random(0))


def test_a_decision_keeps_its_sense_and_what_its_prompt_does_not_name_keeps_its_name():
    decision = Transition(
        "executor", "Subtask: get the red wire\nObservation: a red wire", " pick up red wire; True",
        [], [], 0.0, 1, False, False, "", "executor", "expert", "expert/boil/1", 0,
    )  # fmt: skip
    seen = set()
    for seed in range(20):
        other = renaming.renamed(decision, ["red wire", "battery"], ["mug", "pen"], random.Random(seed))
        name = other.completion.removeprefix(" pick up ").removesuffix("; True")
        assert other.prompt == f"Subtask: get the {name}\nObservation: a {name}"
        assert replace(other, prompt=decision.prompt, completion=decision.completion) == decision
        seen.add(name)
    assert "red wire" in seen and len(seen) > 5
    decision = replace(decision, completion=" pick up battery; True")
    assert all(
        renaming.renamed(decision, ["battery"], ["mug", "pen"], random.Random(seed)) == decision
        for seed in range(9)
    )


def test_other_names_are_the_same_in_what_follows_and_leave_alone_what_a_policy_said():
    decision = Transition(
        "planner", "Task: find the red wire", " get the red wire", [], [], 0.0, 1, False, False,
        "you have the red wire", "planner", "expert", "expert/boil/1", 0,
    )  # fmt: skip
    decision.follows = replace(decision, prompt="you have the red wire", completion=" focus on the red wire")

    class Tokenizer:
        __len__ = lambda self: 3  # noqa: E731
        convert_ids_to_tokens = lambda self, ids: ["Ġmug", "Ġpen", "ug"]  # noqa: E731

    other_names = renaming.OtherNames([], Tokenizer(), 1.0)
    other_names.names = {decision.episode_id: (["red wire"], [])}
    sampled = replace(decision, completion_ids=[1, 2])
    stranger = replace(decision, episode_id="expert/boil/2")
    seen = set()
    for seed in range(20):
        found, *same = other_names([decision, sampled, stranger], f"0/{seed}")
        assert all(a is b for a, b in zip(same, (sampled, stranger), strict=True))
        name = found.completion.removeprefix(" get the ")
        assert found.prompt == f"Task: find the {name}" and found.next_prompt == f"you have the {name}"
        assert found.follows.completion == f" focus on the {name}"
        seen.add(name)
    assert "red wire" in seen and len(seen) > 5
    assert other_names([decision], "0/1") == other_names([decision], "0/1")
    off = renaming.OtherNames([], None, 0.0)  # asks nothing of a tokenizer
    assert off([decision], "0/1") == [decision]


def test_the_planner_reads_rooms_under_other_names_and_the_executor_keeps_its_map():
    turns = [Turn(OBS, "look around", "", 0.0, False, False)]
    episode = Episode("scienceworld", "boil", 1, "", turns, source="expert")
    assert renaming.rooms(episode) == ["workshop"]
    assert not renaming.rooms(replace(episode, turns=[replace(turns[0], obs="You see a mug 1.")]))

    class Tokenizer:
        __len__ = lambda self: 2  # noqa: E731
        convert_ids_to_tokens = lambda self, ids: ["Ġmug", "ug"]  # noqa: E731

    plan = Transition(
        "planner", "Task: it is around the workshop", " go to the workshop", [], [], 0.0, 1, False, False,
        "", "planner", "expert", episode.id, 0,
    )  # fmt: skip
    other_names = renaming.OtherNames([episode], Tokenizer(), 1.0)
    shown = [other_names([plan, replace(plan, level="executor")], f"0/{seed}") for seed in range(9)]
    assert all(executor.completion == plan.completion for _, executor in shown)
    for planner, _ in shown:
        assert planner.prompt.split()[-1] == planner.completion.split()[-1]
    assert len({planner.completion for planner, _ in shown}) > 2


def test_a_name_said_in_short_is_not_hidden_from_the_prompt():
    decision = Transition(
        "executor", "Subtask: get the electric buzzer", " pick up buzzer; True",
        [], [], 0.0, 1, False, False, "", "executor", "expert", "expert/boil/1", 0,
    )  # fmt: skip
    for seed in range(9):
        assert (
            renaming.renamed(decision, ["electric buzzer"], ["mug", "pen"], random.Random(seed)) == decision
        )


def test_renaming_needs_decisions_of_roles(tmp_path):
    with pytest.raises(ValueError, match="leave them out with --plan-execute"):
        train_sft.main(train_sft.Config(tmp_path, tmp_path / "out", rename=0.5, plan_execute=True))


def test_the_verb_of_a_subtask_is_no_name():
    """ "water the pot": as a substance "water" has other names, the planner's verb must not have them."""
    turn = Turn(OBS.replace("a battery", "water"), "look around", "", 0.0, False, False)
    episode = Episode("scienceworld", "grow-plant", 1, "", [turn])
    assert "water" in renaming.things(episode)
    episode = replace(episode, segments=[Segment("water the pot", 0, 1, "")])
    assert renaming.things(episode) == ["red wire", "table", "unknown substance"]
