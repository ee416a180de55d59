"""Our server under load, stopped, started again, and asked for what it cannot do."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from fastdistill import Teacher, TeacherCache
from fastdistill.teachers.http import ServedTeacher, WrongAnswer, connection, serve
from helpers.busy_server import Held
from helpers.present import present
from helpers.served import ours
from helpers.training import peaked, ragged, train, weights

IDS = torch.tensor([[5, 9, 14, 3]])
RUN = {"max_steps": 4, "per_device_train_batch_size": 5, "data": ragged(12)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.02)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# ---- restarts


class Restarting:
    """Stopped when its teacher is asked for the second time, and started again on the same port."""

    def __init__(self, port, first, second):
        self.port, self.first, self.second = port, first, second
        self.down, self.over, self.calls = threading.Event(), threading.Event(), 0
        answer = first.topk

        def topk(*args, **options):
            self.calls += 1
            if self.calls == 2:
                self.down.set()
                time.sleep(0.3)  # by then nobody listens; the answer is the last one
            return answer(*args, **options)

        first.topk = topk

    def _run(self):
        with ours(self.first, port=self.port):
            assert self.down.wait(30)
        time.sleep(0.2)
        with ours(self.second, port=self.port):
            assert self.over.wait(30)

    def __enter__(self):
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_):
        self.down.set()
        self.over.set()
        self.thread.join()


@pytest.mark.slow
def test_restarted_in_the_middle_of_a_run(tmp_path, port):
    undisturbed = train(tmp_path / "a", teacher=Teacher(peaked()), **RUN)
    restarting = Restarting(port, Teacher(peaked()), Teacher(peaked()))
    with restarting as url:
        disturbed = train(tmp_path / "b", teacher=url, **RUN)
        disturbed.teacher.close()
    assert restarting.calls == 2  # of four steps
    assert torch.equal(weights(disturbed), weights(undisturbed))


def test_restarted_in_the_middle_of_a_cache_build(tmp_path, port):
    options: dict[str, Any] = {"k": 4, "shard_mb": 0.001}
    here = TeacherCache.build(Teacher(peaked()), ragged(12), tmp_path / "here", **options)
    assert len(here.manifest.shards) > 3
    restarting = Restarting(port, Teacher(peaked()), Teacher(peaked()))
    with restarting as url:
        client = ServedTeacher(url)
        there = TeacherCache.build(client, ragged(12), tmp_path / "there", **options)
        client.close()
    assert restarting.calls == 2
    assert there.manifest.shards == here.manifest.shards


def test_restarted_with_another_teacher(port):
    with Restarting(port, Teacher(peaked()), Teacher(peaked(8))) as url:
        client = ServedTeacher(url)
        client.topk(IDS, k=4)
        client.topk(IDS, k=4)
        with pytest.raises(WrongAnswer, match="expected the teacher that answered at first"):
            client.topk(IDS, k=4)
        client.close()


# ---- the queue


def test_questions_that_wait_are_put_together_and_a_full_queue_says_so(caplog):
    teacher = Held(peaked())
    # 4 tokens a question: one is being answered, four wait, and for the others there is no room.
    with ours(teacher, max_tokens=4) as url, ThreadPoolExecutor(8) as pool:
        clients = [ServedTeacher(url) for _ in range(8)]
        hasty = ServedTeacher(url, retries=0, timeout=0.5)

        def refused():
            with pytest.raises(ConnectionError) as caught:
                hasty.topk(IDS, k=5)
            return "status 503: the queue is full, retry later" in str(caught.value)

        try:
            first = pool.submit(clients[0].topk, IDS, k=4)
            assert teacher.calls.acquire(timeout=20)
            others = [pool.submit(c.topk, IDS, k=3 + i % 2) for i, c in enumerate(clients[1:])]
            # Once one of them is refused, the place is taken, and by none of the hasty client's.
            for _ in range(200):
                if "the queue is full" in caplog.text:
                    break
                time.sleep(0.1)
            assert refused()
        finally:
            teacher.go.set()
        for k, future in ((4, first), *((3 + i % 2, f) for i, f in enumerate(others))):
            assert torch.equal(future.result().ids, Teacher(peaked()).topk(IDS, k=k).ids)
        for client in (*clients, hasty):
            client.close()
    assert max(teacher.sizes) > 1


def test_a_teacher_that_fails(caplog, monkeypatch):
    teacher = Teacher(peaked())

    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teacher, "topk", out_of_memory)
    with ours(teacher) as url:
        client = ServedTeacher(url, retries=1)
        with pytest.raises(
            ConnectionError, match="the teacher failed: RuntimeError: out of memory"
        ):
            client.topk(IDS, k=4)
        client.close()


# ---- starting and stopping


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        dedent("""
        from helpers.training import peaked
        from fastdistill import Teacher
        from fastdistill.teachers.http import serve
        serve(Teacher(peaked()), port=0, token="a secret", ready=lambda url: print(url, flush=True))
        print("over", flush=True)
    """)
    )
    running = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    with running:
        url = present(running.stdout).readline().strip()
        client = ServedTeacher(url, token="a secret")
        client.topk(IDS, k=3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
        client.close()
    assert (running.returncode, out) == (0, "over\n")
    assert "secret" not in err
    assert "Traceback" not in err


def test_a_port_that_is_taken(port):
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(OSError, match=f"port: expected a free one on 127.0.0.1, got {port}"),
    ):
        serve(Teacher(peaked()), port=port)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_a_package_of_the_server(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"serve: expected the package {package}, .*; pip install 'fastdistill\[serve\]'"
    with pytest.raises(ImportError, match=words):
        serve(Teacher(peaked()), port=0)


def test_a_form_of_a_web_page_is_no_question():
    with ours(Teacher(peaked())) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        body = '{"prompt": [[1]], "k": 1}'
        connection.request("POST", "/v1/topk", body, {"Content-Type": "text/plain"})
        assert connection.getresponse().status == 415
        connection.close()
