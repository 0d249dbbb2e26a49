"""What a type checker sees of the public interface. It is checked by mypy (`make typecheck`) and never run."""

from pathlib import Path

from typing_extensions import assert_type

from malmen_repro import (
    MALMEN,
    MEND,
    Fact,
    LanguageModel,
    TrainingConfig,
    WeightShift,
    evaluate,
    find_editor,
    load_edit,
)
from malmen_repro.consecutive import ConsecutiveRun, RememberingMALMEN, consecutive
from malmen_repro.editors import Editor
from malmen_repro.evaluation import Scores
from malmen_repro.facts import load_facts
from malmen_repro.methods.coachhook import CoachHooK, HookedShift
from malmen_repro.methods.fine_tuning import FineTuning
from malmen_repro.methods.fine_tuning_variants import LoRA, MaskedFineTuning
from malmen_repro.methods.memit import MEMIT, ROME
from malmen_repro.protocol import AnyEditor, Needs
from malmen_repro.weight_shifts import StoredEdit


def a_users_day(folder: Path) -> None:
    facts = load_facts(folder / "facts.jsonl")
    assert_type(facts, list[Fact])
    lm = LanguageModel.from_pretrained(folder / "model", last=6)
    assert_type(lm, LanguageModel)
    editor = MALMEN(lm)
    assert_type(editor.train(facts, TrainingConfig(num_facts=64), steps=10), list[dict])
    assert_type(editor.save_pretrained(folder / "editor"), Path)
    again = MALMEN.from_pretrained(folder / "editor", lm)
    assert_type(again, MALMEN)
    assert_type(Editor.from_pretrained(folder / "editor", lm), Editor)
    shift = again.edit(facts)
    assert_type(shift, WeightShift)
    assert_type(evaluate(lm, facts, shift), Scores)
    assert_type(shift + shift - shift, WeightShift)
    assert_type(shift.save(folder / "shift"), Path)
    assert_type(load_edit(folder / "shift"), StoredEdit)
    assert_type(MALMEN.needs, Needs)


def every_editor_keeps_the_protocol(lm: LanguageModel, facts: list[Fact], corpus: list[str]) -> None:
    kinds: list[type[AnyEditor]] = [MALMEN, MEND, RememberingMALMEN, FineTuning, MaskedFineTuning, LoRA]
    kinds += [MEMIT, ROME, CoachHooK]
    editors: list[AnyEditor] = [kind.of(lm, corpus=corpus) for kind in kinds]
    assert_type(editors[0].edit(facts), StoredEdit)
    assert_type(find_editor("FT").of(lm), AnyEditor)
    assert_type(FineTuning.of(lm).edit(facts), WeightShift)
    assert_type(CoachHooK.of(lm, corpus=corpus).edit(facts), HookedShift | WeightShift)
    assert_type(consecutive(MALMEN(lm)), ConsecutiveRun)
