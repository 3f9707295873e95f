"""Labels: can they be learned, and are they honest?

The planner and the executor learn from annotated episodes (GLIDER, arXiv:2505.19761; STEP-HRL,
arXiv:2604.05808). A label must follow from what its level sees: it names nothing unseen, it does not look
ahead, and the same prompt rarely has two answers. What this file does not do: annotate, or repair.

    python labels.py FILE...      a row per task type; the exit code is 1 when there are problems
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from typing import Literal

from annotate import annotate, rules
from data import Episode, read_episodes
from prompts import NO_PROGRESS, compact, split_obs


# --- honest: every label follows from what its level sees -------------------------------------------------
def check(episode: Episode, by_rules: bool = True) -> list[str]:
    """All problems of one annotated episode. by_rules=False: progress need only pass the name test."""
    problems, covered, cap = [], 0, rules(episode.env).MAX_ACTIONS
    for s, segment in enumerate(episode.segments):
        where, start, end = f"{episode.id} segment {s} {segment.subtask!r}", segment.start, segment.end
        if start != covered or not 1 <= end - start <= cap or end > len(episode.turns):
            wrong = f"turns {start}-{end} do not follow turn {covered} with 1 to {cap} actions"
            return [*problems, f"{where}: {wrong}"]
        problems += [f"{where}: {problem}" for problem in _segment_problems(episode, s, by_rules)]
        covered = end
    if covered != len(episode.turns):
        problems.append(f"{episode.id}: the segments cover {covered} of {len(episode.turns)} turns")
    return problems


def _segment_problems(episode: Episode, s: int, by_rules: bool) -> Iterator[str]:
    segment, earlier, later = episode.segments[s], episode.segments[:s], episode.segments[s + 1 :]
    name, last, world = segment.subtask, segment.end - 1, rules(episode.env)
    handed_over = earlier[-1].final_progress if earlier else NO_PROGRESS
    seen = [episode.description, handed_over, episode.turns[segment.start].obs, world.COMMON_NAMES]
    if unknown := world.unknown_names(name, *seen, *(done.subtask for done in earlier)):
        yield f"the planner has not seen {unknown}"
    progress = NO_PROGRESS
    for i, turn in enumerate(episode.turns[segment.start : segment.end], segment.start):
        verdict = world.judge(name, episode.obs_after(i))
        labels = (name, progress, i == last, verdict)
        if (turn.subtask, turn.progress, turn.claimed_done, turn.verified_done) != labels:
            yield f"turn {i} does not carry its subtask, progress, claim and verdict {labels}"
        feedback = split_obs(episode.obs_after(i))[0]
        text = segment.final_progress if i == last else episode.turns[i + 1].progress
        if by_rules and text != world.progress_text(name, progress, turn.action, feedback):
            yield f"progress after turn {i} is {text!r}, not progress_text of its inputs"
        if unknown := world.unknown_names(text, name, progress, turn.action, feedback):
            yield f"progress after turn {i} names {unknown}, which are not in its inputs"
        if verdict and i != last:
            yield f"complete already after turn {i}"
        progress = text
    cut = not later or later[0].subtask == name  # by the end of the episode, or by the cap
    if not verdict and not cut and name != "try another action":
        yield f"not complete at its end: {feedback!r}"


def leaks(episodes: list[Episode]) -> list[str]:
    """Where one past (task, observations, actions, subtasks) has two texts of progress: a look ahead."""
    first, problems = {}, []
    for episode in episodes:
        past = episode.description
        for i, turn in enumerate(episode.turns):
            past = hash((past, turn.obs, turn.subtask))
            known = first.setdefault(past, turn.progress)
            if known != turn.progress:
                problems.append(f"{episode.id} turn {i}: {turn.progress!r} and {known!r} after the same past")
            past = hash((past, turn.action))
    return problems


# --- learnable: the same prompt has the same answer -------------------------------------------------------
Level = Literal["executor", "planner"]


def decisions(episode: Episode, level: Level) -> Iterator[tuple[Hashable, str]]:
    """(what the level sees, its answer), decision by decision."""
    if level == "executor":
        for turn in episode.turns:
            yield (turn.subtask, turn.progress, compact(turn.obs)), turn.action
        return
    finished, progress = (), NO_PROGRESS
    for segment in episode.segments:
        obs = compact(episode.turns[segment.start].obs)
        yield (episode.description, finished, progress, obs), segment.subtask
        finished, progress = (*finished, segment.subtask), segment.final_progress


def ambiguity(episodes: list[Episode], level: Level) -> float:
    """Share of answers unlike the majority's to the same prompt: what no executor (or planner) can learn."""
    answers = defaultdict(Counter)
    for episode in episodes:
        for prompt, answer in decisions(episode, level):
            answers[prompt][answer] += 1
    return 1 - sum(max(c.values()) for c in answers.values()) / sum(c.total() for c in answers.values())


# --- command line -----------------------------------------------------------------------------------------
TITLES = ("episodes", "problems", "name words", "subtasks", "note words", "judged", "executor", "planner")


def mean_and_max(texts: list[str]) -> str:
    lengths = [len(text.split()) for text in texts]
    return f"{sum(lengths) / len(lengths):.1f}/{max(lengths)}"


def report(episodes: list[Episode]) -> int:
    """Prints a row per task type (mean/max words, ambiguities); returns the number of problems."""
    print(f"{'task':48}" + "".join(f"{title:>11}" for title in TITLES))
    for task in [*sorted({e.task for e in episodes}), "all"]:
        group = [e for e in episodes if task in (e.task, "all")]
        problems = [problem for e in group for problem in check(e)] + leaks(group)
        subtasks = [s.subtask for e in group for s in e.segments]
        judged = sum(e.turns[s.end - 1].verified_done for e in group for s in e.segments) / len(subtasks)
        row = [str(len(group)), str(len(problems))]
        row += [mean_and_max(subtasks), f"{len(subtasks) / len(group):.1f}"]
        row += [mean_and_max([turn.progress for e in group for turn in e.turns])]
        row += [f"{x:.2%}" for x in (judged, ambiguity(group, "executor"), ambiguity(group, "planner"))]
        print(f"{task:48}" + "".join(f"{cell:>11}" for cell in row))
        for problem in problems[:3] if task != "all" else []:
            print(f"  {problem}", file=sys.stderr)
    return len(problems)


def main() -> None:
    text = "Annotate episodes by rules and report how good the labels are."
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("files", nargs="+", help="episodes as JSONL, raw or annotated")
    files = parser.parse_args().files
    sys.exit(bool(report([annotate(episode) for file in files for episode in read_episodes(file)])))


if __name__ == "__main__":
    main()
