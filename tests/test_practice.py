"""Practice: exploration whose subtasks, named afterwards, teach the executor (collect.py, train_sft.py)."""

import random
import re
from itertools import pairwise

import pytest

import annotate
import collect
import scripted
import train_sft
from data import Episode, Segment, Transition, Turn, read_episodes, write_episodes
from envs import OBS_SEPARATOR, EnvPool, StepResult, read_panel
from prompts import NOT_UNDERSTOOD, refused, split_obs
from renaming import vocabulary

PANEL = [(task, variation) for task in ("find-animal", "find-plant") for variation in range(4)]


@pytest.fixture(scope="module")
def played() -> dict[bool, list[Episode]]:
    """The same episodes, explored and practised, in the real simulator."""
    with EnvPool("scienceworld", 8, workers=1, max_steps=40) as pool:
        return {
            practice: list(scripted.play_explore(pool, PANEL, "scienceworld", 0, practice))
            for practice in (False, True)
        }


def test_who_practises_goes_through_the_doors_it_opens_and_on(played):
    def walks(episodes):
        actions = [t.action for e in episodes for t in e.turns]
        return sum(a.startswith("go to ") for a in actions) / len(actions), re.findall(
            r"open door to ([\w ]+)\ngo to \1\n", "\n".join(actions) + "\n"
        )

    moves, through = walks(played[False])
    more_moves, more_through = walks(played[True])
    assert more_moves > moves and len(more_through) > 2 * len(through)


def test_who_practises_answers_the_worlds_question_and_focuses_at_the_end(played):
    for practice, episodes in played.items():
        asked = [(e, i) for e in episodes for i, t in enumerate(e.turns) if t.obs.startswith("Ambiguous")]
        focused = [i for e in episodes for i, t in enumerate(e.turns) if t.action.startswith("focus on ")]
        assert asked and all((e.turns[i].action == "0") == practice for e, i in asked)
        assert bool(focused) == practice and all(i > 30 for i in focused)
    answers = [
        t for e in map(annotate.practised, played[True]) for t in train_sft.hindsight(e, "progress")
        if t.level == "executor" and t.completion.startswith(" 0")
    ]  # fmt: skip
    assert answers and all("\nProgress: None\n" in t.prompt for t in answers)
    assert all("\nObservation: Ambiguous" in t.prompt for t in answers)


def test_hindsight_keeps_what_was_verified_and_no_plans(played):
    episodes = [annotate.practised(e) for e in played[True]]
    found = [t for e in episodes for t in train_sft.hindsight(e, "progress")]
    assert {t.level for t in found} == {"executor", "progress"}
    segments = [(e, s) for e in episodes for s in e.segments]
    done = [(e, s) for e, s in segments if e.turns[s.end - 1].verified_done]
    changed = [
        (e, s) for e, s in done
        if s.subtask.startswith("focus on ")
        or split_obs(e.turns[s.start].obs)[1:] != split_obs(e.obs_after(s.end - 1))[1:]
    ]  # fmt: skip
    assert 0 < len(changed) < len(done) < len(segments)
    assert sum(t.level == "executor" for t in found) == sum(s.end - s.start for _, s in changed)
    answers = [t.completion for t in found if t.level == "executor"]
    assert sum(a.endswith("; True") for a in answers) == len(changed), "each of them ends with a claim"
    ended = sum(t.terminated for e in episodes for t in e.turns)
    assert sum(t.level == "progress" for t in found) == sum(len(e.turns) for e in episodes) - ended


def test_hindsight_by_hand():
    def obs(feedback, room):
        return OBS_SEPARATOR.join([feedback, room, ""])

    turns = [
        Turn(obs("", "den"), "open door", "", 0.0, False, False, "go to the hall", "None"),
        Turn(obs("", "den"), "go to hall", "", 0.0, False, False, "go to the hall", "open.", True, True),
        Turn(obs("", "hall"), "mix air", "", 0.0, False, False, "mix the air", "None", True, False),
        Turn(obs("no", "hall"), "look", "", 0.0, False, True, "explore the hall", "None", True, True),
    ]
    segments = [
        Segment("go to the hall", 0, 2, "in the hall."), Segment("mix the air", 2, 3, "nothing."),
        Segment("explore the hall", 3, 4, "looked around."),
    ]  # fmt: skip
    episode = Episode("scienceworld", "boil", 0, "d", turns, segments, obs("a hall", "hall"))
    found = train_sft.hindsight(episode, "progress")
    assert [t.completion for t in found if t.level == "executor"] == [
        " open door; False", " go to hall; True"
    ], "not what was not done, nor what changed nothing"  # fmt: skip
    assert [t.turn for t in found if t.level == "progress"] == [0, 1, 2, 3]
    assert {t.level for t in found} == {"executor", "progress"}


def test_exploration_is_drawn_as_often_as_all_task_types_and_stumbles_with_their_own():
    def decision(level, task, source="expert"):
        return Transition(
            level, "p", " a", [], [], 0.0, 1, True, False, "", level, source, f"{source}/{task}/0", 0
        )

    found = [decision(level, task) for level in ("planner", "executor", "progress") for task in ("a", "b")]
    found += [decision("planner", "a", "stumble-0"), decision("progress", "b", "stumble-0")]
    found += [
        decision(level, task, "practice-0") for level in ("executor", "progress") for task in ("a", "c")
    ]
    pools, ratio = train_sft.by_level_and_task(found, (2.0, 2.0, 1.0))
    parts = {f"{level}/{task}": share * part for level, share in (("executor", 2.0), ("progress", 1.0))
             for task, part in (("a", 1 / 4), ("b", 1 / 4), ("practice", 1 / 2))}  # fmt: skip
    assert ratio == pytest.approx({"planner/a": 1.0, "planner/b": 1.0} | parts)
    assert {name: len(pool) for name, pool in pools.items() if len(pool) > 1} == {
        "planner/a": 2, "progress/b": 2, "executor/practice": 2, "progress/practice": 2
    }  # fmt: skip


def test_task_types_are_drawn_as_if_each_had_as_many_episodes():
    def decisions(task, episodes, plans):
        return [
            Transition("planner", "p", " a", [], [], 0.0, 1, True, False, "", "planner", "expert",
                       f"scienceworld/{task}/{k}", turn)
            for k in range(episodes) for turn in range(plans)
        ]  # fmt: skip

    _, ratio = train_sft.by_level_and_task(
        decisions("long", 1, 6) + decisions("short", 5, 2), (3.0, 2.0, 1.0)
    )
    assert ratio == pytest.approx({"planner/long": 3.0 * 6 / 8, "planner/short": 3.0 * 2 / 8})


def test_practice_is_collected_with_subtasks_and_needs_a_hierarchy(tmp_path):
    file = tmp_path / "practice.jsonl"
    collect.main(collect.Config(file, "practice", limit=1, max_steps=6, slots=8, workers=1, threads=1))
    episodes = read_episodes(file)
    assert len(episodes) == len({task for task, _ in read_panel("scienceworld", "demo", "train")})
    assert all(e.segments and e.source.startswith("practice") for e in episodes)
    for flag in ("flat", "plan_execute"):
        with pytest.raises(ValueError, match="--practice"):
            train_sft.main(train_sft.Config(file, tmp_path / "out", practice=(file,), **{flag: True}))


def path_of_three():
    """An expert's annotated path: go, get, put."""

    def obs(feedback, room, held=""):
        return OBS_SEPARATOR.join([feedback, room, held])

    plan = [("go to the hall", ["open door to hall", "go to hall"]), ("get the mug", ["pick up mug"]),
            ("put the mug in the sink", ["move mug to sink"])]  # fmt: skip
    turns = [Turn(obs("", "den"), a, "", 0.0, False, False, s, "None") for s, part in plan for a in part]
    turns[1].verified_done = turns[2].verified_done = turns[3].verified_done = True
    segments = [Segment("go to the hall", 0, 2, ""), Segment("get the mug", 2, 3, ""),
                Segment("put the mug in the sink", 3, 4, "")]  # fmt: skip
    return Episode("scienceworld", "boil", 0, "d", turns, segments, obs("", "hall"), source="expert")


def test_slips_are_neighbouring_subtasks_and_actions():
    gold = path_of_three()
    plain = [("go to the hall", [("open door to hall", False), ("go to hall", False)]),
             ("get the mug", [("pick up mug", False)]),
             ("put the mug in the sink", [("move mug to sink", False)])]  # fmt: skip
    assert scripted.with_slips(gold, 0.0, 0.0, random.Random(0)) == plain
    tries, early = set(), set()
    for seed in range(50):
        parts = scripted.with_slips(gold, 0.5, 0.0, random.Random(seed))
        assert [part for part in parts if not part[1][0][1]] == plain
        for i, (subtask, steps) in enumerate(parts):
            if steps[0][1]:
                following = next(part[0] for part in parts[i:] if not part[1][0][1])
                tries.add((following, subtask, steps[0][0]))
        parts = scripted.with_slips(gold, 0.0, 0.5, random.Random(seed))
        assert [(s, [step for step in steps if not step[1]]) for s, steps in parts] == plain
        steps = [step for _, part in parts for step in part]
        early |= {(a, b) for (a, slip), (b, _) in pairwise(steps) if slip}
    names = {s.subtask: gold.turns[s.end - 1].action for s in gold.segments}
    expected = {(a, b, names[b]) for a in names for b in names if a != b}
    assert tries == expected - {("put the mug in the sink", "go to the hall", "go to hall")}, (
        "one back at most"
    )
    again = {
        ("open door to hall", "go to hall"),
        ("go to hall", "pick up mug"),
        ("pick up mug", "move mug to sink"),
    }
    assert early == again | {("go to hall", "open door to hall")}, "the one before, the next of the subtask"


def test_a_stumbling_expert_fails_at_tries_alone_and_arrives():
    panel = [("lifespan-longest-lived", 0), ("chemistry-mix-paint-secondary-color", 0)]
    with EnvPool("scienceworld", 2, workers=1, max_steps=10**6) as pool:
        gold = [annotate.annotate(e) for e in scripted.play_gold(pool, panel, "scienceworld")]
        judge = annotate.rules("scienceworld").judge
        stumbled = list(scripted.play_stumbling(pool, gold, "scienceworld", 0, judge, 0.8, 0.5))
    assert sorted(e.task for e in stumbled) == sorted(e.task for e in gold)
    tries = slips = 0
    for e in stumbled:
        (path,) = [g for g in gold if g.task == e.task]
        e = annotate.fill_in(e, [(s.subtask, s.start, s.end) for s in e.segments])
        failed = [s for s in e.segments if not e.turns[s.end - 1].verified_done]
        assert all(s.end == s.start + 1 and refused(e.obs_after(s.start)) for s in failed)
        vain = {t for t in range(len(e.turns)) if refused(e.obs_after(t))}
        assert e.success and [t.action for i, t in enumerate(e.turns) if i not in vain] == [
            t.action for t in path.turns
        ], "without its slips it is the gold path"
        learned = train_sft.hindsight(e, "progress")
        plans = [t for t in learned if t.level == "planner"]
        assert [t.completion for t in plans] == [" " + s.subtask for s in path.segments], "no try is imitated"
        after = [t for t in plans if refused(e.turns[t.turn].obs)]
        assert len(after) == sum(a in failed and b not in failed for a, b in pairwise(e.segments))
        acts = {t.turn for t in learned if t.level == "executor"}
        assert acts == {t + 1 for t in vain if t + 1 not in vain}, "what the expert does after a refusal"
        tries += len(failed)
        slips += len(vain) - len(failed)
    assert tries > 1 < slips


def test_a_connection_that_is_made_again_is_a_stumble():
    with EnvPool("scienceworld", 1, workers=1, max_steps=10**6) as pool:
        gold = [
            annotate.annotate(e)
            for e in scripted.play_gold(pool, [("test-conductivity", 477)], "scienceworld")
        ]
        judge = annotate.rules("scienceworld").judge
        found = [
            e for seed in range(4) for e in scripted.play_stumbling(pool, gold, "scienceworld", seed, judge)
        ]
    again = [(e, t) for e in found for t in range(len(e.turns)) if "is already connected" in e.obs_after(t)]
    assert again and all(e.success and not e.turns[t].verified_done for e, t in again)


def test_a_try_that_the_world_understands_is_taken_out_and_the_path_played_again():
    """A world in which the mug can be picked up from everywhere."""

    class Pool:
        size, rounds = 1, 0

        def call(self, asked):
            return {slot: self.answer(*args) for slot, (_, *args) in asked.items()}

        def answer(self, action, *variation):
            if variation:  # a reset
                self.rounds, self.here = self.rounds + 1, "den"
                return StepResult("\n\nden\n\n", "d", 0.0, 0.0, False, False, False)
            follows = {"go to hall": "door", "move mug to sink": "hall"}
            fine, won = follows.get(action, self.here) == self.here, action == "move mug to sink"
            if fine:
                self.here = {"open door to hall": "door", "go to hall": "hall"}.get(action, self.here)
            said = "Done." if fine else NOT_UNDERSTOOD[0]
            return StepResult(f"{said}\n\n{self.here}\n\n", "d", 0.0, 0.0, fine and won, False, fine and won)

    pool = Pool()
    (e,) = scripted.play_stumbling(pool, [path_of_three()], "scienceworld", 0, lambda *_: False, tries=0.9)
    assert pool.rounds > 1 and e.success
    names = [s.subtask for s in e.segments]
    assert (
        names.count("get the mug") == 1 < names.count("put the mug in the sink")
        and names[-1] == "put the mug in the sink"
    )


def test_stumbles_are_collected_as_annotated_successes(tmp_path):
    gold, file = tmp_path / "gold.jsonl", tmp_path / "stumbles.jsonl"
    common = {"limit": 1, "slots": 8, "workers": 1, "threads": 1}
    with pytest.raises(ValueError, match="needs --gold"):
        collect.main(collect.Config(file, "stumble", **common))
    collect.main(collect.Config(gold, **common))
    collect.main(collect.Config(file, "stumble", gold=gold, **common))
    episodes = read_episodes(file)
    assert episodes and all(e.success and e.segments and e.source.startswith("stumble") for e in episodes)
    assert all(t.progress for e in episodes for t in e.turns)
    alone, under = (
        [t for e in episodes for t in train_sft.hindsight(e, "progress", flat) if t.level != "planner"]
        for flat in (True, False)
    )
    assert [(t.episode_id, t.level, t.turn) for t in alone] == [
        (t.episode_id, t.level, t.turn) for t in under
    ]
    assert any(t.level == "executor" for t in alone)
    assert all("Subtask: Your task is" in t.prompt for t in alone)
    episodes[0].segments[0].subtask = "stroll"
    write_episodes(file, episodes)
    with pytest.raises(ValueError, match="labelled by other rules"):
        collect.main(collect.Config(file, "stumble", gold=gold, **common))


def test_the_words_of_new_names_are_pieces_that_begin_a_word_and_words_put_together():
    class Pieces:
        def __len__(self):
            return 7

        def convert_ids_to_tokens(self, ids):
            return [["Ġmug", "ing", "Ġa", "ĠMug", "▁lamp", "Ġ123", "<eos>"][i] for i in ids]

    words = vocabulary(Pieces())
    assert words[:2] == ["lamp", "mug"] and len(words) == 2 + 3, "three with each part: ing"
    assert {w.removesuffix("ing").removesuffix("ing") for w in words[2:]} <= {"mug", "lamp", "a"}
    assert words == vocabulary(Pieces())


def test_a_walk_is_its_last_step_and_other_doors_stay():
    path = [
        "open door to hallway", "go to hallway", "open door to kitchen", "go to kitchen", "pick up cup",
        "open door to outside", "go to outside", "open bee hive", "open door to foundry",
    ]  # fmt: skip
    kept = ["go to kitchen", "pick up cup", "go to outside", "open bee hive", "open door to foundry"]
    assert scripted.without_detours(path) == kept


def test_a_room_is_looked_at_once_unless_time_passed():
    path = ["look around", "pick up cup", "look around", "go to den", "look around", "wait1", "look around"]
    kept = ["look around", "pick up cup", "go to den", "look around", "wait1", "look around"]
    assert scripted.without_detours(path) == kept


def test_what_is_searched_is_opened_in_one_order_until_it_is_found():
    search = ["open oven", "open fridge", "open drawer in counter", "open freezer"]
    found = ["open fridge", "open freezer"]
    assert scripted.in_order(["get cup", *search, "focus on ice"]) == ["get cup", *found, "focus on ice"]
    assert scripted.in_order(["open freezer", "focus on ice"]) == [*found, "focus on ice"]
    elsewhere = ["open fridge", "open freezer", "open oven", "open drawer in counter", "go to den"]
    assert scripted.in_order([*search, "go to den"]) == elsewhere
    for path in (
        ["open freezer", "move pot to freezer"],
        ["open cupboard", "open oven", "activate oven"],
        search[:1],
    ):
        assert scripted.in_order(path) == path


def test_a_gardener_waits_ten_ticks_at_once_and_waters_twice():
    water = ["activate sink", "move jug to sink", "pour jug into flower pot 3", "deactivate sink"]
    ticks = ["wait1"] * 5 + ["look around"]
    path = ["go to greenhouse", "look around", *water, *ticks, *water, *ticks, *water, "open bee hive"]
    path += [*ticks, *water, "focus on banana on banana tree", "0", *ticks, "wait1"]
    kept = ["go to greenhouse", "look around", *water, "wait", *water, "wait", "open bee hive", "wait"]
    kept += ["wait"] * 3 + ["focus on banana on banana tree"]
    assert scripted.without_idling(path, measures=False) == kept


def test_who_is_not_asked_to_measure_waits_for_as_many_ticks():
    looks = ["examine ice", "use thermometer in inventory on ice"]
    path = ["focus on ice", "activate stove", *looks * 11, "pick up pot", *looks, "wait", *looks, "wait"]
    kept = ["focus on ice", "activate stove", *looks, "wait", "wait", "pick up pot", *looks, "wait", "wait"]
    assert scripted.without_idling(path, measures=False) == kept + ["wait"] * 3
    assert scripted.without_idling(path, measures=True) == path + ["wait"] * 3
    assert scripted.without_idling(["go to den", "wait1", "wait1"], True) == ["go to den"] + ["wait1"] * 2


@pytest.mark.parametrize(
    "task, variation, before", [("grow-fruit", 3, 72), ("boil", 12, 86), ("freeze", 5, 59)]
)
def test_gold_comes_to_its_end_within_fifty_steps_where_it_idled(task, variation, before):
    with EnvPool("scienceworld", 1, workers=1, max_steps=10**6) as pool:
        (path,) = scripted.play_gold(pool, [(task, variation)], "scienceworld")
    assert path.success and len(path.turns) <= 50 < before
    assert not any(t.obs.startswith("Ambiguous") and not t.action.isdigit() for t in path.turns)


def test_gold_names_the_buzzer_whole_and_what_is_held_in_short():
    panel = [("test-conductivity", 495), ("use-thermometer", 0)]
    with EnvPool("scienceworld", 1, workers=1, max_steps=10**6) as pool:
        path, measured = scripted.play_gold(pool, panel, "scienceworld")
        theirs = pool.call({0: ("gold_path", *panel[1])})[0]
    assert sum(" in inventory" in action for action in theirs) > 1
    assert measured.success and not any(" in inventory" in t.action for t in measured.turns)
    assert path.success and path.turns[-1].action.startswith("move paper clip")
    assert [t.action.split(" in ")[1] for t in path.turns if " in " in t.action] == ["electric buzzer"] * 2


def test_gold_goes_the_shortest_way_and_connects_one_device_after_another():
    panel = [("test-conductivity", 477)]  # the simulator's path looks for the clip in four wrong rooms
    with EnvPool("scienceworld", 1, workers=1, max_steps=10**6) as pool:
        theirs = pool.call({0: ("gold_path", *panel[0])})[0]
        (ours,) = scripted.play_gold(pool, panel, "scienceworld")
    walks = [[a for a in path if a.startswith("go to")] for path in (theirs, [t.action for t in ours.turns])]
    assert ours.success and len(walks[0]) > len(walks[1])
    assert walks[1] == ["go to hallway", "go to kitchen", "go to hallway", "go to workshop"]
    names = [s.subtask for s in annotate.annotate(ours).segments]
    links = [match.groups() for name in names if (match := re.fullmatch(r"connect (.+) to (.+)", name))]
    (anode, first), (cathode, second), (wire, _), (last, _), near, far = links
    assert (anode, cathode) == ("battery anode", "battery cathode") and wire == first
    assert (near, far) == (("paper clip terminal 1", second), ("paper clip terminal 2", last)), "a loop"


@pytest.mark.parametrize("room", ["kitchen", "cellar"])  # there already; where no door leads on
def test_gold_falls_back_to_the_simulators_way_where_the_shortest_fails(room):
    class Pool:  # a world in which only the path with the detour ends well
        size = 1

        def call(self, asked):
            if not asked:
                return {}
            (kind, *rest) = asked[0]
            if kind == "gold_path":
                return {0: ["open door to hallway", "go to hallway", "open door to kitchen", "go to kitchen"]}
            self.actions = [] if kind == "reset" else [*self.actions, *rest]
            long = self.actions[1:2] == ["go to hallway"] and len(self.actions) == 4
            obs = OBS_SEPARATOR.join(["", f"This room is called the {room}. In it, you see: nothing", ""])
            return {0: StepResult(obs, "task", 0.0, 100.0 * long, long, False, long)}

    (e,) = scripted.play_gold(Pool(), [("any", 0)], "scienceworld")
    assert e.success and len(e.turns) == 4
