"""The small tier in miniature, for its tests: a data folder of invented facts in the real formats, and toy models."""

import json
import lzma
import random
from contextlib import contextmanager
from itertools import product

import pytest

from malmen_repro.facts import LABELS
from malmen_repro.replication.small_models import (
    SmallBaseConfig,
    SmallBertConfig,
    SmallConfig,
    SmallGPTJConfig,
    SmallRecallConfig,
    SmallSubjectsConfig,
    SmallT5Config,
    small_model,
    wrapped_stand_in,
)
from malmen_repro.replication.small_training import SmallRun

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


def write_folder(out):
    "Fill a data folder."
    rng, towns = random.Random(0), ["Arden", "Bruma", "Calder", "Delvin"]
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


def fresh(tokenizer, config=CONFIG):
    return wrapped_stand_in(small_model(config, tokenizer), tokenizer, config)


def prompts(facts):
    return {p for fact in facts for p in (fact.prompt, *fact.equivalent_prompts)}


@contextmanager
def stopped_before(step):
    "While on, a training of a small language model is stopped by Ctrl-C when it has done so many steps."
    advance = SmallRun.advance

    def stop(run, *args):
        if run.step == step:
            raise KeyboardInterrupt
        return advance(run, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SmallRun, "advance", stop)
        yield
