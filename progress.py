"""What a decision is conditioned on: STEP-HRL's local progress, or what it is compared with.

history="progress"  p_t, a short text that pi^p rewrites after every action, so a prompt has constant size
                    (arXiv:2604.05808, sec. 3.2)
history="full"      all that happened: GLIDER's growing history, without a progress policy (arXiv:2505.19761,
                    sec. 3.2)
history="window"    the last WINDOW steps of the full history

The same functions serve training (a finished episode) and acting (an episode so far): they read only turns
before `t`.
"""

from typing import Literal

import prompts

History = Literal["progress", "full", "window"]
WINDOW = 4


def _steps(turns, start: int, end: int) -> list[str]:
    """'feedback > action' lines of turns[start:end]; a turn's own feedback precedes its action."""
    return [f"{prompts.split_obs(turn.obs)[0]} > {turn.action}" for turn in turns[start:end]]


def planner_prompt(episode, start: int, obs: str, history: History = "progress") -> str:
    """State of g_k ~ pi^h(. | task, memory, obs) at turn `start`  (STEP-HRL sec. 3; GLIDER sec. 3.2).

    episode: data.Episode. obs: what the planner sees there.
    """
    finished = [s for s in episode.segments if s.end <= start]
    if history == "progress":
        names = "; ".join(s.subtask for s in finished) or "none"
        memory = (
            f"Progress: {finished[-1].final_progress if finished else prompts.NO_PROGRESS}\nFinished: {names}"
        )
    else:
        lines = [
            f"{s.subtask}: {', '.join(t.action for t in episode.turns[s.start : s.end])}. "
            f"{_feedback(episode, s.end, obs, start)}"
            for s in finished
        ]
        memory = "History: " + ("\n".join(lines[-WINDOW:] if history == "window" else lines) or "none")
    return prompts.planner(episode.description, memory, obs)


def _feedback(episode, turn: int, obs: str, start: int) -> str:
    """Feedback seen at `turn`; at the current turn it is in `obs`."""
    return prompts.split_obs(obs if turn >= start else episode.turns[turn].obs)[0]


def executor_prompt(
    episode, start: int, t: int, subtask: str, progress: str, obs: str, history: History = "progress"
) -> str:
    """State of a_t ~ pi^l(. | subtask, memory, obs) at turn `t` of a subtask begun at `start`  (the same)."""
    if history == "progress":
        memory = f"Progress: {progress}"
    else:
        first = max(start, t - WINDOW) if history == "window" else start
        memory = "History: " + ("\n".join(_steps(episode.turns, first, t)) or "none")
    return prompts.executor(subtask, memory, obs)


def progress_prompt(subtask: str, previous: str, action: str, next_obs: str) -> str:
    """State of p_{t+1} ~ pi^p(. | subtask, p_t, a_t, feedback), next_obs raw  (STEP-HRL sec. 3.2)."""
    return prompts.progress(subtask, previous, action, next_obs.split(prompts.SEPARATOR)[0])
