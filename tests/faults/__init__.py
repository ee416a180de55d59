"""Injected faults: what a run, a build or a server does when its machine, disk or peer fails.

    PYTHONPATH=tests python -m faults    # the campaign; prints the table of docs/hardening.md

A case runs a task with one fault in a process of its own, repairs what the fault broke, and runs
the task again. It passes if the first run ended unharmed or with a clear error, no finished part of
it was lost, and the final files are those of an undisturbed run.
"""
