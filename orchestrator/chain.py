"""The chain of stages behind one trial: raw stage mappings become typed stages that refer to one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from methods.base import Method, ModelSettings
from methods.catalog import Catalog, UnknownNameError
from methods.data.base import task_type_of
from orchestrator.data_section import DataSettings, parse_data
from orchestrator.optimisation import TrainSettings
from orchestrator.references import each_reference, input_stage
from orchestrator.settings import Problems, Typed, as_mapping, nearest, parse

__all__ = ["Chain", "StageSpec", "resolve_chain", "stage_marks", "with_baseline"]

COMMON = ("method", "model", "train", "seed", "data")
"""Settings that every stage may have besides those of its method."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage, typed. ``inputs`` maps a role of the method to the name of an earlier stage.

    A role that was given a list has one entry for each: ``teacher.0``, ``teacher.1``.
    """

    name: str
    method: str
    settings: Any
    model: ModelSettings | None
    train: TrainSettings
    seed: int | Literal["trial"]
    inputs: Mapping[str, str]
    data: DataSettings | None = None
    """What the stage learns from: the experiment's data, or its own; None where neither can be understood."""
    inactive: frozenset[str] = frozenset()
    """Settings without effect for these inputs: left out of the key."""
    batch_scale: int = 1
    """By how much ``run.batch: scale`` has multiplied batch size and learning rate in ``train``."""


Chain = dict[str, StageSpec]
"""Stage name -> stage, inputs before their users, the optimised stage last."""


def with_baseline(
    stages: Mapping[str, Mapping[str, Any]], replaced: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Stages in which those of a baseline take the place of ours.

    A replaced stage inherits ``model``, ``train``, ``seed`` and ``data`` where it does not name them: the baseline differs
    from the experiment in its method and that method's settings, not by accident in its recipe. With the same method
    it inherits ``preset`` too, in which a method may keep the size of its network. A stage that names no method is ours
    but for what it names: it inherits everything else, its teacher and first weights among them.
    """
    merged = {
        name: dict(stages.get(name, replaced.get(name, {}))) for name in _baseline_order(stages, replaced)
    }
    for name in replaced:
        if name in stages:
            is_same = replaced[name].get("method") in (None, stages[name].get("method"))
            kept = ("model", "train", "seed", "data", *(("preset",) if is_same else ()))
            kept = kept if "method" in replaced[name] else tuple(stages[name])
            inherited = {key: stages[name][key] for key in kept if key in stages[name]}
            merged[name] = {**inherited, **replaced[name]}
    return merged


def _baseline_order(stages: Mapping[str, Any], replaced: Mapping[str, Any]) -> list[str]:
    """Our stages in their order; one that the baseline adds stands before the stage that follows it in the baseline."""
    order = list(stages)
    position = len(order)
    for name in reversed(list(replaced)):
        if name in stages:
            position = order.index(name)
        else:
            order.insert(position, name)
    return order


def resolve_chain(
    stages: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    target: str,
    catalog: Catalog,
    problems: Problems,
    data: DataSettings | None = None,
    known: dict[tuple[str, str], StageSpec] | None = None,
) -> Chain:
    """Type all ``stages`` with ``values`` laid over them; return those that lead to ``target``.

    ``data`` is the experiment's section, which a stage's own may change. ``known`` keeps the stages before the target,
    which most points share, from one call with the same ``stages``, ``target``, ``catalog`` and ``data`` to the next.
    """
    raw = {name: dict(stage) for name, stage in stages.items()}
    for path, value in values.items():
        _lay_over(raw, path, value)
    marks = {} if known is None else stage_marks(stages, values)
    typed: Chain = {}
    for name, stage in raw.items():
        spec = None if known is None else known.get((name, marks[name]))
        if spec is None:
            recipe = (name, f"{stage.get('method')} {stage.get('model')!r} {stage.get('train')!r}")
            spec = _resolve_stage(
                name, _typed_before(stage, known, recipe), raw, target, typed, catalog, problems, data
            )
            if spec is not None and known is not None and not problems:
                known[recipe if name == target else (name, marks[name])] = spec
        if spec is not None:
            typed[name] = spec
    return _ancestors(typed, target) if not problems else typed


def _typed_before(
    stage: Mapping[str, Any], known: dict[tuple[str, str], StageSpec] | None, recipe: tuple[str, str]
) -> dict[str, Any]:
    """A copy of ``stage`` with what a stage of the same ``recipe`` was found to say of its network and training."""
    like = None if known is None else known.get(recipe)
    return {**stage} if like is None else {**stage, "model": like.model, "train": Typed(like.train)}


def stage_marks(stages: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> text of all ``values`` that can change it: its own and those of the stages before it."""
    own: dict[str, list[tuple[str, Any]]] = {}
    for path, value in values.items():
        own.setdefault(path.partition(".")[0], []).append((path, value))
    marks, text = {}, ""
    for name in stages:
        if name in own:
            text += repr(own[name])
        marks[name] = text
    return marks


def _lay_over(raw: dict[str, dict[str, Any]], path: str, value: Any) -> None:
    stage, *parts = path.split(".")
    mapping = raw.get(stage)
    if mapping is None:
        return
    for part in parts[:-1]:
        below = mapping.get(part)
        if below is not None and not isinstance(below, str | Mapping):
            return  # of a wrong type, which is reported where the stage is typed
        mapping[part] = mapping = {"name": below} if isinstance(below, str) else dict(below or {})
    mapping[parts[-1]] = value


def _resolve_stage(
    name: str,
    stage: dict[str, Any],
    stages: Mapping[str, Any],
    target: str,
    earlier: Chain,
    catalog: Catalog,
    problems: Problems,
    data: DataSettings | None,
) -> StageSpec | None:
    path = f"stages.{name}"
    method = _resolve_method(method_name := stage.pop("method", None), f"{path}.method", catalog, problems)
    if method is None:
        return None
    num_problems = len(problems)
    model = _resolve_model(stage.pop("model", None), method, f"{path}.model", catalog, problems)
    train = _resolve_train(stage.pop("train", None), method, f"{path}.train", problems)
    seed = _resolve_seed(stage.pop("seed", "trial" if name == target else 0), f"{path}.seed", problems)
    if "data" in stage:
        data = parse_data(stage.pop("data"), f"{path}.data", catalog, problems, data)
    references = {role: stage.pop(role, None) for role in method.inputs}
    inputs = {}
    for role, value in each_reference(references, method, path, problems):
        needs = method.inputs[role.partition(".")[0]]
        source = _resolve_input(role, value, needs, path, stages, earlier, catalog, problems)
        if source is not None:
            inputs[role] = source
    settings = _resolve_settings(stage, method, path, problems)
    if len(problems) > num_problems or train is None:
        return None
    known = {role: input_stage(earlier[source], earlier, catalog) for role, source in inputs.items()}
    reasons = (*method.refusals(settings, known), *method.pair_refusals(settings, model, known))
    for reason in (*reasons, *_data_refusals(method, settings, data, catalog)):
        problems.add(path, reason)
    if len(problems) > num_problems:
        return None
    return StageSpec(
        name=name, method=method_name, settings=settings, model=model, train=train, seed=seed, inputs=inputs,
        inactive=method.inactive_for(settings, known), data=data,
    )  # fmt: skip


def _data_refusals(
    method: type[Method], settings: Any, data: DataSettings | None, catalog: Catalog
) -> Iterable[str]:
    """Why the stage cannot learn from its data: they are of another kind, or the method itself says so."""
    if data is None:
        return ()
    found, wanted = task_type_of(data.source), method.task_type
    if not issubclass(found, wanted):
        fitting = [
            name for name, other in catalog.datasets.items() if issubclass(task_type_of(other), wanted)
        ]
        return (
            f"{method.__name__} learns a {wanted.__name__}, but data set {data.dataset!r} gives a {found.__name__}; "
            f"data sets that fit: {', '.join(sorted(fitting)) or 'none'}",
        )
    return method.data_refusals(settings, data.source)


def _resolve_method(name: Any, path: str, catalog: Catalog, problems: Problems) -> type[Method] | None:
    if not isinstance(name, str):
        known = ", ".join(sorted(catalog.methods))
        problems.add(path, f"expected the name of a method, got {name!r}. Known: {known}")
        return None
    try:
        return catalog.method(name)
    except UnknownNameError as error:
        problems.add(path, str(error))
        return None


def _resolve_seed(seed: Any, path: str, problems: Problems) -> int | Literal["trial"]:
    if seed != "trial" and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        problems.add(path, f"expected 'trial' or a whole number from 0, got {seed!r}")
    return seed  # type: ignore[no-any-return]


def _resolve_train(value: Any, method: type[Method], path: str, problems: Problems) -> TrainSettings | None:
    if isinstance(value, Typed):
        typed: TrainSettings = value.value
        return typed
    values = {**method.train_defaults, **as_mapping(value, path, problems)}
    train = parse(TrainSettings, values, path, problems)
    metrics = method.evaluation_metrics
    if train is not None and train.epochs > 0 and not method.trains:
        problems.add(f"{path}.epochs", f"{method.__name__} trains nothing; leave train out")
    if train is not None and train.compile and not method.can_be_compiled:
        problems.add(
            f"{path}.compile", f"the networks of {method.__name__} cannot be compiled; set it to false"
        )
    if train is not None and train.keep == "best" and train.objective not in ("", *metrics):
        hint = nearest(train.objective, metrics)
        problems.add(f"{path}.objective", f"{method.__name__} reports no {train.objective!r}{hint}")
    return train


def _resolve_settings(stage: dict[str, Any], method: type[Method], path: str, problems: Problems) -> Any:
    own = {item.name for item in fields(method.Settings)}
    if "preset" in stage and "preset" not in own:
        stage = {**_resolve_preset(stage.pop("preset"), method, f"{path}.preset", problems), **stage}
    known = own | set(COMMON) | set(method.inputs)
    for name in [name for name in stage if name not in own]:
        problems.add(
            f"{path}.{name}", f"{name!r} is not a setting of {method.Settings.__name__}{nearest(name, known)}"
        )
        stage.pop(name)
    return parse(method.Settings, stage, path, problems)


def _resolve_preset(name: Any, method: type[Method], path: str, problems: Problems) -> Mapping[str, Any]:
    """Settings that lie below those of the stage. Only they, and not the name, are part of the key."""
    if isinstance(name, str) and name in method.presets:
        return method.presets[name]
    problems.add(path, f"{name!r} is not a preset of {method.__name__}{nearest(name, method.presets)}")
    return {}


def _resolve_model(
    value: Any, method: type[Method], path: str, catalog: Catalog, problems: Problems
) -> ModelSettings | None:
    if not method.needs_model:
        if value is not None:
            problems.add(path, f"{method.__name__} trains no model of its own; remove {value!r}")
        return None
    if value is None:
        problems.add(path, "is missing: name the network that this stage trains, for instance resnet20")
        return None
    if isinstance(value, Typed | ModelSettings):
        return value if isinstance(value, ModelSettings) else value.value
    settings = parse(ModelSettings, {"name": value} if isinstance(value, str) else value, path, problems)
    if settings is not None:
        try:
            catalog.model(settings.name)
        except ValueError as error:
            problems.add(path, str(error))
    return settings


def _resolve_input(
    role: str,
    value: Any,
    needs: frozenset[str],
    path: str,
    stages: Mapping[str, Any],
    earlier: Chain,
    catalog: Catalog,
    problems: Problems,
) -> str | None:
    """The stage that ``$name`` refers to; it must stand earlier and emit what the role needs."""
    path = f"{path}.{role}"
    if not isinstance(value, str) or not value.startswith("$"):
        problems.add(path, f"expected a reference to an earlier stage, for instance ${role}; got {value!r}")
        return None
    name = value[1:]
    own = path.split(".")[1]
    if name not in stages:
        problems.add(path, f"{value} is not a stage{nearest(name, stages)}")
        return None
    if name not in earlier:
        order = list(stages)
        if name == own:
            problems.add(path, f"{value} makes a cycle: {own} needs itself")
        elif _reaches(stages, name, own):
            problems.add(path, f"{value} makes a cycle: {own} needs {name}, and {name} needs {own}")
        elif order.index(name) > order.index(own):
            problems.add(
                path, f"{value} does not exist yet: stage {name!r} stands below {own!r}; move it above"
            )
        return None
    lacking = needs - catalog.method(earlier[name].method).emits
    if lacking:
        able = [other for other, stage in earlier.items() if needs <= catalog.method(stage.method).emits]
        problems.add(
            path,
            f"{value} ({earlier[name].method}) emits no {', '.join(sorted(lacking))}; stages that do: {', '.join(able) or 'none'}",
        )
        return None
    return name


def _reaches(stages: Mapping[str, Any], start: str, goal: str) -> bool:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name == goal:
            return True
        if name in seen or not isinstance(stages.get(name), Mapping):
            continue
        seen.add(name)
        for value in stages[name].values():
            references = value if isinstance(value, list | tuple) else [value]
            todo += [item[1:] for item in references if isinstance(item, str) and item.startswith("$")]
    return False


def _ancestors(chain: Chain, target: str) -> Chain:
    needed, todo = set(), [target]
    while todo:
        name = todo.pop()
        if name in needed or name not in chain:
            continue
        needed.add(name)
        todo += chain[name].inputs.values()
    return {name: stage for name, stage in chain.items() if name in needed}
