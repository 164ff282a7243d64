"""Whether a network can be had, and what the model hub says of one. Declares only: no torch at import."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

_WAIT_SECONDS = 3.0  # how long to wait for the hub to say whether it has a network
_MEMORY_SECONDS = 300.0  # how long its answer is kept
_answers: dict[tuple[str, str, str], tuple[float, str]] = {}


@dataclass(frozen=True)
class Availability:
    available: bool
    reason: str


def availability(source: str, revision: str, files: Sequence[str]) -> Availability:
    """Whether the network `source` ("owner/name") of commit `revision` is in the local cache or at the hub.

    `files`: those that tell; the last, its weights, is the one that the hub is asked for.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = [try_to_load_from_cache(source, file, revision=revision) for file in files]
    if all(isinstance(path, str) for path in cached):
        return Availability(True, "In the local hub cache.")
    if constants.HF_HUB_OFFLINE:
        return Availability(
            False, "It is not in the local hub cache, and this machine is set to stay offline."
        )
    question = (source, revision, files[-1])
    asked, reason = _answers.get(question, (float("-inf"), ""))
    if time.monotonic() - asked > _MEMORY_SECONDS:
        try:
            url = hf_hub_url(source, question[-1], revision=revision)
            get_hf_file_metadata(url, timeout=_WAIT_SECONDS, retry_on_errors=False)
            reason = ""
        except Exception as error:  # the hub client raises its transport's own errors too
            reason = (
                f"The model hub does not give it ({type(error).__name__}); it is not in the local hub cache."
            )
        _answers[question] = (time.monotonic(), reason)
    return Availability(not reason, reason or "At the model hub; loaded at first use.")
