"""Small data sets in the layouts in which the large ones are published, for tests."""

import json
from pathlib import Path
from typing import Any

from tests.support.tars import picture

FULL_NAMES = [
    "Animalia_Aves_Sterna hirundo",
    "Plantae_Rosales_Rosa canina",
    "Fungi_Agaricales_Amanita muscaria",
]


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))


def inat(root: Path, year: int, split: str, count: int = 9) -> Path:
    """JSON and images as published: 2021 nests by category, 2017 by kingdom and species."""
    entries, annotations = [], []
    for n in range(count):
        category = n % 3
        if year == 2021:
            folder = f"{split}/{category:05d}_{FULL_NAMES[category].replace(' ', '_')}"
        else:
            folder = f"train_val_images/Aves/{FULL_NAMES[category].split('_')[-1]}"
        name = f"{folder}/{split}{n:03d}-aa.jpg"
        save(root / name, n + (100 if split == "val" else 0))
        entry: dict[str, Any] = {"id": n + 7, "file_name": name, "width": 40, "height": 30, "license": 0}
        entries.append(entry)
        annotations.append({"id": n, "image_id": n + 7, "category_id": category})
    categories = [
        {"id": n, "name": name.split("_")[-1], "supercategory": name.split("_")[0]}
        for n, name in enumerate(FULL_NAMES)
    ]
    path = root / f"{split}.json"
    content = {
        "info": {"year": year},
        "images": entries,
        "annotations": annotations,
        "categories": categories,
    }
    path.write_text(json.dumps(content))
    return path


def sun(root: Path, count: int = 4) -> None:
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bank_vault"]
    root.mkdir()
    (root / "ClassName.txt").write_text("\n".join(classes) + "\n")
    lists: dict[str, list[str]] = {"Training_02.txt": [], "Testing_02.txt": []}
    for number, folder in enumerate(classes):
        for n in range(count):
            name = f"{folder}/sun_{n}{number}.jpg"
            save(root / name.strip("/"), 10 * n + number)
            lists["Testing_02.txt" if n % 4 == 3 else "Training_02.txt"].append(name)
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")


def tree(root: Path, count: int) -> None:
    for n in range(count):
        save(root / f"class{n % 3}" / f"{n:03d}.jpg", n)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
