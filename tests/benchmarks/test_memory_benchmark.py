"""The benchmark of memory: what it counts at real size is what hooks really load, seen at tiny size."""

from collections.abc import Callable, Iterable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.hooks.group_offloading import ModuleGroup

from benchmarks import memory, real_size
from tests.helpers import tiny_sdxl
from tests.helpers.tiny_benchmarks import make_tiny


class Ledger:
    """Stands in for a GPU's memory: which weights hooks have on the accelerator, and how many bytes at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: dict[Any, int] = {}
        self.peak = 0
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        for owner, method, note in (
            (CpuOffload, "pre_forward", self.load_model),
            (CpuOffload, "init_hook", lambda hook, model: self.unload(model)),
            (AlignDevicesHook, "pre_forward", self.load_layer),
            (AlignDevicesHook, "post_forward", lambda hook, layer, output: self.unload(layer)),
            (ModuleGroup, "onload_", self.load_group),
            (ModuleGroup, "offload_", self.unload),
        ):
            monkeypatch.setattr(owner, method, self.watched(getattr(owner, method), note))

    def watched(self, method: Callable, note: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            note(*args)
            return result

        return call

    def load_model(self, hook: CpuOffload, model: torch.nn.Module, *args: Any) -> None:
        if hook.prev_module_hook is not None:  # accelerate does so with what is not on the CPU
            self.unload(hook.prev_module_hook.model)
        self.load(model, model.parameters())

    def load_layer(self, hook: AlignDevicesHook, layer: torch.nn.Module, *args: Any) -> None:
        if hook.offload:
            self.load(layer, layer.parameters(recurse=False))

    def load_group(self, group: ModuleGroup) -> None:
        self.load(group, [weight for module in group.modules for weight in module.parameters()] + group.parameters)

    def load(self, what: Any, weights: Iterable[torch.Tensor]) -> None:
        sizes = {id(weight): weight.numel() * weight.element_size() for weight in weights}
        self.loaded[what] = sum(sizes.values())
        self.peak = max(self.peak, sum(self.loaded.values()))

    def unload(self, what: Any) -> None:
        self.loaded.pop(what, None)

    def reset(self) -> None:
        assert not any(self.loaded.values())  # nothing stays from the phase before
        self.peak = 0


@pytest.fixture
def tiny(monkeypatch) -> None:
    make_tiny(monkeypatch)
    for name in ("CLIP_L", "BIG_G"):
        monkeypatch.setattr(memory, name, getattr(tiny_sdxl, name))


def test_the_parts_are_those_of_sdxl() -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**real_size.UNET), AutoencoderKL(**real_size.VAE)
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863


def test_what_a_pipeline_holds(tiny) -> None:
    sizes = {name: memory.total(build(False)) for name, build in memory.contents().items()}
    stock, stretched, *replaced, fullest = sizes.values()
    rows = 248 - 77
    assert stretched == stock + rows * (16 + 24) * 2  # bfloat16
    pipe = real_size.build_pipeline(False)
    one, two = (sum(2 * weight.numel() for weight in getattr(pipe, name).parameters()) for name in memory.ENCODERS)
    assert replaced == [stretched + one, stretched, stretched + one + two, stretched]
    assert fullest > replaced[2]


@pytest.mark.parametrize("how", memory.OFFLOADS[1:])
def test_what_is_counted_is_what_hooks_load(tiny, monkeypatch, how) -> None:
    build = memory.contents()[memory.FULLEST]
    expected = memory.counted(build(False), how)
    ledger = Ledger(monkeypatch)
    # Diffusers says "cpu:0" for the CPU, which accelerate takes for another device than that of the weights.
    offload, cpu = accelerate.cpu_offload, torch.device("cpu")
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: offload(model, cpu, **options))
    assert memory.measured(build(True), how, "cpu", 64) == expected
    assert ledger.peak > 0


def test_offloads_keep_less_and_less(tiny) -> None:
    pipe = memory.contents()[memory.FULLEST](False)
    none, model, blocks, layers, sequential = (memory.counted(pipe, how) for how in memory.OFFLOADS)
    assert none == [memory.total(pipe)] * 3
    for kept, less in ((none, model), (blocks, layers)):
        assert all(first > second for first, second in zip(kept, less, strict=True))
    assert model[1] > blocks[1]
    assert layers == sequential


def test_the_table_is_printed(tiny, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["memory.py", "--device", "cpu", "--only", "pipelines"])
    memory.main()
    _, _, title, line, *rows = capsys.readouterr().out.splitlines()
    assert "weights alone, counted" in title
    assert len(rows) == 11
    assert {row.count("|") for row in (title, line, *rows)} == {7}


def test_the_swap_is_measured(tiny, monkeypatch, tmp_path) -> None:
    image = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(memory, "VIT_L", {**image, "patch_size": 32})
    memory.write_checkpoints(tmp_path)
    grown, seconds = memory.measured_swap(tmp_path, tuple(memory.ENCODERS))
    assert grown >= 0
    assert seconds > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", memory.OFFLOADS)
def test_a_gpu_s_memory_is_measured(tiny, how) -> None:
    pipe = memory.contents()[memory.FULLEST](True)
    assert all(
        peak >= weights
        for peak, weights in zip(memory.measured(pipe, how, "cuda", 64), memory.counted(pipe, how), strict=True)
    )
