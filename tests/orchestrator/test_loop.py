"""The training loop against hand-written ones, and fed with bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_doubles import (
    CPU,
    DoubleStream,
    Tiny,
    assert_same_bits,
    make_method,
    make_stream,
    run,
)  # fmt: skip
from torch import Tensor

from methods.base import Batch
from orchestrator.errors import ConfigurationError, DivergedError
from orchestrator.loop import evaluate


def test_weights_and_history_equal_a_plain_loop_bit_for_bit() -> None:
    method, stream = make_method(), make_stream()
    optimizer = torch.optim.SGD(
        [parameter for parameter in method.parameters() if parameter.requires_grad],
        lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True,
    )  # fmt: skip
    expected = []
    method.train()
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = learning_rate = 0.05 * 0.1 ** sum(
            epoch >= start for start in (3, 3, 4)
        )
        total = 0.0
        for batch in stream.batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(method.network(batch.images), batch.labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch.labels)
        expected.append({"epoch": epoch + 1, "learning_rate": learning_rate, "train_loss": total / 22})
    training = run(epochs=4, validate=False)
    assert_same_bits(training.weights, method.network.state_dict())
    for row, wanted in zip(training.history, expected, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
        assert row["train_ce"] == row["train_loss"]
        assert row.keys() == {
            "epoch",
            "time",
            "learning_rate",
            "train_loss",
            "train_ce",
            "train_norm",
            "train_top1",
        }
    assert training.metrics.keys() == {"train_loss", "train_ce", "train_norm", "train_top1"}


def test_parameters_without_loss_or_gradient_stay() -> None:
    method = make_method()
    run(method)
    assert method.unused.tolist() == [1.0, 1.0]
    assert method.frozen.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_equals_the_full_batch(accumulate: int) -> None:
    def weights(accumulate: int) -> dict[str, Tensor]:
        method = make_method(torch.float64, batch_norm=False)
        stream = DoubleStream(make_stream())
        return run(method, training=stream, validate=False, accumulate=accumulate, clip_norm=0.5).weights

    for found, expected in zip(weights(accumulate).values(), weights(1).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("num_rows", "accumulate", "sizes"), [(8, 3, [3, 3, 2]), (3, 8, [3]), (5, 4, [3, 2])]
)
def test_micro_batches_have_two_rows_or_more(num_rows: int, accumulate: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def note(batch: Batch, loss: Tensor) -> Tensor:
        assert len(batch.images) == len(batch.indices)
        seen.append(len(batch.labels))
        return loss

    run(
        make_method(poison=note),
        training=make_stream(num_rows),
        validate=False,
        epochs=1,
        accumulate=accumulate,
    )
    assert seen == sizes


def test_average_is_evaluated_and_kept() -> None:
    method = make_method()
    training = run(method, ema_decay=0.9)
    plain, averaged = method.network, make_method()
    averaged.network.load_state_dict(training.weights)
    assert not torch.equal(plain[1].weight, averaged.network[1].weight)
    found = evaluate(averaged, make_stream(13, shuffle=False, seed=5), device=CPU)
    assert found == {name: training.metrics[name] for name in found}
    assert_same_bits(plain.state_dict(), run(validate=False).weights)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 50])
def test_evaluation_is_exact_for_uneven_batches(batch_size: int) -> None:
    method = make_method(dropout=0.5)
    method.train()
    whole = next(iter(make_stream(13, 13, shuffle=False).batches(0)))
    found = evaluate(method, make_stream(13, batch_size, shuffle=False), device=CPU)
    assert method.training
    method.eval()
    logits = method.network(whole.images)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, whole.labels).item(), rel=1e-6)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == whole.labels).double().mean().item())


@pytest.mark.parametrize(("epochs", "every", "expected"), [(5, 2, [2, 4, 5]), (3, 9, [3]), (2, 1, [1, 2])])
def test_evaluation_every_few_epochs_and_at_the_end(epochs: int, every: int, expected: list[int]) -> None:
    training = run(epochs=epochs, evaluate_every=every)
    assert [row["epoch"] for row in training.history if "top1" in row] == expected
    assert [row["epoch"] for row in training.history] == list(range(1, epochs + 1))


@pytest.mark.parametrize(("objective", "mode"), [("", "max"), ("loss", "min"), ("loss", "max")])
def test_best_epoch_is_kept(objective: str, mode: str) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    method = make_method()

    def note(row: dict[str, float]) -> None:
        seen[int(row["epoch"])] = {
            name: tensor.clone() for name, tensor in method.network.state_dict().items()
        }

    settings = {
        "epochs": 6,
        "learning_rate": 0.5,
        "keep": "best",
        "objective": objective,
        "objective_mode": mode,
    }
    training = run(method, observe=note, **settings)
    values = [row[objective or "top1"] for row in training.history]
    best = values.index(max(values) if mode == "max" else min(values))
    assert 0 <= best < 5, "the last epoch would not show a difference"
    assert_same_bits(training.weights, seen[best + 1])
    assert training.metrics["loss"] == training.history[best]["loss"]
    last = run(epochs=6, learning_rate=0.5)
    assert_same_bits(last.weights, seen[6])
    assert last.metrics["loss"] == last.history[-1]["loss"]


def test_no_epochs_keep_the_initial_weights_and_evaluate_them() -> None:
    training = run(epochs=0, keep="best")
    assert training.history == []
    assert_same_bits(training.weights, make_method().network.state_dict())
    assert training.metrics == evaluate(make_method(), make_stream(13, shuffle=False, seed=5), device=CPU)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision: str) -> None:
    training = run(precision=precision, epochs=6)
    assert training.history[-1]["train_loss"] < training.history[0]["train_loss"]
    assert all(tensor.isfinite().all() for tensor in training.weights.values())
    assert not torch.equal(training.weights["1.weight"], run(epochs=6).weights["1.weight"])


def nan_in_epoch(epoch: int) -> Callable[[Batch, Tensor], Tensor]:
    return lambda batch, loss: loss * math.nan if batch.epoch == epoch else loss


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"accumulate": 2}, {"optimizer": "adamw"}])
def test_nan_loss_is_divergence_and_leaves_the_weights_finite(settings: dict[str, Any]) -> None:
    method = make_method(poison=nan_in_epoch(1))
    seen: list[float] = []
    with pytest.raises(
        DivergedError, match=r"epoch 2, at step 1: not finite: ce, loss; .* rate 0\.05"
    ) as caught:
        run(method, observe=lambda row: seen.append(row["epoch"]), **settings)
    assert "ce nan" in str(caught.value)
    assert seen == [1]
    assert all(parameter.isfinite().all() for parameter in method.parameters())


def test_gradient_that_is_not_finite_is_divergence() -> None:
    def steep(batch: Batch, loss: Tensor) -> Tensor:
        return loss + (loss - loss.detach()).sqrt()  # value 0, slope infinite

    method = make_method(poison=steep)
    with pytest.raises(DivergedError, match="not finite: the gradient"):
        run(method)
    assert_same_bits(
        {name: parameter.detach() for name, parameter in method.named_parameters()},
        {name: parameter.detach() for name, parameter in make_method().named_parameters()},
    )


def test_fp16_survives_one_broken_step() -> None:
    def once(batch: Batch, loss: Tensor) -> Tensor:
        return loss * math.inf if batch.epoch == 1 and 0 in batch.indices else loss

    training = run(make_method(poison=once), precision="fp16")
    assert all(tensor.isfinite().all() for tensor in training.weights.values())


def test_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = run(make_method(dropout=0.5))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert_same_bits(run(make_method(dropout=0.5)).weights, first.weights)
    other = run(make_method(dropout=0.5), seed=2)
    assert not torch.equal(other.weights["1.weight"], first.weights["1.weight"])


def test_changing_loss_names_are_refused() -> None:
    class Fickle(Tiny):
        def forward(self, batch: Batch) -> Any:
            step = super().forward(batch)
            step.metrics[f"rows{len(batch.labels)}"] = torch.zeros(())  # type: ignore[index]
            return step

    method = Fickle(make_method().settings)
    with pytest.raises(
        ValueError, match=r"Fickle must give the same losses and metrics .*rows6.* after .*rows8"
    ):
        run(method)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "best", "validate": False}, "keep='best' needs a validation split"),
        ({"keep": "best", "objective": "top7"}, "'top7' is not a metric of Tiny: top1, loss"),
        ({"training": make_stream(batch_size=4)}, "batch_size is 8, but the stream's is 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_start(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(**arguments)


def test_method_without_parameters_is_refused() -> None:
    method = make_method()
    method.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="Tiny has no parameter to train"):
        run(method)
