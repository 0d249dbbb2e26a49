"Every configuration of the package says no to nonsense, with the field's name; what functions take beside one too."

import importlib
import math
import pkgutil
from dataclasses import asdict, fields, is_dataclass, replace

import pytest

import malmen_repro
from malmen_repro.editors import EditorConfig
from malmen_repro.errors import MalmenError, SettingError, check_settings, check_values, each, number, one_of, whole
from malmen_repro.methods.coachhook import CoachHooKConfig
from malmen_repro.methods.fine_tuning import FineTuningConfig
from malmen_repro.methods.fine_tuning_variants import LoRAConfig, SteppedFineTuningConfig
from malmen_repro.methods.memit import MEMITConfig
from malmen_repro.methods.target_vectors import TargetConfig
from malmen_repro.replication.benches import TuningConfig
from malmen_repro.replication.memory import MEMORY_SETTINGS
from malmen_repro.replication.plans import EvaluationConfig
from malmen_repro.replication.small_models import SmallGPTJConfig
from malmen_repro.replication.stand_ins import TinyConfig, TinyGPTJConfig
from malmen_repro.training import TrainingConfig


def configurations():
    "Every class of settings in every module of the package."
    found = {}
    for module in pkgutil.walk_packages(malmen_repro.__path__, "malmen_repro."):
        if module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == module.name:
                if name.endswith(("Config", "Sizes", "Setting")):
                    found[name] = kind
    return found


CONFIGURATIONS = configurations()
FIELDS = [(name, field.name) for name, kind in CONFIGURATIONS.items() for field in fields(kind)]
NONSENSE = [
    None,
    True,
    -1,
    0,
    2**70,
    10**400,
    math.nan,
    math.inf,
    "x",
    "",
    b"x",
    object(),
    [],
    (),
    {},
    [0],
    [None],
    ["x"],
]


def made(name):
    "A configuration as it comes."
    kind = CONFIGURATIONS[name]
    return next(iter(MEMORY_SETTINGS.values())) if name == "MemorySetting" else kind()


def checked(config, field, value):
    "The check of a configuration that has another value, as its class runs it (the tests' type checks stand before)."
    other = replace(config)
    object.__setattr__(other, field, value)
    other.__post_init__()
    return other


def test_the_walk_finds_them_all():
    assert {"EditorConfig", "TrainingConfig", "LoRAConfig", "CoachHooKConfig", "SmallBaseConfig"} <= set(CONFIGURATIONS)
    assert len(CONFIGURATIONS) >= 25


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_field_refuses_what_makes_no_sense_and_names_itself(name, field):
    config, refused = made(name), 0
    for value in NONSENSE:
        try:
            checked(config, field, value)
        except MalmenError as error:
            refused += 1
            assert field in str(error) and len(str(error)) < 400, error
    assert refused >= len(NONSENSE) / 2
    with pytest.raises(MalmenError, match=field):
        checked(config, field, object())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_a_configuration_is_does_not_change_by_its_check(name):
    config = made(name)
    assert replace(config) == config and asdict(replace(config)) == asdict(config)
    if name != "MemorySetting":  # it holds a dictionary
        assert hash(replace(config)) == hash(config)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (TrainingConfig(), "num_facts", 0),
        (TrainingConfig(), "steps", -1),
        (TrainingConfig(), "meta_learning_rate", -1e-5),
        (TrainingConfig(), "scalar_learning_rate", 0.0),
        (TrainingConfig(), "locality_coefficient", math.nan),
        (TrainingConfig(), "max_meta_gradient_norm", 0.0),
        (TrainingConfig(), "ramp_facts", 0),
        (TrainingConfig(), "lm_batch_size", 0),
        (TrainingConfig(), "network_batch_size", -4),
        (TrainingConfig(), "seed", 2**70),
        (EditorConfig(), "rank", 10**9),
        (EditorConfig(), "blocks", 10**6),
        (EditorConfig(), "learning_rate", 1e-60),  # nothing in float32
        (EditorConfig(), "regularization", math.inf),
        (EditorConfig(), "tokens", "every"),
        (EditorConfig(), "seed", -1),
        (FineTuningConfig(), "seed", 2**70),
        (SteppedFineTuningConfig(), "steps", 10**9),
        (LoRAConfig(), "rank", 10**9),
        (TargetConfig(), "learning_rate", math.inf),
        (TargetConfig(), "essence", "{} is {a}"),
        (TargetConfig(), "essence", "{} is {}"),
        (TargetConfig(), "prefix_lengths", (5, 0)),
        (MEMITConfig(), "blocks", ()),
        (MEMITConfig(), "blocks", (3, 3)),
        (MEMITConfig(), "blocks", (4, 3)),
        (MEMITConfig(), "blocks", (-1,)),
        (CoachHooKConfig(), "alpha", math.nan),
        (TuningConfig(), "batch_size", 0),
        (EvaluationConfig(), "scored_facts", 0),
        (TinyConfig(), "heads", 3),
        (TinyConfig(), "edited", 3),
        (TinyGPTJConfig(), "rotary", 0),
        (SmallGPTJConfig(), "heads", 5),
    ],
)
def test_a_wrong_value_is_refused_when_it_is_made_or_replaced(config, field, value):
    with pytest.raises(MalmenError, match=field):
        replace(config, **{field: value})
    with pytest.raises(MalmenError, match=field):
        type(config)(**{field: value})


def test_settings_within_settings_name_what_they_do_not_know():
    with pytest.raises(MalmenError, match="target has no field 'stepps'; TargetConfig has: steps, "):
        MEMITConfig(target={"stepps": 3})
    with pytest.raises(MalmenError, match="memit has no field 'block'"):
        CoachHooKConfig(memit={"block": (1,)})
    assert MEMITConfig(target={"steps": 3}).target == TargetConfig(steps=3)
    assert hash(TargetConfig(prefix_lengths=[2, 3])) == hash(TargetConfig(prefix_lengths=(2, 3)))


def test_loose_values_are_checked_by_the_same_rules():
    check_values("a function", batch_size=(3, whole(1)), k=(None, one_of(None, 1)))
    with pytest.raises(SettingError, match=r"^batch_size=0: must be a whole number from 1 to .* \(a function\)$"):
        check_values("a function", batch_size=(0, whole(1)))
    with pytest.raises(SettingError, match="rates"):
        check_values("a function", rates=([0.1, math.nan], each(number(above=0))))


def test_a_field_without_a_rule_is_a_mistake_of_the_class():
    with pytest.raises(TypeError, match="batch_size"):
        check_settings(EvaluationConfig(), scored_facts=whole(1))
