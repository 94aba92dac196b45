"""Arguments by name: unknown ones are refused, options of a call hold for that call, and `help` shows all of them."""

import inspect
import math
import re
import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import finelip_sdxl.pipelines
from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.pipelines import LongPromptMixin
from finelip_sdxl.pipelines.encoder_swap import LOADING_ARGUMENTS, SAVING_ARGUMENTS
from finelip_sdxl.recommended import Recommended, record_recommended
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder

PIPELINES = [
    getattr(finelip_sdxl.pipelines, name) for name in finelip_sdxl.pipelines.__all__ if name.startswith("FineLIP")
]
WEIGHTED = "a red (fox:1.4) and a [[quiet]] hare"

# An option, and a value other than the default; and a prompt that shows it.
OPTIONS = {
    "short_prompt_encoder": ("long", SHORT),
    "hidden_states": ("last", LONG),
    "overflow": ("truncate", ENDLESS),
    "length_buckets": (None, LONG),
    "weighting": ("a1111", WEIGHTED),
    "emphasis": ("a1111", WEIGHTED),
    "conditioning_adapter_scale": (0.25, LONG),
}


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    """A pipeline with replaced encoders and an adapter, so that each option shows."""
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(make_text_encoder(32, positions=248, seed=7))
    config = pipe.text_encoder_2.config
    adapter = ConditioningAdapter(state_dims=(32, config.hidden_size), pooled_dim=config.projection_dim, hidden_dim=16)
    with torch.no_grad():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    pipe.register_modules(conditioning_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_option(pipe, name, value) -> None:
    if name == "conditioning_adapter_scale":
        pipe.set_conditioning_adapter_scale(value)
    else:
        setattr(pipe, name, value)


# Names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("conditioning_adapter_scal", "conditioning_adapter_scale"),
        ("adapter_scale", "conditioning_adapter_scale"),
        ("weightin", "weighting"),
        ("short_prompt", "short_prompt_encoder"),
        ("negativ_prompt", "negative_prompt"),
        ("steps", "num_inference_steps"),
        ("scale", "guidance_scale"),
        ("guidance", "guidance_scale"),
        ("heigth", "height"),
        ("seed", None),
    ],
)
def test_a_call_refuses_an_unknown_name(pipe, name, nearest) -> None:
    hint = rf"did you mean `{nearest}`\?" if nearest else r"help\(FineLIPSDXLPipeline.__call__\) lists its arguments"
    with pytest.raises(TypeError, match=rf"`{name}` is no argument of FineLIPSDXLPipeline.__call__: {hint}"):
        draw(pipe, SHORT, **{name: 0})


@pytest.mark.parametrize("ours", PIPELINES)
def test_every_pipeline_refuses_it_before_anything_else(ours) -> None:
    nothing_built = object.__new__(ours)
    with pytest.raises(TypeError, match=r"`overfow` is no argument of .*: did you mean `overflow`"):
        nothing_built("a red fox", overfow="error")


def test_names_that_diffusers_calls_deprecated_still_work(pipe) -> None:
    seen = []
    with pytest.warns(FutureWarning, match="callback"):
        draw(pipe, SHORT, callback=lambda step, timestep, latents: seen.append(step), callback_steps=1)
    assert seen == [0, 1]


def test_other_methods_refuse_unknown_names(pipe) -> None:
    for method in (pipe.encode_prompt, pipe.describe_prompt):
        with pytest.raises(TypeError, match=r"`weightin` is no argument of .*: did you mean `weighting`"):
            method(SHORT, weightin="a1111")
    with pytest.raises(TypeError, match=r"`hidden_states` is no argument of FineLIPSDXLPipeline.describe_prompt"):
        pipe.describe_prompt(SHORT, hidden_states="last")  # has no effect on a plan


def test_too_many_arguments_and_one_passed_twice_are_errors(pipe) -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'prompt'"):
        pipe(SHORT, prompt=SHORT)
    with pytest.raises(TypeError, match="too many positional arguments"):
        pipe(*[None] * 60)


def test_an_own_call_in_a_subclass_takes_its_own_arguments_and_the_options(pipe) -> None:
    class Mine(FineLIPSDXLPipeline):
        def __call__(self, prompt, shout=False, **kwargs) -> object:
            return super().__call__(f"{prompt} a large hare" if shout else prompt, **kwargs)

    mine = Mine(**pipe.components)
    expected = draw(pipe, f"{SHORT} a large hare", short_prompt_encoder="long")
    assert np.array_equal(draw(mine, SHORT, shout=True, short_prompt_encoder="long"), expected)
    with pytest.raises(TypeError, match=r"`shot` is no argument of Mine.__call__: did you mean `shout`"):
        draw(mine, SHORT, shot=True)


def test_a_parent_that_passes_all_arguments_on_is_no_hindrance(components) -> None:
    class Stock(StableDiffusionXLPipeline):
        def __call__(self, *args, **kwargs) -> object:
            return super().__call__(*args, **kwargs)

    class Mine(LongPromptMixin, Stock):
        pass

    mine = Mine(**components)
    assert draw(mine, SHORT, num_images_per_prompt=2).shape[0] == 2
    with pytest.raises(TypeError, match="did you mean `num_images_per_prompt`"):
        draw(mine, SHORT, num_image_per_prompt=2)


# Options


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_call_is_that_of_the_pipeline_for_this_call(pipe, name) -> None:
    value, prompt = OPTIONS[name]
    if name == "emphasis":
        pipe.weighting = "a1111"
    usual, own = draw(pipe, prompt), getattr(pipe, name)
    found, found_embeddings = draw(pipe, prompt, **{name: value}), embeddings(pipe, prompt, **{name: value})
    assert getattr(pipe, name) == own
    assert np.array_equal(draw(pipe, prompt), usual)
    set_option(pipe, name, value)
    assert np.array_equal(found, draw(pipe, prompt))
    assert torch.equal(found_embeddings, embeddings(pipe, prompt))
    assert not np.array_equal(found, usual)
    assert np.array_equal(draw(pipe, prompt, **{name: own}), usual)  # also back again


def test_a_plan_takes_options_too(pipe) -> None:
    usual = str(pipe.describe_prompt(ENDLESS))
    assert pipe.describe_prompt(ENDLESS, overflow="truncate").cut
    assert pipe.describe_prompt(LONG, length_buckets=[200]).positions == 200
    assert not any(plan.as_stock for plan in pipe.describe_prompt(SHORT, short_prompt_encoder="long").plans)
    assert "of them weighted" in str(pipe.describe_prompt(WEIGHTED, weighting="a1111"))
    with pytest.raises(ValueError, match="expected at most 248"):
        pipe.describe_prompt(ENDLESS, overflow="error")
    assert str(pipe.describe_prompt(ENDLESS)) == usual


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "sdxl"}, "`weighting` must be one of None, 'compel', 'a1111'"),
        ({"emphasis": "a1112"}, "`emphasis` must be one of 'compel', 'a1111', 'a1111_no_norm', 'comfyui'"),
        ({"emphasis": None}, "`emphasis` must be one of"),
        ({"overflow": None}, "`overflow` must be one of 'window', 'truncate', 'error'"),
        ({"hidden_states": "published"}, "`hidden_states` must be one of"),
        ({"short_prompt_encoder": True}, "`short_prompt_encoder` must be one of"),
        ({"length_buckets": 77}, "`length_buckets` must be a list"),
        ({"conditioning_adapter_scale": 2}, "expected a number from 0"),
        ({"conditioning_adapter_scale": float("nan")}, "expected a number from 0"),
        ({"conditioning_adapter_scale": None}, "expected a number from 0"),
    ],
)
def test_a_wrong_value_is_refused(pipe, options, said) -> None:
    for method in (pipe, pipe.encode_prompt):
        with pytest.raises(ValueError, match=re.escape(said)):
            method(SHORT, **options)


def test_an_option_ends_with_its_call_also_after_an_error(pipe) -> None:
    def fail(pipe, step, timestep, tensors) -> dict:
        assert (pipe.overflow, pipe.conditioning_adapter_scale) == ("truncate", 0.0)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        draw(pipe, SHORT, overflow="truncate", conditioning_adapter_scale=0, callback_on_step_end=fail)
    assert (pipe.overflow, pipe.conditioning_adapter_scale) == ("window", 1.0)


def test_an_option_changes_no_other_thread_and_no_other_pipeline(pipe) -> None:
    other = FineLIPSDXLPipeline.from_pipe(pipe)
    seen = {}

    def look(running, step, timestep, tensors) -> dict:
        seen["call"] = str(running.describe_prompt(ENDLESS))
        seen["other"] = str(other.describe_prompt(ENDLESS))
        thread = threading.Thread(target=lambda: seen.update(thread=str(running.describe_prompt(ENDLESS))))
        thread.start()
        thread.join()
        return {}

    draw(pipe, ENDLESS, overflow="truncate", callback_on_step_end=look)
    usual = str(pipe.describe_prompt(ENDLESS))
    assert seen == {"call": str(pipe.describe_prompt(ENDLESS, overflow="truncate")), "other": usual, "thread": usual}


def test_options_inside_a_call_come_on_top_of_its_own(pipe) -> None:
    seen = []

    def look(running, step, timestep, tensors) -> dict:
        plan = running.describe_prompt(ENDLESS, length_buckets=[200])
        seen.append((plan.windows, running.describe_prompt(LONG, length_buckets=[200]).positions))
        return {}

    draw(pipe, SHORT, overflow="truncate", callback_on_step_end=look)
    assert seen == [(1, 200)] * 2


def test_options_of_a_call_are_not_saved(pipe, tmp_path) -> None:
    draw(pipe, SHORT, overflow="truncate", callback_on_step_end=lambda *_: pipe.save_config(tmp_path) or {})
    assert "truncate" not in (tmp_path / "model_index.json").read_text()


# Signature and docstring


@pytest.mark.parametrize("ours", PIPELINES)
def test_signature_and_docstring_hold_every_argument(ours) -> None:
    parent = inspect.signature(ours._stock_class().__call__).parameters
    shown = inspect.signature(ours.__call__).parameters
    theirs = [name for name, parameter in parent.items() if parameter.kind is not parameter.VAR_KEYWORD]
    own = [*OPTIONS, "lora_dir", "encoder_fingerprint"]
    assert [*shown] == [*theirs, *own]
    assert all(shown[name] == parent[name] for name in theirs)
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    doc = ours.__call__.__doc__
    documented = re.findall(r"^    (\w+) \(.*:$", doc, re.MULTILINE)
    assert documented[-len(own) :] == own
    assert "prompt" in documented
    assert doc.index("\nArgs:\n") < doc.index("conditioning_adapter_scale (`float`") < doc.index("\nReturns:\n")
    assert ">>>" not in doc, "Diffusers' example is one of its own class, and needs a hub"
    assert ours.__call__.__qualname__ == f"{ours.__name__}.__call__"


@pytest.mark.parametrize("ours", PIPELINES)
def test_a_class_says_by_itself_what_it_does(ours) -> None:
    assert "Mixin" not in ours.__doc__
    assert all(f"\n    {name}: " in ours.__doc__ for name in OPTIONS if name != "conditioning_adapter_scale")


# Loading and saving


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("short_prompt_encodr", "short_prompt_encoder"),
        ("long_prompt", None),
        ("varient", "variant"),
        ("finelip_3", "finelip_2"),
        ("quantisation_config", "quantization_config"),
        ("controlnet", None),
        ("safety_checker", None),
    ],
)
def test_loading_refuses_an_unknown_name(stock_folder, name, nearest) -> None:
    expected = f"did you mean `{nearest}`" if nearest else ""
    for method in (FineLIPSDXLPipeline.from_pretrained, FineLIPSDXLPipeline.from_single_file):
        with pytest.raises(TypeError, match=f"`{name}` is no argument of FineLIPSDXLPipeline.from_.*{expected}"):
            method(stock_folder, **{name: "long"})


def test_other_doors_refuse_an_unknown_name(pipe, tmp_path) -> None:
    with pytest.raises(TypeError, match=r"`overfow` is no argument of .*from_pipe: did you mean `overflow`"):
        FineLIPSDXLPipeline.from_pipe(pipe, overfow="error")
    with pytest.raises(TypeError, match=r"`varient` is no argument of .*save_pretrained: did you mean `variant`"):
        pipe.save_pretrained(tmp_path / "saved", varient="fp16")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TypeError, match="finelip_bas"):
        pipe.swap_text_encoders(finelip_bas="miniature")


@pytest.mark.parametrize(
    ("methods", "ours"),
    [
        (
            [DiffusionPipeline.from_pretrained, DiffusionPipeline.download, FromSingleFileMixin.from_single_file],
            LOADING_ARGUMENTS,
        ),
        ([DiffusionPipeline.save_pretrained], SAVING_ARGUMENTS),
    ],
)
def test_names_that_diffusers_takes_are_known(methods, ours) -> None:
    """They stand in Diffusers' code only, where this test reads them."""
    taken = {
        name for method in methods for name in re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(method))
    }
    assert taken - {"load_safety_checker", "scaling_factor", "original_config_file"} == {*ours}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("num_inference_steps", [0, -1, 2.5, "3", True, math.nan, 10**9], "expected a whole number from 1 to 10,000"),
        ("guidance_scale", ["x", math.nan, math.inf, True], "expected a number, such as 5"),
        ("width", ["64", -8, 64.0, 10**7], "expected a whole number from 0 to 65,536"),
        ("height", [math.nan, [64]], "expected a whole number from 0 to 65,536"),
    ],
)
def test_numbers_of_a_call_are_checked(stock_folder, name, values, message) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    for value in values:
        with pytest.raises(ValueError, match=rf"`{name}` is .*; {message}"):
            pipe("a fox", **{name: value})
    with pytest.raises(ValueError, match="`num_inference_steps` is -1"):
        pipe("a fox", None, 64, 64, -1)  # by position


def test_none_stands_for_the_default_steps_and_guidance(stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    record_recommended(pipe, Recommended(steps=2, guidance_scale=1.5))
    pipe("a fox", num_inference_steps=None, guidance_scale=None, output_type="latent")
    assert (pipe.num_timesteps, pipe.guidance_scale) == (2, 1.5)


@pytest.mark.parametrize("value", [None, 3, [], b"miniature"])
def test_what_is_no_name_is_refused_in_a_sentence(value) -> None:
    with pytest.raises(TypeError, match="is no name of a model: pass a path, a hub id"):
        FineLIPSDXLPipeline.from_pretrained(value)


@pytest.mark.parametrize("value", [None, "miniature"])
def test_from_pipe_takes_pipelines_alone(value) -> None:
    with pytest.raises(TypeError, match=r"from_pipe takes a pipeline, but got .*: pass a pipeline, or a name to"):
        FineLIPSDXLPipeline.from_pipe(value)


@pytest.mark.parametrize(("name", "value"), [("dtype", "float32"), ("torch_dtype", 16), ("conditioning_adapter", 3)])
def test_arguments_of_another_type_are_named_before_anything_is_loaded(stock_folder, name, value) -> None:
    with pytest.raises(TypeError, match=rf"`{name.removeprefix('torch_')}` is .*; expected"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, **{name: value})
