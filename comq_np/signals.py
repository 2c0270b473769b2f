"""Signals that end the command as exceptions do, so that nothing unfinished is left."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

#: Seconds after which a dropped signal is sent again.
SOON = 0.01


class Terminated(BaseException):
    """SIGTERM has come."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the command as an exception does, so that no unfinished file is left."""

    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Send a signal again that Python has dropped, as where one comes amid the callback of a weak reference."""
    senders: list[threading.Timer] = []
    before = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(dropped.exc_type)
        if number is None:
            before(dropped)
            return
        senders.append(threading.Timer(SOON, _send, (number,)))
        senders[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for sender in senders:
            sender.cancel()


def _send(number: signal.Signals) -> None:
    """Send a signal to the main thread, which may be waiting."""
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, number)
    else:
        signal.raise_signal(number)
