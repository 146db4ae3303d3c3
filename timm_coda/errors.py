"""Turn the errors that libraries raise for wrong input into this package's own, which name what was wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

__all__ = ["wrap_errors"]

_WRONG_INPUT = (
    *(ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError, OSError),
    SafetensorError,
)


@contextmanager
def wrap_errors(what: str, error_class: type[ValueError]) -> Iterator[None]:
    """Raise `error_class` with the message "what: original message" for an error that wrong input causes inside."""
    try:
        yield
    except _WRONG_INPUT as error:
        raise error_class(f"{what}: {error}") from error
