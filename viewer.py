"""The episode viewer of the report page: subtasks, progress, actions, and what the world answered, as HTML.

What this file does not do: choose by score, or style anything (plot.html).
"""

from collections import defaultdict
from html import escape
from pathlib import Path

import prompts
from completion import ended_by
from data import Episode, Segment, read_episodes


def pick(episodes: list[Episode], count: int) -> list[Episode]:
    """The first variation of every task, then the second ...: the same for all agents, blind to the score."""
    by_task = defaultdict(list)
    for episode in sorted(episodes, key=lambda e: e.variation):
        by_task[episode.task].append(episode)
    ranked = [(rank, task, e) for task, group in by_task.items() for rank, e in enumerate(group)]
    return [e for _, _, e in sorted(ranked, key=lambda item: item[:2])[:count]]


def tag(text: str, kind: str = "") -> str:
    return f' <span class="tag {kind}">{escape(text)}</span>'


ENDINGS = {"claim": "claimed done", "judge": "judged done", "cap": "cap on actions", "limit": "step limit"}


def ending(episode: Episode, segment: Segment, ends: str = "claim") -> str:
    """How a subtask ended, given what could end it (hierarchy.Ends), and whether the judge agreed."""
    how = ended_by(episode, segment, ends)
    if how == "world":
        text = tag("world: solved", "good") if episode.success else tag("world: ended", "bad")
    else:
        text = tag(ENDINGS[how], "bad" if how == "limit" else "")
    verified = episode.turns[segment.end - 1].verified_done
    return text + (tag("verified", "good") if verified else tag("not verified"))


def q_tag(episode: Episode, level: str, t: int) -> str:
    """Q of what this level decided at turn t, where eval.py noted it."""
    values = [d.value for d in episode.decisions if (d.level, d.turn) == (level, t) and d.value is not None]
    return "".join(tag(f"Q {value:+.2f}") for value in values)


def turn_item(episode: Episode, t: int) -> str:
    turn, feedback = episode.turns[t], prompts.split_obs(episode.obs_after(t))[0]
    tags = tag(f"reward {turn.reward:+.2f}", "good" if turn.reward > 0 else "bad") if turn.reward else ""
    tags += q_tag(episode, "executor", t)
    tags += tag("says done") if turn.claimed_done else ""
    tags += tag("verified done", "good") if turn.verified_done else ""
    if turn.raw_text and not prompts.parse_executor(turn.raw_text)[2]:
        tags += tag("not parsed", "bad")
    progress = f'<div class="progress">{escape(turn.progress)}</div>' if turn.progress else ""
    return f"<li>{progress}<code>{escape(turn.action)}</code>{tags}<div>{escape(feedback)}</div>"


def segment_card(episode: Episode, index: int, segment: Segment, ends: str) -> str:
    seen = escape(prompts.render(episode.turns[segment.start].obs))
    items = "".join(turn_item(episode, t) for t in range(segment.start, segment.end))
    tags = q_tag(episode, "planner", segment.start) + ending(episode, segment, ends)
    return f"""<section class="card">
<h4><small>subtask {index}</small> {escape(segment.subtask)}{tags}</h4>
<details><summary>what the planner saw</summary>{seen}</details>
<ol start="{segment.start + 1}">{items}</ol>
<p class="handed"><small>final progress</small> {escape(segment.final_progress)}</p>
</section>"""


def article(e: Episode, agent: str, links: list[str], ends: str = "claim") -> str:
    """One episode; `links` lead to the same episode played by other agents."""
    cards = [segment_card(e, i, s, ends) for i, s in enumerate(e.segments, start=1)]
    if not cards:  # an agent without a planner
        cards = ['<ol class="card">', *(turn_item(e, t) for t in range(len(e.turns))), "</ol>"]
    facts = f"{'solved' if e.success else 'not solved'}, {len(e.turns)} steps, {len(e.segments)} subtasks"
    return f"""<h3>{escape(e.task)} {e.variation} by {escape(agent)}</h3>
<p><b>Final score {e.score:.0f}</b>, {facts}</p>
<p>{escape(e.description)}</p>
<p>{"Same episode by: " if links else ""}{", ".join(links)}</p>
{"".join(cards)}"""


def viewer(folder: Path, results: list[dict], count: int) -> tuple[str, str]:
    """Options of the select box by agent, and an article per episode; the last agent is shown first."""
    names = {r["file"]: r["agent"] for r in results}  # in the order of the result table
    ends = {r["agent"]: r.get("subtasks", {}).get("ends", "claim") for r in results}
    files = [stem for stem in names if (folder / f"{stem}.jsonl").exists()]
    files += sorted(path.stem for path in folder.glob("*.jsonl") if path.stem not in names)
    shown = []  # (key, agent, episode)
    for a, stem in enumerate(files):
        chosen = pick(read_episodes(folder / f"{stem}.jsonl"), count)
        shown += [(f"ep-{a}-{k}", names.get(stem, stem), e) for k, e in enumerate(chosen)]
    options, same, start = defaultdict(str), defaultdict(list), f"ep-{len(files) - 1}-0"
    for key, agent, e in shown:
        selected = " selected" if key == start else ""
        text = f"{escape(e.task)} {e.variation}, score {e.score:.0f}"
        options[agent] += f'<option value="{key}"{selected}>{text}</option>'
        same[e.task, e.variation].append((key, f'<a href="#{key}">{escape(agent)}, score {e.score:.0f}</a>'))
    groups = [f'<optgroup label="{escape(agent)}">{text}</optgroup>' for agent, text in options.items()]
    articles = []
    for key, agent, e in shown:
        links = [link for other, link in same[e.task, e.variation] if other != key]
        hidden = "" if key == start else " hidden"
        articles.append(
            f'<article id="{key}"{hidden}>{article(e, agent, links, ends.get(agent, "claim"))}</article>'
        )
    return "".join(groups) or "<option>no episodes in this folder</option>", "".join(articles)
