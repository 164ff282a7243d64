"""The whole service on a few real images: upload, distil, download, and classify with the student alone.

    python examples/demo.py [FOLDER]        (what `make demo` runs)

FOLDER holds one folder of images for each class, `test/` with the same for measuring, perhaps `unlabelled/`.
At the end the student classifies the images in examples/unseen. Everything is real: gateway, Redis, Celery worker,
database; they live in a temporary folder and are gone afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from app import console
from app.client import Dram, Job
from app.client.packing import files_below
from app.embedded import serving
from app.home import Home

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE.parent / "constraints.txt"
#: Kept small, so that the demonstration ends within minutes on two cores.
ORDER = {"method": "kd", "teacher_id": "efficientnet_lite0", "student": "conv4", "preset": "draft"}


def main() -> int:
    parser = argparse.ArgumentParser(description="From a few real images to a student that classifies.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "earth")
    folder: Path = parser.parse_args().folder
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dram-demo-") as temporary:
        home = Home(Path(temporary, "home"))
        _title("Starting the service: gateway, Redis, worker, maintenance")
        with serving(home) as url, Dram(url, home.key()) as dram:
            job = _distil(dram, folder)
            if job.status != "succeeded" or job.student_id is None:
                console.job_failure(job)
                return 1
            _title("The report")
            console.report(dram.students.report(job.student_id))
            bundle = dram.students.download_bundle(job.student_id, Path(temporary, "student.zip"))
        _title("The service is stopped; the student goes on alone, with onnxruntime and Pillow")
        _classify(bundle, sorted((HERE / "unseen").iterdir()), Path(temporary))
    console.out.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def _distil(dram: Dram, folder: Path) -> Job:
    _title(f"Uploading {folder.name}")
    images = [(name, path) for name, path in files_below(folder) if "/" in name]
    dataset = dram.datasets.create(images, name=folder.name)
    console.dataset(dataset)
    _title(f"Distilling {ORDER['teacher_id']} into {ORDER['student']}")
    job = dram.jobs.create(dataset_id=dataset.id, **ORDER)
    console.follow(dram.jobs.events(job.id))
    return dram.jobs.wait(job.id)


def _classify(bundle: Path, images: list[Path], temporary: Path) -> None:
    """Run the bundle's own predict.py in an environment that holds nothing else."""
    alone = temporary / "alone"
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(alone)
    (script,) = alone.rglob("predict.py")
    venv.create(temporary / "venv", with_pip=True)
    python = temporary / "venv" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        CONSTRAINTS,
        "onnxruntime",
        "pillow",
    ]
    subprocess.run(install, check=True)
    for arguments in (["--check"], [str(image.resolve()) for image in images]):
        subprocess.run([python, script, *arguments], check=True, cwd=script.parent)


def _title(text: str) -> None:
    console.out.print(f"\n[bold]{text}[/bold]")


if __name__ == "__main__":
    sys.exit(main())
