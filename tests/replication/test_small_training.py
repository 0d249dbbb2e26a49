"""The small tier's training: rows, curriculum, a run that can be stopped, benches."""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch

from malmen_repro.facts import LABELS, check_facts, digest
from malmen_repro.language_models import EncodedPair
from malmen_repro.methods.target_vectors import SubjectError
from malmen_repro.replication.small_data import (
    claim_lessons,
    corpus_sentences,
    question_extras,
    question_facts,
    question_lessons,
    subject_lessons,
)
from malmen_repro.replication.small_models import FRAMES, SMALL_ARCHITECTURES, byte_pair_tokenizer, wrapped_stand_in
from malmen_repro.replication.small_training import (
    ShuffledRows,
    SmallCurriculum,
    SmallRun,
    by_length,
    half_pays,
    knowledge,
    prompt_spans,
    rows_loss,
    sentence_rows,
    small_bench,
    train_small_language_model,
    warm_cosine,
)
from malmen_repro.replication.stand_ins import StandInError
from tests.small import CONFIG, CONFIGS, EACH, fresh, stopped_before, write_folder

SUBJECTS = CONFIGS["gpt2-subjects"]


def options(**more):
    return dict(config=CONFIG, device="cpu", progress=False, save_every=0.0) | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return byte_pair_tokenizer(corpus_sentences(folder), 400)


@pytest.fixture(scope="module")
def taught(folder):
    lessons = subject_lessons(folder, SUBJECTS)
    tokenizer = byte_pair_tokenizer(lessons.texts, 400)
    lm = fresh(tokenizer, SUBJECTS)
    return lessons, lm, SmallCurriculum(lessons, lm, SUBJECTS)


def test_shuffled_rows():
    rows = ShuffledRows([["a0", "a1"], ["b0"], ["c0", "c1", "c2"]], 0)
    seen = [rows[i] for i in range(18)]
    assert all({r[0] for r in seen[i : i + 3]} == {"a", "b", "c"} for i in range(0, 18, 3))
    assert set(seen) == {"a0", "a1", "b0", "c0", "c1", "c2"}
    assert [rows[i] for i in (7, 2, 17, 7)] == [seen[i] for i in (7, 2, 17, 7)]


def test_by_length_without_rows():
    assert by_length([], 3, random.Random(0)) == [[], [], []]


@pytest.mark.parametrize("count,size", [(1, 12), (3, 4), (12, 1)])
def test_by_length(count, size):
    rows = [EncodedPair((1,) * random.Random(i).randint(1, 9), (i,)) for i in range(12)]
    batches = by_length(rows, count, random.Random(0))
    assert [len(b) for b in batches] == [size] * count and sorted(sum(batches, [])) == sorted(rows)
    spans = sorted((min(len(r.prompt) for r in b), max(len(r.prompt) for r in b)) for b in batches)
    assert all(low[1] <= high[0] for low, high in zip(spans, spans[1:], strict=False))


def test_learning_rate():
    rates = [warm_cosine(step, CONFIG) for step in range(13)]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3]) and rates[4] == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(1e-4) and all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_half_pays_says_yes_or_no():
    assert half_pays(torch.device("cpu")) in (True, False) and half_pays(torch.device("meta")) is False


@EACH
def test_stopped_and_continued_is_the_same_as_straight(folder, tmp_path, config):
    straight, tokenizer = train_small_language_model(folder, tmp_path / "straight", **options(config=config))
    with stopped_before(7):
        train_small_language_model(folder, tmp_path / "stopped", **options(config=config))
    continued, _ = train_small_language_model(folder, tmp_path / "stopped", **options(config=config))
    loaded, again = train_small_language_model(folder, tmp_path / "straight", **options(config=config))
    for other in (continued, loaded):
        for one, two in zip(straight.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-2)
        assert not other.training and not any(p.requires_grad for p in other.parameters())
    assert again.get_vocab() == tokenizer.get_vocab()
    record = json.loads((tmp_path / "straight/record.json").read_text())
    assert record["tier"] == "small" and record["config"] == asdict(config)
    assert record["parameters"] == straight.num_parameters()
    if config.architecture == "bert":
        assert record["epochs"] == {"pararel": 4.8, "fever": 2.4} and record["sizes"]["known"] == 60
    elif config.architecture == "gpt2-subjects":
        assert record["sizes"]["cases"] == record["sizes"]["train"] == 12
    else:
        assert record["epochs"]["nq_train"] == 3 and record["sizes"]["known_facts"] == 12
    pairs = [("Where was Ada Ash born?", LABELS[0])]
    ours, theirs = wrapped_stand_in(straight, tokenizer, config), wrapped_stand_in(loaded, again, config)
    assert ours.encode(pairs) == theirs.encode(pairs)
    torch.testing.assert_close(*(lm.answer_logits(next(lm.batches(pairs))) for lm in (ours, theirs)))


def test_a_folder_of_another_configuration_is_refused(folder, tmp_path):
    train_small_language_model(folder, tmp_path, **options())
    with pytest.raises(StandInError, match="learning_rate"):
        train_small_language_model(folder, tmp_path, **options(config=replace(CONFIG, learning_rate=1e-3)))
    other = CONFIGS["gptj"]
    with pytest.raises(StandInError, match="architecture"):
        train_small_language_model(folder, tmp_path, **options(config=other))
    train_small_language_model(folder, tmp_path / "other", **options(config=other))
    with pytest.raises(StandInError, match="architecture"):
        train_small_language_model(folder, tmp_path / "other", **options())
    (tmp_path / "record.json").unlink()
    with pytest.raises(StandInError, match="checkpoint.pt"):
        train_small_language_model(folder, tmp_path, **options(config=replace(CONFIG, learning_rate=1e-3)))


def test_a_loss_that_is_not_finite_is_an_error(tokenizer, tmp_path):
    lm = fresh(tokenizer)
    run = SmallRun(tmp_path / "checkpoint.pt", lm, CONFIG)
    with torch.no_grad():
        lm.model.transformer.wte.weight[3] = float("nan")
    with pytest.raises(StandInError, match="step 0"):
        run.advance([EncodedPair((3, 4), (5,))], [EncodedPair((3,), (4, 5))])


@EACH
def test_curriculum_of_each_architecture(folder, config):
    lessons = SMALL_ARCHITECTURES[config.architecture].lessons(folder, config)
    tokenizer = byte_pair_tokenizer(lessons.texts, 400, FRAMES.get(config.architecture, ""))
    lm = fresh(tokenizer, config)
    curriculum = SmallCurriculum(lessons, lm, config)
    questions, sentences = curriculum[60]
    assert (questions, sentences) == SmallCurriculum(lessons, lm, config)[60] != curriculum[61]
    assert len(questions) == sum(count for _, count in lessons.sources.values())
    assert len(sentences) == (config.corpus_rows if lessons.sentences else 0)
    assert set(lessons.watched) <= set(lessons.checks)


@EACH
def test_bench_of_each_architecture(folder, tmp_path, config):
    bench = small_bench(folder, tmp_path, progress=False, config=config)
    assert bench.provenance["config"]["seed"] == 0 and bench.provenance["accuracy"]
    assert (tmp_path / f"small-{digest(asdict(config))}" / "record.json").exists()
    for facts in (bench.train_facts, *bench.eval_facts.values()):
        check_facts(facts)
        assert all(fact.unrelated_pair for fact in facts)
        knowledge(bench.lm, {"all": [pair for f in facts for pair in (f.pair, *f.equivalent_pairs, f.unrelated_pair)]})


def test_questions_are_learned_with_their_end(folder, tokenizer):
    lm, lessons = fresh(tokenizer), question_lessons(folder, CONFIG)
    questions, sentences = SmallCurriculum(lessons, lm, CONFIG)[0]
    assert {row.answer[-1] for row in questions} == {tokenizer.eos_token_id}
    assert all(len(row.prompt) == 1 and len(row.answer) < CONFIG.corpus_length for row in sentences)


def test_an_encoder_decoder_completes_sentences(folder):
    config = CONFIGS["t5"]
    lessons = question_lessons(folder, config)
    tokenizer = byte_pair_tokenizer(lessons.texts, 400, FRAMES["t5"])
    rows = sentence_rows(fresh(tokenizer, config), ["Ada Ash went to Arden.", "one " * 100], 16)
    assert [tokenizer.decode(part, skip_special_tokens=True) for part in rows[0]] == [" Ada Ash", " went to Arden."]
    assert rows[0].prompt[-1] == rows[0].answer[-1] == rows[1].prompt[-1] == tokenizer.eos_token_id
    assert max(map(len, rows[1])) == 8


def test_a_classifier_learns_labels(folder, tmp_path):
    config = replace(CONFIGS["bert"], steps=60, learning_rate=1e-2)
    lessons = claim_lessons(folder, config)
    lm = fresh(byte_pair_tokenizer(lessons.texts, 400, FRAMES["bert"]), config)
    curriculum, run = SmallCurriculum(lessons, lm, config), SmallRun(tmp_path / "checkpoint.pt", lm, config)
    losses = [run.advance(*curriculum[step])[0] for step in range(config.steps)]
    assert losses[-1] < 0.5 * losses[0] and {label for row in curriculum[0][0] for label in row.answer} == {0, 1}


def test_a_step_without_sentences(tokenizer, tmp_path):
    run = SmallRun(tmp_path / "checkpoint.pt", fresh(tokenizer), CONFIG)
    assert run.advance([EncodedPair((3, 4), (5,))], [])[1] == 0.0 and run.tokens == 3


def test_learning(tokenizer, tmp_path):
    pairs = [("who won", "Ada Ash"), ("who lost", "Bo Elm")]
    lm = fresh(tokenizer)
    before = knowledge(lm, {"both": pairs})["both"]
    config, rows = replace(CONFIG, steps=80, learning_rate=1e-2), lm.encode(pairs)
    run = SmallRun(tmp_path / "checkpoint.pt", lm, config)
    losses = [run.advance(rows, rows)[0] for _ in range(80)]
    assert losses[-1] < 0.1 < losses[0] and before < 1 == knowledge(lm, {"both": pairs})["both"]
    assert run.tokens == 160 * sum(len(r.prompt) + len(r.answer) for r in rows)


def test_spans_are_the_subjects_tokens(taught):
    lessons, lm, curriculum = taught
    assert len(curriculum.spans) == len(lessons.subjects)
    for prompt, subject in lessons.subjects.items():
        ids = lm.tokenizer(prompt)["input_ids"]
        start, end = curriculum.spans[tuple(ids)]
        before, named = (lm.tokenizer.decode(part) for part in (ids[:start], ids[start:end]))
        assert named.strip() == subject and subject not in before
    assert prompt_spans(lm, {"Ada Ash was born in": None}) == {} == prompt_spans(lm, {})
    with pytest.raises(SubjectError, match="not in the prompt"):
        prompt_spans(lm, {"Ada Ash was born in": "Bo Elm"})


def test_a_hidden_subject_is_seen_by_its_last_token_only(taught):
    _, lm, curriculum = taught
    rows = [row for row in curriculum[0][0] if curriculum.spans[row.prompt][1] - curriculum.spans[row.prompt][0] > 1]
    row = rows[0]
    start, end = curriculum.spans[row.prompt]
    other = EncodedPair((*row.prompt[:start], row.prompt[start] + 1, *row.prompt[start + 1 :]), row.answer)
    spans = {one.prompt: (start, end) for one in (row, other)}
    with torch.no_grad():
        plain = [rows_loss(lm, [one]) for one in (row, other)]
        hidden = [rows_loss(lm, [one], hidden=spans) for one in (row, other)]
        none = rows_loss(lm, [row], hidden={(1, 2): (0, 1)})
    assert not torch.isclose(plain[0], hidden[0], rtol=1e-6) and torch.isclose(plain[0], none, rtol=1e-5)
    # One block: what stands before the subject's last token reaches the answer only past the mask, so not at all.
    assert torch.isclose(*hidden, rtol=1e-6) and not torch.isclose(*plain, rtol=1e-6)


def test_subjects_are_hidden_in_a_share_of_the_steps(taught):
    _, _, curriculum = taught
    hidden = [bool(curriculum.hidden(step)) for step in range(400)]
    assert abs(sum(hidden) / 400 - SUBJECTS.masked) < 0.08
    assert hidden == [bool(curriculum.hidden(step)) for step in range(400)]


def test_other_stand_ins_hide_nothing(folder):
    lessons = question_lessons(folder, CONFIG)
    lm = fresh(byte_pair_tokenizer(lessons.texts, 400))
    assert SmallCurriculum(lessons, lm, CONFIG).hidden(0) == {} and not lessons.subjects


def test_the_stand_in_that_recalls_learns_the_questions_of_the_first_and_hides_their_subjects(folder):
    config = CONFIGS["gpt2-recall"]
    lessons, first = (question_lessons(folder, one) for one in (config, CONFIG))
    assert lessons.sources == first.sources and lessons.sentences == first.sentences
    asked = [pair for wordings in lessons.sources["known_facts"].facts for pair in wordings]
    assert set(lessons.subjects) == {prompt for prompt, _ in asked}
    assert all(subject in prompt for prompt, subject in lessons.subjects.items())
    lm = fresh(byte_pair_tokenizer(lessons.texts, 400), config)
    curriculum = SmallCurriculum(lessons, lm, config)
    assert 0 < sum(bool(curriculum.hidden(step)) for step in range(100)) < 100
    assert question_facts(folder, config) == question_facts(folder, CONFIG)
    corpus = question_extras(folder, config)["corpus"]
    assert {f"{prompt} {answer}" for prompt, answer in asked} <= set(corpus) and set(lessons.sentences) <= set(corpus)


def test_the_bench_of_subjects_has_cases_and_a_corpus(folder, tmp_path):
    bench = small_bench(folder, tmp_path, progress=False, config=SUBJECTS)
    assert [case.fact for case in bench.cases] == bench.eval_facts["counterfact"] and bench.corpus
    assert small_bench(folder, tmp_path, progress=False, config=CONFIG).known_facts
