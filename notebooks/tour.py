# %% [markdown]
# # A tour of nanoHRL: from one gold path to offline RL
#
# Two hours with the code beside you. Run it as a script (`python notebooks/tour.py`), or cell by cell in
# an editor that knows `# %%` (VS Code, PyCharm, Jupyter with jupytext). All is made on the spot, on two
# CPU cores, in real ScienceWorld: imitation of experts in biology, then a type of task that is new, "find
# an animal", from own experience. What is finished is not made again. `TOUR=short` makes every training
# tiny, to see that all runs; then no number means anything.

# %%
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(ROOT))

import annotate
import critic
import show
from batches import collate
from data import read_episodes, set_returns, transitions
from envs import EnvPool, read_panel
from logprob import head_weight, sequence_logprobs
from model import hidden_states, load_backbone
from scripted import play_gold

SHORT = os.environ.get("TOUR") == "short"
OUT = Path(os.environ.get("TOUR_OUT", ROOT / "out" / ("tour-short" if SHORT else "tour")))
OUT.mkdir(parents=True, exist_ok=True)


def script(command: str, makes: str) -> None:
    """Runs a script of nanoHRL, as in a terminal, unless what it makes is there; a stopped one goes on."""
    print(f"$ python {command}")
    if command.startswith("train_") and (OUT / makes).with_name("config.json").exists():
        command += " --resume"
    if command.startswith("collect.py") or not (OUT / makes).exists():  # collect.py keeps what it has
        where = {"cwd": ROOT, "stdout": subprocess.DEVNULL if SHORT else None}
        subprocess.run([sys.executable, *shlex.split(command)], check=True, **where)


def save(figure: Figure, name: str) -> None:
    figure.savefig(OUT / f"{name}.svg")
    print(f"figure: {OUT / name}.svg")


# %% [markdown]
# ## 1. One gold path
# ScienceWorld's own expert plays one variation. The world answers in text; the rewards of this path sum to 1.

# %%
panel = read_panel("scienceworld", "find-animal-family", "train", 1)[:1]
with EnvPool("scienceworld", 1, workers=0, max_steps=50) as pool:
    (path,) = play_gold(pool, panel, "scienceworld")
print(path.description)
for t, turn in enumerate(path.turns):
    print(f"{t + 1:>3}  {turn.action:32} -> {path.obs_after(t).splitlines()[0]:60} {turn.reward:+.2f}")

# %% [markdown]
# ## 2. The same path as subtasks
# Rules (`scienceworld_rules.py`) split it: a subtask is an *option*, K actions under one sentence, with a
# note of progress after each. That note is all the executor remembers: its prompt does not grow with the
# episode.

# %%
episode, judge = annotate.annotate(path), annotate.rules("scienceworld").judge
for segment in episode.segments:
    print(f"\n{segment.subtask}")
    for turn in episode.turns[segment.start : segment.end]:
        print(f"    {turn.progress:50} | {turn.action}")
    print(f"    {segment.final_progress:50} | handed to the planner")
    assert judge(segment.subtask, episode.obs_after(segment.end - 1)), "the judge agrees"

# %% [markdown]
# ## 3. Decisions of three levels
# The planner decides once per subtask and earns what the world paid in it; the executor and the progress
# policy decide once per action. `terminated` does not bootstrap, `truncated` does. A return is reward +
# gamma x the return that follows.

# %%
decisions = transitions(episode)
set_returns(decisions, gamma=0.99, discount="subtask")
for d in decisions:
    print(
        f"{d.level:9} turn {d.turn + 1:>2}  reward {d.reward:+.2f}  return {d.mc_return:.3f} {d.completion}"
    )
planner = [d for d in decisions if d.level == "planner"]
for now, following in pairwise(planner):
    assert abs(now.mc_return - (now.reward + 0.99 * following.mc_return)) < 1e-9

# %% [markdown]
# ## 4. Tokens and masks
# What stands in [[ ]] (green in a terminal) carries loss: the answer and its EOS, nothing of the prompt.

# %%
lm, tokenizer = load_backbone(str(ROOT / "base" / "held_out"))
print(show.described(decisions[1], tokenizer))

# %% [markdown]
# ## 5. log pi, the number that everything is made of
# `logprob.py` computes it without the logits of the whole vocabulary at all tokens. The plain way gives
# the same.

# %%
batch = collate(decisions[:4], tokenizer)
with torch.no_grad():
    hidden = hidden_states(lm, batch.input_ids, batch.level, "fp32")
    weight, bias = head_weight(lm.get_output_embeddings(), lm.config)
    ours = sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)[1]
    logp = (hidden @ weight.T).log_softmax(-1)[:, :-1]
    plain = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    plain = torch.where(batch.action_mask[:, 1:], plain, 0.0).sum(1)
print("log pi of four answers:", ours.tolist())
torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)

# %% [markdown]
# ## 6. Imitation (SFT)
# Experts of ten task types of biology, "find an animal" not among them; the backbone `base/held_out` has
# not read of it either. What is near to it is there: who was asked for a living thing has brought animals
# to a box. Besides gold paths: the same with failed tries in them, and exploration of other task types,
# whose subtasks the executor practises. `--rename` shows half of the decisions with other names of
# things, so that names are read and not known by heart.

# %%
FAMILY = "--panel find-animal-family"
few = "--limit 1" if SHORT else ""
script(f"collect.py --source gold {FAMILY} {few} --out {OUT}/gold.jsonl", "gold.jsonl")
script(
    f"collect.py --source stumble {FAMILY} {few} --gold {OUT}/gold.jsonl --out {OUT}/stumbles.jsonl",
    "stumbles.jsonl",
)
script(
    f"collect.py --source practice --panel without --limit {1 if SHORT else 30} "
    f"--max-steps {5 if SHORT else 40} --out {OUT}/practice.jsonl",
    "practice.jsonl",
)
script(
    f"train_sft.py --model base/held_out --data {OUT}/gold.jsonl --practice {OUT}/practice.jsonl "
    f"{OUT}/stumbles.jsonl --rank 0 --lr 1e-3 --rename 0.5 --epochs {0.1 if SHORT else 1} --out {OUT}/sft",
    "sft/policy.json",
)


def metric(folder: str, name: str) -> tuple[list[int], list[float]]:
    rows = [line.split(",") for line in (OUT / folder / "metrics.csv").read_text().splitlines()]
    found = [(int(step), float(value)) for step, key, value in rows[1:] if key == name]
    return [step for step, _ in found], [value for _, value in found]


# %% [markdown]
# ## 7. Own experience
# The policy goes for an animal, once in each train variation; the executor is sampled at temperature 1, the
# planner at 0.7. It does not know what counts as one, nor that a wrong "focus on" ends the episode at -100
# (no expert ever made one): most are lost.

# %%
script(
    f"collect.py --source policy --checkpoint {OUT}/sft --panel find-animal "
    f"--limit {4 if SHORT else 150} --max-steps {8 if SHORT else 50} --out {OUT}/rollouts.jsonl",
    "rollouts.jsonl",
)
rollouts = read_episodes(OUT / "rollouts.jsonl")
scores = [max(0.0, e.score) for e in rollouts]
above, solved = sum(score > 0 for score in scores), sum(score == 100 for score in scores)
print(f"of {len(rollouts)} episodes {above} above 0, {solved} solved")

# %% [markdown]
# ## 8. What a critic learns
# V moves towards the *upper* part of Q: the expectile loss weighs positive errors more (IQL, eq. 5). With
# 0.5 it is the mean; towards 1 it is the best action seen. Here on a bag of returns (a 0 and a 1 added, so
# that they are never all alike), by plain gradient descent.

# %%
returns = torch.tensor([score / 100 for score in scores] + [0.0, 1.0])
best = {}
for expectile in (0.5, 0.7, 0.9):
    value = torch.zeros((), requires_grad=True)
    descent = torch.optim.SGD([value], lr=0.3)
    for _ in range(300):
        descent.zero_grad()
        critic.expectile_loss(returns - value, expectile).backward()
        descent.step()
    best[expectile] = value.item()
print("mean return", returns.mean().item(), "V by expectile:", best)
assert abs(best[0.5] - returns.mean().item()) < 1e-3 and best[0.5] < best[0.7] < best[0.9]

# %% [markdown]
# ## 9. Offline RL
# Q and V are fitted to experts and rollouts, and log pi of every answer is weighted by exp(A /
# temperature): `learner.py` is one such step on one screen. Here A = return - V, what followed against
# what was expected. GLIDER takes Q - V (`--rl.advantage q`, the default): docs/gallery.md shows what that
# Q forgets where good answers are rare. Of the other flags, `--credit.limit end`: who runs into the step
# limit earns nothing more, so a loop does not pay; `--rl.expectile 0.5 --rl.gamma 0.95`: V is the plain
# mean of what the near future brings; a low temperature: few decisions here are good, they shall count.

# %%
script(
    f"train_orl.py --init {OUT}/sft --expert {OUT}/gold.jsonl --rollouts {OUT}/rollouts.jsonl "
    f"--out {OUT}/orl --credit.limit end --rl.advantage return --rl.temperature 0.05 --rl.expectile 0.5 "
    f"--rl.gamma 0.95 --rl.actor-lr 5e-4 --rl.critic-lr 1e-3 "
    f"--steps {4 if SHORT else 230} --warmup-steps {2 if SHORT else 80}",
    "orl/policy.json",
)
figure = Figure(figsize=(9, 3), layout="constrained")
charts = {"v_loss": "V's loss", "mc_rank_corr": "does Q order returns?", "ess_share": "share behind a step"}
for axes, (name, what) in zip(figure.subplots(1, 3), charts.items(), strict=True):
    for level in ("planner", "executor"):
        axes.plot(*metric("orl", f"{level}/{name}"), label=level, lw=1)
    axes.set_title(what, fontsize=9)
axes.legend(fontsize=8)
save(figure, "offline_rl")

# %% [markdown]
# ## 10. Did it pay?
# Both agents look for animals in the same 25 dev variations, greedily; the difference is taken one by
# one. Look at the interval before you believe the mean; and one seed is one seed.

# %%
for name in ("sft", "orl"):
    limit, steps = (2, 8) if SHORT else (25, 50)
    script(
        f"eval.py --checkpoint {OUT}/{name} --panel find-animal --split dev "
        f"--limit {limit} --max-steps {steps} --out {OUT} --name {name}",
        f"results/{name}.json",
    )
sft, orl = (json.loads((OUT / "results" / f"{name}.json").read_text()) for name in ("sft", "orl"))
gain = torch.tensor(orl["scores"]).clamp_min(0.0) - torch.tensor(sft["scores"]).clamp_min(0.0)
draws = torch.randint(len(gain), (2000, len(gain)), generator=torch.Generator().manual_seed(0))
low, high = gain[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
print(f"SFT {sft['macro_mean']}, ORL {orl['macro_mean']}; gain {gain.mean():.1f} [{low:.1f}, {high:.1f}]")
figure = Figure(figsize=(4, 3), layout="constrained")
axes = figure.add_subplot()
for place, row in enumerate((sft, orl)):
    mean, (low, high) = row["macro_mean"], row["ci95"]
    axes.errorbar(place, mean, [[mean - low], [high - mean]], fmt="o", capsize=5)
axes.set_xticks([0, 1], ["SFT", "offline RL"])
axes.set_ylabel("score, find-animal")
save(figure, "gain")

# %% [markdown]
# ## 11. HiPER's advantages by hand
# Three turns, one subgoal for all of them, reward 1 at the end. With lambda 1 and values of 0 every
# advantage is the discounted return: the hierarchy changes what a decision is compared with, not what was
# earned.

# %%
zeros = torch.zeros(3)
low, high = critic.hierarchical_gae(
    reward=torch.tensor([0.0, 0.0, 1.0]), switch=torch.tensor([True, False, False]),
    v_low=zeros, v_high=zeros, gamma=0.9, lam=1.0, lam_segment=1.0,
)  # fmt: skip
print("of each action:", low.tolist(), "of the subgoal:", high[0].item())
torch.testing.assert_close(low, torch.tensor([0.81, 0.9, 1.0]))
torch.testing.assert_close(high[0], torch.tensor(0.81))

# %% [markdown]
# ## Where to go on
# `python eval.py --checkpoint out/tour/orl --panel find-animal --watch` plays one episode before your
# eyes; `recipes/o2o.sh find-animal 3 glider` does it online (seeds 0 to 2 are kept in results/online/);
# `python plot.py --run out/tour` makes the report of this tour; `exercises/` has ten functions to write
# and silent bugs to find; docs/gallery.md shows what collapsed here, and how it looked.
