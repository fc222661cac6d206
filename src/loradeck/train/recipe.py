"""What a run is to do, as its run.toml says it: a base, and an [[adapter]] for each job. Knows TOML; runs nothing."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from loradeck.base import SMOLLM2
from loradeck.errors import ConfigError, LoradeckError
from loradeck.lora.config import LoraConfig
from loradeck.lora.names import check_name
from loradeck.train.config import PassConfig, TrainConfig

T = TypeVar("T")

MEND = "See docs/training.md for the keys of a run file."
JOBS = 1000
RUN_FILE = "run.toml"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class JobRecipe:
    """One job: an adapter, its dataset, and how it is trained."""

    name: str
    data: str
    """A file, a folder with train, valid and test, or a hub id."""
    valid: str | None = None
    """A dataset to validate on, in place of the dataset's own validation split."""
    last_layers: int | None = None
    """Adapt only so many of the base's layers, from the last: less time and memory, as nothing flows further back."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.last_layers is not None:
            if type(self.last_layers) is not int or self.last_layers < 1:
                raise ConfigError(f"last_layers is {self.last_layers!r:.40}, not a whole number from 1", hint=MEND)
            if self.lora.layers_to_transform is not None:
                raise ConfigError("last_layers and layers_to_transform are both given", hint="Give one of them.")

    def adapter_config(self, layers: int) -> LoraConfig:
        """Return the adapter's config on a base of so many layers."""
        if self.last_layers is None:
            return self.lora
        if self.last_layers > layers:
            raise ConfigError(f"last_layers is {self.last_layers}; the base has {layers}", hint="Give fewer.")
        return replace(self.lora, layers_to_transform=tuple(range(layers - self.last_layers, layers)))


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """A run: a base, what its jobs share, and the jobs."""

    base: str
    """A folder, a hub id, a .gguf file, or smollm2-135m."""
    dtype: str = "auto"
    shared: PassConfig = field(default_factory=PassConfig)
    jobs: tuple[JobRecipe, ...]
    sweep: bool = False
    """Whether the jobs are trials of which the worse half is stopped again and again."""

    def __post_init__(self) -> None:
        names = [job.name for job in self.jobs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ConfigError(
                f"two [[adapter]] are named {twice[0]!r}" if twice else "there is no [[adapter]]",
                hint="Give each job an [[adapter]] with a name of its own.",
            )

    def toml(self) -> str:
        """Return the run as the text of a run file; what is not set is left out."""
        shared = _set({"base": self.base, "dtype": self.dtype, "sweep": self.sweep or None, **asdict(self.shared)})
        jobs = [
            _set({**asdict(job), **asdict(job.lora), **asdict(job.train), "lora": None, "train": None})
            for job in self.jobs
        ]
        return tomli_w.dumps({**shared, "adapter": jobs})


OWN = {f.name for f in fields(JobRecipe)} - {"lora", "train"}
LORA, TRAIN = ({f.name for f in fields(kind)} for kind in (LoraConfig, TrainConfig))
KEYS = OWN | LORA | TRAIN


def read_recipe(path: Path | str) -> RunRecipe:
    """Read a run file. Its relative paths are relative to its folder; [defaults] holds for every [[adapter]].

    Raises:
        ConfigError: it cannot be read, is no TOML, or has keys or values that cannot be: every one is named.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="Give a run file, in TOML.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}", hint=MEND) from error
    defaults, jobs = content.pop("defaults", {}), content.pop("adapter", [])
    if not isinstance(defaults, dict) or not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise ConfigError(f"{path}: defaults is one table, adapter a list: [defaults], [[adapter]]", hint=MEND)
    if len(jobs) > JOBS:
        raise ConfigError(f"{path} has {len(jobs)} jobs, more than {JOBS}", hint="Split it.")
    problems = [f"defaults.{key}: {_unknown(key, KEYS)}" for key in defaults if key not in KEYS]
    known = {key: value for key, value in defaults.items() if key in KEYS}
    read = [_job({**known, **job}, f"adapter[{at}]", path.parent, problems) for at, job in enumerate(jobs)]
    base, dtype, sweep = content.pop("base", None), content.pop("dtype", "auto"), content.pop("sweep", False)
    problems += [] if isinstance(base, str) else ["base: is missing, or no text"]
    problems += [] if isinstance(dtype, str) else ["dtype: is no text"]
    problems += [] if isinstance(sweep, bool) else ["sweep: is not true or false"]
    shared = _convert(content, PassConfig, "", problems)
    recipe = None
    try:
        if not problems and shared and isinstance(base, str):
            recipe = RunRecipe(
                base=base_place(base, path.parent),
                dtype=dtype,
                shared=shared,
                jobs=tuple(job for job in read if job),
                sweep=sweep,
            )
    except ConfigError as error:
        problems.append(error.message)
    if recipe is None:
        raise ConfigError(f"{path} cannot be run", problems, hint=MEND)
    return recipe


def _job(table: Mapping[str, Any], where: str, folder: Path, problems: list[str]) -> JobRecipe | None:
    problems += [f"{where}.{key}: {_unknown(key, KEYS)}" for key in table if key not in KEYS]
    before = len(problems)
    lora = _convert({k: v for k, v in table.items() if k in LORA}, LoraConfig, where, problems)
    train = _convert({k: v for k, v in table.items() if k in TRAIN}, TrainConfig, where, problems)
    for key in ("name", "data"):
        if not isinstance(table.get(key), str):
            problems.append(f"{where}.{key}: is missing, or no text")
    if len(problems) > before or lora is None or train is None:
        return None
    places = {key: place(table[key], folder) for key in ("data", "valid") if isinstance(table.get(key), str)}
    try:
        own_values: dict[str, Any] = {**{key: value for key, value in table.items() if key in OWN}, **places}
        return JobRecipe(**own_values, lora=lora, train=train)
    except LoradeckError as error:
        problems.append(f"{where}: {error.message}")
        return None


def place(source: str, folder: Path = Path()) -> str:
    """Return a dataset's path from anywhere; what is not there by this path may be a hub id."""
    path = folder / source
    return str(path.resolve()) if path.exists() else source


def base_place(source: str, folder: Path = Path()) -> str:
    """Return a base's path from anywhere; not of a folder that only has the name of the base that needs none."""
    return source if source == SMOLLM2 else place(source, folder)


def _convert(table: Mapping[str, Any], kind: type[T], where: str, problems: list[str]) -> T | None:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    problems += [f"{where}{key}: {_unknown(key, known)}" for key in table if key not in known]
    try:
        return msgspec.convert({k: v for k, v in table.items() if k in known}, kind)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at ")
        problems.append(f"{where}{at.strip('`').removeprefix('$')}: {what}")
    except ConfigError as error:
        problems.extend(f"{where}: {problem}" if where else problem for problem in error.problems)
    return None


def _unknown(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5) if len(key) > 2 else []
    return f"is no key of a run file{f'; did you mean {close[0]}?' if close else ''}"


def _set(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what TOML can hold and says something."""
    return {
        key: list(v) if isinstance(v, tuple) else v for key, v in table.items() if v is not None and v not in ((), {})
    }
