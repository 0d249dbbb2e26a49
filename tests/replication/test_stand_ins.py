"""Tiny stand-ins: the world and its claims, the four architectures, training, and benches that are kept."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from transformers import BertForSequenceClassification, GPT2LMHeadModel, GPTJForCausalLM, T5ForConditionalGeneration

from malmen_repro.facts import LABELS, MalmenError, check_facts, digest
from malmen_repro.replication import stand_ins
from malmen_repro.replication.stand_ins import (
    CLAIMS,
    PEOPLE,
    TINY_ARCHITECTURES,
    TOWNS,
    StandInError,
    TinyConfig,
    invent_world,
    known_share,
    subject_mask,
    tell_claims,
    tell_statements,
    tiny_bench,
    tiny_model,
    train_language_model,
    word_tokenizer,
    words_of,
    world_parts,
)

WORLD = invent_world(seed=0)
SMALL = {"width": 16, "heads": 2, "inner": 24, "known": 60, "evaluation": 40, "steps": 3, "batch_size": 16}
KINDS = list(TINY_ARCHITECTURES)


@pytest.fixture(autouse=True)
def one_world(monkeypatch):
    """The full world is told once: with shapes and types checked, that takes seconds."""
    real = stand_ins.invent_world
    whole = lambda seed, people, towns: (seed, people, towns) == (0, 1250, 375)  # noqa: E731
    monkeypatch.setattr(stand_ins, "invent_world", lambda *world: WORLD if whole(*world) else real(*world))


def small_config(name, **options):
    """A configuration of an architecture in a size for tests."""
    rotary = {"rotary": 4} if name == "gptj" else {}
    return replace(TINY_ARCHITECTURES[name].config(), **{**SMALL, **rotary, **options})


def model_for(config):
    """A random model with the tokenizer of a small world."""
    parts = world_parts(config, people=20, towns=12)
    tokenizer = word_tokenizer(words_of(parts.known + parts.edits), TINY_ARCHITECTURES[config.architecture].template)
    return tiny_model(config, tokenizer), parts


@pytest.fixture
def small_world(monkeypatch):
    """The benches' world, smaller."""
    real = stand_ins.world_parts
    monkeypatch.setattr(stand_ins, "world_parts", lambda config: real(config, people=20, towns=12))


# --- the world


def test_a_world_is_the_seeds():
    people, towns = WORLD
    assert (len(people), len(towns)) == (10_000, 1_500)
    assert invent_world(0, 30, 10) == invent_world(0, 30, 10) != invent_world(1, 30, 10)
    prompts = [prompt for fact in people + towns for prompt in (fact.prompt, *fact.equivalent_prompts)]
    assert len(set(prompts)) == len(prompts)


def test_the_world_of_the_committed_records():
    # The digest stands in records as "facts": if it changes, records and benches no longer belong together.
    parts = world_parts(TinyConfig())
    assert digest([[fact.prompt, fact.answer] for fact in parts.known + parts.edits]) == "3ff177310b64"


def test_gpt2_is_kept_under_the_fields_it_always_had():
    assert list(asdict(TinyConfig())) == [
        *("width", "layers", "heads", "inner", "edited", "known", "evaluation"),
        *("steps", "batch_size", "learning_rate", "seed"),
    ]
    assert digest(asdict(TinyConfig())) == "48b480b0c4eb"


# --- claims


def test_a_claim_says_a_fact_or_something_else():
    people, towns = WORLD
    facts = people[:2000] + towns
    claims = tell_claims(facts)
    for fact, claim in zip(facts, claims, strict=True):
        true = CLAIMS[fact.relation][0].replace("[X]", fact.subject).replace("[Y]", fact.answer)
        assert (claim.prompt == true) == (claim.answer == "SUPPORTS")
        assert (claim.subject, claim.relation) == (fact.subject, fact.relation)
        assert claim.answer in LABELS and {claim.answer, claim.alternative} == set(LABELS)
    assert 0.47 < Counter(claim.answer for claim in claims)["SUPPORTS"] / len(claims) < 0.53


def test_a_false_claim_names_an_answer_to_the_same_relation():
    towns = WORLD[1]
    answers = {relation: {f.answer for f in towns if f.relation == relation} for relation in TOWNS}
    for fact, claim in zip(towns, tell_claims(towns), strict=True):
        before, after = CLAIMS[fact.relation][0].replace("[X]", fact.subject).split("[Y]")
        said = claim.prompt.removeprefix(before).removesuffix(after)
        assert said in answers[fact.relation] and (said == fact.answer) == (claim.answer == "SUPPORTS")


def test_claims_have_four_wordings_and_no_two_agree():
    claims = tell_claims(WORLD[0][:2000] + WORLD[1])
    texts = [text for claim in claims for text in (claim.prompt, *claim.equivalent_prompts)]
    assert len(set(texts)) == len(texts) == 4 * len(claims)
    check_facts(claims)


def test_claims_are_the_seeds_and_not_the_companys():
    people = WORLD[0][:300]
    assert tell_claims(people, 3) == tell_claims(people, 3) != tell_claims(people, 4)
    alone, among = tell_claims(people[:100]), tell_claims(people)[:100]
    assert [claim.answer for claim in alone] == [claim.answer for claim in among]


def test_a_relation_with_one_answer_allows_no_false_claim():
    facts = [fact for fact in WORLD[0] if fact.relation == "language"][:1]
    with pytest.raises(StandInError, match="no false claim about language"):
        tell_claims(facts * 3)


def test_every_relation_can_be_claimed():
    assert set(CLAIMS) == {*PEOPLE, *TOWNS}
    for wordings in CLAIMS.values():
        assert len(wordings) == 4 and all(text.count("[X]") == text.count("[Y]") == 1 for text in wordings)


# --- words


@pytest.mark.parametrize(
    ("template", "expected"), [(None, "a b"), ("$A <end>", "a b <end>"), ("<end> $A", "<end> a b")]
)
def test_a_template_adds_its_tokens(template, expected):
    tokenizer = word_tokenizer(["b a", "c"], template)
    ids = tokenizer("a b")["input_ids"]
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == expected
    assert tokenizer("a b", add_special_tokens=False)["input_ids"] == [2, 3]
    assert tokenizer("zzz", add_special_tokens=False)["input_ids"] == [1] and tokenizer.pad_token_id == 0


# --- models


@pytest.mark.parametrize(
    ("name", "kind", "family", "layers"),
    [
        ("gpt2", GPT2LMHeadModel, "decoder", [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]),
        ("gptj", GPTJForCausalLM, "decoder", [f"transformer.h.{i}.mlp.fc_out" for i in (0, 1)]),
        (
            "t5",
            T5ForConditionalGeneration,
            "encoder-decoder",
            ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"],
        ),
        (
            "bert",
            BertForSequenceClassification,
            "encoder-classifier",
            ["bert.encoder.layer.0.output.dense"],
        ),
    ],
)
def test_each_architecture_is_the_real_one_and_tiny(name, kind, family, layers):
    config = TINY_ARCHITECTURES[name].config()
    parts = world_parts(config)
    lm = tiny_model(config, word_tokenizer(words_of(parts.known + parts.edits), TINY_ARCHITECTURES[name].template))
    assert type(lm.model) is kind and lm.family.name == family and list(lm.layers) == layers
    assert set(lm.shapes.values()) == {(config.width, config.inner)}
    assert 800_000 < lm.model.num_parameters() < 1_000_000
    assert lm.encode([fact.pair for fact in parts.known[:50] + parts.towns[-50:]])
    pairs = [fact.pair for fact in parts.known[:200] + parts.edits[-200:]]
    assert lm.tokenizer.unk_token_id not in {i for pair in lm.encode(pairs) for i in pair.prompt}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_the_seeds_and_leave_other_draws_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (one, _), (same, _), (other, _) = (model_for(small_config(name, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    pairs = [zip(one.model.parameters(), lm.model.parameters(), strict=False) for lm in (same, other)]
    assert all(torch.equal(a, b) for a, b in pairs[0])
    assert any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs[1])


@pytest.mark.parametrize("name", KINDS)
def test_parts_of_a_world(name):
    config = small_config(name)
    known, edits, towns = world_parts(config, people=20, towns=12)
    assert known[-len(towns) :] == towns and len(known) == 60 + 48
    if name == "bert":  # all claims are known, and edits flip their labels
        assert [(f.prompt, f.answer) for f in edits] == [(f.prompt, f.alternative) for f in known[:60]]
        assert all(fact.alternative in LABELS != fact.answer for fact in edits)
    else:
        assert len(edits) == 160 - 60 and not {f.prompt for f in known} & {f.prompt for f in edits}


# --- training


@pytest.mark.parametrize("name", KINDS)
def test_training_teaches_and_freezes_again(name):
    config = small_config(name, width=32, inner=64, steps=80, learning_rate=5e-3)
    lm, parts = model_for(config)
    facts = parts.known[:8]
    before = known_share(lm, facts)
    losses = train_language_model(lm, [fact.pair for fact in facts], config, progress=False)
    assert len(losses) == 80 and losses[-1] < 0.3 * losses[0]
    assert known_share(lm, facts) >= max(before, 0.5) and not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training


def test_a_share_of_one_and_of_none():
    lm, parts = model_for(small_config("bert"))
    said = known_share(lm, parts.known[:60])
    assert known_share(lm, parts.edits) == pytest.approx(1 - said)  # the other labels


# --- benches


@pytest.mark.parametrize("name", KINDS)
def test_a_bench_is_trained_once_and_then_read(name, small_world, tmp_path, monkeypatch):
    config = small_config(name, evaluation=10)
    first = tiny_bench(3, tmp_path, progress=False, config=config)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "provenance.json").read_text()) == first.provenance
    assert first.provenance["config"] == asdict(replace(config, seed=3))
    assert first.provenance.get("architecture") == (None if name == "gpt2" else name)
    monkeypatch.setattr(stand_ins, "train_language_model", None)  # a second training would fail
    again = tiny_bench(3, tmp_path, progress=False, config=config)
    for ours, theirs in zip(first.lm.model.parameters(), again.lm.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.train_facts == first.train_facts and again.eval_facts == first.eval_facts
    assert again.provenance == first.provenance


@pytest.mark.parametrize("name", KINDS)
def test_the_sets_of_a_bench_share_nothing(name, small_world, tmp_path):
    bench = tiny_bench(0, tmp_path, progress=False, config=small_config(name, evaluation=10))
    ((data_set, evaluation),) = bench.eval_facts.items()
    assert data_set == ("claims" if name == "bert" else "world") and len(evaluation) == 10
    for part in (bench.train_facts, evaluation):
        check_facts(part)
        assert all(fact.unrelated_pair and len(fact.equivalent_prompts) == 3 for fact in part)
    for what in ("prompt", "unrelated_prompt"):
        mine, theirs = ({getattr(fact, what) for fact in part} for part in (bench.train_facts, evaluation))
        assert not mine & theirs
    assert len(bench.known_facts) == 60
    if name == "bert":
        assert not {(f.prompt, f.answer) for f in bench.known_facts} & {f.pair for f in evaluation}
        towns = {claim.prompt: claim.answer for claim in world_parts(small_config(name), 20, 12).towns}
        assert all(towns[fact.unrelated_prompt] == fact.unrelated_answer for fact in evaluation)  # the right labels
        assert {fact.answer for fact in bench.train_facts} == set(LABELS)


def test_architectures_and_seeds_have_folders_of_their_own(small_world, tmp_path):
    configs = [small_config(name, evaluation=10) for name in KINDS]
    for seed in (0, 1):
        for config in configs:
            tiny_bench(seed, tmp_path, progress=False, config=config)
    assert len(list(tmp_path.iterdir())) == 2 * len(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_tied_weights_are_stored_once(name, small_world, tmp_path):
    from safetensors.torch import load_file

    bench = tiny_bench(0, tmp_path, progress=False, config=small_config(name, evaluation=10))
    stored = load_file(next(tmp_path.glob("*/model.safetensors")))
    heads = [n for n in stored if n.startswith("lm_head")]
    assert heads == (["lm_head.bias", "lm_head.weight"] if name == "gptj" else [])
    state = bench.lm.model.state_dict()
    tied = {id(tensor.untyped_storage()) for tensor in state.values()}
    assert {t.data_ptr() for t in state.values()} == {state[n].data_ptr() for n in stored} and tied
    assert all(torch.equal(state[n], tensor) for n, tensor in stored.items())


def test_a_training_that_was_stopped_is_run_again(small_world, tmp_path, monkeypatch):
    config = small_config("gpt2", evaluation=10)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stand_ins, "known_share", stop)
        tiny_bench(0, tmp_path, progress=False, config=config)
    assert tiny_bench(0, tmp_path, progress=False, config=config).provenance["stand-in"] == "tiny"


@pytest.mark.parametrize("name", ["gpt3", "", "GPT2"])
def test_an_unknown_architecture_is_refused_with_those_there_are(name, tmp_path):
    with pytest.raises(StandInError, match=f"{name!r}; there are: gpt2, gptj, t5, bert"):
        tiny_bench(0, tmp_path, architecture=name)
    assert issubclass(StandInError, MalmenError) and not list(tmp_path.iterdir())


# --- the stand-in that recalls at the subject


def test_statements_begin_with_their_subject_and_keep_their_answers():
    people, towns = invent_world(3, 20, 10)
    for facts in (people, towns):
        for fact, told in zip(facts, tell_statements(facts), strict=True):
            assert (told.answer, told.subject, told.relation) == (fact.answer, fact.subject, fact.relation)
            assert len(told.equivalent_prompts) == 3
            assert all(text.startswith(f"{fact.subject} ") for text in (told.prompt, *told.equivalent_prompts))
            assert "[Y]" not in told.prompt and told.prompt == told.prompt.strip()


def test_the_mask_shows_of_a_subject_only_its_last_token():
    facts = tell_statements(invent_world(0, 20, 5)[0])[:6]
    lm = tiny_model(small_config("gpt2-subjects"), word_tokenizer(words_of(facts)))
    batch = next(lm.batches([fact.pair for fact in facts], 6))
    mask = subject_mask(batch, [(0, 2)] * 6)
    length = batch.answer_mask.shape[1]
    assert mask.shape == (6, 1, length, length)
    seen = mask == 0
    for row in range(6):
        for here in range(length):
            wanted = {there for there in range(here + 1) if here < 2 or there > 0}
            assert set(seen[row, 0, here].nonzero()[:, 0].tolist()) == wanted


def test_a_bench_has_the_text_its_model_was_trained_on(small_world, tmp_path):
    bench = tiny_bench(0, tmp_path, progress=False, config=small_config("gpt2-subjects", evaluation=10))
    known = {f"{fact.prompt} {fact.answer}" for fact in bench.known_facts}
    assert known <= set(bench.corpus) and len(bench.corpus) == 4 * (len(bench.corpus) // 4)
    assert bench.provenance["architecture"] == "gpt2-subjects" and bench.provenance["config"]["masked"] == 0.75
