"""The paper tier and the paper's shapes, whole: every planned method on toys of the four models, by the real path."""

import json
import lzma
from dataclasses import replace
from functools import partial

import pytest
import torch

from malmen_repro import cli
from malmen_repro.editors import EditorConfig
from malmen_repro.facts import LABELS, FactFileError, load_facts
from malmen_repro.methods.fine_tuning import FineTuningConfig
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.replication import benches, commands, paper_models, runner, stand_ins
from malmen_repro.replication.benches import TUNED, bench_loader, corpus_texts, paper_bench, paper_facts, with_subjects
from malmen_repro.replication.paper_models import PAPER_MODELS
from malmen_repro.replication.plans import EXPERIMENTS, METHODS, EvaluationConfig, ExperimentError, cells_of
from malmen_repro.replication.runner import LeftOutWarning, run_cells
from malmen_repro.replication.tier_settings import READY, missing_for
from malmen_repro.training import TrainingConfig

TOYS = {  # as deep as their critical blocks ask for
    "BERT-base": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "GPT-2": {"n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 128},
    "T5-XL": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2},
    "GPT-J": {"n_embd": 16, "n_layer": 10, "n_head": 2, "n_positions": 128, "rotary_dim": 4},
}
TARGET = TargetConfig(steps=2, prefix_lengths=(2,), kl_factor=0.0)
PAPER = [name for name, experiment in EXPERIMENTS.items() if "paper" in experiment.plans]
SHAPES = [name for name, experiment in EXPERIMENTS.items() if "shapes" in experiment.plans]


def toy_settings(tier, method, num_facts):
    "As `training_settings`, but small."
    about = METHODS[method]
    if about.ready == "FT":
        return FineTuningConfig(epochs=1, learning_rate=1e-3), None
    if about.ready:
        return MEMITConfig(regularization=100.0, target=TARGET), None
    editor = EditorConfig(**({"rank": 4, "blocks": 1, "learning_rate": 0.01} | about.changes))
    return editor, TrainingConfig(num_facts=num_facts, **about.training, steps=1 if about.trained else 0)


def name_of(i):
    return f"Ada {'bcdfghjklm'[i % 10]}{'aeiou'[i // 10]}"


def zsre_row(i):
    "As MALMEN has it: no subject."
    question, name = ("Where was {} born?", "Who wrote {}?")[i % 2], name_of(i)
    rephrase, loc = f"Tell about {name}", f"nq question: who is number {i}"
    return {"src": question.format(name), "rephrase": rephrase, "ans": f"Town {i % 3}", "loc": loc, "loc_ans": "Bob"}


def named_row(i):
    return {"question": zsre_row(i)["src"], "subject": name_of(i), "answers": ["any"]}


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_corpus(path, count=200):
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"Passage {i} of {name_of(i % 50)} says {i * i % 97} to town {i * 7 % 89}.\n" for i in range(count))
    path.write_bytes(lzma.compress(text.encode()))


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A folder as data_scripts/fetch.py fills it, with 20 facts to train on and 12 to edit, and toys on the hub."
    for split, start, count in (("train", 0, 20), ("eval", 20, 12)):
        write_rows(tmp_path / "zsre" / f"{split}.jsonl", map(zsre_row, range(start, start + count)))
        claims = [{"prompt": f"Claim {i} is right.", "equiv_prompt": [f"Right is claim {i}."], "alt": LABELS[i % 2],
                   "unrel_prompt": f"Else {i}.", "unrel_ans": LABELS[0]} for i in range(start, start + count)]
        write_rows(tmp_path / "fever" / f"{split}.jsonl", claims)
    write_rows(tmp_path / "zsre_subjects" / "kilt.jsonl", map(named_row, range(20, 32)))
    write_corpus(tmp_path / "corpus" / "wikitext.txt.xz")
    monkeypatch.setattr(benches, "MOST", 8)
    for name in ("zsre", "fever"):
        monkeypatch.setitem(benches.TRAIN_FACTS, name, 20)
    monkeypatch.setattr(benches, "check_model", lambda name: None)
    monkeypatch.setattr(benches, "paper_model", lambda name, source: toy(name))
    return tmp_path


def toy(name, *_, **options):
    options = {"vocab_size": 300, "dtype": torch.float32, **TOYS[name], **options}
    return paper_models.random_model(name, "cpu", **options)


def run(cells, out, bench_for):
    options = {"settings": toy_settings, "evaluation": EvaluationConfig(2, 8), "progress": False}
    return run_cells(cells, out, bench_for, **options)


def methods_of(records):
    return [record["configuration"]["cell"]["method"] for record in records]


# --- whole


@pytest.mark.parametrize("name", PAPER)
def test_every_planned_method_of_the_paper_tier_runs(name, published, tmp_path):
    cells = cells_of(name, "paper", seeds=1, num_facts=[2])
    records = run(cells, tmp_path / "out", bench_loader(published, tmp_path / "cache", progress=False))
    assert methods_of(records) == list(EXPERIMENTS[name].plans["paper"].methods)
    assert all(record["scores"] or METHODS[m].may_fail for record, m in zip(records, methods_of(records), strict=True))
    if name in ("scaling_decoder", "scaling_gptj"):
        assert methods_of(records)[-1] == "MEMIT" and records[-1]["scores"]["ES"]["facts"] == 2


@pytest.fixture
def shapes(monkeypatch):
    "The shapes tier with toys for shapes."
    world = stand_ins.invent_world(0, people=12, towns=4)
    monkeypatch.setattr(benches, "invent_world", lambda seed: world)
    monkeypatch.setattr(benches, "random_model", lambda name, device, seed, texts: toy(name, seed=seed, texts=texts))


@pytest.mark.parametrize("name", SHAPES)
def test_every_planned_method_of_the_shapes_runs_prints_and_draws(name, shapes, tmp_path, monkeypatch, capsys):
    small = partial(run_cells, settings=toy_settings, evaluation=EvaluationConfig(2, 8))
    monkeypatch.setattr(runner, "run_cells", small)
    plan = EXPERIMENTS[name].plans["shapes"]
    assert cli.main(["reproduce", name, *f"--random-weights --ms 3 --quiet --out {tmp_path}".split()]) == 0
    made = sorted(path.name for path in (tmp_path / "shapes" / name).glob("*.json"))
    assert len(made) == len(plan.methods) * plan.seeds and set(plan.num_facts) == {"world"}
    assert f"{name}, shapes tier: {len(made)} cells" in capsys.readouterr().out


@pytest.mark.parametrize("item", ["fig4", "fig5", "fig6", "fig7", "fig8", "table1", "table2", "table4", "table5"])
def test_every_item_of_the_paper_tier_has_shapes(item):
    for name in commands.experiments_called(item):
        paper, shapes = (EXPERIMENTS[name].plans[tier] for tier in ("paper", "shapes"))
        assert set(paper.methods) - {"MALMEN untrained"} == set(shapes.methods)
        assert max(m for ms in shapes.num_facts.values() for m in ms) <= 64


def test_table_2_is_at_the_papers_m():
    assert {cell.num_facts for cell in cells_of("ablations_gptj", "paper")} == {8192}
    assert {cell.num_facts for cell in cells_of("ablations_decoder", "paper")} == {512}


# --- what MEMIT needs


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("corpus", "there is no corpus"),
        ("zsre_subjects", "12 of 12 facts name no subject"),
        ("both", "12 of 12 facts name no subject and there is no corpus"),
    ],
)
def test_what_cannot_run_is_named_first_and_left_out(published, tmp_path, lacking, reason, monkeypatch):
    for name in ("corpus", "zsre_subjects"):
        if lacking in (name, "both"):
            (published / name).rename(published / f"no-{name}")
    cells, out = cells_of("scaling_decoder", "paper", seeds=1, num_facts=[2, 3]), tmp_path / "out"
    bench_for = bench_loader(published, tmp_path / "cache", progress=False)
    order, run_cell = [], runner.run_cell
    monkeypatch.setattr(runner, "run_cell", lambda *args: order.append("work") or run_cell(*args))
    monkeypatch.setattr(runner.warnings, "warn", lambda text, *args, **options: order.append(text))
    records = run(cells, out, bench_for)
    said = f"scaling_decoder: MEMIT is left out, as {reason}; see data_scripts/README.md. The other methods go on"
    assert order == [said, *["work"] * 8]
    assert set(methods_of(records)) == {cell.method for cell in cells} - {"MEMIT"}
    order.clear()
    assert len(run(cells, out, bench_for)) == 8 and order == [said]  # again, and no cell is run twice
    for name in ("corpus", "zsre_subjects"):
        if lacking in (name, "both"):
            (published / f"no-{name}").rename(published / name)
    if lacking == "corpus":  # what is edited stays the same, so that the run goes on
        assert len(run(cells, out, bench_loader(published, tmp_path / "cache", progress=False))) == 10
        assert order == [said, "work", "work"]


def test_a_run_of_nothing_but_what_is_left_out_is_an_error(published, tmp_path):
    (published / "corpus" / "wikitext.txt.xz").unlink()
    cells = [cell for cell in cells_of("scaling_decoder", "paper", 1, [2]) if cell.method == "MEMIT"]
    with pytest.warns(LeftOutWarning), pytest.raises(ExperimentError, match="no cell can be run: .* no corpus"):
        run(cells, tmp_path / "out", bench_loader(published, tmp_path / "cache", progress=False))
    assert not list(tmp_path.glob("out/**/*.json"))


def test_methods_without_subjects_lack_nothing(published):
    bench = replace(paper_bench(published), corpus=[])
    facts = [replace(fact, subject=None) for fact in bench.eval_facts["zsre"]]
    needing = {method for method in READY if missing_for(method, bench, facts)}
    assert needing == {"MEMIT", "ROME", "CoachHooK"}
    assert missing_for("MEMIT", paper_bench(published), bench.eval_facts["zsre"]) == ""


def test_subjects_are_looked_up_by_question(published):
    facts = load_facts(published / "zsre" / "eval.jsonl")
    assert [fact.subject for fact in with_subjects(facts, published)] == [name_of(i) for i in range(20, 32)]
    own = replace(facts[0], subject="ada")  # a row's own subject counts, in any case of letters
    assert [fact.subject for fact in with_subjects([own], published)] == ["ada"]
    assert with_subjects([replace(facts[0], subject="Eve")], published) == []  # it is not in the question
    write_rows(published / "zsre_subjects" / "rome.jsonl", [named_row(40) | {"question": "Who is Ada bu?"}])
    assert len(with_subjects([*facts, replace(facts[0], prompt="Who is Ada bu?")], published)) == 13
    assert with_subjects(facts, published / "nowhere") == []


def test_all_decoders_edit_facts_with_subjects_if_there_are_enough(published, monkeypatch):
    write_rows(published / "zsre_subjects" / "kilt.jsonl", map(named_row, range(20, 29)))
    for family, count in (("decoder", 9), ("gptj", 9), ("encoder-decoder", 12)):
        _, facts, sources = paper_facts(published, family)
        assert len(facts["eval"]) == count and len(facts["train"]) == 20
        assert sources["eval"].get("with subject") == (9 if count == 9 else None)
    monkeypatch.setattr(benches, "MOST", 10)
    _, facts, sources = paper_facts(published)
    assert len(facts["eval"]) == 12 and sources["eval"] == {"file": "eval.jsonl", "facts": 12, "with subject": 9}
    assert PAPER_MODELS["GPT-J"].num_facts[-1] == 16_384


def test_a_prompt_with_two_answers_is_left_out(published):
    rows = [zsre_row(i) for i in range(20, 32)]
    write_rows(published / "zsre" / "eval.jsonl", [*rows, rows[0] | {"ans": "elsewhere"}, rows[1]])
    _, facts, sources = paper_facts(published)
    assert len(facts["eval"]) == 12 and sources["eval"]["left out for two answers"] == 2


def test_the_corpus_is_every_line_of_every_text(published, tmp_path):
    (tmp_path / "corpus" / "own.txt").write_text("one\n\n two \n")
    texts = corpus_texts(tmp_path)
    assert texts[:2] == ["one", "two"] and len(texts) == 202 and corpus_texts(tmp_path / "nowhere") == []
    assert paper_bench(published).corpus == texts and paper_bench(published).provenance["corpus"] == 202
    assert paper_bench(published, "encoder-decoder").corpus == []
    (tmp_path / "corpus" / "bad.txt.xz").write_bytes(b"no xz")
    with pytest.raises(FactFileError, match="fetch.py corpus --to"):
        corpus_texts(tmp_path)


def test_the_classifier_of_the_paper_tier_is_the_tuned_one(published, monkeypatch):
    asked = []
    monkeypatch.setattr(benches, "paper_model", lambda *args: asked.append(args) or toy(args[0]))
    paper_bench(published, "classifier")
    assert asked == [("BERT-base", str(published / TUNED))]
