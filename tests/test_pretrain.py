"""base/pretrain.py: what the text of the base holds, for both worlds."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import scripted
from base import pretrain
from data import write_episodes
from envs import EnvPool, read_panel
from model import load_backbone

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
    assert pretrain.things(KITCHEN) == {"stove": "stove: yes", "metal pot": "metal pot: yes"}
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


def test_the_pieces_that_spell_a_name_on_are_those_of_names_read_before():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(pretrain.__file__).parent)
    text = "Observation: a violin, a wool sock\nAction: get the violin\nResult: wool socks; a violin, a sock"
    ids, marks = pretrain.spelled(text, ["violin", "wool sock", "sock"], tokenizer, 320)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    name = tokenizer.tokenize(" violin")
    places = [i for i in range(len(ids)) if pieces[i : i + len(name)] == name]
    assert len(name) > 2 and len(places) == 3
    expected = {place + k for place in places[1:] for k in range(1, len(name))}
    assert {i for i, mark in enumerate(marks) if mark} == expected, "not the first time, nor its first piece"
    assert pretrain.spelled(text, ["violin"], tokenizer, 9) == (ids[:9], marks[:9])


def test_copied_is_the_share_of_marked_tokens_that_the_model_would_write():
    rows = [([0, 5, 6, 5, 6], [False, False, True, False, True]), ([0, 5, 7], [False, False, True])]

    class Writes6(torch.nn.Module):
        device = "cpu"

        def forward(self, input_ids):
            logits = torch.nn.functional.one_hot(torch.full_like(input_ids, 6), 9)
            return type("Out", (), {"logits": logits})

    assert pretrain.copied(Writes6(), rows) == pytest.approx(2 / 3)
    assert pretrain.copied(Writes6(), [([0, 5], [False, False])]) == 0.0


def test_a_list_of_words_is_read_or_its_absence_said(tmp_path):
    (tmp_path / "words").write_text("violin\nAl\nit's\nsock\nby\nextraordinarily\nsock\n")
    assert sorted(pretrain.english(tmp_path / "words")) == ["sock", "violin"]
    with pytest.raises(FileNotFoundError, match="apt install wamerican"):
        pretrain.english(tmp_path / "none")


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


def test_rare_pieces_are_spelled_with_common_ones_and_parts_of_common_ones_stay():
    tokenizer = pretrain.train_tokenizer(["the mug on the mat"] * 300 + ["a zebra"] * 3, 300)
    before, text = tokenizer.tokenize(" zebra"), "the zebra on the mat"
    tokens = torch.tensor(tokenizer(["the mug on the mat"] * 300 + ["a zebra"]).input_ids[0] * 300)
    tokens = torch.cat([tokens, torch.tensor(tokenizer(" zebra").input_ids)])
    assert before == ["Ġzebra"] and tokenizer.tokenize(" mug") == ["Ġmug"]
    tokenizer, size = pretrain.pruned(tokenizer, tokens, share=1 / 100), len(tokenizer)
    assert tokenizer.tokenize(" zebra") == ["Ġ", "z", "e", "b", "r", "a"], "its own parts are rare too"
    assert tokenizer.tokenize(" mug mat") == ["Ġmug", "Ġmat"], "common, and what it is made of"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and len(tokenizer) == size


@pytest.mark.parametrize("folder", ["base", "base/held_out"])
def test_the_shipped_weights_are_those_of_their_record(folder):
    shipped = Path(__file__).parent.parent / folder
    record = json.loads((shipped / "pretrain.json").read_text())
    model, _ = load_backbone(str(shipped))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert record["tokens"] > 10e6 and record["copied"] > 0.9, "a test or a trial run has written over it"
