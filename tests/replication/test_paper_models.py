"""The paper's four models: sizes, layers, random weights, tokenizers, loading, and what a step costs."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from malmen_repro.editors import MALMEN, MEND, EditorConfig
from malmen_repro.facts import Fact, MalmenError
from malmen_repro.keys_and_gradients import capture
from malmen_repro.language_models import (
    FAMILIES,
    LanguageModel,
    ModelNotFoundError,
    check_model,
    family_of,
    match_layers,
)
from malmen_repro.methods.fine_tuning import fine_tuned_layers
from malmen_repro.methods.key_statistics import key_statistics
from malmen_repro.methods.memit import MEMIT, MEMITConfig, critical_layers, memit_layers
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.replication import paper_models
from malmen_repro.replication.paper_models import (
    HYPER_PARAMETERS,
    PAPER_MODELS,
    SPECIAL_TOKENS,
    Item,
    PaperModelError,
    PlannedRun,
    activation_memory,
    architecture,
    cached_tokens,
    cost,
    cost_table,
    edited_layers,
    find_model,
    hours,
    hyper_network_size,
    layer_operations,
    linear_sizes,
    memit_operations,
    needs_table,
    paper_model,
    passes,
    random_model,
    random_tokenizer,
    run_disk,
    run_hours,
    run_memory,
    scoring_operations,
    shapes_of,
    skeleton,
    statistics_operations,
    step_memory,
    step_operations,
    tuned_layers,
)
from malmen_repro.training import Block, TrainingConfig, cache_tokens, infer, make_optimizer, meta_gradient

NAMES = list(PAPER_MODELS)
SMALL = {
    "BERT-base": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "GPT-2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "T5-XL": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2},
    "GPT-J": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
}
TEXTS = ["Where was Ada Lovelace born? London", "Where was Alan Turing born? Maida Vale"]


@pytest.fixture(scope="module")
def skeletons():
    return {name: skeleton(name) for name in NAMES}


def small(name, **options):
    return random_model(name, dtype=torch.float32, vocab_size=400, texts=TEXTS, **SMALL[name], **options)


def pairs_for(name):
    if name == "BERT-base":
        return [("Ada was born in London", "SUPPORTS"), ("Alan was born in Rome, long ago", "REFUTES")]
    return [("Where was Ada born?", "London"), ("Where was Alan Turing born?", "Maida Vale")]


# --- the table


def test_the_paper_edits_four_models():
    assert NAMES == ["BERT-base", "GPT-2", "T5-XL", "GPT-J"]
    assert [about.figure for about in PAPER_MODELS.values()] == ["Fig. 4", "Fig. 5", "Fig. 6", "Fig. 7"]
    assert {about.family for about in PAPER_MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name, ends", list(zip(NAMES, [(4, 12), (6, 12), (8, 14), (5, 14)], strict=True)))
def test_numbers_of_facts_are_those_of_the_curves(name, ends):
    assert PAPER_MODELS[name].num_facts == tuple(2**k for k in range(ends[0], ends[1] + 1))


def test_data_sets():
    sets = {name: (about.facts, about.unrelated) for name, about in PAPER_MODELS.items()}
    assert sets.pop("BERT-base") == ("FEVER", "FEVER2")
    assert set(sets.values()) == {("zsRE", "NQ")}


@pytest.mark.parametrize("name, near", [("gpt2", "GPT-2"), ("gptj", "GPT-J"), ("Bert", "BERT-base"), ("t5xl", "T5-XL")])
def test_unknown_model_lists_near_misses(name, near):
    with pytest.raises(PaperModelError, match=f"did you mean.*{near}"):
        find_model(name)


def test_unknown_model_lists_all_if_nothing_is_near():
    with pytest.raises(PaperModelError, match="there are: BERT-base, GPT-2, T5-XL, GPT-J"):
        find_model("zzzzzzzz")


@pytest.mark.parametrize("function", [architecture, skeleton, random_model, paper_model, edited_layers, cost])
def test_every_function_refuses_an_unknown_model(function):
    with pytest.raises(PaperModelError):
        function("LLaMA")


def test_errors_are_the_packages():
    assert issubclass(PaperModelError, MalmenError) and issubclass(ModelNotFoundError, (MalmenError, OSError))


def test_hyper_parameters_are_those_of_the_papers_setting():
    configurations = {"EditorConfig": EditorConfig.paper(), "TrainingConfig": TrainingConfig.paper()}
    for value, configuration, field in HYPER_PARAMETERS.values():
        assert getattr(configurations[configuration], field) == value
    assert [value for value, *_ in HYPER_PARAMETERS.values()] == [1920, 2, 1e-6, 1e-5, 1, 1]


# --- skeletons


@pytest.mark.parametrize("name", NAMES)
def test_skeletons_have_the_published_size_and_no_memory(name, skeletons):
    model, about = skeletons[name], PAPER_MODELS[name]
    assert model.num_parameters() == about.parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {about.dtype}
    assert family_of(model) is FAMILIES[about.family]
    printed = float(about.size_in_paper[:-1]) * {"M": 1e6, "B": 1e9}[about.size_in_paper[-1]]
    assert about.parameters == pytest.approx(printed, rel=0.02)


def test_the_cased_bert_does_not_round_to_the_papers_size():
    assert skeleton("BERT-base", vocab_size=28996).num_parameters() == 108_311_810


def test_t5_has_an_output_embedding_of_its_own(skeletons):
    model = skeletons["T5-XL"]
    assert model.lm_head.weight is not model.shared.weight
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    assert not model.config.scale_decoder_outputs and model.config.is_gated_act


def test_fever_has_two_labels(skeletons):
    config = skeletons["BERT-base"].config
    assert config.label2id == {"REFUTES": 0, "SUPPORTS": 1} and config.num_labels == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_does_not_exist_is_refused(name):
    with pytest.raises(PaperModelError, match="no size 'n_layers_of_it'"):
        architecture(name, n_layers_of_it=3)


# --- layers


@pytest.mark.parametrize(
    "name, shape, layers",
    [
        ("BERT-base", (768, 3072), [f"bert.encoder.layer.{i}.output.dense" for i in range(6, 12)]),
        ("GPT-2", (768, 3072), [f"transformer.h.{i}.mlp.c_proj" for i in range(6, 12)]),
        (
            "T5-XL",
            (2048, 5120),
            [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(21, 24)]
            + [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(21, 24)],
        ),
        ("GPT-J", (4096, 16384), [f"transformer.h.{i}.mlp.fc_out" for i in range(22, 28)]),
    ],
)
def test_edited_layers(name, shape, layers, skeletons):
    assert shapes_of(edited_layers(name, skeletons[name])) == dict.fromkeys(layers, shape)


@pytest.mark.parametrize(
    "name, layers",
    [
        (
            "BERT-base",
            [f"bert.encoder.layer.{i}.{part}.dense" for i in (9, 10, 11) for part in ("intermediate", "output")],
        ),
        ("GPT-2", [f"transformer.h.{i}.mlp.{part}" for i in (9, 10, 11) for part in ("c_fc", "c_proj")]),
        (
            "T5-XL",
            [
                f"{stack}.block.{i}.layer.{k}.DenseReluDense.{part}"
                for stack, k in (("encoder", 1), ("decoder", 2))
                for i in (22, 23)
                for part in ("wi_0", "wi_1", "wo")
            ],
        ),
        ("GPT-J", ["transformer.h.21.mlp.fc_out"]),
    ],
)
def test_tuned_layers(name, layers, skeletons):
    assert list(tuned_layers(name, skeletons[name])) == layers


@pytest.mark.parametrize("name", NAMES)
def test_tuned_layers_are_those_of_the_fine_tuning_room(name, skeletons):
    assert list(match_layers(skeletons[name], *fine_tuned_layers(skeletons[name]))) == list(
        tuned_layers(name, skeletons[name])
    )


# --- random models and tokenizers


@pytest.mark.parametrize("name", NAMES)
def test_random_models_edit(name):
    lm = small(name)
    assert isinstance(lm, LanguageModel) and len(lm.tokenizer) == lm.model.config.vocab_size == 400
    pairs = lm.encode(pairs_for(name))
    batch = next(lm.batches(pairs))
    logits = lm.answer_logits(batch)
    classes = 2 if name == "BERT-base" else 400
    assert logits.shape == (len(batch.labels), classes) and logits.isfinite().all()
    for layer, tokens in capture(lm, batch).items():
        expected = sum(len(pair.prompt if layer.startswith("encoder.") else pair.answer) for pair in pairs)
        assert len(tokens.keys) == expected and tokens.value_gradients.any()


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_follow_the_seed_and_leave_the_generator_alone(name):
    state = torch.random.get_rng_state()
    one, same, other = (small(name, seed=seed).model.state_dict() for seed in (5, 5, 6))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["T5-XL", "GPT-J"])
def test_large_models_are_bfloat16_unless_told_otherwise(name):
    assert random_model(name, vocab_size=300, **SMALL[name]).dtype == torch.bfloat16
    assert small(name).dtype == torch.float32


def test_random_models_are_eval_and_frozen():
    lm = small("GPT-2")
    assert not lm.model.training and not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_as_many_layers_as_there_are():
    assert len(small("GPT-2").layers) == 2
    assert len(random_model("GPT-2", vocab_size=300, **SMALL["GPT-2"] | {"n_layer": 8}).layers) == 6
    assert len(small("T5-XL").layers) == 4


@pytest.mark.parametrize("model_type", list(SPECIAL_TOKENS))
@pytest.mark.parametrize("texts", [(), TEXTS])
def test_tokenizers_have_the_size_and_lose_nothing(model_type, texts):
    tokenizer = random_tokenizer(model_type, 1000, texts)
    assert len(tokenizer) == 1000 and sorted(tokenizer.get_vocab().values()) == list(range(1000))
    for text in (*TEXTS, "Zoë’s naïve 東京 ½"):
        ids = tokenizer(text)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert back == (text.lower() if model_type == "bert" else text)
    roles = SPECIAL_TOKENS[model_type]
    assert tokenizer.pad_token_id == 0 and {role: getattr(tokenizer, role) for role in roles} == roles


def test_texts_make_tokens_longer():
    short, long = (random_tokenizer("gpt2", 1000, texts)(TEXTS[0])["input_ids"] for texts in (TEXTS, ()))
    assert len(long) == len(TEXTS[0].encode()) > 4 * len(short)
    again = random_tokenizer("gpt2", 1000, TEXTS)
    assert again(TEXTS[0])["input_ids"] == short


def test_bert_and_t5_mark_the_ends():
    bert, t5 = (random_tokenizer(kind, 300) for kind in ("bert", "t5"))
    ids = bert("a")["input_ids"]
    assert (ids[0], ids[-1]) == (bert.cls_token_id, bert.sep_token_id)
    assert t5("a")["input_ids"][-1] == t5.eos_token_id == 1


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(PaperModelError, match="too small"):
        random_tokenizer("bert", 259)
    assert len(random_tokenizer("bert", 260)) == 260


# --- checkpoints (these tests are offline)


def test_an_unreachable_hub_is_said_at_once():
    with pytest.raises(ModelNotFoundError, match="EleutherAI/gpt-j-6b.*--random-weights"):
        paper_model("GPT-J")


@pytest.mark.parametrize(
    "name, says",
    [
        ("no such name", "no folder no such name, and no model on the hub can have that name$"),
        ("nobody/nothing-of-this-name", "'nobody/nothing-of-this-name' is not on this machine.*or go online$"),
        ("", "no config.json"),
    ],
)
def test_names_that_lead_nowhere(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=says):
        check_model(name)


def test_a_model_of_the_paper_that_is_out_of_reach_has_its_shapes():
    with pytest.raises(ModelNotFoundError, match="or go online; its shapes with random weights.*--random-weights$"):
        paper_model("T5-XL")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        paper_model("GPT-2", str(tmp_path))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that saves a small model and lets the table believe that it is the paper's."""

    def save(name):
        lm = small(name)
        lm.model.save_pretrained(tmp_path)
        lm.tokenizer.save_pretrained(tmp_path)
        monkeypatch.setitem(PAPER_MODELS, name, replace(PAPER_MODELS[name], parameters=lm.model.num_parameters()))
        return lm, str(tmp_path)

    return save


@pytest.mark.parametrize("name", NAMES)
def test_loading_from_a_folder(name, saved):
    lm, folder = saved(name)
    loaded = paper_model(name, folder, "cpu", torch.float32)
    assert loaded.shapes == lm.shapes
    batch, same = (next(model.batches(pairs_for(name))) for model in (lm, loaded))
    assert torch.equal(lm.answer_logits(batch), loaded.answer_logits(same))
    assert paper_model(name, folder, "cpu").dtype == PAPER_MODELS[name].dtype


def test_another_size_is_refused(tmp_path):
    lm = small("GPT-2")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PaperModelError, match="parameters, the paper's GPT-2 124,439,808"):
        paper_model("GPT-2", str(tmp_path), "cpu")


def test_a_head_at_random_is_refused_unless_asked_for(saved, tmp_path):
    from transformers import BertModel

    lm, folder = saved("BERT-base")
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    lm.tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(PaperModelError, match="classifier.*fine-tune"):
        paper_model("BERT-base", str(tmp_path / "bare"), "cpu")
    loaded = paper_model("BERT-base", str(tmp_path / "bare"), "cpu", new_head=True)
    assert loaded.model.config.label2id == {"REFUTES": 0, "SUPPORTS": 1}


def test_a_damaged_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        paper_model("GPT-2", str(tmp_path), "cpu")


# --- cost


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [8, 64])  # more tokens than the key size, and fewer
def test_step_memory_is_that_of_a_step(name, width):
    sizes = SMALL[name]
    inner = {"BERT-base": "intermediate_size", "GPT-2": "n_inner", "T5-XL": "d_ff", "GPT-J": "n_inner"}[name]
    lm = random_model(name, dtype=torch.float32, vocab_size=400, **sizes | {inner: width})
    editor = MALMEN(lm, EditorConfig(rank=3))
    pairs = lm.encode(pairs_for(name) * 8)
    optimizer = make_optimizer(editor, TrainingConfig())
    meta_gradient(editor, Block(pairs, pairs, pairs), TrainingConfig())
    optimizer.step()
    cached = cache_tokens(editor, pairs, 8)
    inferred = infer(editor, cached, 7)

    def weigh(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    assert step_memory(lm.shapes, {layer: len(tokens.keys) for layer, tokens in cached.items()}, editor.config) == {
        "hyper-network": weigh(editor.networks.state_dict().values()),
        "meta-gradient": weigh(parameter.grad for parameter in editor.parameters()),
        "Adam": weigh(tensor for state in optimizer.state.values() for tensor in state.values()),
        "cached tokens": weigh(tensor for pair in cached.values() for tensor in pair),
        "value differences": weigh(tensor for part in inferred.values() for tensor in part.outputs),
        "factors": weigh(part.factor.cholesky for part in inferred.values()),
        "shifts": 3 * weigh(part.shift for part in inferred.values()),
    }


def test_layers_of_one_shape_share_a_hyper_network():
    one, two = (hyper_network_size({f"layer {i}": (6, 8) for i in range(n)}, EditorConfig(rank=4)) for n in (1, 2))
    apart = hyper_network_size({"a": (6, 8), "b": (8, 6)}, EditorConfig(rank=4))
    assert two["parameters"] - one["parameters"] == 2 * (2 * 14 + 1)  # scale and offset of two blocks, eta and lambda
    assert apart["parameters"] == 2 * one["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_cost_grows_with_facts_and_not_for_editing(name):
    ms = PAPER_MODELS[name].num_facts
    costs = [cost(name, m) for m in (ms[0], ms[-1])]
    assert costs[0].training < costs[1].training and costs[0].editing == costs[1].editing
    assert cost(name) == costs[1]
    assert costs[0].parameters == PAPER_MODELS[name].parameters
    size = {torch.float32: 4, torch.bfloat16: 2}[PAPER_MODELS[name].dtype]
    assert costs[0].parts["language model"] == size * costs[0].parameters
    assert costs[1].training >= sum(costs[1].parts.values())


def test_cached_tokens_by_family():
    assert set(cost("BERT-base", 10, answer_tokens=5).tokens.values()) == {10}
    assert set(cost("GPT-2", 10, answer_tokens=5).tokens.values()) == {50}
    tokens = cost("T5-XL", 10, answer_tokens=5, prompt_tokens=7).tokens
    assert list(tokens.values()) == [70] * 3 + [50] * 3


def test_collecting_tokens_can_be_the_peak():
    long = cost("GPT-2", 4096, answer_tokens=400)
    assert long.training > sum(long.parts.values()) - long.parts["value differences"]
    assert long.training == max(
        sum(long.parts.values()),
        sum(long.parts[name] for name in ("language model", "hyper-network", "Adam")) + 2 * long.parts["cached tokens"],
    )


def test_the_table_has_a_row_a_model():
    lines = cost_table([cost(name) for name in NAMES]).splitlines()
    assert len(lines) == 6 and {line.count("|") for line in lines} == {13}
    assert [line.split("|")[1].strip() for line in lines[2:]] == NAMES
    assert all(math.isfinite(float(line.split("|")[-2])) for line in lines[2:])


def test_all_tokens_are_more(skeletons):
    assert cached_tokens("decoder", "x", 12, 4) == 4 and cached_tokens("decoder", "x", 12, 4, "all") == 15
    assert cached_tokens("encoder-classifier", "x", 12, 4, "all") == 12
    assert cached_tokens("encoder-decoder", "decoder.x", 12, 4, "all") == 4
    assert set(cost("GPT-J", 8192, which="all").tokens.values()) == {8192 * 15}


# --- operations


def counted():
    """PyTorch's counter. Without its table by module, whose hooks do not bear gradients taken by a module's output."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = SimpleNamespace(__enter__=lambda: None, __exit__=lambda: None, parents={"Global"})
    return counter


@pytest.mark.parametrize("method", ["MALMEN", "MEND"])
@pytest.mark.parametrize("count", [2, 30])
@pytest.mark.parametrize("name", NAMES)
def test_operations_of_a_step_are_those_that_are_counted(name, count, method):
    lm = small(name)
    lm.model.set_attn_implementation("eager")  # the counter does not know the fused attention of CPUs
    pairs = lm.encode(pairs_for(name)[:1]) * count
    editor = {"MALMEN": MALMEN, "MEND": MEND}[method](lm, EditorConfig(rank=5, blocks=3))
    with counted() as counter:
        meta_gradient(editor, Block(pairs, pairs, pairs), TrainingConfig())
    lengths = len(pairs[0].prompt), len(pairs[0].answer)
    found = step_operations(lm.model, [*lm.layers], count, *lengths, method, config=editor.config)
    assert sum(found.values()) - found["factors"] == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert (found["factors"] == 0) == (method == "MEND")


@pytest.mark.parametrize("name", ["GPT-2", "GPT-J"])
def test_operations_of_memit_are_those_that_are_counted(name):
    lm = random_model(name, dtype=torch.float32, vocab_size=400, **SMALL[name] | {"n_layer": 4})
    lm.model.set_attn_implementation("eager")
    lm = critical_layers(lm, (1, 2))
    target = TargetConfig(steps=3, stop_loss=0.0, prefix_lengths=(), essence="{}")  # a byte is a token here
    config = MEMITConfig(regularization=100.0, blocks=(1, 2), target=target)
    facts = [Fact(f"Who is Ada {i}?", "Bob", subject=f"Ada {i}") for i in range(4)]
    memit = MEMIT(lm, key_statistics(lm, [f"{i} and {i * i} are {i % 7}." for i in range(60)]), config)
    with counted() as counter:
        memit.edit(facts)
    (prompt, answer), subject = lm.encode([facts[0].pair])[0], len(lm.tokenizer("Ada 0")["input_ids"])
    found = memit_operations(lm.model, (1, 2), 4, len(prompt), len(answer), subject, config)
    assert sum(found.values()) - found["factors"] == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_memit_costs_more_with_more_facts_and_its_statistics_do_not(skeletons):
    model, blocks = skeletons["GPT-J"], (3, 4, 5, 6, 7, 8)
    assert memit_layers(model, blocks)[0] == "transformer.h.3.mlp.fc_out" and len(memit_layers(model, blocks)) == 6
    one, two = (memit_operations(model, blocks, m) for m in (1000, 2000))
    assert two["language model"] == 2 * one["language model"] and two["factors"] == one["factors"]
    assert 0.5 < hours(memit_operations(model, blocks, 10_000), model.dtype) / 7.44 < 1.5  # MEMIT, Appendix B.4
    moments = statistics_operations(model, blocks)["float32"]
    assert moments == paper_models.TEXTS * paper_models.TEXT_TOKENS * 6 * 2 * 16384**2


@pytest.mark.parametrize("name", NAMES)
def test_forward_pass_is_counted_exactly(name):
    lm = small(name)
    lm.model.set_attn_implementation("eager")
    pairs = lm.encode(pairs_for(name)[:1])
    with counted() as counter, torch.no_grad():
        lm.answer_logits(next(lm.batches(pairs)))
    found = passes(lm.model, [*lm.layers], len(pairs[0].prompt), len(pairs[0].answer))
    assert found["forward"] == counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_backward_stops_at_the_lowest_edited_layer(name, skeletons):
    found = passes(skeletons[name], list(edited_layers(name, skeletons[name])), 12, 4)
    assert 0 < found["backward"] < found["forward"] or name == "T5-XL"
    top = passes(skeletons[name], list(edited_layers(name, skeletons[name]))[-1:], 12, 4)
    assert top["backward"] < found["backward"] and top["forward"] == found["forward"]


def test_a_decoder_costs_about_twice_its_weights_a_token(skeletons):
    model = skeletons["GPT-J"]
    inner = model.num_parameters() - 2 * 50400 * 4096
    found = passes(model, list(edited_layers("GPT-J", model)), 13, 1)
    assert found["forward"] / 13 == pytest.approx(2 * inner, rel=0.1)


def test_linear_sizes_of_t5(skeletons):
    sizes = linear_sizes(skeletons["T5-XL"], 12, 4)
    assert sizes["encoder.block.0.layer.0.SelfAttention.q"] == (12, 2048, 2048)
    assert sizes["decoder.block.0.layer.1.EncDecAttention.k"] == (12, 2048, 2048)
    assert sizes["decoder.block.0.layer.1.EncDecAttention.q"] == (4, 2048, 2048)
    assert list(sizes)[-1] == "lm_head" and sizes["lm_head"] == (4, 2048, 32128)


def test_the_normal_equation_takes_the_smaller_side():
    dual, primal = (layer_operations(n, (6, 8), config=EditorConfig(rank=1, blocks=1)) for n in (4, 16))
    assert dual == {"float32": 14 * 4 * 14, "float64": 2 * 8 * 4**2 + 6 * 4 * 48, "factors": 4**3 / 3 + 4 * 16 * 6}
    assert primal["float64"] == 2 * 16 * 8**2 + 6 * 16 * 48 and primal["factors"] == 8**3 / 3 + 4 * 64 * 6
    assert layer_operations(4, (6, 8), "MEND", EditorConfig(rank=1, blocks=1)) == {"float32": 14 * 56 + 8 * 4 * 48}
    edit = layer_operations(4, (6, 8), config=EditorConfig(rank=1, blocks=1), training=False)
    assert edit["float32"] == 4 * 56 and edit["float64"] < dual["float64"] and edit["factors"] < dual["factors"]


def test_operations_grow_with_facts(skeletons):
    model = skeletons["GPT-2"]
    layers = list(edited_layers("GPT-2", model))
    few, many = (step_operations(model, layers, m) for m in (64, 128))
    assert many["language model"] == 2 * few["language model"] and many["float64"] > 2 * few["float64"]
    everything = step_operations(model, layers, 64, which="all")
    assert everything["language model"] == few["language model"] and everything["float32"] > few["float32"]
    small_m, large_m = (scoring_operations(model, layers, m) for m in (16, 256))
    assert small_m["language model"] == large_m["language model"]  # at least 256 facts are scored
    assert scoring_operations(model, layers, 64, method="FT")["float64"] == 0


# --- what each item needs


def test_hours_are_operations_over_speed():
    assert hours({"language model": 312e12 * 0.3 * 3600}, torch.bfloat16) == pytest.approx(1)
    assert hours({"float32": 19.5e12 * 0.3 * 3600}, torch.bfloat16) == pytest.approx(1)
    assert hours({"factors": 9.7e12 * 0.3 * 1800, "float64": 19.5e12 * 0.3 * 1800}, torch.float32) == pytest.approx(1)
    assert hours({}, torch.float32) == 0


def test_runs(skeletons):
    model, run = skeletons["GPT-2"], PlannedRun(512, steps=100)
    training, scoring = run_hours("GPT-2", run, model)
    assert training > 0 < scoring
    assert run_hours("GPT-2", replace(run, steps=200), model)[0] == pytest.approx(2 * training)
    tuned = PlannedRun(512, "FT")
    assert run_hours("GPT-2", tuned, model)[0] == 0 < run_hours("GPT-2", tuned, model)[1]
    assert run_disk("GPT-2", tuned) == run_disk("GPT-2", PlannedRun(512, "MEMIT")) == 0
    memit = PlannedRun(512, "MEMIT", critical=(1, 2, 3))
    training, scoring = run_hours("GPT-2", memit, model)
    assert training == 0 < scoring < run_hours("GPT-2", replace(memit, num_facts=1024), model)[1]
    assert run_disk("GPT-2", run) == 3 * run_disk("GPT-2", replace(run, seeds=1)) > 0
    assert run_disk("GPT-2", replace(run, rank=1, blocks=1)) < run_disk("GPT-2", run) / 100
    assert run_memory("GPT-2", run, model) > cost("GPT-2", 512).training
    assert run_hours("GPT-2", replace(run, layers="first"), model)[0] != training


def test_activations_grow_with_rows(skeletons):
    layers = list(edited_layers("GPT-J", skeletons["GPT-J"]))
    one, two = (activation_memory(skeletons["GPT-J"], layers, rows) for rows in (32, 64))
    assert two == pytest.approx(2 * one)
    assert activation_memory(skeletons["GPT-J"], layers[-1:], 64) < two


def test_needs_table(skeletons):
    trained = PlannedRun(8192, steps=30), PlannedRun(8192, "MEND", steps=30), PlannedRun(16384, steps=15)
    runs = (*trained, PlannedRun(64, "FT"))
    one = Item("scaling_gptj", "Fig. 7", "GPT-J", runs)
    two = Item("failures", "Tables 4 and 5", "GPT-J", (PlannedRun(8192, steps=30, seeds=1),))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in needs_table([one, two]).splitlines()]
    assert {len(line) for line in lines} == {11} and len(lines) == 5
    assert lines[2][1] == "`malmen-repro reproduce scaling_gptj --tier paper --data DIR`"
    assert lines[2][2:4] == ["GPT-J", "16,384"] and lines[2][6] == "9"
    assert lines[2][10] == "12.25 (section 5.1, A100)" and lines[2][8] == "–"
    assert lines[3][10] == "4.4 (Table 2, A40)" and lines[3][6] == "1"
    alone = [float(line[7]) for line in lines[2:4]]
    assert float(lines[4][7]) < sum(alone) + 1  # the editor of the second item is one of the first's
    with_memit = replace(one, runs=(*runs, PlannedRun(64, "MEMIT", critical=(3, 4))))
    line = [cell.strip() for cell in needs_table([with_memit]).splitlines()[2].split("|")[1:-1]]
    assert float(line[8]) > 0 and float(line[7]) == pytest.approx(alone[0] + float(line[8]), abs=0.11)
    assert float(line[5]) > float(lines[2][5]) and line[4] == lines[2][4]  # key statistics lie on disk


def test_public_names_are_there():
    assert {"PAPER_MODELS", "skeleton", "random_model", "paper_model", "cost"} <= set(paper_models.__all__)
