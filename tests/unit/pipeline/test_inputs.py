from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.datasets import DATASETS, DataError, Storage
from pipeline import inputs
from pipeline.config import PipelineError
from pipeline.contact_sheet import write_contact_sheet
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from pipeline.settings import override
from tests.pictures import write_class_folders

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("pictures"), classes=("cat", "dog", "emu"))


@pytest.fixture(scope="module")
def settings(pictures, tmp_path_factory):
    prepared = tmp_path_factory.mktemp("prepared")
    return [f"data.raw={pictures}", f"data.prepared={prepared}", "train.batch_size=24"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_makes_an_experiment_with_augmentation_that_fits_it(dataset):
    experiment = load_experiment(f"{dataset}_resnet20", ["data.synthetic=[256,8]"])
    row = inputs.dataset_of(experiment)
    inputs.check_images(experiment, row)
    with torch.device("meta"):
        model = build_model(experiment, row)
    assert isinstance(model.fc, torch.nn.Linear) and model.fc.out_features == row.classes
    photographs = dataset in ("imagenet", "imagenet16", "folder")
    assert (experiment.train.crop_area is not None) == photographs
    assert experiment.train.flip == (dataset not in ("digits", "mnist", "svhn"))


@pytest.mark.parametrize("dataset", DATASETS)
def test_made_up_images_have_the_classes_of_the_data_set(dataset, tmp_path):
    settings = ["data.synthetic=[4,2]", f"data.prepared={tmp_path}"]
    experiment = load_experiment(f"{dataset}_resnet20", settings)
    row = inputs.dataset_of(experiment)
    manifest = inputs.prepare(experiment, row, lambda *_: None)
    assert manifest.classes == len(set(manifest.class_names)) == row.classes
    assert (manifest.image_size, manifest.channels) == (row.image_size, row.channels)
    assert manifest.notes == ()


def test_a_folder_brings_its_own_classes(settings):
    experiment = load_experiment("folder_resnet20", settings)
    row = inputs.dataset_of(experiment)
    assert (row.classes, row.class_names) == (3, ("cat", "dog", "emu"))
    assert inputs.training_images(experiment, row) == 72
    fewer = load_experiment("folder_resnet20", [*settings, "data.max_per_class=5"])
    assert inputs.training_images(fewer, row) == 15


def test_storage_is_that_of_the_data_set_with_the_changes_of_the_experiment():
    default = load_experiment("imagenet_resnet50")
    assert inputs.storage_of(default) == DATASETS["imagenet"].storage
    changed = load_experiment("imagenet_resnet50", ["data.side=256", "data.format=mixed"])
    assert inputs.storage_of(changed) == Storage(side=256, format="mixed")
    assert inputs.storage_of(load_experiment("cifar10_resnet20")) is None


def test_the_recipe_decides_what_the_network_sees(settings):
    options = ["train.image_size=48", "train.normalization=signed", "train.test_crop=0.875"]
    growth = ["train.first_image_size=32", "train.growth_epochs=[0,2]"]
    experiment = load_experiment("folder_resnet20", [*settings, *options, *growth])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    train = inputs.make_loader(experiment, manifest, "train", training=True)
    for epoch, size in ((0, 32), (2, 48)):
        with train.epoch(epoch) as batches:
            images, _ = next(batches)
        assert images.shape == (24, 3, size, size)
        assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    test = inputs.make_loader(experiment, manifest, "test", training=False)
    with test.epoch(0) as batches:
        images = torch.cat([images for images, _ in batches])
    assert images.shape == (18, 3, 48, 48)


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_evaluation_may_be_at_another_size_than_training(settings, backend):
    """The whole images of the test split, made as large as asked for by OpenCV."""
    sizes = ["train.image_size=32", "train.test_size=48"]
    options = [f"data.backend={backend}", "train.normalization=unit", "train.test_crop=none"]
    experiment = load_experiment("folder_resnet20", [*settings, *sizes, *options])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    assert inputs.image_size(experiment.train, manifest) == 32
    assert inputs.evaluation_size(experiment.train, manifest) == 48
    train = inputs.make_loader(experiment, manifest, "train", training=True)
    with train.epoch(0) as batches:
        assert next(batches)[0].shape == (24, 3, 32, 32)
    test = inputs.make_loader(experiment, manifest, "test", training=False)
    with test.epoch(0) as batches:
        images = torch.cat([images for images, _ in batches])
    index = manifest.files["test"].open_index(manifest.folder)
    data = np.fromfile(index.path, dtype=np.uint8)
    for sample, image in enumerate(images):
        stored = data[int(index.pointers[sample]) :][: int(index.sizes[sample])]
        pixels = np.asarray(Image.open(io.BytesIO(stored.tobytes())))
        expected = cv2.resize(pixels, (48, 48), interpolation=cv2.INTER_AREA)
        assert np.abs(255 * image.permute(1, 2, 0).numpy() - expected).max() < 1.01


def test_images_held_out_are_seen_as_in_use_and_never_trained_on(settings):
    """Of three folders with 24 images each, 9 in equal steps: three of each class."""
    options = ["train.validation=9", "train.image_size=32", "train.test_crop=0.875"]
    experiment = load_experiment("folder_resnet20", [*settings, *options, "train.batch_size=21"])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    counts = {name: inputs.split_images(experiment, manifest, name) for name in SPLITS}
    assert counts == {"train": 63, "validation": 9, "test": 18}
    assert inputs.training_images(experiment, manifest) == 63
    train = inputs.make_loader(experiment, manifest, "train", training=True)
    assert train.steps_per_epoch == 3
    with train.epoch(0) as batches:
        labels = torch.cat([labels for _, labels in batches])
    assert labels.bincount().tolist() == [21, 21, 21]
    everything = override(experiment, ["train.validation=0"])
    plain = inputs.make_loader(everything, manifest, "train", training=False)
    held_out = inputs.make_loader(experiment, manifest, "validation", training=False)
    with plain.epoch(0) as all_batches, held_out.epoch(0) as batches:
        images = torch.cat([images for images, _ in all_batches])
        ((seen, labels),) = batches
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(seen, images[4::8])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mnist_lenet5",
            ["train.validation=60000"],
            "train.validation=60000 leaves none of the 60000 training images of mnist to train",
        ),
        (
            "cifar10_resnet20",
            ["train.validation=49900", "train.batch_size=128"],
            "train.batch_size=128 is more than the 100 training images of cifar10 that "
            "train.validation leaves",
        ),
        (
            "cifar10_resnet20",
            ["data.max_per_class=5", "train.batch_size=128"],
            "train.batch_size=128 is more than the 50 training images of cifar10$",
        ),
        ("mnist_lenet5", ["train.test_size=32"], "the gray images of mnist are not resized"),
    ],
)
def test_what_the_images_do_not_bear_is_one_line(name, settings, message):
    experiment = load_experiment(name, settings)
    with pytest.raises(DataError, match=message):
        inputs.check_images(experiment, inputs.dataset_of(experiment))


@pytest.mark.parametrize(
    ("settings", "device", "threads"),
    [
        ([], "cuda:0", None),
        (["scaling.cores=8"], "cuda:0", 7),
        (["scaling.cores=1"], "cuda:0", 1),
        (["scaling.cores=8"], "cpu", None),
        (["scaling.cores=8", "data.threads=3"], "cuda:0", 3),
    ],
)
def test_threads_that_read_are_those_that_training_leaves_of_the_cores(settings, device, threads):
    experiment = load_experiment("cifar10_resnet20", settings)
    assert inputs.reading(experiment, torch.device(device)).threads == threads


def test_both_backends_train_on_the_same_batches(settings):
    experiments = [
        load_experiment("folder_resnet20", [*settings, f"data.backend={backend}"])
        for backend in ("ffcv", "torch")
    ]
    manifest = inputs.prepare(experiments[0], inputs.dataset_of(experiments[0]), lambda *_: None)
    batches = []
    for experiment in experiments:
        loader = inputs.make_loader(experiment, manifest, "train", training=True)
        with loader.epoch(1) as epoch:
            batches.append(next(epoch))
    (first, labels), (second, same_labels) = batches
    assert torch.equal(labels, same_labels)
    std = torch.tensor(manifest.std).view(3, 1, 1)
    assert 255 * float(((first - second) * std).abs().max()) < 1.01


def test_the_contact_sheet_is_a_picture_of_batches(settings, tmp_path):
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(experiment, manifest, path)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert min(sheet.shape[:2]) > 900
    # The pictures are colorful; text and bars alone would leave the upper part gray.
    upper = sheet[: sheet.shape[0] // 2].astype(int)
    assert (np.ptp(upper, axis=2) > 60).mean() > 0.2


def test_the_normalization_of_a_folder_is_measured(settings):
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    index = manifest.files["train"].open_index(manifest.folder)
    data = index.path.read_bytes()
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for sample in range(len(index)):
        path = manifest.folder.parent / "sample.jpg"
        begin = int(index.pointers[sample])
        path.write_bytes(data[begin : begin + int(index.sizes[sample])])
        pixels = np.asarray(Image.open(path)).reshape(-1, 3) / 255
        sums += pixels.sum(axis=0)
        squares += (pixels**2).sum(axis=0)
        count += len(pixels)
    mean = sums / count
    np.testing.assert_allclose(manifest.mean, mean, atol=2e-4)
    np.testing.assert_allclose(manifest.std, np.sqrt(squares / count - mean**2), atol=2e-4)
    assert len(index) == 72


def test_a_contact_sheet_bears_any_class_name_and_few_images(tmp_path, recwarn):
    raw = write_class_folders(tmp_path / "raw", train=4, val=1, classes=(r"a$\x_$", "\u9ce5"))
    settings = [f"data.raw={raw}", f"data.prepared={tmp_path}", "train.batch_size=128"]
    experiment = load_experiment("folder_resnet20", settings)
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    write_contact_sheet(experiment, manifest, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []
    with pytest.raises(PipelineError, match=r"cannot write the picture: .*Not a directory|exists"):
        write_contact_sheet(experiment, manifest, tmp_path / "sheet.png" / "below.png")


def test_folders_for_another_machine_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("digits_lenet5", ["data.prepared=here", "data.raw=there"])
    data = inputs.with_absolute_folders(experiment).data
    assert (data.prepared, data.raw, data.root) == (tmp_path / "here", tmp_path / "there", None)
