"""The check that runs the nodes in a ComfyUI: what it says where there is none, or where a workflow fails."""

import json

import pytest

from comfyui import check


def test_a_folder_without_comfyui_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(["--comfyui", str(tmp_path)])
    assert ended.value.code == 2
    assert "has no main.py: pass the folder of ComfyUI's repository." in capsys.readouterr().err


def test_a_comfyui_that_ends_at_its_start_is_reported_with_its_last_words(tmp_path, capsys) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(SystemExit, match=r"ComfyUI ended at its start:\nno torch here"):
        check.main(["--comfyui", str(tmp_path)])


class FailingServer:
    """A ComfyUI that knows the nodes, and in which every workflow fails with a message."""

    def __init__(self, message: str, nodes: set[str]) -> None:
        self._message, self._nodes = message, nodes

    def get(self, path: str) -> bytes:
        assert path == "object_info"
        return json.dumps({name: {} for name in self._nodes}).encode()

    def run(self, workflow: dict) -> dict:
        said = {"exception_message": f"{self._message}\n"}
        return {"status": {"status_str": "error", "messages": [["execution_start", {}], ["execution_error", said]]}}


def test_a_workflow_that_fails_is_a_fault_with_comfyuis_message() -> None:
    faults = check.check(FailingServer("a wheel came off", check.NODES), None)
    assert faults[:-1] == [f"{name}: a wheel came off" for name, *_ in check.PROMPTS]
    assert faults[-1] == "A FineLIP that is not there gets another answer than a sentence that names it."


def test_nodes_that_are_not_registered_are_named() -> None:
    assert check.check(FailingServer("", {"KSampler"}), None) == [
        "ComfyUI does not know FineLIPEncodePrompt, FineLIPLoadMiniature, FineLIPLoadTextEncoders."
    ]
