"""Keys say what depends on what; a method that cannot work cannot be declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from models.methods import METHODS
from models.pipeline import JobShape, Method, Params, Stage, inputs_of, registry

SOURCES = {"support": "d1", "unlabelled": "d2", "teacher": "d3", "student": "d4"}
SHAPE = JobShape(classes=5, support=25, smallest_class=5, unlabelled=100)
WITH_TEST = replace(SHAPE, test=50)


def nothing(context: Any, params: Any) -> None: ...


class Train(Params):
    steps: int = 10
    lr: float = 0.1


class Ask(Params):
    views: int = 1


class Toy(Params):
    ask: Ask = Ask()
    train: Train = Train()


ASK = Stage("ask", nothing, output="answers", inputs=("support", "teacher"), optional=("unlabelled",),
            params="ask", seeded=False, shards=lambda shape, params: shape.support // 10)  # fmt: skip
TRAIN = Stage("train", nothing, output="trained", inputs=("answers", "student"), params="train")
BUNDLE = Stage("bundle", nothing, output="bundle", inputs=("trained",), queue="cpu", seeded=False)


def method(*stages: Stage, **changed: Any) -> Method:
    return Method(
        name="toy", title="Toy", source="none", needs=frozenset(), params=Toy,
        stages=stages or (ASK, TRAIN, BUNDLE), **changed,
    )  # fmt: skip


def keys(
    planned_by: Method, sources: dict[str, str] = SOURCES, params: Params | None = None, seed: int = 0,
    shape: JobShape = SHAPE,
) -> dict[str, str]:  # fmt: skip
    planned = planned_by.plan(shape, sources, params or planned_by.resolve("balanced", {}), seed)
    return {entry.stage.name: entry.key for entry in planned}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_equal_work_has_equal_keys() -> None:
    assert keys(method()) == keys(method())
    assert len(set(keys(method()).values())) == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("student", {"train", "bundle"}),
        ("teacher", {"ask", "train", "bundle"}),
        ("support", {"ask", "train", "bundle"}),
        ("unlabelled", {"ask", "train", "bundle"}),
    ],
)
def test_another_source_changes_only_what_reads_it(source: str, expected: set[str]) -> None:
    assert changed(keys(method()), keys(method(), SOURCES | {source: "other"})) == expected


def test_an_optional_source_counts_where_the_job_has_it() -> None:
    without = {name: digest for name, digest in SOURCES.items() if name != "unlabelled"}
    assert changed(keys(method()), keys(method(), without)) == {"ask", "train", "bundle"}


def test_a_parameter_changes_the_stages_that_read_its_group_and_those_after() -> None:
    toy = method()
    assert changed(keys(toy), keys(toy, params=toy.resolve("draft", {"train": {"lr": 0.2}}))) == {
        "train",
        "bundle",
    }
    assert changed(keys(toy), keys(toy, params=toy.resolve("draft", {"train": {"lr": 0.1}}))) == set()


def test_the_seed_changes_seeded_stages_and_those_after() -> None:
    assert changed(keys(method()), keys(method(), seed=1)) == {"train", "bundle"}


def test_a_new_version_of_a_stage_changes_it_and_those_after() -> None:
    assert changed(keys(method()), keys(method(ASK, replace(TRAIN, version=2), BUNDLE))) == {
        "train",
        "bundle",
    }


def test_the_number_of_shards_changes_the_key() -> None:
    more = keys(method(), shape=replace(SHAPE, support=50))
    assert changed(keys(method()), more) == {"ask", "train", "bundle"}
    same = keys(
        method(), shape=replace(SHAPE, support=29)
    )  # as many shards: the images' digest is what counts
    assert changed(keys(method()), same) == set()


def test_each_shard_has_a_key_of_its_own_and_there_is_at_least_one() -> None:
    planned = method().plan(SHAPE, SOURCES, Toy(), 0)
    shard_keys = [key for entry in planned for key in entry.shard_keys]
    assert [len(entry.shard_keys) for entry in planned] == [2, 1, 1]
    assert len(set(shard_keys)) == 4
    assert len(method().plan(replace(SHAPE, support=3), SOURCES, Toy(), 0)[0].shard_keys) == 1


def test_what_a_stage_is_called_says_nothing_about_another_stage_with_the_same_inputs() -> None:
    twin = replace(TRAIN, name="twin", output="other")
    both = keys(method(ASK, TRAIN, twin, BUNDLE))
    assert both["train"] != both["twin"]
    assert both["train"] == keys(method())["train"]


def test_a_stage_that_is_not_needed_is_not_planned() -> None:
    examine = Stage(
        "examine", nothing, output="seen", inputs=("test",), needed=lambda shape, params: shape.test > 0
    )
    toy = method(ASK, TRAIN, examine, replace(BUNDLE, optional=("seen",)))
    assert "examine" not in keys(toy)
    tested = keys(toy, SOURCES | {"test": "d5"}, shape=WITH_TEST)
    assert list(tested) == ["ask", "train", "examine", "bundle"]
    assert tested["bundle"] != keys(toy)["bundle"]


def test_a_plan_without_a_source_that_a_stage_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="method 'toy', stage 'ask': no support"):
        keys(method(), {"teacher": "d", "student": "d"})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((TRAIN, ASK), "stage 'train': input 'answers' is made by no earlier stage"),
        ((replace(ASK, optional=("unlabeled",)),), "input 'unlabeled' is made by no earlier stage"),
        ((ASK, replace(ASK, name="again")), "'answers' is made twice"),
        ((replace(ASK, output="support"),), "'support' is made twice"),
        ((ASK, replace(ASK, output="others")), "two stages named 'ask'"),
        ((replace(ASK, params="asking"),), "no parameter group 'asking'"),
    ],
)
def test_a_broken_graph_cannot_be_declared(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(*stages)


def test_the_callers_values_stand_over_the_presets_and_those_over_the_defaults() -> None:
    toy = method(presets={"draft": {"train": {"steps": 2, "lr": 0.5}}})
    assert toy.resolve("draft", {}) == Toy(train=Train(steps=2, lr=0.5))
    assert toy.resolve("draft", {"train": {"lr": 0.9}, "ask": {"views": 3}}) == Toy(
        ask=Ask(views=3), train=Train(steps=2, lr=0.9)
    )
    assert toy.resolve("best", {}) == Toy()  # a method need not have something to say about each
    assert toy.presets == {"draft": {"train": {"steps": 2, "lr": 0.5}}}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="no preset 'bset'; there are: balanced, best, draft"):
        method().resolve("bset", {})


@pytest.mark.parametrize(
    "overrides",
    [{"trian": {}}, {"train": {"step": 1}}, {"train": {"steps": "many"}}, {"train": 5}, {"train": None}],
)
def test_unknown_and_impossible_parameters_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        method().resolve("balanced", overrides)


def test_a_stage_gets_its_own_parameters_as_a_typed_group() -> None:
    toy = method()
    assert toy.stage_params(TRAIN, {"steps": 4}) == Train(steps=4)
    assert toy.stage_params(BUNDLE, {}) is None
    assert toy.stage("train") is TRAIN


def test_a_stage_gets_its_optional_inputs_where_they_exist() -> None:
    assert inputs_of(ASK, {"support", "teacher"}) == ("support", "teacher")
    assert inputs_of(ASK, {"support", "teacher", "unlabelled", "test"}) == (
        "support",
        "teacher",
        "unlabelled",
    )


def test_two_methods_of_a_name_are_refused() -> None:
    assert list(registry(method(), replace(method(), name="other"))) == ["toy", "other"]
    with pytest.raises(ValueError, match="two methods are named 'toy'"):
        registry(method(), method())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_with_the_bundle(name: str) -> None:
    assert METHODS[name].stages[-1].output == "bundle"


class TestKd:
    """What users are told is reused between two jobs of the method `kd`."""

    kd = METHODS["kd"]
    of_the_teacher = frozenset({"ask", "label", "teacher_graph"})

    def all(self) -> set[str]:
        return set(keys(self.kd))

    def reused(
        self, other: dict[str, str] | None = None, shape: JobShape = SHAPE, sources: dict[str, str] = SOURCES,
        **changes: Any,
    ) -> set[str]:  # fmt: skip
        """The stages that a job need not run after one that differed in these sources or in `changes` only."""
        before = keys(self.kd, sources, shape=shape)
        return set(before) - changed(before, keys(self.kd, sources | (other or {}), shape=shape, **changes))

    def with_params(self, **groups: dict[str, Any]) -> set[str]:
        return self.reused(params=self.kd.resolve("balanced", groups))

    def test_a_job_without_test_images_cross_validates_and_one_with_them_examines(self) -> None:
        assert "cross_validate" in self.all()
        assert "examine" not in self.all()
        tested = keys(self.kd, SOURCES | {"test": "d5"}, shape=WITH_TEST)
        assert "cross_validate" not in tested
        assert "examine" in tested

    def test_another_student_asks_the_teacher_nothing_again(self) -> None:
        assert self.reused({"student": "other"}) == self.of_the_teacher
        tested = SOURCES | {"test": "d5"}
        assert self.reused({"student": "other"}, WITH_TEST, tested) == {
            *self.of_the_teacher,
            "examine",
        }

    def test_another_temperature_starts_at_distill(self) -> None:
        assert self.with_params(distillation={"temperature": 5.0}) == self.of_the_teacher

    def test_another_seed_asks_the_teacher_nothing_again(self) -> None:
        assert self.reused(seed=1) == self.of_the_teacher

    def test_another_head_keeps_the_teachers_answers(self) -> None:
        assert self.with_params(head={"ridge_lambda": 2.0}) == {"ask"}

    def test_another_number_of_views_asks_again(self) -> None:
        assert self.with_params(teacher={"views": 3}) == set()

    def test_int8_and_latency_train_nothing_again(self) -> None:
        trained = {*self.of_the_teacher, "distill", "cross_validate"}
        assert self.with_params(export={"int8": True}) == trained
        assert self.with_params(evaluation={"latency_runs": 7}) == {*trained, "export"}

    def test_other_test_images_train_nothing_again(self) -> None:
        tested = SOURCES | {"test": "d5"}
        assert self.reused({"test": "other"}, WITH_TEST, tested) == {
            *self.of_the_teacher,
            "distill",
            "export",
        }

    def test_the_folds_depend_on_the_smallest_class_only(self) -> None:
        def folds(smallest: int) -> int:
            planned = self.kd.plan(replace(SHAPE, smallest_class=smallest), SOURCES, self.kd.params(), 0)
            (entry,) = (entry for entry in planned if entry.stage.name == "cross_validate")
            return len(entry.shard_keys)

        assert [folds(smallest) for smallest in (2, 3, 5, 50)] == [2, 3, 5, 5]
