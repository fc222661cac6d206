"""vLLM serves the adapters of a store, each loaded when a request names it: a plugin of `vllm.general_plugins`.

vLLM imports this module in each of its processes; nothing else does.
"""

import asyncio
import os
from hashlib import sha256
from pathlib import Path
from threading import Lock

import torch
from torch import nn
from transformers import AutoConfig
from vllm.logger import init_logger  # pyrefly: ignore [missing-import]  (it has a Python of its own)
from vllm.lora.request import LoRARequest  # pyrefly: ignore [missing-import]
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyrefly: ignore [missing-import]

from loradeck.base.skeleton import Skeleton
from loradeck.disk import cache_folder
from loradeck.errors import AdapterError, ConfigError, LoradeckError, UnknownAdapterError, UnsupportedError
from loradeck.lora import compatibility
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import copied_module, is_adapter, read_folder
from loradeck.lora.uniform import for_vllm
from loradeck.store import AdapterStore, is_url

STORE = "LORADECK_ADAPTERS"  # the store's folder or URL; without it the plugin does nothing
ALLOWED = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # vLLM asks no resolver without it
CONVERTED = "vllm"  # in the cache folder: the adapters as vLLM reads them, by the sha256 of their files

log = init_logger("vllm.loradeck")  # so that vLLM's own settings of its log apply


def register() -> None:
    """Register a resolver for the store that the environment names, if it names one.

    Raises:
        ConfigError: there is no such folder; vLLM does not start.
    """
    name = os.environ.get(STORE)
    if not name:
        return
    folder = name if is_url(name) else Path(name).expanduser()
    if isinstance(folder, Path) and not folder.is_dir():
        raise ConfigError(f"{STORE} is {name}, which is not a folder", hint="Name a folder of adapters, or a URL.")
    if os.environ.get(ALLOWED, "").lower() not in ("1", "true"):
        log.warning("%s is set, but vLLM loads adapters at requests only if %s=1 is set too.", STORE, ALLOWED)
    LoRAResolverRegistry.register_resolver("loradeck", StoreResolver(AdapterStore(folder), cache_folder() / CONVERTED))


class StoreResolver(LoRAResolver):
    """Finds `name`, `name@latest` and `name@number` in a store, and hands vLLM a folder that it reads exactly."""

    def __init__(self, store: AdapterStore, converted: Path) -> None:
        """`converted`: where to write adapters as vLLM reads them."""
        self.store = store
        self.converted = converted
        self._models: dict[str, nn.Module | None] = {}
        self._lock = Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return what vLLM loads for a name, None if the store has no such adapter.

        Raises:
            ValueError: the adapter is unusable, does not fit the base, or vLLM cannot compute it; vLLM answers 400
                with the reason.
        """
        try:
            folder = await asyncio.to_thread(self.folder, lora_name, base_model_name)
        except UnknownAdapterError as error:  # another resolver may know it
            log.info("%s", error.text("cli"))
            return None
        except LoradeckError as error:
            reason = error.text("cli")
            log.error("The adapter %s is refused: %s", lora_name, reason)
            raise ValueError(reason) from error
        number = 1 + int(sha256(lora_name.encode()).hexdigest()[:7], 16)  # the server gives it another
        return LoRARequest(lora_name, number, str(folder), base_model_name=base_model_name)

    def folder(self, spec: str, base: str) -> Path:
        """Return a folder with the adapter as vLLM reads it, written if this content is new. It never changes.

        Args:
            spec: The adapter's name, with or without a version.
            base: The folder or hub id of the base that vLLM serves.

        Raises:
            UnknownAdapterError: no such adapter or version.
            UnsupportedError: vLLM cannot compute it exactly.
            AdapterError: it is unusable or does not fit the base, with every problem found, or the cache folder cannot
                be written.
        """
        stored = self.store.find(spec)
        files = read_folder(stored.path)
        if parts := [*files.saved, *map(copied_module, files.copies)]:
            raise UnsupportedError(
                f"{stored.path} has whole weights, which vLLM does not read",
                parts,
                hint="Merge it into its base and serve that model. If they only repeat the base's, publish what "
                "`loradeck convert` makes of it for vLLM.",
            )
        model = self._model(base)
        if model is not None:  # vLLM ignores modules of other layers, and computes with parts of other shapes
            compatibility.respelling(model, {}, files)
        folder = self.converted / stored.sha256()
        if is_adapter(folder):
            return folder
        adapter = for_vllm(Adapter.from_files(files), str(stored.path))
        stored.sha256()  # raises if the files have changed meanwhile
        try:
            self.converted.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterError(f"{self.converted} cannot be written: {error.strerror}") from error
        return adapter.save(folder)

    def _model(self, base: str) -> nn.Module | None:
        """Return the base's modules without memory, None if transformers cannot make them."""
        with self._lock:
            if base not in self._models:
                try:
                    self._models[base] = Skeleton(AutoConfig.from_pretrained(base), torch.bfloat16).model
                except (OSError, ValueError, ImportError) as error:
                    log.warning("Adapters are not checked against the shapes of %s: %s", base, error)
                    self._models[base] = None
            return self._models[base]
