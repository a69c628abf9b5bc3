"""SIGTERM as an end in order."""

import signal
import threading
from collections.abc import Iterator

import pytest

from tune_implicit.searches.signals import ending_in_order


@pytest.fixture(autouse=True)
def as_python_has_it() -> Iterator[None]:
    """Signals as Python has them, where Ray and Tune have left handlers of their own."""
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_does_what_ctrl_c_does() -> None:
    with ending_in_order() as ended:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert ended.by_signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_without_one_nothing_is_noted() -> None:
    with ending_in_order() as ended:
        pass
    assert ended.by_signal is None


def test_whoever_takes_care_of_it_keeps_it() -> None:
    def own(number: int, frame: object) -> None:
        return

    signal.signal(signal.SIGTERM, own)
    try:
        with ending_in_order():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_in_another_thread_it_stays_as_it_is() -> None:
    seen = []

    def work() -> None:
        with ending_in_order():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
