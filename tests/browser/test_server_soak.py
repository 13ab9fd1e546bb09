"""The server under load, as its own process: memory, waiting, fairness, connections that never end, and nothing lost.

All traffic goes to 127.0.0.1 and ends by itself. Run it with -s to see the figures.
"""

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest

from sae.disk.arrays import open_arrays, write_arrays
from sae.features.index.reader import FeatureIndex

ROOT = Path(__file__).parents[2]
TIMES = 150  # copies of the demo's 12,000 tokens laid end to end: 1.8 million, with some 80 million activations
WORDS = ["the", "a", "to", "of", "and", "in", "I", "you", "it", "is", "was", "that", "for", "on", "with", "he", "she", "they", "we", "be"]
OTHERS = ["not", "do", "at", "this"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def repeated(index: FeatureIndex, out: Path, times: int) -> Path:
    """The index of a corpus that is the given one's, `times` over; of what is shown of a feature, only its activations grow."""
    out.mkdir()
    for name in ("columns", "details", "token_features"):
        write_arrays(out / f"{name}.safetensors", open_arrays(index.folder / f"{name}.safetensors"))
    (out / "index.json").write_bytes((index.folder / "index.json").read_bytes())
    tokens, n = dict(index.tokens), len(index.tokens["ids"])
    shift = n * np.arange(times, dtype=np.int64)[:, None]
    tokens["sequence_starts"] = np.append((index.tokens["sequence_starts"][:-1] + shift).ravel(), n * times)
    for each in ("ids", "scanned", "sequence_document", "sequence_split"):
        tokens[each] = np.tile(tokens[each], times)
    write_arrays(out / "tokens.safetensors", tokens)
    positions, values = [], []
    for low, high in zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist()):
        positions.append((index.positions[low:high] + shift).ravel().astype(np.uint32))
        values.append(np.tile(index.values[low:high], times))
    records = {"offsets": index.offsets * times, "positions": np.concatenate(positions), "values": np.concatenate(values)}
    write_arrays(out / "records.safetensors", records)
    return out


class Server:
    """browse_features.py on a free port."""

    def __init__(self, index: Path, log: Path):
        command = [sys.executable, str(ROOT / "scripts" / "browse_features.py"), "--index", str(index), "--port", "0", "--no-open"]
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT)
        line = ""
        while " at http://" not in line:
            line = self.process.stdout.readline()
            assert line, log.read_text()
        self.port = int(re.search(r"127\.0\.0\.1:(\d+)", line)[1])

    def memory(self) -> float:
        """MB of its own: without the files that are mapped."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024

    def get(self, path: str, timeout: float = 300) -> int:
        return self.ask("GET", path, timeout=timeout)[0]

    def ask(self, method: str, path: str, body: bytes | None = None, timeout: float = 300) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"origin": f"http://127.0.0.1:{self.port}"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def steer(self) -> bool:
        """Whether a text was written to its end."""
        wanted = {"prompt": "I", "features": {"3586": 1}, "max_new_tokens": 4}
        status, body = self.ask("POST", "/api/steer", json.dumps(wanted).encode())
        return status == 200 and b'"done": true' in body

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soak")
    running = Server(repeated(demo.index, folder / "index", TIMES), folder / "stderr")
    running.get("/")
    yield running
    running.process.send_signal(signal.SIGINT)
    running.process.wait(20)


class during:
    """Calls a function again and again in a thread until the block ends; `values` are its results."""

    def __init__(self, call: Callable[[], Any], pause: float = 0.05):
        self.values: list[Any] = []
        self.ended = threading.Event()

        def work() -> None:
            while not self.ended.wait(pause):
                self.values.append(call())

        self.thread = threading.Thread(target=work)

    def __enter__(self) -> "during":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def seconds(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def tell(**figures: Any) -> None:
    print("\n" + ", ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()))


def test_searches_at_once_take_the_memory_of_one(server):
    """Every search of a round asks for another word; after each round the memory is back where it was."""
    resting = server.memory()
    with during(server.memory, 0.02) as one:
        server.get("/?how=fires&q=quick")
    alone = max(one.values, default=resting) - resting
    rounds = []
    for turn in range(3):
        words = [f"{word}|{other}|x{turn}" for word in WORDS for other in OTHERS]
        with during(server.memory, 0.02) as used, during(lambda: seconds(lambda: server.get("/f/7"))) as plain:
            statuses = Counter(at_once([lambda word=word: server.get("/?how=fires&q=" + quote(word)) for word in words]))
        time.sleep(1)
        rounds.append((max(used.values) - resting, server.memory() - resting, statuses, max(plain.values)))
        tell(resting=resting, alone=alone, peak=rounds[-1][0], after=rounds[-1][1], statuses=dict(statuses), slowest_page=rounds[-1][3])
    for peak, after, statuses, slowest in rounds:
        assert peak < alone + 150
        assert after < 150
        assert set(statuses) <= {200, 503}
        assert statuses[200] >= 9
        assert slowest < 3


def test_steering_and_plain_pages_get_in_while_prompts_wait(server):
    prompt = "/prompt?text=" + quote("You and I said that we would be at the house, but he was not there. " * 3)
    done: list[bool] = []
    ended = threading.Event()

    def prompts(seed: int) -> None:
        while not ended.is_set():
            server.get(f"{prompt}{seed}")

    threads = [threading.Thread(target=prompts, args=(seed,)) for seed in range(60)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    with during(lambda: seconds(lambda: server.get("/f/7"))) as plain:
        begin = time.monotonic()
        while len(done) < 60 and time.monotonic() - begin < 60:
            done.append(server.steer())
    ended.set()
    for thread in threads:
        thread.join()
    tell(steered=sum(done), of=len(done), slowest_page=max(plain.values), median_page=float(np.median(plain.values)))
    assert sum(done) == len(done)
    assert len(done) >= 20
    assert max(plain.values) < 3


def test_connections_that_never_finish_are_closed(server):
    begins = [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "]
    origin = f"Host: 127.0.0.1:{server.port}\r\nOrigin: http://127.0.0.1:{server.port}\r\n"
    begins.append(f"POST /f/7 HTTP/1.1\r\n{origin}Content-Length: 100\r\n\r\nlabel=".encode())
    begins.append(f"GET /app.js HTTP/1.1\r\n{origin}\r\nGET /app".encode())  # the second of a connection
    opened = []
    for i in range(300):
        opened.append(socket.create_connection(("127.0.0.1", server.port)))
        opened[-1].sendall(begins[i % len(begins)])
    slowest = max(seconds(lambda: server.get("/f/7")) for _ in range(20))
    handles = Path(f"/proc/{server.process.pid}/fd")
    before, left = len(list(handles.iterdir())), -1
    for _ in range(90):
        time.sleep(1)
        left = len(list(handles.iterdir()))
        if left < before - 290:
            break
    tell(open_before=before, open_after=left, slowest_page=slowest)
    for connection in opened:
        connection.close()
    assert left < before - 290


def test_clients_that_leave_are_not_reported_as_errors(server):
    said = server.said()
    origin = f"Host: 127.0.0.1:{server.port}\r\nOrigin: http://127.0.0.1:{server.port}\r\n"
    heads = [f"POST {path} HTTP/1.1\r\n{origin}Content-Length: 500\r\n\r\n" for path in ("/f/7", "/lists", "/notes/import", "/api/steer")]
    steer = json.dumps({"prompt": "I", "features": {}, "max_new_tokens": 200})
    heads.append(f"POST /api/steer HTTP/1.1\r\n{origin}Content-Length: {len(steer)}\r\n\r\n{steer}")
    heads += [f"GET {path} HTTP/1.1\r\n{origin}\r\n" for path in ("/prompt?order=effect&text=You+and+I", "/?how=fires&q=the|x", "/f/7")]
    for i in range(80):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(heads[i % len(heads)].encode())
        time.sleep(random.Random(i).uniform(0, 0.1))
        if i % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a farewell
        connection.close()
    time.sleep(5)
    new = server.said()[len(said) :]
    tell(lines=new.count("\n"))
    assert new == ""
    assert server.steer()  # nobody who left holds the model


def test_thirty_thousand_requests_without_an_error(server):
    """A browsing person's requests by 16 clients; notes are set all the while, and all of them are there at the end."""
    number = int(os.environ.get("SOAK_REQUESTS", "30000"))
    kept: dict[int, str] = {}

    def client(seed: int) -> Counter:
        moments, statuses = random.Random(seed), Counter()
        for i in range(number // 16):
            j = moments.randrange(4096)
            mine = j - j % 16 + seed
            if moments.random() < 0.1:
                label = f"{seed} {i} don’t"
                status = server.ask("POST", f"/f/{mine}", urlencode({"label": label, "note": "n" * moments.randrange(2000)}).encode())[0]
                kept[mine] = label
            else:
                path = moments.choice(
                    [
                        f"/f/{j}",
                        f"/f/{j}?sort=mean",
                        "/",
                        f"/?q=th&page={j % 9}",
                        "/?sort=density",
                        "/lists",
                        "/random",
                        "/app.js",
                        "/steer",
                    ]
                )
                status = server.get(path)
            statuses[status] += 1
        return statuses

    begin, resting = time.monotonic(), server.memory()
    statuses = sum(at_once([lambda seed=seed: client(seed) for seed in range(16)]), Counter())
    tell(requests=number, statuses=dict(statuses), per_second=number / (time.monotonic() - begin), grown=server.memory() - resting)
    assert set(statuses) <= {200, 303}
    exported = [json.loads(line) for line in server.ask("GET", "/notes.jsonl")[1].decode().split("\n") if line]
    labels = {entry["feature"]: entry["label"] for entry in exported if "label" in entry}
    assert {j: labels.get(j) for j in kept} == kept
    assert server.memory() - resting < 200


def test_hostile_requests_get_no_5xx(server):
    moments, statuses = random.Random(0), Counter()
    pieces = ["/", "..", "%2e", "%00", "f", "-1", "9" * 50, "api", "feature", "?q=", "&", "=", "how=fires", "sort", "page=", "\\", "'"]
    pieces += ["🦓", "%ff", "\ud800", "<", "t=", "text=", "list=", "at=", "density_max=nan", "*", '"', "NEAR", "e\u0301", "’"]
    for _ in range(3000):
        path = "/" + quote("".join(moments.choices(pieces, k=moments.randrange(1, 8))), safe="/?&=%", errors="surrogatepass")
        method = moments.choice(["GET", "GET", "POST", "PUT", "HEAD", "OPTIONS"])
        body = moments.randbytes(moments.randrange(200)) if method == "POST" else None
        statuses[server.ask(method, path, body)[0]] += 1
    tell(statuses=dict(sorted(statuses.items())))
    assert max(statuses) < 500
