"""What notebooks 69 and 80 state in their text, from the committed records, and what these records come from."""

import json
import re
import shlex
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from malmen_repro import cli
from malmen_repro.replication import commands
from malmen_repro.replication.closeness import UNDECIDABLE
from malmen_repro.replication.costs import (
    COSTED_SCALING,
    MALMEN_FACT,
    MEMIT_FACT,
    TRAINED_PER_EDIT,
    counted_and_measured,
    edit_costs,
    edit_hours,
    machine,
    paper_items,
    paper_runs,
    peak_held,
    shape_records,
    spent,
    step_seconds,
    whole_set_hours,
)
from malmen_repro.replication.figures import mean_at
from malmen_repro.replication.paper_models import find_model, run_memory
from malmen_repro.replication.plans import EXPERIMENTS
from malmen_repro.replication.provenance import (
    ITEMS,
    absent,
    cell_records,
    compute_table,
    not_run,
    single_records,
    single_table,
    spent_hours,
    stand_in_seconds,
    unclean,
)
from malmen_repro.replication.records import committed_records, read_records
from malmen_repro.replication.verdicts import (
    PAPER_HOURS,
    STATEMENTS,
    choices_note,
    strongest,
    verdict,
    verdict_counts,
)
from tests.handmade import record

ROOT = Path(__file__).resolve().parents[2]
RECORDS, SINGLES = cache(cell_records), cache(single_records)


@cache
def committed(experiment, tier):
    return read_records(committed_records(), experiment, tier)


def source(name):
    "The prose of a page of results."
    cells = json.loads((ROOT / "nbs" / "results" / name).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


# --- notebook 69: seconds


@pytest.mark.parametrize("name", COSTED_SCALING)
def test_an_edit_takes_less_than_its_training(name):
    edits = [r for r in committed(name, "tiny") if r["configuration"]["cell"]["method"] == "MALMEN"]
    assert edits and all(r["seconds"]["editing"] < r["seconds"]["training"] for r in edits)


def test_malmen_pays_before_the_edit_and_the_others_at_the_edit():
    seconds = spent(committed("scaling_gptj", "tiny"))
    m = max(m for method, m in seconds if method == "MEMIT")
    assert seconds["MALMEN", m][0] > 50 * seconds["MALMEN", m][1]
    assert sum(seconds["MALMEN", m]) > sum(seconds["MEMIT", m]) and PAPER_HOURS["MALMEN"] < PAPER_HOURS["MEMIT"]
    for method in ("FT", "MEMIT"):
        assert all(seconds[method, m][0] < 6 for method, m in seconds if method in ("FT", "MEMIT"))
        assert seconds[method, m][1] > seconds["MALMEN", m][1]


def test_what_differs_between_the_papers_edit_and_ours():
    m, paper, ours = edit_costs(committed("scaling_gptj", "tiny"))
    assert m == 1024
    assert ours[TRAINED_PER_EDIT] > 4 * paper[TRAINED_PER_EDIT]
    dear = [costs[MEMIT_FACT] / costs[MALMEN_FACT] for costs in (paper, ours)]
    assert dear[0] > 4 * dear[1]


def test_a_search_one_by_one_and_the_papers_ratio_give_the_papers_order():
    rows = json.loads((committed_records() / "target_vectors" / "batches.json").read_text())["rows"]
    alone, together = (row["seconds"] for row in rows if row["tier"] == "tiny" and row["batch"] in (1, 64))
    assert 11 < alone / together < 12.5
    _, paper, ours = edit_costs(committed("scaling_gptj", "tiny"))
    assert (1 + paper[TRAINED_PER_EDIT]) * ours[MALMEN_FACT] < 1e3 * alone / 64


# --- notebook 69: the paper's shapes and sizes


def test_every_model_of_the_paper_has_records_of_its_shapes():
    found = shape_records()
    assert {record["model"]["type"] for record in found} == {"bert", "gpt2", "t5", "gptj"}
    for one in found:
        assert machine(one) and step_seconds(one) > 0
        assert peak_held(one, "editing") > 0 and whole_set_hours(one) > 0


def test_memory_is_what_was_counted_and_time_is_not():
    rows = list(counted_and_measured())
    memory = {(row["model"], row["m"]): row["measured GiB"] / row["counted GiB"] for row in rows}
    time = {(row["model"], row["m"]): row["measured s"] / row["counted s"] for row in rows}
    assert len(rows) == 8 and all(0.9 < ratio < 1.05 for ratio in memory.values())
    assert time["GPT-J", 1024] < 0.4 < 1 < time["T5-XL", 1024]
    assert abs(memory["GPT-J", 1024] - 1) < 0.01
    assert time["GPT-J", 1024] == pytest.approx(1 / 3, abs=0.04) and 1.7 < time["T5-XL", 1024] < 2


def test_the_papers_hours_are_more_than_the_counted_ones():
    assert all(1 < PAPER_HOURS[method] / hours < 5 for method, hours in edit_hours().items())
    assert edit_hours(10_000)["MEMIT"] < 7.44


def test_table_2_has_one_method_above_an_a100():
    sizes = {run: run_memory("GPT-J", run) / 2**30 for run in paper_runs("ablations_gptj")}
    (above,) = [run for run, size in sizes.items() if size > 80]
    assert (above.method, above.which, above.num_facts) == ("MALMEN", "all", 8192)


def test_every_item_of_the_paper_tier_is_counted():
    items = {item.name: item for item in paper_items()}
    assert items.keys() == {name for name, about in EXPERIMENTS.items() if "paper" in about.plans}
    assert "mend_setting" not in items  # Table 3
    for name, item in items.items():
        plan = EXPERIMENTS[name].plans["paper"]
        assert len(item.runs) == sum(map(len, plan.num_facts.values())) * len(plan.methods)
        assert find_model(item.model) and {run.seeds for run in item.runs} == {plan.full_seeds}


def test_the_commands_of_the_paper_tier_parse():
    (block,) = re.findall(r"```sh\n(.*?)```", source("69_time.ipynb"), re.S)
    lines = [line.partition("#")[0] for line in block.splitlines()]
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("malmen-repro ")]
    assert len(ours) == 4
    for words in ours:
        args = cli.parser().parse_args(words)
        assert all(commands.experiments_called(name) for name in getattr(args, "experiments", []))
    manifest = json.loads((ROOT / "data_scripts" / "manifest.json").read_text(encoding="utf-8"))
    fetched = [word for line in lines if "fetch.py" in line for word in line.split()[2:-2]]
    assert fetched and all(f'"{name}"' in json.dumps(manifest) for name in fetched)
    named = re.search(r"# or (.*)", block)[1].split(", ")
    assert all(commands.experiments_called(name) for name in " ".join(named).replace(" or ", " ").split())


# --- notebook 80: verdicts


def test_every_statement_has_a_verdict_at_every_tier():
    counts = {tier: Counter(verdict(one, tier)[1] for one in STATEMENTS) for tier in ("tiny", "small", "paper")}
    assert all(sum(found.values()) == len(STATEMENTS) for found in counts.values())
    assert counts["paper"]["not run"] == len(STATEMENTS)  # when paper-tier records come, this line goes


def test_mends_capacity_on_claims_starts_near_a_coins():
    levels = {}
    for tier, data_set in (("tiny", "claims"), ("small", "pararel")):
        point = mean_at(committed("scaling_classifier", tier), "MEND", 16, data_set)
        levels[tier] = f"{(point['ES'] + point['GS']) / 2:.2f}"
    assert levels == {"tiny": "0.44", "small": "0.58"}


def test_who_scales_best():
    "What the README computes: the order of the architectures, and the reason why the small tier decides little."
    asked = [one for one in STATEMENTS if one.test is strongest]
    found = {tier: {one.item: verdict(one, tier)[1] for one in asked} for tier in ("tiny", "small")}
    assert set(found["tiny"].values()) == {"reproduced, scaled down"} and len(found["tiny"]) == 4
    assert found["small"] == {"Fig. 4": "reproduced, scaled down"} | dict.fromkeys(
        ("Fig. 5", "Fig. 6", "Fig. 7"), UNDECIDABLE
    )
    gives_up = {one.item for one in asked if "gives up locality" in verdict(one, "tiny")[0]}
    assert gives_up == {"Fig. 4", "Fig. 5", "Fig. 6"}
    ours, ft = (mean_at(committed("scaling_decoder", "tiny"), method, 1024) for method in ("MALMEN", "FT"))
    assert ft["ES"] + ft["GS"] > ours["ES"] + ours["GS"] and ft["LS"] < 0.5 * ours["LS"]


def test_all_verdicts_are_counted_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for tier in ("tiny", "small"):
        said = ", ".join(f"{number} {kind}" for kind, number in verdict_counts(tier).items() if number)
        assert f"{tier.capitalize() if tier == 'tiny' else tier}: {said}" in text
    assert f"All {len(STATEMENTS)} statements" in text and choices_note() in text


def test_what_came_after_results_is_said_beside_the_numbers():
    "Under the tables of Figs. 4 to 7 in the report as well."
    cells = json.loads((ROOT / "nbs" / "results" / "80_report.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = ["".join(out.get("data", {}).get("text/markdown", "")) for cell in cells for out in cell.get("outputs", [])]
    assert any("Fig. 4" in text and text.endswith(choices_note()) for text in shown)


# --- notebook 80: sizes, seeds and settings in its text


def settings(name, tier, method="MALMEN"):
    "Of the first record: editor, training, edited layers, seeds, every m."
    found = [r for r in RECORDS()[name, tier, False] if r["configuration"]["cell"]["method"] == method]
    of, cells = found[0]["configuration"], [r["configuration"]["cell"] for r in found]
    seeds = len({cell["seed"] for cell in cells})
    layers, ms = list(found[0]["model"]["edited_layers"]), {cell["num_facts"] for cell in cells}
    return of["editor"], of["training"], layers, seeds, ms


@pytest.mark.parametrize(
    ("tier", "rank", "locality", "rates", "seeds", "layers"),
    [("tiny", 256, 1.5, (3e-3, 3e-2), 3, (1, 2, 2, 2)), ("small", 512, 1.0, (2e-3, 2e-2), 1, (1, 3, 4, 3))],
)
def test_settings_of_a_tier(tier, rank, locality, rates, seeds, layers):
    for family, edited in zip(("classifier", "decoder", "encoder_decoder", "gptj"), layers, strict=True):
        editor, training, names, repeats, _ = settings(f"scaling_{family}", tier)
        assert (editor["rank"], training["locality_coefficient"], len(names)) == (rank, locality, edited)
        assert (training["meta_learning_rate"], training["scalar_learning_rate"]) == rates
        assert repeats == (3 if family in ("classifier", "decoder") else seeds)


def test_other_settings():
    assert settings("cancellation", "small")[3] == 3 and settings("ablations_decoder", "small")[3] == 3
    ft = settings("scaling_decoder", "tiny", "FT")[0]
    assert (ft["learning_rate"], ft["epochs"]) == (2e-4, 20)
    for name, tier, m in (("classifier", "tiny", 64), ("encoder_decoder", "tiny", 64), ("gptj", "tiny", 64),
                          ("decoder", "tiny", 256), ("decoder", "small", 256)):  # fmt: skip
        assert settings(f"ablations_{name}", tier)[-1] == ({m, 1024} if name == "gptj" else {m})


def test_sizes_of_the_language_models():
    millions = {tier: {r["model"]["parameters"] / 1e6 for name in COSTED_SCALING for r in committed(name, tier)}
                for tier in ("tiny", "small")}  # fmt: skip
    assert max(millions["tiny"]) < 1
    assert (round(min(millions["small"])), round(max(millions["small"]))) == (3, 13)


# --- where the records come from


def test_every_record_is_counted_once():
    files = list(committed_records().rglob("*.json"))
    assert sum(map(len, RECORDS().values())) + len(SINGLES()) == len(files)
    assert {name for name, _, _ in RECORDS()} <= set(ITEMS)


def test_one_record_of_memit_stood_still():
    (slow,) = [
        record for record in RECORDS()["editors_zsre", "small", False]
        if (cell := record["configuration"]["cell"])["method"] == "MEMIT" and cell["num_facts"] == 64
    ]  # fmt: skip
    assert round(slow["seconds"]["editing"] / 60) == 42


def test_only_fig_9s_records_come_from_a_changed_tree():
    changed = [record for record in RECORDS()["memory", "shapes", False] if unclean(record)]
    assert len(changed) == 13 and all("H100" in record["hardware"]["accelerator"] for record in changed)
    assert {key for key, records in RECORDS().items() if any(map(unclean, records))} == {("memory", "shapes", False)}
    rows = [line.split("|") for line in single_table(SINGLES()).splitlines()[2:]]
    assert len(rows) == len(SINGLES()) and "changed" not in {row[-2].strip() for row in rows}


def test_hours_count_a_training_once():
    twice = [record(m=16, training=7200.0), record(m=64, training=7200.0)]
    for one, trained_at in zip(twice, (16, 16), strict=True):
        one["configuration"]["cell"]["train_num_facts"] = trained_at
    assert spent_hours(twice) == pytest.approx(2 + 0.4 / 3600)
    twice[1]["configuration"]["cell"]["train_num_facts"] = 64
    assert spent_hours(twice) == pytest.approx(4 + 0.4 / 3600)


def test_a_stand_in_is_counted_once():
    def made(model, **bench):
        return record() | {"fingerprints": {"language_model": model}, "bench": bench}

    places = {("a", "tiny", False): [made("x", seconds=5.0), made("x", seconds=5.0), made("y")]}
    places["b", "tiny", False] = [made("z", **{"training seconds": 2.0})]
    assert sorted(stand_in_seconds(places)) == [2.0, 5.0]


def test_every_place_has_a_row():
    places = RECORDS()
    assert len(compute_table(places).splitlines()) == 2 + len(places)


def test_what_is_absent():
    places = RECORDS()
    assert absent("scaling_decoder", "tiny", places) == ""
    assert absent("scaling_decoder", "tiny", {}) == "all of it"
    some = []
    for found in places["scaling_decoder", "tiny", False]:
        cell = found["configuration"]["cell"]
        if cell["seed"] < 2 and cell["num_facts"] != 64 and (cell["method"], cell["num_facts"]) != ("FT", 16):
            some.append(found)
    one = {("scaling_decoder", "tiny", False): some}
    assert absent("scaling_decoder", "tiny", one) == "seeds 2; world, m = 16: FT; world, m = 64: all"
    rows = list(not_run(places))
    assert all(len(row) == 4 for row in rows)
    assert ["scaling_base", EXPERIMENTS["scaling_base"].figure, "small", "all of it"] in rows
