"""One module with its adapters: it calls its base and adds the route's update. Knows no adapter's name and no file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.errors import RouteError
from loradeck.lora.routing import Route, current
from loradeck.ops import dispatch
from loradeck.ops.layer_kinds import Form
from loradeck.ops.operands import Operands


class LoraLayer:
    """Takes the place of a module's `forward`, and gives it back.

    The module itself stays what and where it is: its class, its parameters and its paths are the base's own, so
    quantised layers, tied weights and code that looks at `module.weight` see no difference.
    """

    __slots__ = ("bank", "base", "form", "module", "open", "path", "restored")

    def __init__(self, bank: object, path: str, module: nn.Module, form: Form, open_routes: set[Route]) -> None:
        self.bank: object | None = bank
        self.path, self.module, self.form, self.open = path, module, form, open_routes
        self.restored: Callable[..., Tensor] | None = module.__dict__.get("forward")  # another tool's, if any
        self.base: Callable[..., Tensor] = module.forward
        module.forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(x) + Σ_a w_a · scaling_a · B_a (A_a x): x and the result as the base's forward has them."""
        y = self.base(*args, **kwargs)
        route = current(self.bank) or self._recomputed()
        if route is None:
            return y
        operands = route.operands(self)
        if operands is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        self._check(x, route, operands)
        return dispatch.lora(x, y, operands, route.mix, training=self.module.training)

    def _recomputed(self) -> Route | None:
        """Return the route under which the backward pass computes this layer again (gradient checkpointing).

        It does so in threads of its own for some devices, where no route is open: the bank's only one is meant.
        Without one it would leave the adapter's gradients out, and some kinds of checkpoint would not even notice.
        """
        if torch._C._current_graph_task_id() == -1 or self.bank is None:
            return None
        routes = [*self.open]
        if len(routes) != 1:
            raise RouteError(
                f"{self.path} is computed again in the backward pass (gradient checkpointing), outside of any route",
                hint="Call backward() inside the route; inside bank.route(None) for the base alone.",
            )
        return routes[0]

    def _check(self, x: Tensor, route: Route, operands: Operands) -> None:
        rows = self.form.count(x) if route.packed else x.shape[0]
        total = route.mix.total
        if rows % total or (route.packed and rows != total):
            unit = "tokens" if route.packed else "rows"
            raise RouteError(
                f"{self.path} got {rows} {unit}; the route is for {total}",
                hint="Give the route one entry per row of the batch, or one entry for the whole batch.",
            )
        if self.module.training and torch._C._current_graph_task_id() != -1 and not operands.repeats(route.mix):
            raise RouteError(
                f"{self.path} is computed again in the backward pass (gradient checkpointing), where an adapter's "
                "dropout would draw another mask",
                hint="Set adapter.dropout.seed at each forward, or lora_dropout=0, or turn gradient checkpointing off.",
            )

    def detach(self) -> None:
        """Give the module its own forward back; under what another tool has put there since, stay and do nothing."""
        if vars(self.module).get("forward") is not self:
            self.bank = None
        elif self.restored is None:
            del self.module.forward
        else:
            self.module.forward = self.restored  # type: ignore[method-assign]
