"""Speed and memory of SDXL at real size with random weights, as ratios to stock SDXL at 77 tokens in the same run.

    python benchmarks/sdxl.py
    python benchmarks/sdxl.py --device cuda --compile
    python benchmarks/sdxl.py --only operations
    python benchmarks/sdxl.py --markdown docs/results/speed.md

Nothing is downloaded. The page of `--markdown` has a part for the CPU and one for a GPU; a run writes its device's and
leaves the other as it is. Tables:

- operations: of one step of the UNet, both halves of guidance, at 1024 × 1024 pixels, counted and exact;
- encoding: of a prompt and an empty negative prompt;
- pictures: a step of the UNet, and a whole picture, from the text to its pixels; on a GPU with its peak memory, also
  with offloading and, by `--compile`, with the UNet's repeated blocks compiled;
- loading: of stock SDXL, and of the same with a FineLIP in place of its first encoder, each in a process of its own,
  until every weight is in memory.

All ways of a table take turns, so that a machine that becomes slower does so for all; ratios are medians over turns.
"""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO, cast

from finelip_sdxl.console import COUNT, Parser, number, quiet_diffusers
from finelip_sdxl.files import check_file, written_whole
from finelip_sdxl.report import command_line, most_memory, report_header

TABLES = ("operations", "encoding", "pictures", "loading")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = Parser(prog="sdxl.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--device", choices=("cpu", "cuda"), help="device to measure (default: cuda if there is one)")
    add("--only", choices=TABLES, nargs="+", default=list(TABLES), metavar="TABLE", help="tables (default: all)")
    side = number(int, least=64, most=4096)
    add("--resolution", type=side, metavar="PIXELS", help="side of pictures (default: 1024 on a GPU, else 512)")
    steps = number(int, least=2, most=1000)  # the first is not measured
    add("--steps", type=steps, metavar="N", help="steps of a picture (default: 30 on a GPU, else 2)")
    add("--turns", type=COUNT, metavar="N", help="measured turns (default: 5 on a GPU, else 1)")
    add("--compile", action="store_true", help="pictures with compiled blocks, too")
    add("--offload", action="store_true", help="on a GPU: pictures with offloading, too")
    add("--markdown", type=Path, metavar="FILE", help="page to write the tables to, beside those of the other device")
    options = flags.parse_args(arguments)
    if options.markdown is not None:
        try:
            check_file(options.markdown)
        except OSError as error:
            flags.error(str(error))
    return options


if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds
    parse()

import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from finelip_sdxl import FineLIPConfig, FineLIPModel, FineLIPSDXLPipeline
from finelip_sdxl.miniature.world import COLORS, SHAPES
from finelip_sdxl.pipelines.text_projections import cached_text_projections

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks import real_size

LENGTHS = (77, 154, 248, 496)  # tokens, with start and end
RESOLUTION = 1024  # of counted operations
GIB = 2**30
# With commas: compel's parser takes minutes for words alone. Equal windows of a call are encoded once: none are here.
PARTS_OF_TEXT = [f"a {color} {shape}," for color, shape in itertools.product(COLORS, SHAPES)]
TOKENS_OF_A_PART = 4


def text_of(tokenizer: Any, length: int) -> str:
    """A text that is padded to `length` positions: it fills all but a few of them."""
    windows = -(-length // 248)
    room = length - 2 * windows  # every window has a start and an end
    count = (room - TOKENS_OF_A_PART) // TOKENS_OF_A_PART
    text = " ".join(itertools.islice(itertools.cycle(PARTS_OF_TEXT), count))
    found = len(tokenizer(text, truncation=False, verbose=False).input_ids) - 2
    if not room - 2 * TOKENS_OF_A_PART <= found <= room:
        raise ValueError(f"A text for {length} positions has {found} tokens: a part has not {TOKENS_OF_A_PART}.")
    return text


@dataclass
class Way:
    """One way to do the same, and what was measured of it.

    Attributes:
        run: does it once and returns seconds, by what they were spent on.
        seconds: of each turn.
        peak: bytes of a GPU's memory at most.
    """

    name: str
    run: Callable[[], dict[str, float]]
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0


def take_turns(ways: Sequence[Way], turns: int, device: str) -> None:
    """Run all ways, one after the other, `turns` times, after a turn that is not counted."""
    for turn in range(turns + 1):
        for way in ways:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = way.run()
            if turn:
                way.seconds.append(seconds)
            if device == "cuda":
                way.peak = max(way.peak, torch.cuda.max_memory_allocated())


def median(way: Way, what: str) -> float:
    return statistics.median(turn[what] for turn in way.seconds)


def ratio(way: Way, other: Way, what: str) -> str:
    """The median over turns of the ratio of two ways, as a table's cell."""
    ratios = [one[what] / two[what] for one, two in zip(way.seconds, other.seconds, strict=True)]
    return f"{statistics.median(ratios):.3f}"


def timed(action: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


PARTS = {"cpu": "CPU", "cuda": "GPU"}  # headings of the page


def page(before: str, device: str, tables: str) -> str:
    """The page of results with new tables of a device. Its beginning and the other device's tables stay as they are."""
    beginning, *sections = f"\n{before}".split("\n## ")
    found = dict(section.split("\n", 1) for section in sections)
    parts = []
    for kind, heading in PARTS.items():
        missing = f"Not measured: run `python benchmarks/sdxl.py --device {kind} --markdown FILE` on such a machine."
        parts.append(f"## {heading}\n\n{(tables if kind == device else found.get(heading, missing)).strip()}\n")
    about = "# Speed\n\nRandom weights of real size; ratios are to stock SDXL at 77 positions in the same run."
    return "\n".join([f"{beginning.strip() or about}\n", *parts])


@contextmanager
def also_written(file: Path | None, device: str) -> Iterator[None]:
    """What is printed within this context goes to the page, too, once it is complete."""
    if file is None:
        yield
        return
    printed = Printed(sys.stdout)
    with redirect_stdout(cast(TextIO, printed)):
        yield
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as temporary:
        temporary.write_text(page(before, device, "".join(printed.parts)), encoding="utf-8")


class Printed:
    """A stream that keeps what it passes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.parts = stream, list[str]()

    def write(self, text: str) -> int:
        self.parts.append(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_title(*cells: str) -> None:
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


# Operations


@torch.no_grad()
def operations(length: int, has_cache: bool) -> int:
    """Floating-point operations of one step with guidance at this length of the text; with the text projection cache,
    of a step after the first."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**real_size.UNET)
        size = RESOLUTION // 8
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        states = torch.empty(2, length, unet.config.cross_attention_dim)
        inputs = torch.empty(2, 4, size, size), torch.tensor(1.0), states
        conditions = {"text_embeds": torch.empty(2, width), "time_ids": torch.empty(2, 6)}
    step = partial(unet, *inputs, added_cond_kwargs=conditions)
    if not has_cache:
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()
    with cached_text_projections([unet]):
        step()
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def print_operations() -> None:
    print_title("operations of a UNet step, 1024 × 1024, guidance", "stock", "with the text projection cache")
    stock = operations(77, has_cache=False)
    for length in LENGTHS:
        cells = [operations(length, has_cache) / stock for has_cache in (False, True)]
        print_row(f"{length} positions", *(f"{cell:.4f}" for cell in cells))
    print(f"\nStock at 77 positions: {stock / 1e12:.2f} TFLOP.")


# Encoding and pictures


class Pipelines:
    """Stock SDXL, compel on it, and ours, which share UNet and VAE."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        parts = real_size.build_pipeline(True, dtype=dtype, device=device).components
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
        self.device = device
        self.stock = StableDiffusionXLPipeline(**{name: parts[name] for name in names}, add_watermarker=False)
        self.ours = FineLIPSDXLPipeline.from_pipe(self.stock, dtype=dtype)
        self.ours.swap_text_encoders()
        self.compel = CompelForSDXL(self.stock)
        for pipe in (self.stock, self.ours):
            pipe.set_progress_bar_config(disable=True)

    def encode(self, name: str, text: str) -> dict[str, torch.Tensor]:
        """The embeddings of a text and of an empty negative, by `stock`, `compel` or `ours`."""
        if name == "compel":
            found = self.compel(text, negative_prompt="")
            return {
                "prompt_embeds": found.embeds,
                "pooled_prompt_embeds": found.pooled_embeds,
                "negative_prompt_embeds": found.negative_embeds,
                "negative_pooled_prompt_embeds": found.negative_pooled_embeds,
            }
        pipe = self.stock if name == "stock" else self.ours
        embeddings = pipe.encode_prompt(text, negative_prompt="", device=self.device)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, embeddings, strict=True))

    def draw(self, name: str, text: str, resolution: int, steps: int) -> dict[str, float]:
        """Seconds of a picture and of one of its steps, the first left out."""
        ends: list[float] = []

        def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if self.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            return {}

        pipe = self.ours if name == "ours" else self.stock

        def run() -> None:
            texts = self.encode(name, text) if name == "compel" else {"prompt": text}
            size = {"width": resolution, "height": resolution}
            pipe(**texts, **size, num_inference_steps=steps, callback_on_step_end=note)

        whole = timed(run, self.device)
        return {"picture": whole, "step": (ends[-1] - ends[0]) / (steps - 1)}


@torch.no_grad()
def print_encoding(pipes: Pipelines, turns: int) -> None:
    texts = {length: text_of(pipes.ours.tokenizer, length) for length in LENGTHS}

    def way(name: str, length: int) -> Way:
        return Way(name, lambda: {"encoding": timed(lambda: pipes.encode(name, texts[length]), pipes.device)})

    stock = way("stock", 77)
    pairs = {length: (way("ours", length), way("compel", length)) for length in LENGTHS}
    take_turns([stock, *(each for pair in pairs.values() for each in pair)], turns, pipes.device)
    print_title("encoding", "ours, s", "ours / stock at 77", "compel / stock at 77", "ours / compel")
    for length, (ours, compel) in pairs.items():
        cells = [ratio(one, other, "encoding") for one, other in ((ours, stock), (compel, stock), (ours, compel))]
        print_row(f"{length} positions", f"{median(ours, 'encoding'):.3g}", *cells)
    print(f"\nStock at 77 positions: {median(stock, 'encoding'):.3g} s.")


def picture_ways(pipes: Pipelines, resolution: int, steps: int) -> list[Way]:
    """All ways to draw, and stock at 77 positions first."""

    def run(name: str, length: int, has_cache: bool = False) -> dict[str, float]:
        if has_cache:
            pipes.ours.enable_text_projection_cache()
        try:
            return pipes.draw(name, text_of(pipes.ours.tokenizer, length), resolution, steps)
        finally:
            if has_cache:
                pipes.ours.disable_text_projection_cache()

    ways = [Way("stock, 77", partial(run, "stock", 77))]
    for length in LENGTHS:
        ways.append(Way(f"ours, {length}", partial(run, "ours", length)))
        ways.append(Way(f"ours, {length}, text projection cache", partial(run, "ours", length, True)))
        if length > 77:
            ways.append(Way(f"compel, the text of {length}", partial(run, "compel", length)))
    return ways


def print_pictures(ways: Sequence[Way], turns: int, device: str, title: str) -> None:
    take_turns(ways, turns, device)
    stock = ways[0]
    print_title(title, "step, s", "step / stock", "picture, s", "picture / stock", "peak memory, GiB")
    for way in ways:
        cells = [part for what in ("step", "picture") for part in (f"{median(way, what):.3g}", ratio(way, stock, what))]
        print_row(way.name, *cells, f"{way.peak / GIB:.2f}" if device == "cuda" else "–")


def print_compiled(pipes: Pipelines, resolution: int, steps: int, turns: int) -> None:
    """Pictures with compiled blocks, and how often they were compiled: once for each length at most."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipes.stock.unet.compile_repeated_blocks(fullgraph=True)
    ways = [way for way in picture_ways(pipes, resolution, steps) if not way.name.startswith("compel")]
    print_pictures(ways, turns, pipes.device, "pictures, UNet compiled by blocks")
    print(f"\nCompiled graphs: {torch._dynamo.utils.counters['stats']['unique_graphs']}.")


def print_offloaded(dtype: torch.dtype, resolution: int, steps: int, turns: int) -> None:
    """Pictures of a GPU with Diffusers' ways of offloading; each has pipelines of its own."""
    for how in ("model", "sequential"):
        pipes = Pipelines("cpu", dtype)
        pipes.device = "cuda"
        for pipe in (pipes.stock, pipes.ours):
            getattr(pipe, f"enable_{how}_cpu_offload")(device="cuda")
        ways = [way for way in picture_ways(pipes, resolution, steps) if not way.name.startswith("compel")]
        print_pictures(ways, turns, "cuda", f"pictures, {how} offload")
        del pipes, ways
        gc.collect()


# Loading


def write_models(folder: Path) -> None:
    """Write stock SDXL and, as a FineLIP, a text tower for its first encoder."""
    real_size.build_pipeline(True).save_pretrained(folder / "sdxl")
    with torch.device("meta"):
        config = FineLIPConfig(text_config={**real_size.CLIP_L, "max_position_embeddings": 248})
        finelip = FineLIPModel(config)
    real_size.materialize(finelip, filled=True)
    finelip.save_pretrained(folder / "finelip")


def loaded(folder: Path, has_finelip: bool) -> tuple[float, int]:
    """Seconds until every weight is in memory, and growth of the process at its peak in bytes."""
    before, started = most_memory(), time.perf_counter()
    options = {"dtype": torch.bfloat16}
    if has_finelip:
        pipe = FineLIPSDXLPipeline.from_pretrained(folder / "sdxl", folder / "finelip", **options)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(folder / "sdxl", **options)
    # Files are only mapped so far: a weight is read at its first use, such as the move to a GPU.
    for part in pipe.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.detach().aminmax()
    return time.perf_counter() - started, most_memory() - before


def print_loading(turns: int) -> None:
    found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(write_models, folder).result()
        for turn in range(turns + 1):
            for has_finelip, results in found.items():
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    result = process.submit(loaded, folder, has_finelip).result()
                if turn:  # the first fills the system's cache of files
                    results.append(result)
        encoder = sum(file.stat().st_size for file in (folder / "sdxl" / "text_encoder").iterdir())
    print_title("loading from local files, bfloat16", "seconds", "seconds / stock", "most memory, GiB")
    stock, ours = ([statistics.median(column) for column in zip(*found[key], strict=True)] for key in (False, True))
    print_row("stock SDXL", f"{stock[0]:.1f}", "1.000", f"{stock[1] / GIB:.2f}")
    print_row("ours, with a FineLIP", f"{ours[0]:.1f}", f"{ours[0] / stock[0]:.3f}", f"{ours[1] / GIB:.2f}")
    print(f"\nThe encoder that is added: {encoder / GIB:.2f} GiB.")


def main() -> None:
    arguments = parse()
    has_cuda = torch.cuda.is_available()
    device = arguments.device or ("cuda" if has_cuda else "cpu")
    on_gpu = device == "cuda"
    if on_gpu and not has_cuda:
        sys.exit("sdxl.py: error: --device cuda: this machine has no CUDA device, use --device cpu")
    if arguments.offload and not on_gpu:
        sys.exit("sdxl.py: error: --offload measures the memory of a GPU: use --device cuda")
    with also_written(arguments.markdown, device):
        print_tables(arguments, device)


def print_tables(arguments: argparse.Namespace, device: str) -> None:
    on_gpu = device == "cuda"
    resolution = arguments.resolution or (1024 if on_gpu else 512)
    steps, turns = arguments.steps or (30 if on_gpu else 2), arguments.turns or (5 if on_gpu else 1)

    quiet_diffusers()
    dtype = torch.float16 if on_gpu else torch.float32  # few CPUs compute in half precision
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    command = command_line("python benchmarks/sdxl.py", sys.argv[1:])
    print(f"{report_header(device=machine)}: `{command}`; {dtype}, pictures of {resolution} × {resolution} pixels and")
    print(f"{steps} steps with guidance, {turns} measured turn{'s' if turns > 1 else ''}")
    if "operations" in arguments.only:
        print_operations()
    if {"encoding", "pictures"} & {*arguments.only}:
        pipes = Pipelines(device, dtype)
        if "encoding" in arguments.only:
            print_encoding(pipes, max(turns, 3))
        if "pictures" in arguments.only:
            print_pictures(picture_ways(pipes, resolution, steps), turns, device, "pictures")
            if arguments.compile:
                print_compiled(pipes, resolution, steps, turns)
        del pipes
        gc.collect()
    if arguments.offload:
        print_offloaded(dtype, resolution, steps, turns)
    if "loading" in arguments.only:
        print_loading(max(turns, 3))


if __name__ == "__main__":
    main()
