"""loradeck: one base, a thousand adapters. Importing it is instant; torch is imported on first use of a name."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.conversion import convert
    from loradeck.errors import LoradeckError
    from loradeck.evaluation.evaluator import evaluate
    from loradeck.generation import generate
    from loradeck.lora.adapter import Adapter
    from loradeck.lora.bank import Bank
    from loradeck.lora.config import LoraConfig
    from loradeck.store import AdapterStore

__version__ = "0.1.0"
__all__ = ["Adapter", "AdapterStore", "Bank", "Base", "LoraConfig", "LoradeckError", "convert", "evaluate", "generate"]

_MODULES = {
    "Adapter": "loradeck.lora.adapter",
    "AdapterStore": "loradeck.store",
    "Bank": "loradeck.lora.bank",
    "Base": "loradeck.base.load",
    "LoraConfig": "loradeck.lora.config",
    "LoradeckError": "loradeck.errors",
    "convert": "loradeck.conversion",
    "evaluate": "loradeck.evaluation.evaluator",
    "generate": "loradeck.generation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'loradeck' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
