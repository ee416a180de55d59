"""Decides whether a reader treated an untrusted input as it must.

Allowed: a result, or an error that the command line prints as one line. Everything else is a
failure: another exception, a word that acts on a terminal, 10 s of CPU time, memory, a file outside
the folder, a process, a connection, a class of a pickle.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY, LONGEST = 10.0, 300 << 20, 20_000
_SPACE = 2 << 30  # of addresses, beyond those at the start
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"),
    *("pickle.find_class", "ctypes.dlopen", "webbrowser.open", "pty.spawn"),
)
_PATHS = {  # event of the interpreter -> whether it changes what is at its first argument
    "open": False,
    **dict.fromkeys(("os.listdir", "os.scandir", "os.chdir"), False),
    **dict.fromkeys(("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink"), True),
    **dict.fromkeys(("os.link", "os.chmod", "os.truncate", "os.utime", "shutil.rmtree"), True),
}
_ESCAPES = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


class Failure(NamedTuple):
    """What a reader did wrong, and where: kinds of failures have equal `kind` and `place`."""

    kind: str
    place: str
    text: str


class Slow(BaseException):
    """Raised in a reader that has used its CPU time."""


class Oracle:
    """Runs readers one at a time and returns their failures.

    folder: the only place where a reader may read and write, besides the installed packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        code = (str(ROOT), sys.prefix, sys.base_prefix, *sys.path[1:], "/usr", "/proc/self")
        self._code = tuple({os.path.realpath(path) + os.sep for path in code if path})
        self._escaped: str | None = None
        self._active = False
        self.slowest = 0.0
        self.error: BaseException | None = None  # of the last reader
        sys.addaudithook(self._audit)  # for ever: there is no way to remove it
        signal.signal(signal.SIGVTALRM, self._stop)
        logging.getLogger("fastdistill").addHandler(logging.StreamHandler(_Stderr()))

    def bound_memory(self) -> None:
        """Limit the addresses of this process, so that a large allocation fails."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def check(self, read: Callable[[], Any]) -> tuple[str, Failure | None]:
        """Return ("read" or the class of the error, the failure or None)."""
        self._escaped, start = None, time.process_time()
        _reset_peak_memory()
        memory = _peak_memory()
        error: BaseException | None = None
        printed = io.StringIO()
        with warnings.catch_warnings(), _captured(printed):
            warnings.simplefilter("always")
            warnings.showwarning = _show  # type: ignore[assignment]
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            self._active = True
            try:
                read()
            except BaseException as caught:
                error = caught
            finally:
                self._active = False
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if isinstance(error, KeyboardInterrupt):
            raise error
        self.error = error
        seconds, peak = time.process_time() - start, _peak_memory()
        self.slowest = max(self.slowest, seconds)
        outcome = "read" if error is None else type(error).__name__
        if peak - memory > MEMORY:
            return outcome, Failure("memory", _place(error), f"{(peak - memory) >> 20} MiB more")
        if seconds > SECONDS:
            return outcome, Failure("slow", _place(error), f"{seconds:.1f} s")
        if self._escaped is not None:
            return outcome, Failure("escape", _place(error), self._escaped)
        words = printed.getvalue()
        if words and _acts(words):
            return outcome, Failure("printed", _place(error), repr(words[:200]))
        return outcome, None if error is None else _judged(error)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active or self._escaped is not None:
            return
        if event in _NEVER:
            self._escaped = f"{event} {args[:2]!r}"[:300]
        elif event in _PATHS and args and isinstance(args[0], (str, bytes, os.PathLike)):
            written = _PATHS[event]
            if event == "open":
                writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
                written = bool((args[2] or 0) & writes)
            self._check_path(event, os.fsdecode(args[0]), written)

    def _check_path(self, event: str, path: str, written: bool) -> None:
        if "\0" in path or path == os.devnull:
            return
        self._active = False  # realpath has events of its own
        target = os.path.realpath(path) + os.sep
        self._active = True
        inside = target.startswith(self.folder + os.sep)
        if not inside and (written or not target.startswith(self._code)):
            self._escaped = f"{event} {path!r}"[:300]

    def _stop(self, *_: Any) -> None:
        if self._active:
            raise Slow


def _judged(error: BaseException) -> Failure | None:
    text = str(error)
    ours = isinstance(error, TypeError) and ": expected " in text
    missing = isinstance(error, ImportError) and error.name is None
    ours = ours or type(error).__module__.startswith("fastdistill.")
    if isinstance(error, Slow):
        return Failure("slow", _place(error), f"more than {SECONDS:g} s")
    if not (isinstance(error, (ValueError, OSError)) or ours or missing):
        return Failure(type(error).__name__, _place(error), text[:300])
    if not ours and isinstance(error, ValueError) and "expected" not in text:
        return Failure(f"words of {type(error).__name__}", _place(error), text[:300])
    if "allocate" in text:
        return Failure("memory", _place(error), text[:300])
    if len(text) > LONGEST:
        return Failure("long error", _place(error), f"{len(text):,} characters: {text[:200]}")
    return Failure("escapes in an error", _place(error), repr(text[:300])) if _acts(text) else None


def _acts(text: str) -> bool:
    """Whether a character of a text acts on a terminal."""
    return not text.isprintable() and any(
        unicodedata.category(c) in _ESCAPES and c not in "\n\t" for c in text
    )


def _place(error: BaseException | None) -> str:
    """Return the innermost line of ours in a traceback."""
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/fastdistill/" in f.filename and "site-packages" not in f.filename]
    if not own:
        return "?"
    return f"{own[-1].filename.rpartition('/fastdistill/')[2]}:{own[-1].name}"


def _peak_memory() -> int:
    """The peak of resident memory in bytes since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _reset_peak_memory() -> None:
    """Without this, a process that once held much memory would hide what a reader uses."""
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _captured(into: io.StringIO) -> Iterator[None]:
    """Write what is printed, by compiled libraries too, into a text."""
    with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(into), contextlib.redirect_stderr(into):
                yield
        finally:
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
        file.seek(0)
        into.write(file.read().decode("utf-8", "surrogateescape"))


class _Stderr:
    """The stream that is sys.stderr when it is written to."""

    def write(self, text: str) -> None:
        if isinstance(sys.stderr, io.StringIO):  # in `check` alone
            sys.stderr.write(text)

    def flush(self) -> None:
        pass


def _show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    if "/fastdistill/" in filename and "site-packages" not in filename:
        sys.stderr.write(f"{message}\n")
