"""Raw image data sets to verified files to deterministic batches.

Importing this package is instant: each name loads its module at first use, so that listing data
sets needs neither torch nor FFCV.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.augment import Augmentation as Augmentation
    from data_prep.augment import CentralCrop as CentralCrop
    from data_prep.augment import Resolution as Resolution
    from data_prep.augment import View as View
    from data_prep.convert import Plan as Plan
    from data_prep.convert import plan as plan
    from data_prep.convert import prepare as prepare
    from data_prep.datasets import DATASETS as DATASETS
    from data_prep.datasets import DataError as DataError
    from data_prep.datasets import Dataset as Dataset
    from data_prep.datasets import Storage as Storage
    from data_prep.datasets import get_dataset as get_dataset
    from data_prep.loaders import Loader as Loader
    from data_prep.loaders import Reading as Reading
    from data_prep.loaders import make_loader as make_loader
    from data_prep.manifest import Manifest as Manifest
    from data_prep.manifest import ffcv_available as ffcv_available
    from data_prep.reading.readers import choose_cache as choose_cache
    from data_prep.reading.readers import normalized as normalized
    from data_prep.single_images import as_channels as as_channels
    from data_prep.single_images import decode_image as decode_image
    from data_prep.single_images import is_image_file as is_image_file
    from data_prep.single_images import view_image as view_image
    from data_prep.sources import look as look
    from data_prep.sources import raw_place as raw_place

_HOME = {
    "Augmentation": "augment",
    "CentralCrop": "augment",
    "DATASETS": "datasets",
    "DataError": "datasets",
    "Dataset": "datasets",
    "Loader": "loaders",
    "Manifest": "manifest",
    "Plan": "convert",
    "Reading": "loaders",
    "Resolution": "augment",
    "Storage": "datasets",
    "View": "augment",
    "as_channels": "single_images",
    "choose_cache": "reading.readers",
    "decode_image": "single_images",
    "ffcv_available": "manifest",
    "get_dataset": "datasets",
    "is_image_file": "single_images",
    "look": "sources",
    "make_loader": "loaders",
    "normalized": "reading.readers",
    "plan": "convert",
    "prepare": "convert",
    "raw_place": "sources",
    "view_image": "single_images",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data_prep' has no attribute {name!r}")
    return getattr(import_module(f"data_prep.{_HOME[name]}"), name)
