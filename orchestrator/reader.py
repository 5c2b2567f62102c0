"""From a plain document to a typed experiment. Every mistake is found and reported in one go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from methods.catalog import Catalog
from orchestrator.chain import Chain, resolve_chain, with_baseline
from orchestrator.controls import PREFIX, control_baselines
from orchestrator.data_section import DataSettings, parse_data
from orchestrator.document import SECTIONS
from orchestrator.errors import ConfigurationError
from orchestrator.settings import Problems, Typed, as_mapping, nearest, parse
from orchestrator.space import parse_domain
from orchestrator.spec import ExperimentSpec, Objective, RunSettings, SearchSettings

__all__ = ["parse_experiment"]

POINT_LABELS = ("point", "points")
"""How tables and plans name the points of the search."""

MEASURED = ("num_parameters", "macs", "latency_ms", "seconds")
"""Metrics that a stage with a network has besides those of its method: size, speed, and training time."""


def parse_experiment(document: Mapping[str, Any], catalog: Catalog) -> ExperimentSpec:
    """Check ``document`` and type it. Raises ``ConfigurationError`` with every mistake that was found."""
    problems = Problems()
    for section in document:
        if section not in SECTIONS:
            problems.add(str(section), f"{section!r} is not a section{nearest(str(section), SECTIONS)}")
    name = _parse_name(document.get("name"), problems)
    data = parse_data(document.get("data"), "data", catalog, problems)
    stages = _stage_mappings(document.get("stages"), "stages", problems)
    if not stages:
        problems.add(
            "stages",
            "an experiment needs at least one stage, for instance teacher: {method: supervised, ...}",
        )
    baselines = _parse_baselines(document.get("baselines"), problems)
    search = _parse_search(document.get("search"), stages, problems)
    controls = _parse_controls(document.get("controls", False), stages, search, catalog, problems, data)
    baselines |= controls
    run = parse(RunSettings, as_mapping(document.get("run"), "run", problems), "run", problems)
    if run is not None:
        _check_worker_stages(run, [stages, *baselines.values()], problems)
    if search is not None:
        chain = _check_chains(stages, baselines, search, catalog, problems, data)
        target = chain.get(search.objectives[0].stage)
        final = data if target is None else target.data
        if final is not None:
            _check_validation(final, [stages, *baselines.values()], search, problems)
    if problems or data is None or search is None or run is None:
        raise ConfigurationError(*problems)
    return ExperimentSpec(
        name=name, data=data, stages=stages, baselines=baselines, controls=tuple(controls), search=search,
        run=run, catalog=catalog,
    )  # fmt: skip


def _check_worker_stages(run: RunSettings, chains: Sequence[Mapping[str, Any]], problems: Problems) -> None:
    known = list(dict.fromkeys(name for chain in chains for name in chain))
    for name in [name for name in run.stages if name not in known]:
        problems.add(f"run.stages.{name}", f"{name!r} is not a stage{nearest(name, known)}")


def _parse_name(name: Any, problems: Problems) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        problems.add("name", f"expected letters, digits, '.', '_' or '-' (at most 100), got {name!r}")
        return ""
    return name


def _stage_mappings(value: Any, path: str, problems: Problems) -> dict[str, dict[str, Any]]:
    stages = {}
    for name, stage in as_mapping(value, path, problems).items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in SECTIONS:
            problems.add(
                f"{path}.{name}", "a stage name is lower-case letters, digits and '_', and no section's name"
            )
        stages[name] = as_mapping(stage, f"{path}.{name}", problems)
    return stages


def _parse_baselines(value: Any, problems: Problems) -> dict[str, dict[str, dict[str, Any]]]:
    baselines = {}
    for label, stages in as_mapping(value, "baselines", problems).items():
        taken = label in POINT_LABELS or label.startswith(PREFIX)
        if taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", label):
            problems.add(
                f"baselines.{label}",
                f"a baseline's name is letters, digits, '.', '_' or '-', not {' or '.join(POINT_LABELS)}, and does not start with {PREFIX!r}",
            )
        baselines[label] = _stage_mappings(stages, f"baselines.{label}", problems)
    return baselines


def _parse_controls(
    value: Any,
    stages: Mapping[str, Any],
    search: SearchSettings | None,
    catalog: Catalog,
    problems: Problems,
    data: DataSettings | None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """What ``controls: true`` adds to the baselines; nothing while the stages themselves are wrong."""
    if not isinstance(value, bool):
        problems.add("controls", f"expected true or false, got {value!r}")
    if value is not True or search is None:
        return {}
    target, own = search.objectives[0].stage, Problems()
    chain = resolve_chain(stages, {}, target, catalog, own, data)
    return {} if own else control_baselines(stages, chain, target, catalog, problems)


def _parse_search(value: Any, stages: Mapping[str, Any], problems: Problems) -> SearchSettings | None:
    settings = as_mapping(value, "search", problems)
    objectives = _parse_objectives(settings.pop("objective", None), stages, problems)
    space = {}
    for path, domain in as_mapping(settings.pop("space", None), "search.space", problems).items():
        if path.partition(".")[0] not in stages or "." not in path:
            problems.add(
                f"search.space.{path}",
                f"expected STAGE.SETTING with a stage of this experiment; stages: {', '.join(stages)}",
            )
            continue
        parsed = parse_domain(domain, f"search.space.{path}", problems)
        if parsed is not None:
            space[path] = parsed
    if isinstance(settings.get("scheduler"), str):
        settings["scheduler"] = {"name": settings["scheduler"]}
    allowed = {item.name for item in fields(SearchSettings)} - {"objectives"} | {"objective"}
    for name in [name for name in settings if name not in allowed]:
        problems.add(f"search.{name}", f"{name!r} is not a setting of search{nearest(name, allowed)}")
        settings.pop(name)
    search = parse(
        SearchSettings,
        {**settings, "space": Typed(space), "objectives": Typed(tuple(objectives))},
        "search",
        problems,
    )
    if search is None or not objectives:
        return None
    ranges = [path for path, domain in space.items() if domain.kind != "grid"]
    if search.algorithm == "grid" and ranges:
        problems.add(
            "search.algorithm",
            f"grid cannot draw from {', '.join(ranges)}; use {{grid: [...]}} there, or algorithm: random or optuna",
        )
    return search


def _parse_objectives(value: Any, stages: Mapping[str, Any], problems: Problems) -> list[Objective]:
    if value is None or value == []:
        problems.add("search.objective", "is missing; for instance objective: {maximize: student.top1}")
        return []
    found = []
    for item in value if isinstance(value, list) else [value]:
        direction, name = (
            next(iter(item.items())) if isinstance(item, Mapping) and len(item) == 1 else (None, None)
        )
        if direction not in ("maximize", "minimize") or not isinstance(name, str) or "." not in name:
            problems.add(
                "search.objective", f"expected {{maximize: STAGE.METRIC}} or {{minimize: ...}}, got {item!r}"
            )
        elif name.partition(".")[0] not in stages:
            problems.add(
                "search.objective",
                f"{name!r} names no stage of this experiment{nearest(name.partition('.')[0], stages)}",
            )
        else:
            found.append(Objective(name=name, maximize=direction == "maximize"))
    if len(found) > 2 or len({objective.stage for objective in found}) > 1:
        problems.add("search.objective", "at most two objectives, both of the same stage")
    return found


def _check_chains(
    stages: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]],
    search: SearchSettings,
    catalog: Catalog,
    problems: Problems,
    data: DataSettings | None,
) -> Chain:
    """Type the experiment itself, each baseline, and each value that the space may set, one at a time."""
    target = search.objectives[0].stage
    base = resolve_chain(stages, {}, target, catalog, problems, data)
    used = set(base) | _check_baselines(stages, baselines, target, catalog, problems, data)
    for name in stages:
        if name not in used and not problems:
            problems.add(
                f"stages.{name}",
                f"nothing leads from this stage to the objective's stage {target!r}; remove it or use ${name}",
            )
    for path, domain in search.space.items():
        seen = set(problems)
        for value in domain.probes():
            own = Problems()
            resolve_chain(stages, {path: value}, target, catalog, own, data)
            for problem in [problem for problem in own if problem not in seen]:
                seen.add(problem)
                problems.add("", f"search.space.{path} = {value!r}: {problem}")
    if target in base:
        _check_metrics(search, catalog.method(base[target].method).evaluation_metrics + MEASURED, problems)
    return base


def _check_baselines(
    stages: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]],
    target: str,
    catalog: Catalog,
    problems: Problems,
    data: DataSettings | None,
) -> set[str]:
    """Names of the stages that the baselines use."""
    used: set[str] = set()
    for label, replaced in baselines.items():
        own = Problems()
        chain = resolve_chain(with_baseline(stages, replaced), {}, target, catalog, own, data)
        used |= set(chain)
        for name in [name for name in replaced if name not in chain and not own]:
            own.add(
                f"stages.{name}",
                f"nothing leads from this stage to the objective's stage {target!r}{nearest(name, stages)}",
            )
        for problem in own:
            if problem not in problems:
                problems.add("", problem.replace("stages.", f"baselines.{label}.", 1))
    return used


def _check_metrics(search: SearchSettings, known: Sequence[str], problems: Problems) -> None:
    for objective in search.objectives:
        metric = objective.metric
        if metric.startswith("test_"):
            better = f"{objective.stage}.{metric.removeprefix('test_')}"
            problems.add(
                "search.objective",
                f"{objective.name!r} reads the test set; choices read the validation split: use {better}",
            )
        elif metric not in known:
            hint = nearest(metric, known)
            problems.add("search.objective", f"stage {objective.stage!r} reports no {metric!r}{hint}")


def _check_validation(
    data: DataSettings,
    chains: Sequence[Mapping[str, Mapping[str, Any]]],
    search: SearchSettings,
    problems: Problems,
) -> None:
    trains = [
        as_mapping(stage.get("train"), "", Problems()) for stages in chains for stage in stages.values()
    ]
    keeps_best = any(train.get("keep") == "best" for train in trains)
    if data.validation == 0.0 and (search.space or search.scheduler.name != "none" or keeps_best):
        problems.add(
            "data.validation",
            "is 0, but this experiment makes choices (search space, scheduler or keep: best); hold out a part of the training data, for instance 0.1",
        )
