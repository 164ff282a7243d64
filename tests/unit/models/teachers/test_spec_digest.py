"""A teacher's document names stage outputs, so every process must write the same one."""

from __future__ import annotations

import os
import subprocess
import sys

SAY = "from models.teachers import TEACHERS; print(TEACHERS['efficientnet_lite0'].model_dump(mode='json'))"


def test_every_process_writes_the_same_document_of_a_teacher() -> None:
    documents = {
        subprocess.run(
            [sys.executable, "-c", SAY],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(documents) == 1
