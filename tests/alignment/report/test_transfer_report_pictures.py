"""The quadrant and the curves: every seed is there, nothing overlaps, nothing is drawn as a success
that is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fastdistill.alignment.report.heat_map import heat_map, heat_map_alt
from fastdistill.report.number_format import HIGHEST, LOWEST, format_number
from helpers.made_students import arm, controls, experiment

WEAK = {"seeds": 6, "tau": 0.0}


def marks(figure):
    """Of a quadrant: what is drawn small (seeds) and large (arms), [(x, y, is open)]."""
    (axes,) = figure.axes
    drawn_marks: dict[str, list[tuple[float, float, bool]]] = {"seed": [], "arm": []}
    for drawn in axes.collections:
        (x, y), (size,) = drawn.get_offsets().data[0], drawn.get_sizes()
        hollow = bool((drawn.get_facecolor()[0] == 1).all())
        drawn_marks["arm" if size > 40 else "seed"].append((x, y, hollow))
    return drawn_marks


def whiskers(figure):
    lines = figure.axes[0].lines
    return [line for line in lines if line.get_linewidth() == 1.5]


def leaking_beyond(name="loud"):
    """Students that show the trait more often than their teacher, three times as often."""
    made = []
    for student in arm(name, tau=1.0, spread=0.0):
        quiet = tuple(v if i % 3 == 0 else 0.0 for i, v in enumerate(student.teacher.trait))
        made.append(replace(student, teacher=replace(student.teacher, trait=quiet)))
    return made


@pytest.fixture(scope="module")
def report():
    return experiment()


@pytest.fixture(scope="module")
def wild():
    """Long, odd and alike names, one seed, values beyond the frame, more arms than colours."""
    long = "addition prompts, full KL over the whole vocabulary, T = 4, other initialisation"
    students = [
        *arm("one seed", c=0.6, tau=0.3, seeds=1),
        *arm("$\\x$ <b>bold</b> & 'quoted'", tau=0.9, c=0.9, spread=0.5),
        *leaking_beyond(),
        *arm(long, tau=0.1, spread=0.2, checkpoints=2),
        *(student for i in range(8) for student in arm(f"clean {i}", **WEAK)),
    ]
    none: dict[str, Any] = {
        "audits": [],
        "development": [],
        "positive_control": None,
        "null_arms": [],
    }
    return experiment(students=students, **none)


def test_every_seed_is_a_mark_at_its_place(report, wild):
    for made in (report, wild):
        marks_here = marks(made.quadrant())
        seeds = [seed for a in made.arms for seed in a.transfer.per_seed]
        at = [
            (float(np.clip(s.capability, LOWEST, HIGHEST)), float(np.clip(s.tau, LOWEST, HIGHEST)))
            for s in seeds
        ]
        drawn = sorted((x, y) for x, y, _ in marks_here["seed"])
        assert len(drawn) == len(at)
        assert np.array(drawn) == pytest.approx(np.array(sorted(at)))
        assert len(marks_here["arm"]) == len(made.arms)
        assert len(made.quadrant().legends[0].texts) == min(len(made.arms), 6)


def test_whiskers_are_the_intervals_and_one_seed_has_none(report, wild):
    ends = [tuple(map(float, line.get_ydata())) for line in whiskers(report.quadrant())]
    for a in report.arms:
        assert (a.tau.low, a.tau.high) in ends
    assert len(ends) == 2 * len(report.arms)
    assert not wild.arms[0].tau.known
    drawn = marks(wild.quadrant())["arm"]
    assert (wild.arms[0].capability.value, wild.arms[0].tau.value, False) in drawn
    known = sum(a.tau.known for a in wild.arms) + sum(a.capability.known for a in wild.arms)
    assert len(whiskers(wild.quadrant())) == known


def test_what_lies_beyond_the_frame_is_clipped_and_marked(wild):
    loud = next(a for a in wild.arms if a.name == "loud")
    outside = [seed for seed in loud.transfer.per_seed if seed.tau > HIGHEST]
    assert len(outside) == 12
    hollow = [(x, y) for x, y, is_open in marks(wild.quadrant())["seed"] if is_open]
    assert sum(y == HIGHEST for _, y in hollow) >= 12
    (axes,) = wild.quadrant().axes
    assert axes.get_ylim() == axes.get_xlim() == (LOWEST, HIGHEST)


def test_names_do_not_overlap_and_stay_on_the_picture(report, wild):
    for figure in (report.quadrant(), wild.quadrant()):
        figure.draw_without_rendering()
        texts = figure.legends[0].texts
        boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
        assert 0 < len(boxes) <= 6
        assert all(above.y0 >= below.y1 for below, above in pairwise(boxes))
        for box in boxes:
            assert box.x1 <= figure.bbox.x1
            assert box.y0 >= figure.bbox.y0
            assert box.y1 <= figure.bbox.y1


def test_names_stand_as_they_are_written(wild):
    labels = [text.get_text() for text in wild.quadrant().legends[0].texts]
    assert "$\\x$ <b>bold</b>\n& 'quoted'\nn = 12" in labels
    assert "addition prompts,\nfull KL over the\n…initialisation\nn = 12" in labels


def test_the_forest_has_every_arm_with_its_interval_in_its_group(report, wild):
    for made in (report, wild):
        (axes,) = made.forest().axes
        lines = [line for line in axes.lines if len(line.get_ydata()) == 2]
        rows = {line.get_ydata()[0]: line for line in lines if len({*line.get_ydata()}) == 1}
        ticks = {round(sum(line.get_ydata()) / 2): line.get_xdata()[0] for line in lines}
        dots = {round(d.get_offsets().data[0][1]): d for d in axes.collections}
        texts = {(t.get_position()[0] < 0, round(t.get_position()[1])): t for t in axes.texts}
        assert len(dots) == len(made.arms)
        for a in made.arms:
            name = a.name if len(a.name) <= 28 else f"{a.name[:27]}…"
            (y,) = (y for (left, y), t in texts.items() if left and t.get_text() == name)
            assert dots[y].get_offsets().data[0][0] == np.clip(a.tau.value, LOWEST, HIGHEST)
            hollow = bool((dots[y].get_facecolor()[0] == 1).all())
            assert hollow == (not a.is_capable)
            assert texts[False, y].get_text() == format_number(a.capability.value, 0.8)
            if a.tau.known:
                ends = np.clip([a.tau.low, a.tau.high], LOWEST, HIGHEST)
                assert list(rows[y].get_xdata()) == pytest.approx(list(ends))
            if a.bound is not None and np.isfinite(a.bound):
                assert ticks[y] == np.clip(a.bound, LOWEST, HIGHEST)
    assert any(a.bound is not None for a in report.arms)
    (axes,) = report.forest().axes
    bold = [t.get_text() for t in axes.texts if t.get_fontweight() == "bold"]
    assert bold == [
        *("DFC succeeds", "the trait transfers", "capability lost", "too few seeds", "controls")
    ]


def test_the_heat_map_has_every_audit(report):
    (axes,) = heat_map(report.arms).axes
    cells = {t.get_text(): t.get_fontweight() for t in axes.texts}
    rows = [row for a in report.arms for row in a.audits]
    assert list(cells) == [format_number(row.auroc.value) for row in rows]
    assert [weight == "bold" for weight in cells.values()] == [r.incriminates for r in rows]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "top-8, T = 4"]
    assert "confession" in heat_map_alt(report.arms)


def test_an_invalid_experiment_marks_no_success(report):
    def shaded(figure):
        return [patch for axes in figure.axes for patch in axes.patches]

    assert len(shaded(report.quadrant())) == 1
    assert len(shaded(report.curves())) == 1  # the safe window of the clean arm
    assert next(a for a in report.arms if a.name == "clean").window is not None
    students = [*arm("clean", checkpoints=6), *controls(tau=0.5)]
    invalid = experiment(students=students, audits=[], development=[])
    assert not invalid.valid
    assert invalid.arms[0].window is not None
    assert shaded(invalid.quadrant()) == shaded(invalid.curves()) == []
    assert "DFC succeeds" not in [text.get_text() for text in invalid.quadrant().axes[0].texts]
    assert "safe window" not in [text.get_text() for text in invalid.curves().legends[0].texts]


def test_few_seeds_have_no_safe_window():
    students = [*arm("clean", checkpoints=6, seeds=9), *controls()]
    made = experiment(students=students, audits=[], development=[])
    assert made.valid
    assert made.arms[0].window is not None
    assert not list(made.curves().axes[0].patches)


def test_curves_have_a_panel_per_arm_with_checkpoints(report):
    panels = [axes for axes in report.curves().axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["clean", "top-8, T = 4"]
    lines = [line for line in panels[1].lines if line.get_marker() in ("o", "s")]
    for line, which in zip(lines, ("capability", "tau"), strict=True):
        points = report.arms[1].curve
        assert list(line.get_xdata()) == [point.step for point in points]
        values = [getattr(point, which).value for point in points]
        assert list(line.get_ydata()) == pytest.approx(values)
    window = next(iter(panels[0].patches)).get_extents().transformed(panels[0].transData.inverted())
    curve = report.arms[0].window
    assert window.x0 <= curve.first <= curve.last <= window.x1


def test_no_checkpoints_no_curves():
    made = experiment(students=[*arm("plain", seeds=3), *controls()], audits=[], development=[])
    with pytest.raises(ValueError, match="students: expected checkpoints in the `curve`"):
        made.curves()
