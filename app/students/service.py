"""Students: found for their tenant, and which file of theirs a request means."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app import paging
from app.db import owned, read_clock
from app.errors import Conflict, NotFound
from app.security.principal import Principal
from app.students.tables import Student
from app.wiring import Wiring
from models.methods import METHODS
from models.pipeline import Task

FILE_OF_PRECISION = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
BUNDLE = "bundle.zip"
REPORT = "report.json"
_ANSWERS: dict[Task, str] = {
    "classification": "scores of the classes of an image",
    "segmentation": "a class map",
    "features": "features",
}
_INSTEAD: dict[Task, str] = {
    "classification": "POST the image to its /predict.",
    "segmentation": "POST the image to its /class-map.",
    "features": "Download its bundle: predict.py there runs it.",
}


def page(
    session: Session,
    principal: Principal,
    *,
    job_id: str | None,
    dataset_id: str | None,
    limit: int,
    after: str | None,
) -> tuple[list[Student], bool]:
    select = owned(Student, principal)
    if job_id is not None:
        select = select.where(Student.job_id == job_id)
    if dataset_id is not None:
        select = select.where(Student.dataset_id == dataset_id)
    return paging.newest(session, select, Student.id, limit=limit, after=after)


def get(session: Session, principal: Principal, student_id: str) -> Student:
    student = session.scalar(owned(Student, principal).where(Student.id == student_id))
    if student is None:
        raise NotFound(f"There is no student '{student_id[:64]}'. GET /v1/students lists yours.")
    return student


def delete(wiring: Wiring, principal: Principal, student_id: str) -> None:
    """Take it out of sight; retention removes its files. Raises `NotFound`."""
    with wiring.database.writing() as session:
        get(session, principal, student_id).deleted_at = read_clock(session)


def graph(student: Student, precision: str) -> str:
    """Digest of the ONNX file of this precision."""
    name = FILE_OF_PRECISION[precision]
    if name not in student.files:
        raise NotFound(
            f"Student '{student.id}' has no {precision} file. Order one with precision '{precision}'; where that was "
            "done, the report says why the file was left out.",
            code="precision_not_available",
        )
    return file(student, name)


def require_task(student: Student, task: Task) -> None:
    """Raise `Conflict` for a student that answers otherwise than the students of this task."""
    method = METHODS.get(student.method)
    own = method.task if method is not None else "classification"
    if own != task:
        raise Conflict(
            f"Student '{student.id}' answers with {_ANSWERS[own]}, not with {_ANSWERS[task]}. {_INSTEAD[own]}",
            code="student_answers_otherwise",
        )


def file(student: Student, name: str) -> str:
    """Digest of a file that every student has."""
    digest = student.files.get(name)
    if digest is None:
        raise NotFound(f"Student '{student.id}' has no file '{name}'.", code="file_not_available")
    return str(digest)
