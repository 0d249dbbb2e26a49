"""Appendix A.4: the classifier is fine-tuned before it is edited."""

import json
from dataclasses import replace

import pytest
import torch

from malmen_repro.facts import NoFactsError
from malmen_repro.language_models import ModelNotFoundError, UnknownLabelError
from malmen_repro.replication import benches
from malmen_repro.replication.benches import (
    TUNED,
    BenchError,
    MissingDataError,
    TuningConfig,
    check_tier,
    fine_tune_classifier,
    paper_bench,
    paper_facts,
    tune_classifier,
)
from malmen_repro.replication.paper_models import PAPER_MODELS, random_model
from malmen_repro.replication.stand_ins import invent_world, tell_claims
from malmen_repro.training import TrainingError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
FAST = TuningConfig(learning_rate=3e-3, epochs=3, batch_size=8)


def bert(seed=0):
    return random_model("BERT-base", dtype=torch.float32, vocab_size=400, seed=seed, **SMALL)


def claims_of(people=4, towns=4):
    return tuple(tell_claims(facts) for facts in invent_world(seed=0, people=people, towns=towns))


CLAIMS, OTHERS = claims_of()


def same_weights(one, two):
    ours, theirs = one.model.state_dict(), two.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- fine-tuning


def test_the_papers_values_are_the_defaults():
    assert (TuningConfig().learning_rate, TuningConfig().epochs) == (3e-5, 2)


def test_all_parameters_move_and_are_frozen_again():
    lm, start = bert(), bert()
    history = fine_tune_classifier(lm, CLAIMS, replace(FAST, epochs=2), progress=False)
    assert [record["epoch"] for record in history] == [1, 2] and history[1]["loss"] < history[0]["loss"]
    assert all(0 <= record["accuracy"] <= 1 for record in history)
    before = dict(start.model.named_parameters())
    still = [name for name, weight in lm.model.named_parameters() if torch.equal(weight, before[name])]
    assert not still and not lm.model.training
    assert not any(weight.requires_grad for weight in lm.model.parameters())


def test_the_seed_decides_and_the_generator_is_left_alone():
    state = torch.random.get_rng_state()
    models = [bert(), bert(), bert()]
    for lm, seed in zip(models, (0, 0, 1), strict=True):
        fine_tune_classifier(lm, CLAIMS, replace(FAST, epochs=1, seed=seed), progress=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same_weights(models[0], models[1]) and not same_weights(models[0], models[2])


def test_a_stopped_run_goes_on(tmp_path):
    whole, stopped, resumed = bert(), bert(), bert()
    fine_tune_classifier(whole, CLAIMS, FAST, progress=False)
    path = tmp_path / "new" / "checkpoint.pt"
    fine_tune_classifier(stopped, CLAIMS, replace(FAST, epochs=1), checkpoint=path, progress=False)
    history = fine_tune_classifier(resumed, CLAIMS, FAST, checkpoint=path, progress=False)
    assert [record["epoch"] for record in history] == [1, 2, 3] and same_weights(whole, resumed)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fine_tune_classifier(bert(), CLAIMS, replace(FAST, epochs=1), checkpoint=path, progress=False)
    with pytest.raises(TrainingError, match="another run: learning_rate, seed differ"):
        changed = replace(FAST, seed=1, learning_rate=1e-4)
        fine_tune_classifier(bert(), CLAIMS, changed, checkpoint=path, progress=False)
    with pytest.raises(TrainingError, match="another run: claims differ"):
        fine_tune_classifier(bert(), OTHERS, FAST, checkpoint=path, progress=False)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="damaged.*remove it"):
        fine_tune_classifier(bert(), CLAIMS, FAST, checkpoint=path, progress=False)


def test_what_cannot_be_learned():
    with pytest.raises(NoFactsError, match="no claims"):
        fine_tune_classifier(bert(), [], FAST)
    with pytest.raises(UnknownLabelError):
        fine_tune_classifier(bert(), [replace(CLAIMS[0], answer="MAYBE")], FAST)
    lm = bert()
    with pytest.raises(TrainingError, match="lower the rate"):
        fine_tune_classifier(lm, CLAIMS, replace(FAST, learning_rate=1e30), progress=False)
    assert not lm.model.training and not any(weight.requires_grad for weight in lm.model.parameters())


# --- the command, on files as data_scripts/fetch.py writes them


def write(path, facts, **more):
    path.parent.mkdir(exist_ok=True)
    rows = [{"claim": fact.prompt, "label": fact.answer, **more} for fact in facts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path, monkeypatch):
    "A folder with a little of FEVER and a small BERT that is taken for the paper's."
    monkeypatch.setitem(benches.TRAIN_FACTS, "fever", 20)
    write(tmp_path / "data" / "x", [])
    write(tmp_path / "data" / "fever" / "train.jsonl.xz", CLAIMS[:20])
    write(tmp_path / "data" / "fever" / "dev.jsonl.xz", CLAIMS[20:])
    write(tmp_path / "data" / "fever2" / "dev.jsonl.xz", OTHERS)
    lm = bert()
    lm.model.save_pretrained(tmp_path / "bert")
    lm.tokenizer.save_pretrained(tmp_path / "bert")
    about = replace(PAPER_MODELS["BERT-base"], parameters=lm.model.num_parameters(), hub=str(tmp_path / "bert"))
    monkeypatch.setitem(PAPER_MODELS, "BERT-base", about)
    return tmp_path / "data"


def test_tuning_makes_what_the_paper_tier_looks_for(data):
    with pytest.raises(ModelNotFoundError, match=rf"{TUNED} holds no model.*A.4.*malmen-repro tune --data .*tiny tier"):
        check_tier("paper", data, "classifier")
    out = tune_classifier(data, config=FAST, device="cpu", progress=False)
    assert out == data / TUNED and sorted(path.name for path in data.iterdir()) == [TUNED, "fever", "fever2", "x"]
    about = json.loads((out / "tuning.json").read_text())
    assert about["config"]["epochs"] == 3 and len(about["history"]) == 3
    assert about["facts"]["train"] == {"file": "train.jsonl.xz", "facts": 20}
    bench = paper_bench(data, "classifier")
    assert bench.lm.model.config.label2id == {"REFUTES": 0, "SUPPORTS": 1} and len(bench.train_facts) == 20
    assert [fact.alternative for fact in bench.train_facts] == [fact.answer for fact in CLAIMS[:20]]


def test_tuning_again_changes_nothing(data):
    out = tune_classifier(str(data), config=FAST, device="cpu", progress=False)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert tune_classifier(data, config=FAST, progress=False) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(BenchError, match="something else already.*--out"):
        tune_classifier(data, config=replace(FAST, seed=1), progress=False)
    other = tune_classifier(data, data / "other", replace(FAST, epochs=1), device="cpu", progress=False)
    assert (other / "config.json").is_file()


def test_tuning_leaves_a_model_of_ones_own_alone(data):
    (data / TUNED).mkdir()
    (data / TUNED / "config.json").write_text("{}")
    with pytest.raises(BenchError, match="remove it"):
        tune_classifier(data, config=FAST)


def test_tuning_needs_the_published_data_and_a_model(data, monkeypatch):
    with pytest.raises(MissingDataError, match="--data"):
        tune_classifier(None)
    with pytest.raises(ModelNotFoundError, match="no folder no such folder"):
        tune_classifier(data, source="no such folder")
    monkeypatch.setitem(benches.TRAIN_FACTS, "fever", 104_996)
    with pytest.raises(MissingDataError, match="holds 20 facts"):
        tune_classifier(data)
    (data / "fever" / "dev.jsonl.xz").unlink()
    with pytest.raises(MissingDataError, match=r"no file \*eval\*.json\* or \*dev\*.json\*"):
        tune_classifier(data)


# --- unrelated claims: those of the file, or of FEVER2


def test_unrelated_claims_of_the_file_are_kept(data):
    rows = [
        {"prompt": fact.prompt, "equiv_prompt": [fact.prompt + "!"], "alt": fact.alternative,
         "unrel_prompt": "the sky is blue", "unrel_ans": "SUPPORTS"}
        for fact in CLAIMS
    ]  # fmt: skip
    for name, part in (("train", rows[:20]), ("dev", rows[20:])):
        (data / "fever" / f"{name}.jsonl.xz").write_text("".join(json.dumps(row) + "\n" for row in part))
    (data / "fever2" / "dev.jsonl.xz").unlink()
    _, facts, _ = paper_facts(data, "classifier")
    assert {fact.unrelated_pair for part in facts.values() for fact in part} == {("the sky is blue", "SUPPORTS")}
    assert [fact.answer for fact in facts["train"]] == [fact.alternative for fact in CLAIMS[:20]]


def test_unrelated_claims_are_dealt_from_fever2_and_shared_by_no_two_splits(data):
    write(data / "fever2" / "dev.jsonl.xz", [*OTHERS, *OTHERS])
    _, facts, _ = paper_facts(data, "classifier")
    dealt = {split: {fact.unrelated_pair for fact in part} for split, part in facts.items()}
    assert dealt["train"] and dealt["eval"] and not dealt["train"] & dealt["eval"]
    assert dealt["train"] | dealt["eval"] <= {fact.pair for fact in OTHERS}
