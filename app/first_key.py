"""Make the first API key of a new database and print it, once.

    python -m app.first_key

`dram up` does this by itself; with separate parts an operator does it after the migration.
"""

from __future__ import annotations

import sys

import sqlalchemy as sa

from app import observability
from app.keys import service as keys
from app.settings import Settings
from app.wiring import Wiring


def main() -> int:
    settings = Settings()
    observability.configure(settings.log_level, settings.log_json)
    wiring = Wiring.build(settings)
    try:
        token = keys.ensure_first_key(wiring)
    except (sa.exc.OperationalError, sa.exc.ProgrammingError) as error:
        print(
            f"The database does not answer as it should: {error.orig}. Run `dram migrate` first.",
            file=sys.stderr,
        )
        return 1
    finally:
        wiring.close()
    if token is None:
        print("There is a key already; POST /v1/keys with one of scope 'admin' makes more.", file=sys.stderr)
        return 1
    print(token)
    return 0


if __name__ == "__main__":
    sys.exit(main())
