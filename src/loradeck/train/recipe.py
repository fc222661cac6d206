"""A run's recipe, read from and written to its run.toml: a base, and an [[adapter]] for each job."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from loradeck.base import SMOLLM2
from loradeck.dataset.config import DataConfig
from loradeck.dataset.label import forms_of
from loradeck.errors import ConfigError, LoradeckError
from loradeck.lora.config import LoraConfig
from loradeck.lora.hub import with_hub_ids
from loradeck.lora.names import check_name
from loradeck.train.config import PassConfig, TrainConfig

T = TypeVar("T")

HINT = "See docs/training.md for the keys of a run file."
MAX_JOBS = 1000
RUN_FILE = "run.toml"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class JobRecipe:
    """The recipe of one job: an adapter, its dataset, and how it is trained."""

    name: str
    data: str
    """A file, a folder with train, valid and test, or a hub id."""
    valid: str | None = None
    """A dataset to validate on, instead of the dataset's own validation split."""
    from_: str | None = None
    """The folder or hub id of an adapter to go on from, with its settings, instead of a new one. Its key is `from`."""
    last_layers: int | None = None
    """Adapt only the last N layers of the base: less time and memory, as gradients flow no further back."""
    reading: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.last_layers is not None:
            if type(self.last_layers) is not int or self.last_layers < 1:
                raise ConfigError(
                    f"last_layers must be an integer of at least 1, not {self.last_layers!r:.40}", hint=HINT
                )
            if self.lora.layers_to_transform is not None:
                raise ConfigError("last_layers and layers_to_transform exclude each other", hint="Give one of them.")

    def adapter_config(self, layers: int) -> LoraConfig:
        """Return the adapter's config on a base with this number of layers."""
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
    weights: str = "packed"
    """Format of the base's weights; see `loradeck.base.weights`."""
    task: str = "generate"
    """What the base is loaded for: generate, classify, tokens or reward."""
    shared: PassConfig = field(default_factory=PassConfig)
    jobs: tuple[JobRecipe, ...]
    sweep: bool = False
    """Whether the jobs are trials, stopped by successive halving."""

    def __post_init__(self) -> None:
        forms_of(self.task)
        names = [job.name for job in self.jobs]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if not names or duplicates:
            raise ConfigError(
                f"two [[adapter]] are named {duplicates[0]!r}" if duplicates else "there is no [[adapter]]",
                hint="Give each job an [[adapter]] with a unique name.",
            )

    def toml(self) -> str:
        """Return the run as the text of a run file, without unset values."""
        shared = _without_unset(
            {
                "base": self.base,
                "dtype": self.dtype,
                "weights": self.weights,
                "task": self.task,
                "sweep": self.sweep or None,
                **asdict(self.shared),
            }
        )
        jobs = [
            _without_unset(
                {
                    **{name.rstrip("_"): value for name, value in asdict(job).items()},
                    "from": job.from_ and with_hub_ids(job.from_),  # a cache is of one machine
                    **dict.fromkeys(CONFIGS),
                    **_config_values(job),
                }
            )
            for job in self.jobs
        ]
        return tomli_w.dumps({**shared, "adapter": jobs})


CONFIGS: dict[str, type] = {"reading": DataConfig, "lora": LoraConfig, "train": TrainConfig}  # fields of JobRecipe
JOB_KEYS = {f.name.rstrip("_") for f in fields(JobRecipe)} - CONFIGS.keys()
KEYS = JOB_KEYS.union(*({f.name for f in fields(config)} for config in CONFIGS.values()))


def read_recipe(path: Path | str) -> RunRecipe:
    """Read a run file. Relative paths are relative to its folder; [defaults] applies to every [[adapter]].

    Raises:
        ConfigError: it cannot be read, is not TOML, or has unknown keys or invalid values; every one is named.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="Give a run file, in TOML.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint=HINT) from error
    defaults, jobs = content.pop("defaults", {}), content.pop("adapter", [])
    if not isinstance(defaults, dict) or not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise ConfigError(f"{path}: defaults must be a table and adapter a list: [defaults], [[adapter]]", hint=HINT)
    if len(jobs) > MAX_JOBS:
        raise ConfigError(f"{path} has {len(jobs)} jobs, more than {MAX_JOBS}", hint="Split it.")
    problems = [f"defaults.{key}: {_unknown(key, KEYS)}" for key in defaults if key not in KEYS]
    defaults = {key: value for key, value in defaults.items() if key in KEYS}
    recipes = [_job({**defaults, **job}, f"adapter[{index}]", path.parent, problems) for index, job in enumerate(jobs)]
    base, sweep = content.pop("base", None), content.pop("sweep", False)
    dtype, weights = content.pop("dtype", RunRecipe.dtype), content.pop("weights", RunRecipe.weights)
    task = content.pop("task", RunRecipe.task)
    texts = {"base": base, "dtype": dtype, "weights": weights, "task": task}
    problems += [f"{key}: must be a string" for key, value in texts.items() if not isinstance(value, str)]
    problems += [] if isinstance(sweep, bool) else ["sweep: must be true or false"]
    shared = _convert(content, PassConfig, "", problems)
    recipe = None
    try:
        if not problems and shared and isinstance(base, str):
            recipe = RunRecipe(
                base=resolve_base(base, path.parent),
                dtype=dtype,
                weights=weights,
                task=task,
                shared=shared,
                jobs=tuple(job for job in recipes if job),
                sweep=sweep,
            )
    except ConfigError as error:
        problems.append(error.message)
    if recipe is None:
        raise ConfigError(f"{path} cannot be run", problems, hint=HINT)
    return recipe


def job_recipe(settings: Mapping[str, Any], where: str, **fixed: Any) -> JobRecipe:
    """Return the recipe of one job from the keys of an [[adapter]] that somebody gave as `where`.

    Args:
        settings: The keys with their values.
        where: What they are called in errors.
        **fixed: Keys that `settings` must not have.

    Raises:
        ConfigError: unknown keys or invalid values; every one is named.
    """
    problems = [f"{where}.{key}: cannot be set" for key in settings if key in fixed]
    recipe = _job({**settings, **fixed}, where, Path(), problems)
    if recipe is None or problems:
        raise ConfigError(f"invalid settings of {where}", problems, hint=HINT)
    return recipe


def _job(table: Mapping[str, Any], where: str, folder: Path, problems: list[str]) -> JobRecipe | None:
    problems += [f"{where}.{key}: {_unknown(key, KEYS)}" for key in table if key not in KEYS]
    before = len(problems)
    configs: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        keys = {f.name for f in fields(config)}
        configs[name] = _convert({k: v for k, v in table.items() if k in keys}, config, where, problems)
    for key in ("name", "data"):
        if not isinstance(table.get(key), str):
            problems.append(f"{where}.{key}: must be a string")
    if len(problems) > before:
        return None
    values: dict[str, Any] = {key: value for key, value in table.items() if key in JOB_KEYS}
    values |= {key: resolve(table[key], folder) for key in SOURCES if isinstance(table.get(key), str)}
    values["from_"] = values.pop("from", None)  # `from` is a word of Python
    try:
        return JobRecipe(**values, **configs)
    except LoradeckError as error:
        problems.append(f"{where}: {error.message}")
        return None


SOURCES = ("data", "valid", "from")


def resolve(source: str, folder: Path = Path()) -> str:
    """Return the absolute path of a dataset in `folder`; a source that does not exist there may be a hub id."""
    path = folder / source
    return str(path.resolve()) if path.exists() else source


def resolve_base(source: str, folder: Path = Path()) -> str:
    """Return the absolute path of a base; smollm2-135m is a name, even if there is a folder of that name."""
    return source if source == SMOLLM2 else resolve(source, folder)


def _convert(table: Mapping[str, Any], type_: type[T], where: str, problems: list[str]) -> T | None:
    keys = {f.name for f in fields(type_)}  # type: ignore[arg-type]
    problems += [f"{where}{key}: {_unknown(key, keys)}" for key in table if key not in keys]
    try:
        return msgspec.convert({k: v for k, v in table.items() if k in keys}, type_)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        problems.append(f"{where}{path.strip('`').removeprefix('$')}: {what}")
    except ConfigError as error:
        problems.extend(f"{where}: {problem}" if where else problem for problem in error.problems)
    return None


def _unknown(key: str, keys: set[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5) if len(key) > 2 else []
    return f"unknown key{f'; did you mean {close[0]}?' if close else ''}"


def _config_values(job: JobRecipe) -> dict[str, Any]:
    return {key: value for name in CONFIGS for key, value in asdict(getattr(job, name)).items()}


def _without_unset(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table without None and empty values, with tuples as lists: what TOML can hold."""
    return {
        key: list(v) if isinstance(v, tuple) else v for key, v in table.items() if v is not None and v not in ((), {})
    }
