"""Triton's interpreter, made about three times faster without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def fast_interpreter() -> Iterator[None]:
    """Leave out two costs of interpreted kernels that are paid at every operation.

    ``tl`` is patched once a launch for each function instead of at every call of a helper, and 32-bit arithmetic is
    not repeated in 64 bits to look for overflow. Works in triton 3.6 and 3.7.
    """
    from triton.runtime import interpreter

    patched: set[object] = set()

    def patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(function: Any) -> Any:
            if function not in patched:
                patched.add(function)
                return patch(function)
            return None

        return wrapper

    def forget(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            patched.clear()  # the interpreter undoes its patches after each launch
            try:
                return run(*args, **kwargs)
            finally:
                patched.clear()

        return wrapper

    options = type(interpreter.interpreter_builder.options)(sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once(interpreter._patch_lang)),
        mock.patch.object(interpreter.GridExecutor, "__call__", forget(interpreter.GridExecutor.__call__)),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        yield
