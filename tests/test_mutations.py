"""Put a fault of the released code back: its check passes on our line and fails on the faulty one.

A case tells the fault in words and names it by the number of docs/paper_map.md: R-G in GLIDER's release
(arXiv:2505.19761), R-S in STEP-HRL's (arXiv:2604.05808); an equation or figure where a default would leave
what is printed; "ours" for a rule of this code alone. A check imports what it tests inside, so that it sees
the fault.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_model import make_backbone
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
OWN = {path.stem for path in ROOT.glob("*.py")}


@contextmanager
def put_back(module: str, old: str, new: str):
    """Inside, a fresh import of any of our modules sees `module` with `old` replaced; afterwards, none."""
    source = (ROOT / f"{module}.py").read_text()
    found = source.count(old)
    if found != 1:
        raise ValueError(f"{module}.py holds {old!r} {found} times, expected once: mend the case")
    kept = {name: sys.modules.pop(name) for name in OWN & set(sys.modules)}
    try:
        faulty = sys.modules[module] = ModuleType(module)
        faulty.__file__ = str(ROOT / f"{module}.py")
        exec(compile(source.replace(old, new), f"{module}.py with a fault", "exec"), faulty.__dict__)
        yield
    finally:
        for name in OWN & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(kept)


# --- small pieces -------------------------------------------------------------------------------------------
class Words:
    """A tokenizer of one token per word; like a real one it adds BOS unless told not to."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, pad=0):
        self.pad_token_id, self.ids = pad, {}

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + self.ids.setdefault(word, len(self.ids)) for word in text.split()]
        return SimpleNamespace(input_ids=[self.bos_token_id] * add_special_tokens + ids)

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


WORDS = Words()


def decision(prompt="a b", completion="c d", next_prompt="", level="executor", **fields):
    from data import Transition

    defaults = {"reward": 0.0, "steps": 1, "terminated": not next_prompt, "truncated": False, "turn": 0}
    defaults |= {"next_level": level, "source": "s", "episode_id": "e"}
    return Transition(level, prompt, completion, [], [], next_prompt=next_prompt, **defaults | fields)


def ragged(count=8, **fields):
    """Decisions whose answers have 1, 2 and 4 words, with prompts of 1 to 8."""
    answers = ("d", "e f", "g h i j")
    return [
        decision("a " * (i + 1), answers[i % 3], "b c" * (i % 4 > 0), **{"reward": float(i % 2)} | fields)
        for i in range(count)
    ]


def batch_of(items, tokenizer=None):
    from batches import collate

    return collate(items, tokenizer or WORDS)


def tiny_lm():
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, initializer_range=0.3))


def tiny_policy():
    """With an adapter that is not zero."""
    from model import add_lora

    policy = add_lora(tiny_lm(), rank=2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def learner_of(policy=None, **config):
    from critic import Critics
    from learner import Learner, RLConfig
    from model import hidden_states

    policy = policy or tiny_policy()
    torch.manual_seed(2)
    return Learner(policy, Critics(policy.config.hidden_size), hidden_states, RLConfig(**config))


def obs(i):
    return f"said {i}\n\nroom {i}\n\nbag {i}"


def episode_of(*turns, segments=None, source="s", **fields):
    """Turn i saw obs(i) and progress "p<i>", played "a<i>"; `turns` holds what else happened."""
    from data import Episode, Segment, Turn

    none = {"raw_text": "", "reward": 0.0, "terminated": False, "truncated": False}
    whole = [Turn(obs(i), f"a{i}", progress=f"p{i}", **none | t) for i, t in enumerate(turns)]
    parts = [Segment(f"goal {a}", a, b, f"p{b}") for a, b in segments or [(0, len(turns))]]
    return Episode(
        "scienceworld",
        "melt",
        0,
        "Your task is to melt.",
        whole,
        parts,
        obs(len(turns)),
        source=source,
        **fields,
    )


def of(level, episode, **options):
    from data import transitions

    return [t for t in transitions(episode, **options) if t.level == level]


class World:
    """A pool of one slot: the world ends after `end` steps, the step limit comes after `limit`, always."""

    size = 1

    def __init__(self, end=99, limit=8):
        self.end, self.limit = end, limit

    def call(self, requests):
        return {slot: self.one(*request) for slot, request in requests.items()}

    def one(self, name, *args):
        from envs import StepResult

        self.t = 0 if name == "reset" else self.t + 1
        terminated, truncated = self.t >= self.end, self.t >= self.limit
        return StepResult(obs(self.t), "Melt.", 0.1, 10 * self.t, terminated, truncated, False)


class Script:
    """A policy that says the same always."""

    def __init__(self, executor=" go; False"):
        self.texts, self.asked = {"planner": " goal", "executor": executor, "progress": " so far"}, []

    def answer(self, requests):
        from acting import Answer

        self.asked += requests
        return [Answer(self.texts[r.role], [5, 2], [-1.0, -1.0], 3) for r in requests]


def rollout(script, world, **options):
    """(episode, counts)"""
    import hierarchy

    counts = hierarchy.Counts()
    (episode,) = hierarchy.rollout(
        world, [("melt", 0)], script, lambda subtask, obs: False, counts=counts, **options
    )
    return episode, counts


def is_refused(call):
    try:
        call()
    except ValueError:
        return True
    return False


# --- checks: losses -----------------------------------------------------------------------------------------
def expectile_is_upper():
    from critic import expectile_loss

    loss = expectile_loss(torch.tensor([-1.0, 2.0]), 0.7)
    assert loss.item() == pytest.approx((0.3 * 1 + 0.7 * 4) / 2)


def v_regresses_to_q_of_the_answer():
    d = learner_of().decide(batch_of([decision(completion="c"), decision(completion="d")]))
    assert torch.isclose(*d.v) and not torch.isclose(*d.v_target)


def weight_is_exp_of_the_advantage():
    levels = {"planner": "a", "executor": "b", "progress": "c"}
    items = [decision(prompt, level=level) for level, prompt in levels.items()]
    d = learner_of(temperature=0.5).decide(batch_of(items))
    torch.testing.assert_close(d.weight, torch.exp(d.advantage / 0.5))


def weight_reaches_the_gradient():
    from learner import actor_loss

    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    actor_loss(logp, torch.tensor([2.0, 0.5])).backward()
    assert logp.grad.tolist() == [-1.0, -0.25]


def weight_zero_never_meets_minus_infinity():
    from learner import actor_loss

    assert actor_loss(torch.tensor([-torch.inf, -1.0]), torch.tensor([0.0, 1.0])).item() == 0.5


def log_pi_is_that_of_the_whole_answer():
    batch = batch_of(ragged())
    total, mean = (learner_of(**c).decide(batch).logp for c in ({}, {"token_norm": "mean"}))
    torch.testing.assert_close(total, mean * batch.action_mask.sum(1))


def the_end_stops_the_bootstrap_and_a_cut_does_not():
    from critic import td_target

    target = td_target(
        torch.ones(2), torch.full((2,), 0.9), torch.tensor([True, False]), torch.full((2,), 5.0)
    )
    assert target.tolist() == [1.0, 5.5]


def a_subtask_costs_one_gamma():
    learner = learner_of(gamma=0.9)
    short, long = learner.decide(batch_of([decision(next_prompt="x", steps=k) for k in (1, 5)])).td_target
    assert short.item() == long.item() != 0


def micro_batches_are_one_batch():
    norms = []
    for size in (8, 3):  # 3 + 3 + 2, each padded to its own width
        items = ragged()
        parts = [batch_of(items[i : i + size]) for i in range(0, 8, size)]
        metrics = learner_of(actor="bc", token_norm="mean").update(parts)
        norms.append([metrics[f"{who}/grad_norm"] for who in ("actor", "critic")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def sft_ignores_padding():
    from train_sft import sft_loss

    policy, items = tiny_policy(), ragged()
    alone = sum(sft_loss(policy, batch_of([item]), 8)[0] for item in items)
    torch.testing.assert_close(sft_loss(policy, batch_of(items), 8)[0], alone)


# --- checks: the step ---------------------------------------------------------------------------------------
def critics_do_not_reach_the_backbone():
    from learner import losses

    learner = learner_of()
    loss = losses(learner.decide(batch_of(ragged())), learner.config, count=8)
    (loss["v_loss"] + loss["q_loss"]).backward()
    assert all(p.grad is None for p in learner.actor_parameters)


def clip_norms_are_apart():
    moves = []
    for reward in (0.0, 1e4):
        metrics = learner_of(actor="bc", clip_norm=0.5).update([batch_of(ragged(reward=reward))])
        moves.append(metrics["actor/grad_norm"])
    assert moves[0] == pytest.approx(moves[1], rel=1e-4)


def targets_follow_by_polyak():
    learner = learner_of(polyak=0.2)
    before = [p.clone() for p in learner.critics.target.parameters()]
    learner.update([batch_of(ragged())])
    pairs = zip(learner.critics.target.parameters(), before, learner.critics.online.parameters(), strict=True)
    for target, old, online in pairs:
        torch.testing.assert_close(target, 0.8 * old + 0.2 * online.detach(), atol=1e-7, rtol=0)


# --- checks: checkpoints ------------------------------------------------------------------------------------
def checkpoint(folder, **options):
    """What SFT leaves behind: an adapter that is not zero."""
    from model import add_lora, fingerprint, load_backbone, save_policy

    backbone = make_backbone(folder / "backbone")
    lm, tokenizer = load_backbone(str(backbone))
    base = fingerprint(lm, tokenizer)
    policy = add_lora(lm, 4, **options)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    meta = {"model": str(backbone), "base": base, "rank": 4, "adapters": "shared"} | options
    save_policy(policy, folder, meta)
    return folder


def offline_rl_starts_from_the_sft_weights(at):
    from model import load_policy

    saved = load_file(checkpoint(at) / "adapter/shared/adapter_model.safetensors")
    policy, tokenizer, _ = load_policy(at, trainable=True)
    learner = learner_of(policy, actor_lr=1e-5)
    for steps in (0, 2):
        for _ in range(steps):
            learner.update([batch_of(ragged(), tokenizer)])
        now = {n.replace(".shared", ""): p for n, p in policy.named_parameters() if p.requires_grad}
        assert now.keys() == saved.keys()
        distance = {name: (now[name].detach() - saved[name]).abs().max().item() for name in saved}
        assert max(distance.values()) <= 1e-4 * steps and (min(distance.values()) > 0) == (steps > 0)


def every_adapter_trains_on(at):
    from model import load_policy

    policy, *_ = load_policy(checkpoint(at, adapters="separate"), trainable=True)
    trains = {name.split(".")[-2] for name, p in policy.named_parameters() if p.requires_grad}
    assert trains == {"planner", "executor", "progress"} and policy.training


def evaluation_plays_the_checkpoint(at, patch):
    evaluation = importlib.import_module("eval")
    trained, bare, played = torch.nn.Identity(), torch.nn.Identity(), []
    patch.setattr(evaluation, "tqdm", lambda stream, **options: stream)
    patch.setattr(evaluation, "load_backbone", lambda *args: (bare, None))
    patch.setattr(
        evaluation, "load_policy", lambda *args: (trained, None, {"history": "full", "stage": "sft"})
    )
    patch.setattr(evaluation, "rollout", lambda pool, panel, policy, *args, **kw: played.append(policy) or [])
    evaluation.play(evaluation.Config(at, "x", checkpoint=at), [], None, None)
    assert played[0].model is trained


# --- checks: data -------------------------------------------------------------------------------------------
LIMIT = {"truncated": True}


def every_action_is_trained():
    from annotate import flat

    episode = episode_of({}, {}, {"terminated": True}, segments=[(0, 2), (2, 3)])
    assert [t.turn for t in of("executor", episode)] == [0, 1, 2]
    assert [t.turn for t in of("executor", flat(episode), flat=True)] == [0, 1, 2]


def a_cut_is_neither_end_nor_success():
    for level in ("planner", "executor"):
        last = of(level, episode_of({}, LIMIT))[-1]
        assert (last.reward, last.terminated, last.truncated) == (0, False, True)
        assert "room 2" in last.next_prompt


def a_claim_alone_earns_nothing():
    claimed, verified = episode_of({"claimed_done": True}), episode_of({"verified_done": True})
    assert [of("executor", e)[0].reward for e in (claimed, verified)] == [0, 1]


def a_plan_earns_the_reward_of_its_subtask():
    episode = episode_of({"reward": 0.1}, {"reward": 0.2}, {"reward": 0.4}, segments=[(0, 2), (2, 3)])
    assert [t.reward for t in of("planner", episode)] == pytest.approx([0.3, 0.4])


def progress_prompts_follow():
    for turns in ([LIMIT], [{}, {}, LIMIT]):
        items = of("progress", episode_of(*turns))
        assert len(items) == len(turns)
        for now, after in zip(items, items[1:], strict=False):
            assert now.next_prompt == after.prompt


def episodes_want_subtasks():
    from data import transitions

    episode = episode_of({})
    episode.segments.clear()
    assert is_refused(lambda: transitions(episode))


def the_judge_errs_at_its_rate():
    from completion import noisy

    judge = noisy(lambda subtask, obs: True, 0.1)
    assert 50 < sum(not judge("melt", str(i)) for i in range(1000)) < 150


def credit_errs_at_its_rate():
    from data import Credit, completed

    episode = episode_of(*[{} for _ in range(1000)])
    assert 50 < sum(completed(episode, i, False, Credit(noise=0.1)) for i in range(1000)) < 150


def pools_keep_their_ratio():
    from batches import Mixture

    drawn = Mixture({"expert": ["e"] * 3, "rollouts": ["r"] * 9}, {"expert": 1, "rollouts": 2}, 0).batch(30)
    assert drawn.count("e") == 10


# --- checks: tokens -----------------------------------------------------------------------------------------
def bos_comes_once_and_is_no_label():
    batch = batch_of([decision("a b", "c d")], Words())
    assert batch.input_ids.tolist() == [[1, 3, 4, 5, 6, 2]]
    assert not batch.action_mask[:, :3].any(), "the prompt carries no loss"


def the_end_of_an_answer_is_trained():
    for pad in (0, Words.eos_token_id):  # pad_token = eos_token, as in the releases
        batch = batch_of([decision("a b", "c d"), decision("a", "c")], Words(pad))
        assert batch.action_mask.sum(1).tolist() == [3, 2]
        assert batch.input_ids[torch.arange(2), batch.action_index].tolist() == [2, 2]


# --- checks: acting -----------------------------------------------------------------------------------------
def training_and_acting_share_prompts():
    from data import transitions

    script = Script(" go; True")
    episode, _ = rollout(script, World(limit=3))
    assert [t.prompt for t in transitions(episode)] == [r.prompt for r in script.asked]


def a_finished_world_is_left_alone():
    episode, counts = rollout(Script(), World(end=3))
    assert counts.steps == len(episode.turns) == 3


def a_subtask_has_a_cap():
    episode, _ = rollout(Script(), World(), max_actions=3)
    assert [(s.start, s.end) for s in episode.segments] == [(0, 3), (3, 6), (6, 8)]


def unreadable_answers_are_counted():
    episode, counts = rollout(Script(" look around"), World())
    assert {t.action for t in episode.turns} == {"look around"} and counts.parse_failures == 8


def points_are_not_success():
    episode, _ = rollout(Script(), World(limit=3))
    assert episode.score == 30 and not episode.success


def draws_differ():
    script = Script()
    rollout(script, World())
    assert len({r.seed for r in script.asked}) == len(script.asked)


def temperature_one_samples():
    from acting import Policy, Request

    requests = [Request("executor", "a b", 4, seed) for seed in range(8)]
    answers = {t: {tuple(a.ids) for a in Policy(tiny_lm(), Words(), t).answer(requests)} for t in (0.0, 1.0)}
    assert len(answers[0.0]) == 1 < len(answers[1.0])


def collection_samples(at, patch):
    import collect

    played = []
    patch.setattr(collect, "load_policy", lambda *args: (None, None, {"history": "full"}))
    patch.setattr(collect, "rollout", lambda pool, panel, policy, *args, **kw: played.append(policy))
    collect.play(None, [], collect.Config(at, "policy", checkpoint=at, temperature=0.8), 0)
    assert played[0].temperature == pytest.approx({"planner": 0.56, "progress": 0.56, "executor": 0.8})


def collect_into(out, patch, variation):
    """One episode by collect.main, without a simulator."""
    import collect
    from data import read_episodes

    episode = episode_of(LIMIT, source="explore")
    episode.variation = variation
    patch.setattr(collect, "EnvPool", lambda *args: nullcontext())
    patch.setattr(collect, "read_panel", lambda *args: [("melt", 0), ("melt", 1)])
    patch.setattr(collect, "play", lambda *args: [episode])
    collect.main(collect.Config(out, "explore", threads=1))
    return read_episodes(out)


def a_file_has_one_player(at, patch):
    from data import read_episodes, write_episodes

    write_episodes(at / "gold.jsonl", [episode_of(LIMIT, source="expert")])
    assert is_refused(lambda: collect_into(at / "gold.jsonl", patch, 1))
    assert [e.source for e in read_episodes(at / "gold.jsonl")] == ["expert"]


def resuming_keeps_episodes(at, patch):
    assert len(collect_into(at / "new.jsonl", patch, 0)) == 1
    assert len(collect_into(at / "new.jsonl", patch, 1)) == 2


def the_test_split_wants_a_reason(at, patch):
    evaluation = importlib.import_module("eval")

    def played(*args):
        raise AssertionError("the test split was read without a reason")

    patch.setattr(evaluation, "read_panel", played)
    config = {"agent": "random", "threads": 1}
    assert is_refused(lambda: evaluation.main(evaluation.Config(at, "x", split="test", **config)))
    assert evaluation.Config(at, "x").split == "dev"


# --- the cases ----------------------------------------------------------------------------------------------
class Case(NamedTuple):
    fault: str
    reference: str
    module: str
    check: Callable
    old: str
    new: str


# fmt: off
LOAD_ADAPTER = """model = PeftModel.from_pretrained(
            lm, folder / "adapter" / names[0], adapter_name=names[0], is_trainable=trainable
        )"""
CASES = [Case(*fields) for fields in [
    # losses
    ("the sign of the expectile is reversed", "R-S2", "critic", expectile_is_upper,
        "torch.where(diff < 0, 1 - expectile, expectile)", "torch.where(diff < 0, expectile, 1 - expectile)"),
    ("V is fitted to Q at the prompt's end", "R-S3", "readings", v_regresses_to_q_of_the_answer,
        'value_reads: Token = "answer"', 'value_reads: Token = "prompt"'),
    ("the weight is computed and not used", "R-S1", "learner", weight_reaches_the_gradient,
        "weight.detach() * logp, 0.0)", "logp, 0.0)"),
    ("the raw advantage is the weight", "R-S1", "learner", weight_is_exp_of_the_advantage,
        "awr_weight(advantage, config.temperature, config.max_weight)", "advantage.detach()"),
    ("no exp", "R-G1", "critic", weight_is_exp_of_the_advantage,
        ".clamp(max=math.log(max_weight)).exp()", ".clamp(max=math.log(max_weight))"),
    ("the temperature multiplies", "ours", "critic", weight_is_exp_of_the_advantage,
        "advantage.detach() / temperature", "advantage.detach() * temperature"),
    ("Q is the weight", "R-G1", "readings", weight_is_exp_of_the_advantage,
        'actor: Actor = "awr"', 'actor: Actor = "q_weighted"'),
    ("below the planner there is only cloning", "R-G4", "readings", weight_is_exp_of_the_advantage,
        'rl_levels: Trained = "all"', 'rl_levels: Trained = "planner"'),
    ("a weight of 0 times a log-prob of -inf", "ours", "learner", weight_zero_never_meets_minus_infinity,
        "torch.where(weight != 0, weight.detach() * logp, 0.0)", "weight.detach() * logp"),
    ("the mean token, not the answer", "R-G5", "readings", log_pi_is_that_of_the_whole_answer,
        'token_norm: Literal["sum", "mean"] = "sum"', 'token_norm: Literal["sum", "mean"] = "mean"'),
    ("the end bootstraps", "GLIDER eq. 4", "critic", the_end_stops_the_bootstrap_and_a_cut_does_not,
        "torch.where(terminated, 0.0, discount * next_value)", "(discount * next_value)"),
    ("a subtask costs gamma^k", "GLIDER eq. 4", "readings", a_subtask_costs_one_gamma,
        '= "subtask"  # published', '= "smdp"  # published'),
    ("a micro-batch is divided by its own count", "R-G7", "learner", micro_batches_are_one_batch,
        "count = round(sum_over_processes(sum(len(batch.level) for batch in batches)))",
        "count = len(batches[0].level)"),
    ("only the last micro-batch counts", "R-G7", "learner", micro_batches_are_one_batch,
        "decisions = self.decide(batch, train_actor)",
        "self.actor_optimizer.zero_grad(); decisions = self.decide(batch, train_actor)"),
    ("the mean is taken over padded slots", "R-G10", "learner", micro_batches_are_one_batch,
        "logp / tokens.clamp_min(1)", "logp / batch.action_mask.shape[1]"),
    ("SFT's mean is taken over padded slots", "R-G10", "train_sft", sft_ignores_padding,
        "sums / batch.action_mask.sum(1)", "sums / batch.action_mask.shape[1]"),
    # the step
    ("critic losses train the backbone", "GLIDER fig. 2", "learner", critics_do_not_reach_the_backbone,
        "@torch.no_grad()\n    def _read", "def _read"),
    ("policy and critics share one clip norm", "R-G8", "learner", clip_norms_are_apart,
        "self._clip(self.critic_parameters)}", "self._clip(self.critic_parameters + self.actor_parameters)}"),
    ("the target never moves", "ours", "learner", targets_follow_by_polyak,
        "self.critics.update_target(self.config.polyak)", "pass"),
    ("polyak is the share that stays", "ours", "critic", targets_follow_by_polyak,
        "target.lerp_(online, polyak)", "target.lerp_(online, 1 - polyak)"),
    # checkpoints
    ("offline RL starts from a fresh adapter", "R-G6", "model", offline_rl_starts_from_the_sft_weights,
        LOAD_ADAPTER, 'model = add_lora(lm, meta["rank"])'),
    ("adapters load without a gradient", "R-G21", "model", every_adapter_trains_on,
        'parameter.requires_grad_("lora_" in name)', "parameter.requires_grad_(False)"),
    ("the loaded policy is left in eval mode", "R-G21", "model", every_adapter_trains_on,
        "return model.train(trainable)", "return model.eval()"),
    ("evaluation never loads the checkpoint", "R-G20", "eval", evaluation_plays_the_checkpoint,
        "model, tokenizer, meta = load_policy(config.checkpoint, device)",
        "model, tokenizer = load_backbone(config.model, device)"),
    # data
    ("the last action is never trained", "R-G11", "data", every_action_is_trained,
        "enumerate(turns, start=segment.start)", "enumerate(turns[:-1], start=segment.start)"),
    ("a cut-off subtask becomes a success", "R-S4", "data", a_cut_is_neither_end_nor_success,
        "completed(episode, t, final, credit)\n", "(final or completed(episode, t, final, credit))\n"),
    ("the step limit ends the planner's value", "R-G17", "data", a_cut_is_neither_end_nor_success,
        "terminated=last.terminated, truncated", "terminated=last.terminated or last.truncated, truncated"),
    ("the step limit ends the executor's value", "R-G17", "data", a_cut_is_neither_end_nor_success,
        "ended = turn.terminated or", "ended = turn.terminated or turn.truncated or"),
    ("its own claim pays the executor", "R-S4", "data", a_claim_alone_earns_nothing,
        'completion: Completion = "judge"', 'completion: Completion = "claim"'),
    ("the reward is the cumulative score", "R-G22", "data", a_plan_earns_the_reward_of_its_subtask,
        "sum(turn.reward for turn in turns)", "sum(turn.reward for turn in episode.turns[: segment.end])"),
    ("the next progress prompt is shifted by one", "R-S7", "data", progress_prompts_follow,
        "episode.obs_after(t + 1)", "episode.obs_after(t)"),
    ("episodes without subtasks are read in silence", "R-G24", "data", episodes_want_subtasks,
        "if episode.turns and not episode.segments:", "if False:"),
    ("the noise of the judge ignores its probability", "ours", "completion", the_judge_errs_at_its_rate,
        ".random() < probability)", ".random() < 2)"),
    ("the noise of the credit ignores its probability", "ours", "data", credit_errs_at_its_rate,
        ".random() < credit.noise)", ".random() < 2)"),
    ("experts and rollouts are mixed one to one", "R-G16", "batches", pools_keep_their_ratio,
        "self.used[n] / self.ratio[n]", "self.used[n]"),
    # tokens
    ("BOS stands before every segment", "R-G9", "model", bos_comes_once_and_is_no_label,
        "tokenizer(text, add_special_tokens=False)", "tokenizer(text)"),
    ("the prompt is a label", "R-G9", "batches", bos_comes_once_and_is_no_label,
        "return self.segment == 1", "return self.segment >= 0"),
    ("EOS is not trained", "ours", "batches", the_end_of_an_answer_is_trained,
        "[*text_ids(tokenizer, completion), tokenizer.eos_token_id]", "[*text_ids(tokenizer, completion)]"),
    ("EOS is taken for padding", "R-G9", "candidates", the_end_of_an_answer_is_trained,
        "torch.tensor([row + [-1] * (width - len(row)) for row in segments])",
        "torch.tensor([[k if i != fill else -1 for i, k in zip(r + [fill] * (width - len(r)), "
        "s + [-1] * (width - len(s)))] for r, s in zip(rows, segments)])"),
    # acting
    ("acting and training build other prompts", "R-G12", "hierarchy", training_and_acting_share_prompts,
        "prompt = planner_prompt(episode, t, self.now.obs, self.history)",
        'prompt = planner_prompt(episode, t, self.now.obs, self.history) + " "'),
    ("a finished world is played on", "R-G13", "hierarchy", a_finished_world_is_left_alone,
        "over = self.now.terminated or self.now.truncated", "over = self.now.truncated"),
    ("a subtask has no cap", "R-G15", "hierarchy", a_subtask_has_a_cap,
        '(length >= self.max_actions and self.ends != "episode")', "False"),
    ("an unreadable answer becomes None", "R-G14", "prompts", unreadable_answers_are_counted,
        'return text.strip() or "none", False, False', 'return "None", False, False'),
    ("an unreadable answer is not counted", "R-G14", "hierarchy", unreadable_answers_are_counted,
        "counts.parse_failures += not parsed", "pass"),
    ("points at the step limit are a success", "R-G22", "hierarchy", points_are_not_success,
        "success=self.now.success", "success=self.now.score > 0"),
    ("every draw has the same seed", "R-G23", "hierarchy", draws_differ,
        "seed = episode_seed(self.seed, episode.task, episode.variation, t, role)", "seed = self.seed"),
    ("the temperature is ignored", "R-G20", "acting", temperature_one_samples,
        'temperature * planning_ratio) | {"executor": temperature}', "0.0)"),
    ("collection is greedy", "R-S13", "collect", collection_samples,
        "Policy(model, tokenizer, config.temperature)", "Policy(model, tokenizer)"),
    ("rollouts go into the experts' file", "R-S12", "collect", a_file_has_one_player,
        "if strangers := {e.source", "if strangers := set() and {e.source"),
    ("collecting on overwrites what was there", "R-S12", "collect", resuming_keeps_episodes,
        "write_episodes(config.out, [episode], append=True)", "write_episodes(config.out, [episode])"),
    ("the test split is played without a reason", "R-S14", "eval", the_test_split_wants_a_reason,
        'if config.split in HELD_OUT and not config.reason:', "if False:"),
    ("the test split is the default", "R-S14", "eval", the_test_split_wants_a_reason,
        '"valid_unseen"] = "dev"', '"valid_unseen"] = "test"'),
]]
# fmt: on
CHECKS = {case.check.__name__: case.check for case in CASES}


def run_check(check, tmp_path, monkeypatch):
    given = {"at": tmp_path, "patch": monkeypatch}
    check(**{name: given[name] for name in inspect.signature(check).parameters})


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_check_passes_on_our_code(check, tmp_path, monkeypatch):
    run_check(check, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reference}: {case.fault}")
def test_a_fault_put_back_fails_its_check(case, tmp_path, monkeypatch):
    with put_back(case.module, case.old, case.new), pytest.raises(AssertionError):
        run_check(case.check, tmp_path, monkeypatch)


def test_a_fault_reaches_the_modules_that_import_it_and_is_gone_afterwards():
    import learner

    before = dict(sys.modules)
    with put_back("critic", ".clamp(max=math.log(max_weight)).exp()", ".mul(0)"):
        from learner import actor_weight

        assert actor_weight.__globals__["awr_weight"](torch.ones(1), 1.0, 20.0).item() == 0
    assert {name: sys.modules[name] for name in OWN & set(before)} == {
        n: before[n] for n in OWN & set(before)
    }
    assert learner.awr_weight(torch.ones(1), 1.0, 20.0).item() == pytest.approx(math.e)


def test_a_case_whose_line_is_gone_says_so():
    with (
        pytest.raises(ValueError, match="0 times, expected once: mend the case"),
        put_back("critic", "gama", ""),
    ):
        pass
