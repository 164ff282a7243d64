"""From what a user says of a black box to its description, with everything that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from app.errors import BadRequest, Finding, Invalid, findings_of
from app.security.egress import Egress
from app.settings import Settings
from app.teachers.schemas import BlackBoxOrder, HttpOrder, InputOrder, OnnxOrder
from models.errors import TeacherError
from models.teachers import onnx_file
from models.teachers.black_box import AnswerKind, HttpTeacher, InputFormat, OnnxTeacher
from models.teachers.http_protocols import ADAPTERS
from models.teachers.onnx_file import OnnxFacts, OutputFacts

Kind = TypeVar("Kind", bound=BlackBoxOrder)


def read_order(order: type[Kind], content: bytes, *, what: str, egress: Egress | None = None) -> Kind:
    """The order in a JSON text. Raises `BadRequest` where it is no JSON, `Invalid` with every finding.

    `egress`: checks the order's URL, too, however much else is wrong.
    """
    document = _parsed(content, what)
    findings: tuple[Finding, ...] = ()
    made: Kind | None = None
    try:
        made = order.model_validate(document)
    except ValidationError as error:
        findings = findings_of(error.errors(include_url=False, include_input=False))
    url = document.get("url") if isinstance(document, dict) else None
    if egress is not None and isinstance(url, str) and not any(f.pointer == "/url" for f in findings):
        findings += _url_findings(egress, url)
    if findings or made is None:
        refuse(findings, what)
    return made


def http_teacher(order: HttpOrder, name: str) -> HttpTeacher:
    """Raises `Invalid` where the protocol cannot carry such answers."""
    carried = ADAPTERS[order.protocol].answers
    if order.answers not in carried:
        kinds = ", ".join(sorted(carried))
        raise _invalid(
            "answers_differ",
            "/answers",
            f"Protocol '{order.protocol}' carries no '{order.answers}'; it has: {kinds}.",
        )
    described = order.model_dump(exclude={"url", "headers"})
    return HttpTeacher(name=name, source=order.url, **described)


def read_upload(described: bytes, model: Path, settings: Settings) -> tuple[OnnxOrder, OnnxFacts]:
    """What is said of the file, and what the file says of itself in a confined child process.

    Raises `BadRequest`, and `Invalid` with what is wrong with either.
    """
    try:
        order = read_order(OnnxOrder, described, what="The description")
    except Invalid as wrong:
        try:
            _inspected(model, settings)
        except Invalid as unfit:
            refuse((*wrong.findings, *unfit.findings), "The description")
        raise
    return order, _inspected(model, settings, order.input.stated(), order.output_name or "")


def _inspected(
    model: Path, settings: Settings, stated: InputFormat | None = None, output: str = ""
) -> OnnxFacts:
    try:
        return onnx_file.inspect(model, onnx_file.Limits(bytes=settings.max_model_bytes), stated, output)
    except TeacherError as error:
        raise _invalid(error.code, "/model", _told(error)) from error


def onnx_teacher(order: OnnxOrder, name: str, facts: OnnxFacts) -> OnnxTeacher:
    """The file's own facts, completed by the order. Raises `Invalid`."""
    output = _output(order, facts)
    return OnnxTeacher(
        name=name,
        title=order.title,
        classes=tuple(order.classes),
        input=_input(order.input, facts.format),
        answers=_answers(order.answers, output),
        licence=order.licence,
        licence_url=order.licence_url,
        source=facts.sha256,
        bytes=facts.bytes,
        parameters=facts.parameters,
        input_name=facts.input_name,
        output_name=output.name,
    )


def _output(order: OnnxOrder, facts: OnnxFacts) -> OutputFacts:
    """The output that answers for these classes: the one that is named, or the only one that can."""
    classes = len(order.classes)
    fitting = [output for output in facts.outputs if output.classes in (0, classes)]
    if len(fitting) == 1:
        return fitting[0]
    sizes = ", ".join(f"'{output.name}' for {output.classes or 'any'}" for output in facts.outputs)
    if fitting:
        raise _invalid(
            "output_ambiguous", "/output_name", f"Several outputs answer for classes: {sizes}. Name one."
        )
    raise _invalid(
        "classes_differ",
        "/classes",
        f"There are {classes} class names, but the file answers for another number of classes: {sizes}. Give one name "
        "for each, in their order.",
    )


def _input(stated: InputOrder, found: InputFormat) -> InputFormat:
    try:
        return stated.applied_to(found)
    except ValueError as error:
        raise _invalid("value_error", "/input", f"{error}; the file takes {found.dtype} images.") from None


def _answers(stated: AnswerKind | None, output: OutputFacts) -> AnswerKind:
    if stated is AnswerKind.PROBABILITIES and output.looks_like is AnswerKind.LOGITS:
        raise _invalid(
            "answers_differ",
            "/answers",
            f"Output '{output.name}' gives no probabilities: a try gave numbers below 0, or that do not sum to 1. If "
            "these are logits, say answers: logits.",
        )
    found = stated or output.looks_like
    if found is None:
        kinds = ", ".join(AnswerKind)
        raise _invalid(
            "missing",
            "/answers",
            f"Output '{output.name}' does not show what it gives. State answers: {kinds}.",
        )
    return found


def _invalid(code: str, pointer: str, detail: str) -> Invalid:
    return Invalid(detail, code=code, findings=(Finding(code, pointer, detail),))


def refuse(findings: tuple[Finding, ...], what: str) -> NoReturn:
    first = findings[0]
    more = f" (and {len(findings) - 1} more, see errors)" if len(findings) > 1 else ""
    detail = first.detail.removesuffix(".")
    raise Invalid(f"{first.pointer or what}: {detail}{more}.", findings=findings)


def _parsed(content: bytes, what: str) -> Any:
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{what} is no valid JSON: {error}.", code="json_invalid") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _url_findings(egress: Egress, url: str) -> tuple[Finding, ...]:
    try:
        egress.check(url)
    except TeacherError as error:
        return (Finding(error.code, "/url", _told(error)),)
    return ()


def _told(error: TeacherError) -> str:
    """Its words as whole sentences."""
    detail = error.detail[:1].upper() + error.detail[1:]
    return f"{detail}. {error.hint}".removesuffix(". ")
