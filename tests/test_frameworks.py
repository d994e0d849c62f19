"""Libraries that build on torch's layers take fastnn's for them: captum, Lightning, skorch."""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dispatch_log import ran_kernels
from networks import CLASSES, assert_near, fused_network, make_batch, network
from torch import Tensor

from fastnn import nn, optim

# captum says that it puts hooks on layers and that KernelShap takes a while.
pytestmark = pytest.mark.filterwarnings("ignore:Setting .*hooks", "ignore:You are providing multiple inputs")

# ---- captum: attribution methods, told by the name of their class

TARGETS = torch.tensor([0, 2, 1])
BASELINES = torch.zeros(3, 1, 8, 8, dtype=torch.float64)

# Methods that know the model as a function, with their options.
OF_FUNCTIONS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 10},
    "GradientShap": {"baselines": BASELINES},
    "FeatureAblation": {},
    "Occlusion": {"sliding_window_shapes": (1, 3, 3)},
    "ShapleyValueSampling": {"n_samples": 2},
    "KernelShap": {"n_samples": 20},
}
# Methods that put hooks on layers, found as instances of torch's classes, or on the layer of this number.
OF_LAYERS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "GuidedBackprop": (None, {}),
    "Deconvolution": (None, {}),
    "LayerActivation": (4, {}),
    "LayerGradCam": (0, {}),
    "GuidedGradCam": (0, {}),
    "LayerConductance": (4, {"n_steps": 10}),
    "LayerIntegratedGradients": (2, {"n_steps": 10}),
    "InternalInfluence": (4, {"n_steps": 10}),
    "NeuronGradient": (4, {"neuron_selector": (2,)}),
}


def attribution(name: str, model: torch.nn.Module, layer: int | None = None, **options: Any) -> Tensor:
    method = getattr(pytest.importorskip("captum.attr"), name)
    images, _ = make_batch(3)
    torch.manual_seed(0)
    np.random.seed(0)  # GradientShap draws from it
    if not name.startswith("Neuron") and name != "LayerActivation":
        options["target"] = TARGETS
    explainer = method(model) if layer is None else method(model, model[layer])
    return explainer.attribute(images.requires_grad_(), **options)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_captum_explains_a_network_as_a_function(name: str, fused: bool) -> None:
    with ran_kernels("conv2d_forward", "linear_forward"):
        ours = attribution(name, fused_network() if fused else network(nn), **OF_FUNCTIONS[name])
    expected = attribution(name, network(torch.nn), **OF_FUNCTIONS[name])
    assert expected.any()
    assert_near(ours, expected)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_captum_finds_the_layers(name: str) -> None:
    layer, options = OF_LAYERS[name]
    with ran_kernels("conv2d_forward", "linear_forward"):
        ours = attribution(name, network(nn), layer, **options)
    expected = attribution(name, network(torch.nn), layer, **options)
    assert expected.any()
    assert_near(ours, expected)


# What README says to do for methods that go by a layer's exact class.
NONLINEAR_OF_TORCH = types.SimpleNamespace(
    Sequential=nn.Sequential, Conv2d=nn.Conv2d, Linear=nn.Linear, ReLU=torch.nn.ReLU, MaxPool2d=torch.nn.MaxPool2d
)


@pytest.mark.parametrize("name", ["DeepLift", "DeepLiftShap"])
def test_captum_has_rules_for_torchs_nonlinear_layers_between_ours(name: str) -> None:
    with ran_kernels("conv2d_forward", "linear_forward"):
        ours = attribution(name, network(NONLINEAR_OF_TORCH), baselines=BASELINES)
    assert_near(ours, attribution(name, network(torch.nn), baselines=BASELINES))


def test_captum_propagates_relevance_by_the_rules_that_layers_are_given() -> None:
    rules = pytest.importorskip("captum.attr._utils.lrp_rules")
    results = []
    for layers in (NONLINEAR_OF_TORCH, torch.nn):
        model = network(layers)
        for layer in model:
            if not isinstance(layer, torch.nn.ReLU):
                layer.rule = rules.EpsilonRule()
        results.append(attribution("LRP", model))
    assert results[1].any()
    assert_near(*results)


# ---- Lightning


def lightning_module(lightning: Any, layers: Any, optimizers: Any) -> Any:
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_function = network(layers), layers.CrossEntropyLoss()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            images, targets = batch
            loss = self.loss_function(self.model(images), targets)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = optimizers.Adam(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    return Classifier()


@pytest.mark.filterwarnings("ignore:.*many workers", "ignore:.*LeafSpec")
def test_lightning_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*make_batch(12)), batch_size=5)

    def fit(layers: Any, optimizers: Any, epochs: int, checkpoint: Path | None = None) -> tuple[Any, dict[str, Tensor]]:
        module = lightning_module(lightning, layers, optimizers)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer, module.state_dict()

    with ran_kernels("conv2d_forward", "linear_backward", "cross_entropy_backward", "adam_step"):
        trainer, _ = fit(nn, optim, epochs=1)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        _, ours = fit(nn, optim, epochs=2, checkpoint=tmp_path / "one.ckpt")
    _, expected = fit(torch.nn, torch.optim, epochs=2)
    assert_near(ours, expected)


# ---- skorch


def our_network() -> torch.nn.Module:
    return network(nn)


def torchs_network() -> torch.nn.Module:
    return network(torch.nn)


def test_skorch_trains_searches_and_pickles() -> None:
    skorch = pytest.importorskip("skorch")
    selection = pytest.importorskip("sklearn.model_selection")
    base = pytest.importorskip("sklearn.base")
    images, targets = (tensor.numpy() for tensor in make_batch(30))

    def fit(module: Callable[[], torch.nn.Module], loss: Any, optimizer: Any) -> Any:
        options = {"lr": 0.02, "max_epochs": 3, "batch_size": 7, "train_split": None, "verbose": 0}
        estimator = skorch.NeuralNetClassifier(module, criterion=loss, optimizer=optimizer, **options)
        return estimator.fit(images, targets)

    def search(estimator: Any) -> np.ndarray:
        rates = {"lr": [0.001, 0.05, 0.3]}
        found = selection.GridSearchCV(base.clone(estimator), rates, cv=2, scoring="neg_log_loss").fit(images, targets)
        return found.cv_results_["mean_test_score"]

    with ran_kernels("conv2d_forward", "linear_backward", "cross_entropy_backward", "adam_step"):
        ours = fit(our_network, nn.CrossEntropyLoss, optim.Adam)
    expected = fit(torchs_network, torch.nn.CrossEntropyLoss, torch.optim.Adam)
    probabilities = ours.predict_proba(images)
    assert probabilities.shape == (30, CLASSES)
    assert_near(torch.from_numpy(probabilities), torch.from_numpy(expected.predict_proba(images)))
    assert np.array_equal(pickle.loads(pickle.dumps(ours)).predict_proba(images), probabilities)
    assert_near(torch.from_numpy(search(ours)), torch.from_numpy(search(expected)))
