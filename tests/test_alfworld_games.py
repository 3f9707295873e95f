"""alfworld_games.py and alfworld_experts.py: official and generated games, and experts that win them."""

import json
import lzma
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from alfworld_experts import homes, oracle, oracle_command, parse_task, searcher, things_in
from alfworld_fast import NOTHING, Engine, Goal, parse_game
from alfworld_games import SPLITS, TASK_TYPES, GameFile, find_game, generate, read_games, recorded_actions

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ALFWORLD_DATA") or ROOT.parent / "shared" / "alfworld")
UNSEEN = {10, 219, 308, 424}


def load(game: GameFile, grammar: str = "move") -> Engine:
    return Engine(parse_game(game.problem, game.task), grammar)


def play_oracle(engine: Engine) -> int:
    """Steps until the goal holds, or 1000 when the oracle gives up before."""
    for steps, command in enumerate(oracle(engine), start=1):
        assert engine.step(command)[0] != NOTHING and steps < 100, command
    return steps if engine.won else 1000


def play_searcher(engine: Engine) -> int:
    """The same for the searcher, which is given nothing but the texts."""
    player, steps = searcher(engine.reset(), engine.grammar), 0
    try:
        command = next(player)
        while steps < 200:
            obs, won = engine.step(command)
            steps += 1
            if won:
                return steps
            command = player.send(obs)
    except StopIteration:
        pass
    return 1000


@pytest.fixture(scope="module")
def generated() -> dict[str, list[GameFile]]:
    return {split: generate(split, 60) for split in SPLITS}


@pytest.fixture
def official(monkeypatch) -> dict[str, list[GameFile]]:
    if not any((DATA / name).exists() for name in ("valid_seen.jsonl.xz", "json_2.1.1")):
        pytest.skip("no official games: ALFWORLD_DATA is not set")
    monkeypatch.setenv("ALFWORLD_DATA", str(DATA))
    return {split: read_games(split) for split in ("valid_seen", "valid_unseen")}


# --- generated games ----------------------------------------------------------------------------------------
def test_generated_games_are_of_all_six_types_in_turn_and_say_that_they_are_generated(generated):
    for split, games in generated.items():
        assert [game.task_type for game in games] == [TASK_TYPES[i % 6] for i in range(60)]
        assert {game.source for game in games} == {"generated"}
        assert len({game.id for game in games}) == len({game.problem for game in games}) == 60
        assert all(
            game.id.startswith(game.task_type) and f"/generated_{split}_0_" in game.id for game in games
        )


def test_rooms_of_valid_unseen_are_in_no_other_split(generated):
    rooms = {split: {game.room for game in games} for split, games in generated.items()}
    assert rooms["valid_unseen"] == UNSEEN
    assert not UNSEEN & (rooms["train"] | rooms["valid_seen"]) and len(rooms["train"]) > 20


def test_generated_games_are_open_at_the_start_and_won_by_the_oracle(generated):
    for game in (game for games in generated.values() for game in games):
        engine = load(game)
        assert not engine.won, game.id
        assert play_oracle(engine) <= 12, game.id


def test_the_goal_of_a_generated_game_is_the_one_its_sentence_and_id_state(generated):
    for game in (game for games in generated.values() for game in games):
        goal = load(game).game.goal
        assert goal == parse_task(game.task), game.id
        _, thing, _, target, _ = game.id.split("/")[0].split("-")
        assert (thing.lower(), target.lower()) == (goal.object, goal.receptacle or goal.lamp)


def test_games_are_deterministic_in_any_process_and_game_i_does_not_depend_on_the_count(generated):
    assert generate("train", 12) == generated["train"][:12]
    assert generate("train", 6, seed=1) != generated["train"][:6]
    code = "import alfworld_games as g, zlib; print(zlib.crc32(repr(g.generate('train', 12)).encode()))"
    digests = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1 and digests.pop().isdigit()


def test_generated_rooms_are_as_large_as_official_ones(generated):
    """Official train games: 6 to 54 receptacles (mean 23.5), 17 to 73 objects (mean 41.4)."""
    sizes = [
        (len(e.game.location), len(e.game.kinds) - len(e.game.location))
        for e in map(load, generated["train"])
    ]
    receptacles, objects = (sum(size) / len(sizes) for size in zip(*sizes, strict=True))
    assert 15 < receptacles < 30 and 30 < objects < 60


def test_the_table_of_rooms_names_its_source_and_stays_small():
    path = ROOT / "panels" / "alfworld_rooms.json"
    assert path.stat().st_size < 60_000
    table = json.loads(path.read_text())
    assert "MIT license" in table["about"] and set(table["unseen"]) == UNSEEN
    assert UNSEEN < set(map(int, table["rooms"]))


# --- where games come from ----------------------------------------------------------------------------------
def write_download(folder: Path, game: GameFile, solvable: bool = True) -> None:
    """A game in the layout of alfworld-download."""
    trial = folder / "json_2.1.1" / "train" / game.id
    trial.mkdir(parents=True)
    grammar = f'grammar :: """ {{"task": [{{ "rhs": "Your task is to: {game.task}." }}]}} """'
    content = {"grammar": grammar, "pddl_problem": game.problem, "solvable": solvable}
    (trial / "game.tw-pddl").write_text(json.dumps(content))
    (trial / "traj_data.json").write_text(json.dumps({"task_type": game.task_type}))


def test_downloaded_games_are_read_and_only_the_solvable_ones_of_the_six_types(
    generated, monkeypatch, tmp_path
):
    good, unsolvable, other = generated["train"][:3]
    write_download(tmp_path, good)
    write_download(tmp_path, unsolvable, solvable=False)
    write_download(tmp_path, GameFile(other.id, "pick_and_place_with_movable_recep", "x", "", "official"))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert read_games("train") == [GameFile(good.id, good.task_type, good.task, good.problem, "official")]


def test_packed_games_are_read(generated, monkeypatch, tmp_path):
    rows = [
        {"id": g.id, "task_type": g.task_type, "task": g.task, "problem": g.problem}
        for g in generated["train"]
    ]
    with lzma.open(tmp_path / "train.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    games = read_games("train")
    assert [g.id for g in games] == [g.id for g in generated["train"]] and {g.source for g in games} == {
        "official"
    }
    assert read_games("train", ids=[games[5].id, games[2].id]) == [games[5], games[2]]


def test_without_data_games_are_generated_and_official_ones_are_refused(monkeypatch, generated):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    games = read_games("valid_unseen")
    assert games[:60] == generated["valid_unseen"] and len(games) == 134
    assert read_games("valid_unseen", "generated", [games[3].id]) == [games[3]]
    with pytest.raises(
        FileNotFoundError, match="pip install alfworld && alfworld-download.*export ALFWORLD_DATA="
    ):
        read_games("train", "official")


def test_wrong_splits_sources_ids_and_folders_are_errors_with_the_fix(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'test': expected one of .*'valid_seen'"):
        read_games("test")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        generate("test", 1)
    with pytest.raises(ValueError, match="unknown source 'real': expected auto, official or generated"):
        read_games("train", "real")
    with pytest.raises(ValueError, match="valid_seen has no game 'mug-1'"):
        read_games("valid_seen", "generated", ["mug-1"])
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="neither train.jsonl.xz nor json_2.1.1/train: run `alfworld-download`"
    ):
        read_games("train")
    broken = tmp_path / "json_2.1.1" / "train" / "task" / "trial"
    broken.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no solvable game.tw-pddl below"):
        read_games("train")
    (broken / "game.tw-pddl").write_text("{")
    with pytest.raises(ValueError, match="trial is not a game .*: run `alfworld-download -f` again"):
        read_games("train")


# --- experts ------------------------------------------------------------------------------------------------
def test_the_oracle_wins_from_any_state(generated):
    for i, game in enumerate(generated["train"][:24]):
        engine, rng = load(game, ("move", "put")[i % 2]), random.Random(i)
        for _ in range(40):
            commands = engine.admissible()
            near = [c for c in commands if not c.startswith("go to")]
            engine.step(rng.choice(near if rng.random() < 0.6 else commands))
        if not engine.won:
            assert play_oracle(engine) <= 20, game.id
        assert engine.won and oracle_command(load(game)) is not None


@pytest.mark.parametrize("grammar", ["move", "put"])
def test_the_searcher_wins_generated_games_from_texts_alone(generated, grammar):
    steps = [play_searcher(load(game, grammar)) for games in generated.values() for game in games]
    assert sum(n <= 50 for n in steps) >= 0.97 * len(steps), Counter(steps)


def converse(first_obs: str, conversation: list[tuple[str, str]]) -> None:
    """The searcher gives the commands on the left when answered the texts on the right, then ends."""
    player = searcher(first_obs)
    command = next(player)
    for expected, obs in conversation[:-1]:
        assert command == expected
        command = player.send(obs)
    assert command == conversation[-1][0]
    with pytest.raises(StopIteration):
        player.send(conversation[-1][1])


def test_the_searcher_visits_where_things_usually_are_and_opens_what_is_closed():
    converse(
        "Looking quickly around you, you see a bed 1, a cabinet 1, a diningtable 1, and a fridge 1."
        "\n\nYour task is to: cool some apple and put it in cabinet.",
        [
            ("go to diningtable 1", "You arrive at diningtable 1. On the diningtable 1, you see a mug 1."),
            ("go to fridge 1", NOTHING),  # it is at the same place
            ("examine fridge 1", "The fridge 1 is closed."),
            ("open fridge 1", "The fridge 1 is open. In it, you see a apple 12, and a egg 1."),
            ("take apple 12 from fridge 1", "You pick up the apple 12 from the fridge 1."),
            ("cool apple 12 with fridge 1", "You cool the apple 12 using the fridge 1."),
            ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
            ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see nothing."),
            ("move apple 12 to cabinet 1", "You move the apple 12 to the cabinet 1."),
        ],
    )


def test_the_searcher_takes_nothing_from_where_two_things_belong_and_begins_each_search_anew():
    converse(
        "you see a bed 1, a shelf 1, and a shelf 2.\n\nYour task is to: put two cd in shelf.",
        [
            ("go to shelf 2", "You arrive at shelf 2. On the shelf 2, you see a cd 2."),
            ("take cd 2 from shelf 2", "You pick up the cd 2 from the shelf 2."),
            ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a cd 3."),
            ("move cd 2 to shelf 1", "You move the cd 2 to the shelf 1."),
            ("go to shelf 2", "You arrive at shelf 2. On the shelf 2, you see nothing."),
            ("go to bed 1", "You arrive at bed 1. On the bed 1, you see a cd 1."),
            ("take cd 1 from bed 1", "You pick up the cd 1 from the bed 1."),
            ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a cd 2."),
            ("move cd 1 to shelf 1", "You move the cd 1 to the shelf 1."),
        ],
    )


def test_the_searcher_looks_for_the_lamp_and_gives_up_when_all_was_seen():
    task = "\n\nYour task is to: look at mug under the desklamp."
    converse(
        "you see a bed 1, and a desk 1." + task,
        [
            ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a desklamp 1, and a mug 1."),
            ("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
            ("examine desk 1", "On the desk 1, you see a desklamp 1."),  # what it listed is forgotten
            ("use desklamp 1", "You turn on the desklamp 1."),
        ],
    )
    converse("you see a desk 1." + task, [("go to desk 1", "On the desk 1, you see nothing.")])


def test_goal_sentences_and_listings_are_read():
    assert parse_task("find two pencil and put them in desk") == Goal("pencil", "desk", count=2)
    assert parse_task("examine the mug with the desklamp") == Goal("mug", lamp="desklamp")
    assert parse_task("put a hot mug in sidetable") == Goal("mug", "sidetable", treatment="heat")
    with pytest.raises(ValueError, match="unknown goal sentence 'make tea': expected an ALFWorld template"):
        parse_task("make tea")
    assert things_in("On the desk 1, you see a apple 2, a desklamp 1, and a mug 1.") == [
        "apple 2",
        "desklamp 1",
        "mug 1",
    ]
    assert things_in("On the desk 1, you see nothing.") == things_in("The fridge 1 is closed.") == []
    assert homes()["mug"]["coffeemachine"] > homes()["mug"]["cabinet"]


# --- official games -----------------------------------------------------------------------------------------
def test_official_games_are_all_there_by_type(official):
    assert {split: len(games) for split, games in official.items()} == {
        "valid_seen": 140,
        "valid_unseen": 134,
    }
    counts = {
        split: [Counter(g.task_type for g in games)[t] for t in TASK_TYPES]
        for split, games in official.items()
    }
    assert counts == {"valid_seen": [35, 13, 27, 16, 25, 24], "valid_unseen": [24, 18, 31, 23, 21, 17]}
    assert {game.room for game in official["valid_unseen"]} == UNSEEN


def test_both_experts_win_all_official_validation_games(official):
    for game in (game for games in official.values() for game in games):
        assert load(game).game.goal == parse_task(game.task)
        assert play_oracle(load(game)) <= 12, game.id
        assert play_searcher(load(game)) <= 50, game.id
        assert play_searcher(load(game, "put")) <= 50, game.id


def test_an_official_game_and_its_record_are_found_by_id(official):
    game = official["valid_unseen"][7]
    assert find_game(game.id) == game
    if (DATA / "gt_train.jsonl.xz").exists():
        name = "look_at_obj_in_light-AlarmClock-None-DeskLamp-301/trial_T20190907_174127_043461"
        engine = load(find_game(name))
        assert [engine.step(action)[1] for action in recorded_actions(name)][-1]
    with pytest.raises(ValueError, match="no recorded trajectory of .*: only official train games have one"):
        recorded_actions(game.id)
    with pytest.raises(ValueError, match="no game 'x/y' in"):
        find_game("x/y")


def test_a_generated_game_is_made_again_from_its_id(generated, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    game = generated["valid_unseen"][7]
    assert find_game(game.id) == game
    with pytest.raises(ValueError, match="this version does not generate x/generated_train_0_00003"):
        find_game("x/generated_train_0_00003")
    with pytest.raises(FileNotFoundError, match="official games need ALFWORLD_DATA"):
        find_game("pick_and_place_simple-Mug-None-Desk-308/trial_T1")
