"""CNNClassifier: learning, the forms of images and labels, model files, each bad input with its words."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, prune

import fastnn
from fastnn import nn, optim
from fastnn.classifier import CNNClassifier, ModelFileError

datasets = pytest.importorskip("sklearn.datasets")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small for more, and waiting for a busy core would cost more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits, 1797 of 8x8, enlarged and framed to uint8 28x28."""
    bunch = datasets.load_digits()
    images = np.kron(bunch.images * (255 / 16), np.ones((1, 3, 3)))
    return np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8), bunch.target


@pytest.fixture(scope="module")
def trained(digits: tuple[np.ndarray, np.ndarray]) -> CNNClassifier:
    images, labels = digits
    torch.manual_seed(0)
    model = CNNClassifier()
    model.fit(images[:1400], labels[:1400], epochs=3, seed=0, num_threads=1, progress=False)
    return model


def small_model(**options: Any) -> CNNClassifier:
    torch.manual_seed(0)
    return CNNClassifier(
        **{"input_shape": (1, 8, 8), "num_classes": 3, "conv_channels": (8,), "hidden": (8,), **options}
    )


def small_data(count: int = 60, channels: int = 1, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (n, channels, size, size) whose class is told by the third of the rows that is bright."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = random.integers(0, 100, (count, channels, size, size), dtype=np.uint8)
    third = size // 3
    for image, label in zip(images, labels, strict=True):
        image[:, third * label : third * (label + 1)] += 150
    return images, labels


def fit(model: CNNClassifier, x: Any, y: Any, **options: Any) -> Any:
    return model.fit(x, y, **{"epochs": 6, "batch_size": 8, "lr": 1e-2, "seed": 0, "progress": False, **options})


def torch_reference() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(1600, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


# ---- the model


def test_learns_handwritten_digits(trained: CNNClassifier, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert len(trained.history_) == 3
    assert trained.history_[2]["loss"] < trained.history_[0]["loss"] / 3
    result = trained.evaluate(images[1400:], labels[1400:])
    assert result["accuracy"] > 0.85
    assert result["accuracy"] == np.mean(trained.predict(images[1400:]) == labels[1400:])


def test_probabilities_are_the_softmax_of_the_logits(
    trained: CNNClassifier, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits[0][:300], digits[1][:300]
    probabilities = trained.predict_proba(images)
    assert probabilities.shape == (300, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    with torch.no_grad():
        logits = trained(torch.from_numpy(images).unsqueeze(1) / 255)
    np.testing.assert_allclose(probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trained.predict_proba(images, batch_size=7), probabilities, rtol=1e-4, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert trained.evaluate(images, labels)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_state_dict_moves_between_torch_and_fastnn(
    direction: str, trained: CNNClassifier, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images = torch.from_numpy(digits[0][:100]).unsqueeze(1) / 255
    torch.manual_seed(1)
    plain = torch_reference()
    if direction == "to torch":
        ours = trained
        plain.load_state_dict(ours.state_dict())
    else:
        ours = CNNClassifier()
        ours.load_state_dict(plain.state_dict())
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        expected = plain(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(ours.predict(images), expected.argmax(1))


def test_starts_with_torchs_initial_parameters() -> None:
    torch.manual_seed(4)
    ours = CNNClassifier()
    torch.manual_seed(4)
    for (name, parameter), expected in zip(ours.named_parameters(), torch_reference().parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_slices_copies_and_pickles_as_a_module(trained: CNNClassifier) -> None:
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        expected = trained(images)
        for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
            assert torch.equal(other(images), expected) and other.classes_ == trained.classes_
        features = trained[:7]
        assert type(features) is nn.Sequential and features(images).shape == (2, 1600)
        assert torch.equal(trained[7:](features(images)), expected)


SHAPES: dict[str, dict[str, Any]] = {
    "photographs": {"input_shape": (3, 32, 32), "conv_channels": (8, 8, 8), "padding": 1, "hidden": (16,)},
    "5x5 kernels": {"input_shape": (1, 20, 20), "kernel_size": 5, "padding": 2, "conv_channels": (4, 6)},
    "not square": {"input_shape": (2, 9, 14)},
    "no blocks": {"input_shape": (1, 5, 5), "conv_channels": ()},
    "no hidden layers": {"hidden": ()},
    "1x1 left": {"input_shape": (1, 4, 4), "conv_channels": (5,), "hidden": (7, 6, 5)},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_other_shapes_agree_with_plain_torch(options: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(**options)
    layers: list[torch.nn.Module] = []
    for layer in model:
        if isinstance(layer, torch.nn.Conv2d):
            plain = torch.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            layers += [plain, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        elif isinstance(layer, torch.nn.Linear):
            layers += [torch.nn.Linear(layer.in_features, layer.out_features), torch.nn.ReLU()]
        elif isinstance(layer, torch.nn.Flatten):
            layers.append(layer)
    reference = torch.nn.Sequential(*layers[:-1])
    reference.load_state_dict(model.state_dict())
    images = torch.rand(5, *model.input_shape)
    targets = torch.tensor([0, 1, 2, 0, 1])
    for network in (model, reference):
        torch.nn.functional.cross_entropy(network(images), targets).backward()
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    model.save(tmp_path / "model")
    assert np.array_equal(CNNClassifier.load(tmp_path / "model").predict(images), model.predict(images))


def test_learns_colour_images() -> None:
    images, labels = small_data(channels=3, size=32)
    model = small_model(input_shape=(3, 32, 32), conv_channels=(8, 8), padding=1)
    assert fit(model, images, labels)[-1]["accuracy"] > 0.9
    assert np.array_equal(model.predict(images.transpose(0, 2, 3, 1)), model.predict(images))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "instance"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "callable"])
def test_every_optimizer_lowers_every_loss(optimizer: str, loss: str) -> None:
    model = small_model()
    chosen: Any = optim.SGD(model.parameters(), lr=0.2, momentum=0.9) if optimizer == "instance" else optimizer
    function: Any = torch.nn.functional.cross_entropy if loss == "callable" else loss
    lr = 1.0 if optimizer == "sgd" else 1e-2
    history = fit(model, *small_data(), optimizer=chosen, loss=function, lr=lr)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]


# ---- images


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "tensor": torch.from_numpy,
    "without channel axis": lambda x: x[:, 0],
    "channels last": lambda x: x.transpose(0, 2, 3, 1),
    "float32": lambda x: (x / np.float32(255)).astype(np.float32),
    "float64": lambda x: x.astype(np.float32) / np.float32(255) + np.float64(0),
    "big-endian": lambda x: (x / np.float32(255)).astype(">f4"),
    "negative strides": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "every second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "nested lists": lambda x: (x / np.float32(255)).astype(np.float32).tolist(),
    "tensor with a gradient": lambda x: (torch.from_numpy(x) / 255).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_images_in_every_form_give_the_same_result(form: Callable[[np.ndarray], Any]) -> None:
    images, labels = small_data()
    expected, model = small_model(), small_model()
    fit(expected, images, labels, epochs=1)
    fit(model, form(images), labels, epochs=1)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert np.array_equal(model.predict_proba(form(images)), expected.predict_proba(images))


def test_channels_last_images_as_wide_as_they_have_channels() -> None:
    images = torch.rand(30, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    model = small_model(input_shape=(3, 3, 5), conv_channels=())
    assert np.array_equal(model.predict_proba(images.permute(0, 2, 3, 1)), model.predict_proba(images))
    with pytest.raises(ValueError, match=r"shape \(n, 3, 3, 5\) or \(n, 3, 5, 3\), got \(30, 5, 3, 3\)"):
        model.predict(images.permute(0, 3, 1, 2))


def test_images_whose_shape_fits_both_ways_have_channels_first() -> None:
    images = torch.rand(30, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    model = small_model(input_shape=(3, 3, 3), conv_channels=())
    with torch.no_grad():
        expected = model(images).softmax(1)
    np.testing.assert_allclose(model.predict_proba(images), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected images of shape \(n, 3, 3, 3\), got \(30, 3, 3\)"):
        model.predict(images[:, 0])


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_float_images_of_another_dtype_are_computed_as_compiled(dtype: type) -> None:
    images, labels = small_data()
    other = (images / 255).astype(dtype)
    model, expected = small_model(), small_model()
    with fastnn.explain_dispatch() as log:
        fit(model, other, labels, epochs=1, validation_data=(other, labels))
        model.predict(other)
        model.evaluate(other, labels)
    assert not [record for record in log if record.operator in ("training_step", "forward_pass")]
    fit(expected, other.astype(np.float32), labels, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_read_only_images_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    images, labels = small_data()
    images.flags.writeable = False
    fit(small_model(), images, labels, epochs=1)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_fit_leaves_the_images_alone() -> None:
    images, labels = small_data()
    floats = images.astype(np.float32)
    before = floats.copy()
    fit(small_model(), floats, labels, epochs=1)
    assert np.array_equal(floats, before)


def test_float64_model_trains_in_float64() -> None:
    model = small_model().double()
    assert fit(model, *small_data())[-1]["accuracy"] > 0.9
    assert model[0].weight.dtype == torch.float64


# ---- labels


LABELS: dict[str, tuple[list[Any], list[Any], Any]] = {
    # name: (label of class 0, 1, 2), expected classes_, type of what predict returns
    "strings": (["zebra", "ant", "cow"], ["ant", "cow", "zebra"], np.str_),
    "sparse integers": ([900, -7, 30], [-7, 30, 900], np.int64),
    "floats": ([0.5, 2.5, 1.5], [0.5, 1.5, 2.5], np.float64),
    "tuples": ([("b", 1), ("a", 2), ("c", 0)], [("a", 2), ("b", 1), ("c", 0)], tuple),
    "unsortable": (["x", 3, None], ["x", 3, None], object),
    "beyond int64 and uint64": ([2**63 + 1, -1, 5], [-1, 5, 2**63 + 1], int),
    "dates": (
        list(np.array(["2026-03-01", "2026-01-01", "2026-02-01T00:00:00.000000001"], "datetime64[ns]")),
        list(np.array(["2026-01-01", "2026-02-01T00:00:00.000000001", "2026-03-01"], "datetime64[ns]")),
        np.datetime64,
    ),
    "NUL at the end": (["a\0", "a", "b"], ["a", "a\0", "b"], str),
}


@pytest.mark.parametrize(("names", "classes", "kind"), LABELS.values(), ids=LABELS.keys())
def test_labels_of_any_kind_come_back(names: list[Any], classes: list[Any], kind: type) -> None:
    images, places = small_data()
    labels = [names[place] for place in places]
    model = small_model()
    fit(model, images, labels)
    assert model.classes_ == classes
    predicted = model.predict(images)
    assert np.mean([a == b for a, b in zip(predicted, labels, strict=True)]) > 0.9
    assert all(isinstance(label, kind) for label in predicted)
    assert model.evaluate(images, labels)["accuracy"] > 0.9


@pytest.mark.parametrize(
    "form",
    [torch.from_numpy, np.uint8, lambda y: y[:, None], list, lambda y: y.astype(">i8")],
    ids=["tensor", "uint8", "column", "numpy scalars", "big-endian"],
)
def test_integer_labels_in_every_form(form: Callable[[np.ndarray], Any]) -> None:
    images, labels = small_data()
    model = small_model()
    fit(model, images, form(labels))
    assert model.classes_ == [0, 1, 2]
    assert np.mean(model.predict(images) == labels) > 0.9


def test_small_integers_are_the_logits_own_numbers() -> None:
    images, labels = small_data()
    model = small_model(num_classes=10)
    fit(model, images, labels + 4)
    assert model.classes_ == list(range(10))
    assert set(model.predict(images)) <= {4, 5, 6}


def test_fewer_classes_than_logits() -> None:
    images, labels = small_data()
    model = small_model(num_classes=5)
    fit(model, images, np.array(["a", "b", "c"])[labels])
    assert model.predict_proba(images).shape == (60, 3)
    np.testing.assert_allclose(model.predict_proba(images).sum(1), 1, rtol=1e-5)


def test_logits_beyond_the_classes_are_no_answers() -> None:
    images, labels = small_data()
    names = np.array(["a", "b", "c"])[labels]
    model = small_model(num_classes=5)
    fit(model, images, names)
    with torch.no_grad():
        model[-1].bias[3:] = 100
    assert model.evaluate(images, names)["accuracy"] == np.mean(model.predict(images) == names) > 0.9


def test_given_classes_fix_the_order() -> None:
    images, labels = small_data()
    model = small_model(classes=("cow", "ant", "bee"))
    fit(model, images, np.array(["ant", "bee", "cow"])[labels])
    assert model.classes_ == ["cow", "ant", "bee"]
    assert model.predict_proba(images)[labels == 0].mean(0).argmax() == 1


def test_a_second_fit_goes_on_with_the_same_classes() -> None:
    images, labels = small_data()
    names = np.array(["a", "b", "c"])[labels]
    model = small_model()
    first = fit(model, images, names, epochs=2)[-1]["loss"]
    some = labels < 2
    assert fit(model, images[some], names[some], epochs=1)[0]["loss"] < first
    assert model.classes_ == ["a", "b", "c"]


# ---- reproducible


def test_same_seed_gives_the_same_bits() -> None:
    images, labels = small_data()
    runs = []
    for seed in (1, 1, 2):
        model = small_model()
        fit(model, images, labels, seed=seed)
        runs.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_callbacks_of_the_first_epoch_predict_evaluate_and_save_with_the_labels_of_this_fit(tmp_path: Path) -> None:
    images, places = small_data()
    labels = np.array(["ant", "bee", "cow"])[places]
    accuracies = []

    def note(model: CNNClassifier, record: dict[str, float]) -> None:
        assert set(model.predict(images)) <= set(labels)
        assert model.history_.epochs == [record]
        accuracies.append(model.evaluate(images, labels)["accuracy"])
        model.save(tmp_path / "model")

    fit(small_model(), images, labels, epochs=1, callbacks=[note])
    loaded = CNNClassifier.load(tmp_path / "model")
    assert loaded.classes_ == ["ant", "bee", "cow"]
    assert [loaded.evaluate(images, labels)["accuracy"]] == accuracies


def test_layers_that_were_frozen_between_two_fits_stay() -> None:
    model = small_model()
    fit(model, *small_data(), epochs=1)
    model[0].requires_grad_(False)
    frozen, trained = model[0].weight.detach().clone(), model[-1].weight.detach().clone()
    fit(model, *small_data(), epochs=1)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[-1].weight, trained)


def test_num_threads_holds_during_fit_only() -> None:
    seen = []

    def note(model: torch.nn.Module, record: dict[str, float]) -> None:
        seen.append(torch.get_num_threads())

    fit(small_model(), *small_data(), epochs=1, num_threads=2, callbacks=[note])
    assert seen == [2] and torch.get_num_threads() == 1


def test_modes_are_restored() -> None:
    images, labels = small_data()
    model = small_model().eval()
    fit(model, images, labels, epochs=1, validation_data=(images, labels))
    assert not model.training
    model.train()
    model.predict(images)
    model.evaluate(images, labels)
    assert model.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())


# ---- model files


def test_loaded_model_predicts_the_same_bits(
    trained: CNNClassifier, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    trained.save(tmp_path / "model.safetensors")
    loaded = CNNClassifier.load(tmp_path / "model.safetensors")
    assert np.array_equal(loaded.predict_proba(digits[0]), trained.predict_proba(digits[0]))
    assert loaded.classes_ == trained.classes_ and repr(loaded) == repr(trained)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    fit(loaded, digits[0][:64], digits[1][:64], epochs=1)


@pytest.mark.parametrize("labels", [["a", 'ä\n"', ""], [1, 2.5, "1"], [True, False, 7], [-(2**70), 0, 2**70]])
def test_labels_keep_their_type_in_the_file(labels: list[Any], tmp_path: Path) -> None:
    small_model(classes=labels).save(tmp_path / "model")
    classes = CNNClassifier.load(tmp_path / "model").classes_
    assert classes == labels and [type(label) for label in classes] == [type(label) for label in labels]


def test_other_label_types_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"labels of type str, int, float or bool, got \('b', 1\) of type tuple"):
        small_model(classes=["a", ("b", 1), "c"]).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


OTHER_NETWORKS: dict[str, tuple[Callable[[CNNClassifier], Any], str]] = {
    "inserted": (lambda m: m.insert(4, torch.nn.Dropout()), r"layer 4: expected Linear\(.*, got Dropout\(p=0.5"),
    "appended": (lambda m: m.append(torch.nn.Softmax(1)), r"layer 7: expected none, .* got Softmax\(dim=1\)"),
    "exchanged": (lambda m: m.__setitem__(5, torch.nn.Tanh()), r"layer 5: expected Identity\(\), .* got Tanh\(\)"),
    "with buffers": (lambda m: m.__setitem__(1, torch.nn.BatchNorm2d(8)), "layer 1: expected Identity.* got BatchNorm"),
    "without bias": (lambda m: m.__setitem__(6, nn.Linear(8, 3, bias=False)), "layer 6: .* bias=True.* got .*bias=Fal"),
    "without ReLU": (lambda m: setattr(m[0], "activation", None), "layer 0: expected Conv2d.*activation='relu'.* got"),
    "weight norm": (lambda m: parametrizations.weight_norm(m[4]), "layer 4: expected Linear.* got ParametrizedLinear"),
    "pruned": (
        lambda m: prune.l1_unstructured(m[4], "weight", 0.5),
        r"tensor 4.weight: expected \(8, 72\) .* got none",
    ),
    "two dtypes": (lambda m: m[4].double(), "tensor 4.weight: expected .*float32, .* got .*float64"),
}


@pytest.mark.parametrize(("change", "words"), OTHER_NETWORKS.values(), ids=OTHER_NETWORKS.keys())
def test_a_network_that_would_not_come_back_is_not_saved(
    change: Callable[[CNNClassifier], Any], words: str, tmp_path: Path
) -> None:
    model, path = small_model(), tmp_path / "model"
    model.save(path)
    before = path.read_bytes()
    change(model)
    with pytest.raises(ValueError, match=f"(?s)model: {words}"):
        model.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saving_leaves_torchs_random_numbers_alone(tmp_path: Path) -> None:
    model = small_model()
    before = torch.get_rng_state()
    model.save(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_network_makes_the_same_file(tmp_path: Path) -> None:
    model = small_model(classes=["ant", "bee", "cow"])
    files = set()
    for _ in range(8):
        model.save(tmp_path / "model")
        files.add((tmp_path / "model").read_bytes())
    assert len(files) == 1


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    small_model().save(path)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        small_model().save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_missing_safetensors_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"fastnn\[app\]"):
        small_model().save(tmp_path / "model")
    with pytest.raises(ImportError, match=r"fastnn\[app\]"):
        fit(small_model(), *small_data(), checkpoint=tmp_path / "run")


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any]], Any] = lambda document: None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
) -> None:
    """The model file again, with its document and tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["fastnn"])
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not iterable itself)
    change(document)
    tensors(state)
    safetensors.save_file(state, path, metadata={"fastnn": json.dumps(document)})


def configured(**values: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda document: document["config"].update(values))


def raw(content: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content(path.read_bytes()))


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (raw(lambda old: b""), "expected a fastnn model file, got an empty file"),
    "text": (raw(lambda old: b"hello, this is no model at all"), "not a fastnn model file"),
    "truncated tensors": (raw(lambda old: old[:-1]), "truncated or damaged"),
    "truncated header": (raw(lambda old: old[:100]), "truncated or damaged"),
    "trailing bytes": (raw(lambda old: old + b"x"), "truncated or damaged"),
    "huge header length": (raw(lambda old: header(2**63, b"{}")), "truncated or damaged"),
    "tensor beyond the file": (
        raw(lambda old: header(64, b'{"0.weight":{"dtype":"F32","shape":[99999999,99999],"data_of":0}}'.ljust(64))),
        "truncated or damaged",
    ),
    "pickle": (raw(lambda old: pickle.dumps({"0.weight": 1})), "not a fastnn model file"),
    "foreign": (
        lambda path: safetensors.save_file({"a": torch.zeros(1)}, path),
        'not a fastnn model: its metadata has no "fastnn" entry',
    ),
    "bad JSON": (
        lambda path: safetensors.save_file({"a": torch.zeros(1)}, path, metadata={"fastnn": "{"}),
        "not valid JSON",
    ),
    "deep JSON": (
        lambda path: safetensors.save_file({"a": torch.zeros(1)}, path, metadata={"fastnn": "[" * 10**6}),
        "not valid JSON",
    ),
    "JSON list": (
        lambda path: safetensors.save_file({"a": torch.zeros(1)}, path, metadata={"fastnn": "[]"}),
        "expected a JSON object, got list",
    ),
    "newer": (
        lambda path: rewrite(path, lambda document: document.update(format_version=99)),
        "format version 99, this fastnn reads up to 1; update fastnn",
    ),
    "no version": (
        lambda path: rewrite(path, lambda document: document.pop("format_version")),
        "format_version: expected a positive integer, got None",
    ),
    "no config": (
        lambda path: rewrite(path, lambda document: document.pop("config")),
        "config: expected a JSON object",
    ),
    "unknown argument": (configured(surprise=1), "describes no possible model"),
    "wrong type": (configured(hidden="64"), "hidden: expected a sequence of whole numbers, got '64'"),
    "negative": (
        configured(conv_channels=[-8]),
        "conv_channels: expected a whole number of at least 1, got -8",
    ),
    "overflow": (configured(hidden=[2**62, 2**62]), "describes no possible model"),
    "beyond int64": (configured(hidden=[10**30]), "describes no possible model"),
    "larger than the file": (
        configured(hidden=[10**9]),
        r"4.weight: expected shape \(1000000000, 72\), got \(8, 72\)",
    ),
    "more layers": (configured(hidden=[8, 8]), r"6.weight: expected shape \(8, 8\), got \(3, 8\)"),
    "missing tensor": (
        lambda path: rewrite(path, tensors=lambda state: state.pop("4.bias")),
        r"expected a tensor 4.bias of shape \(8,\), got none",
    ),
    "extra tensor": (
        lambda path: rewrite(path, tensors=lambda state: state.update(extra=torch.zeros(1))),
        "got also extra",
    ),
    "integer tensor": (
        lambda path: rewrite(path, tensors=lambda state: state.update({"4.bias": torch.zeros(8, dtype=torch.int64)})),
        "expected tensors of one float type",
    ),
    "too many classes": (
        lambda path: rewrite(path, lambda document: document.update(classes=list("abcd"))),
        "classes: expected a list of 2 to 3 labels",
    ),
    "equal classes": (
        lambda path: rewrite(path, lambda document: document.update(classes=list("aab"))),
        "classes: expected different labels",
    ),
    "unhashable class": (
        lambda path: rewrite(path, lambda document: document.update(classes=["a", ["b"], "c"])),
        "labels of type str, int, float or bool",
    ),
}


@pytest.mark.parametrize(("damage", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_load_refuses_other_files(damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    small_model(classes=["a", "b", "c"]).save(path)
    damage(path)
    with pytest.raises(ModelFileError, match=words) as caught:
        CNNClassifier.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", range(0, 6000, 397))
def test_load_refuses_a_file_cut_anywhere(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model"
    small_model().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: cut * len(content) // 6000])
    with pytest.raises(ModelFileError):
        CNNClassifier.load(path)


def test_load_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CNNClassifier.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        CNNClassifier.load(tmp_path)


# ---- bad input


CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"input_shape": (1, 9, 9), "conv_channels": (8, 8, 8)},
        ValueError,
        r"too small for 3 blocks: block 2 gets 3x3, its convolution \(kernel_size=3, padding=0\) leaves 1x1",
    ),
    ({"input_shape": (1, 2, 30)}, ValueError, "block 1 gets 2x30, .* leaves 0x28"),
    ({"input_shape": (8, 8)}, ValueError, r"input_shape: expected \(channels, height, width\), got \(8, 8\)"),
    ({"input_shape": 28}, TypeError, "input_shape: expected a sequence of whole numbers, got 28"),
    ({"input_shape": (1, 8.5, 8)}, TypeError, "input_shape: expected a whole number of at least 1, got 8.5"),
    ({"num_classes": 1}, ValueError, "num_classes: expected a whole number of at least 2, got 1"),
    ({"num_classes": True}, TypeError, "num_classes: expected a whole number .* got True"),
    ({"hidden": (0,)}, ValueError, "hidden: expected a whole number of at least 1, got 0"),
    ({"kernel_size": 0}, ValueError, "kernel_size: expected a whole number of at least 1, got 0"),
    ({"padding": -1}, ValueError, "padding: expected a whole number from 0 to 2, got -1"),
    ({"padding": 3}, ValueError, "padding: expected a whole number from 0 to 2, got 3"),
    ({"classes": ["a", "b"]}, ValueError, "classes: expected num_classes=3 labels, got 2"),
    ({"classes": ["a", "b", "a"]}, ValueError, "classes: expected different labels, got 'a', 'b', 'a'"),
    ({"classes": "abc"}, TypeError, "classes: expected a list of labels, got str"),
]


@pytest.mark.parametrize(("options", "error", "words"), CONSTRUCTOR)
def test_constructor_names_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        small_model(**options)


def broken(value: float, image: int) -> np.ndarray:
    images = small_data()[0].astype(np.float32)
    images[image, 0, 2, 5] = value
    return images


IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (
        broken(np.nan, 17),
        ValueError,
        r"x: expected finite values, got nan in image 17 \(channel 0, row 2, col",
    ),
    "Inf": (broken(-np.inf, 3), ValueError, "x: expected finite values, got -inf in image 3 "),
    "beyond float32": (broken(1, 0).astype(np.float64) * 1e300, ValueError, "got inf in image 0 "),
    "wrong size": (
        np.zeros((60, 9, 9), np.uint8),
        ValueError,
        r"x: expected images of shape \(n, 1, 8, 8\) or \(n, 8, 8, 1\) or \(n, 8, 8\), got \(60, 9, 9\)",
    ),
    "wrong channels": (np.zeros((60, 3, 8, 8), np.uint8), ValueError, r"got \(60, 3, 8, 8\)"),
    "flat": (np.zeros((60, 64), np.uint8), ValueError, r"got \(60, 64\)"),
    "one image": (
        np.zeros((8, 8), np.uint8),
        ValueError,
        r"got \(8, 8\); for one image add an axis: x\[None\]",
    ),
    "a number": (np.uint8(3), ValueError, r"got \(\)"),
    "none": (np.zeros((0, 8, 8), np.uint8), ValueError, r"x: expected at least one image, got none"),
    "of different sizes": (
        [*np.zeros((2, 8, 8), np.uint8), np.zeros((9, 8), np.uint8)],
        ValueError,
        r"x: expected images of one shape, got \(8, 8\) at index 0 and \(9, 8\) at index 2",
    ),
    "complex": (
        np.zeros((60, 8, 8), complex),
        TypeError,
        "x: expected uint8 .* or float images, got .* complex128",
    ),
    "object": (np.full((60, 8, 8), None), TypeError, "got an array of object"),
    "strings": (["a.png", "b.png"], TypeError, "got an array of <U5"),
    "int64": (
        np.zeros((60, 8, 8), np.int64),
        TypeError,
        r"x: expected uint8 \(0 to 255\) or float images, got .*int64",
    ),
    "bool tensor": (torch.zeros(60, 8, 8, dtype=torch.bool), TypeError, "got torch.bool"),
    "sparse tensor": (
        torch.zeros(60, 8, 8).to_sparse(),
        TypeError,
        "x: expected a dense tensor, got torch.sparse_coo",
    ),
}


@pytest.mark.parametrize(("images", "error", "words"), IMAGES.values(), ids=IMAGES.keys())
def test_bad_images_are_named(images: Any, error: type[Exception], words: str) -> None:
    model, labels = small_model(), small_data()[1]
    with pytest.raises(error, match=words):
        fit(model, images, labels)
    with pytest.raises(error, match=words):
        model.predict_proba(images)
    with pytest.raises(error, match=words):
        model.evaluate(images, labels)
    with pytest.raises(error, match=f"validation_data {words}" if words.startswith("x:") else words):
        fit(model, *small_data(), validation_data=(images, labels))


BAD_LABELS: dict[str, tuple[Any, type[Exception], str]] = {
    "too few": ([0, 1], ValueError, "y: expected one label per image, 60, got 2"),
    "one-hot": (
        np.eye(3)[small_data()[1]],
        ValueError,
        r"got shape \(60, 3\); for one-hot labels pass y.argmax\(1\)",
    ),
    "a number": (3, TypeError, "y: expected a list or array of labels, got int"),
    "a string": ("abc", TypeError, "y: expected a list or array of labels, got str"),
    "unhashable": ([[0]] * 60, TypeError, "y: expected hashable labels, got list at index 0"),
    "NaN": ([1.0, float("nan")] * 30, ValueError, "y: expected labels, got NaN at index 1"),
    "NaT": (
        np.array(["2026-01-01", "NaT"] * 30, "datetime64[ns]"),
        ValueError,
        "y: expected labels, got NaN at index 1",
    ),
    "masked": (
        np.ma.array([0, 1, 2] * 20, mask=[True] + [False] * 59),
        ValueError,
        "y: expected a label for each image, got masked ones",
    ),
    "one class": ([2] * 60, ValueError, "y: expected at least two classes, got only 2"),
    "one class of strings": (["cat"] * 60, ValueError, "y: expected at least two classes, got only 'cat'"),
    "too many classes": (
        list(range(60)),
        ValueError,
        "y: expected at most num_classes=3 different labels, got 60: 0, 1",
    ),
}


@pytest.mark.parametrize(("labels", "error", "words"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_bad_labels_are_named(labels: Any, error: type[Exception], words: str) -> None:
    model = small_model()
    with pytest.raises(error, match=words):
        fit(model, small_data()[0], labels)
    assert not hasattr(model, "classes_")


def test_unknown_labels_are_named() -> None:
    images, labels = small_data()
    names = np.array(["ant", "bee", "cow"])[labels].astype(object)
    model = small_model()
    fit(model, images, names, epochs=1)
    names[5] = "zebra"
    words = "y: expected one of the classes 'ant', 'bee', 'cow', got 'zebra' at index 5"
    with pytest.raises(ValueError, match=words):
        model.evaluate(images, names)
    with pytest.raises(ValueError, match=words):
        fit(model, images, names)
    with pytest.raises(ValueError, match=f"validation_data {words}"):
        fit(
            small_model(classes=["ant", "bee", "cow"]),
            images,
            np.array(["ant", "bee", "cow"])[labels],
            validation_data=(images, names),
        )


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epochs": 0}, ValueError, "epochs: expected a whole number of at least 1, got 0"),
    ({"epochs": 2.5}, TypeError, "epochs: expected a whole number of at least 1, got 2.5"),
    ({"batch_size": 0}, ValueError, "batch_size: expected a whole number from 1 to 2147483647, got 0"),
    ({"batch_size": 2**62}, ValueError, "batch_size: expected a whole number from 1 to 2147483647, got 4611686"),
    ({"batch_size": "32"}, TypeError, "batch_size: expected a whole number from 1 to 2147483647, got '32'"),
    ({"lr": 0}, ValueError, "lr: expected a positive number, got 0"),
    ({"lr": float("nan")}, ValueError, "lr: expected a positive number, got nan"),
    ({"lr": "fast"}, TypeError, "lr: expected a positive number, got 'fast'"),
    (
        {"optimizer": "adamm"},
        ValueError,
        r"optimizer: expected one of \['adam', 'adamw', 'sgd'\] or .*, got 'adamm'",
    ),
    ({"optimizer": None}, ValueError, "optimizer: expected one of .* got None"),
    (
        {"loss": "hinge"},
        ValueError,
        r"loss: expected one of \['cross_entropy', 'mse'\] or a callable, got 'hinge'",
    ),
    ({"seed": -1}, ValueError, "seed: expected a whole number from 0 to .* got -1"),
    ({"seed": 1.5}, TypeError, "seed: expected a whole number .* got 1.5"),
    ({"num_threads": 0}, ValueError, "num_threads: expected a whole number from 1 to 1024, got 0"),
    ({"num_threads": 100_000}, ValueError, "num_threads: expected a whole number from 1 to 1024, got 100000"),
    ({"early_stopping": 0}, ValueError, "early_stopping: expected a whole number of at least 1, got 0"),
    (
        {"early_stopping": 1.5},
        TypeError,
        "early_stopping: expected a whole number of at least 1 or an EarlyStopping, got 1.5",
    ),
    ({"early_stopping": True}, TypeError, "early_stopping: expected a whole number of at least 1, got True"),
    ({"callbacks": [3]}, TypeError, "callbacks: expected callables or objects with on_epoch_end, got int"),
    ({"callbacks": print}, TypeError, r"callbacks: expected a sequence such as \[callback\], got <built-in"),
    ({"callbacks": None}, TypeError, r"callbacks: expected a sequence such as \[callback\], got None"),
    (
        {"loss": nn.CrossEntropyLoss},
        TypeError,
        r"loss: expected .* a callable of \(logits, targets\), got the class CrossEntropyLoss; pass Cross\w+\(\)",
    ),
    ({"validation_data": 3}, ValueError, r"validation_data: expected \(x, y\), got int"),
]


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        fit(model, *small_data(), **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adam", "instance"])
def test_a_model_with_nothing_to_train_is_refused(optimizer: str) -> None:
    model = small_model()
    model[0].requires_grad_(False)
    fit(model, *small_data(), epochs=1)
    frozen = list(model[0].parameters())
    chosen: Any = optim.SGD(frozen, lr=0.1) if optimizer == "instance" else optimizer
    if optimizer == "adam":
        frozen = list(model.requires_grad_(False).parameters())
    words = f"at least one parameter to train, got none: requires_grad is False for all {len(frozen)}"
    with pytest.raises(ValueError, match=f"optimizer: expected {words}"):
        fit(model, *small_data(), optimizer=chosen)


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected one of this model's parameters, got one of others"):
        fit(small_model(), *small_data(), optimizer=other)


def test_forward_names_the_shape() -> None:
    with pytest.raises(ValueError, match=r"input: expected shape \(n, 1, 8, 8\), got \(2, 1, 9, 9\)"):
        small_model()(torch.zeros(2, 1, 9, 9))
