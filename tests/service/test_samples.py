"""A job's synthetic images over HTTP: small real runs, whose outputs stand in the service's tables and blobs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from app import ids
from app.client import Dram
from app.datasets.tables import Dataset
from app.jobs.tables import Job, JobStage, Shard, StageOutput
from app.wiring import Wiring
from models import local
from models.data import archive
from models.generators import GENERATORS, GeneratorSpec, Kind, choice, shards
from models.methods import METHODS
from models.methods.tint import Verdict
from models.teachers import labelling
from tests import tiny_diffusion

if TYPE_CHECKING:
    from tests.conftest import Gateway

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

SHOTS, CLASSES = 3, ("green", "red")
Plant = Callable[..., str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy colours: 3 labelled and 2 test images of each of 2 classes, and 5 without a label."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    folders = {
        **dict.fromkeys(CLASSES, SHOTS),
        **{f"test/{name}": 2 for name in CLASSES},
        "unlabelled": 5,
    }
    for number, (name, count) in enumerate(folders.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 90, (40, 40, 3)) + np.eye(3, dtype=int)[1 - number % 2] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def mixes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> local.LocalRun:
    """An fsbbt run of a catalogue teacher: 30 images made, 24 of them chosen."""
    params = METHODS["fsbbt"].resolve(
        "draft",
        {
            "synthesis": {"images": 24, "maker": "mixup_cvae", "pool": 1.25, "beta": 0.2},
            "cvae": {"epochs": 2},
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "STEPS", 20)
        return local.run(
            "fsbbt", images, "efficientnet_lite0", "lenet5", tmp_path_factory.mktemp("out"),
            params=params, device="cpu", wanted=["soft_labels"],
        )  # fmt: skip


@pytest.fixture(scope="module")
def generated(images: Path, tmp_path_factory: pytest.TempPathFactory) -> local.LocalRun:
    """A tint run of a tiny random generator: 5 images of each class."""
    folder = tiny_diffusion.write(tmp_path_factory.mktemp("generator") / "tiny")
    spec = GeneratorSpec(
        name="tiny", title="Random", kind="local", source=str(folder), resolution=tiny_diffusion.SIDE,
        licence="Apache-2.0", licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    )  # fmt: skip
    params = METHODS["tint"].resolve(
        "draft",
        {
            "textual_inversion": {"steps": 1},
            "null_text_inversion": {"mode": "null_text", "steps": 2},
            "generation": {"images_per_class": 5, "size": 40},
            "teacher": {"input_size": 64, "views": 2},
            "selection": {"least_probability": 0.5},
        },
    )
    return local.run(
        "tint", images, "efficientnet_lite0", "lenet5", tmp_path_factory.mktemp("out"),
        params=params, device="cpu", wanted=["selection"], generator=spec,
    )  # fmt: skip


@pytest.fixture
def plant(wiring: Wiring) -> Plant:
    """Puts a local run into the service as a job, as far as the artefacts `until` and before; the job's id."""

    def put(run: local.LocalRun, method: str, until: str | None = None, tenant: str = "default") -> str:
        dataset, job = ids.new("ds"), ids.new("job")
        splits = {name: run.folder(name) for name in ("support", "unlabelled", "test")}
        sources = {
            name: {"files": {archive.FILE_NAME: wiring.blobs.put(folder / archive.FILE_NAME)}}
            for name, folder in splits.items()
        }
        shape = vars(local.fewshot.shape_of(*splits.values()))
        common: dict[str, Any] = {"tenant": tenant, "teacher": "efficientnet_lite0", "method": method}
        with wiring.database.writing() as session:
            session.add(
                Dataset(id=dataset, tenant=tenant, name="colours", digest=dataset, classes=list(CLASSES),
                        splits={}, smallest_class=SHOTS, report={})
            )  # fmt: skip
            session.flush()
            session.add(
                Job(id=job, dataset_id=dataset, student="lenet5", preset="draft", params={}, seed=0, labels={},
                    sources=sources, shape=shape, status="running", **common)
            )  # fmt: skip
            session.flush()
            there = True
            for position, step in enumerate(run.planned):
                output = step.stage.output
                there &= output in run.folders
                stage = JobStage(
                    id=ids.new("stg"), job_id=job, position=position, name=step.stage.name, key=step.key,
                    output=output, needs=[], queue="cpu", weight=1.0, params=step.params,
                    shards=len(step.shard_keys), status="succeeded",
                )  # fmt: skip
                session.add(stage)
                session.flush()
                for index, key in enumerate(step.shard_keys):
                    session.add(
                        Shard(id=ids.new("shd"), job_id=job, stage_id=stage.id, position=index, key=key,
                              queue="cpu", status="succeeded")
                    )  # fmt: skip
                    if there:
                        folder = run.folders[output][index]
                        files = {path.name: wiring.blobs.put(path) for path in folder.iterdir()}
                        session.merge(StageOutput(tenant=tenant, key=key, files=files, bytes=1, facts=None))
                there &= output != until
        return job

    return put


def test_mixes_come_with_their_two_origins_and_the_teacher_s_answer(
    client: httpx.Client, plant: Plant, mixes: local.LocalRun
) -> None:
    job = plant(mixes, "fsbbt")
    answer = client.get(f"/v1/jobs/{job}/samples", params={"limit": 100}).json()
    samples = answer["data"]
    assert (len(samples), answer["has_more"]) == (30, False)
    assert [sample["id"] for sample in samples] == [str(number) for number in range(1, 31)]
    made = load_file(mixes.folder("synthetic") / "images.safetensors")
    assert {Kind.MIXUP, Kind.CVAE} == set(made["kind"].tolist())
    indexes = {
        name: archive.read_index(mixes.folder(name) / archive.FILE_NAME) for name in ("support", "unlabelled")
    }
    names = [image.name for name in ("support", "unlabelled") for image in indexes[name].images]
    for row, sample in enumerate(samples):
        first, second, share = int(made["first"][row]), int(made["second"][row]), float(made["share"][row])
        if made["kind"][row] == Kind.MIXUP:
            assert sample["kind"] == "mixup"
            assert [origin["name"] for origin in sample["origins"]] == [names[first], names[second]]
            assert [origin["share"] for origin in sample["origins"]] == pytest.approx([share, 1 - share])
            assert sample["label"] is None
        else:
            assert (sample["kind"], sample["origins"], sample["label"]) == ("cvae", [], CLASSES[first])
        assert (sample["alpha"], sample["seed"]) == (None, None)
    origin = next(o for s in samples for o in s["origins"] if o["split"] == "unlabelled")
    assert (origin["label"], origin["name"]) == (None, names[6 + origin["index"]])


def test_the_scores_are_the_teacher_s_and_what_was_not_chosen_is_not_kept(
    client: httpx.Client, plant: Plant, mixes: local.LocalRun
) -> None:
    samples = client.get(f"/v1/jobs/{plant(mixes, 'fsbbt')}/samples", params={"limit": 100}).json()["data"]
    chosen = set(load_file(mixes.folder("chosen") / "chosen.safetensors")["index"].tolist())
    soft = labelling.load(mixes.folder("soft_labels"))
    assert len(chosen) == 24
    for row, sample in enumerate(samples):
        assert sample["kept"] is (row in chosen)
        if row not in chosen:
            assert (sample["scores"], sample["reason"]) == ([], "The teacher was not asked about it.")
            continue
        answered = soft.logits[soft.image == 11 + row].softmax(1)[0]
        given = {score["label"]: score["score"] for score in sample["scores"]}
        assert [given[name] for name in CLASSES] == pytest.approx(answered.tolist(), abs=1e-5)
        assert [score["score"] for score in sample["scores"]] == sorted(given.values(), reverse=True)


def test_a_job_that_still_asks_shows_its_images_undecided(
    client: httpx.Client, plant: Plant, mixes: local.LocalRun
) -> None:
    job = plant(mixes, "fsbbt", until="synthetic")
    samples = client.get(f"/v1/jobs/{job}/samples").json()["data"]
    assert len(samples) == 20
    assert {(sample["kept"], sample["reason"], len(sample["scores"])) for sample in samples} == {
        (None, "", 0)
    }
    assert {sample["label"] for sample in samples} <= {None, *CLASSES}


def test_generated_images_come_with_class_origin_alpha_seed_and_verdict(
    client: httpx.Client, plant: Plant, generated: local.LocalRun
) -> None:
    samples = client.get(f"/v1/jobs/{plant(generated, 'tint')}/samples").json()["data"]
    assert [sample["label"] for sample in samples] == ["green"] * 5 + ["red"] * 5
    folders = generated.folders["synthetic"]
    share, seed = shards.column(folders, "share"), shards.column(folders, "seed")
    verdict = load_file(generated.folder("selection") / "selection.safetensors")["verdict"]
    for row, sample in enumerate(samples):
        (origin,) = sample["origins"]
        assert (origin["split"], origin["label"]) == ("support", sample["label"])
        assert origin["name"].startswith(sample["label"] + "/")
        assert sample["alpha"] == pytest.approx(1 - float(share[row]), abs=1e-6)
        assert sample["seed"] == int(seed[row])
        assert sample["kept"] is bool(verdict[row] == Verdict.KEPT)
        assert (sample["reason"] == "") is sample["kept"]
        if verdict[row] == Verdict.UNSURE:
            given = {score["label"]: score["score"] for score in sample["scores"]}
            assert given[sample["label"]] < 0.5
            assert f"{given[sample['label']]:.2f}; 0.50 is needed" in sample["reason"]
    assert int((verdict == Verdict.UNSURE).sum()) > 0


def test_pages_go_on_across_shards(client: httpx.Client, plant: Plant, generated: local.LocalRun) -> None:
    job = plant(generated, "tint")
    whole = client.get(f"/v1/jobs/{job}/samples", params={"limit": 100}).json()["data"]
    parts, after, more = [], 0, True
    while more:
        page = client.get(f"/v1/jobs/{job}/samples", params={"limit": 3, "after": after}).json()
        parts += page["data"]
        after, more = page["data"][-1]["id"], page["has_more"]
    assert parts == whole
    assert client.get(f"/v1/jobs/{job}/samples", params={"after": 10}).json()["data"] == []


def test_the_image_is_the_one_that_was_stored_and_a_thumbnail_is_smaller(
    client: httpx.Client, plant: Plant, generated: local.LocalRun
) -> None:
    job = plant(generated, "tint")
    url = client.get(f"/v1/jobs/{job}/samples", params={"after": 6, "limit": 1}).json()["data"][0]["urls"][
        "image"
    ]
    answer = client.get(url)
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as picture:
        pixels = np.asarray(picture)
    stored = shards.pixels_at(generated.folders["synthetic"], torch.tensor([6]))[0]
    assert np.array_equal(pixels, stored.permute(1, 2, 0).numpy())
    with Image.open(io.BytesIO(client.get(url, params={"size": 16}).content)) as small:
        assert small.size == (16, 16)
    assert client.get(url, params={"size": 512}).status_code == 422


def test_a_job_whose_images_were_let_go_of_says_so(
    client: httpx.Client, wiring: Wiring, plant: Plant, generated: local.LocalRun
) -> None:
    job = plant(generated, "tint")
    with wiring.database.writing() as session:
        session.get_one(Job, job).sources = {}
    for path in ("samples", "samples/1/image"):
        answer = client.get(f"/v1/jobs/{job}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (410, "images_gone")


def test_what_is_not_there_is_not_found(
    client: httpx.Client, plant: Plant, generated: local.LocalRun
) -> None:
    job = plant(generated, "tint")
    beyond = client.get(f"/v1/jobs/{job}/samples/11/image")
    assert (beyond.status_code, beyond.json()["code"]) == (404, "sample_not_found")
    assert "10 so far" in beyond.json()["detail"]
    assert client.get(f"/v1/jobs/{job}/samples/0/image").status_code == 404
    assert client.get("/v1/jobs/job_none/samples").json()["code"] == "job_not_found"
    other = plant(generated, "tint", tenant="other")
    for path in (f"/v1/jobs/{other}/samples", f"/v1/jobs/{other}/samples/1/image"):
        assert client.get(path).json()["code"] == "job_not_found"


def test_a_job_that_makes_no_images_has_no_samples(
    client: httpx.Client, plant: Plant, mixes: local.LocalRun
) -> None:
    assert client.get(f"/v1/jobs/{plant(mixes, 'fsbbt', until='black_box')}/samples").json() == {
        "object": "list",
        "data": [],
        "has_more": False,
    }


def test_the_command_line_writes_the_images_and_what_they_are(
    gateway: Gateway, plant: Plant, generated: local.LocalRun, tmp_path: Path
) -> None:
    job = plant(generated, "tint")
    command = [sys.executable, "-m", "app.cli", "samples", job, "--out", str(tmp_path / "seen")]
    ran = subprocess.run(
        [*command, "--limit", "9", "--url", gateway.url, "--key", gateway.key],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    described = json.loads((tmp_path / "seen" / "samples.json").read_text())
    assert len(described) == 9
    kept = sum(entry["kept"] for entry in described)
    assert f"9 images: {kept} kept, {9 - kept} not" in ran.stderr
    stored = shards.pixels_at(generated.folders["synthetic"], torch.arange(9)).permute(0, 2, 3, 1).numpy()
    for number, entry in enumerate(described):
        with Image.open(tmp_path / "seen" / entry["file"]) as picture:
            assert np.array_equal(np.asarray(picture), stored[number])
        assert ("kept" in entry["file"]) is entry["kept"]


def test_the_client_reads_samples_and_generators(
    gateway: Gateway, plant: Plant, generated: local.LocalRun
) -> None:
    job = plant(generated, "tint")
    with Dram(gateway.url, gateway.key) as dram:
        page = dram.jobs.samples(job, limit=1, after=2)
        (sample,) = page.data
        assert (sample.id, sample.kind, page.has_more) == ("3", "diffusion", True)
        assert sample.origins[0].label == sample.label == "green"
        with Image.open(io.BytesIO(dram.jobs.sample_image(job, sample.id, size=20))) as picture:
            assert picture.size == (20, 20)
        assert [generator.id for generator in dram.generators().data] == list(GENERATORS)
