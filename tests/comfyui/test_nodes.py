"""ComfyUI's nodes as functions: conditionings are the pipeline's embeddings bit for bit, and errors are sentences."""

import importlib.util
import inspect
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.pipelines.export import save_comfyui, stock_pipeline
from finelip_sdxl.prompts.plan import empty_row, tokenize
from finelip_sdxl.prompts.vocabulary import clip_tokenizer
from finelip_sdxl.text_encoders import num_positions, stretch_text_encoder, text_encoder_tensors
from tests.helpers.comfy_stand_in import Clip
from tests.helpers.documents import REPOSITORY

FOLDER = REPOSITORY / "comfyui"
SENTENCE = "A large red star is in the top left. "
SHORT, LONG, ENDLESS = SENTENCE, SENTENCE * 20, SENTENCE * 40
# Weights of another file lie otherwise in memory, and the processor adds in another order.
FROM_FILE = 1e-5
LENGTHS = pytest.mark.parametrize(("text", "positions"), [(SHORT, 77), (LONG, 248), (ENDLESS, 496)])


@pytest.fixture(scope="module")
def miniature() -> FineLIPSDXLPipeline:
    return FineLIPSDXLPipeline.from_pretrained("miniature", unet=None, vae=None)


@pytest.fixture(scope="module")
def real_vocabulary() -> dict:
    """Text encoders of a tiny SDXL with CLIP's own vocabulary, as a checkpoint for ComfyUI has."""
    tiny = {"num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 64, "intermediate_size": 64}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "initializer_factor": 20.0}
    torch.manual_seed(0)
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**tiny, **ids)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**tiny, **ids, projection_dim=64)).eval(),
    }


def make_clip(encoders: dict) -> Clip:
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return Clip({names[name]: text_encoder_tensors(encoder) for name, encoder in encoders.items()})


def make_pipe(encoders: dict) -> FineLIPSDXLPipeline:
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    return FineLIPSDXLPipeline(**encoders, **tokenizers, vae=None, unet=None, scheduler=None)


def assert_encodes_as(conditionings: tuple, expected, rounding: float = 0) -> None:
    """The outputs of the encoding node are a `Conditioning`'s, bit for bit or but for rounding."""
    positive, negative, report = conditionings
    pairs = [
        (positive[0][0], expected.prompt_embeds),
        (negative[0][0], expected.negative_prompt_embeds),
        (positive[0][1]["pooled_output"], expected.pooled_prompt_embeds),
        (negative[0][1]["pooled_output"], expected.negative_pooled_prompt_embeds),
    ]
    assert all(torch.allclose(found, wanted, rtol=rounding, atol=rounding) for found, wanted in pairs)
    assert report == expected.report


# What ComfyUI sees


@pytest.mark.parametrize("name", ["LoadTextEncoders", "EncodePrompt", "LoadMiniature"])
def test_the_inputs_of_a_node_are_its_arguments_and_have_their_defaults(nodes, name) -> None:
    node = getattr(nodes, name)
    inputs = {name: given for kind in node.INPUT_TYPES().values() for name, given in kind.items()}
    arguments = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
    del arguments["self"]
    if arguments.pop("sizes", None):
        sizes = {name for name in inputs if name.endswith(("width", "height", "_w", "_h"))}
        assert all(inputs.pop(name)[1]["default"] == 0 for name in sizes)
    assert inputs.keys() == arguments.keys()
    for argument, given in inputs.items():
        default = (given[1] if len(given) > 1 else {}).get("default", inspect.Parameter.empty)
        assert default == arguments[argument].default or arguments[argument].default is None
    assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))


def load_as_comfyui() -> object:
    """The folder as ComfyUI imports it: by its path, which is its name, too."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            del sys.modules[loaded]
    return module


def test_the_folder_is_loaded_by_its_path(comfy) -> None:
    module = load_as_comfyui()
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert all(name.startswith("FineLIP") for name in module.NODE_CLASS_MAPPINGS)


def test_without_the_package_one_sentence_says_so_and_there_are_no_nodes(monkeypatch, caplog) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module = load_as_comfyui()
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "pip install" in caplog.text


def test_the_example_workflow_names_nodes_and_inputs_that_exist(nodes) -> None:
    workflow = json.loads((REPOSITORY / "examples" / "comfyui_workflow.json").read_text(encoding="utf-8"))
    ours = [step for step in workflow.values() if step["class_type"].startswith("FineLIP")]
    assert len(ours) == 3
    for step in ours:
        node = getattr(nodes, step["class_type"].removeprefix("FineLIP"))
        inputs = {name: given for kind in node.INPUT_TYPES().values() for name, given in kind.items()}
        assert step["inputs"].keys() <= inputs.keys()
        for name, value in step["inputs"].items():
            assert not isinstance(inputs[name][0], list) or value in inputs[name][0]
    assert workflow["report"]["inputs"]["source"] == ["prompt", nodes.EncodePrompt.RETURN_NAMES.index("report")]


# Encoding


@LENGTHS
def test_a_conditioning_is_the_pipelines_embeddings(nodes, miniature, text, positions) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(sdxl="miniature")
    outputs = nodes.EncodePrompt().encode(encoders, text, "A blue ring.", weighting="none")
    assert_encodes_as(outputs, miniature.encode(text, negative_prompt="A blue ring."))
    positive, negative, report = outputs
    assert positive[0][0].shape[1] == negative[0][0].shape[1] == positions
    assert report == str(miniature.describe_prompt(text, negative_prompt="A blue ring."))


@pytest.mark.parametrize(
    ("syntax", "effect", "text"),
    [("a1111", "comfyui", "A (red:1.3) star."), ("a1111", "a1111", "A (red:1.3) star."), ("compel", "compel", "red+")],
)
def test_weights_are_those_of_the_pipeline(nodes, miniature, syntax, effect, text) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(sdxl="miniature")
    outputs = nodes.EncodePrompt().encode(encoders, text, weighting=syntax, emphasis=effect)
    expected = miniature.encode(text, negative_prompt="", weighting=syntax, emphasis=effect)
    assert_encodes_as(outputs, expected)
    assert "1 of them weighted" in outputs[2]


def test_the_adapter_has_its_scale(nodes, miniature) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(sdxl="miniature")
    options = {"conditioning_adapter_scale": 0.0}
    outputs = nodes.EncodePrompt().encode(encoders, LONG, weighting="none", **options)
    assert_encodes_as(outputs, miniature.encode(LONG, negative_prompt="", **options))
    assert not torch.equal(outputs[0][0][0], miniature.encode(LONG, negative_prompt="").prompt_embeds)


def test_sizes_go_by_comfyuis_names_and_a_zero_is_left_to_it(nodes) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(sdxl="miniature")
    sizes = {"width": 1024, "height": 768, "crop_w": 0, "crop_h": 8, "target_width": 0, "target_height": 0}
    for conditioning in nodes.EncodePrompt().encode(encoders, SHORT, **sizes)[:2]:
        found = {name: size for name, size in conditioning[0][1].items() if name != "pooled_output"}
        assert found == {"width": 1024, "height": 768, "crop_h": 8}


def test_comfyui_loads_all_models_in_full_before_they_encode(nodes, comfy) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(sdxl="miniature")
    assert comfy.loaded == []
    nodes.EncodePrompt().encode(encoders, SHORT)
    (((container,), options),) = comfy.loaded
    assert options == {"force_full_load": True}
    names = {name for name, part in encoders.pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert dict(container.named_children()).keys() == names >= {"text_encoder", "conditioning_adapter"}


# Loading


def test_a_plain_export_and_the_adapter_that_it_left_out_make_the_pipeline_again(nodes, miniature, tmp_path) -> None:
    whole = FineLIPSDXLPipeline.from_pretrained("miniature", short_prompt_encoder="long")
    stock_pipeline(whole).save_pretrained(tmp_path / "plain")
    whole.conditioning_adapter.save_pretrained(tmp_path / "adapter")
    (encoders,) = nodes.LoadTextEncoders().load(
        sdxl=str(tmp_path / "plain"), conditioning_adapter=f'"{tmp_path / "adapter"}"'
    )
    outputs = nodes.EncodePrompt().encode(encoders, LONG, weighting="none")
    assert_encodes_as(outputs, miniature.encode(LONG, negative_prompt=""), rounding=FROM_FILE)


@LENGTHS
def test_the_clip_of_a_checkpoint_is_stretched(nodes, real_vocabulary, text, positions, caplog) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(clip=make_clip(real_vocabulary))
    assert "stretched to 248 positions but not trained" in caplog.text
    expected = make_pipe(real_vocabulary)
    expected.swap_text_encoders()
    outputs = nodes.EncodePrompt().encode(encoders, text, weighting="none")
    assert_encodes_as(outputs, expected.encode(text, negative_prompt=""))
    assert outputs[0][0][0].shape[1] == positions
    assert ("as stock SDXL encodes it" in outputs[2]) == (positions == 77)


def test_an_exclamation_mark_is_a_word_with_a_clip_as_in_comfyui(nodes, real_vocabulary) -> None:
    (encoders,) = nodes.LoadTextEncoders().load(clip=make_clip(real_vocabulary))
    for tokenizer, padding in ((encoders.pipe.tokenizer, 49407), (encoders.pipe.tokenizer_2, 0)):
        assert tokenize(tokenizer, "wow!")[0] == [2781, 256]
        assert empty_row(tokenizer, 4) == [49406, 49407, padding, padding]


def test_finelips_of_comfyuis_folder_replace_the_encoders_of_a_clip(nodes, real_vocabulary, tmp_path) -> None:
    new = make_pipe({name: stretch_text_encoder(encoder) for name, encoder in real_vocabulary.items()})
    for encoder in (new.text_encoder, new.text_encoder_2):
        torch.nn.init.normal_(next(encoder.parameters()))
    folder = tmp_path / "models" / "text_encoders"
    folder.mkdir(parents=True)
    save_comfyui(new, folder)
    torch.manual_seed(1)
    adapter = ConditioningAdapter(state_dims=(64, 64), pooled_dim=64, hidden_dim=8)
    for layer in (*(part[-1] for part in adapter.states), adapter.pooled[-1]):
        torch.nn.init.normal_(layer.weight)
    adapter.save_pretrained(folder / "adapter")
    (encoders,) = nodes.LoadTextEncoders().load(
        clip=make_clip(real_vocabulary),
        finelip="clip_l.safetensors",
        finelip_2="clip_g.safetensors",
        conditioning_adapter="adapter",
    )
    expected = make_pipe(real_vocabulary)
    expected.swap_text_encoders(new.text_encoder, new.text_encoder_2)
    expected.register_modules(conditioning_adapter=adapter)
    for text in (SHORT, LONG):
        outputs = nodes.EncodePrompt().encode(encoders, text, weighting="none")
        assert_encodes_as(outputs, expected.encode(text, negative_prompt=""), rounding=FROM_FILE)


def test_a_clip_of_248_positions_stays_as_it_is(nodes, real_vocabulary, caplog) -> None:
    longer = {name: stretch_text_encoder(encoder) for name, encoder in real_vocabulary.items()}
    (encoders,) = nodes.LoadTextEncoders().load(clip=make_clip(longer))
    assert num_positions(encoders.pipe.text_encoder) == 248
    assert "stretched" not in caplog.text


# Faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"there is neither: connect the CLIP"),
        ({"sdxl": ' "" '}, r"there is neither"),
        ({"sdxl": "miniature", "clip": Clip({})}, r"there are both"),
        ({"clip": Clip({"clip_l": {"text_model.x": torch.zeros(1)}})}, r"^This CLIP is not an SDXL's"),
        ({"sdxl": "/gone"}, r"^/gone does not exist: pass"),
        ({"sdxl": "miniature", "finelip": "gone.pt"}, r"^gone\.pt does not exist: pass"),
        ({"sdxl": "miniature", "conditioning_adapter": "/gone"}, r"^/gone does not exist: pass"),
        ({"sdxl": __file__}, r"is a single file: load it with Load Checkpoint"),
    ],
)
def test_a_fault_is_one_sentence(nodes, arguments, message) -> None:
    with pytest.raises((OSError, ValueError), match=message) as raised:
        nodes.LoadTextEncoders().load(**arguments)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_sdxl_is_refused(nodes, real_vocabulary) -> None:
    with pytest.raises(ValueError, match="this SDXL's are 64, 64, 64: use it with the SDXL that it was trained on"):
        nodes.LoadTextEncoders().load(clip=make_clip(real_vocabulary), conditioning_adapter="miniature")


def test_an_empty_folder_is_named(nodes, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json"):
        nodes.LoadTextEncoders().load(sdxl=str(tmp_path))
