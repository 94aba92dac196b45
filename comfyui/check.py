"""Run the nodes in a ComfyUI on this machine, and hold its pictures and reports against the pipeline's.

    python comfyui/check.py --comfyui ~/ComfyUI
    python comfyui/check.py --comfyui ~/ComfyUI --python ~/ComfyUI/venv/bin/python --out pictures

ComfyUI's server is started on the CPU with this folder among its custom nodes, in a temporary folder. It gets the
workflow of `examples/` with prompts of one window, of 77 and 248 positions, and of two windows, and one that must fail.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.report import report_header

HERE = Path(__file__).resolve().parent
WORKFLOW = HERE.parent / "examples" / "comfyui_workflow.json"
LONG = (HERE.parent / "examples" / "long_prompt.txt").read_text(encoding="utf-8").strip()
# Name, prompt, negative prompt and syntax of weights.
PROMPTS = (
    ("short", "A large red star is in the center.", "", "none"),
    ("long", LONG, "", "none"),
    ("windowed", f"{LONG} {LONG}", "A blue ring.", "none"),
    ("weighted", LONG.replace("a star in teal", "(a star in teal:1.3)"), "", "a1111"),
)
NODES = {"FineLIPLoadTextEncoders", "FineLIPEncodePrompt", "FineLIPLoadMiniature"}
# Of 255, in the mean over a picture: ComfyUI cuts to whole numbers, where Diffusers rounds, which is half of one.
MOST_DIFFERENCE = 0.75


class Server:
    """A running ComfyUI.

    Args:
        address: such as `http://127.0.0.1:8188`.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **query: str) -> bytes:
        with urlopen(f"{self._address}/{path}?{urlencode(query)}", timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """The entry of ComfyUI's history for a workflow, when it has ended."""
        body = json.dumps({"prompt": workflow}).encode()
        with urlopen(Request(f"{self._address}/prompt", body, {"Content-Type": "application/json"})) as answer:
            name = json.load(answer)["prompt_id"]
        while True:
            entry: dict[str, Any] | None = json.loads(self.get(f"history/{name}")).get(name)
            if entry is not None:
                return entry
            time.sleep(0.5)

    def picture(self, entry: dict[str, Any], node: str) -> Image.Image:
        (place,) = entry["outputs"][node]["images"]
        return Image.open(BytesIO(self.get("view", **place)))


@contextmanager
def started(comfyui: Path, python: str) -> Iterator[Server]:
    """A ComfyUI with these nodes, until the end of the context.

    Raises:
        SystemExit: it ends before it answers; its last words are printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (folder / part).mkdir()
        (folder / "custom_nodes" / "finelip_sdxl_nodes").symlink_to(HERE, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [python, "main.py", "--cpu", "--disable-api-nodes", "--port", str(port)]
        command += ["--base-directory", name, "--database-url", f"sqlite:///{folder / 'comfyui.db'}"]
        log = folder / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=comfyui, stdout=output, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}")
        try:
            while process.poll() is None:
                try:
                    server.get("system_stats")
                    break
                except URLError:
                    time.sleep(1)
            else:
                sys.exit("ComfyUI ended at its start:\n" + "\n".join(log.read_text().splitlines()[-20:]))
            yield server
        finally:
            process.terminate()
            process.wait()


def expected(pipe: FineLIPSDXLPipeline, workflow: dict[str, Any]) -> tuple[str, Image.Image]:
    """The report and the picture of the pipeline, from the noise of ComfyUI."""
    prompt, sampler = workflow["prompt"]["inputs"], workflow["sampler"]["inputs"]
    asked: dict[str, Any] = {
        "prompt": prompt["text"],
        "negative_prompt": prompt["negative_text"],
        "weighting": None if prompt["weighting"] == "none" else prompt["weighting"],
        "emphasis": "comfyui",
    }
    side = pipe.unet.config.sample_size
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.manual_seed(sampler["seed"]))
    # ComfyUI begins with noise of variance 1 + sigma², Diffusers of sigma².
    pipe.scheduler.set_timesteps(sampler["steps"])
    start = float(pipe.scheduler.init_noise_sigma)
    picture = pipe(
        **asked,
        latents=noise * math.sqrt(1 + start**2) / start,
        num_inference_steps=sampler["steps"],
        guidance_scale=sampler["cfg"],
    ).images[0]
    return str(pipe.describe_prompt(**asked)), picture


def check(server: Server, out: Path | None) -> list[str]:
    """Print what comes of each prompt, and return the faults."""
    known = json.loads(server.get("object_info")).keys()
    if missing := NODES - known:
        return [f"ComfyUI does not know {', '.join(sorted(missing))}."]
    print(f"{len(NODES)} nodes are registered.")
    faults = []
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for name, text, negative, weighting in PROMPTS:
        workflow["prompt"]["inputs"] |= {"text": text, "negative_text": negative, "weighting": weighting}
        entry = server.run(workflow)
        if entry["status"]["status_str"] != "success":
            faults.append(f"{name}: {_message(entry)}")
            continue
        report, picture = expected(pipe, workflow)
        drawn = server.picture(entry, "picture")
        apart = np.abs(np.asarray(drawn, np.int16) - np.asarray(picture, np.int16))
        shown = entry["outputs"]["report"]["text"][0]
        print(f"{name}: {shown.splitlines()[0]}")
        print(f"  from the pipeline's picture {apart.mean():.2f} of 255 apart in the mean, {apart.max()} at most")
        if shown != report:
            faults.append(f"{name}: the report is not the pipeline's.")
        if apart.mean() > MOST_DIFFERENCE:
            faults.append(f"{name}: the picture is not the pipeline's.")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            drawn.save(out / f"{name}_comfyui.png")
            picture.save(out / f"{name}_pipeline.png")
    workflow["text_encoders"]["inputs"]["finelip"] = "gone.safetensors"
    entry = server.run(workflow)
    message = "no error" if entry["status"]["status_str"] == "success" else _message(entry)
    print(f"A FineLIP that is not there: {message}")
    if not message.startswith("gone.safetensors does not exist"):
        faults.append("A FineLIP that is not there gets another answer than a sentence that names it.")
    return faults


def _message(entry: dict[str, Any]) -> str:
    """The error of a workflow that failed."""
    errors = [said for kind, said in entry["status"]["messages"] if kind == "execution_error"]
    return str(errors[0]["exception_message"]).strip() if errors else "no message"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI, with its main.py")
    parser.add_argument("--python", default=sys.executable, help="ComfyUI's Python (default: this one)")
    parser.add_argument("--out", type=Path, help="folder for the pictures of both")
    options = parser.parse_args(arguments)
    if not (options.comfyui / "main.py").is_file():
        parser.error(f"--comfyui {options.comfyui} has no main.py: pass the folder of ComfyUI's repository.")
    print(report_header())
    with started(options.comfyui, options.python) as server:
        faults = check(server, options.out)
    if faults:
        sys.exit("\n".join(faults))
    print("ComfyUI's pictures and reports are the pipeline's.")


if __name__ == "__main__":
    main()
