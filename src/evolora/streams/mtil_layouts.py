"""Where the eleven MTIL data sets are looked for below a root folder, and what must be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evolora.streams import mtil_readers as readers
from evolora.streams.mtil_readers import Listing


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set's files lie and how they are read.

    Args:
        folders: names it may have below the root, tried in this order.
        markers: files or folders of which one must be in there.
        expected: the layout in words, for the message that says what is missing.
        read: lists the data set below the folder that holds a marker.
    """

    folders: tuple[str, ...]
    markers: tuple[str, ...]
    expected: str
    read: Callable[[Path], Listing]

    def find(self, root: Path) -> Path | None:
        """Return the first folder below the root that holds a marker, or None."""
        for folder in self.folders:
            if any((root / folder / marker).exists() for marker in self.markers):
                return root / folder
        return None


LAYOUTS: dict[str, Layout] = {
    "aircraft": Layout(
        folders=("fgvc-aircraft-2013b", "fgvc_aircraft", "aircraft"),
        markers=("data/variants.txt", "variants.txt"),
        expected="data/variants.txt, data/images_variant_{train,val,test}.txt, data/images/*.jpg",
        read=readers.read_aircraft,
    ),
    "caltech101": Layout(
        folders=("caltech101", "caltech-101", "Caltech101", "."),
        markers=("101_ObjectCategories",),
        expected="101_ObjectCategories/<class>/*.jpg",
        read=readers.read_caltech101,
    ),
    "cifar100": Layout(
        folders=("cifar-100-binary", "cifar100", "cifar-100"),
        markers=("train.bin", "cifar-100-binary/train.bin"),
        expected="train.bin, test.bin, fine_label_names.txt "
        "(the binary version; the python version is a pickle, which is not opened)",
        read=readers.read_cifar100,
    ),
    "dtd": Layout(
        folders=("dtd", "dtd/dtd"),
        markers=("labels/train1.txt",),
        expected="images/<class>/*.jpg, labels/{train,val,test}1.txt",
        read=readers.read_dtd,
    ),
    "eurosat": Layout(
        folders=("eurosat/2750", "eurosat", "EuroSAT/2750", "EuroSAT", "EuroSAT_RGB", "2750"),
        markers=("AnnualCrop",),
        expected="<class>/*.jpg with the folders AnnualCrop ... SeaLake",
        read=readers.read_eurosat,
    ),
    "flowers": Layout(
        folders=("flowers-102", "flowers102", "oxford_flowers", "flowers"),
        markers=("imagelabels.mat",),
        expected="imagelabels.mat, setid.mat, jpg/image_*.jpg",
        read=readers.read_flowers,
    ),
    "food": Layout(
        folders=("food-101", "food101", "food"),
        markers=("meta/train.txt",),
        expected="meta/{classes,train,test}.txt, images/<class>/*.jpg",
        read=readers.read_food,
    ),
    "mnist": Layout(
        folders=("MNIST/raw", "MNIST", "mnist/raw", "mnist"),
        markers=tuple(f"train-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")),
        expected="{train,t10k}-{images-idx3,labels-idx1}-ubyte, each maybe .gz",
        read=readers.read_mnist,
    ),
    "pets": Layout(
        folders=("oxford-iiit-pet", "oxford_pets", "pets"),
        markers=("annotations/trainval.txt",),
        expected="annotations/{trainval,test}.txt, images/*.jpg",
        read=readers.read_pets,
    ),
    "cars": Layout(
        folders=("stanford_cars", "stanford-cars", "cars"),
        markers=("devkit/cars_train_annos.mat", "train.csv"),
        expected="devkit/{cars_meta,cars_train_annos,cars_test_annos_withlabels}.mat, cars_train/, "
        "cars_test/; or train.csv and test.csv with the columns image,label",
        read=readers.read_cars,
    ),
    "sun397": Layout(
        folders=("SUN397", "sun397", "SUN397/SUN397"),
        markers=("ClassName.txt",),
        expected="ClassName.txt, <letter>/<class>/*.jpg",
        read=readers.read_sun397,
    ),
}
