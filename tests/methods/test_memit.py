"MEMIT and ROME: the closed forms against dense least squares, the spread against a plain loop."

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch

from malmen_repro.facts import ConflictingFactsError, NoFactsError
from malmen_repro.language_models import LayerPatternError
from malmen_repro.methods.key_statistics import KeyStatistics, KeyStatisticsMismatchError, key_statistics
from malmen_repro.methods.memit import (
    MEMIT,
    MEMIT_CODE,
    MEMIT_TEXT,
    ROME,
    ROME_CODE,
    ROME_TEXT,
    MEMITConfig,
    MemorySums,
    SubjectRows,
    at_subjects,
    critical_layers,
    mean_keys,
    memory_update,
    rank_one_update,
)
from malmen_repro.methods.target_vectors import SubjectError, TargetConfig, Targets, random_prefixes
from malmen_repro.normal_equation import SingularGramError
from malmen_repro.protocol import EditorError
from malmen_repro.weight_shifts import WeightShift
from tests.methods.test_target_vectors import DECODERS, QUICK
from tests.toy import toy_classifier, toy_corpus, toy_model
from tests.toy import toy_facts as facts

TEXTS = toy_corpus()
LOWER = "transformer.h.[01].mlp.c_proj"  # above block 2 there is no attention that could read a subject
CONFIG = MEMITConfig(regularization=2.0, target=QUICK)


def editor(lm=None, config=CONFIG):
    lm = lm or toy_model(layers=LOWER, last=None)
    return MEMIT(lm, key_statistics(lm, TEXTS), config)


# --- one layer


def problem(n=30, d=24, v=8, old=100, seed=0):
    torch.manual_seed(seed)
    return torch.randn(old, d).double(), torch.randn(n, d).double(), torch.randn(n, v).double()


@pytest.mark.parametrize("n", [1, 5, 24, 200])
def test_the_update_is_the_dense_least_squares_solution(n):
    old, keys, residuals = problem(n)
    stacked = torch.cat([old, keys]), torch.cat([torch.zeros(len(old), 8).double(), residuals])
    dense = torch.linalg.lstsq(*stacked).solution.T
    assert (memory_update(keys, residuals, old.T @ old) - dense).abs().max() < 1e-8


def test_without_old_keys_it_is_ordinary_least_squares():
    _, keys, residuals = problem(60)
    ordinary = torch.linalg.lstsq(keys, residuals).solution.T
    assert (memory_update(keys, residuals, 1e-13 * torch.eye(24).double()) - ordinary).abs().max() < 1e-8
    assert (memory_update(keys, residuals, torch.zeros(24, 24)) - ordinary).abs().max() < 1e-8


def test_the_sums_do_not_feel_the_cuts():
    old, keys, residuals = problem(50)
    sums = MemorySums(24, 8)
    for part in torch.arange(50).split(7):
        sums.add(keys[part], residuals[part])
    assert sums.facts == 50
    torch.testing.assert_close(sums.solve(old.T @ old), memory_update(keys, residuals, old.T @ old), rtol=0, atol=1e-12)


def test_too_few_keys_and_no_old_ones():
    _, keys, residuals = problem(5)
    with pytest.raises(SingularGramError) as error:
        memory_update(keys, residuals, torch.zeros(24, 24))
    assert error.value.n == 5 and error.value.d == 24 and error.value.condition > 1e13


def test_float32_keys_are_solved_in_float64():
    old, keys, residuals = problem()
    update = memory_update(keys.float(), residuals.float(), (old.T @ old).float())
    assert update.dtype == torch.float64
    torch.testing.assert_close(update, memory_update(keys, residuals, old.T @ old), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_romes_update_is_exact_at_its_key_and_the_limit_of_memits(seed):
    old, keys, residuals = problem(seed=seed)
    moment = old.T @ old / len(old)
    update = rank_one_update(keys[0], residuals[0], torch.linalg.cholesky(moment))
    assert (update @ keys[0] - residuals[0]).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(update) == 1
    limit = memory_update(keys[:1], residuals[:1], 1e-6 * moment)
    assert (limit - update).abs().max() < 1e-6
    # Among all weights that are exact at the key, it disturbs the old keys least.
    other = update + torch.outer(torch.randn(8).double(), keys[1] - keys[0] * (keys[0] @ keys[1]) / (keys[0] @ keys[0]))
    assert (old @ update.T).norm() < (old @ other.T).norm()


# --- many layers


def plain_memit(lm, some, targets, statistics, config):
    "Algorithm 1, lines 5 to 15, on a copy whose weights are changed, a text at a time."
    own = type(lm)(copy.deepcopy(lm.model), lm.tokenizer, lm.pattern, lm.last)
    prefixes = random_prefixes(lm, config.target.prefix_lengths, config.target.seed)
    names, shifts = list(own.layers), {}

    def state(text, module, which):
        seen = {}
        handle = own.model.get_submodule(module).register_forward_hook(
            lambda _m, args, output: seen.update({0: args[0], 1: output[0] if isinstance(output, tuple) else output})
        )
        with torch.no_grad():
            own.model(input_ids=torch.tensor([own.tokenizer(text)["input_ids"]]))
        handle.remove()
        return seen[which][0, -1].double()

    for i, name in enumerate(names):
        keys, residuals = [], []
        for fact, z in zip(some, targets.z, strict=True):
            upto = fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)]
            said = fact.subject if config.keys == "subject" else upto
            texts = [said, *(f"{prefix} {said}" for prefix in prefixes[1:])]
            bare, *behind = (state(text, name, 0) for text in texts)
            if config.key_weights == "equal" or not behind:
                keys.append(torch.stack([bare, *behind]).mean(0))
            else:
                keys.append(0.5 * bare + sum(0.5 / len(behind) * key for key in behind))
            residuals.append((z.double() - state(upto, targets.block, 1)) / (len(names) - i))
        shift = memory_update(
            torch.stack(keys), torch.stack(residuals), config.regularization * statistics.second_moments[name]
        )
        shifts[name] = shift
        WeightShift({name: shift}).merge_into(own)
    return shifts


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("keys", ["subject", "prompt"])
@pytest.mark.parametrize(("prefixes", "weights"), [((), "equal"), ((2, 3), "equal"), ((2, 3), "half bare")])
def test_the_spread_is_algorithm_1(kind, keys, prefixes, weights):
    lm = DECODERS[kind](torch.float64)
    target = replace(QUICK, prefix_lengths=prefixes, steps=2)
    config = replace(CONFIG, keys=keys, key_weights=weights, target=target)
    some = [replace(f, prompt=f"w7 {f.prompt}") for f in facts(6)]  # something in front of the subject
    memit = MEMIT(lm, key_statistics(lm, TEXTS), config)
    targets = memit.targets(some)
    shift = memit.edit(some, targets=targets)
    wanted = plain_memit(lm, some, targets, memit.statistics, config)
    assert list(shift.shifts) == list(wanted)
    for name, matrix in wanted.items():
        torch.testing.assert_close(shift.shifts[name], matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_makes_no_difference(batch_size):
    config = replace(CONFIG, target=replace(QUICK, prefix_lengths=(2,)))
    memit = editor(toy_model(torch.float64, layers=LOWER, last=None), config)
    some = facts(9)
    wanted, found = memit.edit(some, batch_size=200), memit.edit(some, batch_size=batch_size)
    for name, shift in wanted.shifts.items():
        torch.testing.assert_close(found.shifts[name], shift, rtol=1e-4, atol=1e-6)


def test_five_prefixes_weigh_a_tenth_each_and_the_bare_prompt_a_half():
    torch.manual_seed(0)
    rows = torch.randn(4 * 6, 24).double()
    by_fact = rows.view(4, 6, 24)
    tenths = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).double()
    torch.testing.assert_close(mean_keys(rows, 6, "half bare"), torch.einsum("fpd,p->fd", by_fact, tenths))
    assert torch.equal(mean_keys(rows, 6, "equal"), by_fact.mean(1))
    assert torch.equal(mean_keys(rows, 1, "half bare"), rows)


def test_without_prefixes_the_weights_make_no_difference():
    some = facts(5)
    one, other = (editor(config=replace(CONFIG, key_weights=how)).edit(some) for how in ("equal", "half bare"))
    assert all(torch.equal(one.shifts[name], other.shifts[name]) for name in one.shifts)


def test_with_few_facts_and_a_small_lambda_the_targets_arrive():
    memit = editor(config=replace(CONFIG, regularization=1e-4, keys="prompt"))
    some = facts(5)
    targets = memit.targets(some)
    rows = SubjectRows(memit.lm, some, [""], memit.config)
    with memit.edit(some, targets=targets).applied(memit.lm):
        states = at_subjects(memit.lm, rows.prompts, targets.block, 1, 64)
    missed = (targets.z - states).norm() / (targets.z - targets.hidden).norm()
    assert missed < 0.1


def test_one_layer_and_a_small_lambda_are_ordinary_least_squares():
    lm = toy_model(torch.float64, last=1)
    memit = editor(lm, MEMITConfig(1e-12, keys="prompt", target=QUICK))
    some = facts(40)  # more facts than the layer's 24 inputs
    targets = memit.targets(some)
    rows = SubjectRows(lm, some, [""], memit.config)
    keys = at_subjects(lm, rows.keys, next(iter(lm.layers)), 0, 64)
    ordinary = torch.linalg.lstsq(keys, targets.z - targets.hidden).solution.T
    (shift,) = memit.edit(some, targets=targets).shifts.values()
    torch.testing.assert_close(shift, ordinary, rtol=1e-4, atol=1e-6)


def test_the_edit_helps_and_the_model_stays_as_it_is():
    target = replace(QUICK, steps=40, weight_decay=0.0, clamp=5.0)
    memit = editor(config=replace(CONFIG, regularization=0.01, keys="prompt", target=target))
    some, before = facts(6), copy.deepcopy(memit.lm.model.state_dict())

    def loss():
        batch = next(memit.lm.batches([fact.pair for fact in some], 6))
        return torch.nn.functional.cross_entropy(memit.lm.answer_logits(batch), batch.labels).item()

    plain = loss()
    shift = memit.edit(some)
    with shift.applied(memit.lm):
        assert loss() < 0.96 * plain
    assert loss() == plain and shift.metadata["method"] == "MEMIT" and shift.metadata["facts"] == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in memit.lm.model.state_dict().items())
    assert not any(module._forward_hooks for module in memit.lm.model.modules())


# --- ROME


def test_rome_is_one_exact_fact_after_another():
    lm = toy_model(torch.float64, layers="transformer.h.1.mlp.c_proj", last=None)
    config = MEMITConfig(keys="prompt", target=QUICK)
    rome, some = ROME(lm, key_statistics(lm, TEXTS), config), facts(3)
    total = rome.edit(some[:2])
    with total.applied(lm):
        third = rome.edit(some[2:])
    both = rome.edit(some)
    assert torch.linalg.matrix_rank(rome.edit(some[:1]).shifts[rome.layer]) == 1
    torch.testing.assert_close((total + third).shifts[rome.layer], both.shifts[rome.layer], rtol=1e-3, atol=1e-5)
    # The last fact's target is met exactly.
    with total.applied(lm):
        target = rome.memit.targets(some[2:])
    rows = SubjectRows(lm, some[2:], [""], config)
    with both.applied(lm):
        states = at_subjects(lm, rows.prompts, "transformer.h.1", 1, 8)
    torch.testing.assert_close(states, target.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", ["subject", "prompt"])
@pytest.mark.parametrize("weights", ["equal", "half bare"])
@pytest.mark.parametrize("divisor", ["mean key", "bare prompt"])
def test_rome_is_exact_at_the_key_it_divides_by(divisor, weights, keys):
    lm = toy_model(torch.float64, layers="transformer.h.1.mlp.c_proj", last=None)
    (name,), target = lm.layers, replace(QUICK, prefix_lengths=(2, 3))
    config = MEMITConfig(keys=keys, key_weights=weights, rome_divisor=divisor, target=target)
    statistics, (fact,) = key_statistics(lm, TEXTS), [replace(facts(1)[0], prompt=f"w7 {facts(1)[0].prompt}")]
    rome = ROME(lm, statistics, config)
    (shift,) = rome.edit([fact]).shifts.values()
    rows, found = SubjectRows(lm, [fact], rome.memit.prefixes(), config), rome.memit.targets([fact])
    (key,) = mean_keys(at_subjects(lm, rows.keys, name, 0, 8), 3, weights)
    (bare,) = at_subjects(lm, rows.prompts, name, 0, 8)
    at, residual = key if divisor == "mean key" else bare, (found.z - found.hidden)[0]
    u = torch.linalg.solve(statistics.second_moments[name], key)
    torch.testing.assert_close(shift, torch.outer(residual, u) / (at @ u), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(shift @ at, residual, rtol=1e-8, atol=1e-10)
    other = bare if divisor == "mean key" else key
    assert not torch.allclose(shift @ other, residual, rtol=1e-2)


def test_without_prefixes_rome_divides_by_the_prompts_key_either_way():
    lm = toy_model(torch.float64, layers="transformer.h.1.mlp.c_proj", last=None)
    statistics, both = key_statistics(lm, TEXTS), []
    for divisor in ("mean key", "bare prompt"):
        config = MEMITConfig(keys="prompt", rome_divisor=divisor, target=QUICK)
        both.append(ROME(lm, statistics, config).edit(facts(2)).shifts[next(iter(lm.layers))])
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shifts_are_as_fine_as_the_model(dtype):
    lm = toy_model(dtype, layers="transformer.h.1.mlp.c_proj", last=None)
    statistics, some = key_statistics(lm, TEXTS), facts(2)
    for kind in (MEMIT, ROME):
        (shift,) = kind(lm, statistics, CONFIG).edit(some).shifts.values()
        assert shift.dtype == torch.promote_types(dtype, torch.float32)
        assert (shift.double() != shift.float().double()).any() == (dtype == torch.float64)


def test_rome_wants_one_layer_and_a_covariance_of_full_rank():
    lm = toy_model(last=2)
    with pytest.raises(EditorError, match="one layer, and the model is wrapped with 2"):
        ROME(lm, key_statistics(lm, TEXTS))
    lm = toy_model(last=1)
    with pytest.raises(SingularGramError):
        ROME(lm, key_statistics(lm, TEXTS[:1]))


def test_rome_by_default_has_its_own_numbers():
    lm = toy_model(last=1)
    config = ROME(lm, key_statistics(lm, TEXTS)).config
    for target, clamp in ((config.target, 4), (ROME_TEXT.target, 0), (ROME_CODE.target, 4)):
        assert (target.steps, target.clamp, target.weight_decay, target.kl_factor) == (20, clamp, 0.5, 0.0625)
        assert target.prefix_lengths == (5,) * 10 + (10,) * 10
    assert (config.rome_divisor, config.keys) == ("mean key", "subject") == (ROME_TEXT.rome_divisor, ROME_TEXT.keys)
    assert (ROME_CODE.rome_divisor, ROME_CODE.keys) == ("bare prompt", "prompt")


# --- what can go wrong


def test_the_defaults_are_the_papers():
    config = MEMITConfig()
    assert config.regularization == 15_000 and config.target.clamp == 0.75 and config.target.steps == 25
    assert MEMITConfig(**{**asdict(config), "target": asdict(config.target)}) == config


def forms(config):
    "How the terms of the search for a target are measured."
    target = config.target
    return target.answer_loss, target.decay_on, target.kl_direction, target.kl_at


def test_the_text_the_code_and_the_paper_tier_have_names():
    text, of_code = ("sum", "squared length", "before || after", "end"), ("length", "after || before", "subject")
    assert MEMITConfig() == MEMIT_TEXT and forms(MEMIT_TEXT) == forms(ROME_TEXT) == text
    assert forms(MEMIT_CODE) == ("token mean", *of_code) and MEMIT_CODE.target.steps == 24
    assert (MEMIT_CODE.keys, MEMIT_CODE.key_weights) == ("prompt", "half bare")
    assert MEMIT_CODE.target.prefix_lengths == (10,) * 5
    # The text where it speaks, which it does of everything else.
    papers = replace(MEMIT_TEXT.target, **dict(zip(("decay_on", "kl_direction", "kl_at"), of_code, strict=True)))
    assert MEMIT.paper_config == replace(MEMIT_TEXT, target=papers)
    assert ROME.paper_config == replace(MEMIT_TEXT, target=replace(papers, steps=20, clamp=4.0))
    lm = toy_model(layers=LOWER, last=None)
    assert MEMIT(lm, key_statistics(lm, TEXTS)).config == MEMIT.paper_config


def test_statistics_of_other_layers_are_refused():
    lm = toy_model(last=1)
    with pytest.raises(KeyStatisticsMismatchError):
        MEMIT(toy_model(last=2), key_statistics(lm, TEXTS))
    with pytest.raises(KeyStatisticsMismatchError):
        MEMIT(toy_model(last=1, seed=3), key_statistics(lm, TEXTS))


def test_other_families_are_refused():
    with pytest.raises(EditorError, match="MEMIT edits decoders"):
        MEMIT(toy_classifier(), KeyStatistics({}, 1))


@pytest.mark.parametrize(
    ("some", "error"),
    [
        ([], NoFactsError),
        (lambda: [facts(1)[0], replace(facts(1)[0], answer="w59")], ConflictingFactsError),
        (lambda: [replace(fact, subject=None) for fact in facts(2)], SubjectError),
    ],
)
def test_facts_that_cannot_be_edited(some, error):
    with pytest.raises(error):
        editor().edit(some() if callable(some) else some)


WRONG = [{"regularization": -1.0}, {"regularization": math.inf}, {"keys": "all"}]
WRONG += [{"key_weights": "half"}, {"rome_divisor": "k"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_out_of_range(wrong):
    with pytest.raises(EditorError, match=next(iter(wrong))):
        MEMITConfig(**wrong)


def test_critical_layers_by_number():
    lm = critical_layers(toy_model(), [2, 0])
    assert list(lm.layers) == ["transformer.h.0.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    with pytest.raises(LayerPatternError):
        critical_layers(toy_model(), [7])


def test_targets_found_before_are_used():
    memit, some = editor(), facts(3)
    targets = memit.targets(some)
    still = Targets(targets.block, targets.hidden, targets.hidden, targets.losses)
    assert all(shift.abs().max() < 1e-6 for shift in memit.edit(some, targets=still).shifts.values())


def test_a_config_from_a_record():
    target = {**asdict(TargetConfig()), "prefix_lengths": [2, 3]}
    assert MEMITConfig(target=target).target.prefix_lengths == (2, 3)
