"""The small tier's language model: splits, rows, training that can be stopped; on invented data in the real formats."""

import json
import lzma
import random
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from malmen_repro.facts import LABELS, Fact, FactError, FactFileError, check_facts, digest, other_label
from malmen_repro.language_models import EncodedPair
from malmen_repro.methods.target_vectors import SubjectError
from malmen_repro.replication.paper_models import PAPER_MODELS
from malmen_repro.replication.small_stand_in import (
    ARCHITECTURES,
    FRAMES,
    ShuffledRows,
    SmallBaseConfig,
    SmallBertConfig,
    SmallConfig,
    SmallCurriculum,
    SmallGPTJConfig,
    SmallRecallConfig,
    SmallRun,
    SmallSubjectsConfig,
    SmallT5Config,
    StandInError,
    by_length,
    byte_pair_tokenizer,
    claim_facts,
    claim_lessons,
    corpus_sentences,
    half_pays,
    halves,
    knowledge,
    known_questions,
    question_extras,
    question_facts,
    question_lessons,
    rows_loss,
    sentence_rows,
    small_bench,
    small_config,
    small_model,
    small_tier_data,
    subject_extras,
    subject_facts,
    subject_lessons,
    subject_spans,
    train_small_language_model,
    unambiguous,
    warm_cosine,
    what_it_should_know,
    wrapped,
)

SIZES = dict(layers=1, width=32, heads=2, vocabulary=400, steps=12, learning_rate=2e-3, warmup=4)
ROWS = dict(known=12, nq_rows=8, known_rows=8, corpus_rows=4)
CONFIG = SmallConfig(**SIZES, **ROWS)
CONFIGS = {
    "gpt2": CONFIG,
    "gptj": SmallGPTJConfig(**SIZES, **ROWS, rotary=8),
    "t5": SmallT5Config(**SIZES, **ROWS, inner=64),
    "bert": SmallBertConfig(**SIZES, inner=64, evaluation=8, train=12, pararel_rows=8, fever_rows=8),
    "gpt2-subjects": SmallSubjectsConfig(**SIZES, known_rows=12, corpus_rows=4),
    "gpt2-recall": SmallRecallConfig(**SIZES, **ROWS),
    "gpt2-base": SmallBaseConfig(**SIZES | {"layers": 3}, **ROWS, edited=2),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def counterfact_rows(people, towns):
    "CounterFact in both forms: twelve cases with two neighbours each, twelve rows to learn from."
    full, compact = [], []
    for i, who in enumerate(people[:12]):
        true, new = towns[i % 4], towns[(i + 1) % 4]
        rewrite = {"prompt": "{} was born in", "relation_id": "P19", "subject": who,
                   "target_new": {"str": new}, "target_true": {"str": true}}
        full.append({"case_id": i, "requested_rewrite": rewrite, "paraphrase_prompts": [f"It rained. {who} is from"],
                     "neighborhood_prompts": [f"{people[24 + (i + k) % 12]} {i} was born in" for k in (0, 1)],
                     "generation_prompts": [f"{who} lives in"]})
        compact.append({"case_id": 50 + i, "prompt": f"{people[12 + i]} is from", "subject": people[12 + i],
                        "target_new": new, "ground_truth": true, "rephrase_prompt": f"The home of {people[12 + i]} is",
                        "locality_prompt": f"{people[24 + i]} {i} is from", "locality_ground_truth": true})
    return {"counterfact/full_form_804": full, "counterfact/train": compact}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out, rng, towns = tmp_path_factory.mktemp("data"), random.Random(0), ["Arden", "Bruma", "Calder", "Delvin"]
    names = product("Ada Bo Cleo Dov Edda Finn".split(), "Ash Birch Elm Fir Oak Yew".split())
    people = [" ".join(n) for n in names]
    born = [{"relation": "P19", "question": f"Where was {w} born?", "subject": w, "answers": [rng.choice(towns)]}
            for w in people]
    nq = [{"question": f"who won the race of {y}", "answers": [rng.choice(people), "x"]} for y in range(1900, 1940)]
    zsre = [{"subject": f"Mill {i}", "src": f"Who built Mill {i}?", "rephrase": f"By whom was Mill {i} built?",
             "answers": [rng.choice(people)], "alt": "Bo Fir",
             "loc": f"nq question: {nq[i]['question']}", "loc_ans": f"zsRE {i}"} for i in range(8)]
    twins = [{"relation": r, "question": "Where is Elm Hall located?", "subject": "Elm Hall", "answers": [r]}
             for r in ("P131", "P276")]
    both = {"relation": "P19", "question": "Where was Zed Ash born?", "subject": "Zed Ash", "answers": ["Arden"]}
    files = {"zsre/mend_train_1000": zsre[:4], "zsre/mend_eval_1037": zsre[4:], "nq/train": nq[:32], "nq/dev": nq[32:],
             "entity_questions/train": [*born[:24], *twins, both], "entity_questions/dev": [*born[24:], both]}
    patterns = ["[X] was born in [Y] .", "[X] is native to [Y]", "[X] comes from [Y]", "The birthplace of [X] is [Y]."]
    files["pararel/patterns"] = [{"relation": "P19", "patterns": patterns}]
    files["pararel/facts"] = [{"relation": "P19", "subject": b["subject"], "object": b["answers"][0]} for b in born]
    for name, shift in (("train", 0), ("dev", 40)):
        files[f"fever/{name}"] = [{"claim": f"Claim {i + shift} is so.", "label": LABELS[i % 2]} for i in range(20)]
    files |= counterfact_rows(people, towns)
    for name, rows in files.items():
        write(out / f"{name}.jsonl.xz", rows)
    for name in ("trex_sentences", "bing_distant_sentences"):
        sentences = [f"{name}: {w} went to {rng.choice(towns)}." for w in people]
        write(out / f"corpus/{name}.txt.xz", ["short", "z" * 500, *sentences])
    return out


@pytest.fixture(scope="module")
def data(folder):
    return small_tier_data(folder, known=12)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return byte_pair_tokenizer(corpus_sentences(folder), 400)


def fresh(tokenizer, config=CONFIG):
    return wrapped(small_model(config, tokenizer), tokenizer, config)


def prompts(facts):
    return {p for fact in facts for p in (fact.prompt, *fact.equivalent_prompts)}


# ---- splits
def test_the_same_seed_gives_the_same_splits(folder, data):
    assert small_tier_data(folder, known=12) == data != small_tier_data(folder, 1, known=12)


def test_nothing_that_is_edited_is_learned(data):
    learned = {p for p, _ in data.nq_train} | prompts(data.known_facts)
    for part in (data.train_facts, data.zsre_train, data.zsre_eval, data.eq_dev):
        assert not learned & prompts(part)
        check_facts(part)
    assert not prompts(data.train_facts) & prompts(data.eq_dev)


def test_unrelated_tuples_of_training_and_evaluation_are_apart_and_known(data):
    a, b = ({p for p, _ in part} for part in (data.nq_a, data.nq_b))
    assert not a & b and a | b == {p for p, _ in data.nq_train} and len(a) == len(b)
    assert {f.unrelated_prompt for f in data.train_facts + data.zsre_train} <= a
    assert {f.unrelated_prompt for f in data.eq_dev + data.zsre_eval} <= b
    assert not {p for p, _ in data.nq_dev} & (a | b)


def test_the_answer_that_zsre_asks_for_is_the_one_learned(data):
    assert {f.unrelated_pair for f in data.zsre_eval} <= set(data.nq_train)


def test_training_does_not_see_the_held_out_wording(data):
    held_out = {p for p, _ in what_it_should_know(data)["known, held-out wording"]}
    assert len(held_out) == 12 and not held_out & prompts(data.known_facts)
    assert all(len(f.equivalent_prompts) == 2 for f in data.eq_dev)


def test_ambiguous_questions_are_left_out(data):
    everything = prompts(data.known_facts + data.train_facts + data.eq_dev)
    assert "Where is Elm Hall located?" not in everything and "Where was Zed Ash born?" not in everything
    assert len(data.known_facts) == len(data.train_facts) == 12 and len(data.eq_dev) == 12


def test_unambiguous_compares_all_wordings():
    first = Fact("Where was Ada Elm born?", "Kent", subject="Ada Elm", relation="P19")
    assert unambiguous([first]) == [first]
    assert unambiguous([first, replace(first, prompt="What is the birthplace of Ada Elm?")]) == []


def test_known_questions_takes_the_first_row_that_asks():
    rows = [Fact("p", "a", unrelated_prompt="q", unrelated_answer=answer) for answer in ("first", "second")]
    assert known_questions([Fact("q", "other"), Fact("r", "own")], rows) == [("q", "first"), ("r", "own")]


@pytest.mark.parametrize("kept", [0, 1, 4, 7, 8])
def test_halves(kept):
    pairs = [(str(i), "a") for i in range(8)]
    a, b = halves(pairs, {str(i) for i in range(kept)}, random.Random(0))
    assert sorted(a + b) == pairs and {str(i) for i in range(kept)} <= {p for p, _ in b} and len(a) == min(4, 8 - kept)


def test_too_many_known_facts(folder):
    with pytest.raises(FactError, match="24"):
        small_tier_data(folder, known=24)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FactFileError, match="mend_train_1000"):
        small_tier_data(tmp_path)
    with pytest.raises(FactFileError, match="trex_sentences"):
        corpus_sentences(tmp_path)
    whole = (folder / "corpus/trex_sentences.txt.xz").read_bytes()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/trex_sentences.txt.xz").write_bytes(whole[:-20])
    with pytest.raises(FactFileError, match="trex_sentences"):
        corpus_sentences(tmp_path)


def test_corpus_sentences(folder):
    lines = corpus_sentences(folder, trex=5, bing=3)
    assert lines == corpus_sentences(folder, trex=5, bing=3) != corpus_sentences(folder, 1, trex=5, bing=3)
    assert len(set(lines)) == 8 and sum(line.startswith("trex") for line in lines) == 5
    assert len(corpus_sentences(folder)) == 72 and all(20 <= len(line) <= 400 for line in corpus_sentences(folder))


# ---- tokens and rows
@pytest.mark.parametrize("text", ["Ada Ash", "naïve 東京 🙂", "a  b\tc", "(x) 3.5 %"])
def test_any_text_can_be_written(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("Q?")["input_ids"] + tokenizer(" " + text)["input_ids"] == tokenizer("Q? " + text)["input_ids"]


def test_special_tokens(tokenizer):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2 and len(tokenizer) <= 400


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


# ---- training
def test_learning_rate():
    rates = [warm_cosine(step, CONFIG) for step in range(13)]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3]) and rates[4] == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(1e-4) and all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_half_pays_says_yes_or_no():
    assert half_pays(torch.device("cpu")) in (True, False) and half_pays(torch.device("meta")) is False


def options(**more):
    return dict(config=CONFIG, device="cpu", progress=False, save_every=0.0) | more


@EACH
def test_stopped_and_continued_is_the_same_as_straight(folder, tmp_path, monkeypatch, config):
    straight, tokenizer = train_small_language_model(folder, tmp_path / "straight", **options(config=config))
    advance = SmallRun.advance

    def stop(run, *args):
        if run.step == 7:
            raise KeyboardInterrupt
        return advance(run, *args)

    monkeypatch.setattr(SmallRun, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        train_small_language_model(folder, tmp_path / "stopped", **options(config=config))
    monkeypatch.setattr(SmallRun, "advance", advance)
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
    ours, theirs = wrapped(straight, tokenizer, config), wrapped(loaded, again, config)
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


# ---- architectures
def test_the_first_stand_in_is_the_one_that_records_stand_on():
    assert digest(asdict(SmallConfig())) == "6ad4e578395c" and small_config("gpt2") == SmallConfig()


def test_a_configuration_may_say_how_many_blocks_are_edited():
    lm = fresh(byte_pair_tokenizer(["a b c"], 300), CONFIGS["gpt2-base"])
    assert list(lm.layers) == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    gpt2, base = PAPER_MODELS["GPT-2"], SmallBaseConfig()
    assert (base.layers, base.width, base.heads) == tuple(gpt2.sizes[name] for name in ("n_layer", "n_embd", "n_head"))
    assert base.edited == gpt2.last


def test_an_architecture_that_is_not_there():
    with pytest.raises(StandInError, match="gpt2, gptj, t5, bert, gpt2-subjects, gpt2-recall, gpt2-base"):
        small_config("gpt3")
    with pytest.raises(StandInError, match="gpt3"):
        small_bench("nowhere", architecture="gpt3")


@EACH
def test_model_of_each_architecture(tokenizer, config):
    config = replace(config, layers=3)
    lm, again = fresh(tokenizer, config), fresh(tokenizer, config)
    assert lm.model.config.model_type == config.architecture.split("-")[0]
    assert all(map(torch.equal, lm.model.parameters(), again.model.parameters()))
    stacks = 2 if config.architecture == "t5" else 1
    assert len(lm.layers) == 2 * stacks and len(set(lm.shapes.values())) == 1
    [(value_size, key_size)] = set(lm.shapes.values())
    assert value_size == config.width < key_size


@EACH
def test_curriculum_of_each_architecture(folder, config):
    lessons = ARCHITECTURES[config.architecture].lessons(folder, config)
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


@pytest.mark.parametrize("name,ends", [("t5", (False, True)), ("bert", (True, True))])
def test_frames(folder, tmp_path, name, ends):
    tokenizer = byte_pair_tokenizer(corpus_sentences(folder), 400, FRAMES[name])
    ids, end = tokenizer("Ada Ash")["input_ids"], tokenizer.eos_token_id
    assert (ids[0] == end, ids[-1] == end) == ends
    assert tokenizer("Ada", add_special_tokens=False) == tokenizer(" Ada", add_special_tokens=False)


def test_claims_are_learned_right_and_edited_wrong(folder):
    config = CONFIGS["bert"]
    lessons, (train, sets) = claim_lessons(folder, config), claim_facts(folder, config)
    known = dict(pair for facts, _ in lessons.sources.values() for pairs in facts for pair in pairs)
    own = [fact for fact in train if not fact.equivalent_prompts]  # FEVER's, which bring no phrasings
    assert len(train) == 12 + len(own) and len(own) == 10 and train[12:] == own
    assert not {fact.prompt for fact in own} & {fact.unrelated_prompt for fact in train}
    assert {name: len(facts) for name, facts in sets.items()} == {"pararel": 8, "fever": 10}
    for fact in [*train, *sets["pararel"], *sets["fever"]]:
        assert known[fact.prompt] == other_label(fact.answer) == fact.alternative
        assert known[fact.unrelated_prompt] == fact.unrelated_answer
    assert all(prompt in known for fact in train for prompt in fact.equivalent_prompts)
    assert not any(prompt in known for fact in sets["pararel"] for prompt in fact.equivalent_prompts)
    unseen = lessons.checks["unseen twins"]
    assert unseen and not any(prompt in known for prompt, _ in unseen)
    assert {fact.unrelated_prompt for fact in train} <= {prompt for prompt, _ in lessons.checks["fever_train"]}
    assert {fact.unrelated_prompt for fact in sets["pararel"]} <= {prompt for prompt, _ in lessons.checks["fever_dev"]}


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


# ---- the stand-in that recalls at the subject
SUBJECTS = CONFIGS["gpt2-subjects"]


@pytest.fixture(scope="module")
def taught(folder):
    lessons = subject_lessons(folder, SUBJECTS)
    tokenizer = byte_pair_tokenizer(lessons.texts, 400)
    lm = fresh(tokenizer, SUBJECTS)
    return lessons, lm, SmallCurriculum(lessons, lm, SUBJECTS)


def test_the_truth_is_learned_and_the_new_objects_are_edited(folder, taught):
    lessons, _, _ = taught
    train, edits = subject_facts(folder, SUBJECTS)
    extras = subject_extras(folder, SUBJECTS)
    said = {pair for wordings in lessons.sources["known"].facts for pair in wordings}
    assert edits["counterfact"] == [case.fact for case in extras["cases"]]
    for fact in train + edits["counterfact"]:
        assert (fact.prompt, fact.alternative) in said and fact.pair not in said and fact.unrelated_pair in said
    assert {f"{prompt} {answer}" for prompt, answer in said} <= set(extras["corpus"])


def test_spans_are_the_subjects_tokens(taught):
    lessons, lm, curriculum = taught
    assert len(curriculum.spans) == len(lessons.subjects)
    for prompt, subject in lessons.subjects.items():
        ids = lm.tokenizer(prompt)["input_ids"]
        start, end = curriculum.spans[tuple(ids)]
        before, named = (lm.tokenizer.decode(part) for part in (ids[:start], ids[start:end]))
        assert named.strip() == subject and subject not in before
    assert subject_spans(lm, {"Ada Ash was born in": None}) == {} == subject_spans(lm, {})
    with pytest.raises(SubjectError, match="not in the prompt"):
        subject_spans(lm, {"Ada Ash was born in": "Bo Elm"})


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
