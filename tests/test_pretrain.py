"""base/pretrain.py: what the text of the base holds, for both worlds."""

import random
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import scripted
from base import pretrain
from data import write_episodes
from envs import EnvPool, read_panel

DESK = (
    "You arrive at desk 1. On the desk 1, you see a mug 2, a mug 1, and a pen 3.\n\n"
    "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a safe 1.\n\n"
    "You are not carrying anything."
)
KITCHEN = (
    "You look around.\n\nThis room is called the kitchen. In it, you see: \n\tthe agent\n\ta stove, which "
    "is turned off. On the stove is: nothing.\n\ta metal pot (containing nothing)\n\n\n"
    "In your inventory, you see:"
)


def test_things_are_those_of_the_list_that_was_just_read():
    assert pretrain.things(DESK) == {"mug": "mug 1", "pen": "pen 3"}
    assert pretrain.things(KITCHEN) == {"stove": "yes", "metal pot": "yes"}
    assert pretrain.things(DESK.replace("a mug 2, a mug 1, and a pen 3", "nothing")) == {}


def test_questions_are_answered_by_what_is_there():
    rng = random.Random(0)
    lines = {pretrain.question(pretrain.things(DESK), ["mug", "pen", "lamp"], rng) for _ in range(60)}
    assert lines == {"Is there mug? mug 1", "Is there pen? pen 3", "Is there lamp? no"}
    assert pretrain.question({}, [], rng) == "Is there air? no"


def test_a_document_holds_random_play_and_as_many_questions_as_asked_for():
    with EnvPool("alfworld", 1, workers=0, max_steps=30) as pool:
        panel = read_panel("alfworld", "demo", "train", 1)[:1]
        (episode,) = scripted.play_explore(pool, panel, "alfworld", seed=0)
    texts = {q: pretrain.document(episode, random.Random(1), q) for q in (0.0, 1.0, 3.0)}
    assert texts[0.0].startswith("Task: Your task is to: ") and "Is there" not in texts[0.0]
    for q in (1, 3):
        asked = texts[q].count("\nIs there ")
        assert asked == q * (texts[q].count("\nObservation: ") + texts[q].count("\nResult: "))
    assert set(re.findall(r"Result: .*; (\w+)", texts[0.0])) == {"True", "False"}
    assert "Act on the subtask" not in texts[3.0] and "Progress" not in texts[3.0]


def test_dropout_shows_pieces_that_stand_only_inside_other_words_and_changes_no_text():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(pretrain.__file__).parent)
    plain = pretrain.encode(tokenizer, ["Action: examine mug 2"] * 200)
    varied = pretrain.encode(tokenizer, ["Action: examine mug 2"] * 2000, dropout=0.3)
    piece = tokenizer.convert_tokens_to_ids("Ġex")
    assert len(set(map(tuple, plain))) == 1 and piece not in plain[0]
    assert sum(piece in ids for ids in varied) > 20
    assert {tokenizer.decode(ids) for ids in plain + varied} == {"<bos>Action: examine mug 2<eos>"}
    assert pretrain.encode(tokenizer, ["Action: examine mug 2"]) == plain[:1], "and afterwards it is off"


def test_an_epoch_draws_text_and_names_anew_and_a_seed_says_which():
    with EnvPool("alfworld", 1, workers=0, max_steps=10) as pool:
        panel = read_panel("alfworld", "demo", "train", 1)[:1]
        episodes = list(scripted.play_explore(pool, panel, "alfworld", seed=0))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(pretrain.__file__).parent)
    config = pretrain.Config((Path("unused"),), dropout=0.0)
    first, again, second = (
        pretrain.stream(episodes, tokenizer, ["mug", "pen"], config, epoch)[0] for epoch in (0, 0, 1)
    )
    assert first.tolist() == again.tolist() != second.tolist()
    texts = [tokenizer.decode(ids) for ids in (first, second)]
    assert all(text.count("<bos>") == text.count("<eos>") == 2 for text in texts), "as it is, and renamed"


def test_a_single_episode_is_refused_since_one_is_held_out(tmp_path):
    with EnvPool("alfworld", 1, workers=0, max_steps=3) as pool:
        panel = read_panel("alfworld", "demo", "train", 1)[:1]
        write_episodes(tmp_path / "one.jsonl", scripted.play_explore(pool, panel, "alfworld", seed=0))
    with pytest.raises(ValueError, match="1 episodes in --text, expected 2 or more"):
        pretrain.main(pretrain.Config((tmp_path / "one.jsonl",), tmp_path / "base", threads=1))
