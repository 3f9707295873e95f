"""teacher.py: a chat model behind a stub of its endpoint; its labels are taken or refused by the checks."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_annotate import small_episode

from annotate import annotate
from teacher import ChatTeacher

GROUPS = [
    {"subtask": "explore the kitchen", "actions": 3},
    {"subtask": "get the thermometer", "actions": 1},
    {"subtask": "get the metal pot", "actions": 2},
]


@pytest.fixture
def endpoint():
    """serve(groups, note): a stub of /chat/completions; returns its url and the list of requests it gets."""
    servers = []

    def serve(groups: str, note: str) -> tuple[str, list[dict]]:
        requests = []

        class Stub(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(body | {"path": self.path, "key": self.headers["Authorization"]})
                content = groups if "JSON" in body["messages"][0]["content"] else note
                answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Stub)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_good_teacher_is_accepted(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, requests = endpoint(f"Here it is: {json.dumps(GROUPS)}", "That is done.")
    episode = annotate(small_episode(), teacher=ChatTeacher(url, "stub"))
    assert [s.subtask for s in episode.segments] == [g["subtask"] for g in GROUPS]
    assert [t.progress for t in episode.turns] == [
        "None",
        "That is done.",
        "That is done.",
        "None",
        "None",
        "That is done.",
    ]
    assert len(requests) == 1 + 6  # one split, one text per action
    assert {(r["path"], r["key"], r["model"]) for r in requests} == {
        ("/v1/chat/completions", "Bearer secret", "stub")
    }


@pytest.mark.parametrize(
    "groups, note, problem",
    [
        ("I cannot do that.", "Done.", "not the JSON list"),
        (json.dumps(GROUPS[:2]), "Done.", "all 6 actions"),
        (json.dumps([GROUPS[0] | {"subtask": "win", "actions": 6}]), "Done.", "['win']"),
        (json.dumps(GROUPS), "the unicorn is next.", "['unicorn']"),
    ],
)
def test_a_bad_answer_is_refused_with_its_problem(endpoint, groups, note, problem):
    url, requests = endpoint(groups, note)
    with pytest.raises(ValueError, match="gave no valid labels") as error:
        annotate(small_episode(), teacher=ChatTeacher(url, "stub"))
    assert problem in str(error.value)
    asked = [r["messages"][0]["content"] for r in requests if "JSON" in r["messages"][0]["content"]]
    assert len(asked) == 3 and "was refused" not in asked[0] and problem in asked[1]


def test_an_endpoint_that_is_down_gives_one_line_with_the_fix():
    with pytest.raises(ConnectionError, match="start the server, or correct url") as error:
        annotate(small_episode(), teacher=ChatTeacher("http://127.0.0.1:9/v1", "stub", timeout=1))
    assert "\n" not in str(error.value)


OBS = """You move the metal pot to the inventory.

This room is called the kitchen. In it, you see:
	a sink

In your inventory, you see:
	a metal pot
"""


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("True", True), ("true.", True), ("**True**", True), ("False", False), (" FALSE\n", False)],
)
def test_a_verdict_is_true_or_false_in_any_dress(endpoint, said, verdict):
    url, requests = endpoint("", said)
    assert ChatTeacher(url, "stub").judge("get the metal pot", OBS) is verdict
    assert len(requests) == 1


@pytest.mark.parametrize(
    "said", ["", "Yes", "True or False", "not true", "True, it is in the inventory", "1"]
)
def test_any_other_verdict_is_refused_with_the_fix_and_not_asked_for_again(endpoint, said):
    url, requests = endpoint("", said)
    with pytest.raises(ValueError, match="stub said .*, expected True or False: use another model") as error:
        ChatTeacher(url, "stub").judge("get the metal pot", OBS)
    assert repr(said) in str(error.value) and len(requests) == 1


def test_the_judge_is_shown_the_subtask_and_what_the_world_answered(endpoint):
    url, requests = endpoint("", "True")
    ChatTeacher(url, "stub").judge("get the metal pot", OBS)
    lines = requests[0]["messages"][0]["content"].splitlines()
    assert lines[-5:] == [
        "Subtask: get the metal pot",
        "Answer of the world: You move the metal pot to the inventory",
        "Room: kitchen: sink",
        "Inventory: inventory: metal pot",
        "Complete:",
    ]


def test_a_judge_that_is_down_gives_one_line_with_the_fix():
    with pytest.raises(ConnectionError, match="start the server, or correct url"):
        ChatTeacher("http://127.0.0.1:9/v1", "stub", timeout=1).judge("get the metal pot", OBS)
