"""The whole walk on the tiny tier's decoder: train MALMEN, edit sixteen facts at once, score, ask, switch off."""

from malmen_repro.editors import MALMEN, EditorConfig
from malmen_repro.evaluation import evaluate
from malmen_repro.replication.stand_ins import tiny_bench


def says(lm, fact):
    "The model's own words."
    question = lm.tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
    length = len(lm.tokenizer(fact.answer)["input_ids"])
    tokens = lm.model.generate(question, max_new_tokens=length, do_sample=False)[0, question.shape[1] :]
    return lm.tokenizer.decode(tokens)


def test_sixteen_facts_are_edited_asked_for_and_switched_off():
    bench = tiny_bench(seed=0, progress=False)
    lm, facts = bench.lm, bench.eval_facts["world"][:16]
    editor = MALMEN(lm, EditorConfig(rank=256))
    editor.train(
        bench.train_facts, num_facts=16, steps=100, meta_learning_rate=3e-3, scalar_learning_rate=3e-2,
        tuned_start=True, decay=True, progress=False,
    )  # fmt: skip
    shift = editor.edit(facts)
    scores = evaluate(lm, facts, shift)
    assert scores.mean("ES") > 0.9 > 0.3 > scores.mean("ES before") and scores.mean("LS") > 0.8
    before = says(lm, facts[0])
    with shift.applied(lm):
        after = says(lm, facts[0])
    assert before != facts[0].answer == after and says(lm, facts[0]) == before
