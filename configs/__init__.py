"""Told to the user: the one kind of error that he can mend, and lines of progress.

Every module imports this one, a verifier's worker too: the standard library and tqdm, no more.
The settings are in settings.py, what they amount to in plan.py, the run's folder in folder.py.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class UserError(ValueError):
    """Something the user can mend: shown as one message, without a traceback."""


def need(condition: object, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """What libraries raise inside becomes one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever they raise: tokenizers has but Exception for a full disk
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise UserError(f"{what}: {reason[:400]}") from error


def say(message: str) -> None:
    """A line on the terminal, from one process and without breaking the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
