"""MALMEN: thousands of facts edited into a language model at once. The names below are enough for most uses."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .editors import MALMEN, MEND
    from .evaluation import evaluate
    from .facts import Fact, load_facts
    from .language_models import LanguageModel
    from .protocol import find_editor, load_edit
    from .training import TrainingConfig
    from .weight_shifts import WeightShift

_PLACES = {  # name -> module; imported when the name is first asked for, since PyTorch takes seconds
    "MALMEN": "editors",
    "MEND": "editors",
    "evaluate": "evaluation",
    "Fact": "facts",
    "load_facts": "facts",
    "LanguageModel": "language_models",
    "find_editor": "protocol",
    "load_edit": "protocol",
    "TrainingConfig": "training",
    "WeightShift": "weight_shifts",
}
__all__ = [
    "Fact",
    "LanguageModel",
    "MALMEN",
    "MEND",
    "TrainingConfig",
    "WeightShift",
    "evaluate",
    "find_editor",
    "load_edit",
    "load_facts",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
