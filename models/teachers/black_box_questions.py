"""What FS-BBT asks its teacher: INTRODUCE, ASK_REAL, ASK_SYNTHETIC, COLLECT, HOLD_OUT, EXAMINE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import arrays, teachers
from models.arrays import Labels, Probabilities
from models.data import archive, fewshot, images
from models.errors import TeacherError
from models.generators import shards
from models.methods.fsbbt import BlackBoxParams
from models.pipeline import StageContext, digest
from models.runtime import generator, resolve_device
from models.stages import CHUNK, HeadParams, TeacherParams
from models.teachers import black_box, few_shot_head, labelling, ledger, questions
from models.teachers.black_box import AnswerKind, BlackBox, HttpTeacher, OnnxTeacher, Pixels
from models.teachers.http_endpoint import HttpEndpoint
from models.teachers.network_black_box import NetworkBlackBox
from models.teachers.onnx_file import OnnxFile

#: Side of the synthetic images where none is given: the teacher's own, within these bounds.
_SMALLEST_SIDE, _LARGEST_SIDE = 28, 64
_FEWEST_HELD_OUT = 10
#: Images are decoded and asked about in pieces of about this much memory.
_PIECE_BYTES = 2**27
#: Below this the logarithm of a probability is cut off.
_LEAST = 1e-8
_WHOLE_VIEW = (0.0, 0.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Introduction:
    """How this job reads its teacher.

    `classes` are the student's, `columns` where the teacher's answers have them. `answers_key` names the teacher's
    answers. `size` is the side of synthetic images. `held_out` are positions of real images (labelled, then
    unlabelled), ascending, that nothing learns from.
    """

    classes: tuple[str, ...]
    columns: tuple[int, ...]
    answers: AnswerKind
    answers_key: str
    label_smoothing: float
    size: int
    held_out: tuple[int, ...]

    def probabilities(self, answers: Tensor) -> Probabilities:
        """float32 [n, C] over the student's classes from answers [n, C'] over the teacher's.

        What the teacher gives to other classes is divided among these in proportion; an answer that gives these
        nothing says nothing, so all are alike.
        """
        whole = torch.from_numpy(ledger.smoothed(answers.numpy(), self.answers, self.label_smoothing))
        ours = whole[:, list(self.columns)].double()
        total = ours.sum(1, keepdim=True)
        even = torch.full_like(ours, 1 / len(self.columns))
        return torch.where(total > _LEAST, ours / total.clamp(min=_LEAST), even).float()

    def kept(self, real: int) -> Tensor:
        """Positions int64, ascending, of the `real` images that are not held out."""
        learnt = torch.ones(real, dtype=torch.bool)
        learnt[list(self.held_out)] = False
        return learnt.nonzero()[:, 0]


def read(folder: Path) -> Introduction:
    """What INTRODUCE left in a `black_box` folder."""
    document = json.loads((folder / "black_box.json").read_text())
    lists = {name: tuple(document[name]) for name in ("classes", "columns", "held_out")}
    return Introduction(**{**document, **lists, "answers": AnswerKind(document["answers"])})


def introduce(context: StageContext, params: BlackBoxParams) -> None:
    """Decide what this job asks and how it reads the answers. Writes `black_box.json`, and a network's head."""
    spec = teachers.read_any(context.folder("teacher"))
    held_out = () if context.shape.test else _held_out(context, params.held_out)
    if isinstance(spec, OnnxTeacher | HttpTeacher):
        offered, kind, key = spec.classes, spec.answers, spec.answers_key
    else:
        head = _fit_head(context, params.head, held_out)
        head.save(context.output)
        offered, kind, key = head.classes, AnswerKind.PROBABILITIES, _network_key(spec, context.output)
    classes = _classes_of_images(context) or offered
    introduction = Introduction(
        classes=classes,
        columns=_columns(classes, offered, spec.name),
        answers=kind,
        answers_key=key,
        label_smoothing=params.label_smoothing,
        size=params.size or max(_SMALLEST_SIDE, min(_LARGEST_SIDE, spec.input_size)),
        held_out=held_out,
    )
    document = json.dumps(asdict(introduction), ensure_ascii=False, indent=1)
    (context.output / "black_box.json").write_text(document)
    context.report(1, 1)


def ask_real(context: StageContext) -> None:
    """The teacher's answers to this shard's real images, as they are stored."""
    places = range(context.shard * CHUNK, min((context.shard + 1) * CHUNK, _real(context)))
    answers = _ask(context, _real_images(context, places), len(places))
    save_file({"answers": answers}, context.output / "answers.safetensors")


def ask_synthetic(context: StageContext) -> None:
    """The teacher's answers to this shard of the synthetic images, or of those that were chosen."""
    folders = context.inputs["synthetic"]
    if "chosen" in context.inputs:
        asked = load_file(context.folder("chosen") / "chosen.safetensors")["index"]
    else:
        asked = torch.arange(shards.count(folders))
    places = shards.positions(context.shard, len(asked))
    index = asked[places.start : places.stop]
    pixels = shards.pixels_at(folders, index)
    rows = (_as_shown(image) for image in pixels)
    answers = _ask(context, rows, len(index))
    save_file({"answers": answers, "index": index.clone()}, context.output / "answers.safetensors")


def collect(context: StageContext) -> None:
    """All answers as `SoftLabels` over the student's classes; images that are held out get none."""
    introduction = read(context.folder("black_box"))
    real = _real(context)
    kept = introduction.kept(real)
    answers = [read_real(context.inputs["real_answers"])[kept]]
    image = [kept]
    for folder in context.inputs.get("synthetic_answers", ()):
        shard = load_file(folder / "answers.safetensors")
        answers.append(shard["answers"])
        image.append(real + shard["index"])
    soft_labels(introduction, torch.cat(answers), torch.cat(image)).save(context.output)
    labelling.save_classes(context.output, introduction.classes)
    context.report(1, 1)


def hold_out(context: StageContext) -> None:
    """What the teacher answered to the held-out real images; "labels" are -1 where there is none."""
    introduction = read(context.folder("black_box"))
    index = torch.tensor(introduction.held_out, dtype=torch.long)
    answers = read_real(context.inputs["real_answers"])[index]
    document = {
        "probabilities": introduction.probabilities(answers),
        "index": index,
        "labels": real_labels(context)[index],
    }
    save_file(document, context.output / "answers.safetensors")
    context.report(1, 1)


def examine(context: StageContext) -> None:
    """The teacher's probabilities [n, C] over the student's classes for this shard's test images."""
    introduction = read(context.folder("black_box"))
    folder = context.folder("test")
    labels = fewshot.read_labels(folder)[context.shard * CHUNK : (context.shard + 1) * CHUNK]
    answers = _ask(context, _stored(folder, context.shard * CHUNK, len(labels)), len(labels))
    document = {"probabilities": introduction.probabilities(answers), "labels": labels}
    save_file(document, context.output / "probabilities.safetensors")


def open_box(context: StageContext) -> BlackBox:
    """The teacher of this stage, ready to be asked. Raises `TeacherError`."""
    folder = context.folder("teacher")
    spec = teachers.read_any(folder)
    if isinstance(spec, OnnxTeacher):
        return OnnxFile(black_box.model_path(folder), spec)
    if isinstance(spec, HttpTeacher):
        if context.access is None or context.access.transport is None:
            raise TeacherError(
                f"teacher '{spec.name}' is an endpoint, and this run has no network", "Give it a transport."
            )
        return HttpEndpoint(spec, context.access.transport, context.access.headers)
    introduced = context.folder("black_box")
    head = few_shot_head.load(introduced)
    network = teachers.load(spec, str(resolve_device(context.device)), head.input_size)
    return NetworkBlackBox(network, head, read(introduced).answers_key)


def soft_labels(introduction: Introduction, answers: Tensor, image: Tensor) -> labelling.SoftLabels:
    """Answers [n, C'] to whole images `image` [n] as logits whose softmax they are."""
    logits = introduction.probabilities(answers).clamp(min=_LEAST).log()
    return labelling.SoftLabels(logits, image, torch.tensor(_WHOLE_VIEW).repeat(len(image), 1))


def read_real(folders: tuple[Path, ...]) -> Tensor:
    """All shards' answers float32 [n, C'] to the real images: labelled, then unlabelled."""
    return torch.cat([load_file(folder / "answers.safetensors")["answers"] for folder in folders])


def real_pixels(context: StageContext, size: int) -> arrays.Pixels:
    """The real images, labelled, then unlabelled: uint8 [n, 3, size, size]."""
    return torch.cat([fewshot.load(folder, size).pixels for folder in _splits(context)])


def real_labels(context: StageContext) -> Labels:
    """The labels [n] of the real images, labelled, then unlabelled."""
    return torch.cat([fewshot.read_labels(folder) for folder in _splits(context)])


def _ask(context: StageContext, pictures: Iterator[Pixels], total: int) -> Tensor:
    """Answers float32 [n, C'] to images [H, W, 3], from the ledger or the teacher."""
    if context.access is None:
        raise TeacherError("this stage may not ask the teacher")
    box = open_box(context)
    rows: list[Tensor] = []
    done = 0
    try:
        for piece in _pieces(pictures):
            answers = ledger.ask(box, piece, context.access.ledger, partial(_tell, context, done, total))
            rows.append(torch.from_numpy(answers))
            done += len(piece)
    finally:
        box.close()
    return torch.cat(rows)


def _tell(context: StageContext, before: int, total: int, done: int) -> None:
    context.report(before + done, total)


def _pieces(pictures: Iterator[Pixels]) -> Iterator[list[Pixels]]:
    piece: list[Pixels] = []
    size = 0
    for picture in pictures:
        piece.append(picture)
        size += picture.nbytes
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _real(context: StageContext) -> int:
    return context.shape.support + context.shape.unlabelled


def _splits(context: StageContext) -> list[Path]:
    return [context.folder(name) for name in ("support", "unlabelled") if name in context.inputs]


def _real_images(context: StageContext, places: range) -> Iterator[Pixels]:
    offset = 0
    for folder in _splits(context):
        count = len(archive.read_index(folder / archive.FILE_NAME).images)
        first, last = max(0, places.start - offset), min(count, places.stop - offset)
        if first < last:
            yield from _stored(folder, first, last - first)
        offset += count


def _stored(folder: Path, first: int, count: int) -> Iterator[Pixels]:
    """The images of a split from `first` on, as stored."""
    for image, content in islice(archive.contents(folder / archive.FILE_NAME), first, first + count):
        yield _as_shown(images.decode(content, image.name))


def _as_shown(image: Tensor) -> Pixels:
    """uint8 [H, W, 3] of an image [3, H, W]."""
    pixels: Pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return pixels


def _classes_of_images(context: StageContext) -> tuple[str, ...]:
    """The class names of the labelled images, be they for learning or for the test; none where there are none."""
    for name in ("support", "test"):
        if name in context.inputs:
            return archive.read_index(context.folder(name) / archive.FILE_NAME).classes
    return ()


def _columns(classes: tuple[str, ...], offered: tuple[str, ...], teacher: str) -> tuple[int, ...]:
    """Where the teacher's answers have each class, by name."""
    unknown = [name for name in classes if name not in offered]
    if unknown:
        raise TeacherError(
            f"teacher '{teacher}' does not know the images' classes {_named(unknown)}; it knows {_named(offered)}",
            "Name the image folders as the teacher names its classes.",
        )
    return tuple(offered.index(name) for name in classes)


def _named(classes: list[str] | tuple[str, ...], most: int = 10) -> str:
    shown = ", ".join(f"'{name}'" for name in classes[:most])
    return shown + (f" and {len(classes) - most} more" if len(classes) > most else "")


def _held_out(context: StageContext, share: float) -> tuple[int, ...]:
    """A fixed random share of the real images, 10 or half of them at least; each class keeps one labelled image."""
    labels = real_labels(context)
    order = torch.randperm(len(labels), generator=generator(0, "held out"))
    firsts = {int(labels[at]): int(at) for at in order.flip(0) if labels[at] >= 0}
    only = set(firsts.values())
    free = [at for at in order.tolist() if at not in only]
    count = max(round(share * len(labels)), min(_FEWEST_HELD_OUT, len(labels) // 2))
    return tuple(sorted(free[:count]))


def _fit_head(
    context: StageContext, params: HeadParams, held_out: tuple[int, ...]
) -> few_shot_head.FewShotHead:
    """A network's classifier, fitted to the views of the labelled images that are not held out."""
    spec = teachers.read_spec(context.folder("teacher"))
    if "support" not in context.inputs:
        raise TeacherError(
            f"teacher '{spec.name}' has no classes of its own, and there are no labelled images to give it some",
            "Add a folder of labelled images for each class, or name a teacher of your own with its classes.",
        )
    support = context.folder("support")
    labels = fewshot.read_labels(support)
    teacher = teachers.load(spec, str(resolve_device(context.device)))
    features, image = questions.features_of_support(context, teacher, TeacherParams())
    learnt = ~torch.isin(image, torch.tensor(held_out, dtype=torch.long))
    features, image = features[learnt], image[learnt]
    classes = archive.read_index(support / archive.FILE_NAME).classes
    centre = features.mean(0)
    return few_shot_head.fit(features, labels[image], image, centre, params, classes, teacher.input_size)


def _network_key(spec: teachers.TeacherSpec, folder: Path) -> str:
    """Names the answers of a network with the head in `folder`."""
    head = [(folder / name).read_bytes().hex() for name in ("head.json", "head.safetensors")]
    return digest([spec.model_dump(mode="json"), *head, black_box.ANSWERS_VERSION])
