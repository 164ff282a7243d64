"""`dram teachers`: the networks that can teach, and black boxes of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from app import console
from app.client import ClientError, Dram, Probe, Teacher
from app.connect import AsJson, Where
from app.option_groups import grouped

teachers = typer.Typer(
    help="The teachers there are; add, probe and give headers to your own.", invoke_without_command=True
)

_PAGE = 100
#: Not the URL: a student's bundle names its teacher by the title, and is handed on.
_UNTITLED = "HTTP endpoint"

TeacherId = Annotated[str, typer.Argument(metavar="TEACHER", help="Its id; `dram teachers` lists them.")]
Classes = Annotated[
    Path,
    typer.Option(
        help="File with the names of its classes in the order of its outputs: one a line, or a JSON list."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS", help="Side of its images, or HEIGHTxWIDTH. A file's own, where it says it."
    ),
]
Channels = Annotated[int | None, typer.Option(min=1, max=3, help="3: RGB; 1: grey.")]
Layout = Annotated[str | None, typer.Option(help="NCHW or NHWC.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or uint8.")]
Range = Annotated[str | None, typer.Option("--range", help="Of the pixels: 0..1, -1..1 or 0..255.")]
Mean = Annotated[
    str | None, typer.Option(help="Subtracted after scaling: one number a channel, with commas.")
]
Std = Annotated[str | None, typer.Option(help="Divided by after that: one number a channel, with commas.")]
Answers = Annotated[str | None, typer.Option(help="What it says: probabilities, logits, top_k or label.")]
Title = Annotated[str | None, typer.Option(help="What people call it.")]
Licence = Annotated[str | None, typer.Option(help="Its licence.")]
Header = Annotated[
    list[str] | None,
    typer.Option(
        "--header", "-H", metavar="'NAME: VALUE'|@FILE",
        help="A secret header of each question, or a file with one a line; may be repeated. Kept encrypted.",
    ),
]  # fmt: skip


@teachers.callback()
@grouped
def listing(context: typer.Context, where: Where, as_json: AsJson = False) -> None:
    """List the teachers, first the catalogue's, then your own."""
    if context.invoked_subcommand is not None:
        return
    with where.client() as dram:
        console.listing(
            every_teacher(dram),
            as_json,
            ("teacher", "available", "parameters", "pixels", "licence", "about"),
            lambda row: (
                row["id"],
                "yes" if row["available"] else "no",
                console.millions(row.get("parameters")),
                row.get("input_size"),
                row.get("licence"),
                row.get("title") if row["available"] else row.get("reason"),
            ),
        )


@teachers.command()
@grouped
def add_onnx(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="One self-contained ONNX file.")],
    classes: Classes,
    title: Title = None,
    size: Size = None,
    channels: Channels = None,
    layout: Layout = None,
    dtype: Dtype = None,
    range_: Range = None,
    mean: Mean = None,
    std: Std = None,
    answers: Answers = None,
    output: Annotated[str | None, typer.Option(help="Name of the output, where it has several.")] = None,
    licence: Licence = None,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Add an ONNX file as a teacher; what it says of itself need not be said."""
    more = _given(
        input=_input(size, channels, layout, dtype, range_, mean, std) or None,
        answers=answers, output_name=output, licence=licence,
    )  # fmt: skip
    names = _names(classes)
    with where.client() as dram:
        _show_new(dram.teachers.add_onnx(model, classes=names, title=title, **more), as_json)


@teachers.command()
@grouped
def add_http(
    endpoint: Annotated[str, typer.Argument(metavar="URL", help="Of the request itself.")],
    classes: Classes,
    size: Annotated[str, typer.Option(metavar="PIXELS", help="Side of its images, or HEIGHTxWIDTH.")],
    protocol: Annotated[
        str | None,
        typer.Option(help="dram, kserve_v2, kserve_v2_binary, torchserve or tensorflow_serving."),
    ] = None,
    header: Header = None,
    title: Title = None,
    channels: Channels = None,
    layout: Layout = None,
    dtype: Dtype = None,
    range_: Range = None,
    mean: Mean = None,
    std: Std = None,
    answers: Answers = None,
    input_name: Annotated[str | None, typer.Option(help="Name of the input tensor (KServe v2).")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the output tensor; empty: the first.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in one request.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once, of each worker.")] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Longest time one request may take.")] = None,
    licence: Licence = None,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Add an HTTP endpoint as a teacher."""
    more = _given(
        protocol=protocol, answers=answers, input_name=input_name, output_name=output, batch_size=batch_size,
        concurrency=concurrency, timeout_s=timeout_s, licence=licence,
    )  # fmt: skip
    images = _input(size, channels, layout, dtype, range_, mean, std)
    names, headers = _names(classes), _headers(header)
    with where.client() as dram:
        made = dram.teachers.add_http(
            title=title or _UNTITLED, url=endpoint, classes=names, input=images, headers=headers, **more
        )
        _show_new(made, as_json)


@teachers.command()
@grouped
def probe(
    teacher: TeacherId,
    image: Annotated[
        Path | None, typer.Argument(metavar="[IMAGE]", help="JPEG, PNG or WebP. Left out: a test pattern.")
    ] = None,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Ask a teacher about one image; fail if it does not answer as it must."""
    with where.client() as dram:
        report = dram.teachers.probe(teacher, image)
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        _show_probe(report)
    if not report.ok:
        raise typer.Exit(1)


@teachers.command()
@grouped
def headers(teacher: TeacherId, header: Header = None, *, where: Where) -> None:
    """Put these secret headers in place of all old ones; without any, forget the old ones."""
    given = _headers(header)
    with where.client() as dram:
        dram.teachers.replace_headers(teacher, given)
    console.note(f"{teacher} is asked with {', '.join(given) or 'no headers of yours'} from now on")


def every_teacher(dram: Dram) -> Iterator[Teacher]:
    after: str | None = None
    while True:
        page = dram.teachers.list(limit=_PAGE, after=after)
        yield from page.data
        if not page.has_more:
            return
        after = page.data[-1].id


def _show_new(made: Teacher, as_json: bool) -> None:
    if as_json:
        console.print_json(made.model_dump(mode="json"))
        return
    console.out.print(made.id)
    console.note(f"See what it answers: dram teachers probe {made.id} [IMAGE]")


def _show_probe(report: Probe) -> None:
    for problem in report.problems:
        console.note(f"Problem: {problem}")
    if report.hint:
        console.note(f"  hint  {report.hint}")
    if report.latency_ms is not None and report.shape is not None:
        sizes = " x ".join(map(str, report.shape))
        console.note(f"{report.teacher_id} answered {sizes} numbers in {report.latency_ms:,.0f} ms")
    elif report.ok:
        console.note(f"{report.teacher_id} can be had")
    if report.top:
        console.table(("class", "score"), [(best.name, f"{best.score:.3f}") for best in report.top])


def _names(path: Path) -> list[str]:
    """The class names in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ClientError(f"'{path}' should hold a JSON list of class names")
    return names


def _headers(given: list[str] | None) -> dict[str, str]:
    lines = []
    for item in given or []:
        lines += Path(item[1:]).read_text().splitlines() if item.startswith("@") else [item]
    headers: dict[str, str] = {}
    for line in filter(str.strip, lines):
        name, colon, value = line.partition(":")
        if not colon:  # the line itself may be a secret
            raise typer.BadParameter("a header should read 'NAME: VALUE'")
        headers[name.strip()] = value.strip()
    return headers


def _input(
    size: str | None, channels: int | None, layout: str | None, dtype: str | None, values: str | None,
    mean: str | None, std: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What the service calls `input`, as far as it is said."""
    sides: dict[str, int] = {}
    if size is not None:
        height, _, width = size.lower().partition("x")
        if not height.isdecimal() or not (width or height).isdecimal():
            raise typer.BadParameter(f"the size '{size}' should read 224 or 28x32 (height x width)")
        sides = {"height": int(height), "width": int(width or height)}
    rest = _given(
        channels=channels, layout=layout, dtype=dtype, range=values, mean=_numbers(mean), std=_numbers(std)
    )
    return {**sides, **rest}


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' should be numbers with commas between, such as 0.5,0.5,0.5"
        ) from None


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
