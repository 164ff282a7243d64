"""Parent side: does in the database what the ledger of a stage asks (`workers.asking`), under the stage's claim."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from app.jobs import queries
from app.jobs.claims import Claim
from models.errors import BudgetSpent
from workers.asking import decoded, encoded
from workers.lease import Lease


class Answering:
    """Answers for one claim. `earlier`: how many answers it found that other jobs have paid for."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.earlier = 0

    def reply(self, call: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do in the database what the child asks. Raises LeaseLost."""
        try:
            return {"result": self._done(self._lease.claim, call, **arguments)}
        except BudgetSpent as error:
            return {"refused": {"detail": error.detail, "hint": error.hint}}

    def _done(self, held: Claim, call: str, **arguments: Any) -> Any:
        match call:
            case "known":
                known = self._lease.finish(partial(queries.known_answers, held=held, **arguments))
                self.earlier += known.earlier
                return encoded(known.answers)
            case "reserve":
                return self._lease.finish(partial(queries.reserve, held=held, **arguments))
            case "release":
                # Taken back twice, it would let the job spend more than its budget; not taken back, it spends less.
                self._lease.once(partial(queries.release, held=held, **arguments))
                return None
            case "record":
                answers = decoded(arguments["answers"])
                teacher = arguments["teacher"]
                return self._lease.finish(
                    partial(queries.record_answers, held=held, teacher=teacher, answers=answers)
                )
        raise ValueError(f"no such call: {call}")
