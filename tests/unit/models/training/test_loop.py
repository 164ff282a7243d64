from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import students
from models.data import augment
from models.errors import TrainingError
from models.local import FolderCheckpoints
from models.runtime import generator
from models.stages import DistillationParams
from models.teachers.labelling import SoftLabels
from models.training import distillation
from models.training.loop import NoCheckpoints, Schedule, fit

SCHEDULE = Schedule(steps=40, lr=0.05, weight_decay=0.0, ema_decay=0.9)


def silent(step: int, total: int, **metrics: float) -> None: ...


class Killed(Exception):
    """Stands for kill -9."""


class DiesAfter(FolderCheckpoints):
    """Saves at every step and dies once `steps` are saved."""

    steps = 7

    def due(self) -> bool:
        return True

    def save(self, step: int, write) -> None:  # type: ignore[no-untyped-def]
        super().save(step, write)
        if step == self.steps:
            raise Killed


def a_training_set() -> distillation.TrainingSet:
    random = generator(0, "test")
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.tensor([0, 1, 2, 0, 1, 2] + [-1] * 6)
    image = torch.arange(12).repeat_interleave(3)
    view = augment.view_boxes(image, torch.arange(3).repeat(12))
    soft = SoftLabels(torch.randn(36, 3, generator=random) * 3, image, view)
    return distillation.training_set(pixels, labels, soft, torch.device("cpu"))


def test_a_resumed_run_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    params = DistillationParams(
        steps=12, batch_size=4, crop=0.4, colour=0.3, erase=0.3, mixup=0.5, cutmix=1.0, mix_share=0.7
    )
    data = a_training_set()

    def student() -> nn.Module:
        return distillation.new_student("conv4", 3, 32, 5, torch.device("cpu"))

    whole, history = distillation.train(student(), data, params, 5, silent, NoCheckpoints())
    with pytest.raises(Killed):
        distillation.train(student(), data, params, 5, silent, DiesAfter(tmp_path))
    kept = FolderCheckpoints(tmp_path)
    assert kept.latest() == tmp_path / "step-000000007"
    torch.manual_seed(999)  # a new process has other global random numbers
    resumed, same_history = distillation.train(student(), data, params, 5, silent, kept)

    assert same_history == history
    for (name, expected), value in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, value), name


def test_another_seed_gives_other_weights() -> None:
    params = DistillationParams(steps=3, batch_size=4)
    weights = []
    for seed in (1, 2):
        network = distillation.new_student("conv4", 3, 32, 0, torch.device("cpu"))
        trained, _ = distillation.train(network, a_training_set(), params, seed, silent, NoCheckpoints())
        weights.append(trained.state_dict()["classifier.weight"])
    assert not torch.equal(*weights)


def test_the_loop_finds_the_least_squares_solution() -> None:
    random = generator(1, "least squares")
    inputs = torch.randn(50, 3, generator=random)
    truth = torch.tensor([[1.0, -2.0, 0.5]])
    targets = inputs @ truth.T + 0.3
    network = nn.Linear(3, 1)
    schedule = Schedule(steps=600, lr=0.05, weight_decay=0.0, ema_decay=0.5)

    def loss_at(step: int) -> Tensor:
        return (network(inputs) - targets).square().mean()

    fitted, _ = fit(network, loss_at, schedule, silent, NoCheckpoints())
    assert torch.allclose(fitted.weight, truth, atol=1e-3)  # type: ignore[arg-type]
    assert torch.allclose(fitted.bias, torch.tensor(0.3), atol=1e-3)  # type: ignore[arg-type]


def test_progress_is_reported_about_every_ten_steps_and_at_the_end() -> None:
    network = nn.Linear(2, 1)
    seen: list[tuple[int, int, set[str]]] = []

    def report(step: int, total: int, **metrics: float) -> None:
        seen.append((step, total, set(metrics)))

    schedule = Schedule(steps=25, lr=0.01, weight_decay=0.0, ema_decay=0.0)
    fit(network, lambda step: network(torch.ones(1, 2)).square().mean(), schedule, report, NoCheckpoints())
    assert seen == [(10, 25, {"loss", "lr"}), (20, 25, {"loss", "lr"}), (25, 25, {"loss", "lr"})]


def test_a_loss_that_is_no_number_is_an_error_with_a_hint() -> None:
    network = nn.Linear(2, 1)
    with pytest.raises(TrainingError, match="loss is nan after 10 steps") as caught:
        fit(
            network,
            lambda step: network(torch.ones(1, 2)).mean() * torch.nan,
            SCHEDULE,
            silent,
            NoCheckpoints(),
        )
    assert "learning rate" in caught.value.hint


def test_a_batch_holds_its_share_of_support_images_and_each_row_shows_its_image() -> None:
    data = a_training_set()
    chosen, rows = data.pick(40, 0.5, 3, generator(0))
    assert int((chosen[:20] < 6).sum()) == 20
    assert int((chosen[20:] >= 6).sum()) > 0
    assert torch.equal(rows // 3, chosen)  # three views of each image, in order
    assert (rows % 3).unique().tolist() == [0, 1, 2]


def test_the_student_is_shown_the_first_views_only() -> None:
    chosen, rows = a_training_set().pick(40, 0.5, 2, generator(0))
    assert torch.equal(rows // 3, chosen)
    assert (rows % 3).unique().tolist() == [0, 1]


def test_soft_labels_of_other_images_are_refused() -> None:
    soft = SoftLabels(torch.zeros(3, 2), torch.tensor([0, 1, 3]), torch.zeros(3, 5))
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(TrainingError, match="do not belong together"):
        distillation.training_set(pixels, torch.zeros(4).long(), soft, torch.device("cpu"))


def test_a_saved_student_loads_and_answers_the_same(tmp_path: Path) -> None:
    network = distillation.new_student("conv4", 3, 32, 5, torch.device("cpu")).eval()
    distillation.save_student(tmp_path, network, "conv4", 32, ("a", "b", "c"), {"steps": 7})
    loaded = students.load(tmp_path)
    images = torch.randn(2, 3, 32, 32, generator=generator(3))
    assert torch.allclose(loaded.network(images), network(images), atol=1e-6)
    assert (loaded.name, loaded.input_size, loaded.classes) == ("conv4", 32, ("a", "b", "c"))


def test_frozen_weights_are_neither_kept_nor_averaged_away(tmp_path: Path) -> None:
    def network(width: int = 2) -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
        made[0].requires_grad_(False)
        return made

    inputs = torch.ones(4, 3)

    def train(model: nn.Module, checkpoints: FolderCheckpoints) -> nn.Module:
        schedule = Schedule(steps=10, lr=0.05, weight_decay=0.0, ema_decay=0.9)
        return fit(model, lambda step: model(inputs).square().mean(), schedule, silent, checkpoints)[0]

    with pytest.raises(Killed):
        train(network(), DiesAfter(tmp_path))
    latest = FolderCheckpoints(tmp_path).latest()
    assert latest is not None
    names = {
        name for name in load_file(latest / "state.safetensors") if name.startswith(("network", "average"))
    }
    assert names == {f"{which}.1.{what}" for which in ("network", "average") for what in ("weight", "bias")}
    trained = train(network(), FolderCheckpoints(tmp_path)).state_dict()
    assert torch.equal(trained["0.weight"], network()[0].weight)
    assert not torch.equal(trained["1.weight"], network()[1].weight)

    free = network().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"of another network: it has no 0\.weight"):
        train(free, FolderCheckpoints(tmp_path))
