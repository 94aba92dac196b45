"""Sharing a pipeline: what reaches the hub, with a card that says what it is made of. The hub is a folder here."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from finelip_sdxl import (
    ConditioningAdapter,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLPipeline,
)
from finelip_sdxl.cli.main import main
from finelip_sdxl.pipelines.export import stock_pipeline
from finelip_sdxl.pipelines.model_card import model_card
from finelip_sdxl.provenance import public_name
from tests.helpers.tiny_sdxl import make_text_encoder

SDXL, FINELIP, REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0", "zer0int/LongCLIP-L-Diffusers", "me/long-sdxl"


class Hub:
    """What stands in for huggingface_hub: repositories are folders, and uploads replace files in them."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def folder(self, repo_id: str) -> Path:
        return self.root / repo_id

    def create_repo(self, repo_id: str, **options) -> SimpleNamespace:
        self.calls.append(("create_repo", repo_id, options))
        self.folder(repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, filename: str, *, token: str | None = None) -> bool:
        return (self.folder(repo_id) / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, path_in_repo: str | None = None, **options) -> str:
        self.calls.append(("upload_folder", repo_id, options))
        shutil.copytree(folder_path, self.folder(repo_id) / (path_in_repo or ""), dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def load_card(self, repo_id: str, **options) -> ModelCard:
        file = self.folder(repo_id) / "README.md"
        if not file.exists():
            raise EntryNotFoundError("no card")
        return ModelCard(file.read_text(encoding="utf-8"))

    def card(self, repo_id: str = REPOSITORY) -> ModelCard:
        return ModelCard((self.folder(repo_id) / "README.md").read_text(encoding="utf-8"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", hub.create_repo)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", hub.upload_folder)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", hub.load_card)
    monkeypatch.setattr("finelip_sdxl.pipelines.encoder_swap.file_exists", hub.file_exists)
    return hub


@pytest.fixture
def finelip_folder(tmp_path) -> Path:
    folder = tmp_path / "my_finelip"
    make_text_encoder(32, positions=248, seed=7).save_pretrained(folder)
    return folder


def from_the_hub(pipe: FineLIPSDXLPipeline, base: str | None = SDXL, finelip: str | None = None) -> FineLIPSDXLPipeline:
    """As if base and FineLIP had been loaded from there."""
    pipe.register_to_config(_finelip_sdxl_base=base)
    if finelip is not None:
        pipe.text_encoder.config.made_from = finelip
    return pipe


def push(pipe, how: str, tmp_path: Path) -> None:
    if how == "push_to_hub":
        pipe.push_to_hub(REPOSITORY, commit_message="first", private=True, token="t")
    else:
        pipe.save_pretrained(
            tmp_path / "local", push_to_hub=True, repo_id=REPOSITORY, commit_message="first", private=True, token="t"
        )


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_what_is_shared_opens_again_and_has_a_card(hub, stock_folder, finelip_folder, tmp_path, how) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip_folder)
    push(pipe, how, tmp_path)
    assert hub.calls[0] == ("create_repo", REPOSITORY, {"private": True, "token": "t", "exist_ok": True})
    assert hub.calls[1][2] | {"token": "t", "commit_message": "first", "create_pr": False} == hub.calls[1][2]
    shared = hub.folder(REPOSITORY)
    again = FineLIPSDXLPipeline.from_pretrained(shared)
    assert torch.equal(
        again.text_encoder(torch.ones(1, 248, dtype=int))[0], pipe.text_encoder(torch.ones(1, 248, dtype=int))[0]
    )
    assert type(StableDiffusionXLPipeline.from_pretrained(shared)) is StableDiffusionXLPipeline

    text = hub.card().text
    assert text.strip().startswith("# long-sdxl")
    assert "| `text_encoder` | `my_finelip` in place of the base's; encodes 248 tokens |" in text
    assert "| `text_encoder_2` | the base's, its 77 positions stretched, not trained; encodes 248 tokens |" in text
    assert "| `stock_text_encoder` | the base's own; encodes prompts of up to 77 tokens as the base does |" in text
    assert f"| all else | as in `{Path(stock_folder).name}` |" in text
    assert f'FineLIPSDXLPipeline.from_pretrained("{REPOSITORY}", dtype=torch.float16)' in text
    assert str(tmp_path) not in text
    assert stock_folder not in text


def test_the_example_of_the_card_runs(hub, stock_folder, monkeypatch, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    push(pipe, "push_to_hub", tmp_path)
    code = hub.card().text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(hub.root)  # where the repository's id is a folder
    for real, here in (('.to("cuda")', ""), ("torch.float16", "torch.float32")):
        code = code.replace(real, here)
    code = code.replace("pipe(long_prompt)", "pipe(long_prompt, num_inference_steps=1)")
    exec(code, {"long_prompt": "A large blue square of the quiet fox. " * 40})
    assert (hub.root / "picture.png").is_file()


def test_metadata_names_what_came_from_the_hub(components, hub, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(finelip=make_text_encoder(32, positions=248, seed=7))
    push(from_the_hub(pipe, finelip=FINELIP), "push_to_hub", tmp_path)
    data = hub.card().data
    assert data.base_model == [SDXL, FINELIP]
    assert (data.license, data.license_name) == ("other", "those-of-its-parts")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert "long-prompts" in data.tags
    text = hub.card().text
    assert f"[{FINELIP}](https://huggingface.co/{FINELIP}) in place of the base's" in text
    assert f"[{SDXL}](https://huggingface.co/{SDXL}), [{FINELIP}](https://huggingface.co/{FINELIP})." in text


@pytest.mark.parametrize(("base", "license"), [(SDXL, "openrail++"), ("me/fine-tune", "other"), (None, "other")])
def test_the_license_is_the_base_s_where_nothing_else_is_in_it(components, base, license) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    assert model_card(from_the_hub(pipe, base), REPOSITORY).data.license == license
    pipe.register_modules(conditioning_adapter=ConditioningAdapter((32, 48), pooled_dim=24, hidden_dim=8))
    card = model_card(pipe, REPOSITORY)
    assert card.data.license == "other"
    assert "| `conditioning_adapter` | aligns" in card.text


def test_the_miniature_s_license_is_this_project_s() -> None:
    assert model_card(FineLIPSDXLPipeline.from_pretrained("miniature"), "me/tiny").data.license == "apache-2.0"


def test_a_card_that_is_there_stays(hub, stock_folder, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    push(pipe, "push_to_hub", tmp_path)
    own = hub.folder(REPOSITORY) / "README.md"
    own.write_text("---\nlicense: openrail++\n---\n\nWhat I say of it.\n", encoding="utf-8")
    push(pipe, "push_to_hub", tmp_path)
    assert hub.card().data.license == "openrail++"
    assert hub.card().text.strip() == "What I say of it."


def test_a_subfolder_gets_no_card(hub, stock_folder) -> None:
    FineLIPSDXLPipeline.from_pretrained(stock_folder).push_to_hub(REPOSITORY, subfolder="long")
    assert (hub.folder(REPOSITORY) / "long" / "model_index.json").is_file()
    assert not list(hub.folder(REPOSITORY).rglob("README.md"))


def test_the_base_is_remembered_through_a_folder_and_other_pipelines(components, tmp_path, finelip_folder) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(finelip=finelip_folder)
    from_the_hub(pipe).save_pretrained(tmp_path / "saved")
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path / "saved")
    for kept in (again, FineLIPSDXLImg2ImgPipeline.from_pipe(again)):
        text = model_card(kept, REPOSITORY).text
        assert f"as in [{SDXL}]" in text
        assert "`my_finelip` in place of the base's" in text


def test_a_merged_finelip_is_named_as_one(stock_folder, finelip_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(
        stock_folder, finelip_folder, finelip_merge="delta", finelip_base=stock_folder
    )
    assert "the base's, with the delta of `my_finelip` added" in model_card(pipe, REPOSITORY).text


def test_what_was_built_in_memory_has_a_card_too(components) -> None:
    unswapped = model_card(FineLIPSDXLPipeline(**components), REPOSITORY).text
    assert "| `text_encoder` | the base's; encodes 77 tokens |" in unswapped
    components |= {"text_encoder": None, "tokenizer": None}
    refiner = model_card(FineLIPSDXLPipeline(**components), REPOSITORY).text
    assert "| `text_encoder` |" not in refiner
    assert "pipe(long_prompt, image=picture)" in refiner


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (SDXL, SDXL),
        ("miniature-finelip-1", "miniature-finelip-1"),
        ("/home/me/models/sdxl/", "sdxl"),
        ("models/of mine/sdxl", "sdxl"),
        ("../me/sdxl", "sdxl"),
        ("~/sdxl.safetensors", "sdxl.safetensors"),
        ("C:\\Users\\me\\sdxl.safetensors", "sdxl.safetensors"),
        ("C:/Users/sdxl.safetensors", "sdxl.safetensors"),
        ("\\\\server\\me\\sdxl\\", "sdxl"),
        ("file:///home/me/sdxl.safetensors", "sdxl.safetensors"),
        ("a" * 5000, "a" * 5000),
        ("https://huggingface.co/me/x/blob/main/x.safetensors", "https://huggingface.co/me/x/blob/main/x.safetensors"),
        ("HTTPS://me:secret@example.com/x?token=secret#secret", "HTTPS://example.com/x"),
    ],
)
def test_names_say_nothing_of_where_things_are(source, name) -> None:
    assert public_name(source) == name
    assert public_name(name) == name


def test_what_is_on_this_machine_has_its_last_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "secret" / "finelip").mkdir(parents=True)
    (tmp_path / "link").symlink_to("secret/finelip")
    monkeypatch.chdir(tmp_path / "secret")
    for source in (
        tmp_path / "secret" / "finelip",
        Path("finelip"),
        "./finelip",
        "../link",
        "finelip/.",
        "../secret/finelip",
    ):
        assert public_name(source) == "finelip"
    assert public_name(".") == "secret"


def texts(folder: Path) -> str:
    """All that a folder says in words, the headers of its weights included."""
    said = []
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            size = int.from_bytes(content[:8], "little") + 8 if file.suffix == ".safetensors" else len(content)
            said.append(content[:size].decode(errors="replace"))
    return "\n".join(said)


@pytest.mark.parametrize("how", ["save", "push", "export", "export again", "comfyui", "convert"])
def test_nothing_that_is_saved_says_where_it_was(hub, session_components, tmp_path, monkeypatch, how) -> None:
    """Nor where those worked who made what it was made from."""
    home = tmp_path / "home" / "me"
    base, finelip, control, adapter = (home / name for name in ("sdxl", "finelip", "control", "adapter"))
    StableDiffusionXLPipeline(**session_components).save_pretrained(base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_finelip_sdxl_base": "C:\\Users\\you\\base"}))
    encoder = make_text_encoder(32, positions=248, seed=7)
    encoder.config.made_from = "/Users/you/clip"
    encoder.save_pretrained(finelip)
    ConditioningAdapter((32, 48), pooled_dim=24, hidden_dim=4).save_pretrained(adapter)
    monkeypatch.setenv("HOME", str(home))
    out = tmp_path / "out"
    options = ["--finelip", str(finelip)]
    if how == "convert":
        assert main(["convert", str(base), str(out), *options, "--conditioning-adapter", str(adapter)]) == 0
    elif how == "comfyui":
        assert main(["export", str(base), str(out), *options, "--format", "comfyui"]) == 0
    elif how == "export":
        assert main(["export", str(base), str(out), *options]) == 0
    else:
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        ControlNetModel.from_unet(unet).save_pretrained(control)
        controls = [ControlNetModel.from_pretrained(control), ControlNetModel.from_pretrained(control)]
        pipe = FineLIPSDXLControlNetPipeline.from_pretrained(
            base, finelip, unet=unet, controlnet=controls, conditioning_adapter=adapter
        )
        if how == "save":
            pipe.save_pretrained(out)
        elif how == "push":
            pipe.push_to_hub(REPOSITORY)
            out = hub.folder(REPOSITORY)
        else:
            stock_pipeline(pipe).save_pretrained(out)
    said = texts(out)
    assert len(said) > 1000
    for place in (str(tmp_path), "home", "Users", "you"):
        assert place not in said
    if how == "save":
        assert json.loads((out / "unet" / "config.json").read_text())["_name_or_path"] == "unet"


def test_weights_that_are_saved_are_as_readable_as_their_configs(session_components, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline(**session_components)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").touch(mode=0o600)
    pipe.save_pretrained(tmp_path)
    modes = {file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "loras"}
    assert modes == {(tmp_path / "model_index.json").stat().st_mode}
    assert (tmp_path / "loras" / "a.safetensors").stat().st_mode & 0o777 == 0o600, "somebody's own"


# What a folder or a config may be called, and what would follow if that were no text.
NAMES = [
    "a | b",
    "`a`",
    "``` a",
    "<img src=https://example.com/a.png>",
    "[a](https://example.com)",
    "![a](https://example.com/a.png)",
    "a\n\n# Heading\n---\nlicense: mit",
    "<!-- a",
    "*a* _b_ ~c~ $d$",
    "&lt;script&gt;",
    "a\u202eb\u2028c",
    "\udcff",
    "https://example.com/<b>",
]


@pytest.mark.parametrize("where", ["base", "finelip", "merged", "rows"])
@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_card_are_text(session_components, name, where) -> None:
    def card(name: str) -> str:
        pipe = FineLIPSDXLPipeline(**session_components | {"text_encoder": make_text_encoder(32, positions=248)})
        if where == "base":
            pipe.register_to_config(_finelip_sdxl_base=name)
        else:
            key = {"finelip": "made_from", "merged": "merged_with", "rows": "stretched_from"}[where]
            setattr(pipe.text_encoder.config, key, name)
        return model_card(pipe, REPOSITORY).content

    odd, plain = card(name), card("plain")
    odd.encode()
    assert odd.count("\n") == plain.count("\n")
    assert odd.split("---")[1] == plain.split("---")[1], "the metadata"
    for mark in ("|", "`", "<", "]", "[", "![", "*", "$", "~"):
        assert odd.count(mark) <= plain.count(mark)
    first = re.search(r"[a-zA-Z]", name)
    assert first is None or first[0] in odd


@pytest.mark.parametrize("repo_id", ["me/a|b", 'me/a"); import os', "me/<img>", "me/a\nb", "me/a/b", "", "`a`"])
def test_a_repository_that_the_hub_cannot_have_gets_no_card(session_components, repo_id) -> None:
    with pytest.raises(ValueError, match=r"[Rr]epo id"):
        model_card(FineLIPSDXLPipeline(**session_components), repo_id)
