"""Shared by test_served_server and others."""

from __future__ import annotations

import threading

from fastdistill import Teacher


class Held(Teacher):
    """Answers when let go; says when it is asked."""

    def __init__(self, model):
        super().__init__(model)
        self.go, self.calls, self.sizes = threading.Event(), threading.Semaphore(0), []

    def topk(self, input_ids, *args, **options):
        self.sizes.append(len(input_ids))
        self.calls.release()
        assert self.go.wait(20)
        return super().topk(input_ids, *args, **options)
