"""Benches: families and tiers, models and data from outside, and which bench is built when."""

import json

import pytest
import torch

from malmen_repro.facts import LABELS, Fact
from malmen_repro.language_models import FAMILIES, ModelNotFoundError
from malmen_repro.replication import benches, paper_models, small_training, stand_ins
from malmen_repro.replication.benches import (
    PAPER_FAMILIES,
    TIERS,
    TUNED,
    BenchError,
    MissingDataError,
    UnknownTierError,
    bench_loader,
    check_tier,
    how_to_get,
    only_file,
    paper_bench,
    paper_facts,
    shapes_bench,
)
from malmen_repro.replication.paper_models import PAPER_MODELS
from malmen_repro.replication.records import weights_hash
from malmen_repro.replication.stand_ins import Bench
from tests.toy import toy_classifier, toy_encoder_decoder, toy_facts, toy_model

TOYS = {"decoder": toy_model, "classifier": toy_classifier, "encoder-decoder": toy_encoder_decoder}


def toy_bench(seed=0):
    return Bench(toy_model(seed=seed), toy_facts(12), {"toys": toy_facts(10, seed=1, start=20)}, {"made": "here"})


# --- families


@pytest.mark.parametrize("name", PAPER_FAMILIES)
def test_a_family_names_a_model_of_the_paper(name):
    family = PAPER_FAMILIES[name]
    about = PAPER_MODELS[family.paper_model]
    assert about.model_type == family.architecture.split("-")[0] and about.family in FAMILIES
    assert (family.task == "fact verification") == (about.family == "encoder-classifier") == (name == "classifier")


def test_families_and_models_of_the_paper_are_the_same_four():
    further = ("subjects", "questions", "base")  # stand-ins for GPT-2 once more
    ours = {name: family.paper_model for name, family in PAPER_FAMILIES.items() if name not in further}
    assert set(ours.values()) == set(PAPER_MODELS) and len(ours) == 4
    assert {PAPER_FAMILIES[name].paper_model for name in further} == {"GPT-2"}


# --- files


def test_only_file(tmp_path):
    with pytest.raises(MissingDataError, match=rf"has no file \*train\*.*fetch.py {tmp_path.name} --to"):
        only_file(tmp_path, "*train*")
    (tmp_path / "a_train.json").write_text("")
    assert only_file(tmp_path, "*train*") == tmp_path / "a_train.json"
    (tmp_path / "b_train.json").write_text("")
    with pytest.raises(MissingDataError, match=r"has 2 files \*train\*.*data_scripts/README.md"):
        only_file(tmp_path, "*train*")


# --- what a tier needs


@pytest.mark.parametrize("family", PAPER_FAMILIES)
@pytest.mark.parametrize("tier", ["tiny", "shapes"])
def test_tiers_that_need_nothing(tier, family):
    assert check_tier(tier, None, family) is None


@pytest.mark.parametrize("family", PAPER_FAMILIES)
@pytest.mark.parametrize("tier", ["small", "paper"])
def test_tiers_without_data_fail_at_once(tier, family, tmp_path):
    with pytest.raises(MissingDataError, match=f"the {tier} tier needs real facts.*MALMEN_DATA.*--tier tiny"):
        check_tier(tier, None, family)
    folder = "fever" if family == "classifier" else "zsre"
    lacks, no_folder = "lacks .*;.*--tier tiny", f"no folder {folder}; `.*fetch.py {folder} --to .*--tier tiny"
    said = lacks if tier == "small" else no_folder
    for ask in (lambda: check_tier(tier, str(tmp_path), family), lambda: bench_loader(tmp_path, "c")(tier, family, 0)):
        with pytest.raises(MissingDataError, match=said):
            ask()
    (tmp_path / folder).write_text("not a folder")
    with pytest.raises(MissingDataError, match=said):
        check_tier(tier, tmp_path, family)


def small_files(folder, family):
    for file in benches.SMALL_FILES.get(family, benches.QUESTION_FILES + benches.CORPUS_FILES):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")


@pytest.mark.parametrize("family", PAPER_FAMILIES)
def test_the_small_tier_needs_data_only(family, tmp_path):
    small_files(tmp_path, family)
    assert check_tier("small", tmp_path, family) is None


@pytest.mark.parametrize(
    ("family", "lost", "way"),
    [
        (
            *("decoder", "entity_questions/train.jsonl.xz"),
            "`python data_scripts/fetch.py entity_questions --to {}` brings entity_questions",
        ),
        ("base", "zsre/mend_train_1000.jsonl.xz", "zsre: by hand, see data_scripts/README.md"),
        ("encoder-decoder", "zsre/mend_eval_1037.jsonl.xz", "zsre: by hand, see data_scripts/README.md"),
        ("gptj", "corpus/trex_sentences.txt.xz", "corpus: by hand, see data_scripts/README.md"),
        ("subjects", "counterfact/train.jsonl.xz", "counterfact: by hand, see data_scripts/README.md"),
        ("questions", "nq/dev.jsonl.xz", "`python data_scripts/fetch.py nq --to {}` brings nq"),
        ("classifier", "pararel/facts.jsonl.xz", "`python data_scripts/fetch.py pararel --to {}` brings pararel"),
    ],
)
def test_a_missing_file_of_the_small_tier_is_named_with_what_brings_it(family, lost, way, tmp_path):
    small_files(tmp_path, family)
    (tmp_path / lost).unlink()
    with pytest.raises(MissingDataError) as caught:
        check_tier("small", tmp_path, family)
    assert f"{tmp_path} lacks {lost}; {way.format(tmp_path)}; without them" in str(caught.value)


def test_how_to_get_data():
    assert how_to_get(["nq"]) == "`python data_scripts/fetch.py nq --to DIR` brings nq"
    assert how_to_get(["zsre", "nq"], "d") == "`python data_scripts/fetch.py zsre nq --to d` brings zsre and nq"
    by_hand = "zsre and corpus: by hand, see data_scripts/README.md"
    assert how_to_get(["zsre", "nq", "corpus"], tier="small") == f"{how_to_get(['nq'])}; {by_hand}"


def test_unknown_tiers_and_families():
    with pytest.raises(UnknownTierError, match=f"no tier 'huge'; there are: {', '.join(TIERS)}"):
        check_tier("huge", None)
    for tier in TIERS:
        with pytest.raises(UnknownTierError, match=f"no family 'rnn'; there are: {', '.join(PAPER_FAMILIES)}"):
            check_tier(tier, None, "rnn")
    with pytest.raises(UnknownTierError, match="no tier 'huge'"):
        bench_loader(None, "c")("huge", "decoder", 0)
    assert issubclass(UnknownTierError, BenchError) and issubclass(MissingDataError, BenchError)


def zsre_row(i):
    return {"src": f"w{i}", "rephrase": f"w{i} w1", "answers": ["w2"], "alt": "w3", "loc": "w4", "loc_ans": "w5"}


def fever_row(i, label="SUPPORTS"):
    return {"claim": f"w{i} w{i % 7}", "label": label}


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def zsre(tmp_path):
    for split, start in (("train", 0), ("eval", 20)):
        write_rows(tmp_path / "zsre" / f"{split}.jsonl", [zsre_row(i) for i in range(start, start + 5)])
    return tmp_path


@pytest.fixture
def fever(tmp_path, monkeypatch):
    "Five claims to train on, four to edit, and seven unrelated ones."
    monkeypatch.setitem(benches.TRAIN_FACTS, "fever", 5)
    for split, start in (("train", 0), ("eval", 20)):
        rows = [fever_row(i, LABELS[i % 2]) for i in range(start, start + (5 if split == "train" else 4))]
        write_rows(tmp_path / "fever" / f"{split}.jsonl", rows)
    write_rows(tmp_path / "fever2" / "dev.jsonl", [fever_row(i, LABELS[i % 2]) for i in range(40, 47)])
    return tmp_path


def test_paper_tier_without_the_hub_says_what_can_be_run(tmp_path):
    (tmp_path / "zsre").mkdir()
    with pytest.raises(MissingDataError, match=r"has no file \*train\*"):
        check_tier("paper", tmp_path)
    for split in ("train", "eval"):
        write_rows(tmp_path / "zsre" / f"x_{split}.jsonl", [zsre_row(1)])
    for family in ("decoder", "encoder-decoder", "gptj"):
        with pytest.raises(ModelNotFoundError, match="the tiny tier needs neither.*--tier small") as caught:
            check_tier("paper", tmp_path, family)
        assert PAPER_MODELS[PAPER_FAMILIES[family].paper_model].hub in str(caught.value)
    (tmp_path / "zsre" / "y_train.jsonl").write_text("")
    with pytest.raises(MissingDataError, match="2 files"):
        check_tier("paper", tmp_path)


def test_the_papers_classifier_is_asked_for_in_the_data_folder(fever, monkeypatch):
    asked = []
    monkeypatch.setattr(benches, "check_model", asked.append)
    check_tier("paper", fever, "classifier")
    assert asked == [str(fever / TUNED)]


# --- facts of the paper tier


@pytest.mark.parametrize("family", ["decoder", "encoder-decoder", "gptj"])
def test_paper_facts_of_zsre(zsre, monkeypatch, family):
    monkeypatch.setitem(benches.TRAIN_FACTS, "zsre", 5)
    name, facts, sources = paper_facts(zsre, family)
    assert name == "zsre" and [len(facts[split]) for split in ("train", "eval")] == [5, 5]
    named = {} if family == "encoder-decoder" else {"with subject": 0}
    assert sources["train"] == {"file": "train.jsonl", "facts": 5}
    assert sources["eval"] == {"file": "eval.jsonl", "facts": 5, **named}
    assert facts["train"][0].answer == "w2"  # the correct one, section 5.1
    assert facts["eval"][0].unrelated_pair == ("w4", "w5")


def test_paper_tier_takes_no_smaller_data_for_the_published(zsre, monkeypatch):
    said = "holds 5 facts.*published split of 244,173: `.*fetch.py zsre .*--tier small"
    with pytest.raises(MissingDataError, match=said):
        paper_facts(zsre)
    monkeypatch.setitem(benches.TRAIN_FACTS, "zsre", 6)
    with pytest.raises(MissingDataError):
        paper_facts(zsre)
    monkeypatch.setitem(benches.TRAIN_FACTS, "zsre", 5)  # nine tenths of it are enough: rows may have been dropped
    assert paper_facts(zsre)


def test_paper_facts_of_fever_are_flipped_and_paired(fever):
    name, facts, sources = paper_facts(fever, "classifier")
    assert name == "fever" and sources["eval"] == {"file": "eval.jsonl", "facts": 4}
    for split, start, count in (("train", 0, 5), ("eval", 20, 4)):
        assert [fact.answer for fact in facts[split]] == [LABELS[1 - i % 2] for i in range(start, start + count)]
        assert all(fact.alternative in LABELS and fact.alternative != fact.answer for fact in facts[split])
    dealt = {split: {fact.unrelated_prompt for fact in facts[split]} for split in facts}
    assert not dealt["train"] & dealt["eval"] and len(dealt["train"]) == 3 and len(dealt["eval"]) == 4
    assert facts == paper_facts(fever, "classifier")[1]


def test_paper_facts_of_fever_need_fever2(fever):
    (fever / "fever2" / "dev.jsonl").unlink()
    with pytest.raises(MissingDataError, match="fever2 has no file"):
        paper_facts(fever, "classifier")


# --- the paper's bench


def test_paper_bench(zsre, monkeypatch):
    asked = []
    monkeypatch.setitem(benches.TRAIN_FACTS, "zsre", 5)
    monkeypatch.setattr(benches, "check_model", lambda name: None)
    monkeypatch.setattr(benches, "paper_model", lambda *args: asked.append(args) or toy_model())
    bench_for = bench_loader(zsre, zsre)
    bench = bench_for("paper", "decoder", 0)
    assert bench is bench_for("paper", "decoder", 2) and asked == [("GPT-2", None)]
    assert len(bench.eval_facts["zsre"]) == 5 and bench.provenance["facts"]["train"]["facts"] == 5
    assert bench.provenance["language_model"] == "openai-community/gpt2" and json.dumps(bench.provenance)


def test_paper_bench_of_the_classifier(fever, monkeypatch):
    asked = []
    monkeypatch.setattr(benches, "check_model", lambda name: None)
    monkeypatch.setattr(benches, "paper_model", lambda *args: asked.append(args) or toy_classifier())
    bench = paper_bench(fever, "classifier")
    assert asked == [("BERT-base", str(fever / TUNED))] and list(bench.eval_facts) == ["fever"]
    assert len(bench.train_facts) == 5 and all(fact.unrelated_pair for fact in bench.train_facts)


def test_paper_bench_checks_before_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "load_facts", lambda path: pytest.fail("nothing was to be read"))
    with pytest.raises(MissingDataError, match="no folder zsre"):
        paper_bench(tmp_path)


# --- the paper's shapes


def world(seed):
    def facts(kind, count):
        return [Fact(f"{kind} {i} of [X]?", f"a{i % 3} {seed}", (f"whose {kind} {i}?",), subject="x", relation="r")
                for i in range(count)]

    return facts("person", 8), facts("town", 6)


@pytest.mark.parametrize("family", ["decoder", "encoder-decoder", "gptj"])
def test_shapes_bench(monkeypatch, family):
    asked = []

    def random_model(name, device, seed, texts):
        asked.append((name, device, seed, len(texts)))
        return toy_model()

    monkeypatch.setattr(benches, "random_model", random_model)
    monkeypatch.setattr(benches, "invent_world", world)
    bench = shapes_bench(family, 3)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert asked == [(PAPER_FAMILIES[family].paper_model, where, 3, 3 * (8 + 6))]
    assert list(bench.eval_facts) == ["world"] and len(bench.train_facts) == len(bench.eval_facts["world"]) == 4
    prompts = [fact.prompt for fact in bench.train_facts + bench.eval_facts["world"]]
    assert len(set(prompts)) == 8
    assert all(fact.unrelated_prompt.startswith("town") for fact in bench.train_facts)
    assert "random weights" in bench.provenance["language_model"] and bench.provenance["seed"] == 3


def test_shapes_bench_of_the_classifier(monkeypatch):
    monkeypatch.setattr(benches, "random_model", lambda *args, **named: toy_classifier())
    small = stand_ins.invent_world(0, people=12, towns=4)
    monkeypatch.setattr(benches, "invent_world", lambda seed: small)
    bench = shapes_bench("classifier")
    for fact in bench.train_facts + bench.eval_facts["world"]:
        assert {fact.answer, fact.alternative} == set(LABELS) and fact.unrelated_answer in LABELS
    bench.lm.encode([fact.pair for fact in bench.train_facts])


def test_shapes_bench_is_what_the_random_model_gives(monkeypatch):
    "The real call, with the sizes of a toy."
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}
    monkeypatch.setattr(benches, "random_model", lambda *args, **named: paper_models.random_model(
        *args, **named, **small))
    worlds = stand_ins.invent_world(0, people=12, towns=4)
    monkeypatch.setattr(benches, "invent_world", lambda seed: worlds)
    one, two, other = shapes_bench("decoder"), shapes_bench("decoder"), shapes_bench("decoder", 1)
    assert weights_hash(one.lm) == weights_hash(two.lm) != weights_hash(other.lm)
    assert len(one.lm.layers) == 2 and one.train_facts == two.train_facts


# --- which bench is built when


@pytest.fixture
def built(monkeypatch, tmp_path):
    "What was built, in order; the data folder has zsre and fever."
    calls = []

    def tiny_bench(seed, cache_dir, progress, architecture):
        calls.append(("tiny", architecture, seed, cache_dir, progress))
        return toy_bench(seed=seed)

    def small_bench(data_dir, cache_dir, seed, progress, architecture):
        calls.append(("small", architecture, seed, cache_dir, progress))
        return toy_bench()

    monkeypatch.setattr(stand_ins, "tiny_bench", tiny_bench)
    monkeypatch.setattr(small_training, "small_bench", small_bench)
    monkeypatch.setattr(benches, "shapes_bench", lambda family: calls.append(("shapes", family)) or toy_bench())
    monkeypatch.setattr(
        benches, "paper_bench", lambda data_dir, family: calls.append(("paper", family)) or toy_bench()
    )
    monkeypatch.setattr(benches, "check_model", lambda name: None)
    for name in ("zsre", "fever"):
        for split in ("train", "eval"):
            write_rows(tmp_path / name / f"{split}.json", [])
    for family in PAPER_FAMILIES:
        small_files(tmp_path, family)
    for name in ("zsre", "fever"):  # the paper tier wants one file a split
        for path in (tmp_path / name).glob("*.json"):
            path.unlink()
    return calls


def test_bench_loader_remembers_the_last_bench(built, tmp_path):
    bench_for = bench_loader(None, tmp_path / "cache", progress=False)
    assert bench_for("tiny", "decoder", 0) is bench_for("tiny", "decoder", 0) is not bench_for("tiny", "decoder", 1)
    bench_for("tiny", "decoder", 0)  # the last one only
    assert [call[2] for call in built] == [0, 1, 0]
    assert built[0] == ("tiny", "gpt2", 0, tmp_path / "cache", False)


def test_another_family_is_another_bench(built, tmp_path):
    bench_for = bench_loader(tmp_path, str(tmp_path / "cache"))
    for tier in TIERS:
        made = [bench_for(tier, family, 0) for family in PAPER_FAMILIES]
        assert len({id(bench) for bench in made}) == len(PAPER_FAMILIES)
    wanted = [
        (tier, about.architecture if tier in ("tiny", "small") else family)
        for tier in TIERS
        for family, about in PAPER_FAMILIES.items()
    ]
    assert [call[:2] for call in built] == wanted
    assert all(call[3:] == (tmp_path / "cache", True) for call in built if call[0] in ("tiny", "small"))


@pytest.mark.parametrize("tier", ["small", "paper", "shapes"])
def test_tiers_above_tiny_share_one_model_among_seeds(built, tmp_path, tier):
    bench_for = bench_loader(tmp_path, tmp_path, progress=False)
    assert bench_for(tier, "decoder", 0) is bench_for(tier, "decoder", 3) and len(built) == 1


def test_a_bench_that_cannot_be_built_is_not_remembered(built, tmp_path):
    (tmp_path / "empty").mkdir()
    bench_for = bench_loader(tmp_path / "empty", tmp_path)
    for _ in range(2):
        with pytest.raises(MissingDataError):
            bench_for("small", "decoder", 0)
    assert bench_for("tiny", "decoder", 0) and [call[0] for call in built] == ["tiny"]
