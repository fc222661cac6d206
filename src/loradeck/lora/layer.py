"""One module with adapters: calls the base's forward and adds the route's update."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from loradeck.errors import RouteError
from loradeck.lora.routing import Route, current
from loradeck.lora.saved_modules import is_replaced, outputs_of, replaced_output
from loradeck.lora.vocabulary import Vocabulary
from loradeck.ops import dispatch
from loradeck.ops.autograd import in_backward
from loradeck.ops.layer_kinds import LayerKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters


class LoraLayer:
    """Replaces a module's `forward`, and restores it. A module without a `kind` takes no pair, but can be replaced.

    The module itself is unchanged: its class, its parameters and its paths are the base's, so quantised layers, tied
    weights and code that reads `module.weight` see no difference.
    """

    __slots__ = ("bank", "base", "is_head", "kind", "module", "open", "path", "restored", "vocabulary")

    def __init__(
        self,
        bank: object,
        path: str,
        module: nn.Module,
        kind: LayerKind | None,
        open_routes: set[Route],
        *,
        is_head: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`vocabulary` is that of an embedding or of a head, whose rows adapters may add to."""
        self.bank: object | None = bank
        self.path, self.module, self.kind, self.open, self.is_head = path, module, kind, open_routes, is_head
        self.vocabulary = vocabulary
        self.restored: Callable[..., Tensor] | None = module.__dict__.get("forward")  # set by another tool, if any
        self.base: Callable[..., Tensor] = module.forward
        module.forward = self  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """A pickled method is looked up by its name, which would give this object for the base's forward."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "base"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.base = self.restored or type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(x) + Σ_a w_a · scaling_a · B_a (A_a x): x and the result as the base's forward has them.

        Rows of adapters that replace the module get their replacements' results.
        """
        route = current(self.bank) or self._recomputed()
        if route is None:
            return self.base(*args, **kwargs)
        adapters = route.layer(self.path, self.kind) if self.kind else None
        modules = route.replacements(self.path)
        mapping = route.head_mapping if self.is_head and route.head_mapping else route.mapping
        if modules is not None and not is_replaced(mapping, modules):
            modules = None
        if modules is not None and len(args) + len(kwargs) > 1:
            raise RouteError(
                f"{self.path} has several inputs, so that rows cannot go through an adapter's own",
                hint="Merge the adapter into its base.",
            )
        if adapters is None and modules is None:
            return self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        self._check(x, route, mapping, adapters)
        inputs = x
        if modules is not None and self.vocabulary is not None and self.vocabulary.is_embedding:
            x = self.vocabulary.known(inputs, mapping, modules)
            y = self.base(x)
        else:
            y = self.base(*args, **kwargs)
        if not mapping.total:  # no token of this step reaches the head
            return y
        base = y
        if adapters is not None:
            # The update is written into y; a blend needs the base's own outputs where it replaces the module too.
            base = y.clone() if modules is not None and any(isinstance(each, nn.Module) for each in modules) else y
            y = dispatch.lora(x, y, adapters, mapping, training=self.module.training)
        if modules is None:
            return y
        if self.vocabulary is None:
            output = partial(replaced_output, modules=modules)
        else:
            pairs = adapters.weights if adapters else ()
            output = partial(self.vocabulary.output, parts=modules, pairs=pairs)
        return outputs_of(y, base, inputs, mapping, modules, output, packed=route.packed)

    def _recomputed(self) -> Route | None:
        """Return the route for a layer that the backward pass computes again (gradient checkpointing).

        On some devices that happens in threads of autograd's own, where no route is open: the bank's only open route
        is used. Without any, the adapter's gradients would be missing, and some kinds of checkpoint would not notice.
        """
        if self.bank is None or not in_backward():
            return None
        routes = [*self.open]
        if len(routes) != 1:
            raise RouteError(
                f"{self.path} is recomputed in the backward pass (gradient checkpointing), outside of any route",
                python="Call backward() inside the route; inside bank.route(None) for the base alone.",
            )
        return routes[0]

    def _check(self, x: Tensor, route: Route, mapping: LoraMapping, adapters: LayerAdapters | None) -> None:
        rows = (self.kind.count(x) if self.kind else x.shape[:2].numel()) if route.packed else x.shape[0]
        total = mapping.total
        if rows != total and (route.packed or rows % total):
            unit = "tokens" if route.packed else "rows"
            raise RouteError(
                f"{self.path} got {rows} {unit}; the route is for {total}",
                hint="Give the route one entry per row of the batch, or one entry for the whole batch.",
            )
        if adapters and self.module.training and in_backward() and not adapters.repeats(mapping.adapters):
            raise RouteError(
                f"{self.path} is recomputed in the backward pass (gradient checkpointing), where an adapter's "
                "dropout would draw another mask",
                hint="Turn lora_dropout or gradient checkpointing off.",
                python="Or set adapter.dropout.seed before each forward.",
            )

    def detach(self) -> None:
        """Restore the module's forward; if another tool has wrapped it since, stay inside and do nothing."""
        if vars(self.module).get("forward") is not self:
            self.bank = None
        elif self.restored is None:
            del self.module.forward
        else:
            self.module.forward = self.restored  # type: ignore[method-assign]
