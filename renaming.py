"""Names of things, and the same text under other names: what a thing is called should not matter.

A small model learns the names that it is shown by heart. Shown under other names too, a text can only be
continued by copying them from what was read (`base/pretrain.py`, `train_sft.py --rename`).
"""

import random
import re
from dataclasses import replace

import prompts
from data import Episode, Transition
from scripted import visible_names

NUMBERED = r"([a-z]+) (\d+)"  # ALFWorld's names


def visible(episode: Episode) -> list[str]:
    """Names of all things seen in an episode, without the letter of "unknown substance B"; not rooms."""
    parts = [prompts.split_obs(turn.obs) for turn in episode.turns]
    if any(room.startswith("room: ") for _, room, _ in parts):
        return sorted({kind for part in parts for text in part for kind, _ in re.findall(NUMBERED, text)})
    names = {re.sub(" [A-Z]$", "", name) for _, room, _ in parts for name in visible_names(room)}
    return sorted(names - set(rooms(episode)))


def things(episode: Episode) -> list[str]:
    """Names that can be others: of what was seen, but no verb of a subtask ("water flower pot 3")."""
    verbs = {s.subtask.split()[0] for s in episode.segments}
    return [name for name in visible(episode) if name not in verbs]


def rooms(episode: Episode) -> list[str]:
    """Names of the rooms that were entered; none in ALFWorld, whose games have one."""
    parts = [prompts.split_obs(turn.obs)[1].partition(":")[0] for turn in episode.turns]
    return sorted({room for room in parts if room} - {"room"})


def vocabulary(tokenizer) -> list[str]:
    """Words for new names, in plain letters: the tokenizer's, and three put together for each of its parts.

    A policy that was shown whole words alone completes any other to one it knows: "plastic" to "produce".
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    starts = sorted({p[1:] for p in pieces if re.fullmatch("[Ġ▁][a-z]+", p)})
    parts = sorted({p for p in pieces if re.fullmatch("[a-z]+", p)})
    rng = random.Random(0)
    made = [rng.choice(starts) + part + rng.choice(["", rng.choice(parts)]) for part in parts * 3]
    return [word for word in starts if len(word) > 2] + made


def new_names(names: list[str], words: list[str], rng: random.Random) -> dict[str, str]:
    """About half of `names` -> another name each, of one or two real `words` or invented ones."""
    new = {}
    for name in names:
        if rng.random() < 0.5:
            invented = "".join(
                rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))
            )
            new[name] = " ".join(
                rng.choice([invented, *rng.sample(words, 2)]) for _ in range(rng.randint(1, 2))
            )
    return new


def rename(text: str, new: dict[str, str]) -> str:
    """`text` with the names of `new` replaced wherever they stand as whole words.

    The letter of an "unknown substance B" goes with the name, since the actions of an expert leave it out.
    """
    if not new:
        return text
    pattern = "|".join(re.escape(name) for name in sorted(new, key=len, reverse=True))
    return re.sub(rf"\b({pattern})\b(?: [A-Z]\b)?", lambda match: new[match[1]], text)


def renamed(t: Transition, names: list[str], words: list[str], rng: random.Random) -> Transition:
    """The decision under other names of things. What its prompt does not name keeps its name.

    As it is where the answer has an old name in short ("buzzer" for an electric buzzer, now a "lamp").
    """
    new = new_names([name for name in names if re.search(rf"\b{re.escape(name)}\b", t.prompt)], words, rng)
    prompt, completion = rename(t.prompt, new), rename(t.completion, new)
    before, after, said = (set(re.findall("[a-z]+", text)) for text in (t.prompt, prompt, completion))
    if said & (before - after):
        return t
    follows = t.follows and replace(t.follows, completion=rename(t.follows.completion, new))
    then = {"next_prompt": rename(t.next_prompt, new), "follows": follows}
    return replace(t, prompt=prompt, completion=completion, **then)


class OtherNames:
    """Shows decisions under other names, each with `probability`; what a policy sampled stays as it is.

    For the planner rooms have other names too: where all of a family's things are in the workshop, it would
    go there without reading the task. To the executor the map of the house is knowledge.
    """

    def __init__(self, episodes: list[Episode], tokenizer, probability: float):
        self.probability = probability
        self.names = {e.id: (things(e), rooms(e)) for e in episodes} if probability else {}
        self.words = vocabulary(tokenizer) if probability else []

    def __call__(self, decisions: list[Transition], seed: str) -> list[Transition]:
        """The decisions, some of them under other names; `seed` alone draws which and what."""
        rng = random.Random(seed)
        shown = []
        for t in decisions:
            if not t.completion_ids and t.episode_id in self.names and rng.random() < self.probability:
                kinds, places = self.names[t.episode_id]
                t = renamed(t, kinds + (places if t.level == "planner" else []), self.words, rng)
            shown.append(t)
        return shown
