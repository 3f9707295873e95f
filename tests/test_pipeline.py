"""The scripts in the real simulator with a tiny model: from exploration and gold paths to a result."""

import csv
import dataclasses
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import annotate
import collect
import completion
import envs
import eval as evaluation
import prompts
import train_orl
import train_sft
from base import pretrain
from batches import collate
from critic import load_critics
from data import LEVELS, Credit, read_episodes, transitions, write_episodes
from learner import Learner
from logprob import head_weight, sequence_logprobs
from model import hidden_states, load_backbone, load_policy, without_adapters
from readings import PRESETS, RLConfig
from recipes import exact, ship
from viewer import article

ROOT = Path(__file__).parent.parent
PANEL = [("lifespan-longest-lived", 0), ("find-non-living-thing", 0)]
HERE = {"threads": 1, "device": "cpu"}
WORLD = HERE | {"panel": "tiny", "workers": 0}
FIELDS = {
    "benchmark", "panel", "split", "agent", "stage", "checkpoint", "seeds", "max_steps", "episodes",
    "macro_mean", "ci95", "success_rate", "success_ci95", "per_type", "tokens_per_decision",
    "limit", "tokens_per_step", "mean_steps", "parse_failure_rate", "subtasks", "max_actions", "scores",
    "guide", "candidates", "minutes", "command", "commit", "versions", "hardware",
}  # fmt: skip


def sft(w, out, **options):
    """A short SFT run: 6 steps."""
    decisions = sum(len(transitions(e)) for e in read_episodes(w.gold))
    defaults = {"model": str(w.base), "rank": 4, "lr": 1e-3}
    defaults |= {"epochs": 6 * 8 / decisions, "batch_size": 8, "save_every": 2}
    train_sft.main(train_sft.Config(w.gold, out, **HERE | defaults | options))
    return out


def orl(w, out, **options):
    """A short offline RL run: 6 steps, the first one of the critics alone."""
    defaults = {"init": w.sft, "expert": w.gold, "rollouts": w.rollouts, "steps": 6, "warmup_steps": 1}
    defaults |= {"batch_size": 6, "save_every": 2, "rl": RLConfig(actor_lr=1e-3, critic_lr=1e-3)}
    train_orl.main(train_orl.Config(out=out, **HERE | defaults | options))
    return out


def roll_out(w, out, **options):
    """Episodes of the SFT policy, at most 5 steps each."""
    options = {"checkpoint": w.sft, "max_steps": 5} | options
    collect.main(collect.Config(out, "policy", **WORLD | options))
    return read_episodes(out)


def evaluate(w, name, **options):
    options = {"max_steps": 5} | options
    return evaluation.main(evaluation.Config(w.root / "eval", name, **WORLD | options))


@pytest.fixture(scope="module")
def w(one_simulator, tmp_path_factory):
    """The whole pipeline, once: every later test reads its files or runs one stage again."""
    root = tmp_path_factory.mktemp("pipeline")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "PANELS", root)
        patch.setattr(evaluation, "RESULTS", root / "recorded")
        for panel, lines in {"tiny": PANEL, "one": PANEL[:1]}.items():
            for split in ("train", "dev", "test"):
                text = "# a comment\n" + "".join(f"{task} {variation}\n" for task, variation in lines)
                (root / f"scienceworld_{panel}_{split}.txt").write_text(text)
        w = SimpleNamespace(
            root=root, base=root / "base", gold=root / "gold.jsonl", explore=root / "explore.jsonl"
        )
        collect.main(collect.Config(w.gold, "gold", **WORLD))
        w.gold_at_first = w.gold.read_bytes()
        collect.main(collect.Config(w.explore, "explore", repeats=3, max_steps=25, **WORLD))
        pretrain.main(
            pretrain.Config(
                (w.explore,), w.base, vocab=1000, hidden=64, layers=2, heads=4, feed_forward=128, context=32,
                rows=4, tokens=15_000, threads=1,
            )
        )  # fmt: skip
        w.sft = sft(w, root / "sft")
        w.rollouts = root / "rollouts.jsonl"
        w.rolled = roll_out(w, w.rollouts)
        w.orl = orl(w, root / "orl")
        yield w


def metrics(folder):
    """{metric: [value per logged step]}."""
    series = {}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        series.setdefault(row["metric"], []).append(float(row["value"]))
    return series


def sources(path):
    return {e.source for e in read_episodes(path)}


def adapter(folder):
    return load_file(folder / "adapter" / "shared" / "adapter_model.safetensors")


def tensors(folder):
    """{file: {name: bytes}} of every exported weight file (the order of a file's header varies)."""
    return {
        str(path.relative_to(folder)): {name: t.numpy().tobytes() for name, t in load_file(path).items()}
        for path in sorted(folder.rglob("*.safetensors"))
    }


# --- collection ---------------------------------------------------------------------------------------------
def test_gold_episodes_are_annotated_successes_that_can_be_trained_on(w):
    episodes = read_episodes(w.gold)
    assert sorted((e.task, e.variation) for e in episodes) == sorted(PANEL)
    for episode in episodes:
        assert episode.success and episode.score == 100 and episode.source == "expert"
        assert episode.turns[-1].terminated
        assert {t.level for t in transitions(episode)} == set(LEVELS)


def test_exploration_plays_every_episode_with_other_seeds_and_holds_no_role_prompt(w):
    episodes = read_episodes(w.explore)
    assert len(episodes) == 3 * len(PANEL)
    assert len({(e.task, tuple(t.action for t in e.turns)) for e in episodes}) == 3 * len(PANEL)
    assert not any("Subtask:" in t.obs or t.subtask for e in episodes for t in e.turns)


def test_rollouts_keep_what_was_sampled(w):
    for episode in w.rolled:
        assert 0 < len(episode.turns) <= 5
        assert re.fullmatch("policy-[0-9a-f]{8}-seed0-0", episode.source)
        assert {t.completion_ids != [] for t in transitions(episode)} == {True}
        assert all(len(d.ids) == len(d.logprobs) for d in episode.decisions)


def equal(a, b):
    """Equal episodes, log-probs up to the rounding of another batch."""
    for x, y in zip(a.decisions, b.decisions, strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-3)
        assert x.ids == y.ids

    def rest(e):
        return dataclasses.replace(e, decisions=[])

    assert rest(a) == rest(b)


def test_an_interrupted_collection_goes_on_without_playing_again(w, tmp_path, monkeypatch):
    def stop_after_one(path, episodes, append):
        write_episodes(path, episodes, append)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect, "write_episodes", stop_after_one)
        roll_out(w, tmp_path / "r.jsonl")
    first_line = (tmp_path / "r.jsonl").read_text()
    assert first_line.count("\n") == 1

    played = []

    def spy(pool, panel, *args, **options):
        played.extend(panel)
        return original(pool, panel, *args, **options)

    original = collect.rollout
    monkeypatch.setattr(collect, "rollout", spy)
    episodes = roll_out(w, tmp_path / "r.jsonl")
    assert played == [e for e in PANEL if e != (episodes[0].task, episodes[0].variation)]
    assert (tmp_path / "r.jsonl").read_text().startswith(first_line)
    for found, expected in zip(episodes, w.rolled, strict=True):
        equal(found, expected)
    roll_out(w, tmp_path / "r.jsonl")
    assert len(played) == 1, "a complete file is left alone"


def test_episodes_of_another_player_are_not_taken_for_ones_own(w, tmp_path):
    """Rollouts never go into the file of the experts, nor gold paths into that of the rollouts."""
    gold, rollouts = shutil.copy(w.gold, tmp_path / "g.jsonl"), shutil.copy(w.rollouts, tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="holds episodes of .*expert.*choose another --out"):
        roll_out(w, gold)
    with pytest.raises(ValueError, match="holds episodes of .*policy-.*choose another --out"):
        collect.main(collect.Config(rollouts, "gold", **WORLD))
    assert gold.read_bytes() == w.gold_at_first and rollouts.read_bytes() == w.rollouts.read_bytes()


def test_rollouts_and_offline_rl_leave_the_experts_file_as_it_was(w):
    assert w.gold.read_bytes() == w.gold_at_first
    assert sources(w.gold) == {"expert"} and "expert" not in sources(w.rollouts)


@pytest.mark.parametrize(
    "options", [{"ends": "judge"}, {"judge_noise": 0.5}, {"temperature": 0.5}, {"max_actions": 2}], ids=str
)
def test_a_collection_does_not_go_on_with_other_flags(w, tmp_path, options):
    rollouts = shutil.copy(w.rollouts, tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="one that plays by other flags; choose another --out"):
        roll_out(w, rollouts, **options)


def spans(episode):
    return [(s.start, s.end) for s in episode.segments]


def test_the_cap_is_the_length_of_a_subtask_when_nothing_else_ends_it(w, tmp_path):
    for episode in roll_out(w, tmp_path / "r.jsonl", ends="cap", max_actions=2):
        assert len(episode.turns) == 5 and spans(episode) == [(0, 2), (2, 4), (4, 5)]
        planned = [d.turn for d in episode.decisions if d.level == "planner"]
        assert planned == [0, 2, 4]


def test_the_judge_ends_subtasks_and_noise_turns_its_verdicts_round(w, tmp_path, capsys):
    """An unskilled policy completes nothing, so with all noise every action does."""
    options = {"ends": "judge", "max_actions": 3}
    sure = roll_out(w, tmp_path / "sure.jsonl", **options)
    liar = roll_out(w, tmp_path / "liar.jsonl", judge_noise=1.0, **options)
    assert "verdicts are those of the rules after 0.0% of actions" in capsys.readouterr().out
    half = roll_out(w, tmp_path / "half.jsonl", judge_noise=0.5, **options)
    rules = annotate.rules("scienceworld").judge
    for episodes, noise in ((sure, 0.0), (liar, 1.0), (half, 0.5)):
        assert completion.agreement(episodes, completion.noisy(rules, noise)) == 1
        for episode in episodes:
            for segment in episode.segments:
                *before, last = episode.turns[segment.start : segment.end]
                assert not any(t.verified_done for t in before)
                assert last.verified_done or len(before) == 2 or last.terminated or last.truncated
    assert {b - a for e in liar for a, b in spans(e)} == {1}
    assert max(b - a for e in sure for a, b in spans(e)) > 1
    again = roll_out(w, tmp_path / "again.jsonl", judge_noise=0.5, **options)
    assert [[t.verified_done for t in e.turns] for e in again] == [
        [t.verified_done for t in e.turns] for e in half
    ]


def test_noise_of_the_judge_reaches_the_gold_paths_too(w, tmp_path):
    collect.main(collect.Config(tmp_path / "gold.jsonl", "gold", judge_noise=1.0, **WORLD))
    wrong, right = read_episodes(tmp_path / "gold.jsonl"), read_episodes(w.gold)
    for a, b in zip(wrong, right, strict=True):
        assert [t.verified_done for t in a.turns] == [not t.verified_done for t in b.turns]
        assert a.segments == b.segments and [t.claimed_done for t in a.turns] == [
            t.claimed_done for t in b.turns
        ]


def test_repeats_sample_other_episodes(w, tmp_path):
    episodes = roll_out(w, tmp_path / "r.jsonl", panel="one", repeats=2)
    assert [e.source[-7:] for e in episodes] == ["seed0-0", "seed0-1"]
    first, second = ([t.raw_text for t in e.turns] for e in episodes)
    assert first != second
    assert collect.duplicates(episodes) == 0 and collect.duplicates(episodes[:1] * 4) == 0.75


# --- training -----------------------------------------------------------------------------------------------
def test_the_base_was_pretrained_and_resumes_as_finished(w):
    rows = list(csv.reader((w.base / "pretrain_log.csv").open()))
    assert int(rows[-1][0]) > 3 and float(rows[-1][-2]) < math.log(1000), (
        "better than uniform on held-out text"
    )
    _, tokenizer, _ = load_policy(w.sft)
    assert tokenizer("37", add_special_tokens=False).input_ids == [
        *tokenizer("3", add_special_tokens=False).input_ids,
        *tokenizer("7", add_special_tokens=False).input_ids,
    ]


def test_sft_moves_the_adapter_and_leaves_a_whole_run(w):
    assert {p.name for p in w.sft.iterdir()} >= {
        "config.json",
        "metrics.csv",
        "state.pt",
        "adapter",
        "policy.json",
    }
    meta = json.loads((w.sft / "policy.json").read_text())
    assert (meta["stage"], meta["steps"], meta["rank"]) == ("sft", 6, 4)
    assert all(t.abs().max() > 0 for name, t in adapter(w.sft).items() if "lora_B" in name)


def test_a_used_folder_is_refused(w):
    with pytest.raises(ValueError, match="already holds a run"):
        sft(w, w.sft)
    with pytest.raises(ValueError, match="already holds a run"):
        orl(w, w.orl)


def test_sft_refuses_a_backbone_that_caps_its_logits(w, tmp_path):
    """As Gemma 2 does: the loss would be that of another model."""
    capped = shutil.copytree(w.base, tmp_path / "capped")
    record = json.loads((capped / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (capped / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0 .*use a backbone without it"):
        sft(w, tmp_path / "sft", model=str(capped))


def interrupted(monkeypatch, owner, name, call, run):
    """Runs `run` and presses Ctrl-C at the `call`-th call of owner.name."""
    original, calls = getattr(owner, name), []

    def press(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="go on with --resume"):
        patch.setattr(owner, name, press)
        run()


@pytest.mark.parametrize(
    "options", [{}, {"adapters": "separate"}, {"rank": 0}], ids=["shared", "separate", "rank 0"]
)
def test_an_interrupted_sft_run_ends_bit_for_bit_as_an_uninterrupted_one(w, tmp_path, monkeypatch, options):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = options | {"tokens_per_forward": 10**6}  # one forward per step
    sft(w, whole, **options)
    interrupted(
        monkeypatch, train_sft, "sft_loss", 4, lambda: sft(w, cut, **options)
    )  # saved at 2, stopped in 4
    assert not (cut / "policy.json").exists()
    sft(w, cut, resume=True, **options)
    assert tensors(cut) == tensors(whole) != {}
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_an_sft_run_stopped_before_its_first_state_starts_again(w, tmp_path, monkeypatch):
    interrupted(monkeypatch, train_sft, "sft_loss", 2, lambda: sft(w, tmp_path / "cut"))
    sft(w, tmp_path / "cut", resume=True)
    assert tensors(tmp_path / "cut") == tensors(w.sft)
    assert (tmp_path / "cut/metrics.csv").read_text() == (w.sft / "metrics.csv").read_text()


def test_an_interrupted_orl_run_ends_bit_for_bit_as_an_uninterrupted_one(w, tmp_path, monkeypatch):
    interrupted(monkeypatch, Learner, "update", 4, lambda: orl(w, tmp_path / "cut"))
    orl(w, tmp_path / "cut", resume=True)
    assert set(tensors(w.orl)) == {"adapter/shared/adapter_model.safetensors", "critic.safetensors"}
    assert tensors(tmp_path / "cut") == tensors(w.orl)
    assert (tmp_path / "cut/metrics.csv").read_text() == (w.orl / "metrics.csv").read_text()


def test_orl_starts_from_sft_and_moves_it(w, tmp_path):
    orl(w, tmp_path / "still", steps=2, warmup_steps=2)
    before, still, after = adapter(w.sft), adapter(tmp_path / "still"), adapter(w.orl)
    assert all(torch.equal(before[name], still[name]) for name in before), "warm-up trains the critics only"
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_orl_of_all_weights_learns_an_adapter_on_top_of_them(w, tmp_path):
    sft(w, tmp_path / "sft", rank=0)
    orl(w, tmp_path / "orl", init=tmp_path / "sft", rank=4)
    taught, _, _ = load_policy(tmp_path / "sft", trainable=True)
    policy, tokenizer, meta = load_policy(tmp_path / "orl", trainable=True)
    assert (meta["stage"], meta["rank"], meta["model"]) == ("orl", 4, str(tmp_path / "orl/backbone"))
    lm, _ = load_backbone(str(tmp_path / "orl/backbone"))
    ids = torch.randint(3, len(tokenizer), (2, 9))
    with torch.no_grad():
        before, after = hidden_states(taught, ids), hidden_states(policy, ids)
        assert torch.equal(hidden_states(lm, ids), before), "the backbone is what SFT taught"
        with without_adapters(policy):
            assert torch.equal(hidden_states(policy, ids), before) and not torch.equal(after, before)
    orl(w, tmp_path / "all", init=tmp_path / "sft", rank=0)
    assert load_policy(tmp_path / "all")[2]["rank"] == 0 and not (tmp_path / "all/backbone").exists()


def test_orl_saves_critics_that_load_and_that_its_targets_follow(w):
    _, _, meta = load_policy(w.orl)
    assert (meta["stage"], meta["steps"]) == ("orl", 6)
    critics = load_critics(w.orl / "critic.safetensors", hidden_size=64)
    pairs = list(zip(critics.online.parameters(), critics.target.parameters(), strict=True))
    assert all(a.isfinite().all() for a, _ in pairs) and any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("shares", "expected"), [({}, 4), ({"expert_share": 0.0}, 0), ({"rollout_share": 1.0}, 6)]
)
def test_orl_mixes_expert_and_rollouts_at_their_ratio(w, tmp_path, monkeypatch, shares, expected):
    """The default is 1:2 in every batch of 12."""
    experts, original = [], train_orl.micro_batches

    def spy(items, *args):
        experts.append(sum(t.source == "expert" for t in items))
        return original(items, *args)

    monkeypatch.setattr(train_orl, "micro_batches", spy)
    orl(w, tmp_path / "orl", steps=3, batch_size=12, **shares)
    assert experts == [expected] * 3


def test_orl_runs_when_every_rollout_failed(w, tmp_path):
    failed = []
    for episode in read_episodes(w.rollouts):
        turns = [dataclasses.replace(t, reward=0.0, verified_done=False) for t in episode.turns]
        failed.append(dataclasses.replace(episode, turns=turns, score=0.0, success=False))
    write_episodes(tmp_path / "failed.jsonl", failed)
    orl(w, tmp_path / "orl", rollouts=tmp_path / "failed.jsonl", expert_share=0.0)
    values = metrics(tmp_path / "orl")
    assert len(values["executor/q_loss"]) == 6
    assert all(math.isfinite(x) for series in values.values() for x in series)


def test_orl_with_behaviour_cloning_gives_every_decision_weight_one(w, tmp_path):
    orl(w, tmp_path / "bc", rl=RLConfig(actor="bc"), steps=2)
    orl(w, tmp_path / "awr", rl=RLConfig(temperature=0.01), steps=2)
    assert set(metrics(tmp_path / "bc")["executor/weight_mean"]) == {1.0}
    assert 1.0 not in metrics(tmp_path / "awr")["executor/weight_mean"]


@pytest.mark.parametrize("adapters", ["shared", "separate"])
def test_offline_rl_goes_on_from_the_weights_of_sft_and_not_from_fresh_ones(w, tmp_path, adapters):
    """Two trained steps of at most 1e-6 each, and SFT's own steps were of up to 1e-3."""
    trained = sft(w, tmp_path / "sft", adapters=adapters)
    orl(w, tmp_path / "orl", init=trained, steps=2, warmup_steps=0, rl=RLConfig(actor_lr=1e-6))
    before, after = tensors(trained), tensors(tmp_path / "orl")
    after.pop("critic.safetensors")
    assert set(before) == set(after) and len(before) == (1 if adapters == "shared" else 3)
    for path in before:
        sft_weights, orl_weights = (load_file(folder / path) for folder in (trained, tmp_path / "orl"))
        change = {name: (orl_weights[name] - sft_weights[name]).abs().max() for name in sft_weights}
        assert 0 < max(change.values()) < 3e-6, "it did train, by little"
        for name, weights in sft_weights.items():
            if "lora_B" in name:  # 0 in a fresh adapter
                assert weights.abs().max() > 1e-4 > 30 * change[name]


def test_sft_of_no_epochs_saves_the_untrained_adapter_and_it_plays_as_the_backbone(w, tmp_path):
    fresh = sft(w, tmp_path / "sft", epochs=0)
    assert all(t.abs().max() == 0 for name, t in adapter(fresh).items() if "lora_B" in name)
    assert all(t.abs().max() > 0 for name, t in adapter(fresh).items() if "lora_A" in name)
    assert json.loads((fresh / "policy.json").read_text())["steps"] == 0 and metrics(fresh) == {}
    options = {"panel": "one", "max_steps": 2}
    evaluate(w, "fresh", checkpoint=fresh, **options)
    evaluate(w, "backbone", agent="zero-shot", model=str(w.base), **options)
    a, b = (read_episodes(w.root / f"eval/episodes/{name}.jsonl")[0] for name in ("fresh", "backbone"))
    equal(dataclasses.replace(a, source=""), dataclasses.replace(b, source=""))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_its_readings_are_those_of_the_run(w, tmp_path, preset):
    orl(w, tmp_path / "orl", preset=preset, steps=2, warmup_steps=1)
    values = metrics(tmp_path / "orl")
    assert all(math.isfinite(x) for series in values.values() for x in series)
    assert len(values["actor/grad_norm"]) == 1 and len(values["critic/grad_norm"]) == 2
    config = json.loads((tmp_path / "orl/config.json").read_text())
    for group, readings in PRESETS[preset].items():
        assert {name: config[group][name] for name in readings} == readings
    assert config["rl"]["actor_lr"] == 1e-3, "what the preset does not name stays"
    trained = tensors(tmp_path / "orl")
    assert trained != tensors(w.orl)
    orl(w, tmp_path / "orl", preset=preset, steps=2, warmup_steps=1, resume=True)  # finished, not refused
    assert tensors(tmp_path / "orl") == trained


def test_a_preset_is_refused_beside_a_flag_that_it_sets(w, tmp_path, monkeypatch):
    command = ["train_orl.py", "--init", w.sft, "--expert", w.gold, "--rollouts", w.rollouts]
    command += ["--out", tmp_path / "orl", "--threads", 1, "--device", "cpu", "--preset"]
    for flags, clash in [
        (["as_released_glider", "--rl.actor", "bc"], "rl ['actor']"),
        (
            ["as_released_step_hrl", "--rl.expectile", 0.5, "--rl.token-norm", "mean"],
            "rl ['expectile']",  # the other flag agrees
        ),
        (["as_published_glider", "--credit.invalid-penalty", 0.5], "credit ['invalid_penalty']"),
    ]:
        code = command_line(monkeypatch, *command, *flags)
        assert code == f"error: --preset {flags[0]} sets {clash}: leave out these flags or it"
    assert not (tmp_path / "orl").exists()
    assert command_line(monkeypatch, *command, "as_told") == 2, "tyro refuses an unknown preset"


def test_a_preset_leaves_the_flags_beside_it(w):
    config = train_orl.Config(w.sft, w.gold, w.rollouts, w.root, "as_released_glider")
    config = dataclasses.replace(config, rl=RLConfig(gamma=0.9), credit=Credit(noise=0.2))
    readings = PRESETS["as_released_glider"]
    filled = train_orl.with_preset(config)
    assert filled.rl == RLConfig(gamma=0.9, **readings["rl"])
    assert filled.credit == Credit(noise=0.2, **readings["credit"])
    plain = dataclasses.replace(config, preset="none")
    assert train_orl.with_preset(plain) == plain


def test_a_run_that_samples_answers_resumes_bit_for_bit(w, tmp_path, monkeypatch):
    """TD3+BC, the conservative term, V over the policy's own answers and features without the adapter."""
    options = {"rl": RLConfig(
        actor_lr=1e-3, critic_lr=1e-3, actor="td3_bc", conservative=0.5, value_answers="policy",
        features="frozen",
    )}  # fmt: skip
    orl(w, tmp_path / "whole", **options)
    interrupted(monkeypatch, Learner, "update", 4, lambda: orl(w, tmp_path / "cut", **options))
    orl(w, tmp_path / "cut", resume=True, **options)
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "whole") != tensors(w.orl)
    whole, cut = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut"))
    assert cut == whole
    values = metrics(tmp_path / "whole")
    assert {"executor/cql_loss", "executor/pg_loss"} <= set(values)
    assert all(math.isfinite(x) for series in values.values() for x in series)


def test_answers_are_sampled_anew_at_every_step_and_only_when_a_reading_needs_them(w, tmp_path, monkeypatch):
    sampled, original = [], train_orl.sample_answers

    def spy(policy, tokenizer, items, seed):
        answers = original(policy, tokenizer, items, seed)
        assert set(answers) == {id(t) for t in items} and all(answers.values())
        sampled.append((seed, [answers[id(t)] for t in items]))
        return answers

    monkeypatch.setattr(train_orl, "sample_answers", spy)
    orl(w, tmp_path / "awr", steps=2)
    assert sampled == []
    orl(w, tmp_path / "cql", steps=2, warmup_steps=2, rl=RLConfig(conservative=1.0))
    (first, a), (second, b) = sampled
    assert first != second and a != b


def test_the_policy_of_the_first_step_is_the_one_that_played_the_rollouts(w, tmp_path):
    """kl_sft, from log-probs that acting stored and training computes, is 0 until the policy moves."""
    orl(w, tmp_path / "orl", precision="fp32", steps=3, warmup_steps=2, rl=RLConfig(actor_lr=1e-2))
    values = metrics(tmp_path / "orl")
    names = [name for name in values if name.endswith("/kl_sft")]
    assert names and max(abs(x) for name in names for x in values[name]) < 1e-3  # 4 decimals a token
    assert values["actor/grad_norm"][0] > 0


def test_stored_log_probs_are_those_of_training_for_every_role(w):
    policy, tokenizer, _ = load_policy(w.sft, trainable=True)
    items = [t for episode in w.rolled for t in transitions(episode)]
    batch = collate(items, tokenizer)
    with torch.no_grad():
        hidden = hidden_states(policy, batch.input_ids, batch.level)
        weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
        logp, _ = sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)
    assert {t.level for t in items} == set(LEVELS)
    for row, t in enumerate(items):
        found = logp[row][batch.action_mask[row]]
        assert found.tolist() == pytest.approx(t.behavior_logprobs, abs=1.5e-4)  # stored with 4 decimals


def test_a_checkpoint_from_before_flat_agents_plays_and_trains_on(w, tmp_path):
    old = shutil.copytree(w.sft, tmp_path / "old")
    meta = json.loads((old / "policy.json").read_text())
    assert meta.pop("flat") is False
    (old / "policy.json").write_text(json.dumps(meta))
    for found, expected in zip(roll_out(w, tmp_path / "r.jsonl", checkpoint=old), w.rolled, strict=True):
        equal(found, expected)
    assert tensors(orl(w, tmp_path / "orl", init=old)) == tensors(w.orl)
    results = [evaluate(w, name, checkpoint=c, panel="one") for name, c in (("o", old), ("n", w.sft))]
    assert results[0]["subtasks"] == results[1]["subtasks"] and results[0]["subtasks"]["ends"] == "claim"


# --- a flat agent -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def flat(w):
    """SFT, rollouts, offline RL and evaluation of an agent without a planner."""
    f = SimpleNamespace(sft=sft(w, w.root / "flat_sft", flat=True), rollouts=w.root / "flat.jsonl")
    f.rolled = roll_out(w, f.rollouts, checkpoint=f.sft, max_actions=2)
    options = {"precision": "fp32", "warmup_steps": 3, "batch_size": 9}
    f.orl = orl(w, w.root / "flat_orl", init=f.sft, rollouts=f.rollouts, **options)
    f.result = evaluate(w, "flat", checkpoint=f.orl, max_actions=2)
    return f


def test_a_flat_agent_plays_without_a_planner(w, flat):
    for episode in [*flat.rolled, *read_episodes(w.root / "eval/episodes/flat.jsonl")]:
        assert {d.level for d in episode.decisions} == {"executor", "progress"}
        (segment,) = episode.segments
        assert (segment.start, segment.end) == (0, len(episode.turns)) and len(episode.turns) > 2
        assert segment.subtask == prompts.compact(episode.description)
    assert set(flat.result) == FIELDS
    assert set(flat.result["tokens_per_decision"]) == {"executor", "progress"}
    subtasks = flat.result["subtasks"]
    assert (subtasks["ends"], subtasks["count"], subtasks["ended_by"]["cap"]) == ("episode", 2, 0)


def test_a_flat_agent_stays_flat_through_offline_rl_and_learns_no_planner(w, flat):
    for folder, stage in ((flat.sft, "sft"), (flat.orl, "orl")):
        meta = json.loads((folder / "policy.json").read_text())
        assert (meta["flat"], meta["stage"]) == (True, stage)
    values = metrics(flat.orl)
    assert {name.split("/")[0] for name in values} == {"actor", "critic", "executor", "progress"}
    assert all(math.isfinite(x) for series in values.values() for x in series)
    assert all(t.abs().max() > 0 for name, t in adapter(flat.orl).items() if "lora_B" in name)
    assert (
        tensors(flat.orl)["adapter/shared/adapter_model.safetensors"]
        != (tensors(flat.sft)["adapter/shared/adapter_model.safetensors"])
    )


def test_what_a_flat_agent_trains_on_is_what_it_played(w, flat):
    """Its own prompts, so that what it sampled has the same probability in training."""
    values = metrics(flat.orl)
    first = [values[name][i] for name in values if name.endswith("/kl_sft") for i in range(3)]
    assert first and max(map(abs, first)) < 1e-3
    rolled = [t for e in flat.rolled for t in transitions(annotate.flat(e), flat=True)]
    assert all(t.completion_ids for t in rolled) and {t.level for t in rolled} == {"executor", "progress"}


# --- evaluation ---------------------------------------------------------------------------------------------
def test_a_result_has_exactly_the_documented_fields(w):
    result = evaluate(w, "orl", checkpoint=w.orl)
    assert result == json.loads((w.root / "eval/results/orl.json").read_text())
    assert set(result) == FIELDS
    assert (result["benchmark"], result["panel"], result["split"]) == ("scienceworld", "tiny", "dev")
    assert (result["agent"], result["stage"], result["checkpoint"]) == ("orl", "orl", str(w.orl))
    assert (result["seeds"], result["episodes"], result["max_steps"]) == ([0], 2, 5)
    assert set(result["per_type"]) == {task for task, _ in PANEL}
    assert result["max_actions"] == 15
    assert set(result["tokens_per_decision"]) == set(LEVELS)
    low, high = result["ci95"]
    assert 0 <= low <= result["macro_mean"] <= high <= 100
    episodes = read_episodes(w.root / "eval/episodes/orl.jsonl")
    assert [(e.task, e.variation) for e in episodes] == PANEL, "in the order of the panel"
    assert result["scores"] == [e.score for e in episodes]
    assert result["subtasks"] == completion.summary(episodes, "claim")
    assert result["mean_steps"] == sum(len(e.turns) for e in episodes) / 2


def test_a_shipped_policy_is_small_plays_alike_and_is_what_eval_plays_by_default(w, tmp_path, monkeypatch):
    monkeypatch.setattr("model.BASE", w.base)
    folder = tmp_path / "policies/scienceworld"
    ship.main(ship.Config(w.orl, folder))
    (shipped, _, meta), (source, *_) = load_policy(folder), load_policy(w.orl)
    weights = dict(source.named_parameters())
    for name, p in shipped.named_parameters():
        torch.testing.assert_close(p, weights[name].bfloat16().float(), rtol=0, atol=0, msg=name)
    assert (meta["model"], meta["rank"], meta["stage"]) == ("base", 0, "orl")
    size = {f: f.stat().st_size for f in (*folder.rglob("*.safetensors"), w.base / "model.safetensors")}
    assert size[folder / "adapter/model.safetensors"] < 1.1 * size[w.base / "model.safetensors"], "bfloat16"
    monkeypatch.setattr(evaluation, "POLICIES", tmp_path / "policies")
    monkeypatch.chdir(tmp_path)
    first, second = (evaluate(w, name) for name in ("shipped", "again"))
    assert first["scores"] == second["scores"] and first["subtasks"] == second["subtasks"]
    assert (first["checkpoint"], first["stage"]) == ("policies/scienceworld", "orl")
    assert read_episodes(w.root / "eval/episodes/shipped.jsonl")[0].decisions[0].value is not None, "critics"
    separate = sft(w, tmp_path / "separate", adapters="separate", epochs=0.0)
    with pytest.raises(ValueError, match="an adapter for each role"):
        ship.main(ship.Config(separate, tmp_path / "no"))


def test_q_of_every_decision_is_noted_and_shown_in_the_report(w):
    evaluate(w, "valued", checkpoint=w.orl, panel="one")
    evaluate(w, "imitator", checkpoint=w.sft, panel="one")
    (episode,), (plain,) = (
        read_episodes(w.root / f"eval/episodes/{name}.jsonl") for name in ("valued", "imitator")
    )
    policy, tokenizer, _ = load_policy(w.orl, "cpu")
    critics = load_critics(w.orl / "critic.safetensors")
    asked = {(t.level, t.turn): t for t in transitions(episode)}
    assert len(episode.decisions) > 2
    for d in episode.decisions:
        ids = tokenizer(asked[d.level, d.turn].prompt, add_special_tokens=False).input_ids
        row, level = torch.tensor([[tokenizer.bos_token_id, *ids, *d.ids]]), LEVELS.index(d.level)
        with torch.no_grad():
            hidden = hidden_states(policy, row, torch.tensor([level]))[:, -1]
        assert d.value == pytest.approx(critics.q(hidden, torch.tensor([level])).item(), abs=2e-3)
    text = article(episode, "valued", [])
    shown = [d for d in episode.decisions if d.level != "progress"]
    assert text.count(">Q ") == len(shown) and f">Q {shown[0].value:+.2f}<" in text
    assert all(d.value is None for d in plain.decisions) and ">Q " not in article(plain, "imitator", [])


def test_an_experts_decisions_have_no_q(w):
    evaluate(w, "led", checkpoint=w.orl, guide="planner")
    episode = read_episodes(w.root / "eval/episodes/led.jsonl")[0]
    assert {d.level: d.value is None for d in episode.decisions} == {
        "planner": True, "executor": False, "progress": False
    }  # fmt: skip


def test_evaluating_twice_gives_the_same_scores_and_the_same_episodes(w):
    """The second time in a worker process with a Java of its own."""
    first, second = (evaluate(w, n, checkpoint=w.orl, workers=i) for i, n in enumerate(("once", "twice")))
    changing = ("agent", "minutes")
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }
    once, twice = ((w.root / f"eval/episodes/{name}.jsonl").read_bytes() for name in ("once", "twice"))
    assert once == twice


def test_one_slot_plays_as_many_slots_do(w):
    """A greedy episode alone equals the same episode in a batch."""
    evaluate(w, "many", checkpoint=w.sft)
    evaluate(w, "alone", checkpoint=w.sft, slots=1)
    many, alone = (read_episodes(w.root / f"eval/episodes/{name}.jsonl") for name in ("many", "alone"))
    for a, b in zip(many, alone, strict=True):
        equal(a, b)


def test_the_gold_agent_scores_100(w):
    result = evaluate(w, "gold", agent="gold", max_steps=50)
    assert (result["macro_mean"], result["success_rate"], result["ci95"]) == (100, 1, [100, 100])
    assert result["stage"] == "gold" and result["tokens_per_decision"] == {}


def test_the_random_agent_plays_valid_actions_from_its_seed(w):
    options = {"agent": "random", "panel": "one", "max_steps": 3}
    results = [evaluate(w, f"random-{i}", seed=seed, **options) for i, seed in enumerate((0, 0, 1))]
    played = [read_episodes(w.root / f"eval/episodes/random-{i}.jsonl")[0] for i in range(3)]
    actions = [[t.action for t in e.turns] for e in played]
    assert actions[0] == actions[1] != actions[2]
    assert not any(e.obs_after(t).startswith("No known action") for e in played for t in range(len(e.turns)))
    assert results[0]["scores"] == results[1]["scores"]


def test_an_evaluation_ends_subtasks_as_it_is_told_and_says_so(w):
    result = evaluate(w, "cap", checkpoint=w.orl, panel="one", ends="cap", max_actions=2)
    (episode,) = read_episodes(w.root / "eval/episodes/cap.jsonl")
    assert spans(episode) == [(0, 2), (2, 4), (4, 5)] and result["max_actions"] == 2
    assert (result["subtasks"]["ends"], result["subtasks"]["ended_by"]["cap"]) == ("cap", 2)


def test_zero_shot_is_the_backbone_without_an_adapter(w):
    result = evaluate(w, "zero", agent="zero-shot", model=str(w.base), panel="one", max_steps=2)
    assert result["stage"] == "zero-shot"
    assert result["checkpoint"] == json.loads((w.sft / "policy.json").read_text())["base"]
    zero, tuned = read_episodes(w.root / "eval/episodes/zero.jsonl")[0], w.rolled[0]
    assert zero.decisions and zero.source == "zero-shot" != tuned.source


def test_the_test_split_is_refused_without_a_reason_and_recorded_with_one(w):
    log = w.root / "recorded" / "test_log.jsonl"
    with pytest.raises(ValueError, match="--reason"):
        evaluate(w, "headline", checkpoint=w.orl, split="test", panel="one")
    assert not log.exists() and not (w.root / "eval/results/headline.json").exists()
    evaluate(w, "dev", checkpoint=w.orl, split="dev", panel="one", max_steps=1)
    assert not log.exists(), "dev leaves no record"
    for reason in ("chosen on dev", "again"):
        result = evaluate(
            w, "headline", checkpoint=w.orl, split="test", panel="one", max_steps=1, reason=reason
        )
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["reason"] for r in records] == ["chosen on dev", "again"]
    assert set(records[0]) == {
        "panel", "agent", "macro_mean", "ci95", "commit", "command", "checkpoint_hash", "reason"
    }  # fmt: skip
    assert records[0]["checkpoint_hash"] == evaluation.file_hash(w.orl / "adapter")
    assert records[1]["macro_mean"] == result["macro_mean"]


def test_an_overfitted_policy_replays_its_gold_path_in_the_simulator(w, tmp_path):
    """Score 100 from the weights alone: prompts, masks, training, sampling, parsing and the world agree."""
    gold = next(e for e in read_episodes(w.gold) if (e.task, e.variation) == PANEL[0])
    write_episodes(tmp_path / "one.jsonl", [gold])
    count = len(transitions(gold))
    config = train_sft.Config(
        tmp_path / "one.jsonl", tmp_path / "sft", model=str(w.base), rank=0, epochs=200, batch_size=count,
        lr=3e-3, precision="fp32", **HERE,
    )  # fmt: skip
    train_sft.main(config)
    loss = metrics(tmp_path / "sft")["train/loss"]
    assert loss[0] > 2 and loss[-1] < 0.05
    for level in LEVELS:
        said = metrics(tmp_path / "sft")[f"{level}/said"]
        assert said[0] < 0.01 and 0.8 < said[-1] <= 1
    result = evaluate(w, "overfit", checkpoint=tmp_path / "sft", panel="one", max_steps=50)
    (episode,) = read_episodes(w.root / "eval/episodes/overfit.jsonl")
    assert [t.action for t in episode.turns] == [t.action for t in gold.turns]
    assert [t.progress for t in episode.turns] == [t.progress for t in gold.turns]
    assert [s.subtask for s in episode.segments] == [s.subtask for s in gold.segments]
    assert result["macro_mean"] == 100 and result["success_rate"] == 1 and result["parse_failure_rate"] == 0
    own = w.root / "eval/episodes/overfit.jsonl"  # the expert's path, played by the policy
    (found,) = exact.main(exact.Config(own, (tmp_path / "sft",), tmp_path, **HERE)).values()
    assert {level: row["exact"] for level, row in found["levels"].items()} == dict.fromkeys(LEVELS, 100)
    # Prompts and answers rebuilt from the played episode are those of the expert.
    played, trained = transitions(episode), transitions(gold)
    assert [(t.level, t.prompt, t.completion) for t in played] == [
        (t.level, t.prompt, t.completion) for t in trained
    ]


# --- mistakes -----------------------------------------------------------------------------------------------
def command_line(monkeypatch, script, *args):
    """What `python script args` ends with: its exit message."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


def test_mistakes_end_with_one_line_that_names_the_fix(w, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "POLICIES", tmp_path / "none")
    (w.root / "scienceworld_wrong_train.txt").write_text("lifespan-longest-lived 0\nmake-coffee 0\n")
    (w.root / "scienceworld_wrong_dev.txt").write_text("boil\n")
    damaged, bare = tmp_path / "damaged.jsonl", tmp_path / "bare.jsonl"
    damaged.write_text(w.gold.read_text().splitlines()[0] + '\n{"schema": 1, "env": "scie')
    write_episodes(bare, read_episodes(w.explore)[:1])
    out, new, url = tmp_path / "out", tmp_path / "new.jsonl", "http://127.0.0.1:9/v1"
    common = ["--threads", 1, "--device", "cpu"]
    train = ["train_sft.py", "--model", w.base, "--out", out, *common]
    orl_run = ["train_orl.py", "--init", w.sft, "--expert", w.gold, "--out", out, *common]
    play = ["eval.py", "--out", tmp_path / "eval", "--name", "x", "--workers", 0, *common]
    make = ["collect.py", "--out", new, "--workers", 0, *common]
    player = [*make, "--source", "policy", "--checkpoint", w.sft, "--panel", "one", "--max-steps", 1]
    nobody = ["--judge", "chat", "--teacher-url", url]
    for command, message in [
        ([*make, "--panel", "wrong"], "unknown ScienceWorld task 'make-coffee'"),
        ([*make, "--panel", "nope"], "no panel 'scienceworld_nope_train'"),
        ([*make, "--source", "policy"], "--source policy needs --checkpoint"),
        ([*make, "--judge", "chat"], "--judge chat needs --teacher-url URL"),
        ([*player, *nobody], f"no answer from {url}/chat/completions"),
        ([*player, "--judge-noise", 1.5], "the noise of the judge is 1.5, expected a probability, e.g. 0.1"),
        ([*make, "--source", "policy", "--checkpoint", out, "--panel", "tiny"], "no checkpoint at"),
        (["collect.py", "--out", damaged, "--panel", "tiny", *common], "damaged.jsonl:2: damaged JSON"),
        ([*train, "--data", tmp_path / "missing.jsonl"], "no trajectories at"),
        ([*train, "--data", damaged], "damaged.jsonl:2: damaged JSON"),
        ([*train, "--data", bare], "has no subtasks: annotate it"),
        ([*train, "--data", w.gold, "--model", tmp_path / "nowhere"], "no model at"),
        ([*orl_run, "--rollouts", tmp_path / "missing.jsonl"], "no trajectories at"),
        ([*orl_run, "--rollouts", w.rollouts, "--init", out], "no checkpoint at"),
        ([*play, "--panel", "wrong"], "--agent policy needs --checkpoint"),
        ([*play, "--panel", "wrong", "--agent", "random"], "scienceworld_wrong_dev.txt:1: 'boil' is not"),
        (
            [*play, "--panel", "tiny", "--checkpoint", w.orl, "--split", "test"],
            "a test split is reported once",
        ),
    ]:
        code = command_line(monkeypatch, *command)
        assert isinstance(code, str) and code.startswith("error: "), command
        assert message in code and "\n" not in code, command
    assert not out.exists(), "a run that could not start leaves no folder behind"
    assert not new.exists(), "nor does a collection leave a file"
    assert command_line(monkeypatch, *train, "--data", w.gold, "--gama", 1) == 2, "tyro refuses a typo"
    for flag, value, message in [
        ("--credit.noise", 2, "noise is 2.0, expected a probability"),
        ("--rl.expectile", 1, "expectile is 1.0, expected in (0, 1)"),
    ]:
        capsys.readouterr()
        assert command_line(monkeypatch, *orl_run, "--rollouts", w.rollouts, flag, value) == 2
        assert message in capsys.readouterr().err, "tyro says so"


def test_a_script_that_fails_says_so_on_stderr_and_exits_with_1(tmp_path):
    command = [sys.executable, "train_sft.py", "--data", "nowhere.jsonl", "--out", str(tmp_path / "out")]
    command += ["--model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: no model at")
        and "Traceback" not in done.stderr
    )
