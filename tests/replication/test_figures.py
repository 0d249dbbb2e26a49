"""Tables and pictures from hand-made records, and the committed pictures drawn again from the committed records."""

import io
import itertools
import math
import re
import shutil
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import pytest

from malmen_repro.evaluation import markdown_table
from malmen_repro.replication import figures
from malmen_repro.replication.bench_settings import MIXED, MIXTURES
from malmen_repro.replication.benches import TIERS
from malmen_repro.replication.figures import (
    MARKERS,
    OWN_WAY,
    PALETTE,
    PAPER_MEASURES,
    SHOWN_AS,
    case_points,
    case_table,
    committed_figure,
    compare_tables,
    draw,
    draw_cases,
    draw_mixtures,
    draw_residuals,
    draw_scaling,
    failure_table,
    figure_title,
    in_order,
    mean_and_spread,
    mean_at,
    mean_of,
    panels,
    residual_points,
    residual_table,
    save_figure,
    scaling_points,
    scaling_table,
    sequence_points,
    sequence_table,
    shown,
    spread_note,
    table_of,
    training_curves,
    training_look,
    training_table,
    variants_table,
)
from malmen_repro.replication.memory import draw_memory
from malmen_repro.replication.plans import EXPERIMENTS, FACTORS, METHODS, TRAININGS
from malmen_repro.replication.procedures import draw_architectures, draw_concatenated, draw_split
from malmen_repro.replication.records import RecordError, committed_records, read_records
from tests.handmade import (
    broken,
    case_record,
    failure_block,
    failure_record,
    part,
    record,
    residual_record,
    sequence_record,
    training_record,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
TOY_METHODS = ("MALMEN", "MEND", "MALMEN untrained")
NONE = "There are no records."


def rows_of(table):
    "The cells of a markdown table, without the lines that are none of it."
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines[1:]]


# --- points


def test_in_order_of_set_m_method_and_seed():
    wanted = [
        (data_set, m, method, seed)
        for data_set in ("a", "b") for m in (2, 16, 1024)
        for method in (*METHODS, "Another", "Unknown") for seed in (0, 1)
    ]
    made = [record(method, m, seed, data_set=data_set) for data_set, m, method, seed in wanted]
    cells = [one["configuration"]["cell"] for one in in_order(made[::-1])]
    assert [(c["data_set"], c["num_facts"], c["method"], c["seed"]) for c in cells] == wanted
    assert in_order([]) == []


def test_scaling_points_average_over_seeds():
    (point,) = scaling_points([record("MALMEN", 16, seed, mean) for seed, mean in enumerate((0.8, 0.9, 1.0))])
    assert point["seeds"] == 3 and point["ES"] == pytest.approx((0.9, 0.8, 1.0)) and point["failure"] is None
    assert (point["data_set"], point["num_facts"], point["method"]) == ("toys", 16, "MALMEN")
    assert point["LS before"] == pytest.approx((0.9, 0.9, 0.9))


def test_scaling_points_do_not_depend_on_the_order_of_records():
    grid = itertools.product(TOY_METHODS, (2, 16), (0, 1))
    made = [record(method, m, seed, 0.1 * seed + 0.01 * m) for method, m, seed in grid]
    assert scaling_points(made) == scaling_points(made[::-1])


def test_scaling_points_keep_sets_m_and_methods_apart():
    grid = list(itertools.product(("a", "b"), (2, 4), TOY_METHODS))
    points = scaling_points([record(method, m, 0, data_set=name) for name, m, method in grid])
    assert [(point["data_set"], point["num_facts"]) for point in points] == [(name, m) for name, m, _ in grid]
    assert {point["seeds"] for point in points} == {1}


def test_scaling_points_of_other_measures():
    (point,) = scaling_points([record(GS=0.25)], ("GS",))
    assert point["GS"] == pytest.approx((0.25, 0.2, 0.3)) and "ES" not in point
    with pytest.raises(KeyError):
        scaling_points([record()], ("no such",))


def test_a_breakdown_is_a_point_without_scores():
    (point,) = scaling_points([broken(seed=0), broken(seed=1)])
    assert point["seeds"] == 2 and point["failure"]["tokens"] == 40
    assert all(math.isnan(value) for name in (*PAPER_MEASURES, "LS before") for value in point[name])
    assert shown(point, "ES") == "–"


def test_one_seed_of_two_breaks_down():
    (point,) = scaling_points([broken(seed=0), record("MALMEN, no regularisation", 16, 1, 0.5)])
    assert point["seeds"] == 2 and point["failure"]["error"] == "SingularGramError"
    assert point["ES"] == pytest.approx((0.5, 0.45, 0.55))  # of the one that is there


def test_records_from_before_there_were_extras():
    one = record()
    del one["extra"]
    assert scaling_points([one])[0]["failure"] is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], (math.nan,) * 3),
        ([part(0.5)], (0.5, 0.45, 0.55)),
        ([part(None)], (math.nan,) * 3),
        ([part(0.2), part(0.4)], (0.3, 0.3 - math.sqrt(0.02), 0.3 + math.sqrt(0.02))),
        ([part(0.5)] * 5, (0.5, 0.5, 0.5)),
    ],
)
def test_spread(scores, expected):
    assert mean_and_spread(scores) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("second", [0.5, None])
def test_spread_of_several_seeds_of_which_one_was_not_scored(second):
    assert mean_and_spread([part(None), part(second)]) == pytest.approx((math.nan,) * 3, nan_ok=True)


# --- tables


def test_a_single_seed_shows_the_interval():
    (point,) = scaling_points([record("MALMEN", 16, 0, 0.8)])
    assert shown(point, "ES") == "80.0 [75.0, 85.0]"
    assert shown(None, "ES") == "–"


def test_several_seeds_show_the_deviation():
    (point,) = scaling_points([record(seed=seed, mean=mean) for seed, mean in enumerate((0.4, 0.5, 0.6))])
    assert shown(point, "ES") == "50.0 ± 10.0"


def test_spread_note():
    tiny, small = ([record(tier=tier)] for tier in ("tiny", "small"))
    assert "1 seed" in spread_note([{"seeds": 1}], tiny) and "bootstrap" in spread_note([{"seeds": 1}], small)
    three, own = "mean ± standard deviation over 3 seeds", ", each with a language model of its own"
    assert spread_note([{"seeds": 3}, {"seeds": 3}], tiny) == f"{three}{own}"
    assert spread_note([{"seeds": 3}], small) == f"{three} of one language model"
    assert "bootstrap" in spread_note([{"seeds": 3}, {"seeds": 1}], tiny)
    assert spread_note([{"seeds": 3}, {"seeds": 2}], tiny) == f"mean ± standard deviation over 2, 3 seeds{own}"
    for tier in ("paper", "shapes"):
        assert spread_note([{"seeds": 3}], [record(tier=tier)]).endswith(" of one language model")


@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_how_many_language_models_the_seeds_of_a_tier_have(tier):
    for name in EXPERIMENTS:
        models = {}
        for one in read_records(committed_records(), name, tier):
            models.setdefault(one["configuration"]["cell"]["seed"], set()).add(one["fingerprints"]["language_model"])
        if len(models) > 1:
            assert all(len(found) == 1 for found in models.values())
            assert len(set.union(*models.values())) == (len(models) if tier == "tiny" else 1)


def test_markdown_table():
    lines = markdown_table(["a", "long header"], [["longer", 1], ["x", None]]).splitlines()
    assert lines[0] == "| a      | long header |" and lines[1] == "|--------|-------------|"
    assert lines[2] == "| longer | 1           |" and len({len(line) for line in lines}) == 1
    assert markdown_table(["a"], []).splitlines() == ["| a |", "|---|"]
    with pytest.raises(ValueError):
        markdown_table(["a", "b"], [["one", "two", "three"]])


def test_scaling_table_in_the_order_of_m_and_methods():
    records = [record(method, m, seed, 0.5) for m in (256, 16) for method in TOY_METHODS[::-1] for seed in (1, 0)]
    rows = scaling_table(records).splitlines()
    assert rows[0].startswith("| set") and [row.split("|")[2:4] for row in rows[2:8]] == [
        [f" {m} ".ljust(5), f" {method} ".ljust(18)] for m in (16, 256) for method in TOY_METHODS
    ]
    assert "50.0 ± 0.0" in rows[2] and "90.0 ± 0.0" in rows[2]
    assert rows[-1] == "Per cent, mean ± standard deviation over 2 seeds, each with a language model of its own."
    assert scaling_table([]) == NONE


def test_scaling_table_shows_what_is_missing_as_missing():
    rows = rows_of(scaling_table([record(LS=None, before=None), broken()]))
    assert rows[0][4].startswith("50.0") and rows[0][5:7] == ["–", "–"] and rows[1][3:7] == ["–"] * 4


def test_compare_tables():
    new = [record("MALMEN", m, seed, 0.8) for m in (16, 64) for seed in (0, 1)]
    old = [record("MALMEN", 16, seed, 0.7) for seed in (0, 1, 2)]
    text = compare_tables(new, old)
    row = text.splitlines()[2]
    assert "80.0 ± 0.0" in row and "70.0 ± 0.0" in row and "2 / 3" in row
    assert text.splitlines()[3].count("–") == 3 and "2 / 0" in text
    assert "2 of 4 cells have a committed record with the same settings" in text
    assert "0 of 4 cells" in compare_tables(new, []) and compare_tables([], old) == NONE


def test_compare_tables_with_a_breakdown():
    text = compare_tables([broken()], [broken()])
    assert rows_of(text)[0][3:] == ["–"] * 6 + ["1 / 1"] and "1 of 1 cells" in text


def test_variants_table():
    made = [record("MALMEN", 64, seed, 0.5, training=10.0 + seed) for seed in (0, 1)]
    made += [record("MEND", 64, seed, 0.25, training=2.0) for seed in (0, 1)]
    made += [broken("MALMEN, no regularisation", 64, seed) for seed in (0, 1)]
    table = variants_table(made[::-1])
    ours, mend, none = rows_of(table)
    assert ours == ["toys", "64", "MALMEN", *["50.0 ± 0.0"] * 3, "90.0 ± 0.0", "10 s", "2"]  # 10.5 to even
    assert mend[2] == "sum of shifts (MEND)" and mend[7] == "2 s"
    assert none[3:] == ["–"] * 4 + ["SingularGramError: 40 tokens < 96", "2"]
    assert "deviation over 2 seeds, each with a language model of its own." in table and variants_table([]) == NONE


def test_variants_table_says_the_reason_of_any_breakdown():
    (row,) = rows_of(variants_table([broken(error="NonFiniteShiftError")]))
    assert row[7] == "NonFiniteShiftError"


def test_variants_table_without_the_time_of_a_training():
    one = record()
    one["seconds"] = {}
    assert rows_of(variants_table([one]))[0][7] == "–"


def test_mean_of():
    made = [record(seed=seed, training=float(seed)) for seed in (1, 2)]
    made += [record("MEND", training=50.0), record(m=64, training=60.0), record(data_set="other", training=70.0)]
    point = {"data_set": "toys", "num_facts": 16, "method": "MALMEN"}
    assert mean_of(made, point, lambda one: one["seconds"]["training"]) == 1.5


# --- residuals


def fig8(data_set="toys", seeds=(0, 1)):
    def one(method, m, seed):
        sums, normal = [(0.5 + m / 100, 0.5)] * 2, [(1e-3 * m, 2e-3 * m)] * 2
        return residual_record(method, m, seed, sums=sums, normal=normal, data_set=data_set)

    return [one(method, m, seed) for method in ("MEND", "MALMEN") for m in (64, 16) for seed in seeds]


def test_residual_points_are_means_over_blocks():
    blocks = {"sums": [(1.0, 3.0), (2.0, 5.0)], "normal": [(0.1, 0.2), (0.3, 0.6)]}
    rows = residual_points([residual_record("MALMEN", 16, 3, **blocks)])
    found = {(row["layer"], row["way"]): row["residual"] for row in rows}
    assert found == pytest.approx(
        {("h0", "sum"): 1.5, ("h1", "sum"): 4.0, ("h0", "normal equation"): 0.2, ("h1", "normal equation"): 0.4}
    )
    assert {row["share"] for row in rows} == {0.5, 1.0}
    names = ("data_set", "method", "num_facts", "seed")
    assert {tuple(row[name] for name in names) for row in rows} == {("toys", "MALMEN", 16, 3)}
    assert residual_points([]) == []


def test_residual_points_in_order():
    rows = residual_points(fig8())
    places = [(row["num_facts"], row["method"], row["seed"]) for row in rows]
    assert places == sorted(places, key=lambda place: (place[0], place[1] != "MALMEN", place[2]))
    assert len(rows) == 8 * 2 * 2


def test_residual_table():
    rows = rows_of(residual_table(fig8()))
    assert len(rows) == 2 * 2 * 2 and [row[1] for row in rows] == ["16"] * 4 + ["64"] * 4
    assert {row[3] for row in rows if row[2] == "MALMEN"} == {"sum (the other)", "normal equation (its own)"}
    assert {row[3] for row in rows if row[2] == "MEND"} == {"sum (its own)", "normal equation (the other)"}
    own = next(row for row in rows if row[1:4] == ["16", "MALMEN", "normal equation (its own)"])
    assert own[4:] == ["0.024", "1"]  # of both layers and seeds: .016 and .032
    summed = next(row for row in rows if row[1:4] == ["64", "MEND", "sum (its own)"])
    assert summed[4:] == [f"{(1.14 + 0.5) / 2:.3g}", "0.5"]


def test_every_way_belongs_to_a_method():
    assert set(OWN_WAY) <= set(METHODS) and set(OWN_WAY.values()) == {"sum", "normal equation"}


def test_draw_residuals():
    figure = draw_residuals(fig8("a") + fig8("b", seeds=(0,)))
    assert len(figure.axes) == 6 and [ax.get_yscale() for ax in figure.axes] == ["log", "log", "symlog"] * 2
    own, both, survives = figure.axes[:3]
    texts = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in (own, both)]
    assert texts[0] == ["MALMEN (normal equation)", "MEND (sum)"]
    assert texts[1] == ["sum, MALMEN's tokens", "normal equation, MALMEN's tokens"]
    assert own.get_title() == "each in its own way" and own.get_ylabel() == "a: mean residual"
    assert "over layers and 2 seeds; thin" in figure.get_suptitle()
    alone = draw_residuals(fig8(seeds=(0,)))
    assert "over layers, 1 seed; thin" in alone.get_suptitle() and alone.axes[0].get_ylabel() == "mean residual"
    assert survives.get_ylabel() == "share that survives"
    line = own.get_lines()[0]
    assert line.get_xdata().tolist() == [16, 64] and line.get_ydata().tolist() == pytest.approx([0.024, 0.096])
    assert line.get_color() == PALETTE["MALMEN"]
    thin = [line.get_ydata().tolist() for line in own.get_lines() if line.get_linewidth() < 1]  # a layer each
    assert thin == [pytest.approx(ys) for ys in ([0.016, 0.064], [0.032, 0.128], [0.66, 1.14], [0.5, 0.5])]
    assert [label.get_text() for label in own.get_xticklabels()] == ["16", "64"]
    assert "Fig. 8" in figure.get_suptitle() and figure.axes[-1].get_xlabel() == "facts edited at once, m"


def test_draw_residuals_of_nothing():
    with pytest.raises(RecordError, match="no records to draw"):
        draw_residuals([])


# --- sequences


def test_sequence_points_weigh_blocks_by_their_facts():
    (point,) = sequence_points([sequence_record("MEND", 5, success=(1.0, 0.0), drawdown=(0.1, 0.5), weights=[6, 2])])
    assert point["edit success"][0] == pytest.approx(0.75) and point["drawdown"][0] == pytest.approx(0.2)
    assert point["seeds"] == 1 and math.isnan(point["edit success"][1]) and math.isnan(point["drawdown"][1])


def test_sequence_points_and_table_over_seeds():
    made = [
        sequence_record(method, m, seed, success=(0.5 + 0.2 * seed,), drawdown=(0.01,))
        for method in ("MEND, locality 10", "MEND") for m in (25, 5) for seed in (1, 0)
    ]
    points = sequence_points(made)
    assert [(p["num_facts"], p["method"]) for p in points] == [
        (m, method) for m in (5, 25) for method in ("MEND", "MEND, locality 10")
    ]
    assert points[0]["edit success"] == pytest.approx((0.6, math.sqrt(0.02)))
    assert rows_of(sequence_table(made))[0] == ["5", "MEND", "0.600 ± 0.141", "0.010 ± 0.000", "2"]


def test_sequence_table_of_one_seed():
    made = [sequence_record("MEND", 5, success=(0.5,), drawdown=(-0.001,))]
    assert rows_of(sequence_table(made)) == [["5", "MEND", "0.500", "-0.001", "1"]]


def test_sequence_points_need_a_weight_for_each_block():
    with pytest.raises(ValueError):
        sequence_points([sequence_record("MEND", 5, success=(1.0, 1.0), drawdown=(0.0, 0.0), weights=[5])])


# --- failure cases


def edit_row(i=0, answer="paris", other="rome", target="rome"):
    prompts = {"prompt": f"p{i}", "equivalent prompt": f"q{i}"}
    return {**prompts, "target": target, "answer": answer, "equivalent answer": other}


def lost_row(i=0, before="yes", after="no"):
    return {"prompt": f"u{i}", "target": "yes", "before": before, "after": after}


def test_failure_table():
    rows = {"edits": [edit_row(i) for i in range(3)], "gone": [lost_row(i) for i in range(2)]}
    blocks = [
        failure_block(facts=10, either=3, lost=2, **rows),
        failure_block(facts=5, either=1, lost=0, edits=[edit_row(9, "rome", "oslo")]),
    ]
    text = failure_table([failure_record(*blocks), failure_record(failure_block(facts=1), seed=1)])
    first, edits, lost = text.split("\n\n")
    assert first == (
        "Of 16 facts edited, 4 fail on the edit or its first equivalent tuple, "
        "2 lose their unrelated tuple. Some of them:"
    )
    assert rows_of(edits)[0] == ["p0 / q0", "rome", "paris ✗ / rome ✓"]
    assert rows_of(edits)[3] == ["p9 / q9", "rome", "rome ✓ / oslo ✗"]
    assert rows_of(lost) == [["u0", "yes ✓", "no ✗"], ["u1", "yes ✓", "no ✗"]]


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1, 1), (6, 6), (99, 8)])
def test_failure_table_is_cut(limit, expected):
    block = failure_block(edits=[edit_row(i) for i in range(8)], gone=[lost_row(i) for i in range(8)])
    _, edits, lost = failure_table([failure_record(block)], limit).split("\n\n")
    assert len(rows_of(edits)) == len(rows_of(lost)) == expected


def test_failure_table_without_failures():
    text = failure_table([failure_record(failure_block(facts=4))])
    assert text.startswith("Of 4 facts edited, 0 fail") and rows_of(text) == [
        ["unrelated prompt", "pre-edit answer", "post-edit answer"]
    ]


# --- pictures


def test_every_method_of_a_picture_has_a_colour_and_a_marker_of_its_own():
    from malmen_repro.replication.plans import ALL_METHODS, MAIN_METHODS

    for looks in (PALETTE, MARKERS):
        assert {*MAIN_METHODS, *ALL_METHODS} <= looks.keys() and len(set(looks.values())) == len(looks)


def test_a_curve_that_lies_on_another_lets_it_be_seen():
    lines = draw_scaling([record(method, m) for method in ("MEMIT", "CoachHooK") for m in (1, 2)]).axes[0].get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "-."]
    assert [line.get_markerfacecolor() for line in lines] == [PALETTE["MEMIT"], "none"]


@pytest.mark.parametrize(("size", "text"), [
    (6.05e9, "6.05 B"), (124_439_808, "124 M"), (27_424, "27,424"), (1e9, "1 B"), (1e5, "0.1 M"), (99_999, "99,999")])
def test_figure_title_says_the_size(size, text):
    one = record("MEND", 16, 0, 0.5)
    one["model"]["parameters"] = int(size)
    assert figure_title([one]).endswith(f", toys, gpt2 of {text} parameters")


def test_figure_title_names_experiment_and_figure():
    title = figure_title([record(experiment="scaling_gptj", tier="shapes", seed=seed) for seed in (0, 1)])
    experiment = EXPERIMENTS["scaling_gptj"]
    assert title.startswith(f"Shapes tier: {experiment.title} (Fig. 7), toys, gpt2 of ")
    assert figure_title([record()]).startswith("Tiny tier: toy, ")


def test_figure_title_names_a_data_set_once():
    assert "(Fig. 7), gpt2" in figure_title([record(experiment="scaling_gptj", data_set=name) for name in "ab"])
    assert figure_title([record(experiment="editors_zsre", data_set="zsre")]).lower().count("zsre") == 1


def test_figure_says_tier_model_and_seeds():
    grid = itertools.product(TOY_METHODS, (16, 1037), (0, 1), ("a", "b"))
    figure = draw_scaling([record(method, m, seed, 0.5, data_set=name) for method, m, seed, name in grid])
    title = figure.get_suptitle()
    assert "Tiny tier" in title and "1.5 M" in title and title.count("2 seeds") == 1 and "standard deviation" in title
    assert len(figure.axes) == 6 and [ax.get_title() for ax in figure.axes[:3]] == ["ES", "GS", "LS"]
    assert [label.get_text() for label in figure.axes[5].get_xticklabels()] == ["16", "1037"]
    lines = figure.axes[2].get_lines()
    assert lines[-1].get_linestyle() == "--" and lines[-1].get_ydata().tolist() == [0.9, 0.9]
    assert len(figure.axes[0].get_lines()) == 3 and [figure.axes[i].get_ylabel() for i in (0, 3)] == [
        "a, per cent", "b, per cent"
    ]  # fmt: skip
    assert [figure.axes[0].yaxis.get_major_formatter()(y) for y in (0.2, 1)] == ["20", "100"]
    assert draw_scaling([record()]).axes[0].get_ylabel() == "per cent"


def test_a_set_without_other_phrasings_has_an_empty_panel(tmp_path):
    bare = [record(method, m, GS=None, data_set="bare") for method in TOY_METHODS for m in (16, 64)]
    figure = draw_scaling([*bare, *(record(m=m, data_set="full") for m in (16, 64))], tmp_path / "x")
    empty, full = figure.axes[1], figure.axes[4]
    assert not empty.lines and [text.get_text() for text in empty.texts] == ["no GS"]
    assert len(full.lines) == 1 and not full.texts and (tmp_path / "x.png").stat().st_size > 0
    assert [label.get_text() for label in empty.get_xticklabels()] == ["16", "64"]
    assert draw_scaling(bare).legends[0].get_texts()


def test_a_method_that_one_set_alone_has_is_in_the_legend():
    made = [record("MALMEN", m) for m in (16, 64)] + [record(name, data_set="b") for name in ("MALMEN", "MEMIT")]
    (legend,) = draw_scaling(made).legends
    assert [text.get_text() for text in legend.get_texts()] == ["MALMEN", "MEMIT", "before editing"]
    cases = [case_record("MALMEN"), *(case_record(name, data_set="b") for name in ("MALMEN", "MEMIT"))]
    assert "MEMIT" in {text.get_text() for text in draw_cases(cases).legends[0].get_texts()}


def test_a_figure_is_drawn_from_records_alone_and_is_deterministic(tmp_path):
    made = [record(method, m, seed, 0.1 * seed + m / 100) for method in TOY_METHODS for m in (2, 4) for seed in (0, 1)]
    draw_scaling(made, tmp_path / "a" / "one.v1")
    draw_scaling(made[::-1], tmp_path / "a" / "two.v1")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["one.v1.png", "one.v1.svg", "two.v1.png", "two.v1.svg"]
    for kind in ("png", "svg"):
        one, two = ((tmp_path / "a" / f"{name}.v1.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two and len(one) > 5000
    assert b"<dc:date>" not in (tmp_path / "a" / "one.v1.svg").read_bytes()


def test_figure_of_one_seed_says_so():
    assert "bootstrap interval over facts, 1 seed" in draw_scaling([record("MEND", 16, 0, 0.5)]).get_suptitle()


def test_figure_of_nothing(tmp_path):
    with pytest.raises(RecordError, match="no records to draw"):
        draw_scaling([], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_method_nobody_knows_is_drawn_too():
    assert draw_scaling([record("MEMIT", m, 0, 0.5) for m in (1, 2)]).axes[0].get_lines()


def test_a_curve_with_a_breakdown_is_drawn():
    made = [record("MALMEN", m) for m in (16, 64)] + [broken(m=16), record("MALMEN, no regularisation", 64)]
    lines = {line.get_label(): line for line in draw_scaling(made).axes[0].get_lines()}
    assert lines["MALMEN"].get_ydata().tolist() == [0.5, 0.5]
    ys = lines["MALMEN, no regularisation"].get_ydata().tolist()
    assert [y for y in ys if y == y] == [0.5]


def test_a_method_that_always_breaks_down_does_not_stop_the_picture():
    assert draw_scaling([record("MALMEN", 16), broken(m=16), broken(m=64)])
    assert draw_scaling([broken(m=16)])


def test_facts_without_unrelated_tuples_are_drawn():
    assert draw_scaling([record(m=m, LS=None, before=None) for m in (16, 64)])


def test_panels_have_a_note_and_write_what_is_done(tmp_path):
    with panels(1, 2, [record()], tmp_path / "x", "a note") as (figure, grid):
        assert grid.shape == (1, 2) and not list(tmp_path.iterdir())
    assert figure.get_suptitle().endswith("\na note") and len(list(tmp_path.iterdir())) == 2


def test_save_figure_returns_what_it_wrote(tmp_path):
    from matplotlib.figure import Figure

    assert save_figure(Figure(), tmp_path / "a" / "b") == [tmp_path / "a" / "b.png", tmp_path / "a" / "b.svg"]


# --- trainings, step by step


def test_what_was_seen_on_the_way_is_a_mean_over_seeds():
    looks = [((15, es, 1e-4), (30, 2 * es, 3e-4)) for es in (0.2, 0.4)]
    made = [training_record("MALMEN, paper", seed, looks=seen) for seed, seen in enumerate(looks)]
    assert training_curves(made, "ES") == {"MALMEN, paper": {15: pytest.approx(0.3), 30: pytest.approx(0.6)}}
    assert training_curves(made, "eta")["MALMEN, paper"] == {15: pytest.approx(1e-4), 30: pytest.approx(3e-4)}


def test_a_training_has_its_rates_in_the_table():
    (row,) = rows_of(training_table([training_record("MALMEN, paper", rate=1.25e-3, regularization=0.5)]))
    assert row[2] == "MALMEN, paper" and row[7:9] == ["0.0013", "0.5"]


def test_trainings_are_told_apart():
    looks = [tuple(sorted(training_look(method).items())) for method in TRAININGS]
    assert len(set(looks)) == len(TRAININGS)
    broken_lines = {method for method in TRAININGS if training_look(method)["linestyle"] == "--"}
    assert broken_lines == {f"MALMEN, only {name}" for name in FACTORS}


# --- an experiment's own table and picture


MADE = {
    "curve": lambda name: [record(experiment=name, m=m) for m in (16, 64)],
    "variants": lambda name: [record(experiment=name), broken(experiment=name)],
    "residuals": lambda name: fig8(seeds=(0,)),
    "sequences": lambda name: [sequence_record("MEND", 5, success=(0.5,), drawdown=(0.0,))],
    "failures": lambda name: [failure_record(failure_block())],
    "cases": lambda name: [case_record(m=m, experiment=name) for m in (16, 64)],
    "cases table": lambda name: [case_record(experiment=name)],
    "mixtures": lambda name: mixture(MIXED),
    "trainings": lambda name: [training_record(method) for method in TRAININGS],
}


def test_every_experiment_is_shown_in_a_known_way():
    assert {experiment.shown_as for experiment in EXPERIMENTS.values()} == SHOWN_AS.keys() == MADE.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_table(name):
    made = MADE[EXPERIMENTS[name].shown_as](name)
    table = SHOWN_AS[EXPERIMENTS[name].shown_as][0](made)
    assert table_of(name, made) == table and rows_of(table) and table_of(name, []) == NONE


@pytest.mark.parametrize("how", SHOWN_AS)
def test_an_experiment_has_the_picture_of_its_way_to_be_shown(how, tmp_path):
    name = next(name for name, experiment in EXPERIMENTS.items() if experiment.shown_as == how)
    picture, made = SHOWN_AS[how][1], MADE[how](name)
    assert draw(name, made, tmp_path / "x") == (picture is not None)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["x.png", "x.svg"] if picture else [])
    if picture is not None:
        with pytest.raises(RecordError, match="no records to draw"):
            draw(name, [], tmp_path / "y")


@pytest.mark.parametrize("what", [lambda: table_of("no such", [record()]), lambda: draw("no such", [record()], "x")])
def test_no_such_experiment(what):
    with pytest.raises(KeyError):
        what()


def test_mean_at():
    grid = itertools.product(("MALMEN", "MEND"), (16, 64), (0, 1))
    made = [record(method, m, seed, 0.2 + 0.2 * seed) for method, m, seed in grid]
    assert mean_at(made, "MEND", 64) == pytest.approx({"ES": 0.3, "GS": 0.3, "LS": 0.3, "LS before": 0.9})
    assert mean_at(made, "MEND", 64, "toys") == mean_at(made, "MEND", 64)
    with pytest.raises(RecordError, match="0 places have FT at m = 64$"):
        mean_at(made, "FT", 64)
    with pytest.raises(RecordError, match="0 places have MEND at m = 64 in zsre"):
        mean_at(made, "MEND", 64, "zsre")
    both = made + [record("MEND", 64, data_set="other")]
    with pytest.raises(RecordError, match="2 places"):
        mean_at(both, "MEND", 64)
    assert mean_at(both, "MEND", 64, "other")["ES"] == 0.5


# --- committed figures


def test_committed_figure_draws_beside_the_records(tmp_path, monkeypatch):
    folder = write([record(experiment="scaling_decoder", m=m) for m in (16, 64)], tmp_path / "records")
    write([failure_record(failure_block())], folder)
    monkeypatch.setattr(figures, "committed_records", lambda: folder)
    found, path = committed_figure("scaling_decoder", "tiny")
    assert found == read_records(folder, "scaling_decoder", "tiny") and len(found) == 2
    assert path == tmp_path / "figures" / "tiny-scaling_decoder.png" and path.exists()
    assert path.with_suffix(".svg").exists()
    found, path = committed_figure("failures", "tiny")
    assert len(found) == 1 and path is None
    assert committed_figure("scaling_decoder", "small") == ([], None)
    assert len(list((tmp_path / "figures").iterdir())) == 2


def test_committed_figure_without_a_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "committed_records", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert committed_figure("scaling_decoder", "tiny") == ([], None) and not list(tmp_path.iterdir())


def pinned(name):
    return re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


PICTURES = {  # item -> what draws its records to a path without suffix
    name: partial(draw, name) for name, experiment in EXPERIMENTS.items() if SHOWN_AS[experiment.shown_as][1]
} | {"memory": draw_memory}
EXPLAINING = {1: draw_concatenated, 2: draw_split, 3: draw_architectures}  # they measure nothing and have no records


def with_records():
    "Items with a picture and the tiers that have committed records of them. Scores of random weights have none."
    folder = committed_records()
    pairs = [(name, tier) for name in PICTURES for tier in TIERS if (tier, name in EXPERIMENTS) != ("shapes", True)]
    return [(name, tier) for name, tier in pairs if any((folder / tier / name).glob("*.json"))]


def as_committed(name):
    "The bytes of a figure's file in git's index: a run of the notebooks draws those of the working tree anew."
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: a picture of the working tree may have been drawn a moment ago")
    shown = subprocess.run(["git", "show", f":figures/{name}"], cwd=ROOT, capture_output=True)
    assert shown.returncode == 0, f"figures/{name} is not in git: {shown.stderr.decode()}"
    return shown.stdout


def pixels(data):
    return matplotlib.image.imread(io.BytesIO(data), format="png")


def compare_with_committed(name, drawn):
    """The drawn files against the committed ones.

    The SVG is compared byte by byte. The PNG, which README shows, by its pixels, and a few may differ a little: the
    fonts come with matplotlib, whose version is pinned, but processors round the edges of letters differently.
    """
    for package in ("matplotlib", "seaborn"):
        if version(package) != pinned(package):
            pytest.skip(f"{package} is {version(package)}; the pictures were drawn with {pinned(package)}")
    assert drawn.with_suffix(".svg").read_bytes() == as_committed(f"{name}.svg"), f"{name}.svg is to be drawn again"
    ours, theirs = pixels(drawn.with_suffix(".png").read_bytes()), pixels(as_committed(f"{name}.png"))
    assert ours.shape == theirs.shape and (abs(ours - theirs) > 0.1).mean() < 1e-4, f"{name}.png is to be drawn again"


@pytest.mark.parametrize(("name", "tier"), with_records())
def test_a_committed_picture_is_what_the_committed_records_give(name, tier, tmp_path):
    PICTURES[name](read_records(committed_records(), name, tier), tmp_path / "again")
    compare_with_committed(f"{tier}-{name}", tmp_path / "again")


@pytest.mark.parametrize("number", EXPLAINING)
def test_a_committed_picture_that_explains_is_what_the_code_draws(number, tmp_path):
    save_figure(EXPLAINING[number](), tmp_path / "again")
    compare_with_committed(f"procedures-fig{number}", tmp_path / "again")


def test_another_picture_is_told(tmp_path):
    save_figure(draw_split(), tmp_path / "again")
    with pytest.raises(AssertionError, match="procedures-fig1.svg is to be drawn again"):
        compare_with_committed("procedures-fig1", tmp_path / "again")
    (tmp_path / "again.svg").write_bytes(as_committed("procedures-fig1.svg"))
    with pytest.raises(AssertionError, match="procedures-fig1.png is to be drawn again"):
        compare_with_committed("procedures-fig1", tmp_path / "again")


def test_every_committed_picture_belongs_to_committed_records():
    known = {f"{tier}-{name}" for name, tier in with_records()}
    known |= {f"procedures-fig{number}" for number in EXPLAINING}
    pictures = {path.stem for path in (ROOT / "figures").glob("*.*g")}
    assert pictures == known, f"no records for {pictures - known}, no pictures for {known - pictures}"


# --- CounterFact's measures


def test_case_points_are_means_over_seeds_and_the_harmonic_mean_of_each():
    found = case_points([case_record(seed=0, ES=0.4), case_record(seed=1, ES=0.8), case_record(m=64)])
    assert [(p["num_facts"], p["seeds"]) for p in found] == [(16, 2), (64, 1)]
    assert found[0]["ES"] == pytest.approx((0.6, 0.6 - 0.08**0.5, 0.6 + 0.08**0.5))
    each = [3 / (1 / es + 2 + 2) for es in (0.4, 0.8)]
    assert found[0]["S"][0] == pytest.approx(sum(each) / 2)
    assert found[1]["S"] == pytest.approx((0.5, 0.5, 0.5)) and found[1]["NS before"][0] == 0.9


def test_case_table_begins_with_the_unedited_model():
    table = case_table([case_record("MALMEN", ES=1.0), case_record("MEMIT", m=64, GE=5.25)])
    rows = rows_of(table)
    assert rows[0][:5] == ["counterfact", "–", "no edit", "14.2", "10.0"]  # S: 3 / (1 / .1 + 1 / .1 + 1 / .9)
    assert [row[1:3] for row in rows[1:]] == [["16", "MALMEN"], ["64", "MEMIT"]]
    assert rows[1][4] == "100.0" and rows[2][7] == "5.25" and "over seeds" not in table
    several = case_table([case_record(seed=seed, ES=0.4 + 0.2 * seed) for seed in (0, 1)])
    assert rows_of(several)[1][4] == "50.0 ± 14.1" and "over seeds" in several


def test_a_model_that_writes_nothing_has_no_entropy():
    bare = case_record()
    for block in bare["extra"]["counterfact"]:
        block["measures"] = {k: v for k, v in block["measures"].items() if not k.startswith(("GE", "RS"))}
    assert rows_of(case_table([bare]))[1][7:9] == ["–", "–"]


def test_case_panels_show_the_level_before_the_edit(tmp_path):
    figure = draw_cases([case_record(m=m, NS=0.7) for m in (16, 64)], tmp_path / "cases")
    titles = {ax.get_title(): ax for ax in figure.axes}
    assert list(titles) == ["S", "ES", "PS", "NS", "GE"]
    lines = {line.get_label(): list(line.get_ydata()) for line in titles["NS"].lines}
    assert lines == {"MEMIT": [0.7, 0.7], "before editing": [0.9, 0.9]}
    assert len(titles["ES"].lines) == 1 and titles["GE"].get_ylim()[1] > 2
    assert {name: titles[name].get_ylabel() for name in ("S", "GE")} == {"S": "per cent", "GE": "bits"}
    assert figure.get_suptitle().endswith("\nmeans over cases, 1 seed")
    several = draw_cases([case_record(seed=seed) for seed in (0, 1)])
    assert several.get_suptitle().endswith("over 2 seeds")


def mixture(sets, method="MEMIT", ms=(4, 16), **means):
    about = {"experiment": "mixed_relations", **means}
    return [case_record(method, m, data_set=name, **about, ES=0.2 + 0.2 * k) for k, name in enumerate(sets) for m in ms]


def test_mixtures_stand_beside_the_mean_of_their_relations(tmp_path):
    figure = draw_mixtures([*mixture(MIXED), *mixture(MIXED, "MALMEN")], tmp_path / "mixed")
    assert [ax.get_title() for ax in figure.axes] == ["MALMEN", "MEMIT"]  # beside one another
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].lines}
    s = [3 / (1 / es + 2 + 2) for es in (0.2, 0.4, 0.6)]
    assert list(lines) == ["first relation", "second relation", "mean of the two", "both relations"]
    assert [value[0] for value in lines.values()] == pytest.approx([s[0], s[1], (s[0] + s[1]) / 2, s[2]])
    assert (tmp_path / "mixed.svg").stat().st_size > 0
    ax = figure.axes[0]
    assert ax.get_ylabel() == "S, per cent" and [ax.yaxis.get_major_formatter()(y) for y in (0.2, 1)] == ["20", "100"]


def test_each_scenario_has_a_column_and_what_is_not_there_yet_is_left_out():
    made = [one for name in ("(a) ", "(d) ") for one in mixture(MIXTURES[name])]
    figure = draw_mixtures([*made, *mixture(["P27"], "MALMEN")])
    assert [ax.get_title() for ax in figure.axes] == ["(a) MALMEN", "(d) MALMEN", "(a) MEMIT", "(d) MEMIT"]
    assert all(list(line.get_xdata()) == [] for line in figure.axes[0].lines[1:])
    assert "P27 and P937" in {text.get_text() for text in figure.axes[3].get_legend().get_texts()}
