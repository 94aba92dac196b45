"""Sharing a pipeline: what reaches the hub, with a card that says what it is made of. The hub is a folder here."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_text_encoder
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.model_card import model_card, public_name

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
    monkeypatch.setattr("finelip_sdxl.pipelines.loading.file_exists", hub.file_exists)
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
    assert "| `text_encoder` | `my_finelip` in place of the base's; reads 248 tokens |" in text
    assert "| `text_encoder_2` | the base's, its 77 positions stretched, not trained; reads 248 tokens |" in text
    assert "| `stock_text_encoder` | the base's own; reads prompts of up to 77 tokens as the base does |" in text
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
    assert "the base's, with what `my_finelip` has learned added" in model_card(pipe, REPOSITORY).text


def test_what_was_built_in_memory_has_a_card_too(components) -> None:
    unswapped = model_card(FineLIPSDXLPipeline(**components), REPOSITORY).text
    assert "| `text_encoder` | the base's; reads 77 tokens |" in unswapped
    components |= {"text_encoder": None, "tokenizer": None}
    refiner = model_card(FineLIPSDXLPipeline(**components), REPOSITORY).text
    assert "| `text_encoder` |" not in refiner
    assert "pipe(long_prompt, image=picture)" in refiner


def test_paths_of_this_machine_are_not_shared(tmp_path) -> None:
    (tmp_path / "secret" / "finelip").mkdir(parents=True)
    assert public_name(tmp_path / "secret" / "finelip") == "finelip"
    assert public_name("https://huggingface.co/me/x/blob/main/x.safetensors").startswith("https://")
    assert public_name(SDXL) == SDXL
