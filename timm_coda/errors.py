"""Convert library errors caused by invalid input into this package's own error classes."""

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
    """Re-raise errors that invalid input causes as `error_class`, with the message "{what}: {original message}".

    An error without a message, such as that of a bare `assert`, is named by its class.
    """
    try:
        yield
    except _WRONG_INPUT as error:
        raise error_class(f"{what}: {str(error).strip() or type(error).__name__}") from error
