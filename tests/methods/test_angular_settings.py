"""Settings: impossible values are refused, and what ``inactive`` names really changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_cases import build, make_batch
from torch import Tensor

from methods import METHODS
from methods.angular.settings import AngularViewsSettings
from methods.angular.student import AngularDistillationSettings
from methods.kd import KnowledgeDistillationSettings
from methods.supervised import SupervisedSettings


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, (0.20, 0.25, 0.30, 0.35, 0.40)),
        ({"num_branches": 1}, (0.20,)),
        ({"num_branches": 3, "dropout_low": 0.0, "dropout_high": 0.5}, (0.0, 0.25, 0.5)),
        ({"preset": "released"}, (0.15, 0.20, 0.25, 0.30, 0.35)),
        ({"preset": "released", "num_branches": 1}, (0.15,)),
    ],
)
def test_dropout_rates(settings: dict[str, Any], rates: tuple[float, ...]) -> None:
    assert AngularViewsSettings(**settings).dropout_rates == pytest.approx(rates)


IMPOSSIBLE: list[tuple[type, dict[str, Any], str]] = [
    (AngularViewsSettings, {"num_branches": 0}, "num_branches must be at least 1, got 0"),
    (AngularViewsSettings, {"num_branches": -3}, "got -3"),
    (AngularViewsSettings, {"num_branches": 7, "preset": "released"}, "at most 6 .* got 7"),
    (AngularViewsSettings, {"margin": 1.5}, "margin must lie between 0 and 1 .* got 1.5"),
    (AngularViewsSettings, {"margin": 0.0}, "margin"),
    (AngularViewsSettings, {"margin": float("nan")}, "margin .* got nan"),
    (AngularViewsSettings, {"dropout_low": 0.5}, "dropout_low=0.5 and dropout_high=0.4"),
    (AngularViewsSettings, {"dropout_high": 1.0}, "dropout_high"),
    (AngularViewsSettings, {"dropout_low": -0.1}, "dropout_low"),
    (AngularViewsSettings, {"label_weight": 0.0}, "label_weight must be a finite number above 0, got 0.0"),
    (AngularViewsSettings, {"temperature": 0}, "temperature"),
    (AngularViewsSettings, {"contrast_temperature": -1}, "contrast_temperature"),
    (AngularViewsSettings, {"feature_intra_weight": -1.0}, "feature_intra_weight .* got -1.0"),
    (AngularViewsSettings, {"logit_inter_weight": float("inf")}, "logit_inter_weight .* got inf"),
    (
        AngularViewsSettings,
        {"init": "identity"},
        "init must be one of orthogonal, stacked_qr, got 'identity'",
    ),
    (AngularViewsSettings, {"bn_init": "calibrated"}, "bn_init"),
    (AngularViewsSettings, {"constraint": "soft"}, "constraint"),
    (AngularViewsSettings, {"intra_reduction": "sum"}, "intra_reduction"),
    (AngularViewsSettings, {"offset_space": "cosine"}, "offset_space"),
    (AngularViewsSettings, {"preset": "arxiv"}, "preset"),
    (AngularDistillationSettings, {"kd_weight": -1.0}, "kd_weight"),
    (AngularDistillationSettings, {"view_weight": float("nan")}, "view_weight"),
    (AngularDistillationSettings, {"kd_weight": 0, "ce_weight": 0}, "learn nothing"),
    (AngularDistillationSettings, {"heads": "none"}, "heads must be one of joint, frozen"),
    (KnowledgeDistillationSettings, {"temperature": 0.0}, "temperature"),
    (KnowledgeDistillationSettings, {"ce_weight": -0.1}, "ce_weight"),
    (KnowledgeDistillationSettings, {"kd_weight": 0, "ce_weight": 0}, "kd_weight and ce_weight are all 0"),
    (SupervisedSettings, {"label_smoothing": 1.0}, "label_smoothing"),
]


@pytest.mark.parametrize(("settings", "values", "message"), IMPOSSIBLE)
def test_impossible_settings_are_refused(settings: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**values)


OTHER_VALUES: dict[str, Any] = {
    "num_branches": 2,
    "feature_inter_weight": 0.7,
    "feature_intra_weight": 0.3,
    "logit_inter_weight": 0.4,
    "logit_intra_weight": 0.2,
    "label_weight": 1.5,
    "margin": 0.45,
    "contrast_temperature": 0.3,
    "temperature": 2.0,
    "dropout_low": 0.1,
    "dropout_high": 0.5,
    "init": "stacked_qr",
    "bn_init": "standard",
    "constraint": "hinge",
    "extra_branch_division": False,
    "intra_reduction": "per_sample",
    "offset_space": "unit",
    "preset": "released",
}
NO_INTER = {"feature_inter_weight": 0.0, "logit_inter_weight": 0.0}
NO_INTRA = {"feature_intra_weight": 0.0, "logit_intra_weight": 0.0}
INTER_SETTINGS = {"margin", "contrast_temperature", "constraint", "extra_branch_division"}
INTRA_SETTINGS = {"intra_reduction", "offset_space"}
SINGLE = {
    "feature_intra_weight",
    "logit_intra_weight",
    "extra_branch_division",
    "dropout_high",
} | INTRA_SETTINGS
HINGE = {"contrast_temperature", "extra_branch_division"}
INACTIVE: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"feature_inter_weight": 0.0}, set()),
    ({"logit_intra_weight": 0.0}, set()),
    (NO_INTER, INTER_SETTINGS),
    (NO_INTRA, INTRA_SETTINGS),
    (NO_INTER | NO_INTRA, INTER_SETTINGS | INTRA_SETTINGS),
    ({"num_branches": 1}, SINGLE),
    ({"num_branches": 1} | NO_INTER, SINGLE | INTER_SETTINGS),
    ({"constraint": "hinge"}, HINGE),
    ({"preset": "released"}, {"dropout_low", "dropout_high", "init"}),
    ({"preset": "released", "num_branches": 1}, {"dropout_low", "init"} | SINGLE),
]


def total_and_gradient(**settings: Any) -> list[Tensor]:
    method = build("views", **settings)
    total = method(make_batch()).total
    total.backward()
    return [total.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("point", "names"), INACTIVE)
def test_inactive_settings_and_only_those_change_nothing(point: dict[str, Any], names: set[str]) -> None:
    settings = AngularViewsSettings(**({"num_branches": 3} | point))
    assert METHODS["angular_views"].inactive(settings) == names
    before = total_and_gradient(**point)
    for name in names:
        after = total_and_gradient(**(point | {name: OTHER_VALUES[name]}))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_every_setting_acts_at_the_default_point(name: str) -> None:
    before, after = total_and_gradient(), total_and_gradient(**{name: OTHER_VALUES[name]})
    assert len(before) != len(after) or not torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    ("point", "names"),
    [
        ({}, set()),
        ({"kd_weight": 0.0}, {"view_weight", "detach_target"}),
        ({"view_weight": 0.0}, {"detach_target"}),
        ({"heads": "frozen"}, {"detach_target"}),
    ],
)
def test_inactive_settings_of_the_student(point: dict[str, Any], names: set[str]) -> None:
    assert METHODS["angular_kd"].inactive(AngularDistillationSettings(**point)) == names

    def run(**changes: Any) -> list[Tensor]:
        method = build("student", **(point | changes))
        total = method(make_batch()).total
        total.backward()
        return [total.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in method.parameters())]

    before = run()
    for name, value in (("view_weight", 0.3), ("detach_target", False)):
        same = all(torch.equal(a, b) for a, b in zip(before, run(**{name: value}), strict=True))
        assert same == (name in names), name


def test_inactive_settings_of_plain_distillation() -> None:
    views = {"view_weight", "detach_target"}
    assert METHODS["kd"].inactive(KnowledgeDistillationSettings()) == {"detach_target"}
    assert METHODS["kd"].inactive(KnowledgeDistillationSettings(heads="joint")) == set()
    assert METHODS["kd"].inactive(KnowledgeDistillationSettings(kd_weight=0.0)) == {"temperature", *views}
