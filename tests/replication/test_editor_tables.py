"""Tables that compare editors, from records made by hand."""

import json

import pytest
from matplotlib.figure import Figure

from malmen_repro.replication.editor_tables import (
    PARTS,
    SETS,
    TOLERANCE,
    as_printed,
    coachhook_table,
    draw_effects,
    draw_parts,
    draw_scores,
    editor_cost_table,
    editor_score_table,
    effect_table,
    effect_verdict,
    effects,
    read_costs,
    zsre_table,
)
from malmen_repro.replication.plans import METHODS
from malmen_repro.replication.released_code import VARIANTS
from tests.handmade import broken, record

PLACEBO, TUNED = "MALMEN (epsilon)", "MALMEN (no tuned start)"


def cells(table):
    "The rows of a markdown table below its head, each a list of texts."
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# --- scores and costs


def test_score_table():
    records = [record("MALMEN", m, seed, 0.5 + seed / 10) for m in (16, 64) for seed in (0, 1)]
    rows = cells(editor_score_table([*records, record("FT", 16, mean=1.0)], ("FT", "MALMEN"), (16, 64)))
    assert rows[0] == ["FT", "100.0 / 100.0 / 100.0", "–"]
    assert rows[1] == ["MALMEN", "55.0 / 55.0 / 55.0", "55.0 / 55.0 / 55.0"]  # the mean of two seeds
    assert rows[2] == ["unedited", "– / – / 90.0", "– / – / 90.0"]


def costs_in(folder):
    "Records of memory and speed, where they are looked for."
    (folder / "editors").mkdir()
    peaks = [{"tier": "tiny", "method": "MALMEN", "m": m, "bytes": m * 2**20} for m in (64, 1024, 4096)]
    peaks += [{"tier": "tiny", "method": "ROME", "m": 1, "bytes": 3 * 2**20}]
    seconds = [("MALMEN", 0.032), ("ROME", 32)]
    speeds = [{"tier": "tiny", "method": name, "facts": 64, "seconds": s} for name, s in seconds]
    for name, rows in (("memory", peaks), ("speed", speeds)):
        (folder / "editors" / f"{name}.json").write_text(json.dumps({"rows": rows}))
    return read_costs(folder)


def test_costs(tmp_path):
    costs = costs_in(tmp_path)
    assert costs.peaks["tiny", "MALMEN"] == {64: 64, 1024: 1024, 4096: 4096}
    assert costs.speeds == {("tiny", "MALMEN"): pytest.approx(2000), ("tiny", "ROME"): 2}


def test_cost_table(tmp_path):
    trainings = ((16, 0, 1), (64, 0, 5), (64, 1, 7), (64, 2, 60))
    records = [record("MALMEN", m, seed, training=seconds) for m, seed, seconds in trainings]
    rows = cells(editor_cost_table([*records, record("ROME", 64)], "tiny", ("MALMEN", "ROME"), 64, costs_in(tmp_path)))
    assert rows[0] == ["MALMEN", "7 s", "2,000", "64.0", "4096.0", "a training set"]  # the median, at this m
    assert rows[1] == ["ROME", "1 s", "2.0", "3.0", "3.0", "subjects, a corpus"]


# --- what other papers print


def test_zsre_table_is_at_the_largest_m_of_memit():
    records = [record("MEMIT", 16), record("MEMIT", 64, mean=0.5, GS=0.25, LS=1.0), record("FT", 256), record("FT", 64)]
    rows = cells(zsre_table(records))
    assert [row[1] for row in rows] == ["FT", "MEMIT"] and {row[0] for row in rows} == {"64"}
    assert rows[1][2:] == ["42.9", "50.0", "25.0", "100.0", "50.7 / 96.7 / 89.7 / 26.6"]
    assert rows[0][-1] == "–"


def test_a_printed_table():
    found = as_printed("A 1 2 3 2.0 4 5 6 5.00\nB 1 1 1 1 2 2 2 2\nA 7 8 9 8 0 0 0 0\n")
    assert list(found) == ["A", "B"] and [len(rows) for rows in found.values()] == [len(SETS), 2]
    assert found["A"][0] == ["1", "2", "3", "2.0"]  # as text: a zero at the end stays


def test_coachhook_table():
    printed = as_printed("MEMIT 1 2 3 2.0 4 5 6 5.00")
    records = [record("MEMIT", 30, mean=0.5), record("MALMEN", 30, mean=0.5, LS=0.8)]
    rows = cells(coachhook_table(records, 30, ("MEMIT", "MALMEN"), printed))
    assert rows[0] == ["MEMIT", "50.00 / 50.00 / 50.00 / 50.00", "1 / 2 / 3 / 2.0", "4 / 5 / 6 / 5.00", "–", "–"]
    assert rows[1] == ["MALMEN", "50.00 / 50.00 / 80.00 / 60.00", "–", "–", "–", "–"]


# --- variants


def compared(differences, variant=PLACEBO, m=16):
    "Records of MALMEN and of a variant, whose ES differs so much in each seed, in points."
    ours = [record("MALMEN", m, seed) for seed in range(len(differences))]
    return ours + [record(variant, m, seed, ES=0.5 + points / 100) for seed, points in enumerate(differences)]


def test_effects_are_taken_seed_by_seed():
    found = effects([*compared([3, -1]), record("FT", 16)])
    assert found.keys() == {(16, PLACEBO, name) for name in ("ES", "GS", "LS")}
    assert found[16, PLACEBO, "ES"] == pytest.approx([3, -1]) and found[16, PLACEBO, "GS"] == [0, 0]


def test_a_variant_that_broke_down_has_no_effect():
    found = effects([record("MALMEN", 16), broken(PLACEBO, 16), *compared([1], TUNED, 64)])
    assert {method for _, method, _ in found} == {TUNED}
    rows = {(row[0], row[1]): row[2:] for row in cells(effect_table(found))}
    assert rows["64", PLACEBO] == ["no record"] * 3 + ["0"] and rows["64", TUNED][3] == "1"


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-TOLERANCE, -TOLERANCE], "cost"),
        ([-1.9, -2.0, -2.0], "none"),  # too small in the mean
        ([-9.0, -9.0, 0.1], "none"),  # of either sign
        ([-9.0, -9.0, 0.0], "none"),  # none is no sign
        ([2.5, 3.5, 2.1], "gain"),
        ([-2.5], "cost"),
    ],
)
def test_when_a_difference_counts(differences, expected):
    assert effect_verdict(differences) == expected


def test_effect_table():
    rows = {row[1]: row[2:] for row in cells(effect_table(effects(compared([-4, -2]))))}
    assert list(rows) == list(VARIANTS)
    assert rows[PLACEBO] == ["-3.0 ± 1.4 (cost)", "+0.0 ± 0.0 (none)", "+0.0 ± 0.0 (none)", "2"]


# --- pictures


def test_draw_effects():
    figure = Figure()
    draw_effects(effects([*compared([1, 2]), *compared([-50, 2], TUNED, 64)]), figure)
    assert [ax.get_title() for ax in figure.axes] == ["ES", "GS", "LS"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [name.removeprefix("MALMEN ").strip("()") for name in VARIANTS]


def test_draw_parts():
    methods = {name for names in PARTS.values() for name in names}
    assert methods <= METHODS.keys()
    figure = Figure()
    draw_parts([record(name, m) for name in methods for m in (30, 100)], figure)
    assert len(figure.axes) == 3 * len(PARTS)
    labels = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert labels == ["lambda 10", "lambda 100", "lambda 1,000, its own", "lambda 10,000", "lambda 100,000"]


def test_draw_scores():
    figure = Figure()
    groups = {"keys": [0.1, 0.5, 2.0], "others": [0.0, 0.3]}
    panels = {"edits": groups, "rephrases": groups}
    draw_scores(panels, [0.7, 0.8], figure)
    assert [ax.get_title() for ax in figure.axes] == ["edits", "rephrases"]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [0.7, 0.8]
