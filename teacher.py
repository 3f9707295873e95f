"""A teacher: a chat model that splits episodes, writes progress and judges completion, in place of the rules.

GLIDER (arXiv:2505.19761) and STEP-HRL (arXiv:2604.05808, sec. 4) annotate so. The answers must pass the
checks of labels.py. What this file does not do: start a server.
"""

import json
import os
import urllib.request
from dataclasses import dataclass

from annotate import Group, fill_in, rules
from data import Episode
from labels import check
from prompts import compact, split_obs

SPLIT_PROMPT = """An expert solved a task in a text world. Divide its actions, in order, into subtasks.
Task: {description}
First observation: {obs}
Actions, each with the answer of the world:
{steps}

Answer with a JSON list only: [{{"subtask": "...", "actions": 3}}, ...]. Each takes 1 to {cap} actions,
together {count}.
Name only things that the task or an earlier observation mentions. Use these forms, which can be verified:
{forms}. {complaint}"""
PROGRESS_PROMPT = """You keep the notes of an agent at work on one subtask. Rewrite them after its latest
action, in one or two short sentences of at most 25 words: what is done, and any reading or result. Mention
nothing that is not written here, and no plans.
Subtask: {subtask}
Notes so far: {previous}
Action: {action}
Answer of the world: {feedback}
Notes:"""

JUDGE_PROMPT = """An agent in a text world works on a subtask. Does the answer of the world to its last action
show that the subtask is complete? Answer with one word, True or False.
Subtask: {subtask}
Answer of the world: {feedback}
Room: {room}
Inventory: {inventory}
Complete:"""


def parse_groups(answer: str, count: int) -> list[Group]:
    """The subtask groups of an answer to SPLIT_PROMPT; ValueError when it is not of the form asked for."""
    groups = []
    try:
        for part in json.loads(answer[answer.index("[") : answer.rindex("]") + 1]):
            start = groups[-1][2] if groups else 0
            groups.append((str(part["subtask"]), start, start + int(part["actions"])))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"not the JSON list asked for ({error}): {answer[:80]!r}") from None
    if not groups or groups[-1][2] != count or any(start >= end for _, start, end in groups):
        ends = [end for _, _, end in groups]
        raise ValueError(f"groups that end at {ends}: they must take all {count} actions")
    return groups


@dataclass(frozen=True)
class ChatTeacher:
    """Any server with an OpenAI-compatible /chat/completions; labels that fail `check` raise ValueError."""

    url: str  # e.g. http://localhost:8000/v1
    model: str
    timeout: float = 60.0  # seconds per request
    attempts: int = 3  # per request, and per episode

    def ask(self, prompt: str) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for _ in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)["choices"][0]["message"]["content"].strip()
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as caught:
                error = caught
        remedy = "start the server, or correct url, model or OPENAI_API_KEY"
        raise ConnectionError(f"no answer from {url} ({error}): {remedy}")

    def split(self, episode: Episode, problem: str = "") -> list[Group]:
        """annotate.split by the model; `problem` says why its last answer was refused."""
        steps = [f"{t.action} -> {split_obs(episode.obs_after(i))[0]}" for i, t in enumerate(episode.turns)]
        prompt = SPLIT_PROMPT.format(
            description=episode.description,
            obs=compact(episode.turns[0].obs),
            steps="\n".join(steps),
            cap=rules(episode.env).MAX_ACTIONS,
            count=len(steps),
            forms=rules(episode.env).FORMS,
            complaint=problem and f"Your last answer was refused: {problem}",
        )
        return parse_groups(self.ask(prompt), len(steps))

    def progress_text(self, subtask: str, previous: str, action: str, feedback: str) -> str:
        """annotate.progress_text by the model, from the same inputs."""
        inputs = dict(subtask=subtask, previous=previous, action=action, feedback=feedback)
        return self.ask(PROGRESS_PROMPT.format(**inputs))

    def judge(self, subtask: str, obs: str) -> bool:
        """annotate.judge by the model; ValueError when it says neither True nor False."""
        feedback, room, inventory = split_obs(obs)
        answer = self.ask(
            JUDGE_PROMPT.format(subtask=subtask, feedback=feedback, room=room, inventory=inventory)
        )
        word = answer.strip(" .*").lower()
        if word not in ("true", "false"):
            raise ValueError(f"{self.model} said {answer[:80]!r}, expected True or False: use another model")
        return word == "true"

    def annotate(self, episode: Episode) -> Episode:
        """Split and progress together, asked again with the first problem until they pass `check`."""
        problem = ""
        for _ in range(self.attempts):
            try:
                new = fill_in(episode, self.split(episode, problem), self.progress_text)
                problem = (check(new, by_rules=False) or [""])[0]
            except ValueError as error:
                problem = str(error)
            if not problem:
                return new
        failed = f"{self.model} gave no valid labels for {episode.id} in {self.attempts} attempts"
        raise ValueError(f"{failed}: {problem}")
