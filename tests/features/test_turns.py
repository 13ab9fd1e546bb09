"""Whose turn it is: fair between kinds, in order within one, bounded, and nobody who left holds a place."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.requests import ClientDisconnect

import sae.features.browser.turns as turns_module
from sae.features.browser.turns import Busy, Turns


class Client:
    """Of a request, what is looked at: whether the one who asked has left."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


def run(coroutine):
    """In its own thread: the driver of the browser tests leaves a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_kinds_alternate_and_each_keeps_its_order():
    async def main() -> list[str]:
        turns, done = Turns("the model", "prompt", "steer"), []

        async def work(kind: str, number: int) -> None:
            async with turns.turn(kind, Client()):
                done.append(f"{kind} {number}")
                await settle()

        await turns.wait_for("prompt", Client())
        tasks = [asyncio.create_task(work("prompt", i)) for i in range(5)]
        await settle()
        tasks += [asyncio.create_task(work("steer", i)) for i in range(3)]
        await settle()
        turns.release("prompt")
        await asyncio.gather(*tasks)
        return done

    assert " ".join(run(main())) == "steer 0 prompt 0 steer 1 prompt 1 steer 2 prompt 2 prompt 3 prompt 4"


def test_a_full_queue_and_a_long_wait_are_sentences(monkeypatch):
    monkeypatch.setattr(turns_module, "MOST_WAITING", 2)
    monkeypatch.setattr(turns_module, "PATIENCE", 0.02)

    async def main() -> None:
        turns = Turns("the model", "prompt", "steer")
        await turns.wait_for("prompt", Client())
        waiting = [asyncio.create_task(turns.wait_for("prompt", Client())) for _ in range(2)]
        await settle()
        with pytest.raises(Busy, match="the model is busy and 2 others wait"):
            await turns.wait_for("prompt", Client())
        with pytest.raises(Busy, match="still at work for others"):  # the other kind has its own queue
            await turns.wait_for("steer", Client())
        assert {type(result) for result in await asyncio.gather(*waiting, return_exceptions=True)} == {Busy}
        turns.release("prompt")
        await turns.wait_for("steer", Client())  # free again

    run(main())


def test_who_leaves_gives_the_place_up():
    async def main() -> None:
        turns, client = Turns("the model", "prompt", "steer"), Client()
        await turns.wait_for("prompt", Client())
        left = asyncio.create_task(turns.wait_for("prompt", client))
        after = asyncio.create_task(turns.wait_for("prompt", Client()))
        await settle()
        client.gone.set()
        with pytest.raises(ClientDisconnect):
            await left
        turns.release("prompt")
        await asyncio.wait_for(after, 1)

    run(main())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_one_works_at_a_time_and_the_turn_is_never_lost(seed, monkeypatch):
    monkeypatch.setattr(turns_module, "MOST_WAITING", 3)
    monkeypatch.setattr(turns_module, "PATIENCE", 0.003)
    chance = random.Random(seed)

    async def main() -> None:
        turns, working, most = Turns("the model", "prompt", "steer"), 0, 0

        async def work() -> None:
            nonlocal working, most
            client = Client()
            asyncio.get_running_loop().call_later(chance.uniform(0, 0.02), client.gone.set)
            async with turns.turn(chance.choice(["prompt", "steer"]), client):
                working, most = working + 1, max(most, working + 1)
                try:
                    await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
                    if chance.random() < 0.2:
                        raise RuntimeError
                finally:
                    working -= 1

        tasks = []
        for _ in range(40):
            tasks.append(asyncio.create_task(work()))
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), Busy, ClientDisconnect, RuntimeError, asyncio.CancelledError}
        assert most == 1
        for kind in ("prompt", "steer"):  # nobody is waited for any more
            await asyncio.wait_for(turns.wait_for(kind, Client()), 1)
            turns.release(kind)

    run(main())
