"""The training loop: data order, losses, NaN, interrupts, early stopping, schedulers, checkpoints."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from fastnn import nn, optim
from fastnn.classifier import CNNClassifier
from fastnn.training import (
    STEPS_PER_CHECK,
    Batches,
    EarlyStopping,
    History,
    ModelFileError,
    ProgramStep,
    SoftmaxMSELoss,
    TrainingError,
    epoch_order,
    evaluate,
    make_forward,
    make_loss,
    make_step,
    train,
)

CLASSES = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small for more, and waiting for a busy core would cost more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(seed: int = 0) -> CNNClassifier:
    torch.manual_seed(seed)
    return CNNClassifier((1, 8, 8), CLASSES, conv_channels=(8,), hidden=(8,))


def make_data(count: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is told by the third of the rows that is bright."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    for image, target in zip(images, targets, strict=True):
        image[:, 2 * int(target) + 1 : 2 * int(target) + 3] += 1
    return images, targets


def fit(model: CNNClassifier, **options: Any) -> History:
    images, targets = make_data()
    options = {"epochs": 4, "batch_size": 16, "seed": 5, "progress": False, "lr": 1e-2, **options}
    return model.fit(images, targets, **options)


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def interrupt_at(epoch: int) -> Any:
    def callback(model: torch.nn.Module, record: dict[str, float]) -> None:
        if record["epoch"] == epoch:
            raise KeyboardInterrupt

    return callback


class InterruptingLoss:
    """Cross-entropy that Ctrl-C, or a NaN, meets at one call."""

    def __init__(self, call: int, value: float | None = None) -> None:
        self.calls = 0
        self.call = call
        self.value = value

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = torch.nn.functional.cross_entropy(logits, targets)
        if self.calls != self.call:
            return loss
        if self.value is None:
            raise KeyboardInterrupt
        return loss * self.value


# ---- models of any kind


class WithExtraState(torch.nn.Linear):
    note = "as made"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def test_extra_state_goes_into_the_checkpoint_and_back(tmp_path: Path) -> None:
    images, targets = make_data()
    batches = Batches(images.flatten(1), targets, 16)

    def run(model: torch.nn.Module, epochs: int, resume: bool) -> None:
        train(
            model,
            batches,
            epochs=epochs,
            optimizer=optim.Adam(model.parameters()),
            early_stopping=5,
            progress=False,
            seed=0,
            checkpoint=tmp_path / "checkpoint",
            resume=resume,
        )

    model = torch.nn.Sequential(WithExtraState(64, CLASSES))
    model[0].note = "changed"
    run(model, 1, False)
    resumed = torch.nn.Sequential(WithExtraState(64, CLASSES))
    run(resumed, 2, True)
    run(model, 2, True)
    assert resumed[0].note == "changed"
    assert torch.equal(parameters(resumed), parameters(model))


def test_modules_are_in_their_modes_again_after_training_and_evaluation() -> None:
    images, targets = make_data()
    batches = Batches(images.flatten(1), targets, 16)
    model = torch.nn.Sequential(nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, CLASSES))
    model[1].eval()
    evaluate(model, batches, make_loss("cross_entropy"))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    optimizer = optim.Adam(model.parameters())
    train(model, batches, epochs=1, optimizer=optimizer, validation=batches, progress=False)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    classifier = make_model()
    classifier[0].eval()
    classifier.predict(images)
    assert classifier.training and not classifier[0].training


# ---- batches and their order


def test_every_epoch_has_every_image_once_in_its_own_order() -> None:
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    batches = Batches(images, torch.arange(10), batch_size=4)
    orders = []
    for epoch in (1, 2):
        seen = [batches.gather(rows) for rows in batches.order(7, epoch).split(batches.batch_size)]
        assert [len(y) for _, y in seen] == [4, 4, 2]
        order = torch.cat([y for _, y in seen])
        assert torch.equal(torch.cat([x for x, _ in seen]).flatten(), order / 255)
        orders.append(order.tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(50, 3, 4), epoch_order(50, 3, 4))
    assert not torch.equal(epoch_order(50, 3, 4), epoch_order(50, 4, 3))
    assert not torch.equal(epoch_order(50, 0, 1), epoch_order(50, 1, 0))
    assert sorted(epoch_order(50, 2**63 - 1, 1).tolist()) == list(range(50))


def test_uint8_images_stay_uint8_and_come_out_as_floats_up_to_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    batches = Batches(images, torch.zeros(3, dtype=torch.int64), batch_size=3)
    rows = batches.rows()
    batch, _ = batches.gather(rows)
    assert batches.images.dtype == torch.uint8
    assert batch.dtype == torch.float32
    assert torch.equal(batch.flatten(), torch.tensor([0, 51, 255]) / 255)


# ---- one step


def test_step_returns_the_loss_and_right_answers_and_updates_as_torch_does() -> None:
    images, targets = make_data(16)
    model, expected = make_model(), make_model()
    batches = Batches(images, targets, batch_size=16)
    step = make_step(model, make_loss("cross_entropy"), optim.SGD(model.parameters(), lr=0.1), batches)
    assert isinstance(step, ProgramStep)
    (loss,), correct = step(batches, torch.arange(16))

    logits = expected(images)
    expected_loss = torch.nn.functional.cross_entropy(logits, targets)
    expected_loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=1e-6)
    assert int(correct) == int((logits.argmax(1) == targets).sum())
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-5, atol=1e-6)


def test_mse_loss_compares_probabilities_with_one_hot() -> None:
    logits, targets = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    expected = ((logits.softmax(1) - torch.eye(CLASSES)[targets]) ** 2).mean()
    torch.testing.assert_close(SoftmaxMSELoss()(logits, targets), expected)


# ---- what an epoch records


def test_history_records_the_means_over_all_images() -> None:
    # With a learning rate of almost nothing every step sees the same model, so the means are evaluate's.
    model = make_model()
    images, targets = make_data()
    history = fit(model, lr=1e-12, epochs=2, validation_data=make_data(30, seed=1))
    expected = evaluate(model, Batches(images, targets, 64), make_loss("cross_entropy"))
    assert len(history) == 2 and history.seed == 5
    for number, record in enumerate(history, start=1):
        assert record["epoch"] == number
        assert (record["loss"], record["accuracy"]) == pytest.approx(expected, abs=1e-5)
        assert record["images_per_second"] == pytest.approx(70 / record["seconds"])
        assert {"val_loss", "val_accuracy"} <= record.keys()
    assert json.loads(history.to_json()) == {"seed": 5, "epochs": history.epochs}


def test_torchs_seed_governs_the_seed_that_is_drawn() -> None:
    model, seeds = make_model(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds.append(fit(model, epochs=1, seed=None).seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_train_serves_any_model_that_gives_logits() -> None:
    images, targets = make_data()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(64, CLASSES))
    model.eval()
    history = train(
        model,
        Batches(images, targets, 16),
        epochs=8,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        seed=0,
        progress=False,
    )
    assert history[-1]["accuracy"] > 0.9
    assert not model.training


@pytest.mark.parametrize("shape", [(16,), (4, 4)], ids=["rows", "channels of pixels"])
def test_train_serves_other_inputs_than_images(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    targets = torch.arange(30) % CLASSES
    batches = Batches(torch.rand(30, *shape) + targets.view(-1, *[1] * len(shape)), targets, 8)
    model = torch.nn.Sequential(torch.nn.Flatten(), nn.Linear(16, CLASSES))
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    history = train(model, batches, epochs=10, optimizer=optimizer, validation=batches, seed=0, progress=False)
    assert history[-1]["val_loss"] < 0.5 * history[0]["val_loss"]


def test_progress_prints_one_line_per_epoch_away_from_a_terminal(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(make_model(), epochs=2, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("loss " in line and "accuracy " in line and "images/s" in line for line in lines)

    with caplog.at_level("INFO", "fastnn"):
        fit(make_model(), epochs=1, progress=False)
    assert not capsys.readouterr().out
    assert caplog.messages[0].startswith("epoch 1/1")


def test_bar_on_a_terminal_leaves_one_line_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    rich_console = pytest.importorskip("rich.console")
    from fastnn import _progress

    monkeypatch.setattr(_progress, "REFRESH_RATE", math.inf)
    screen = io.StringIO()
    bar = _progress.BarProgress(rich_console.Console(file=screen, force_terminal=True, color_system=None, width=80))
    for epoch in (1, 2):
        bar.start_epoch(epoch, 2, 100)
        bar.advance(50, 1.0, 0.5)
        bar.end_epoch({"loss": 0.25, "accuracy": 0.75, "images_per_second": 1234.0})
    bar.close()
    shown = screen.getvalue()
    for epoch in (1, 2):
        assert re.search(rf"epoch {epoch}/2 .*loss 1.0000  accuracy 0.5000  .* images/s", shown)
        assert f"epoch {epoch}/2  loss 0.2500  accuracy 0.7500  1,234 images/s" in shown


def test_evaluation_records_no_graph() -> None:
    images, targets = make_data()
    recorded = []

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = self.scale * torch.nn.functional.cross_entropy(logits, targets)
            recorded.append(logits.requires_grad or loss.requires_grad)
            return loss

    def look(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        recorded.append(torch.is_grad_enabled() or output.requires_grad)

    compilable = make_model()
    other = torch.nn.Sequential(compilable, torch.nn.Dropout(0.5))
    other.register_forward_hook(look)
    batches = Batches(images, targets, 16)
    for model in (compilable, other):
        evaluate(model, batches, Loss())
        assert not make_forward(model, batches)(batches.rows()).requires_grad
    assert len(recorded) == 2 + 2 * batches.steps and not any(recorded)
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in compilable.parameters())


# ---- what can go wrong


@pytest.mark.parametrize("step", [1, 3, 5])
def test_nan_loss_names_the_step_and_rolls_back_to_the_last_complete_epoch(step: int) -> None:
    expected = make_model()
    fit(expected, epochs=1, loss=InterruptingLoss(0, math.nan))
    model = make_model()
    with pytest.raises(TrainingError, match=rf"became nan at epoch 2, step {step} of 5 .*end of epoch 1") as caught:
        fit(model, loss=InterruptingLoss(5 + step, math.nan))
    assert (caught.value.epoch, caught.value.step) == (2, step)
    assert torch.equal(parameters(model), parameters(expected))
    assert len(model.history_) == 1


def test_infinite_loss_in_the_first_epoch_rolls_back_to_the_start() -> None:
    model = make_model()
    before = parameters(model)
    with pytest.raises(TrainingError, match=r"became inf at epoch 1, step 2 of 5 .*before the training"):
        fit(model, loss=InterruptingLoss(2, math.inf))
    assert torch.equal(parameters(model), before)
    assert not hasattr(model, "history_")


def test_nan_is_found_beyond_the_first_check() -> None:
    images, targets = make_data(2 * STEPS_PER_CHECK + 10)
    step = STEPS_PER_CHECK + 7
    with pytest.raises(TrainingError, match=f"epoch 1, step {step} of"):
        make_model().fit(images, targets, batch_size=1, epochs=1, loss=InterruptingLoss(step, math.nan), progress=False)


def test_parameters_that_turn_nan_in_the_last_step_are_not_kept() -> None:
    class NaNAtStep(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            if self.steps == 10:
                self.param_groups[0]["lr"] = math.nan
            return super().step(closure)

    model = make_model()
    with pytest.raises(TrainingError, match=r"parameter 0.weight became NaN .* epoch 2, step 5 of 5"):
        fit(model, optimizer=NaNAtStep(model.parameters(), lr=1e-2))
    assert parameters(model).isfinite().all()
    assert len(model.history_) == 1


@pytest.mark.parametrize("where", ["callback", "step"])
def test_interrupt_keeps_the_last_complete_epoch(where: str) -> None:
    expected = make_model()
    fit(expected, epochs=2)
    model = make_model()
    options: dict[str, Any] = (
        {"callbacks": [interrupt_at(2)]} if where == "callback" else {"loss": InterruptingLoss(13)}
    )
    with pytest.warns(UserWarning, match="interrupted: keeping the state after epoch 2"):
        history = fit(model, **options)
    assert len(history) == 2 and model.history_ is history
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-4, atol=1e-5)


def test_interrupt_in_the_first_epoch_is_raised_with_the_parameters_as_before() -> None:
    model = make_model()
    before = parameters(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss=InterruptingLoss(3))
    assert torch.equal(parameters(model), before)


def raise_in_the_third_epoch(model: torch.nn.Module, record: dict[str, float]) -> None:
    if record["epoch"] == 3:
        with torch.no_grad():
            model[0].weight.zero_()
        raise OSError("the disk of the callback is full")


class EndingRate(lr_scheduler.CyclicLR):
    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch == 17:
            raise OSError("the disk of the scheduler is full")
        super().step(epoch)


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [raise_in_the_third_epoch]},
        {"scheduler": partial(EndingRate, base_lr=0.01, max_lr=0.01, cycle_momentum=False)},
    ],
    ids=["callback", "scheduler"],
)
def test_what_others_raise_leaves_the_last_complete_epoch(options: dict[str, Any]) -> None:
    expected, model = make_model(), make_model()
    fit(expected, epochs=3)
    with pytest.raises(OSError, match="is full"):
        fit(model, **options)
    assert torch.equal(parameters(model), parameters(expected))
    assert len(model.history_) == 3


# ---- stopping


def test_early_stopping_restores_the_best_epoch() -> None:
    images, _ = make_data(30, seed=1)
    # Labels without a pattern: what the training learns makes them less likely.
    noise = torch.randint(CLASSES, (30,), generator=torch.Generator().manual_seed(0))
    model, copies = make_model(), []
    history = fit(
        model,
        epochs=60,
        validation_data=(images, noise),
        early_stopping=3,
        callbacks=[lambda model, record: copies.append(parameters(model))],
    )
    losses = [record["val_loss"] for record in history]
    best = losses.index(min(losses))
    assert len(history) == best + 1 + 3 < 60
    assert torch.equal(parameters(model), copies[best])
    assert not torch.equal(parameters(model), copies[-1])


def test_early_stopping_starts_anew_only_with_a_training() -> None:
    stopping = EarlyStopping(1)
    stopping.update({"loss": 1.0}, {})
    with pytest.raises(TypeError, match="callbacks"):
        fit(make_model(), early_stopping=stopping, callbacks=print)
    assert stopping.best == 1.0
    fit(make_model(), epochs=1, early_stopping=stopping)
    assert stopping.best != 1.0
    assert len(fit(make_model(), early_stopping=np.int64(9))) == 4


def test_early_stopping_counts_nan_as_no_fall_and_watches_the_loss_without_validation() -> None:
    stopping = EarlyStopping(2, min_delta=0.1)
    for loss in (1.0, 0.95, math.nan):
        assert not stopping.stopped
        stopping.update({"loss": loss}, {})
    assert stopping.stopped and stopping.best == 1.0


def test_early_stopping_takes_any_number_for_better_than_nan() -> None:
    stopping = EarlyStopping(2)
    first, second = {"of": torch.ones(1)}, {"of": torch.zeros(1)}
    stopping.update({"loss": math.nan}, first)
    assert stopping.waited == 1 and stopping.best_parameters is first
    stopping.update({"loss": 5.0}, second)
    assert stopping.waited == 0 and stopping.best == 5.0 and stopping.best_parameters is second


def test_a_callback_that_returns_true_stops() -> None:
    class Stop:
        def on_epoch_end(self, model: torch.nn.Module, record: dict[str, float]) -> bool:
            return record["epoch"] == 2

    assert len(fit(make_model(), callbacks=[Stop()])) == 2
    assert len(fit(make_model(), callbacks=[lambda model, record: np.True_])) == 1


# ---- schedulers


def learning_rates(**options: Any) -> list[float]:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    rates: list[float] = []

    def note(model: torch.nn.Module, record: dict[str, float]) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    scheduler = options.pop("scheduler")
    fit(model, optimizer=optimizer, scheduler=scheduler(optimizer), callbacks=[note], **options)
    return rates


def test_epoch_schedulers_step_once_an_epoch() -> None:
    assert learning_rates(scheduler=partial(lr_scheduler.StepLR, step_size=2, gamma=0.1)) == pytest.approx(
        [1.0, 0.1, 0.1, 0.01]
    )


def test_one_cycle_steps_with_every_batch() -> None:
    scheduler = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    rates = learning_rates(scheduler=scheduler, epochs=3)
    reference = scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    expected = []
    for _ in range(3):
        for _ in range(5):
            reference.optimizer.step()
            reference.step()
        expected.append(reference.get_last_lr()[0])
    assert rates == pytest.approx(expected)


def test_one_cycle_has_to_last_for_all_epochs(tmp_path: Path) -> None:
    model = make_model()
    before = parameters(model)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    options = {"optimizer": optimizer, "scheduler": scheduler, "checkpoint": tmp_path / "run.safetensors"}
    with pytest.raises(ValueError, match=r"total_steps of at least 15 \(3 epochs of 5 steps\), got 12"):
        fit(model, epochs=3, **options)
    assert torch.equal(parameters(model), before)
    fit(model, epochs=1, **options)
    with pytest.raises(ValueError, match=r"at least 15 \(2 epochs of 5 steps after 5 that are done\), got 12"):
        fit(model, epochs=2, **options)
    fit(model, epochs=2, resume=True, **options)
    assert scheduler.last_epoch == 10


def test_plateau_scheduler_sees_the_loss() -> None:
    scheduler = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
    assert learning_rates(scheduler=scheduler) == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_plateau_scheduler_prefers_the_validation_loss() -> None:
    images, targets = make_data()
    scheduler = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
    options: dict[str, Any] = {"scheduler": scheduler, "batch_size": 70}  # one step an epoch: the loss falls
    assert learning_rates(**options) == [1.0] * 4
    # Labels that are all wrong: what lowers the loss raises theirs.
    validation = images, (targets + 1) % CLASSES
    assert learning_rates(**options, validation_data=validation) == [1.0, 0.5, 0.25, 0.125]


def test_scheduler_must_be_one_of_this_optimizer() -> None:
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="scheduler: expected one made for this optimizer"):
        fit(make_model(), scheduler=lr_scheduler.StepLR(other, 1))
    with pytest.raises(TypeError, match=r"scheduler: expected a torch LRScheduler .* got str"):
        fit(make_model(), scheduler="cosine")


# ---- checkpoints

RESUMABLE: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    "mse": {"loss": "mse"},
    "in order": {"shuffle": False},
    "early stopping": {"early_stopping": 5, "validation_data": make_data(30, seed=1)},
    "cosine": {"scheduler": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6)},
    "one cycle": {"scheduler": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=30)},
    "multi-step": {"scheduler": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4])},
    "plateau": {"scheduler": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)},
}


@pytest.mark.parametrize("options", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_resumed_run_ends_as_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    whole = make_model()
    expected = fit(whole, epochs=5, **options)
    fit(make_model(), epochs=2, checkpoint=path, **options)
    resumed = make_model(seed=99)
    history = fit(resumed, epochs=5, checkpoint=path, resume=True, **options)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert [(r["loss"], r["accuracy"]) for r in history] == [(r["loss"], r["accuracy"]) for r in expected]
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_resume_after_an_interrupt_inside_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    expected = make_model()
    fit(expected, loss=make_loss("cross_entropy"))
    with pytest.warns(UserWarning, match="after epoch 2"):
        fit(make_model(), checkpoint=path, callbacks=[interrupt_at(2)])
    resumed = make_model()
    assert len(fit(resumed, checkpoint=path, resume=True)) == 4
    assert torch.equal(parameters(resumed), parameters(expected))


def test_resume_takes_the_drawn_seed_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first = fit(make_model(), epochs=1, seed=None, checkpoint=path)
    second = fit(make_model(), epochs=2, seed=None, checkpoint=path, resume=True)
    assert first.seed == second.seed


def test_resume_of_a_finished_run_gives_its_parameters(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    finished, model = make_model(), make_model(seed=9)
    fit(finished, epochs=2, checkpoint=path)
    assert len(fit(model, epochs=2, checkpoint=path, resume=True)) == 2
    assert torch.equal(parameters(model), parameters(finished))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 8}, "written with batch_size=16, this run has batch_size=8"),
        ({"seed": 6}, "written with seed=5, this run has seed=6"),
        ({"lr": 0.5}, "written with lr=0.01, this run has lr=0.5"),
        ({"optimizer": "sgd"}, 'written with optimizer="Adam", this run has optimizer="SGD"'),
        ({"loss": "mse"}, 'written with loss="cross_entropy", this run has loss="mse"'),
        ({"shuffle": False}, "written with shuffle=true, this run has shuffle=false"),
        ({"early_stopping": 3}, "written with early_stopping=null, this run has early_stopping=3"),
    ],
)
def test_resume_refuses_other_settings(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(make_model(), epochs=1, checkpoint=path)
    model = make_model(seed=9)
    before = parameters(model)
    with pytest.raises(ValueError, match=words):
        fit(model, checkpoint=path, resume=True, **options)
    assert torch.equal(parameters(model), before)


def test_resume_refuses_another_network(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(make_model(), epochs=1, checkpoint=path)
    model = make_model()
    other = CNNClassifier((1, 8, 8), CLASSES, model.conv_channels, (3,))
    with pytest.raises(ValueError, match=r'written with model={"hidden": .*}, this run has model={"hidden": \[3\]}$'):
        fit(other, checkpoint=path, resume=True)


def test_checkpoint_faults_come_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume: expected a checkpoint to resume from"):
        fit(make_model(), resume=True)
    with pytest.raises(FileNotFoundError, match="does not exist; start the run without resume"):
        fit(make_model(), checkpoint=tmp_path / "none", resume=True)
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        fit(make_model(), checkpoint=tmp_path / "no" / "run.safetensors")
    damaged = tmp_path / "damaged"
    fit(make_model(), epochs=1, checkpoint=damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        fit(make_model(), checkpoint=damaged, resume=True)
    model = make_model()
    model.save(tmp_path / "model")
    with pytest.raises(ModelFileError, match="expected a fastnn checkpoint, got a fastnn 'model' file"):
        fit(model, checkpoint=tmp_path / "model", resume=True)
    fit(model, epochs=1, checkpoint=damaged)
    with pytest.raises(ModelFileError, match="expected a fastnn model, got a fastnn 'checkpoint' file"):
        CNNClassifier.load(damaged)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root makes no files")
def test_a_checkpoint_in_a_folder_that_takes_none_is_refused_before_the_training() -> None:
    model = make_model()
    before = parameters(model)
    with pytest.raises(OSError, match=r"checkpoint: cannot write here, .*: '/proc/run\.safetensors'"):
        fit(model, checkpoint="/proc/run.safetensors")
    assert torch.equal(parameters(model), before)


def rewrite(path: Path, change: Any) -> None:
    """The checkpoint again with its document changed."""
    import safetensors.torch

    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["fastnn"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not iterable)
    change(document)
    safetensors.torch.save_file(tensors, path, metadata={"fastnn": json.dumps(document)})


def rename_a_parameter(document: dict[str, Any]) -> None:
    document["model"]["dict"][0][0] = "surprise"


def swap_two_parameters(document: dict[str, Any]) -> None:
    pairs = document["model"]["dict"]
    pairs[0][1], pairs[1][1] = pairs[1][1], pairs[0][1]


def name_a_tensor_twice(document: dict[str, Any]) -> None:
    pairs = document["model"]["dict"]
    pairs[1][1] = pairs[0][1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document.update(epoch=7), "expected a history of 7 epochs"),
        (lambda document: document.update(epoch="1"), "expected a history of '1' epochs"),
        (lambda document: document.update(history=[3]), "the history has a damaged epoch"),
        (lambda document: document.update(seed=-1), "settings or seed are damaged"),
        (lambda document: document.update(settings=[]), "settings or seed are damaged"),
        (lambda document: document.update(model=3), "expected the parameters 0.weight, .* got others"),
        (rename_a_parameter, "expected the parameters 0.weight, .* got others"),
        (swap_two_parameters, r"0.weight: expected torch.float32 \(8, 1, 3, 3\), got other"),
        (name_a_tensor_twice, "damaged state: nothing known under"),
        (lambda document: document.update(optimizer={"dict": []}), "the optimizer state is damaged"),
        (
            lambda document: document.update(optimizer={"dict": [["state", 1], ["param_groups", []]]}),
            "the state does not fit the model or optimizer",
        ),
        (lambda document: document.update(scheduler={"dict": []}), "the scheduler state is damaged"),
        (lambda document: document.update(scheduler={"a": 1, "b": 2}), "damaged state"),
    ],
)
def test_resume_refuses_a_damaged_checkpoint(change: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(make_model(), epochs=1, seed=None, checkpoint=path)
    rewrite(path, change)
    model = make_model(seed=9)
    before = parameters(model)
    with pytest.raises(ModelFileError, match=words):
        fit(model, seed=None, checkpoint=path, resume=True)
    assert torch.equal(parameters(model), before)
    assert not hasattr(model, "history_")
