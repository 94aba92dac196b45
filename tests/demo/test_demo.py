"""The demo without a browser: runs that can be stopped, its API, its files and its bounds."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from compel import Compel
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from demo import app
from demo.page import build_page
from demo.progress import MAX_VISITORS, Line, Progress, Stopped, Visitors, Waiting, follow
from demo.scoring_view import judge
from finelip_sdxl.comparison.comparison import MIN_REFINED_STEPS, Comparison, Picture
from finelip_sdxl.comparison.settings import MAX_SEED, Settings
from finelip_sdxl.images import read_parameters, save_png
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_scene
from finelip_sdxl.miniature.parsing import parse_description
from finelip_sdxl.miniature.world import make_scene
from tests.helpers.demo_server import Demo, served

LONG = "A red star is in the top left. " * 12  # 110 tokens


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    with served(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


@pytest.fixture(scope="module")
def client(demo) -> Client:
    return Client(demo.url, verbose=False, download_files=str(demo.folder.parent / "downloads"))


# Runs


def draw_slowly(on_step) -> str:
    for step in range(1, 200):
        on_step(step, 199)
        time.sleep(0.005)
    return "a picture"


def test_steps_come_as_they_happen_and_the_picture_last() -> None:
    first, second, picture = follow(lambda on_step: [on_step(1, 2), on_step(2, 2)] and "a picture", threading.Event())
    assert isinstance(first, Progress)
    assert (first.step, second.step, second.steps, picture) == (1, 2, 2, "a picture")
    assert 0 <= first.seconds <= second.seconds


def test_a_flag_stops_a_run_at_the_next_step() -> None:
    flag = threading.Event()
    run = follow(draw_slowly, flag)
    assert [next(run).step for _ in range(3)] == [1, 2, 3]
    flag.set()
    with pytest.raises(Stopped):
        list(run)


def test_a_run_that_was_stopped_while_it_waited_does_not_begin() -> None:
    flag = threading.Event()
    flag.set()
    with pytest.raises(Stopped):
        next(follow(lambda on_step: pytest.fail("it was drawn"), flag))


def test_a_run_that_nobody_follows_any_more_stops() -> None:
    threads = threading.active_count()
    run = follow(draw_slowly, threading.Event())
    next(run)
    run.close()
    assert threading.active_count() == threads


def test_what_goes_wrong_is_told_to_whoever_follows() -> None:
    def fail(on_step) -> None:
        raise MemoryError("too little")

    with pytest.raises(MemoryError, match="too little"):
        list(follow(fail, threading.Event()))


def test_a_visitor_stops_what_they_asked_for_last_and_nobody_else() -> None:
    visitors = Visitors()
    visitors.ask("a")
    visitors.ask("b")
    visitors.stop("a")
    with visitors.running("a") as stopped, visitors.running("b") as other:
        assert stopped.is_set()
        assert not other.is_set()
        visitors.leave("b")
        assert other.is_set()
    visitors.leave("nobody")


def test_a_run_that_was_stopped_does_not_stop_the_next_one() -> None:
    visitors = Visitors()
    with visitors.running("a") as first:
        visitors.stop("a")
    with visitors.running("a") as second:
        assert (first.is_set(), second.is_set()) == (True, False)
    with pytest.raises(KeyError), visitors.running("a") as third:
        raise KeyError
    assert not third.is_set()


def test_nothing_is_kept_of_what_is_over_and_little_of_what_never_began() -> None:
    visitors = Visitors()
    for number in range(3 * MAX_VISITORS):
        session = str(number)
        visitors.stop(session)
        with visitors.running(session):
            pass
    assert not any(map(len, (visitors._asked, visitors._running, visitors._typed)))
    for number in range(3 * MAX_VISITORS):
        visitors.ask(str(number))
        visitors.types(str(number), "a fox")
    assert {len(visitors._asked), len(visitors._typed)} == {MAX_VISITORS}
    visitors.stop(str(number))
    with visitors.running(str(number)) as flag:
        assert flag.is_set()  # the newest are not forgotten


# The line

NEVER = threading.Event()


def test_the_first_in_line_has_the_turn_and_the_others_their_places() -> None:
    line = Line(longest=5)
    with line.join(10) as first, line.join(20) as second, line.join(30) as third:
        assert list(first.wait(NEVER)) == []
        assert next(second.wait(NEVER)) == Waiting(1, None), "nothing was timed yet"
        first.advance(4)
        pace = line._pace
        assert pace > 0
        assert next(second.wait(NEVER)) == Waiting(1, pytest.approx(6 * pace))
        assert next(third.wait(NEVER)) == Waiting(2, pytest.approx((6 + 20) * pace))


def test_who_leaves_the_line_makes_room() -> None:
    line = Line(longest=5)
    with line.join(1), pytest.raises(KeyError), line.join(1):
        raise KeyError
    with line.join(1) as place:
        assert list(place.wait(NEVER)) == []


def test_who_is_stopped_while_waiting_waits_no_longer() -> None:
    line, flag = Line(longest=5), threading.Event()
    with line.join(1), line.join(1) as second:
        waits = second.wait(flag)
        next(waits)
        flag.set()
        with pytest.raises(Stopped):
            next(waits)


def test_a_line_has_an_end() -> None:
    line = Line(longest=1)
    with line.join(1), line.join(1), pytest.raises(ValueError, match="already: try again in a few minutes"):
        line.join(1).__enter__()


# The miniature's pictures


def test_each_described_object_is_judged() -> None:
    scene = make_scene("unseen-0")
    right, wrong = scene.objects[0], scene.objects[1]
    other = "red" if wrong.color != "red" else "blue"
    prompt = f"The {right.place} holds a {right.color} {right.shape}. In the {wrong.place} is a {other} {wrong.shape}."
    picture = draw_scene(scene)
    marked, share, details = judge(picture, parse_description(prompt))
    assert share == "1 of 2 right"
    assert f"{right.color} {right.shape}, {right.place}</span>" in details
    assert f"{other} {wrong.shape}, {wrong.place} <span" in details
    assert "(another color)" in details
    assert marked.size > picture.size


def test_a_prompt_that_describes_nothing_is_not_judged() -> None:
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    enlarged, share, details = judge(picture, parse_description("a photo of a fox"))
    assert enlarged.width > picture.width
    assert share == ""
    assert "knows no object of this prompt" in details
    assert judge(picture, None) == (picture, "", "")  # of another model


# The API


@pytest.mark.slow
def test_the_api_gives_pngs_that_know_their_parameters(client) -> None:
    files = client.predict(LONG, steps=2, guidance_scale=2, seed=7, api_name="/compare")
    parameters = [read_parameters(file) for file in files]
    assert [found["column"] for found in parameters] == ["stock", "compel", "finelip"]
    assert {Settings.from_parameters(found) for found in parameters} == {
        Settings(LONG, steps=2, guidance_scale=2, seed=7, width=IMAGE_SIZE, height=IMAGE_SIZE)
    }
    assert all(Image.open(file).size == (IMAGE_SIZE, IMAGE_SIZE) for file in files)


def test_the_api_draws_the_columns_that_are_asked_for(client) -> None:
    (file,) = client.predict(LONG, columns=["finelip"], steps=1, width=64, height=80, api_name="/compare")
    assert read_parameters(file)["column"] == "finelip"
    assert Image.open(file).size == (64, 80)


def test_the_api_counts_tokens(client) -> None:
    found = client.predict(LONG, api_name="/tokens")
    assert list(found) == ["stock", "compel", "finelip"]
    assert found["stock"]["cut_tokens"] == 108 - 75
    assert [window["tokens"] for window in found["finelip"]["windows"]] == [108]
    assert found["compel"]["windows"][0]["text"] + found["compel"]["windows"][1]["text"] == LONG


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("", {}, "The prompt is empty: write one"),
        ("a star " * 1000, {}, "The text has 7,000 characters; at most 6,000 are allowed here"),
        ("a star", {"steps": 0}, "`steps` is 0; expected a whole number from 1 to 100"),
        ("a star", {"steps": 150}, "`steps` is 150; expected a whole number from 1 to 100"),
        ("a star", {"steps": "x"}, "`steps` is 'x'; expected a whole number from 1 to 100"),
        ("a star", {"width": 8000}, f"`width` is 8000; expected a whole number from 64 to {4 * IMAGE_SIZE}"),
        ("a star", {"height": 200}, "`height` is 200; expected a multiple of 16, such as 192"),
        ("a star", {"seed": -1}, "`seed` is -1; expected a whole number"),
        ("a star", {"columns": ["other"]}, "`column` must be one of"),
        ("a star", {"columns": []}, "No column is chosen"),
        ("a star", {"columns": "stock"}, "`columns` must be a list of 'stock', 'compel', 'finelip', but is 'stock'"),
        ("a star", {"emphasis": "a1112"}, "`emphasis` must be one of 'compel', 'a1111', 'a1111_no_norm', 'comfyui'"),
        ("a star", {"weighting": "other"}, "`weighting` must be one of 'none', 'compel', 'a1111'"),
        ("a star", {"columns": ["stock"] * 300}, "`columns` names 'stock' 300 times"),
        ("a star", {"columns": ["finelip", "stock", "finelip"]}, "`columns` names 'finelip' 2 times"),
        ("(" * 500, {"columns": ["compel"]}, "compel would take minutes"),
        ("a star", {"columns": ["compel"], "negative_prompt": "(" * 500}, "compel would take minutes"),
    ],
)
def test_the_api_explains_what_is_wrong_in_a_sentence(client, prompt, arguments, message, capsys) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(prompt, **{"steps": 1, **arguments}, api_name="/compare")
    assert "Traceback" not in capsys.readouterr().err  # whoever serves the page has made no mistake


def post(demo: Demo, name: str, body: str, until: str = "event: complete") -> str:
    """What the API answers to plain HTTP, up to an error or the line that is waited for."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{demo.url}gradio_api/call/{name}", body.encode(), headers)
    event = json.load(urllib.request.urlopen(request))["event_id"]
    lines = []
    with urllib.request.urlopen(f"{demo.url}gradio_api/call/{name}/{event}") as stream:
        for line in map(bytes.decode, stream):
            lines.append(line)
            if line.startswith("data: ") and ("event: error" in lines[-2] or until in lines[-2]):
                break
    return "".join(lines)


# Words of Python's own that a sentence of ours does not hold.
PYTHONS_WORDS = ("object", "has no", "not supported", "iterable", "unhashable", "cannot convert", "null", "argument")


@pytest.mark.parametrize("value", ["null", "3", "true", "NaN", "[]", '["a star"]', "{}", '{"a": 1}', "1e999"])
def test_tokens_of_what_is_no_text_are_refused_in_a_sentence(demo, value) -> None:
    answer = post(demo, "tokens", f'{{"data": [{value}]}}')
    assert "`prompt` must be a text, but is" in answer
    assert not any(word in answer.split("but is")[0] for word in PYTHONS_WORDS)


# What a call of /compare passes, as JSON.
CALL = {
    "prompt": '"a star"',
    "columns": '["stock"]',
    "negative_prompt": '""',
    "steps": "1",
    "guidance_scale": "3",
    "width": "0",
    "height": "0",
    "conditioning_adapter_scale": "1",
    "hidden_states": "null",
    "seed": "0",
    "weighting": "null",
    "emphasis": "null",
}
OTHER_KINDS = ["NaN", "-1e999", "[]", "[1, [2]]", "{}", '"<img src=x>"', "true", "2.5", "-3", "1e300"]


def call(**changes: str) -> str:
    return f'{{"data": [{", ".join((CALL | changes).values())}]}}'


@pytest.mark.parametrize("value", OTHER_KINDS)
@pytest.mark.parametrize("name", CALL)
def test_the_api_refuses_what_is_of_another_kind_in_a_sentence(demo, monkeypatch, capsys, name, value) -> None:
    is_right = (name.endswith("prompt") and value.startswith('"')) or (name, value) == ("guidance_scale", "2.5")
    drawn = []

    def draw(*job) -> Picture:
        drawn.append(job)
        return Picture("stock", Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), job[1], seconds=1.0)

    monkeypatch.setattr(demo.comparison, "draw", draw)
    answer = post(demo, "compare", call(**{name: value}))
    assert bool(drawn) == is_right
    if not is_right:
        said = json.loads(answer.split("event: error\ndata: ")[1])["error"]
        assert "<" not in said
        assert any(word in said for word in ("expected", "must be", "No column", "empty"))
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tokens", [], "/tokens takes 1 value in this order: prompt; but it got 0. Pass"),
        ("tokens", ["a star", "a fox"], "/tokens takes 1 value in this order: prompt; but it got 2"),
        ("compare", ["a star"], "/compare takes 12 values in this order: prompt, columns, negative_prompt, "),
        ("compare", ["a star"] * 13, "seed, weighting, emphasis; but it got 13. Pass each of them"),
    ],
)
def test_too_few_and_too_many_values_are_refused_in_a_sentence(demo, capsys, name, values, message) -> None:
    said = json.loads(post(demo, name, json.dumps({"data": values})).split("event: error\ndata: ")[1])["error"]
    assert message in said
    assert "Traceback" not in capsys.readouterr().err


def test_null_is_named_where_it_stands_for_nothing(demo, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.comparison, "draw", lambda *job: pytest.fail("it was drawn"))
    for name in ("prompt", "negative_prompt", "columns", "width", "conditioning_adapter_scale", "seed"):
        answer = post(demo, "compare", call(**{name: "null"}))
        assert f"`{name}` " in answer or "No column is chosen" in answer
        assert "None" in answer or "No column is chosen" in answer
    assert "Traceback" not in capsys.readouterr().err


def test_the_models_own_steps_and_guidance_stand_for_null(demo, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(demo.comparison, "draw", lambda column, settings, on_step: drawn.append(settings) or 1 / 0)
    post(demo, "compare", call(steps="null", guidance_scale="null"))
    own = demo.page.defaults
    assert [(settings.steps, settings.guidance_scale) for settings in drawn] == [(own.steps, own.guidance_scale)]


def test_what_is_posted_past_the_queue_is_refused(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", lambda *job: pytest.fail("it was drawn"))
    for route in ("run", "api"):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{demo.url}gradio_api/{route}/compare", call().encode(), headers)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request)


class Steps:
    """Draws in `count` steps of a twentieth of a second, and remembers those that were done."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.begun, self.ended = count, 0, threading.Event(), threading.Event()

    def __call__(self, column, settings, on_step) -> Picture:
        try:
            for step in range(1, self.count + 1):
                time.sleep(0.05)
                self.done = step
                on_step(step, self.count)
                self.begun.set()
        finally:
            self.ended.set()
        return Picture(column, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), settings, seconds=1.0)


def test_a_call_that_is_cancelled_stops_its_drawing_and_the_next_one_succeeds(demo, client, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo.comparison, "draw", steps := Steps(2000))
        job = client.submit("a star", steps=2, api_name="/compare")
        assert steps.begun.wait(60)
        job.cancel()
        assert steps.ended.wait(60)
        assert steps.done < steps.count
    assert len(client.predict("a star", steps=1, api_name="/compare")) == 3  # of the same session


def test_a_caller_who_goes_away_stops_the_drawing(demo, client, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo.comparison, "draw", steps := Steps(2000))
        post(demo, "compare", call(), until="event: generating")
        assert steps.ended.wait(60)
        assert steps.done < steps.count
    assert len(client.predict("a star", columns=["stock"], steps=1, api_name="/compare")) == 1


def test_a_session_that_was_stopped_is_told_so_and_may_call_again(demo, monkeypatch) -> None:
    class Session:
        session_hash = "stopped"

    with monkeypatch.context() as patch:
        patch.setattr(demo.comparison, "draw", Steps(2000))
        run = demo.page.compare("a star", Session(), ["stock"], steps=1)
        next(run)
        demo.page.stop(Session())
        with pytest.raises(gr.Error, match="Stopped before it was done: ask for it again"):
            list(run)
    *_, files = demo.page.compare("a star", Session(), ["stock"], steps=1)
    assert len(files) == 1


def test_memory_that_runs_out_leaves_the_page_working(demo, client, monkeypatch) -> None:
    def run_out(*args, **kwargs) -> None:
        raise MemoryError("The memory did not suffice.")

    with monkeypatch.context() as patch:
        patch.setattr(demo.comparison, "draw", run_out)
        with pytest.raises(AppError, match=r"The memory did not suffice\."):
            client.predict(LONG, steps=1, api_name="/compare")
    assert len(client.predict(LONG, steps=1, api_name="/compare")) == 3


def test_visitors_wait_their_turn(demo, client, monkeypatch) -> None:
    running, most, draw = [], [], demo.comparison.draw

    def watched(*args, **kwargs) -> object:
        running.append(1)
        most.append(len(running))
        try:
            return draw(*args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(demo.comparison, "draw", watched)
    jobs = [client.submit(LONG, columns=["stock"], steps=2, seed=seed, api_name="/compare") for seed in range(3)]
    assert [read_parameters(job.result()[0])["seed"] for job in jobs] == [0, 1, 2]
    assert max(most) == 1


# The page's columns


class Visitor:
    session_hash = "visitor"


VALUES = [
    LONG,
    "",
    2,
    3.0,
    IMAGE_SIZE,
    IMAGE_SIZE,
    1.0,
    "penultimate",
    "none",
    "compel",
    0,
    True,
]  # the page's fields, and the seed is kept


def fail_at(column: str, error: Exception) -> Callable[..., Picture]:
    def draw(drawn, settings, on_step, **options) -> Picture:
        on_step(1, settings.steps)
        if drawn == column:
            raise error
        return Picture(drawn, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), settings, seconds=1.0)

    return draw


def events_until_error(run) -> tuple[list, Exception]:
    """What a run shows before its error, and this."""
    events = []
    try:
        for event in run:
            events.append(event)
    except Exception as error:
        return events, error
    pytest.fail("nothing went wrong")


def test_a_run_says_which_step_it_is_at_and_frees_its_buttons(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("none", ValueError()))
    draw, stop, *_ = demo.page.ask(Visitor())
    assert (draw["value"], draw["interactive"], stop["interactive"]) == ("Drawing…", False, True)
    texts = [shown[-2] for shown in demo.page.draw_columns(Visitor(), *VALUES, ["stock", "finelip"])]
    texts = [text["value"] for text in texts if "value" in text]
    assert texts == ["Drawing…", *(f"Drawing… step 1 of 2, picture {number} of 2" for number in (1, 2))]
    draw, stop, *_, bar = demo.page.rest()
    assert (draw["value"], draw["interactive"], stop["interactive"], bar) == ("Draw", True, False, "")


def test_a_seed_is_new_each_time_unless_it_is_kept(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("none", ValueError()))
    new = [next(demo.page.draw_columns(Visitor(), *VALUES[:-1], False, ["stock"]))[0] for _ in range(3)]
    assert len(set(new)) == 3
    assert next(demo.page.draw_columns(Visitor(), *VALUES, ["stock"]))[0] == 0


def test_weights_and_their_effect_are_taken_as_they_are_chosen(demo, monkeypatch) -> None:
    counts = {
        weighting: len(demo.comparison.plan("a (red)1.5 star", ["finelip"], weighting)["finelip"].windows[0].token_ids)
        for weighting in ("none", "compel")
    }
    assert counts["compel"] == 3 < counts["none"]
    seen = []
    monkeypatch.setattr(
        demo.comparison, "_draw", lambda *job: seen.append((job[1].weighting, job[1].emphasis)) or 1 / 0
    )
    values = [*VALUES]
    values[8:10] = "compel", "comfyui"
    events_until_error(demo.page.draw_columns(Visitor(), *values, ["finelip"]))
    assert seen == [("compel", "comfyui")]


def test_the_page_opens_with_the_pictures_of_its_first_example_drawn_once(demo, monkeypatch) -> None:
    drawn = []

    def draw(column, settings, on_step, **options) -> Picture:
        drawn.append((column, settings))
        return Picture(column, Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), settings, seconds=1.0)

    monkeypatch.setattr(demo.comparison, "draw", draw)
    monkeypatch.setattr(demo.page, "_opening", [])
    for _ in range(2):
        *_, shown = demo.page.open(Visitor())
    assert drawn == [(column, demo.page.defaults) for column in ("stock", "compel", "finelip")]
    assert all("20 steps in 1.0 s, seed 0" in status for status in shown[2::5])
    demo.page.ask(Visitor())
    assert list(demo.page.open(Visitor())) == [], "pictures that were asked for meanwhile are not overwritten"
    demo.page.leave(Visitor())


@pytest.mark.parametrize("error", [ValueError("brackets"), RuntimeError("a bug")])
def test_columns_that_an_error_leaves_undrawn_say_so(demo, monkeypatch, error) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("compel", error))
    events, raised = events_until_error(demo.page.draw_columns(Visitor(), *VALUES, ["stock", "compel", "finelip"]))
    statuses = events[-1][3:16:5]
    assert [isinstance(status, str) and "not drawn" in status for status in statuses] == [False, True, True]
    assert str(error) in str(raised)


def test_columns_that_were_left_out_stay_so_after_an_error(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("stock", ValueError("brackets")))
    events, _ = events_until_error(demo.page.draw_columns(Visitor(), *VALUES, ["stock", "finelip"]))
    statuses = events[-1][3:16:5]
    assert [isinstance(status, str) and "not drawn" in status for status in statuses] == [True, False, True]


def test_a_grid_that_an_error_leaves_undrawn_says_so(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("compel", ValueError("brackets")))
    events, raised = events_until_error(demo.page.draw_grid(Visitor(), *VALUES, ["stock", "compel"], 2))
    assert "not drawn" in events[-1][2]
    assert not raised.print_exception


def test_seeds_past_the_last_are_explained(demo) -> None:
    values = [*VALUES[:-2], MAX_SEED, True]
    with pytest.raises(gr.Error, match=r"`seed` is \d+; expected a whole number"):
        next(demo.page.draw_grid(Visitor(), *values, ["stock"], 2))


def test_a_grid_is_bounded(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", lambda *job: pytest.fail("it was drawn"))
    for columns, seeds, message in (
        (["stock"], 9, "`seeds` is 9; expected a whole number from 1 to 8"),
        (["stock"], 0, "`seeds` is 0"),
        (["stock"], float("nan"), "`seeds` is nan"),
        (["stock"], None, "`seeds` is None"),
        (["stock", "stock"], 2, "`columns` names 'stock' 2 times"),
    ):
        with pytest.raises(gr.Error, match=message):
            next(demo.page.draw_grid(Visitor(), *VALUES, columns, seeds))
    with pytest.raises(gr.Error, match="`columns` names 'compel' 2 times"):
        next(demo.page.draw_columns(Visitor(), *VALUES, ["compel", "compel"]))


# The meter


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The texts that compel's parser is given."""
    texts: list[str] = []
    parse = Compel.parse_prompt_string
    monkeypatch.setattr(Compel, "parse_prompt_string", lambda text: texts.append(text) or parse(text))
    return texts


@pytest.mark.parametrize("text", ["a star, " * 700, "(a star)1.2 " * 450, '"a star" ' * 600, "(" * 6000, "a"])
def test_the_meter_does_not_wait_for_compel_s_parser(demo, parsed, text) -> None:
    html = demo.page.render_meter(text, "none", Visitor())
    assert not parsed
    assert "is still planning" in html
    assert html.count('class="meter-line') == 3


def test_compel_s_part_of_the_meter_follows(demo, parsed) -> None:
    demo.page.render_meter(LONG, "none", Visitor())
    html = demo.page.render_whole_meter(LONG, "none", Visitor())
    assert parsed == [LONG]
    assert "is still planning" not in html
    assert "in 2 windows of 77" in html


def test_what_was_typed_meanwhile_is_not_overwritten(demo) -> None:
    demo.page.render_meter("a star", "none", Visitor())
    demo.page.render_meter("a star and a ring", "none", Visitor())
    assert demo.page.render_whole_meter("a star", "none", Visitor()) == gr.skip()
    assert "a star and a ring" in demo.page.render_whole_meter("a star and a ring", "none", Visitor())


def test_the_meter_of_nothing_asks_for_a_prompt(demo) -> None:
    assert "Write a prompt" in demo.page.render_meter(None, "none", Visitor())


# What stands on the page


def component(blocks: gr.Blocks, name: str) -> Any:
    return next(block for block in blocks.blocks.values() if getattr(block, "elem_id", None) == name)


def test_the_page_names_what_draws(demo, monkeypatch, tmp_path) -> None:
    names = {"base": "sdxl-base", "refiner": "small<refiner", "finelip": "longclip", "dtype": "float16"}
    monkeypatch.setattr(demo.comparison, "sources", names)
    page = build_page(demo.comparison, tmp_path, 1536)
    said = "Model: sdxl-base · FineLIP: longclip · refiner: small&lt;refiner"
    assert component(page, "sources").value == said


def test_the_page_names_no_path_of_this_machine(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = app.serve(app.parse(["--base", str(miniature_path())]), tmp_path)
    assert component(page, "sources").value == f"Model: {miniature_path().name}"


def test_steps_begin_where_a_refiner_can_draw(demo, monkeypatch, tmp_path) -> None:
    assert component(demo.blocks, "steps").minimum == 1
    monkeypatch.setattr(demo.comparison, "sources", {"base": "sdxl", "refiner": "refiner"})
    assert component(build_page(demo.comparison, tmp_path, 1536), "steps").minimum == MIN_REFINED_STEPS


def test_hidden_states_say_that_last_ones_leave_the_adapter_out(demo, monkeypatch, tmp_path) -> None:
    assert "last switches the adapter off" in component(demo.blocks, "hidden-states").info
    monkeypatch.setattr(demo.comparison.pipe, "conditioning_adapter", None)
    page = build_page(demo.comparison, tmp_path, 1536)
    assert "adapter" not in component(page, "hidden-states").info
    assert not component(page, "adapter").interactive


# Files


def call_by_number(demo: Demo, name: str, data: list) -> str:
    """What an event of the page answers to whoever calls it by its number, past what the client allows."""
    number = next(n for n, fn in demo.blocks.fns.items() if fn.name == name)
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "stranger"}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{demo.url}gradio_api/queue/join", body, headers)
    urllib.request.urlopen(request).read()
    with urllib.request.urlopen(f"{demo.url}gradio_api/queue/data?session_hash=stranger") as stream:
        return next(line for line in map(bytes.decode, stream) if "process_completed" in line)


def test_a_path_that_was_not_uploaded_is_not_opened(demo, tmp_path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for you")
    answer = call_by_number(demo, "load_settings", [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}])
    assert '"success":false' in answer.replace(" ", "")
    assert "not for you" not in answer
    assert "is not a PNG" not in answer  # which it would say, had it looked


def session(name: str | None) -> Any:
    return type("Request", (), {"session_hash": name})()


NAMES = ["!!!", "", ".", "..", "/", "../../outside/", "a", "a!", "a.", "A", "ä", "\ud800", "a" * 5000, "pictures"]


def write(demo, name: str, flag: threading.Event | None = None) -> Path:
    picture = Picture("stock", Image.new("RGB", (8, 8)), demo.page.defaults, seconds=1.0)
    return demo.page._save_picture(picture, session(name), flag or threading.Event())


def test_each_session_has_a_folder_of_its_own_whatever_its_name(demo) -> None:
    folders = [demo.page._folder_of(session(name)) for name in NAMES]
    assert len(set(folders)) == len(NAMES)
    assert {folder.parent for folder in folders} == {demo.folder / "pictures"}
    assert folders == [demo.page._folder_of(session(name)) for name in NAMES]


def test_a_session_deletes_nobody_else_s_pictures(demo) -> None:
    files = [write(demo, name) for name in ("a visitor", *NAMES)]
    for name, file in zip(NAMES, files[1:], strict=True):
        if name == "!!!":
            next(demo.page.draw_columns(session(name), *VALUES, ["stock"]))  # new ones take their place
        else:
            demo.page.leave(session(name))
        assert not file.exists()
        assert files[0].exists()
    demo.page.leave(session("a visitor"))


def test_those_without_a_name_share_nothing(demo) -> None:
    one, other = (demo.page._folder_of(session(None)) for _ in range(2))
    assert one != other


def test_pictures_of_those_who_never_leave_are_deleted_later(demo) -> None:
    old, new = (write(demo, name).parent for name in ("old", "new"))
    os.utime(old, (0, 0))
    write(demo, "another")
    assert (old.exists(), new.exists()) == (False, True)


def test_a_picture_that_is_written_while_its_page_is_closed_is_not_kept(demo) -> None:
    with demo.page.visitors.running("a visitor") as flag:
        kept = write(demo, "a visitor", flag)
        demo.page.leave(session("a visitor"))
        assert not kept.exists()
        with pytest.raises(Stopped):
            write(demo, "a visitor", flag)
        assert not kept.exists()


HOSTILE = '<img src="https://example.com/x.png" onerror=alert(1)>&amp;<script>'


@pytest.mark.parametrize(
    "parameters",
    [
        {"prompt": HOSTILE, "steps": HOSTILE},
        {"prompt": "a star", "hidden_states": HOSTILE},
        {"prompt": "a star", "width": [HOSTILE]},
        {"prompt": "a star", "seed": {HOSTILE: HOSTILE}},
        {"prompt": "a star", "negative_prompt": [HOSTILE]},
        {"prompt": ["a star"], HOSTILE: HOSTILE},
    ],
)
def test_what_a_picture_holds_is_shown_as_text(demo, tmp_path, parameters) -> None:
    file = tmp_path / "<b>picture<b>.png"
    save_png(Image.new("RGB", (8, 8)), file, {"prompt": "a star"})
    with Image.open(file) as image:
        info = PngInfo()
        info.add_itxt("parameters", json.dumps(parameters))
        image.save(file, pnginfo=info)
    with pytest.raises(gr.Error) as raised:
        demo.page.load_settings(str(file))
    assert "<" not in raised.value.message
    assert not raised.value.print_exception
    assert not file.exists()  # it was read, and is needed no more


def test_an_uploaded_picture_is_deleted_once_it_is_read(demo, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gr, "Info", lambda text: None)
    save_png(Image.new("RGB", (8, 8)), file := tmp_path / "picture.png", {"prompt": HOSTILE, "seed": 7})
    assert demo.page.load_settings(str(file))[0] == HOSTILE  # in a box for text
    assert not file.exists()
    for nothing in (None, str(tmp_path), 3):
        with pytest.raises(gr.Error):
            demo.page.load_settings(nothing)


def test_errors_of_the_machine_name_none_of_its_files(demo, monkeypatch) -> None:
    def fail(*args) -> None:
        raise OSError(28, "No space left on device", "/home/somebody/secret.png")

    monkeypatch.setattr(demo.comparison, "draw", fail_at("none", ValueError()))
    monkeypatch.setattr("demo.page.save_png", fail)
    with pytest.raises(gr.Error, match="No space left on device") as raised:
        list(demo.page.compare("a star", Visitor(), ["stock"], steps=1))
    assert "secret" not in raised.value.message


def test_nothing_is_left_when_the_page_is_closed(monkeypatch) -> None:
    used = []

    def write(options, folder: Path) -> None:
        (folder / "picture.png").write_bytes(b"")
        used.append(folder)

    monkeypatch.setattr(app, "serve", write)
    assert app.main([]) == 0
    assert not used[0].exists()


# Starting


def test_the_page_starts_and_answers_where_the_environment_has_a_proxy(demo, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(Comparison, "load", lambda *args, **options: demo.comparison)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("no_proxy", "example.com, 10.0.0.0/8")
    with served(tmp_path) as second:
        assert Client(second.url, verbose=False).predict("a star", api_name="/tokens")["stock"]["cut_tokens"] == 0
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.com,10.0.0.0/8,localhost,127.0.0.1,::1"


@pytest.mark.parametrize(("host", "added"), [("127.0.0.1", ""), ("0.0.0.0", ",0.0.0.0"), ("::", ",::")])
def test_a_proxy_stays_for_everything_else(monkeypatch, host, added) -> None:
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.delenv("no_proxy", raising=False)
    for _ in range(2):
        app.bypass_proxy(host)
        assert os.environ["no_proxy"] == f"example.com,localhost,127.0.0.1,::1{added}"


def test_a_port_that_is_taken_is_told_by_its_flag(demo, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Comparison, "load", lambda *args, **options: demo.comparison)
    for name in ("no_proxy", "NO_PROXY", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # what is set is undone
    port = str(demo.blocks.server_port)
    assert app.main(["--port", port]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"Port {port} cannot be opened at 127.0.0.1" in line
    assert "--port" in line
    assert "server_port" not in line


def test_where_no_public_address_can_be_had_one_sentence_says_so(demo, monkeypatch, tmp_path, capsys) -> None:
    def setup_tunnel(**arguments) -> None:
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr(Comparison, "load", lambda *args, **options: demo.comparison)
    monkeypatch.setattr(gr.networking, "setup_tunnel", setup_tunnel)
    for name in ("no_proxy", "NO_PROXY", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # what is set is undone
    page = app.serve(app.parse(["--share"]), tmp_path, wait=False)
    opened, public = capsys.readouterr().out.strip().splitlines()
    page.close()
    assert opened.startswith("The page is open at http://127.0.0.1:")
    assert public.startswith("It has no public address: --share needs Gradio's servers, which were not reached. Try")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "./gone"], "./gone does not exist"),
        (["--refiner", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--config", "miniature"], "The config miniature goes with a single file"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--port", "70000"], "--port: expected a whole number of at most 65,535 instead of 70000"),
        (["--prot", "7860"], "--prot is no flag here: did you mean --port?"),
        (["--finelip-base", "miniature"], "--finelip-base miniature goes with --finelip-merge delta"),
    ],
)
def test_the_launcher_refuses_mistakes_in_a_line(monkeypatch, capsys, flags, message) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stopped:
        sys.exit(app.main(flags))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("error", [Exception("code 502"), ValueError("When localhost is not accessible, share")])
def test_a_page_that_cannot_reach_itself_says_so_in_a_line(demo, monkeypatch, capsys, error) -> None:
    def launch(*args, **options) -> None:
        raise error

    monkeypatch.setattr(Comparison, "load", lambda *args, **options: demo.comparison)
    monkeypatch.setattr(gr.Blocks, "launch", launch)
    for name in ("no_proxy", "NO_PROXY", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # what is set is undone
    assert app.main([]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "does not answer this machine" in line
    assert str(error) in line
    assert "http_proxy" in line


def test_the_page_is_for_this_machine_alone_by_default(monkeypatch, tmp_path) -> None:
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: launched.update(arguments))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app.serve(app.parse([]), tmp_path)
    assert (launched["server_name"], launched["share"]) == ("127.0.0.1", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "./nowhere"], "nowhere"),
        (["--finelip", "./nowhere.safetensors"], "nowhere.safetensors"),
        (["--device", "cpu", "--offload"], "--offload moves models between the CPU and an accelerator"),
        (["--base", "./nowhere", "--device", "cpu"], "./nowhere does not exist"),
    ],
)
def test_a_start_that_fails_says_why_in_a_line(arguments, message, capsys) -> None:
    assert app.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("app.py: error: ")
    assert message in line
