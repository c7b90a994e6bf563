import asyncio
import threading
import time

from forge_harness.serving.pacing import HOLD_S, PAUSE_S, Pacer


def turns_in(seconds, pacer):
    """Counts turns of the loop, and of another thread that wants the interpreter, meanwhile."""
    counts = {"loop": 0, "thread": 0}
    over = threading.Event()

    def work():
        while not over.is_set():
            counts["thread"] += 1

    async def run():
        thread = threading.Thread(target=work)
        until = time.monotonic() + seconds
        thread.start()
        while time.monotonic() < until:
            pacer.refused()
            counts["loop"] += 1
            await asyncio.sleep(0)
        over.set()
        thread.join()

    asyncio.run(run())
    return counts


def test_under_overload_the_loop_rests_between_its_turns():
    counts = turns_in(0.5, Pacer())
    assert 5 < counts["loop"] <= 0.5 / PAUSE_S
    assert counts["thread"] > 1000


def test_it_paces_from_the_first_refusal_to_a_while_after_the_last():
    async def run():
        pacer = Pacer()
        before = pacer.is_pacing
        pacer.refused()
        during = pacer.is_pacing
        await asyncio.sleep(HOLD_S + 20 * PAUSE_S)
        return before, during, pacer.is_pacing

    assert asyncio.run(run()) == (False, True, False)
