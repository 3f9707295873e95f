"""annotate.py: the rules on real gold paths of nearly every type, progress, the judge."""

import copy

import pytest

from acting import Answer
from annotate import annotate, flat
from data import Decision, Episode, Turn, transitions
from envs import StepResult
from hierarchy import rollout
from labels import check, leaks
from prompts import NO_PROGRESS, compact, executor_answer
from scienceworld_rules import MAX_ACTIONS, judge, progress_text, split

HALLWAY = (
    "This room is called the hallway. In it, you see: \n\tthe agent\nYou also see:\n\tA door to the kitchen"
)
CUPBOARD = "\n\ta cupboard. The cupboard door is "
KITCHEN = f"This room is called the kitchen. In it, you see: {CUPBOARD}closed. \n\ta thermometer"
OPENED = KITCHEN.replace("closed. ", "open.  In the cupboard is: a metal pot.")


def obs(feedback: str, room: str = KITCHEN, *held: str) -> str:
    inventory = "In your inventory, you see:\n" + "".join(f"\ta {item}\n" for item in held)
    return "\n\n".join([feedback, room, inventory])


def small_episode() -> Episode:
    """Six actions, four subtasks; no simulator needed."""
    steps = [
        ("open door to kitchen", obs(HALLWAY, HALLWAY)),
        ("go to kitchen", obs("The door is now open.", HALLWAY)),
        ("look around", obs("You move to the kitchen.")),
        ("pick up thermometer", obs(KITCHEN)),
        ("open cupboard", obs("You move the thermometer to the inventory.", KITCHEN, "thermometer")),
        ("pick up metal pot", obs("The cupboard is now open.", OPENED, "thermometer")),
    ]
    turns = [Turn(before, action, "", 0.0, False, False) for action, before in steps]
    turns[-1].terminated = True
    last = obs("You move the metal pot to the inventory.", OPENED, "metal pot", "thermometer")
    task = "Your task is to find a pot."
    return Episode("scienceworld", "toy", 0, task, turns, [], last, 100, True)


ALIKE = {  # left out: one mendelian and one inclined-plane type stand for their kind
    "mendelian-genetics-unknown-plant",
    "inclined-plane-friction-named-surfaces",
    "inclined-plane-friction-unnamed-surfaces",
}


@pytest.fixture(scope="module")
def gold() -> dict[str, Episode]:
    """One raw gold episode per task type, in one real simulator; of like types that are slow only one."""
    from scienceworld_env import ScienceWorld

    world, episodes = ScienceWorld(max_steps=10_000), {}
    try:
        for task in world.tasks:
            if task in ALIKE:
                continue
            actions, turns = world.gold_path(0, task, 1), []
            result = world.reset(0, task, 1)
            for action in actions:
                before, result = result.obs, world.step(0, action)
                turns.append(Turn(before, action, "", result.reward, result.terminated, result.truncated))
                if result.terminated:
                    break
            episodes[task] = Episode("scienceworld", task, 1, result.description, turns)
            episodes[task].final_obs, episodes[task].success = result.obs, result.success
    finally:
        world.close()
    return episodes


# --- rules ------------------------------------------------------------------------------------------------
def test_small_episode_by_hand():
    raw = small_episode()
    before = copy.deepcopy(raw)
    episode = annotate(raw)
    assert raw == before, "the input must not change"
    assert [(s.subtask, s.start, s.end) for s in episode.segments] == [
        ("explore the kitchen", 0, 3),
        ("get the thermometer", 3, 4),
        ("open the cupboard", 4, 5),
        ("get the metal pot", 5, 6),
    ]
    assert [t.progress for t in episode.turns] == [
        *("None", "the door to kitchen is open.", "in the kitchen.", "None", "None", "None")
    ]
    assert [t.claimed_done for t in episode.turns] == [t.verified_done for t in episode.turns]
    assert [i for i, t in enumerate(episode.turns) if t.verified_done] == [2, 3, 4, 5]
    assert episode.segments[-1].final_progress == "got the metal pot."
    assert check(episode) == []


def test_turns_after_the_end_are_dropped():
    raw = small_episode()
    raw.turns.append(Turn(raw.final_obs, "look around", "", 0.0, False, False))
    raw.final_obs = obs("too late")
    episode = annotate(raw)
    assert len(episode.turns) == 6 and episode.final_obs == small_episode().final_obs and check(episode) == []


def test_annotating_twice_gives_the_same():
    once = annotate(small_episode())
    assert annotate(once) == once


def test_gold_paths_of_all_types_pass_every_check(gold):
    assert len(gold) == 27
    for task, raw in gold.items():
        episode = annotate(raw)
        assert check(episode) == [], task
        assert [t.action for t in episode.turns] == [t.action for t in raw.turns][: len(episode.turns)]
        spans = [i for s in episode.segments for i in range(s.start, s.end)]
        assert spans == list(range(len(episode.turns))), task
        assert max(s.end - s.start for s in episode.segments) <= MAX_ACTIONS


def test_texts_stay_short_however_long_the_episode(gold):
    episodes = [annotate(e) for e in gold.values()]
    assert max(len(e.turns) for e in episodes) > 60
    assert max(len(t.progress.split()) for e in episodes for t in e.turns) <= 25
    assert max(len(s.subtask.split()) for e in episodes for s in e.segments) <= 20


def test_the_judge_agrees_at_nearly_every_segment_end(gold):
    for task, raw in gold.items():
        episode = annotate(raw)
        following = [s.subtask for s in episode.segments[1:]] + [None]
        ends = [
            episode.turns[s.end - 1].verified_done
            for s, after in zip(episode.segments, following, strict=True)
            if after not in (None, s.subtask)  # cut by the end of the episode, or by the cap
        ]
        assert sum(ends) >= 0.9 * len(ends), task
        early = [
            i for s in episode.segments for i in range(s.start, s.end - 1) if episode.turns[i].verified_done
        ]
        assert early == [], task


def test_prefixes_with_equal_pasts_have_equal_progress(gold):
    assert leaks([annotate(e) for e in gold.values()]) == []
    for raw in list(gold.values())[::7]:  # progress must not change when the future is cut away
        whole, cut = annotate(raw), copy.deepcopy(raw)
        middle = len(raw.turns) // 2
        cut.turns, cut.final_obs = raw.turns[:middle], raw.turns[middle].obs
        for a, b in zip(whole.turns, annotate(cut).turns, strict=False):
            assert a.subtask != b.subtask or a.progress == b.progress


def test_a_long_wait_is_cut_into_groups_of_the_cap():
    lines = obs("You decide to wait for 1 iterations.")
    groups = split("wait", ["wait1"] * 30 + ["look around"], [lines] * 31 + [obs(KITCHEN)])
    assert groups == [
        ("wait and look around", 0, 12),
        ("wait and look around", 12, 24),
        ("wait and look around", 24, 31),
    ]


def test_a_walk_is_cut_where_it_takes_a_detour():
    rooms = ["hallway", "living room", "hallway", "workshop"]
    seen = [obs("", f"This room is called the {room}. In it, you see: ") for room in rooms]
    actions = [f"go to {room}" for room in rooms[1:]]
    assert split("", actions, seen) == [("go to the living room", 0, 1), ("go to the workshop", 1, 3)]


def test_books_lose_their_titles_and_a_refused_link_ends_the_connecting():
    feedback = {
        "pick up book (the origin) in shelf": "You move the book (The Origin) to the inventory.",
        "connect battery anode to black wire terminal 1": "terminal 1 on black wire is now connected to anode"
        " on battery",
        "connect book to black wire terminal 2": "No known action matches that input.",
        "drop jar": "Ambiguous request: Please enter the number for the action you intended",
        "0": "You move the jar to the kitchen.",
    }
    seen = "You see the book (The Origin), a battery, a black wire, a jar"
    observations = [obs(seen), *(obs(text, KITCHEN, "a book (The Origin)") for text in feedback.values())]
    groups = split("test the book, battery, black wire and jar", [*feedback], observations)
    names = ["get the book", "connect black wire to anode in battery", "try another action", "drop the jar"]
    assert [name for name, _, _ in groups] == names
    assert groups[-1][1:] == (3, 5)
    assert judge(names[0], observations[1]) and judge(names[3], observations[5])


# --- an episode without subtasks --------------------------------------------------------------------------
def test_flat_is_one_subtask_the_task_itself():
    for episode in (annotate(small_episode()), small_episode()):
        before = copy.deepcopy(episode)
        new = flat(episode)
        assert episode == before, "the input must not change"
        task = "Your task is to find a pot"
        assert [(s.subtask, s.start, s.end) for s in new.segments] == [(task, 0, 6)]
        assert {t.subtask for t in new.turns} == {task} == {compact(episode.description)}
        assert [t.claimed_done for t in new.turns] == [False] * 5 + [True]
        assert [t.action for t in new.turns] == [t.action for t in episode.turns]
        progress = NO_PROGRESS  # goes on over what were subtasks
        for i, turn in enumerate(new.turns):
            assert turn.progress == progress
            progress = progress_text(task, progress, turn.action, compact(new.obs_after(i).split("\n\n")[0]))
        assert new.segments[0].final_progress == progress == "got the metal pot."


def test_flat_again_is_the_same_and_keeps_what_a_flat_agent_sampled_and_wrote():
    once = flat(annotate(small_episode()))
    assert flat(once) == once
    once.decisions = [Decision("executor", 0, [5, 2], [-1.0, -1.0])]
    once.turns[1].progress = "its own words"
    assert flat(once).decisions == once.decisions and flat(once).turns[1].progress == "its own words"


def test_flat_forgets_what_was_sampled_for_other_prompts():
    episode = annotate(small_episode())
    episode.decisions = [Decision("planner", 0, [5, 2], [-1.0, -1.0])]
    assert flat(episode).decisions == [] and len(episode.decisions) == 1


class Replay:
    """A world that shows the observations of an episode, whatever is done."""

    size = 1

    def __init__(self, episode: Episode):
        self.episode, self.t = episode, 0

    def call(self, requests: dict) -> dict:
        episode, seen = self.episode, [*(t.obs for t in self.episode.turns), self.episode.final_obs]
        self.t += ("step",) in [request[:1] for request in requests.values()]
        over = self.t == len(episode.turns)
        now = StepResult(seen[self.t], episode.description, 0.0, 0.0, over, False, over)
        return dict.fromkeys(requests, now)


class Expert:
    """Plays the actions of an episode and writes progress by the rules, from its prompt alone."""

    def __init__(self, episode: Episode):
        self.episode, self.asked, self.actions = episode, [], 0

    def answer(self, requests: list) -> list[Answer]:
        self.asked += requests
        return [Answer(self.say(r), [2], [0.0], 1) for r in requests]

    def say(self, request) -> str:
        if request.role == "progress":
            lines = [line.partition(": ")[2] for line in request.prompt.splitlines()[1:5]]
            return f" {progress_text(*lines)}"
        self.actions += 1
        action = self.episode.turns[self.actions - 1].action
        return executor_answer(action, self.actions == len(self.episode.turns))


@pytest.mark.parametrize("history", ["progress", "full", "window"])
def test_flat_gives_training_the_prompts_and_answers_of_a_flat_agent_at_play(history, gold):
    for raw in [small_episode(), *list(gold.values())[::5]]:
        raw = annotate(raw)  # drops what follows the end
        expert = Expert(raw)
        pool, panel = Replay(raw), [(raw.task, raw.variation)]
        (played,) = rollout(pool, panel, expert, judge, history=history, ends="episode", max_actions=2)
        items = transitions(flat(raw), history, flat=True)
        assert [(t.level, t.prompt) for t in items] == [(r.role, r.prompt) for r in expert.asked]
        assert len(items) == (2 if history == "progress" else 1) * len(raw.turns) - (history == "progress")
        told = [(t.level, t.completion, t.next_prompt) for t in transitions(played, history, flat=True)]
        assert [(t.level, t.completion, t.next_prompt) for t in items] == told


# --- progress ---------------------------------------------------------------------------------------------
def test_progress_text_is_pure():
    inputs = [
        ("get the metal pot", "None", "open cupboard", "The cupboard is now open."),
        (
            "wait",
            "temperature: 10 degrees celsius.",
            "wait",
            "You decide to wait for 10 iterations.",
        ),
    ]
    first = [progress_text(*i) for i in inputs]
    progress_text("go to the kitchen", "in the hallway.", "go to kitchen", "You move to the kitchen.")
    assert [progress_text(*i) for i in reversed(inputs)] == first[::-1]
    assert first == ["the cupboard is open.", "temperature: 10 degrees celsius. waited once."]


def test_a_refusal_does_not_take_the_last_connection_from_the_progress():
    task, link = "connect battery anode to yellow wire", "connected anode on battery to x."
    refused = progress_text(task, link, "connect y to z", "No known action matches that input.")
    assert refused == f"{link} the action is not understood."
    later = progress_text(task, refused, "connect y to z", "y is now connected to z")
    assert later == "connected y to z."


def test_progress_counts_waits_and_stays_of_one_size():
    text = "None"
    for _ in range(40):
        text = progress_text("wait and look around", text, "wait1", "You decide to wait for 1 iterations.")
    assert text == "waited twelve times."


@pytest.mark.parametrize(
    "action, feedback, fact",
    [
        (
            "activate sink",
            "The sink appears broken, and can't be activated or deactivated.",
            "the sink is broken.",
        ),
        (
            "use thermometer in inventory on ice",
            "the thermometer measures a temperature of -5 degrees celsius",
            "-5 degrees",
        ),
        ("examine stopwatch", "a stopwatch, which is deactivated. The time reads 22 ticks.", "22 ticks"),
        ("mix jug", "Blue and yellow paint mix to produce green paint.", "green paint"),
        ("go to foundry", "You move to the foundry.", "foundry"),
    ],
)
def test_progress_carries_what_decides_the_next_step(action, feedback, fact):
    assert fact in progress_text("x", "None", action, feedback)


# --- judge ------------------------------------------------------------------------------------------------
CASES = [  # subtask, an observation that completes it, near misses that do not
    ("go to the kitchen", obs("You move to the kitchen."), [obs("You move to the hallway.", HALLWAY)]),
    ("explore the kitchen", obs(KITCHEN), [obs("You move to the kitchen."), obs(HALLWAY, HALLWAY)]),
    (
        "get the metal pot",
        obs("You move the metal pot to the inventory.", KITCHEN, "metal pot"),
        [
            obs("You move the tin cup to the inventory.", KITCHEN, "tin cup", "metal pot"),
            obs("You move the metal pot to the inventory.", KITCHEN, "tin cup"),
            obs("The cupboard is now open.", KITCHEN, "metal pot"),
        ],
    ),
    (
        "focus on the blue jay egg",
        obs("You focus on the blue jay egg."),
        [
            obs("You focus on the dove egg."),
            obs("You focus on the blue box."),
            obs("You move the blue jay egg to the box."),
        ],
    ),
    (
        "put the dove egg in the red box",
        obs("You move the dove to the red box."),
        [obs("You move the dove to the green box."), obs("You move the jay to the red box.")],
    ),
    (
        "fill the metal pot at the sink",
        obs(
            "You move the metal pot to the inventory.",
            KITCHEN,
            "metal pot (containing a substance called water)",
        ),
        [
            obs("You move the metal pot to the inventory.", KITCHEN, "metal pot (containing nothing)"),
            obs("The sink is now activated."),
        ],
    ),
    ("fill the metal pot at the sink", obs("The sink appears broken, and can't be activated."), []),
    (
        "connect blue wire to anode in red light bulb",
        obs("terminal 2 on blue wire is now connected to anode on red light bulb"),
        [
            obs("terminal 2 on black wire is now connected to cathode on red light bulb"),
            obs("anode on battery is now connected to terminal 1 on blue wire"),
            obs("terminal 2 on blue wire is now connected to cathode on red light bulb"),
        ],
    ),
    (
        "measure the temperature of the water",
        obs("the thermometer measures a temperature of 9 degrees"),
        [obs("water"), obs(KITCHEN + ", reading a temperature of 9 degrees")],
    ),
    (
        "wait for the adult turtle",
        obs("You decide to wait for 1 iterations.", KITCHEN + "\n\ta adult turtle"),
        [
            obs("You decide to wait for 1 iterations.", KITCHEN + "\n\ta juvenile turtle\n\ta adult wolf"),
            obs(KITCHEN + "\n\ta adult turtle", KITCHEN + "\n\ta adult turtle"),
        ],
    ),
    (
        "drop the aluminum foil",
        obs("You move the aluminum foil to the kitchen."),
        [obs("You move the aluminum foil to the red box.")],
    ),
]


@pytest.mark.parametrize("subtask, complete, near_misses", CASES, ids=[c[0] for c in CASES])
def test_judge_accepts_the_completion_and_refuses_near_misses(subtask, complete, near_misses):
    assert judge(subtask, complete)
    assert [judge(subtask, miss) for miss in near_misses] == [False] * len(near_misses)


@pytest.mark.parametrize(
    "subtask", ["", "win the game", "try another action", "please get the metal pot quickly", "go"]
)
def test_judge_never_accepts_a_subtask_of_unknown_form(subtask):
    assert not judge(subtask, obs("You move the metal pot to the inventory.", KITCHEN, "metal pot"))
