"""Which adapters have metrics of their own. A bounded number: whoever names adapters names no more series than that."""

import threading
from collections import Counter
from collections.abc import Callable

BASE, BLEND, OTHER = "<base>", "<blend>", "<other>"  # no adapter's name can have these characters


class MetricLabels:
    """Label values for adapters: the busiest `most` have their own; one that falls behind gives its place up.

    A place changes hands only when the newcomer has been asked for twice as often, so series are not torn to and fro.
    """

    def __init__(self, most: int, forget: Callable[[str], None]) -> None:
        """`forget` is told of a label that is no longer used, to drop its series."""
        self._most = most
        self._forget = forget
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self._own: set[str] = set()

    def count(self, adapter: str, requests: int = 1) -> None:
        """Count requests for an adapter, as `Request.adapter` names it; with none, it takes a place if one is free."""
        name = name_of(adapter)
        if name in (BASE, BLEND):
            return
        with self._lock:
            self._asked[name] += requests
            if name in self._own:
                return
            if len(self._own) >= self._most:
                coldest = min(self._own, key=self._asked.__getitem__)
                if self._asked[name] < max(1, 2 * self._asked[coldest]):
                    return
                self._own.discard(coldest)
                self._forget(coldest)
            self._own.add(name)

    def of(self, adapter: str) -> str:
        """Return the label of an adapter's series now."""
        name = name_of(adapter)
        return name if name in self._own or name in (BASE, BLEND) else OTHER


def name_of(adapter: str) -> str:
    """Return the name in `poet@2*0.7`; a blend has none of its own, and neither has the base."""
    return BLEND if "+" in adapter else adapter.partition("*")[0].partition("@")[0] or BASE
