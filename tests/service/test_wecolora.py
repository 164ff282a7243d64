"""wecolora and wecolora_features through a whole service, with a vision transformer of the operator's as teacher."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import tiny_diffusion, tiny_vit
from tests.service.stack import Stack, few_shot_zip

QUICK: dict[str, Any] = {
    "distillation": {"steps": 5, "batch_size": 8, "views": 2},
    "evaluation": {"latency_runs": 5},
}
ORDER: dict[str, Any] = {"teacher_id": "shop_vit", "student": "shortened_vit", "preset": "balanced"}
LICENCE = 'licence = "proprietary"\nlicence_url = "https://example.org/licence"\n'


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """With a tiny ViT's checkpoint folder as teacher, and a tiny diffusion model as generator."""
    root = tmp_path_factory.mktemp("wecolora")
    spec = tiny_vit.write(root / "vit")
    (root / "teachers.toml").write_text(
        f'[[teacher]]\nname = "shop_vit"\ntitle = "The shop\'s ViT"\nkind = "timm"\nsource = "{spec.source}"\n'
        f"input_size = {spec.input_size}\nparameters = {spec.parameters}\nembedding_dim = {spec.embedding_dim}\n"
        + LICENCE
        + f'[[generator]]\nname = "bolts"\ntitle = "Bolts"\nkind = "local"\nresolution = {tiny_diffusion.SIDE}\n'
        f'source = "{tiny_diffusion.write(root / "tiny")}"\n' + LICENCE
    )
    made = Stack(root / "home", DRAM_TEACHERS_FILE=str(root / "teachers.toml"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


def upload(stack: Stack, content: bytes) -> str:
    answer = stack.http.post("/v1/datasets", files={"archive": ("set.zip", content, "application/zip")})
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["id"])


def without_labels(labelled: bytes) -> bytes:
    """The same images, all in `unlabelled/`."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(labelled)) as read, zipfile.ZipFile(made, "w") as write:
        for number, name in enumerate(read.namelist()):
            write.writestr(f"unlabelled/{number}.png", read.read(name))
    return made.getvalue()


def bundle_of(stack: Stack, job: dict[str, Any]) -> zipfile.ZipFile:
    answer = stack.http.get(f"/v1/students/{job['student_id']}/bundle.zip", follow_redirects=True)
    assert answer.status_code == 200, answer.text
    return zipfile.ZipFile(io.BytesIO(answer.content))


def test_a_classifier_is_made_of_a_vit_from_a_folder(stack: Stack) -> None:
    params = {**QUICK, "blocks": {"most_latency": 0.9}, "generation": {"images": 3, "steps": 2}}
    dataset = stack.upload()
    order = {**ORDER, "method": "wecolora", "generator_id": "bolts", "params": params}
    job = stack.finished(stack.submit(dataset, **order)["id"])
    assert job["status"] == "succeeded", job
    stack.check_history(job["id"])
    student = stack.http.get(f"/v1/students/{job['student_id']}").json()
    assert student["architecture"] == "shortened_vit"
    assert student["classes"] == ["class0", "class1", "class2"]
    report = stack.http.get(f"/v1/students/{job['student_id']}/report").json()
    assert report["student"]["shortened"]["depth"] == tiny_vit.DEPTH
    assert report["generator"]["images"] == 3
    samples = stack.http.get(f"/v1/jobs/{job['id']}/samples").json()["data"]
    assert [(sample["kind"], sample["kept"]) for sample in samples] == [("diffusion", True)] * 3
    with bundle_of(stack, job) as bundle, zipfile.ZipFile(io.BytesIO(few_shot_zip())) as images:
        assert "of its 6 blocks it has" in bundle.read("MODEL_CARD.md").decode()
        image = images.read("test/class2/5.png")
    answer = stack.http.post(f"/v1/students/{job['student_id']}/predict", content=image)
    assert answer.status_code == 200, answer.text
    assert sum(item["score"] for item in answer.json()["predictions"]) == pytest.approx(1, abs=1e-4)


def test_the_vit_that_comes_with_dram_is_a_teacher(stack: Stack) -> None:
    params = {**QUICK, "blocks": {"r": 3}}
    order = {**ORDER, "method": "wecolora", "teacher_id": "embedded_vit", "params": params}
    job = stack.finished(stack.submit(stack.upload(), **order)["id"])
    assert job["status"] == "succeeded", job
    report = stack.http.get(f"/v1/students/{job['student_id']}/report").json()
    shortened = report["student"]["shortened"]
    assert (shortened["rule"], shortened["depth"], len(shortened["kept"])) == ("influence", 12, 4)
    with bundle_of(stack, job) as bundle:
        assert "of its 12 blocks it has" in bundle.read("MODEL_CARD.md").decode()


def test_a_feature_extractor_is_made_of_images_without_labels(stack: Stack) -> None:
    dataset = upload(stack, without_labels(few_shot_zip()))
    order = {**ORDER, "method": "wecolora_features", "params": QUICK}
    job = stack.finished(stack.submit(dataset, **order)["id"])
    assert job["status"] == "succeeded", job
    stack.check_history(job["id"])
    student = stack.http.get(f"/v1/students/{job['student_id']}").json()
    assert (student["classes"], student["summary"]["task"]) == ([], "features")
    assert student["summary"]["evaluated_by"] == "learned_from"
    refused = stack.http.post(f"/v1/students/{job['student_id']}/predict", content=b"any")
    assert (refused.status_code, refused.json()["code"]) == (409, "student_answers_otherwise")
    with bundle_of(stack, job) as bundle:
        session = onnxruntime.InferenceSession(bundle.read("model.onnx"))
        expected = json.loads(bundle.read("golden.json"))["images"][0]
    (features,) = session.run(["features"], {"image": np.zeros((2, 20, 30, 3), np.uint8)})
    assert features.shape == (2, tiny_vit.WIDTH) == (2, len(expected["features"]))


def test_a_classifier_needs_labelled_images(stack: Stack) -> None:
    dataset = upload(stack, without_labels(few_shot_zip()))
    answer = stack.http.post(
        "/v1/jobs", json={**ORDER, "dataset_id": dataset, "method": "wecolora", "params": QUICK}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_lacks_images")
    assert "Method 'wecolora' needs labelled images" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["wecolora", "wecolora_features"])
def test_a_rank_that_the_teacher_cannot_have_is_refused_with_the_order(stack: Stack, method: str) -> None:
    labelled = method == "wecolora"
    dataset = stack.upload() if labelled else upload(stack, without_labels(few_shot_zip()))
    order = {**ORDER, "dataset_id": dataset, "method": method, "dry_run": True}
    high = {**order, "params": {"distillation": {"rank": tiny_vit.WIDTH + 1}}}
    answer = stack.http.post("/v1/jobs", json=high)
    assert (answer.status_code, answer.json()["code"]) == (422, "parameter_misfits_teacher")
    (finding,) = answer.json()["errors"]
    assert finding["pointer"] == "/params/distillation/rank"
    assert "rank 49 is more than the width of teacher 'shop_vit'. Choose at most 48;" in finding["detail"]
    for fitting in ({"rank": tiny_vit.WIDTH}, {"rank": tiny_vit.WIDTH + 1, "adaptation": "full"}):
        answer = stack.http.post("/v1/jobs", json={**order, "params": {"distillation": fitting}})
        assert answer.status_code == 200, answer.text
