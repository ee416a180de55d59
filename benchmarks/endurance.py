"""Memory, open files and threads over many training steps and many served requests.

    python -m benchmarks.endurance --steps 10000 --requests 100000

A tiny student is trained on a live teacher, on a cache and on a server, with checkpoints and logs.
Then a server answers requests, one in eight of them a refusal or half a request of a client that
leaves. Each scenario runs in a process of its own and is read at 20 equal intervals from /proc
(Linux). The first fifth is warm-up: allocators and caches fill. Growth is the mean of the last
fifth less that of the second fifth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fastdistill import DistillConfig, DistillTrainer, Teacher, TeacherCache
from fastdistill.teachers.http.server import listen, make_app, make_server, url_of

INTERVALS = 20
VOCAB = 64


class Reading(NamedTuple):
    """What a process holds."""

    done: int  # steps or requests
    mib: float  # resident memory
    files: int
    threads: int


def read(process: int, done: int) -> Reading:
    """Return what a process holds, from /proc."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files, threads = (len(list((folder / name).iterdir())) for name in ("fd", "task"))
    return Reading(done, round(mib, 2), files, threads)


def growth(readings: list[Reading]) -> Reading:
    """Return the mean of the last fifth of the readings less that of the second fifth."""
    fifth = len(readings) // 5
    early, late = readings[fifth : 2 * fifth], readings[-fifth:]
    means = [
        [sum(getattr(r, name) for r in part) / fifth for part in (early, late)]
        for name in ("mib", "files", "threads")
    ]
    mib, files, threads = (late - early for early, late in means)
    return Reading(late[-1].done - early[0].done, round(mib, 2), round(files), round(threads))


def model(seed: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=4, max_position_embeddings=64, **sizes
    )
    return LlamaForCausalLM(config)


def rows(count: int) -> list[dict[str, Any]]:
    """Return rows of 4 to 31 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 32, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, VOCAB, (n,), generator=generator)} for n in lengths]


class _Reads(TrainerCallback):
    def __init__(self, every: int) -> None:
        self.every, self.readings = every, list[Reading]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.readings.append(read(os.getpid(), state.global_step))


def train(teacher: Any, steps: int, folder: Path) -> list[Reading]:
    """Train a tiny student; a checkpoint and two logs in each interval."""
    every = max(steps // INTERVALS, 1)
    config = DistillConfig(
        str(folder / "run"),
        k=8,
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(every // 2, 1),
        use_cpu=True,
        disable_tqdm=True,
        show_panel=False,
        report_to=[],
    )
    reads = _Reads(every)
    trainer = DistillTrainer(
        model(0, 32), teacher, config, train_dataset=rows(64), callbacks=[reads]
    )
    trainer.train()
    return reads.readings


def live(steps: int, folder: Path) -> list[Reading]:
    return train(Teacher(model(1, 48)), steps, folder)


def cached(steps: int, folder: Path) -> list[Reading]:
    return train(
        TeacherCache.build(Teacher(model(1, 48)), rows(64), folder / "c", k=8), steps, folder
    )


def served(steps: int, folder: Path) -> list[Reading]:
    with _Server() as server:
        return train(server.url, steps, folder)


class _Server:
    """A teacher's server in a process of its own."""

    def __enter__(self) -> _Server:
        listening = listen("127.0.0.1", 0)
        self.url = url_of(listening)
        self.port = listening.getsockname()[1]
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(listening,), daemon=True
        )
        self._process.start()
        listening.close()
        self.pid = int(self._process.pid or 0)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()


def _serve(listening: socket.socket) -> None:
    torch.set_num_threads(1)
    make_server(make_app(Teacher(model(1, 48)))).run(sockets=[listening])


def requests(count: int, folder: Path) -> list[Reading]:
    """Send requests over kept and new connections; some are refused, and some are left halfway."""
    readings, every = [], max(count // INTERVALS, 1)
    bodies = [json.dumps({"prompt": [r["input_ids"].tolist()], "k": 8}) for r in rows(64)]
    headers = {"Content-Type": "application/json"}
    with _Server() as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        for number in range(1, count + 1):
            body = bodies[number % len(bodies)]
            if number % 16 == 0:
                _leave_halfway(server.port, body)
            else:
                wrong = number % 16 == 8
                connection.request("POST", "/v1/topk", "{" if wrong else body, headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status != (400 if wrong else 200):
                    raise RuntimeError(f"request {number}: status {answer.status}")
            if number % 100 == 0:
                connection.close()  # the next request opens another one
            if number % every == 0:
                readings.append(read(server.pid, number))
        connection.close()
    return readings


def _leave_halfway(port: int, body: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        head = "POST /v1/topk HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body[:5]}".encode())


SCENARIOS: dict[str, tuple[Callable[[int, Path], list[Reading]], str]] = {
    "live": (live, "steps"),
    "cached": (cached, "steps"),
    "served": (served, "steps"),
    "requests": (requests, "requests"),
}


def measure(name: str, count: int) -> list[Reading]:
    """Return the readings of a scenario, which runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, name, count).result()


def _measure(name: str, count: int) -> list[Reading]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return SCENARIOS[name][0](count, Path(folder))


def main(argv: list[str] | None = None) -> int:
    cli = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    cli.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    cli.add_argument("--steps", type=int, default=10_000)
    cli.add_argument("--requests", type=int, default=100_000)
    args = cli.parse_args(argv)
    print("| scenario | number | first reading | last reading | growth |")
    print("|---|--:|---|---|---|")
    for name in args.names or SCENARIOS:
        count = getattr(args, SCENARIOS[name][1])
        readings = measure(name, count)
        first, last, grown = readings[0], readings[-1], growth(readings)
        cells = [
            f"{r.mib:,.1f} MiB, {r.files} files, {r.threads} threads" for r in (first, last, grown)
        ]
        print(f"| {name} | {count:,} {SCENARIOS[name][1]} | {' | '.join(cells)} |", flush=True)
        print([r.mib for r in readings], file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
