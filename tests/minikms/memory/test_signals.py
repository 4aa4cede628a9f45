"""Signals are data that the event loop reads; no handler runs."""

from functools import partial

from tests.harness.scripts import answer_of

in_a_process = partial(
    answer_of, "import os, signal, sys, threading\nfrom minikms.memory import SignalReader, unblock_signals"
)


def test_every_blockable_signal_is_read_as_a_number() -> None:
    answer = in_a_process("""
        reader = SignalReader()
        signals = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
        signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        signals.remove(signal.SIGCONT)  # the stop signals that follow take it back: signal(7)
        for number in signals:
            os.kill(os.getpid(), number)
        answer = [sorted(reader.read()), [int(number) for number in signals], list(reader.read())]
    """)
    assert answer[0] == answer[1]
    assert len(answer[0]) > 50
    assert answer[2] == []


def test_no_python_handler_runs_even_if_one_is_set() -> None:
    answer = in_a_process("""
        ran = []
        signal.signal(signal.SIGTERM, lambda *_: ran.append(1))
        reader = SignalReader()
        for _ in range(1000):
            os.kill(os.getpid(), signal.SIGTERM)
        answer = [list(reader.read()), ran]
    """)
    assert answer == [[15], []]


def test_threads_that_start_later_inherit_the_mask() -> None:
    answer = in_a_process("""
        reader = SignalReader()
        blocked = []
        thread = threading.Thread(target=lambda: blocked.append(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
        thread.start(), thread.join()
        answer = [blocked[0], len(signal.valid_signals())]
    """)
    assert answer[0] >= answer[1] - 2  # SIGKILL and SIGSTOP cannot be blocked


def test_the_event_loop_is_woken_by_a_signal() -> None:
    answer = in_a_process("""
        import asyncio, uvloop
        async def main():
            got = asyncio.get_running_loop().create_future()
            with SignalReader() as reader:
                asyncio.get_running_loop().add_reader(reader.fileno(), lambda: got.set_result(list(reader.read())))
                os.kill(os.getpid(), signal.SIGHUP)
                try:
                    async with asyncio.timeout(60):
                        return await got
                finally:
                    asyncio.get_running_loop().remove_reader(reader.fileno())
        answer = [asyncio.run(main()), uvloop.run(main())]
    """)
    assert answer == [[1], [1]]


def test_a_child_that_unblocks_can_be_ended_and_one_that_does_not_cannot() -> None:
    answer = in_a_process("""
        import subprocess, time
        SignalReader()
        answer = []
        for prepare, seconds in ((None, 0.3), (unblock_signals, 25)):
            child = subprocess.Popen(["/bin/sleep", "30"], preexec_fn=prepare)
            child.terminate()
            try:
                answer.append(child.wait(timeout=seconds))
            except subprocess.TimeoutExpired:
                answer.append("alive")
                child.kill(), child.wait()
    """)
    assert answer == ["alive", -15]


def test_the_descriptor_is_not_inherited_and_closing_twice_is_fine() -> None:
    answer = in_a_process("""
        reader = SignalReader()
        answer = [os.get_inheritable(reader.fileno())]
        reader.close(), reader.close()
    """)
    assert answer == [False]
