"""What a model is trained on, decision by decision: decoded tokens with their mask, reward and end.

    python data.py --show out/demo/gold.jsonl
    python data.py --show out/demo/rollouts.jsonl --episode 3 --level planner

Read from the collated batch, not from the text: what is green is what a loss sees, its EOS included.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import annotate
from batches import collate
from data import Transition, read_episodes, set_returns, transitions
from model import PromptFormat, load_backbone


@dataclass(frozen=True)
class Config:
    show: Path  # episodes (JSONL)
    episode: int = 1  # which one, from 1
    level: Literal["all", "planner", "executor", "progress"] = "all"  # decisions of this level only
    count: int = 6  # at most this many decisions
    history: Literal["progress", "full", "window"] = "progress"  # what a decision is conditioned on
    flat: bool = False  # no planner
    gamma: float = 0.99  # discount of the returns that are shown
    model: str = "base"  # whose tokenizer
    prompt: PromptFormat = "raw"  # chat: in its chat template


def marked(pieces: list[str], kinds: list[int]) -> str:
    """The tokens as text, where an answer's (kind 1) are green, or between [[ ]] outside a terminal."""
    colour, text, now = sys.stdout.isatty(), "", 0
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind != now:
            text += ("\033[1;32m" if kind else "\033[0m") if colour else ("[[" if kind else "]]")
        text, now = text + piece, kind
    return text + (("\033[0m" if colour else "]]") if now else "")


def described(t: Transition, tokenizer) -> str:
    """One decision as text: its tokens with their mask, then reward, return and how it ended."""
    batch = collate([t], tokenizer)
    ids = batch.input_ids[0].tolist()
    text = marked([tokenizer.decode([i]) for i in ids], batch.action_mask[0].int().tolist())
    end = "terminated: no bootstrap" if t.terminated else f"V of the next {t.next_level} prompt follows"
    end += ", truncated" if t.truncated else ""
    answers = int(batch.action_mask.sum())
    facts = f"{len(ids)} tokens, {answers} of them in the loss; spans {t.steps} environment steps; {end}"
    facts = f"reward {t.reward:+.2f}, return {t.mc_return:.2f}; {facts}"
    return f"--- {t.level}, turn {t.turn + 1}\n{text}\n{facts}\n"


def main(config: Config) -> None:
    episodes = read_episodes(config.show)
    if not 1 <= config.episode <= len(episodes):
        raise ValueError(f"--episode is {config.episode}: {config.show} holds 1 to {len(episodes)}")
    episode = episodes[config.episode - 1]
    if not episode.segments and not config.flat:
        episode = annotate.annotate(episode)
    found = transitions(annotate.flat(episode) if config.flat else episode, config.history, flat=config.flat)
    set_returns(found, config.gamma, "subtask")
    found = sorted(found, key=lambda t: t.turn)
    shown = [t for t in found if config.level in ("all", t.level)]
    _, tokenizer = load_backbone(config.model, prompt=config.prompt)
    print(f"{episode.id}: {episode.description}\nscore {episode.score:.0f}, {len(episode.turns)} steps\n")
    for t in shown[: config.count]:
        print(described(t, tokenizer))
    print(f"{min(config.count, len(shown))} of {len(shown)} decisions; --count and --level show others")
