"""prompts.py: answers are read as they are written, and a shortened observation keeps every object."""

import re

import pytest

import envs
import prompts
from prompts import compact, executor_answer, parse_executor, render, split_obs

# The kitchen of melt 0 as the simulator words it, doors opened and the thermometer taken.
KITCHEN = """This room is called the kitchen. In it, you see:\x20
\tthe agent
\ta substance called air
\ta chair. On the chair is: nothing.
\ta counter. On the counter is: a bowl (containing a red apple, a banana, an orange, a potato), a drawer.
\ta cupboard. The cupboard door is open. In the cupboard is: a ceramic cup (containing nothing), a metal pot (containing nothing).
\ta freezer. The freezer door is closed.\x20
\ta fridge. The fridge door is closed.\x20
\ta glass jar (containing a substance called sodium chloride)
\ta lighter
\ta oven, which is turned off. The oven door is open. In the oven is: nothing.
\ta painting
\ta sink, which is turned off. In the sink is: nothing.
\ta substance called soap
\ta stopwatch, which is deactivated.\x20
\ta stove, which is turned on. On the stove is: nothing.
\ta table. On the table is: a glass cup (containing nothing).
You also see:
\tA door to the bathroom (that is closed)
\tA door to the hallway (that is open)
\tA door to the outside (that is closed)"""  # noqa: E501
OBJECTS = """chair, counter, bowl, red apple, banana, orange, potato, drawer, cupboard, ceramic cup, metal pot, freezer, fridge, glass jar,
    sodium chloride, lighter, oven, painting, sink, soap, stopwatch, stove, table, glass cup, bathroom, hallway, outside"""  # noqa: E501
INVENTORY = """In your inventory, you see:
\tan orange
\ta thermometer, currently reading a temperature of 10 degrees celsius"""
OBS = f"You move to the kitchen.\n\n{KITCHEN}\n\n{INVENTORY}"


# --- observations -------------------------------------------------------------------------------------------
def test_compact_keeps_every_object_of_a_room_in_half_the_words():
    text = compact(KITCHEN)
    names = [name.strip() for name in OBJECTS.split(",")]
    assert len(names) == 27 and [name for name in names if not re.search(rf"\b{name}\b", text)] == []
    assert len(re.findall(r"\bcup\b", text)) == 2
    assert len(text.split()) < 0.6 * len(KITCHEN.split())


@pytest.mark.parametrize(
    "state",
    ["cupboard open", "freezer closed", "fridge closed", "oven off open", "sink off", "stopwatch deactivated",
     "stove on", "ceramic cup (empty)", "table with glass cup (empty)", "bathroom closed", "hallway open",
     "bowl (containing red apple, banana, orange, potato)", "glass jar (containing sodium chloride)"],
)  # fmt: skip
def test_compact_keeps_the_state_of_things_and_what_holds_what(state):
    assert state in compact(KITCHEN)


def test_compact_of_a_compact_text_changes_nothing():
    for text in (KITCHEN, INVENTORY, "You move to the kitchen.", ""):
        assert compact(compact(text)) == compact(text)


def test_compact_keeps_temperature_and_the_numbers_to_choose_from():
    assert compact(INVENTORY) == "inventory: orange; thermometer reading 10 degrees"
    ambiguous = "Ambiguous request: Please enter the number:\n0:\tlook at wood cup\n1:\tlook"
    assert "0:\tlook at wood cup" in compact(ambiguous) and "1:\tlook" in compact(ambiguous)


def test_the_separator_of_the_worlds_is_the_one_that_prompts_split_at():
    assert prompts.SEPARATOR == envs.OBS_SEPARATOR
    assert split_obs(OBS) == (compact("You move to the kitchen."), compact(KITCHEN), compact(INVENTORY))


def test_render_shows_feedback_room_and_inventory_and_a_repeated_room_once():
    assert render(OBS) == f"You move to the kitchen. {compact(KITCHEN)}. {compact(INVENTORY)}"
    assert render(f"{KITCHEN}\n\n{KITCHEN}\n\n{INVENTORY}") == f"{compact(KITCHEN)}. {compact(INVENTORY)}"


# --- the three roles ----------------------------------------------------------------------------------------
def test_prompts_of_the_three_roles_begin_apart_and_end_where_the_answer_begins():
    texts = [
        prompts.planner("Your task is to melt water.", "Progress: None\nFinished: none", OBS),
        prompts.executor("go to the kitchen", "Progress: None", OBS),
        prompts.progress("go to the kitchen", "None", "go to kitchen", "You move to the kitchen."),
    ]
    assert len({text.split()[0] for text in texts}) == 3
    assert [text.splitlines()[-1] for text in texts] == ["Subtask:", "Action:", "Progress:"]
    assert (
        "melt water" in texts[0] and "melt water" not in texts[1] + texts[2]
    )  # only the planner sees the task


# --- the executor's answer ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "action", ["go to kitchen", "0", "use a; b on c", "read: true", "true; false", "pour x into y "]
)
@pytest.mark.parametrize("done", [True, False])
def test_the_parser_reads_what_the_builder_writes(action, done):
    assert parse_executor(executor_answer(action, done)) == (action.strip(), done, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("look around; True", ("look around", True, True)),
        ("  look around ;FALSE\n", ("look around", False, True)),
        ("look\naround; true", ("look\naround", True, True)),
        ("look around", ("look around", False, False)),  # no flag: played as it is
        ("look around; yes", ("look around; yes", False, False)),
        ("look around; True and more", ("look around; True and more", False, False)),
        ("look around True", ("look around True", False, False)),
        ("; True", ("; True", False, False)),  # no action
        ("True", ("True", False, False)),
        ("", ("none", False, False)),
        (" \n ", ("none", False, False)),
    ],
)
def test_an_answer_of_another_form_is_played_as_it_is_and_never_claims_to_be_done(text, expected):
    assert parse_executor(text) == expected
