"Records made by hand: scores as a test wants them, without a model."

from dataclasses import asdict

from malmen_repro.facts import sha256
from malmen_repro.replication.plans import Cell
from malmen_repro.replication.records import write_record

CONDITION = "infinite"  # as a record spells it


def part(mean, spread=0.05, facts=10):
    "One measure of a record."
    interval = [None, None] if mean is None else [mean - spread, mean + spread]
    return {"mean": mean, "interval": interval, "facts": 0 if mean is None else facts}


def record(
    method="MALMEN", m=16, seed=0, mean=0.5, *, data_set="toys", experiment="toy", tier="tiny", family="decoder",
    before=0.9, training=1.0, extra=None, blocks=None, **scores,
):  # fmt: skip
    "A record whose ES, GS and LS are `mean` unless they are given."
    setting = {"schema": 1, "cell": asdict(Cell(experiment, family, method, m, seed, tier, data_set, m))}
    values = {"ES": mean, "GS": mean, "LS": mean, "LS before": before, **scores}
    return {
        **{"hash": sha256(setting), "configuration": setting},
        **{"scores": {name: part(value) for name, value in values.items()}, "blocks": blocks or [m]},
        **{"per_fact": {name: [value] * 2 for name, value in values.items()}, "extra": extra or {}},
        **{"seconds": {"training": training, "editing": 0.1, "evaluation": 0.1}},
        **{"model": {"type": "gpt2", "parameters": 1_500_000, "edited_layers": {"h": [4, 8]}}, "fingerprints": {}},
    }


def broken(method="MALMEN, no regularisation", m=16, seed=0, *, error="SingularGramError", **changes):
    "A record of a method that broke down."
    failure = {"error": error, "message": "no shift"}
    if error == "SingularGramError":
        failure |= {"layer": "h", "tokens": 40, "key_size": 96, "condition": CONDITION}
    nothing = {"scores": {}, "per_fact": {}, "seconds": {}, "blocks": []}
    return record(method, m, seed, **changes) | nothing | {"extra": {"failure": failure}}


def residual_record(method, m, seed=0, *, sums, normal, share=(0.5, 1.0), **changes):
    "A record of Fig. 8: of each layer, the mean residual of the sum and of the normal equation, a pair a block."
    def ways(one, two):
        return {"sum": {"residual": one, "share": share[0], "tokens": 9},
                "normal equation": {"residual": two, "share": share[1], "tokens": 9}}

    blocks = [{f"h{i}": ways(*pair) for i, pair in enumerate(zip(one, two, strict=True))}
              for one, two in zip(sums, normal, strict=True)]
    return record(method, m, seed, experiment="cancellation", extra={"residuals": blocks}, **changes)


def sequence_record(method, m, seed=0, *, success, drawdown, weights=None):
    "A record of Table 3: edit success and drawdown, one of each a block."
    found = [{"edit success": s, "drawdown": d, "accuracy before": 1.0}
             for s, d in zip(success, drawdown, strict=True)]
    about = {"experiment": "mend_setting", "family": "encoder-decoder", "blocks": weights or [m] * len(found)}
    return record(method, m, seed, extra={"sequence_success": found}, **about)


def failure_block(*, facts=10, unrelated=10, lost=0, either=0, wrong=0, same=0, right=0, several=0, share=None,
                  edits=(), gone=()):
    "What `failure_cases` says of a block."
    counts = {"facts": facts, "unrelated": unrelated, "lost": lost, "edit or equivalent wrong": either,
              "edit wrong": wrong, "equivalent wrong in the same way": same, "equivalent right": right,
              "wrong answers of several tokens": several, "share of their tokens that is right": share}
    return {"edits": list(edits), "unrelated": list(gone), "counts": counts}


def training_record(method, seed=0, *, looks=((15, 0.2, 1e-4), (30, 0.8, 1e-3)), rate=2e-3, regularization=1.0):
    "A record of notebook 76: what was seen on the way, as (steps, ES, eta), and what was learned in two layers."
    history = [{"step": 0, "generalization": 1.0}]
    for steps, es, eta in looks:
        history.append({"step": steps - 1, "looked at": steps, "ES": es, "GS": es / 2, "ES before": 0.1, "eta": eta})
    learned = {name: {"learning_rate": rate, "regularization": regularization} for name in ("h0", "h1")}
    return record(method, 64, seed, experiment="training_settings") | {"history": history, "learned": learned}


def failure_record(*blocks, seed=0):
    "A record of Tables 4 and 5."
    return record("MALMEN", 64, seed, experiment="failures", extra={"failures": list(blocks)})


def case_record(method="MEMIT", m=16, seed=0, *, experiment="counterfact", data_set="counterfact", blocks=(), **means):
    "A record of CounterFact's measures, of one block or of each that is given."
    measures = {"ES": 0.5, "PS": 0.5, "NS": 0.5, "GE": 6.0, "RS": 0.3} | means
    before = {"ES": 0.1, "PS": 0.1, "NS": 0.9, "GE": 6.5, "RS": 0.1}
    measures |= {f"{name} before": value for name, value in before.items()}
    found = [{"measures": measures, "cases": m, "written": 4} | block for block in blocks or [{}]]
    about = {"experiment": experiment, "family": "subjects", "data_set": data_set, "blocks": [m] * len(found)}
    return record(method, m, seed, extra={"counterfact": found}, **about)


def write(records, folder):
    "Write records where a run would write them."
    for one in records:
        write_record(one, folder / Cell(**one["configuration"]["cell"]).path)
    return folder
