"""Model surgery by declared rules, on a clone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from snnk_jax._arguments import check_pattern

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapRule:
    """Which modules to replace, and by what.

    Args:
      path: regular expression that must match a module's whole path, its attribute
        names joined by ``/``: ``blocks/0/mlp``.
      build: ``build(module, rngs) -> module`` makes the replacement; it may keep the
        given module inside (see :class:`snnk_jax.nn.Adapted`).
      where: slice of the matches, in model order, None for all; ``slice(6, None)``
        leaves the first six as they are.

    Raises:
      ValueError: if the path is not a regular expression, build not callable or where
        no slice.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> rule = snnk.SwapRule(
      ...     path=r".*/mlp",
      ...     build=lambda mlp, rngs: snnk.nn.Adapted(
      ...         mlp, snnk.nn.SNNKAdapter(768, features=fm, rngs=rngs)
      ...     ),
      ... )
    """

    path: str
    build: Callable[[Any, nnx.Rngs], Any]
    where: slice | None = None

    def __post_init__(self):
        check_pattern("path", self.path)
        if not callable(self.build):
            raise ValueError(f"build must be callable. Got {self.build!r}.")
        if self.where is not None and not isinstance(self.where, slice):
            raise ValueError(
                "where must be None or a slice of the matches, such as slice(2, 3). "
                f"Got {self.where!r}."
            )


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What a surgery did.

    Attributes:
      matched: per rule, the paths of the modules it replaced.
      unused: rules that replaced nothing (none after :func:`swap_modules`, which
        raises instead).
    """

    matched: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]


def path_name(path: Path) -> str:
    """Joins a module path by ``/``."""
    return "/".join(str(part) for part in path)


def find_modules(model: nnx.Module, path: str = ".*") -> dict[str, nnx.Module]:
    """Returns the modules whose path matches, in model order.

    Args:
      model: any NNX model.
      path: regular expression for the whole path; the root has the empty path.

    Raises:
      ValueError: if it is none.

    Example:
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> list(snnk.find_modules(model, "layers/.*"))
      ['layers/0']
    """
    found: dict[Path, nnx.Module] = {}
    pattern = check_pattern("path", path)

    def visit(parts: Path, node: Any) -> Any:
        if isinstance(node, nnx.Module) and pattern.fullmatch(path_name(parts)):
            found[parts] = node
        return node

    nnx.recursive_map(visit, model)
    return {path_name(parts): found[parts] for parts in sorted(found, key=_order)}


def swap_modules(
    model: nnx.Module, rules: Sequence[SwapRule], *, rngs: nnx.Rngs
) -> tuple[Any, SwapReport]:
    """Replaces modules by rules, on a clone; the given model is left as it is.

    Modules are replaced in model order and each by the first rule that claims it. A
    module shared between several places stays shared.

    Args:
      model: any NNX model.
      rules: what to replace.
      rngs: handed to the builders, in model order.

    Returns:
      The new model and a :class:`SwapReport`.

    Raises:
      ValueError: if a rule replaces nothing; the paths that exist are listed. Also if
        a rule claims a module inside another claimed one, or builds nothing to call.

    Example:
      >>> import jax.numpy as jnp
      >>> import snnk_jax as snnk
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> fm = snnk.features.ArcCosine(num_features=16)
      >>> def adapt(linear, rngs):
      ...     adapter = snnk.nn.SNNKAdapter(8, features=fm, rngs=rngs)
      ...     return snnk.nn.Adapted(linear, adapter)
      >>> rules = [snnk.SwapRule(path="layers/0", build=adapt)]
      >>> adapted, report = snnk.swap_modules(model, rules, rngs=nnx.Rngs(1))
      >>> report.matched
      {'layers/0': ('layers/0',)}
      >>> x = jnp.ones((2, 4))
      >>> bool((adapted(x) == model(x)).all())  # the identity at the start
      True
    """
    rules = rules if isinstance(rules, SwapRule) else tuple(rules)
    if isinstance(rules, SwapRule) or not all(isinstance(r, SwapRule) for r in rules):
        raise ValueError(f"rules must be a list of SwapRule. Got {rules!r}.")
    claims: dict[str, SwapRule] = {}
    matched: dict[str, tuple[str, ...]] = {}
    unused = []
    for rule in rules:
        names = [name for name in find_modules(model, rule.path) if name]
        chosen = [
            name
            for name in names[slice(None) if rule.where is None else rule.where]
            if name not in claims
        ]
        claims |= dict.fromkeys(chosen, rule)
        matched[rule.path] = matched.get(rule.path, ()) + tuple(chosen)
        if not chosen:
            unused.append(rule.path)
    if unused:
        paths = [name for name in find_modules(model) if name]
        raise ValueError(
            f"every rule must replace a module that none before it does. Got unused "
            f"{unused}; the paths are {paths}."
        )
    for name in claims:
        inside = [other for other in claims if other.startswith(f"{name}/")]
        if inside:
            raise ValueError(
                "rules must not claim a module inside another claimed one. "
                f"Got {inside[0]!r} inside {name!r}."
            )
    clone = nnx.clone(model)
    # Built in model order, before the map, whose own order is no promise.
    built = {
        name: claims[name].build(module, rngs)
        for name, module in find_modules(clone).items()
        if name in claims
    }
    for name, module in built.items():
        if not isinstance(module, nnx.Pytree) and not callable(module):
            raise ValueError(
                f"build must return a module or a function for {name}. Got {module!r}."
            )

    def replace(parts: Path, node: Any) -> Any:
        return built.get(path_name(parts), node)

    report = SwapReport(matched, ())
    return nnx.recursive_map(replace, clone), report


def _order(parts: Path) -> tuple[tuple[int, int, str], ...]:
    """Sorts list indices as numbers."""
    return tuple(
        (0, int(part), "") if str(part).isdigit() else (1, 0, str(part))
        for part in parts
    )
