"""What can go wrong in the mathematics, in words a user can act on. No torch, no HTTP."""


class ModelsError(Exception):
    """Base. `code` is stable; `hint` says how to mend it; `retryable` whether the same work may succeed later."""

    code = "models_error"
    retryable = False

    def __init__(self, detail: str, hint: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


class DataError(ModelsError):
    """The images cannot be used as asked."""

    code = "data_unusable"


class TeacherError(ModelsError):
    """The teacher cannot be loaded or does not answer as it must."""

    code = "teacher_unusable"


class BudgetSpent(TeacherError):
    """The job may not ask its teacher any more."""

    code = "query_budget_spent"


class Unreachable(TeacherError):
    """The teacher's endpoint gave no usable HTTP answer. `sent`: it may have worked on the question all the same."""

    code = "teacher_unreachable"
    retryable = True

    def __init__(self, detail: str, hint: str = "", *, sent: bool = True) -> None:
        super().__init__(detail, hint)
        self.sent = sent


class TryAgain(TeacherError):
    """The teacher cannot answer now. `after`: seconds it asks for; `counted`: it may have worked all the same."""

    code = "teacher_busy"
    retryable = True

    def __init__(
        self, detail: str, hint: str = "", *, after: float | None = None, counted: bool = True
    ) -> None:
        super().__init__(detail, hint)
        self.after = after
        self.counted = counted


class QuestionRefused(TeacherError):
    """The teacher turned the question away unanswered and will do so again: it does not count."""


class GeneratorError(ModelsError):
    """The generator of images cannot be loaded or used as asked."""

    code = "generator_unusable"


class TrainingError(ModelsError):
    """Training did not work, for example the loss is no number."""

    code = "training_failed"


class ExportError(ModelsError):
    """The exported graph does not do what the network does."""

    code = "export_failed"
