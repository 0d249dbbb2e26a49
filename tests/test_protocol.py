"""What every editor keeps, how editors are found by name, and how any edit is read."""

import dataclasses
import inspect
from importlib.metadata import EntryPoint

import pytest
import torch

from malmen_repro import protocol
from malmen_repro.consecutive import RememberingMALMEN, consecutive
from malmen_repro.editors import MALMEN, MEND, Editor
from malmen_repro.facts import Fact, MalmenError
from malmen_repro.methods.coachhook import CoachHooK, HookedShift
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.protocol import (
    AnyEditor,
    EditorError,
    Needs,
    UnknownEditorError,
    editor_names,
    find_editor,
    load_edit,
)
from malmen_repro.weight_shifts import StoredEdit, WeightShift, WeightShiftError
from tests.toy import toy_corpus, toy_facts, toy_model

NAMES = ("CoachHooK", "FT", "FT-L", "FT-M", "FT-W", "LoRA", "MALMEN", "MEMIT", "MEND", "ROME")


def quick(kind):
    """The settings of an editor's paper with little to do."""
    config = kind.paper_config
    memit = MEMITConfig(regularization=10.0, blocks=(1,), target=TargetConfig(prefix_lengths=(), steps=2))
    if kind is CoachHooK:
        return dataclasses.replace(config, memit=memit)
    if isinstance(config, MEMITConfig):
        return memit
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{"rank": 4} if "rank" in names else {})


def made(name, tmp_path):
    """An editor by its name, ready to edit."""
    kind = find_editor(name)
    editor = kind.of(toy_model(), quick(kind), toy_corpus() if kind.needs.corpus else (), tmp_path)
    if kind.needs.training:
        editor.observe(toy_facts(8))
    return editor


# --- editors by name


def test_these_editors_are_installed():
    assert tuple(editor_names()) == tuple(sorted(NAMES, key=str.lower))


def test_an_unknown_name_has_near_misses():
    with pytest.raises(UnknownEditorError, match="no editor 'MALMAN' is installed; did you mean MALMEN"):
        find_editor("MALMAN")
    assert issubclass(UnknownEditorError, EditorError) and issubclass(EditorError, MalmenError)


def test_another_package_can_bring_an_editor(monkeypatch):
    entry = EntryPoint("mine", "malmen_repro.editors:MEND", protocol.GROUP)
    monkeypatch.setattr(protocol, "_entries", lambda: {"mine": entry})
    assert editor_names() == ["mine"] and find_editor("mine") is MEND


# --- what each class says


@pytest.mark.parametrize("name", NAMES)
def test_a_class_says_what_it_needs_and_gives(name):
    kind = find_editor(name)
    assert kind.needs.training == issubclass(kind, Editor)
    assert kind.needs.corpus == kind.needs.subjects == (name in ("MEMIT", "ROME", "CoachHooK"))
    assert kind.gives is (HookedShift if name == "CoachHooK" else WeightShift)
    assert dataclasses.is_dataclass(kind.paper_config) and kind.paper_config.__dataclass_params__.frozen


@pytest.mark.parametrize("name", NAMES)
def test_the_signatures_are_the_protocols(name):
    kind = find_editor(name)
    for method in ("of", "edit"):
        asked = inspect.signature(getattr(AnyEditor, method)).parameters
        theirs = inspect.signature(getattr(kind, method)).parameters
        assert [*theirs][: len(asked)] == [*asked], f"{name}.{method}"


@pytest.mark.parametrize("name", NAMES)
def test_an_editor_edits_and_its_edit_is_read_again(name, tmp_path):
    editor, facts = made(name, tmp_path), toy_facts(3, seed=1, start=20)
    assert isinstance(editor, AnyEditor) and editor.method == name
    before = {key: tensor.clone() for key, tensor in editor.lm.model.state_dict().items()}
    edit = editor.edit(facts)
    assert isinstance(edit, StoredEdit) and isinstance(edit, type(editor).gives) and edit.metadata["method"] == name
    assert all(torch.equal(tensor, before[key]) for key, tensor in editor.lm.model.state_dict().items())
    again = load_edit(edit.save(tmp_path / "edit"))
    assert type(again) is type(edit) and again.metadata == edit.metadata
    assert all(torch.equal(shift, edit.shifts[layer]) for layer, shift in again.shifts.items())


def test_settings_of_ones_own_are_kept(tmp_path):
    for name in NAMES:
        kind = find_editor(name)
        assert made(name, tmp_path).config == quick(kind) or name == "ROME"


# --- needs


@pytest.mark.parametrize(
    ("needs", "subjects", "corpus", "says"),
    [
        (Needs(), [None, None], [], ""),
        (Needs(subjects=True), ["a", None], [], "1 of 2 facts name no subject"),
        (Needs(corpus=True), [None, None], [], "there is no corpus"),
        (Needs(subjects=True, corpus=True), [None, ""], [], "2 of 2 facts name no subject and there is no corpus"),
        (Needs(subjects=True, corpus=True), ["a", "b"], ["A text."], ""),
        (Needs(training=True), [None, None], [], ""),
    ],
)
def test_what_is_missing_is_said_in_words(needs, subjects, corpus, says):
    facts = [Fact("who is a b", "c", subject=subject or None) for subject in subjects]
    assert needs.missing(facts, corpus) == says


# --- edits in files


def test_what_is_no_edit_is_refused(tmp_path):
    with pytest.raises(WeightShiftError, match="no shift file"):
        load_edit(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(WeightShiftError, match="damaged or not a shift file"):
        load_edit(tmp_path / "text")


# --- a MALMEN that remembers is made of a model, or of a MALMEN


def test_a_remembering_malmen_of_either():
    editor = MALMEN.of(toy_model(), dataclasses.replace(MALMEN.paper_config, rank=4))
    editor.observe(toy_facts(8))
    of_editor = RememberingMALMEN.of(editor)
    assert of_editor.networks is editor.networks and of_editor.config == editor.config
    of_model = RememberingMALMEN.of(editor.lm, editor.config)
    assert of_model.networks is not editor.networks and type(of_model) is RememberingMALMEN
    facts = toy_facts(3, seed=1, start=20)
    one, two = editor.edit(facts), consecutive(of_editor).edit(facts)
    assert all(torch.allclose(one.shifts[layer], two.shifts[layer]) for layer in one.shifts)
