"""plan_execute.py: the format by hand, what the host inserts, parity of play and training, segments."""

from dataclasses import replace

import pytest
import torch
from test_model import ARCHITECTURES, load, make_backbone

from acting import Policy
from data import Episode, Segment, Turn, read_episodes, write_episodes
from envs import StepResult
from hierarchy import Counts
from logprob import head_weight, sequence_logprobs
from model import hidden_states
from plan_execute import (
    ACTION,
    GOAL,
    INSERTED,
    LIMITS,
    SWITCH,
    Decided,
    PlanExecute,
    TurnPlayer,
    TurnRequest,
    by_length,
    collate,
    expert_turns,
)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan_execute")
    return {name: make_backbone(root / name, name) for name in ARCHITECTURES}


def request(prompt="Task: go.\nSwitch:", goal="find a cup", seed=0) -> TurnRequest:
    return TurnRequest("executor", prompt, sum(LIMITS.values()), seed, goal)


ASKED = [
    request(), request("Act.\nTask: find a living thing in the kitchen. Switch:", "pick up the box", 1),
    request("Act.\nSwitch:", "", 2), request("Act.\nGoal: go to the kitchen.\nSwitch:", "go", 3),
]  # fmt: skip


def text_of(turn: Decided, tokenizer, part: int | None = None) -> str:
    ids = [i for i, k in zip(turn.ids, turn.part, strict=True) if part is None or k == part]
    return tokenizer.decode(ids)


def always(policy: PlanExecute, word: str) -> PlanExecute:
    """The same policy, whose switch word is this one: what is decoded there is not what was sampled."""
    decode = policy.tokenizer.decode

    class Words:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def __hash__(self):
            return hash(tokenizer)

        def decode(self, ids, **kwargs):
            self.calls += 1
            first = (self.calls - 1) % (3 * rows) < rows
            return word if first and ids else decode(ids, **kwargs)

    tokenizer, rows = policy.tokenizer, 1
    policy.tokenizer = Words()
    policy.tokenizer.calls = 0
    return policy


# --- the format ---------------------------------------------------------------------------------------------
def episode() -> Episode:
    turns = [
        Turn("room a", action, "", 0.0, False, False, subtask)
        for subtask, actions in {"find x": ["go b", "take x"], "put x": ["open c", "put x"]}.items()
        for action in actions
    ]  # fmt: skip
    segments = [Segment("find x", 0, 2, ""), Segment("put x", 2, 4, "")]
    return Episode("alfworld", "t", "g", "Your task is to: put x in c.", turns, segments, "done", 100.0, True)


def test_an_experts_turns_by_hand(backbones):
    _, tokenizer = load(backbones["llama"])
    turns = list(expert_turns(episode(), tokenizer))
    whole = [text_of(turn, tokenizer) for turn in turns]
    assert whole == [
        " switch<eos>\nGoal: find x<eos>\nAction: go b<eos>",
        " keep<eos>\nGoal: find x<eos>\nAction: take x<eos>",
        " switch<eos>\nGoal: put x<eos>\nAction: open c<eos>",
        " keep<eos>\nGoal: put x<eos>\nAction: put x<eos>",
    ]
    decided = [[text_of(turn, tokenizer, part) for part in (SWITCH, GOAL, ACTION)] for turn in turns]
    assert decided == [
        ["", " find x<eos>", " go b<eos>"],  # the first subgoal is no choice
        [" keep<eos>", "", " take x<eos>"],
        [" switch<eos>", " put x<eos>", " open c<eos>"],
        [" keep<eos>", "", " put x<eos>"],
    ]
    states = [turn.prompt.split("\n")[2:5] for turn in turns]
    assert states == [
        ["Finished: none", "Goal: none", "Done: none"],
        ["Finished: none", "Goal: find x", "Done: go b"],
        ["Finished: none", "Goal: find x", "Done: go b; take x"],  # the one in force, before the switch
        ["Finished: find x", "Goal: put x", "Done: open c"],
    ]


def test_a_cut_subtask_that_goes_on_is_kept(backbones):
    _, tokenizer = load(backbones["llama"])
    one = replace(episode(), segments=[Segment("find x", 0, 2, ""), Segment("find x", 2, 4, "")])
    turns = list(expert_turns(one, tokenizer))
    assert [turn.switched for turn in turns] == [True, False, False, False]
    assert turns[3].prompt.split("\n")[4] == "Done: go b; take x; open c"


# --- acting -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_turn_has_its_parts_in_order_and_the_host_inserts_the_rest(backbones, architecture):
    policy, tokenizer = load(backbones[architecture])
    turns = PlanExecute(policy, tokenizer, temperature=1.0).answer(ASKED)
    for asked, turn in zip(ASKED, turns, strict=True):
        assert len(turn.ids) == len(turn.part) == len(turn.logprobs)
        assert all(x == 0 for x, k in zip(turn.logprobs, turn.part, strict=True) if k == INSERTED)
        order = [k for i, k in enumerate(turn.part) if i == 0 or k != turn.part[i - 1]]
        if not asked.goal:
            assert order == [INSERTED, GOAL, INSERTED, ACTION] and turn.switched
            assert text_of(turn, tokenizer, INSERTED) == " switch<eos>\nGoal:\nAction:"
        else:
            assert order == [SWITCH, INSERTED, GOAL, INSERTED, ACTION] and turn.switched
        said = [i for i, k in zip(turn.ids, turn.part, strict=True) if k == ACTION]
        assert turn.action == (tokenizer.decode(said, skip_special_tokens=True).strip() or "none")


def test_on_keep_the_host_inserts_the_stored_subgoal_and_goes_on_to_the_action(backbones):
    policy, tokenizer = load(backbones["llama"])
    (turn,) = always(PlanExecute(policy, tokenizer), "keep").answer([ASKED[1]])
    assert not turn.switched and turn.goal == "pick up the box" and GOAL not in turn.part
    inserted = text_of(turn, tokenizer, INSERTED)
    assert inserted == "\nGoal: pick up the box<eos>\nAction:"
    (other,) = always(PlanExecute(policy, tokenizer), "switch").answer([ASKED[1]])
    assert other.switched and GOAL in other.part and other.goal != "pick up the box"
    (garbage,) = always(PlanExecute(policy, tokenizer), "maybe").answer([ASKED[1]])
    assert garbage.switched and not garbage.valid


@pytest.mark.parametrize("word", ["keep", "switch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_play_and_training_agree_on_log_probs_and_on_what_the_values_read(backbones, architecture, word):
    """One right-padded forward over the whole turn, without a cache: log-probs and hidden states of play."""
    policy, tokenizer = load(backbones[architecture])
    encode = Policy(None, tokenizer).encode
    player = always(PlanExecute(policy, tokenizer, temperature=0.7), word)
    turns = [player.answer([asked])[0] for asked in ASKED]
    batch = collate(turns, encode)
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    with torch.no_grad():
        hidden = hidden_states(policy, batch.input_ids)
        logp, _ = sequence_logprobs(hidden / 0.7, weight, batch.input_ids, batch.part > 0, bias=bias)
    torch.testing.assert_close(logp, batch.logprobs, atol=1e-4, rtol=0)
    for row, turn in enumerate(turns):
        prompt = len(encode(turn.prompt))
        before = prompt + turn.part.index(ACTION) - 1
        read = hidden[row, [prompt - 1, before]]
        torch.testing.assert_close(turn.hidden, read, atol=1e-4, rtol=1e-4)


def test_turns_in_a_batch_are_those_alone(backbones):
    policy, tokenizer = load(backbones["llama"])
    player = PlanExecute(policy, tokenizer, temperature=1.0)
    together = player.answer(ASKED)
    for asked, turn in zip(ASKED, together, strict=True):
        (alone,) = player.answer([asked])
        assert (alone.ids, alone.part, alone.goal, alone.action) == (
            turn.ids, turn.part, turn.goal, turn.action,
        )  # fmt: skip
        assert alone.logprobs == pytest.approx(turn.logprobs, abs=1e-4)
        torch.testing.assert_close(alone.hidden, turn.hidden, atol=1e-4, rtol=1e-4)


def test_look_reads_what_a_kept_turn_would_have_read(backbones):
    policy, tokenizer = load(backbones["llama"])
    player = PlanExecute(policy, tokenizer)
    seen = player.look([r for r in ASKED if r.goal])
    for row, asked in enumerate(r for r in ASKED if r.goal):
        ids = player.encode(asked.prompt)
        for text in (" keep", "<eos>", "\nGoal:", f" {asked.goal}", "<eos>", "\nAction:"):
            ids += [tokenizer.eos_token_id] if text == "<eos>" else player.encode(text)[1:]
        with torch.no_grad():
            hidden = hidden_states(policy, torch.tensor([ids]))[0]
        at = torch.tensor([len(player.encode(asked.prompt)) - 1, len(ids) - 1])
        torch.testing.assert_close(seen[row], hidden[at], atol=1e-4, rtol=1e-4)


# --- episodes and batches -----------------------------------------------------------------------------------
def decided(switched: bool, goal: str, action: str) -> Decided:
    return Decided("p", [1, 2], [SWITCH, ACTION], [-0.5, -1.0], switched, goal, action, True)


def test_an_episode_is_segments_under_the_subgoals_that_were_chosen(tmp_path):
    first = StepResult("room\n\nroom: a 1\n\n", "Your task is to: x.", 0.0, 0.0, False, False, False)
    player = TurnPlayer(
        Episode("alfworld", "t", "g", first.description), first, 0, lambda subtask, obs: False
    )
    counts = Counts()
    for t, (switched, goal) in enumerate([(True, "a"), (False, "a"), (True, "b"), (True, "b"), (False, "b")]):
        asked = player.request()
        assert asked.goal == (["", "a", "a", "b", "b"][t])
        assert player.receive(decided(switched, goal, f"act {t}"), counts) == f"act {t}"
        player.stepped(replace(first, obs=f"obs {t}", terminated=t == 4, score=100.0, success=t == 4), counts)
    assert player.over and counts.steps == 5
    done = player.finished()
    assert [(s.subtask, s.start, s.end) for s in done.segments] == [("a", 0, 2), ("b", 2, 3), ("b", 3, 5)]
    assert player.answers() == [f"obs {t}" for t in range(5)] and done.success
    write_episodes(tmp_path / "e.jsonl", [done])
    assert read_episodes(tmp_path / "e.jsonl")[0].segments == done.segments


def test_an_episode_is_given_up_after_actions_in_a_row_that_were_not_understood():
    first = StepResult("room", "Your task is to: x.", 0.0, 0.0, False, False, False)
    miss = replace(first, obs="Nothing happens.")
    player = TurnPlayer(Episode("alfworld", "t", "g", "x"), first, 0, lambda *_: False, max_misses=2)
    for result, over in [(miss, False), (first, False), (miss, False), (miss, True)]:
        player.receive(decided(False, "a", "act"), Counts())
        player.stepped(result, Counts())
        assert player.over == over and player.now.truncated == over
    assert player.finished().turns[-1].truncated and not player.now.terminated


def test_collate_gives_each_token_the_advantage_of_its_part_and_inserted_ones_none():
    part = [SWITCH, INSERTED, GOAL, INSERTED, ACTION]
    turn = Decided("p", [7, 8, 9, 4, 5], part, [-1, 0, -2, 0, -3], True, "g", "a", True)
    short = Decided("pp", [6], [ACTION], [-4.0], False, "g", "a", True)
    batch = collate([turn, short], lambda text: [1] * len(text), torch.tensor([[10.0, 20, 30], [40, 50, 60]]))
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 4, 5], [1, 1, 6, 0, 0, 0]]
    assert batch.part.tolist() == [[0, SWITCH, 0, GOAL, 0, ACTION], [0, 0, ACTION, 0, 0, 0]]
    assert batch.advantage.tolist() == [[0, 10, 0, 20, 0, 30], [0, 0, 60, 0, 0, 0]]
    assert batch.logprobs.tolist() == [[0, -1, 0, -2, 0, -3], [0, 0, -4, 0, 0, 0]]


def test_groups_are_of_like_length_and_hold_every_turn_once():
    turns = [Decided("p" * n, [1] * n, [ACTION] * n, [0.0] * n, False, "", "", True) for n in (9, 1, 5, 2, 8)]
    groups = by_length(turns, lambda text: [1] * len(text), max_tokens=20)
    assert sorted(i for group in groups for i in group) == list(range(5))
    assert groups == [[1, 3], [2], [4], [0]]
