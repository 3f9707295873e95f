"""One episode in the terminal while it is played: subtasks, actions, progress, rewards, values.

What this file does not do: keep the episode (eval.py without --watch does), or show many (plot.py).
"""

import shutil
import sys
import textwrap

import prompts
from acting import Answer
from completion import ended_by
from hierarchy import Counts, Player

COLOURS = {"subtask": "1;33", "action": "1;36", "progress": "32", "good": "1;32", "bad": "31", "soft": "2"}


def paint(text: str, colour: str) -> str:
    """`text` in a colour of COLOURS where the output is a terminal, else as it is."""
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if sys.stdout.isatty() else text


def say(text: str, colour: str = "", indent: int = 0, note: str = "") -> None:
    """Prints `text` wrapped to the terminal (at most 100 columns), `note` after its last line or below it."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(text, width - indent, break_on_hyphens=False) or [""]
    gap = width - indent - len(lines[-1]) - len(note)
    pad = " " * indent
    painted = [pad + (paint(line, colour) if colour else line) for line in lines]
    if note and gap >= 2:
        painted[-1] += " " * gap + paint(note, "soft")
    elif note:
        painted.append(" " * (width - len(note)) + paint(note, "soft"))
    print("\n".join(painted), flush=True)


class Watched(Player):
    """A player that prints what happens. value(request, answer): Q of a decision, None without critics."""

    def __init__(self, *usual, value=None):
        super().__init__(*usual)
        self.value, self.asked, self.expects = value, None, ""
        say(f"{self.episode.task} {self.episode.variation}", "subtask")
        say(self.episode.description)

    def request(self):
        """As Player; the prompt is kept, for its value."""
        self.asked = super().request()
        return self.asked

    def receive(self, answer: Answer, counts: Counts) -> str | None:
        """As Player; prints subtask and progress."""
        role = self.waits_for
        note = f"Q {self.value(self.asked, answer):+.2f}" if self.value else ""
        if role == "planner":
            print()
            say(f"subtask {len(self.episode.segments) + 1}: {answer.text.strip()}", "subtask", note=note)
        elif role == "executor":
            self.expects = note
        else:
            say(f"progress: {answer.text.strip()}", "progress", 6, note)
        return super().receive(answer, counts)

    def stepped(self, result, counts: Counts) -> None:
        """As Player; prints the action and what the world answered."""
        say(f"{len(self.episode.turns) + 1:>3}   {self.pending[1]}", "action", note=self.expects)
        say(prompts.split_obs(result.obs)[0], indent=6)
        if result.reward:
            say(f"reward {result.reward:+.2f}", "good" if result.reward > 0 else "bad", 6)
        super().stepped(result, counts)

    def _after_progress(self) -> None:
        before = len(self.episode.segments)
        super()._after_progress()
        if len(self.episode.segments) > before:
            how = ended_by(self.episode, self.episode.segments[-1], self.ends)
            verified = self.episode.turns[-1].verified_done
            say(f"ended by: {how}; the judge says {'done' if verified else 'not done'}", "soft", 6)
        if self.over:
            word = "solved" if self.now.success else "not solved"
            print()
            text = f"{word}: score {self.now.score:.0f} after {len(self.episode.turns)} steps"
            say(text, "good" if self.now.success else "bad")
