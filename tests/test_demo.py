"""The demo without a browser: runs that can be stopped, its API, its files and its bounds."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import app
import gradio as gr
import pytest
from demo_server import Demo, served
from gradio_client import Client
from gradio_client.exceptions import AppError
from page import build_page
from PIL import Image
from progress import Progress, Stopped, Visitors, follow
from verdict import judge

from finelip_sdxl.comparison import MAX_SEED, MIN_REFINED_STEPS, Picture, Settings
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.drawing import draw_scene
from finelip_sdxl.miniature.parsing import parse_description
from finelip_sdxl.miniature.world import make_scene
from finelip_sdxl.pictures import read_parameters

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
    first = visitors.flag("a")
    visitors.stop("a")
    assert first.is_set()
    visitors.ask("a")
    assert not visitors.flag("a").is_set()
    assert not visitors.flag("b").is_set()
    visitors.leave("b")
    visitors.leave("nobody")


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
    picture = Image.new("RGB", (96, 96))
    enlarged, share, details = judge(picture, parse_description("a photo of a fox"))
    assert enlarged.width > picture.width
    assert share == ""
    assert "knows no object of this prompt" in details
    assert judge(picture, None) == (picture, "", "")  # of another model


# The API


def test_the_api_gives_pngs_that_know_their_parameters(client) -> None:
    files = client.predict(LONG, steps=2, guidance_scale=3, seed=7, api_name="/compare")
    parameters = [read_parameters(file) for file in files]
    assert [found["column"] for found in parameters] == ["stock", "compel", "finelip"]
    assert {Settings.from_parameters(found) for found in parameters} == {
        Settings(LONG, steps=2, guidance_scale=3, seed=7, width=96, height=96)
    }
    assert all(Image.open(file).size == (96, 96) for file in files)


def test_the_api_draws_the_columns_that_are_asked_for(client) -> None:
    (file,) = client.predict(LONG, columns=["finelip"], steps=1, width=64, height=72, api_name="/compare")
    assert read_parameters(file)["column"] == "finelip"
    assert Image.open(file).size == (64, 72)


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
        ("a star " * 1000, {}, "The text has 7,000 characters; at most 6,000 are read here"),
        ("a star", {"steps": 0}, "`steps` is 0; expected a whole number from 1 to 200"),
        ("a star", {"steps": 150}, "Steps are bounded to 100 here"),
        ("a star", {"width": 8000}, "Width and height are bounded to 384 pixels here"),
        ("a star", {"height": 100}, "`height` is 100; expected a multiple of 8"),
        ("a star", {"seed": -1}, "`seed` is -1; expected a whole number"),
        ("a star", {"columns": ["other"]}, "`column` must be one of"),
        ("a star", {"columns": []}, "No column is chosen"),
        ("(" * 500, {"columns": ["compel"]}, "compel would take minutes"),
        ("a star", {"columns": ["compel"], "negative_prompt": "(" * 500}, "compel would take minutes"),
    ],
)
def test_the_api_explains_what_is_wrong_in_a_sentence(client, prompt, arguments, message, capsys) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(prompt, **{"steps": 1, **arguments}, api_name="/compare")
    assert "Traceback" not in capsys.readouterr().err  # whoever serves the page has made no mistake


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


VALUES = [LONG, "", 2, 3.0, 96, 96, 1.0, "penultimate", 0, False]  # the page's fields, and no random seed


def fail_at(column: str, error: Exception) -> Callable[..., Picture]:
    def draw(drawn, settings, on_step) -> Picture:
        on_step(1, settings.steps)
        if drawn == column:
            raise error
        return Picture(drawn, Image.new("RGB", (96, 96)), settings, seconds=1.0)

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


@pytest.mark.parametrize("error", [ValueError("brackets"), RuntimeError("a bug")])
def test_columns_that_an_error_leaves_undrawn_say_so(demo, monkeypatch, error) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("compel", error))
    events, raised = events_until_error(demo.page.draw_columns(Visitor(), *VALUES, ["stock", "compel", "finelip"]))
    statuses = events[-1][3::5]
    assert [isinstance(status, str) and "not drawn" in status for status in statuses] == [False, True, True]
    assert str(error) in str(raised)


def test_columns_that_were_left_out_stay_so_after_an_error(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("stock", ValueError("brackets")))
    events, _ = events_until_error(demo.page.draw_columns(Visitor(), *VALUES, ["stock", "finelip"]))
    statuses = events[-1][3::5]
    assert [isinstance(status, str) and "not drawn" in status for status in statuses] == [True, False, True]


def test_a_grid_that_an_error_leaves_undrawn_says_so(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.comparison, "draw", fail_at("compel", ValueError("brackets")))
    events, raised = events_until_error(demo.page.draw_grid(Visitor(), *VALUES, ["stock", "compel"], 2))
    assert "not drawn" in events[-1][2]
    assert not raised.print_exception


def test_seeds_past_the_last_are_explained(demo) -> None:
    values = [*VALUES[:-2], MAX_SEED, False]
    with pytest.raises(gr.Error, match=r"`seed` is \d+; expected a whole number"):
        next(demo.page.draw_grid(Visitor(), *values, ["stock"], 2))


# What stands on the page


def component(blocks: gr.Blocks, name: str) -> Any:
    return next(block for block in blocks.blocks.values() if getattr(block, "elem_id", None) == name)


def test_the_page_names_what_draws(demo, monkeypatch, tmp_path) -> None:
    names = {"base": "sdxl-base", "refiner": "small<refiner", "finelip": "longclip", "dtype": "float16"}
    monkeypatch.setattr(demo.comparison, "sources", names)
    page = build_page(demo.comparison, tmp_path, 1536)
    said = "Draws with sdxl-base, FineLIP longclip, refiner small&lt;refiner."
    assert component(page, "sources").value == said


def test_the_page_names_no_path_of_this_machine(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **arguments: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = app.serve(app.parse(["--base", str(miniature_path())]), tmp_path)
    assert component(page, "sources").value == f"Draws with {miniature_path().name}."


def test_steps_begin_where_a_refiner_can_draw(demo, monkeypatch, tmp_path) -> None:
    assert component(demo.blocks, "steps").minimum == 1
    monkeypatch.setattr(demo.comparison, "sources", {"base": "sdxl", "refiner": "refiner"})
    assert component(build_page(demo.comparison, tmp_path, 1536), "steps").minimum == MIN_REFINED_STEPS


def test_hidden_states_say_that_published_ones_leave_the_adapter_out(demo, monkeypatch, tmp_path) -> None:
    assert "published switches the adapter off" in component(demo.blocks, "hidden-states").info
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


def test_a_session_s_name_cannot_lead_out_of_the_folder(demo) -> None:
    class Request:
        session_hash = "../../outside/"

    assert demo.page._folder_of(Request()) == demo.folder / "pictures" / "outside"


def test_nothing_is_left_when_the_page_is_closed(monkeypatch) -> None:
    used = []

    def write(options, folder: Path) -> None:
        (folder / "picture.png").write_bytes(b"")
        used.append(folder)

    monkeypatch.setattr(app, "serve", write)
    assert app.main([]) == 0
    assert not used[0].exists()


# Starting


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
        (["--base", "./nowhere", "--device", "cpu"], "./nowhere is no directory here"),
    ],
)
def test_a_start_that_fails_says_why_in_a_line(arguments, message, capsys) -> None:
    assert app.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("app.py: error: ")
    assert message in line
