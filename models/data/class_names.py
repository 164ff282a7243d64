"""What the values of masks mean: `classes.txt`, one name a line, the first for value 0. No torch."""

from __future__ import annotations

from collections import Counter

from models.data.archive import IGNORED
from models.errors import DataError

FILE_NAME = "classes.txt"
MAX_LENGTH = 100
#: Names of so many characters, of up to four bytes each, a line each.
MAX_BYTES = IGNORED * (4 * MAX_LENGTH + 2)


def read(content: bytes) -> tuple[str, ...]:
    """The names in the file. Raises `DataError` for a name that is empty, too long or there twice, and for too many."""
    try:
        lines = content.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{FILE_NAME} is not UTF-8: {error.reason}", "Save it as UTF-8.") from error
    names = tuple(" ".join(line.split()) for line in lines)
    if not 1 <= len(names) <= IGNORED:
        raise DataError(
            f"{FILE_NAME} has {len(names)} names; 1 to {IGNORED} are possible", "Write one a line."
        )
    for number, name in enumerate(names, start=1):
        if not (1 <= len(name) <= MAX_LENGTH and name.isprintable()):
            raise DataError(
                f"line {number} of {FILE_NAME} is no name of 1 to {MAX_LENGTH} printable characters",
                "Each line names a class, the first that of value 0.",
            )
    (most, count), *_ = Counter(name.casefold() for name in names).most_common(1)
    if count > 1:
        raise DataError(f"{FILE_NAME} names '{most}' {count} times", "Give each class a name of its own.")
    return names


def of_values(highest: int) -> tuple[str, ...]:
    """Names for the values 0 to `highest` where nobody gave any."""
    return tuple(f"class {value}" for value in range(highest + 1))
