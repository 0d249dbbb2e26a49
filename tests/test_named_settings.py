"The two named trainings: what each is made of, what a plain rate may do, and what a training says of itself."

import math
import warnings
from dataclasses import asdict, fields, replace

import pytest
import torch

from malmen_repro import training
from malmen_repro.editors import MALMEN, MEND, Editor, EditorConfig, EditorError
from malmen_repro.evaluation import evaluate
from malmen_repro.facts import Fact
from malmen_repro.hypernetwork import HyperNetwork, HyperNetworkError, LowRankBlock, RunningMoments, rank_of
from malmen_repro.keys_and_gradients import KeysAndGradients
from malmen_repro.language_models import LanguageModelError
from malmen_repro.training import (
    LittleLearnedWarning,
    TrainingConfig,
    TrainingError,
    hold_out,
    make_optimizer,
    train,
    tune_learning_rate,
)
from tests.toy import toy_facts, toy_model

SWITCHES = ("plain_learning_rate", "normal_start", "pooled_moments")
A6 = {"rank": 1920, "blocks": 2, "learning_rate": 1e-6}
A6_TRAINING = {"meta_learning_rate": 1e-5, "locality_coefficient": 1.0, "max_meta_gradient_norm": 1.0}


# --- what the settings are


def test_the_papers_setting_is_appendix_a6_and_the_public_code():
    editing, steady = asdict(EditorConfig.paper()), asdict(TrainingConfig.paper())
    assert A6.items() <= editing.items() and A6_TRAINING.items() <= steady.items()
    assert all(editing[name] is True for name in SWITCHES)
    assert steady["scalar_learning_rate"] is None and not (steady["tuned_start"] or steady["decay"])
    assert steady["warmup"] == steady["held_out"] == steady["ramp_steps"] == 0


def test_the_default_is_tuned_and_has_none_of_the_switches():
    editing, tuned = EditorConfig(), TrainingConfig()
    assert not any(getattr(editing, name) for name in SWITCHES) and editing.rank is None
    assert tuned.tuned_start and tuned.decay and tuned.warmup and tuned.meta_learning_rate is None


@pytest.mark.parametrize("kind", [EditorConfig, TrainingConfig])
def test_the_papers_setting_takes_changes_and_refuses_what_it_does_not_know(kind):
    assert kind.paper(seed=3) == replace(kind.paper(), seed=3)
    with pytest.raises(TypeError):
        kind.paper(sead=3)
    with pytest.raises((EditorError, TrainingError), match="seed"):
        kind.paper(seed=-1)


def test_the_editors_of_the_paper_say_so():
    assert MALMEN.paper_config == MEND.paper_config == EditorConfig.paper()


@pytest.mark.parametrize("changes", [{"held_out": -1}, {"score_every": 0}])
def test_looks_have_rules(changes):
    with pytest.raises(TrainingError, match=next(iter(changes))):
        TrainingConfig(**changes)


def test_an_editors_own_setting_chooses_its_training(monkeypatch):
    asked = []
    noted = lambda editor, config: asked.append(config) or make_optimizer(editor, config)  # noqa: E731
    monkeypatch.setattr(training, "make_optimizer", noted)
    for config in (EditorConfig.paper(rank=4), EditorConfig(rank=4)):
        MALMEN(toy_model(), config).train(toy_facts(4), steps=0, progress=False)
    assert asked == [TrainingConfig.paper(steps=0), TrainingConfig(steps=0)]


# --- the rank and the rate follow the layer


@pytest.mark.parametrize(
    ("key_size", "value_size", "rank"), [(3072, 768, 960), (16384, 4096, 1920), (2, 1, 1), (4, 4, 2)]
)
def test_the_rank_is_a_quarter_of_the_width_and_at_most_the_papers(key_size, value_size, rank):
    assert rank_of(key_size, value_size) == rank
    with torch.device("meta"):
        network = HyperNetwork(key_size, value_size, 1)
    assert {block.down.shape for block in network.blocks} == {(rank, key_size + value_size)}


def test_each_network_has_its_rate_and_the_logarithms_theirs():
    lm = toy_model().with_layers("transformer.h.*.mlp.*")
    editor = MALMEN(lm, EditorConfig(rank=2))
    assert len(editor.networks) == 2
    groups = make_optimizer(editor, TrainingConfig()).param_groups
    for network, weights, logs in zip(editor.networks.values(), groups[::2], groups[1::2], strict=True):
        assert weights["lr"] == 4 / (network.key_size + network.value_size) and logs["lr"] == 2e-2
        assert {id(p) for p in logs["params"]} == {id(network.log_learning_rate), id(network.log_regularization)}
    together = {id(p) for group in groups for p in group["params"]}
    assert together == {id(p) for p in editor.parameters()}


def test_a_plain_rate_has_the_networks_rate_whatever_the_logarithms_have():
    editor = MALMEN(toy_model(), EditorConfig.paper(rank=2))
    weights, logs = make_optimizer(editor, TrainingConfig.paper(scalar_learning_rate=0.5)).param_groups
    (network,) = editor.networks.values()
    assert any(p is network.plain_learning_rate for p in weights["params"]) and weights["lr"] == 1e-5
    assert len(logs["params"]) == 1 and logs["params"][0] is network.log_regularization and logs["lr"] == 0.5


# --- the three switches


def test_a_normal_start_has_standard_deviation_one_and_xaviers_is_smaller():
    torch.manual_seed(0)
    normal, xavier = (LowRankBlock(300, 100, 1, normal_start=on).down.std().item() for on in (True, False))
    assert normal == pytest.approx(1, rel=0.05) and xavier == pytest.approx((2 / 400) ** 0.5, rel=0.05)


def test_pooled_moments_are_those_of_all_layers_together():
    torch.manual_seed(0)
    pooled, own = (HyperNetwork(3, 2, layers=2, rank=1, pooled_moments=on) for on in (True, False))
    parts = [KeysAndGradients(torch.randn(20, 3) * (1 + i), torch.randn(20, 2) + i) for i in range(2)]
    for i, part in enumerate(parts):
        pooled.update(part, i)
        own.update(part, i)
    whole = RunningMoments(1, 3)
    whole.update(torch.cat([part.keys for part in parts]), 0)
    torch.testing.assert_close(pooled.keys.mean, whole.mean)
    torch.testing.assert_close(pooled.keys.scale(0), whole.scale(0))
    for i, part in enumerate(parts):
        keys, _ = pooled(part, i)
        torch.testing.assert_close(keys, whole(part.keys, 0))
        assert not torch.allclose(keys, own(part, i)[0])


@pytest.mark.parametrize("plain", [True, False])
def test_a_rate_starts_where_it_is_set(plain):
    network = HyperNetwork(3, 2, layers=3, rank=1, learning_rate=0.25, plain_learning_rate=plain)
    assert [network.eta(i).item() for i in range(3)] == pytest.approx([0.25] * 3)
    network.start_at(3.0)
    assert [network.eta(i).item() for i in range(3)] == pytest.approx([3.0] * 3)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(HyperNetworkError, match="learning_rate"):
            network.start_at(wrong)
    names = dict(network.named_parameters())
    assert ("plain_learning_rate" in names, "log_learning_rate" in names) == (plain, not plain)


@pytest.mark.parametrize("kind", [MEND, MALMEN])
def test_a_negative_rate_turns_the_shift_around_and_nothing_breaks(kind):
    lm, facts = toy_model(), toy_facts(6)
    editor = kind(lm, EditorConfig.paper(rank=4, learning_rate=0.1))
    editor.observe(facts)
    there = editor.edit(facts)
    for network in editor.networks.values():
        network.plain_learning_rate.data.neg_()
    back = editor.edit(facts)
    for name in there.shifts:
        torch.testing.assert_close(back.shifts[name], -there.shifts[name])


def test_a_plain_rate_below_zero_comes_back_and_is_named_if_it_does_not():
    lm, facts = toy_model(), toy_facts(6)
    editor = MALMEN(lm, EditorConfig.paper(rank=4))
    for network in editor.networks.values():
        network.plain_learning_rate.data.fill_(-1e-5)
    options = {"num_facts": 6, "progress": False}
    with pytest.warns(LittleLearnedWarning, match=rf"below zero at {next(iter(lm.layers))}"):
        train(editor, facts, TrainingConfig.paper(steps=0), **options)
    train(editor, facts, TrainingConfig.paper(steps=60), **options)
    assert all(editor.learning_rate(layer) > 0 for layer in lm.layers)


@pytest.mark.filterwarnings("ignore:the editor's eta is below zero")
@pytest.mark.parametrize("config", [EditorConfig.paper(rank=3), EditorConfig()])
def test_an_editor_of_either_setting_survives_saving(tmp_path, config):
    lm, facts = toy_model(), toy_facts(6)
    editor = MALMEN(lm, config)
    editor.train(facts, steps=2, num_facts=3, progress=False)
    editor.save_pretrained(tmp_path / "editor")
    again = Editor.from_pretrained(tmp_path / "editor", lm)
    assert again.config == config
    for name, shift in editor.edit(facts).shifts.items():
        assert torch.equal(again.edit(facts).shifts[name], shift)


def test_a_described_rank_must_be_the_weights_own(tmp_path):
    lm = toy_model()
    editor = MALMEN(lm, EditorConfig(rank=5))
    editor.observe(toy_facts(4))
    editor.config = EditorConfig()  # says a quarter of the width
    editor.save_pretrained(tmp_path / "editor")
    with pytest.raises(EditorError, match="rank"):
        MALMEN.from_pretrained(tmp_path / "editor", lm)


@pytest.mark.parametrize("plain", [True, False])
def test_tuning_sets_either_rate(plain):
    editor = MALMEN(toy_model(), EditorConfig(rank=3, plain_learning_rate=plain))
    best = tune_learning_rate(editor, toy_facts(6), num_facts=6, candidates=(1e-4, 1e-2))
    assert all(editor.learning_rate(layer).item() == pytest.approx(best) for layer in editor.lm.layers)


@pytest.mark.filterwarnings("ignore:the editor's eta is below zero")
def test_an_epoch_of_the_papers_moves_a_plain_rate_and_no_logarithm():
    "15 steps at 1e-5: 244,173 facts in blocks of 16,384."
    ends = {}
    for plain in (True, False):
        editor = MALMEN(toy_model(), EditorConfig(rank=4, plain_learning_rate=plain))
        train(editor, toy_facts(6), TrainingConfig.paper(steps=15, num_facts=6), progress=False)
        ends[plain] = max(editor.learning_rate(layer).item() for layer in editor.lm.layers)
    assert ends[True] > 5e-5 and ends[False] == pytest.approx(1e-6, rel=2e-4)


@pytest.mark.filterwarnings("ignore:the editor's eta is below zero")
@pytest.mark.parametrize("config", [EditorConfig(rank=3), EditorConfig(rank=3, plain_learning_rate=True)])
def test_a_second_training_keeps_the_rates_that_were_learned(config):
    editor = MALMEN(toy_model(), config)
    options = {"num_facts": 6, "warmup": 0, "scalar_learning_rate": 0.1, "meta_learning_rate": 0.01}
    train(editor, toy_facts(6), TrainingConfig(steps=2, **options), progress=False)
    learned = [editor.learning_rate(layer).item() for layer in editor.lm.layers]
    train(editor, toy_facts(6), TrainingConfig(steps=0, **options), progress=False)
    assert [editor.learning_rate(layer).item() for layer in editor.lm.layers] == learned


# --- facts kept from training


@pytest.mark.parametrize(
    ("total", "m", "asked", "kept"),
    [
        *((100, 64, None, 10), (1000, 64, None, 64), (1000, 64, 30, 30), (1000, 64, 0, 0), (70, 64, None, 6)),
        *((64, 64, None, 0), (9, 3, None, 0), (100, 200, None, 0), (1000, 64, 500, 100)),
    ],
)
def test_how_many_facts_are_kept(total, m, asked, kept):
    facts = [Fact(f"{i} is", "so") for i in range(total)]
    taught, held = hold_out(facts, TrainingConfig(num_facts=m, held_out=asked))
    assert len(held) == kept and len(taught) == total - kept
    assert [fact for fact in facts if fact in taught or fact in held] == facts


def test_which_facts_are_kept_depends_on_the_seed_alone():
    facts = [Fact(f"{i} is", "so") for i in range(300)]
    asked = ({"seed": 0}, {"seed": 0, "steps": 9}, {"seed": 1})
    one, same, other = (hold_out(facts, TrainingConfig(**changes))[1] for changes in asked)
    assert one == same != other


def test_nothing_is_held_out_of_the_papers_training():
    facts = [Fact(f"{i} is", "so") for i in range(300)]
    assert hold_out(facts, TrainingConfig.paper()) == (facts, [])


def test_a_held_out_fact_that_cannot_be_read_is_found_before_training(monkeypatch):
    facts = toy_facts(40)
    _, kept = hold_out(facts, TrainingConfig(num_facts=8, held_out=4))
    facts[facts.index(kept[0])] = replace(kept[0], equivalent_prompts=("who " * 5000,))
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(LanguageModelError):
        MALMEN(toy_model(), EditorConfig(rank=3)).train(facts, steps=1, num_facts=8, held_out=4, progress=False)


LOOKS = {"decay": False, "num_facts": 8, "held_out": 4, "score_every": 2, "steps": 5, "progress": False}


def look(tmp_path=None, steps=5, editor=None):
    editor = editor or MALMEN(toy_model(), EditorConfig(rank=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LittleLearnedWarning)
        return editor, editor.train(toy_facts(40), checkpoint=tmp_path, **LOOKS | {"steps": steps})


def test_looks_come_every_few_steps_and_after_the_last():
    _, history = look()
    assert [record["step"] + 1 for record in history if "ES" in record] == [2, 4, 5]
    assert all({"ES", "GS", "ES before", "eta"} <= record.keys() for record in history if "ES" in record)


def test_a_look_is_what_an_edit_of_these_facts_scores():
    editor, history = look()
    _, kept = hold_out(toy_facts(40), TrainingConfig(num_facts=8, held_out=4))
    scores = evaluate(editor.lm, kept, editor.edit(kept))
    for name in ("ES", "GS", "ES before"):
        assert history[-1][name] == pytest.approx(scores.mean(name))
    rates = [editor.learning_rate(layer).item() for layer in editor.lm.layers]
    assert history[-1]["eta"] == pytest.approx(sum(rates) / len(rates))


def test_looking_changes_nothing_and_going_on_sees_the_same(tmp_path):
    editor, history = look()
    blind = MALMEN(toy_model(), EditorConfig(rank=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LittleLearnedWarning)
        blind.train(toy_facts(40), **LOOKS | {"score_every": 5})
    assert all(torch.equal(a, b) for a, b in zip(editor.parameters(), blind.parameters(), strict=True))
    with pytest.raises(training.TrainingError, match="score_every"):  # another run's checkpoint
        blind.train(toy_facts(40), checkpoint=tmp_path / "c.pt", **LOOKS | {"steps": 2})
        blind.train(toy_facts(40), checkpoint=tmp_path / "c.pt", **LOOKS | {"steps": 2, "score_every": 1})


def test_a_run_that_goes_on_ends_with_the_same_looks(tmp_path):
    whole, history = look()
    look(tmp_path / "c.pt", steps=2)
    again, second = look(tmp_path / "c.pt")
    strip = lambda records: [{n: v for n, v in r.items() if n != "seconds"} for r in records]  # noqa: E731
    assert strip(second)[2:] == strip(history)[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_facts_without_phrasings_have_no_gs():
    bare = [replace(fact, equivalent_prompts=()) for fact in toy_facts(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LittleLearnedWarning)
        history = MALMEN(toy_model(), EditorConfig(rank=3)).train(bare, **LOOKS)
    assert "ES" in history[-1] and "GS" not in history[-1]


def test_an_editor_that_leaves_the_scores_where_they_were_says_so():
    editor = MALMEN(toy_model(), EditorConfig.paper(rank=3))
    with pytest.warns(LittleLearnedWarning, match=r"ES on 8 held-out facts is .*; train for more steps"):
        editor.train(toy_facts(80), steps=1, num_facts=8, held_out=8, progress=False)


@pytest.mark.parametrize(("total", "gain"), [(80, 0.0501), (79, 0.0)])  # 7 facts are too few to judge by
def test_an_editor_that_edits_says_nothing(monkeypatch, total, gain):
    scores = {"ES": 0.45 + gain, "GS": 0.4, "ES before": 0.45, "eta": 1.0}
    monkeypatch.setattr(training.Watch, "scores", lambda self: scores)
    editor = MALMEN(toy_model(), EditorConfig(rank=3))
    editor.train(toy_facts(total), steps=1, num_facts=8, progress=False)


def test_the_bar_shows_the_last_scores():
    history = [{"generalization": 1.0, "locality": 0.5, "ES": 0.25}, {"generalization": 0.5, "locality": 0.25}]
    assert training._shown(history[1:]) == "gen=0.500, loc=0.250"
    assert training._shown(history) == "gen=0.500, loc=0.250, ES=0.25"


def test_every_field_has_an_option_of_train():
    from malmen_repro import cli

    args = vars(cli.parser().parse_args("train --model m --facts f --out o".split()))
    names = {field.name for kind in (EditorConfig, TrainingConfig) for field in fields(kind)} - {"lm_batch_size"}
    assert names <= args.keys() and "batch_size" in args
    assert {name for name in names if args[name] is not None} == {"num_facts", "seed"}
