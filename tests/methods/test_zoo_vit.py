"""The embedded ViT's script, end to end on two classes of coloured squares, and what its recipe is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from models import runtime, teachers
from models.data import augment
from models.data.images import MEAN, STD
from models.runtime import generator
from models.teachers import TEACHERS, TeacherSpec
from models.zoo import pictures, train_vit, vit_network, vit_targets, vit_training
from models.zoo.command import PausedError
from models.zoo.pictures import Pictures
from models.zoo.train_vit import BUDGETS
from models.zoo.vit_targets import TEACHER_SIZE

CLASSES = ("fire_truck", "frog")
TOY = BUDGETS["toy"]


@pytest.fixture(scope="module", autouse=True)
def number_format() -> Iterator[None]:
    """The command turns bfloat16 on for its process, which here is that of other tests, too."""
    yield
    runtime.use_bfloat16_on_cpu(False)


def draw_squares(root: Path, each: int, seed: int) -> Path:
    """A folder of class folders: a red or a green square somewhere on noise."""
    random = np.random.default_rng(seed)
    for colour, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 60, (32, 32, 3))
            left, top = random.integers(2, 12, 2)
            pixels[top : top + 18, left : left + 18, colour] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_squares(tmp_path_factory.mktemp("data") / "train", each=20, seed=0)


@pytest.fixture(scope="module")
def unseen_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_squares(tmp_path_factory.mktemp("data") / "test", each=6, seed=1)


@pytest.fixture(scope="module")
def trained(data: Path, unseen_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command."""
    out = tmp_path_factory.mktemp("trained") / "vit"
    arguments = ["--data", str(data), "--test", str(unseen_data), "--out", str(out), "--budget", "toy"]
    assert train_vit.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def squares(data: Path) -> Pictures:
    return pictures.read([data], vit_network.SIZE)


def a_spec(folder: Path) -> TeacherSpec:
    return TEACHERS["embedded_vit"].model_copy(
        update={"source": str(folder), "embedding_dim": TOY.width, "kind": "timm", "revision": None}
    )


def test_the_command_writes_a_float16_folder_and_a_card_with_the_accuracy_on_unseen_images(
    trained: Path,
) -> None:
    assert {path.name for path in trained.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    tensors = load_file(trained / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert not [name for name in tensors if "to_maps" in name or "to_features" in name]
    card = (trained / "README.md").read_text()
    assert "| fire_truck | 20 |" in card
    assert "40 images in 2 classes" in card
    assert "EfficientNet-Lite0" in card
    assert "on 12 images that it has not seen: 100.0% right by its head, 100.0% by a linear probe" in card


def test_the_folder_serves_as_a_teacher_whose_features_tell_the_classes_apart(
    trained: Path, unseen_data: Path
) -> None:
    assert teachers.availability(a_spec(trained)).available
    teacher = teachers.load(a_spec(trained))
    assert (teacher.input_size, teacher.mean, teacher.std) == (32, MEAN, STD)
    unseen = pictures.read([unseen_data], 32)
    features = torch.nn.functional.normalize(teacher.embed(unseen.pixels / 255), dim=1)
    assert features.shape == (12, TOY.width)
    likeness = features @ features.T
    same = unseen.labels[:, None] == unseen.labels
    assert likeness[same].mean() > likeness[~same].mean() + 0.1
    assert len(teacher.network.blocks) == TOY.depth  # type: ignore[arg-type]


def test_timm_itself_loads_the_folder_with_the_head(trained: Path, unseen_data: Path) -> None:
    network = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    assert isinstance(network, VisionTransformer)
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    unseen = pictures.read([unseen_data], 32)
    normal = (unseen.pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(network(normal).argmax(1), unseen.labels)


def test_a_run_that_was_stopped_again_and_again_gives_the_weights_of_one_that_was_not(
    data: Path, tmp_path: Path
) -> None:
    budget = replace(TOY, steps=4, whole_from=0.5, cutmix=0.5)
    train_vit.train([data], tmp_path / "whole", tmp_path / "whole.work", budget, device="cpu")
    pauses = 0
    while not (tmp_path / "parts" / "config.json").exists():
        try:
            train_vit.train(
                [data], tmp_path / "parts", tmp_path / "parts.work", budget, device="cpu", deadline=0.0
            )
        except PausedError:
            pauses += 1
    assert pauses == 3  # after every step that is not the last
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_the_teachers_answers_are_kept_chunk_by_chunk(squares: Pictures, tmp_path: Path) -> None:
    teacher = teachers.load(TEACHERS["efficientnet_lite0"], input_size=TEACHER_SIZE)

    def make(folder: str, chunk: int, deadline: float) -> vit_targets.Targets:
        return vit_targets.make(
            teacher, squares, 8, tmp_path / folder, seed=0, deadline=deadline, say=str, chunk=chunk
        )

    for done in (16, 32):
        with pytest.raises(PausedError, match=f"after {done} images"):
            make("parts", 16, deadline=0.0)
    parts, whole = make("parts", 16, deadline=0.0), make("whole", 100, deadline=float("inf"))
    assert torch.allclose(parts.features, whole.features, atol=0.01)
    assert torch.allclose(parts.maps, whole.maps, atol=0.02)
    assert float(whole.features.float().square().mean()) == pytest.approx(1, rel=0.01)
    assert float(whole.maps.float().square().mean()) == pytest.approx(1, rel=0.01)
    assert torch.equal(whole.answers.argmax(1), squares.labels)


def test_each_place_of_a_map_is_what_the_teacher_sees_at_that_patch(squares: Pictures) -> None:
    teacher = teachers.load(TEACHERS["efficientnet_lite0"], input_size=TEACHER_SIZE)
    _, maps = vit_targets.look(teacher, squares.pixels[:1])
    changed = squares.pixels[:1].clone()
    changed[..., 4:8, 24:28] = 255  # the patch in row 1, column 6
    _, others = vit_targets.look(teacher, changed)
    fine = (others - maps)[0, :-320].abs().mean(0)  # Lite0's last stage has 320 channels
    row, column = divmod(int(fine.argmax()), vit_network.GRID)
    assert abs(row - 1) <= 1
    assert abs(column - 6) <= 1


def test_principal_components_keep_the_variance_of_maps_of_low_rank() -> None:
    latent = torch.randn(50, 3, 8, 8, generator=generator(1))
    mixing = torch.randn(20, 3, generator=generator(2))
    maps = torch.einsum("nkhw,ck->nchw", latent, mixing) + 5
    axes = vit_targets.basis(maps, 3)
    seen = vit_targets.project(maps, axes).permute(0, 2, 3, 1).flatten(0, 2)
    assert float(seen.square().mean()) == pytest.approx(1, rel=1e-3)
    covariance = seen.T.cov()
    assert torch.allclose(covariance, covariance.diag().diag(), atol=1e-3)
    # Three components say all of the twenty channels.
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    rows = rows - rows.mean(0)
    left = rows - seen @ torch.linalg.lstsq(seen, rows).solution
    assert float(left.square().mean() / rows.square().mean()) < 1e-5


def test_tokens_of_chosen_patches_are_those_of_an_image_that_has_no_others() -> None:
    network = vit_network.build(TOY, 2, seed=0).eval()
    images = torch.randn(2, 3, 32, 32, generator=generator(3))
    every = torch.arange(64).expand(2, -1)
    with torch.no_grad():
        assert torch.allclose(
            vit_network.tokens(network, images), network.forward_features(images), atol=1e-6
        )
        assert torch.allclose(
            vit_network.tokens(network, images, every), network.forward_features(images), atol=1e-5
        )
        kept = torch.tensor([[3, 40, 9], [0, 63, 5]])
        hidden = images.clone()
        hidden[0, :, 0:4, 16:20] = 9.0  # patch 4 of the first image, which is not kept
        some = vit_network.tokens(network, images, kept)
        assert some.shape == (2, 4, TOY.width)
        assert torch.equal(some, vit_network.tokens(network, hidden, kept))


def test_attention_starts_near_the_identity_and_values_near_its_negative() -> None:
    width = 192
    network = vit_network.build(replace(BUDGETS["cpu"], depth=1), 10, seed=0)
    attention = network.blocks[0].attn
    queries, keys, values = attention.qkv.weight.detach().view(3, width, width)
    product = values.T @ attention.proj.weight.detach().T
    assert float(product.diag().mean()) == pytest.approx(-0.4, abs=0.02)
    assert float((product - product.diag().diag()).std()) == pytest.approx(0.4 / width**0.5, rel=0.05)
    for head in torch.arange(width).view(3, 64):
        # The best approximation of rank 64 keeps a third of the directions.
        assert 0.7 / 3 < float((queries[head].T @ keys[head]).diag().mean()) < 0.7


def test_near_patches_have_like_positions() -> None:
    places = torch.nn.functional.normalize(vit_network.positions(192), dim=1).view(8, 8, -1)
    likeness = (places * places[3, 3]).sum(-1)
    assert likeness[3].tolist() == pytest.approx(likeness[:, 3].tolist(), abs=1e-5)  # rows as columns
    assert float(likeness[3, 3]) > float(likeness[3, 4]) > float(likeness[3, 5]) > float(likeness[4, 5])


def test_every_image_comes_once_before_any_comes_again() -> None:
    rows = torch.cat([vit_training.rows_at(step, 16, 40, seed=0) for step in range(5)])
    assert sorted(rows[:40].tolist()) == sorted(rows[40:].tolist()) == list(range(40))
    assert rows[:40].tolist() != rows[40:].tolist()


def test_patches_are_dropped_first_and_all_shown_last() -> None:
    budget = replace(TOY, steps=10, kept=0.25, whole_from=0.6)
    kept = vit_training.choose_patches(budget, 5, generator(0))
    assert kept is not None
    assert kept.shape == (TOY.batch_size, 16)
    assert all(len(set(row)) == 16 for row in kept.tolist())
    assert vit_training.choose_patches(budget, 6, generator(0)) is None


def test_maps_move_with_their_image() -> None:
    places = torch.zeros(1, 1, 8, 8)
    places[0, 0, 2, 1] = 1
    image = places.repeat_interleave(4, 2).repeat_interleave(4, 3)
    mirrored = torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    seen = augment.resample(places, mirrored)
    assert seen[0, 0, 2, 6] == 1
    assert torch.equal(augment.resample(image, mirrored)[..., 2::4, 2::4], seen)


def test_test_images_of_other_classes_are_refused_before_any_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = draw_squares(tmp_path / "test", each=1, seed=2)
    (other / "frog").rename(other / "toad")
    arguments = ["--data", str(data), "--test", str(other), "--out", str(tmp_path / "out"), "--budget", "toy"]
    assert train_vit.main(arguments) == 1
    assert "differ in their classes: frog, toad" in capsys.readouterr().err
    assert not (tmp_path / "out.work").exists()


def test_the_command_says_that_it_stopped_by_its_exit_status(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--budget", "toy", "--minutes", "0"]
    assert train_vit.main(arguments) == 75
    assert "give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_the_embedded_teacher_is_what_the_budgets_train_and_fits_into_12_mb(budget: str) -> None:
    spec = TEACHERS["embedded_vit"]
    network = vit_network.build(BUDGETS[budget], 10, seed=0)
    assert len(network.blocks) == 12
    numbers = sum(value.numel() for value in network.parameters())
    assert 2 * numbers < 11.9e6
    network.reset_classifier(0)
    assert sum(value.numel() for value in network.parameters()) == spec.parameters
    assert (network.num_features, vit_network.SIZE) == (spec.embedding_dim, spec.input_size)


def test_the_embedded_teacher_says_when_its_weights_are_not_installed(tmp_path: Path) -> None:
    spec = TEACHERS["embedded_vit"]
    assert spec.folder == Path(vit_network.__file__).parent / "vit"
    absent = spec.model_copy(update={"source": "zoo/nothing"})
    state = teachers.availability(absent)
    assert not state.available
    assert state.reason == "Its weights are not part of this installation: Its folder has no config.json."
