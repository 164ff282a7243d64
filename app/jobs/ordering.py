"""Whether an order can be done: its names and parameters, its teacher, its data set, its budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.catalogue import generators
from app.datasets import service as datasets
from app.datasets.report import capped
from app.errors import Finding, Invalid
from app.jobs import plan
from app.jobs.schemas import JobOrder
from app.security.principal import Principal
from app.teachers import service as teachers
from app.teachers.service import Resolved
from app.wiring import Wiring
from models.generators import DEFAULT, GeneratorSpec
from models.methods import METHODS
from models.pipeline import JobShape, Method, Params, PlannedStage, digest
from models.students import STUDENTS, choices
from models.teachers import TeacherSpec

_SOURCE_WORDS = {"support": "labelled images", "unlabelled": "unlabelled images", "test": "a test split"}
#: Sources that the order names, so that no data set lacks them.
_NAMED = ("teacher", "student", "generator")
#: What one answer repeats: so many reasons or names, and of a name that was sent so many characters.
_MOST_NAMED = 10
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Choice:
    """What an order names. `documents`: the JSON files that tell the stages, by name."""

    method: Method
    params: Params
    teacher: Resolved
    documents: Mapping[str, Any]
    generator_id: str | None = None


@dataclass(frozen=True)
class Work:
    """What there is to do. `sources`: source -> {"files": {name: blob digest}}; `queries`: to a black box, at most."""

    sources: dict[str, Any]
    shape: JobShape
    planned: tuple[PlannedStage, ...]
    queries: int | None


def choose(wiring: Wiring, principal: Principal, order: JobOrder) -> Choice:
    """Look up what the order names. Raises Invalid with every finding at once."""
    findings = []
    method = METHODS.get(order.method)
    if method is None:
        findings.append(_unknown("method", "/method", order.method, METHODS))
    findings += _student_findings(order, method)
    teacher: Resolved | None = None
    try:
        with wiring.database.reading() as session:
            teacher = teachers.resolve(session, wiring.settings, principal, order.teacher_id)
    except Invalid as error:
        findings.append(Finding(error.code, "/teacher_id", error.detail))
    params: Params | None = None
    if method is not None and order.precision == "int8" and "export" not in method.params.model_fields:
        detail = f"Method '{method.name}' makes no int8 file; order precision 'fp32'."
        findings.append(Finding("method_lacks_precision", "/precision", detail))
    elif method is not None:
        try:
            params = method.resolve(order.preset, _overrides(order))
        except ValidationError as error:
            findings += [_parameter_finding(method, problem) for problem in error.errors(include_url=False)]
    generator: GeneratorSpec | None = None
    try:
        generator = _generator(wiring, order, method, params)
    except Invalid as error:
        findings.append(Finding(error.code, "/generator_id", error.detail))
    if findings or method is None or params is None or teacher is None:
        raise _refused(findings)
    _check_teacher(wiring, order, method, params, teacher)
    documents: dict[str, Any] = {
        "teacher.json": teacher.spec.model_dump(mode="json"),
        "student.json": {"name": order.student},
    }
    if generator is None:
        return Choice(method, params, teacher, documents)
    _check_generator(wiring, generator)
    documents["generator.json"] = generator.model_dump(mode="json")
    return Choice(method, params, teacher, documents, generator.name)


def plan_work(session: Session, principal: Principal, order: JobOrder, choice: Choice) -> Work:
    """Plan the order for its data set. Raises NotFound for the data set, Invalid where it cannot be done with it."""
    dataset = datasets.get(session, principal, order.dataset_id)
    shape = plan.shape_of(len(dataset.classes), dataset.smallest_class, dataset.splits)
    _check_task(order.dataset_id, choice.method, dataset.task)
    _check_images(order.dataset_id, choice, shape, set(dataset.splits))
    _check_classes(order.dataset_id, choice, dataset.classes, shape)
    digests = {name: digest(document) for name, document in choice.documents.items()}
    sources = {split: {"files": {"images.zip": about["digest"]}} for split, about in dataset.splits.items()}
    sources |= {
        "teacher": {"files": {**choice.teacher.files, plan.TEACHER_FILE: digests["teacher.json"]}},
        "student": {"files": {"student.json": digests["student.json"]}},
    }
    if choice.generator_id is not None:
        sources["generator"] = {"files": {"generator.json": digests["generator.json"]}}
    queries = choice.method.queries(shape, choice.params) if choice.method.queries else None
    _check_budget(order, queries)
    return Work(
        sources, shape, plan.stages(choice.method, shape, sources, choice.params, order.seed), queries
    )


def _refused(findings: Sequence[Finding]) -> Invalid:
    told = " ".join(finding.detail for finding in findings[:_MOST_NAMED])
    more = len(findings) - _MOST_NAMED
    return Invalid(
        told + (f" There are {more} more reasons, see errors." if more > 0 else ""),
        code=findings[0].code,
        findings=capped(findings),
    )


def _student_findings(order: JobOrder, method: Method | None) -> list[Finding]:
    """What is wrong with the student: nobody has it, or not this method."""
    known = {*STUDENTS, *(each.student for each in METHODS.values() if each.student)}
    if order.student not in known:
        return [_unknown("student", "/student", order.student, known)]
    if method is None or order.student in choices(method.student):
        return []
    names = ", ".join(sorted(choices(method.student)))
    detail = f"Method '{method.name}' cannot make a student '{order.student}'; it can make: {names}."
    return [Finding("method_lacks_student", "/student", detail)]


def _check_teacher(
    wiring: Wiring, order: JobOrder, method: Method, params: Params, teacher: Resolved
) -> None:
    missing = method.needs - teacher.spec.offers
    if missing:
        known = teachers.catalogue(wiring.settings).values()
        enough = sorted(spec.name for spec in known if method.needs <= spec.offers)
        raise Invalid(
            f"Method '{method.name}' needs {_words(missing)} of its teacher; '{order.teacher_id}' offers only "
            f"{_words(teacher.spec.offers)}. Choose another method, or one of these teachers: {', '.join(enough)}.",
            code="teacher_offers_too_little",
        )
    reason = teacher.unusable
    if isinstance(teacher.spec, TeacherSpec):
        state = teachers.availability(wiring, [teacher.spec])[teacher.spec.name]
        reason = "" if state.available else state.reason
    if reason:
        raise Invalid(f"Teacher '{order.teacher_id}' cannot be used: {reason}", code="teacher_unavailable")
    misfit = method.misfit(params, teacher.spec)
    if misfit is not None:
        finding = Finding(
            "parameter_misfits_teacher",
            "/params/" + misfit.parameter.replace(".", "/"),
            f"Parameter '{misfit.parameter}': {misfit.detail}.",
        )
        raise Invalid(finding.detail, code=finding.code, findings=(finding,))


def _generator(
    wiring: Wiring, order: JobOrder, method: Method | None, params: Params | None
) -> GeneratorSpec | None:
    """The order's generator; None where such a job reads none, or cannot be. Raises Invalid."""
    if method is None or params is None:
        return None
    if method.draws(params):
        return generators.resolve(wiring.settings, order.generator_id or DEFAULT)
    if order.generator_id is None:
        return None
    reading = ", ".join(name for name, known in METHODS.items() if known.reads("generator"))
    raise Invalid(
        f"Method '{method.name}' with these parameters reads no generator; leave generator_id out. Methods that can "
        f"read one: {reading}.",
        code="method_reads_no_generator",
    )


def _check_generator(wiring: Wiring, spec: GeneratorSpec) -> None:
    state = generators.availability(wiring, [spec])[spec.name]
    if not state.available:
        detail = f"Generator '{spec.name}' cannot be used: {state.reason} GET /v1/generators tells of others."
        finding = Finding("generator_unavailable", "/generator_id", detail)
        raise Invalid(detail, code=finding.code, findings=(finding,))


def _check_task(dataset_id: str, method: Method, task: str) -> None:
    """Masks are for methods that learn from masks, and those need them."""
    masked = task == "segmentation"
    if method.learns_masks == masked:
        return
    fitting = ", ".join(f"'{known.name}'" for known in METHODS.values() if known.learns_masks == masked)
    if masked:
        detail = (
            f"The images of data set {dataset_id} have masks, and method '{method.name}' makes no use of masks. "
            f"Choose one that does: {fitting}."
        )
    else:
        detail = (
            f"Method '{method.name}' learns from masks, and the images of data set {dataset_id} have none. "
            f"Upload images/ with masks/, or choose another method: {fitting}."
        )
    finding = Finding("method_for_another_task", "/method", detail)
    raise Invalid(detail, code=finding.code, findings=(finding,))


def _check_images(dataset_id: str, choice: Choice, shape: JobShape, splits: set[str]) -> None:
    missing = choice.method.missing_sources(shape, {*splits, *_NAMED}, choice.params)
    if missing:
        others = [
            f"'{method.name}'"
            for method in METHODS.values()
            if method.task == choice.method.task
            and not method.missing_sources(shape, {*splits, *_NAMED}, method.params())
        ]
        instead = f" Choose method {' or '.join(others)}, or add them." if others else " Add them."
        raise Invalid(
            f"Method '{choice.method.name}' needs {_listed(_SOURCE_WORDS[name] for name in missing)}; data set "
            f"{dataset_id} has only {_listed(_SOURCE_WORDS[name] for name in splits)}.{instead}",
            code="dataset_lacks_images",
            findings=(Finding("dataset_lacks_images", "/dataset_id", "It has no " + _listed(missing) + "."),),
        )


def _check_classes(dataset_id: str, choice: Choice, classes: list[str], shape: JobShape) -> None:
    spec = choice.teacher.spec
    if isinstance(spec, TeacherSpec):
        if not shape.support and choice.method.task != "features":
            raise Invalid(
                f"Teacher '{spec.name}' learns the classes from labelled images, and data set {dataset_id} has none. "
                "Choose a teacher of your own (POST /v1/teachers), which has classes, or add labelled images.",
                code="dataset_lacks_images",
            )
        return
    unknown = [name for name in classes if name not in spec.classes]
    if unknown:
        raise Invalid(
            f"Teacher '{spec.name}' does not know {len(unknown)} of the {len(classes)} classes of data set "
            f"{dataset_id}: {_quoted(unknown)}. Classes are matched by name; the teacher's are "
            f"{_quoted(spec.classes)}. Name the class folders as the teacher does, or give the teacher these names.",
            code="teacher_lacks_classes",
        )


def _check_budget(order: JobOrder, queries: int | None) -> None:
    if queries is not None and order.query_budget is not None and queries > order.query_budget:
        detail = (
            f"This job may put {queries} questions to its teacher, and query_budget allows {order.query_budget}. "
            f"Raise query_budget to {queries}, or let the job ask less: fewer synthetic images (synthesis.images), "
            "or a data set with fewer images."
        )
        finding = Finding("query_budget_too_small", "/query_budget", detail)
        raise Invalid(detail, code=finding.code, findings=(finding,))


def _overrides(order: JobOrder) -> dict[str, Any]:
    if order.precision == "fp32":
        return order.params
    export = order.params.get("export", {})
    return order.params | {"export": {**export, "int8": True}} if isinstance(export, dict) else order.params


def _unknown(what: str, pointer: str, given: str, valid: Iterable[str]) -> Finding:
    return Finding(
        f"unknown_{what}",
        pointer,
        f"There is no {what} '{given[:_LONGEST_NAME]}'; there are: {', '.join(sorted(valid))}.",
    )


def _parameter_finding(method: Method, problem: Any) -> Finding:
    path = [str(part)[:_LONGEST_NAME] for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] != "extra_forbidden":
        return Finding(
            "parameter_invalid", "/params/" + "/".join(path), f"Parameter '{name}': {problem['msg']}."
        )
    fields: Any = method.params.model_fields
    for part in path[:-1]:
        fields = fields[part].annotation.model_fields
    known = ", ".join(".".join([*path[:-1], field]) for field in fields)
    detail = f"Method '{method.name}' has no parameter '{name}'; there are: {known}."
    return Finding("unknown_parameter", "/params/" + "/".join(path), detail)


def _words(outputs: frozenset[Any]) -> str:
    return ", ".join(sorted(str(output) for output in outputs))


def _quoted(names: Iterable[str]) -> str:
    """Names in quotation marks, not too many."""
    quoted = [f"'{name}'" for name in names]
    more = len(quoted) - _MOST_NAMED
    return ", ".join(quoted[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _listed(words: Iterable[str]) -> str:
    return " and ".join(sorted(words))
