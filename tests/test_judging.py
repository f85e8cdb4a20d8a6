"""Judges: an endpoint that fails in every way, verdicts on disk, and which of them the flag takes."""

import json
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval.answers.jsonl import read_jsonl
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import Folder
from eval.judging import Judging, Request, choice
from eval.judging.choice import Store, ask, check_judge, line, lines_of, read_verdicts, score_answers
from eval.judging.judges import Endpoint, configured, endpoint
from eval.metrics import Score
from llava.errors import UserError

KEY = "sk-very-secret"
ENVIRONMENT = ("JUDGE_MODEL", "JUDGE_URL", "JUDGE_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "JUDGE_WORKERS")
ASKED = ("a", "b", "c")
TEXTS = {"a": "1", "b": "0", "c": "1"}
REQUEST = Request("a", ({"role": "user", "content": "x"},))


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    """A chat endpoint: `answer(number of the call, body)` gives a status and a reply; `calls` is what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.calls.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, reply = served.answer(len(served.calls), body)
            content = {"model": "judge-0613", "choices": [{"message": {"content": reply}}]}
            payload = json.dumps(content).encode() if status == 200 else f"no: {reply}".encode()
            self.send_response(status)
            if status == 200 and served.body is not None:
                payload = served.body.encode()
            self.send_header("Content-Type", "application/json")
            if status == 429:
                self.send_header("Retry-After", "7")
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.calls, served.answer, served.body = [], lambda number, body: (200, body["messages"][0]["content"]), None
    served.url = f"http://127.0.0.1:{served.server_port}/v1"
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def judging(**changes) -> Judging:
    """A judge is asked with the text alone and should answer with a number."""

    def total(asked, verdicts):
        return Score({"points": sum(verdicts[name]["n"] for name in asked if name in verdicts)}, {}, {}, main="points")

    settings = {
        "benchmark": "toy",
        "official": "judge-0613",
        "main": "points",
        "requests": lambda asked, texts: [Request(n, ({"role": "user", "content": texts[n]},), 0.0, 3) for n in asked],
        "parse": lambda name, reply: {"n": int(reply)} if reply.isdigit() else None,
        "read": lambda path: json.loads(path.read_text()),
        "score": total,
        "match": lambda asked, texts: Score({"points_match": 7.0}, {}, {}, ("a word match",), "points_match"),
        "tries": 3,
        "again": lambda request, failures: Request(request.id, request.messages, 0.5 * failures, 3),
    }
    return Judging(**(settings | changes))


def data_with(how: Judging | None) -> Dataset:
    questions = tuple(Question(name, "?", "", (), "") for name in ASKED)
    return Dataset("Toy", questions, Folder(None), "", how.match if how else None, None, dict, judging=how)


def at(server, **changes) -> Endpoint:
    return Endpoint(**({"name": "judge", "url": server.url, "key": KEY, "workers": 1} | changes))


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The seconds that the client waits between tries, which tests do not wait for."""
    from openai import _base_client

    found: list[float] = []
    monkeypatch.setattr(_base_client.time, "sleep", found.append)
    return found


def run(judge, how, folder, texts=TEXTS):
    with closing(Store(folder / "judgements-judge.jsonl")) as store:
        ask(judge, how, how.requests(ASKED, texts), store)
        return lines_of(store.found, how.requests(ASKED, texts))


# -- the endpoint --------------------------------------------------------------------------------------------------


def test_every_answer_is_asked_about_once_and_kept(server, tmp_path, capsys):
    lines = run(at(server), judging(), tmp_path)
    assert {name: entry["verdict"] for name, entry in lines.items()} == {"a": {"n": 1}, "b": {"n": 0}, "c": {"n": 1}}
    assert {entry["judge"] for entry in lines.values()} == {"judge-0613"}  # what the server says it is
    first = server.calls[0]
    assert first["path"] == "/v1/chat/completions" and first["key"] == f"Bearer {KEY}"
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("judge", 0.0, 3)
    shown = capsys.readouterr()
    assert "Judge judge: 3 requests, at most about 27 tokens in and 9 out; an unreadable" in shown.out
    assert KEY not in shown.out + shown.err + (tmp_path / "judgements-judge.jsonl").read_text()
    run(at(server), judging(), tmp_path)
    assert len(server.calls) == 3


def test_a_busy_server_is_asked_again_ever_more_slowly_or_when_it_says(server, waits):
    server.answer = lambda number, body: (429 if number == 1 else 200, "1")
    at(server).reply(REQUEST)
    assert waits.pop() == 7 and not waits
    server.calls.clear()
    server.answer = lambda number, body: (500 if number < 4 else 200, "1")
    assert at(server, key=None).reply(REQUEST) == ("1", "judge-0613")
    assert server.calls[0]["key"] is None
    assert len(server.calls) == 4 and waits == sorted(waits) and 0.3 < waits[0] < waits[2] / 2
    assert "temperature" not in server.calls[0] and "max_tokens" not in server.calls[0]


def test_a_server_that_stays_down_ends_the_run_and_keeps_the_verdicts(server, tmp_path):
    server.answer = lambda number, body: (200, "1") if number == 1 else (503, KEY)
    sentence = r"did not answer in 8 tries \(HTTP 503: no: \*\*\*\); the verdicts so far"
    with pytest.raises(UserError, match=sentence) as error:
        run(at(server), judging(), tmp_path)
    assert KEY not in str(error.value)
    server.answer = lambda number, body: (200, "1")
    assert len(run(at(server), judging(), tmp_path)) == 3
    assert sum(call["messages"][0]["content"] == "1" for call in server.calls[9:]) == 1  # "a" was not asked again


def test_a_refusal_is_not_repeated_a_redirect_not_followed_and_the_key_in_no_log(server, caplog):
    caplog.set_level("DEBUG")  # the level at which the client logs its requests
    for status in (401, 302):
        server.calls.clear()
        server.answer = lambda number, body, status=status: (status, f"bad {KEY}")
        with pytest.raises(UserError, match=rf"refused a request \(HTTP {status}: no: bad \*\*\*\)"):
            at(server).reply(REQUEST)
        assert len(server.calls) == 1 and "HTTP request" in caplog.text and KEY not in caplog.text


def test_a_slow_server_is_asked_again_after_the_timeout(server):
    late = threading.Event()
    server.answer = lambda number, body: (late.wait(30 if number == 1 else 0), (200, "1"))[1]
    assert at(server, timeout=0.3).reply(REQUEST)[0] == "1"
    late.set()
    assert len(server.calls) == 2


@pytest.mark.parametrize("content", ["<html>", "[]", '{"choices": []}', '{"choices": [{"message": null}]}', "[" * 9999])
def test_something_that_is_no_chat_endpoint_is_a_sentence(server, content):
    server.body = content
    with pytest.raises(UserError, match=f"^{server.url} does not answer as a chat"):
        at(server).reply(REQUEST)


def test_unreadable_replies_are_asked_for_again_with_a_cap(server, tmp_path):
    server.answer = lambda number, body: (200, "maybe" if body["temperature"] < 0.5 else "2")
    lines = run(at(server), judging(), tmp_path)
    assert [entry["tries"] for entry in lines.values()] == [2, 2, 2] and not lines["a"]["failed"]
    server.answer = lambda number, body: (200, "never")
    server.calls.clear()
    (tmp_path / "second").mkdir()
    lines = run(at(server), judging(failed={"n": 0}), tmp_path / "second")
    assert [call["temperature"] for call in server.calls[:3]] == [0.0, 0.5, 1.0] and len(server.calls) == 9
    assert lines["b"]["failed"] and lines["b"]["verdict"] == {"n": 0} and lines["b"]["reply"] == "never"


def test_an_interrupted_run_goes_on_where_it_stopped(server, tmp_path):
    class Stops(Exception):
        pass

    class Breaks:
        name, workers = "judge", 1

        def reply(self, request):
            if request.id == "c":
                raise Stops
            return "1", "judge"

    with pytest.raises(Stops):
        run(Breaks(), judging(), tmp_path)
    path = tmp_path / "judgements-judge.jsonl"
    assert len(list(read_jsonl(path))) == 2
    with open(path, "a") as file:
        file.write('{"question_id": "c", "as')  # killed in the middle of a line
    assert len(run(at(server), judging(), tmp_path)) == 3 and len(server.calls) == 1


def test_a_changed_answer_is_judged_again(server, tmp_path):
    run(at(server), judging(), tmp_path)
    lines = run(at(server, workers=4), judging(), tmp_path, TEXTS | {"b": "5"})
    assert len(server.calls) == 4 and lines["b"]["verdict"] == {"n": 5}


def test_of_two_verdicts_about_one_answer_the_last_counts(tmp_path):
    """A verdict that was asked for again, or mended by hand, stands behind the first in the file."""
    how, path = judging(), tmp_path / "judgements-judge-0613.jsonl"
    requests = how.requests(ASKED, TEXTS)
    with closing(Store(path)) as store:
        for request, number in [*((one, 1) for one in requests), (requests[-1], 5), (requests[0], 3)]:
            store.append(line(request, {"n": number}, str(number), "judge-0613", 1, failed=False))
        assert [one["verdict"]["n"] for one in lines_of(store.found, requests).values()] == [3, 1, 5]
    with closing(Store(path)) as store:
        assert [one["verdict"]["n"] for one in lines_of(store.found, requests).values()] == [3, 1, 5]
    assert score(how, "auto", tmp_path)[0].values == {"points": 9} == score(how, str(path), tmp_path)[0].values


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_last_verdict_is_kept_however_many_are_asked_for_at_once(server, tmp_path, workers):
    lines = run(at(server, workers=workers), judging(), tmp_path)
    assert list(lines) == list(ASKED) and len(server.calls) == len(ASKED)
    assert len(read_verdicts(tmp_path / "judgements-judge.jsonl")) == len(ASKED)


def test_the_endpoint_comes_from_the_environment():
    given = {"JUDGE_MODEL": "m", "OPENAI_BASE_URL": "https://host/v1/", "OPENAI_API_KEY": f" {KEY}\n"}
    found = endpoint(given)
    assert (found.url, found.name, found.key) == ("https://host/v1", "m", KEY)
    assert endpoint(given | {"OPENAI_BASE_URL": "https://host/v1/chat/completions"}).url == found.url
    assert KEY not in repr(found) and found.workers == 4
    assert configured(given) and not configured(given | {"OPENAI_API_KEY": ""}) and not configured({})
    for wrong, sentence in [
        ({"JUDGE_MODEL": ""}, "--judge endpoint needs the environment variable JUDGE_MODEL."),
        ({"JUDGE_URL": "file:///etc/passwd"}, "JUDGE_URL should be an address"),
        ({"JUDGE_URL": "http://host:port/v1"}, "JUDGE_URL .*'http://host:port/v1'"),
        ({"JUDGE_URL": "http://[host/v1"}, r"JUDGE_URL .*'http://\[host/v1'"),
        ({"OPENAI_API_KEY": "a\nb"}, "holds characters that no key has"),
        ({"JUDGE_WORKERS": "0"}, "JUDGE_WORKERS should be"),
    ]:
        with pytest.raises(UserError, match=sentence):
            endpoint(given | wrong)


# -- the flag ------------------------------------------------------------------------------------------------------


def score(how, judge, folder, asked=ASKED, texts=TEXTS):
    return score_answers(data_with(how), judge, asked, texts, folder / "answers.jsonl")


def as_published(judge: str) -> str:
    return f"judged by {judge}, as the published numbers"


def test_without_a_judge_the_word_match_stands_under_its_own_name(tmp_path):
    found, facts = score(judging(), "auto", tmp_path)
    assert found.main == "points_match" and "points" not in found.values and facts == {"judge": {"name": "match"}}
    assert any(f"eval.score toy --answers {tmp_path}/answers.jsonl --judge endpoint" in note for note in found.notes)
    assert score(judging(), "match", tmp_path)[0].values == {"points_match": 7.0}
    assert data_with(judging()).score(ASKED, TEXTS).main == "points_match"


def test_none_gives_no_number_and_says_what_is_missing(tmp_path):
    found, _ = score(judging(), "none", tmp_path)
    assert found.values == {"points": None} and found.correct == {}
    assert "verdicts of judge-0613; set JUDGE_MODEL, JUDGE_URL and JUDGE_KEY" in found.notes[0]


def test_auto_takes_the_endpoint_when_it_is_set_up_and_verdicts_on_disk_later(server, tmp_path, monkeypatch):
    for name, value in (("JUDGE_MODEL", "judge"), ("JUDGE_URL", server.url), ("JUDGE_KEY", KEY)):
        monkeypatch.setenv(name, value)
    found, facts = score(judging(), "auto", tmp_path)
    assert found.values == {"points": 2} and found.notes == (as_published("judge-0613"),)
    assert facts["judge"]["name"] == "judge-0613" and len(server.calls) == 3
    monkeypatch.delenv("JUDGE_URL")
    again, _ = score(judging(), "auto", tmp_path)
    assert again.values == {"points": 2} and len(server.calls) == 3
    other, _ = score(judging(official="gpt-4-0314"), "auto", tmp_path)
    assert "of gpt-4-0314 and cannot be compared" in other.notes[0]


def test_the_official_judges_verdicts_go_before_others_and_half_judged_answers_are_no_score(tmp_path):
    how = judging()
    path = tmp_path / "judgements-judge-0613.jsonl"
    first, *rest = how.requests(ASKED, TEXTS)
    with closing(Store(path)) as store:
        store.append(line(first, {"n": 1}, "1", "judge-0613", 1, failed=False))
    found, _ = score(how, "auto", tmp_path)
    assert found.main == "points_match"
    assert "judgements-judge-0613.jsonl holds verdicts about 1 of these 3 answers and was not used" in found.notes
    with pytest.raises(UserError, match=r"holds no verdict about these answers for 2 of 3 questions \(b, c\)"):
        score(how, str(path), tmp_path)
    for name, number, requests in (("another", 3, (first, *rest)), ("judge-0613", 1, rest)):
        with closing(Store(tmp_path / f"judgements-{name}.jsonl")) as store:
            for request in requests:
                store.append(line(request, {"n": number}, "", name, 1, failed=False))
    found, _ = score(how, "auto", tmp_path)
    assert found.values == {"points": 3} and "judgements-another.jsonl holds other verdicts" in found.notes[-1]


def test_failed_answers_are_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    monkeypatch.setenv("JUDGE_URL", server.url)
    server.answer = lambda number, body: (200, "?" if body["messages"][0]["content"] == "0" else "1")
    found, _ = score(judging(), "endpoint", tmp_path)
    assert found.values == {"points": 2} and "no readable verdict for 1 answers (b): left out" in found.notes


def test_verdicts_of_the_official_script(tmp_path):
    path = tmp_path / "grades.json"
    path.write_text(json.dumps({name: {"n": 4, "model": ["judge-0613"], "text": TEXTS[name]} for name in ASKED}))
    how = judging(text=lambda verdict: verdict.get("text"))
    found, _ = score(how, str(path), tmp_path)
    assert found.values == {"points": 12} and found.notes == (as_published("judge-0613"),)
    with pytest.raises(UserError, match=r"judges other answers to 1 of 3 questions \(b\)"):
        score(how, str(path), tmp_path, texts=TEXTS | {"b": "9"})
    path.write_text(json.dumps({"a": {"n": 4}}))
    assert "is not checked" in score(judging(), str(path), tmp_path, asked=("a",))[0].notes[-1]
    with pytest.raises(UserError, match="2 of 3 questions"):
        score(judging(), str(path), tmp_path)


def test_wrong_flags_are_said_before_a_run(tmp_path):
    for judge, sentence in [
        ("endpoint", "JUDGE_MODEL"),
        ("gpt-4", "there is no 'gpt-4'"),
    ]:
        with pytest.raises(UserError, match=sentence):
            check_judge(data_with(judging()), judge)
    with pytest.raises(UserError, match="Toy is scored without a judge"):
        check_judge(data_with(None), "match")
    check_judge(data_with(None), "auto")
    check_judge(data_with(judging()), str(tmp_path))


def test_judges_without_a_name_or_version_are_not_said_to_be_others():
    """LLaVA's own grade files name the model "gpt-4", its reviews none: both were called incomparable."""
    how = judging(official="gpt-4-0613")
    assert choice._about(how, ["gpt-4-0613"]) == as_published("gpt-4-0613")
    assert "a name without a version" in choice._about(how, ["gpt-4"])
    assert "the file does not name its judge" in choice._about(how, [])
    assert "cannot be compared" in choice._about(how, ["gpt-4o"])
    assert (choice.as_list("gpt-4"), choice.as_list(["a", "b"]), choice.as_list(None)) == (["gpt-4"], ["a", "b"], [])
