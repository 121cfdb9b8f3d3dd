"""Small data sets in the formats that users have, made for a test."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REAL_DATA = Path(os.environ.get("EPSANET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """A folder of the shared real data; skips the test where it is not."""
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"real data {name} is not at {REAL_DATA} (set EPSANET_DATA)")
    return path


def pixels(label: int, number: int, size: int = 12) -> np.ndarray:
    """A picture of a colour that tells its class, with noise that tells it from all others."""
    random = np.random.default_rng([label % 1000, number])
    colour = np.array([40 + 60 * (label % 4), 220 - 50 * (label % 5), 30 + 90 * (label % 3)])
    return np.clip(colour + random.integers(-20, 21, (size, size, 3)), 0, 255).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def one_pixel(_: object, path: Path, **options: object) -> None:
    """Stands for ``Figure.savefig``, for runs whose pictures nobody looks at: drawing would take half of their time."""
    del options
    path.write_bytes(png(np.zeros((1, 1, 3), dtype=np.uint8)))


def class_folders(root: Path, counts: Mapping[str, int], *, start: int = 0, size: int = 12) -> Path:
    """A folder a class; the class's colour follows its name, whatever other classes there are."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            (root / name / f"{number:03d}.png").write_bytes(png(pixels(sum(name.encode()), number, size)))
    return root


def parquet(
    path: Path,
    labels: list[object],
    *,
    names: list[str] | None = None,
    start: int = 0,
    size: int = 12,
    row_group_size: int | None = None,
) -> Path:
    """A Parquet file in the layout of Hugging Face ``datasets``: image {bytes, path}, label."""
    import pyarrow
    from pyarrow import parquet as writer

    images = [
        {"bytes": png(pixels(label if isinstance(label, int) else len(str(label)), start + place, size)), "path": None}
        for place, label in enumerate(labels)
    ]
    integers = all(isinstance(label, int) for label in labels)
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            "label": pyarrow.int64() if integers else pyarrow.string(),
        }
    )
    feature = (
        {"names": names, "_type": "ClassLabel"}
        if names
        else {"dtype": str(schema.field("label").type), "_type": "Value"}
    )
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    table = pyarrow.table({"image": images, "label": labels}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    writer.write_table(described, path, row_group_size=row_group_size)
    return path


def shards(folder: Path, split: str, counts: list[int], *, classes: int, start: int = 0) -> dict[str, object]:
    """Tar shards of ``NAME.png`` and ``NAME.cls``; gives the split's entry of timm's ``info.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    names, number = [], start
    for shard, count in enumerate(counts):
        names.append(f"{split}-{shard:04d}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for _ in range(count):
                content = {"png": png(pixels(number % classes, number)), "cls": str(number % classes).encode()}
                for suffix, data in content.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                number += 1
    return {"name": split, "num_samples": sum(counts), "filenames": names, "shard_lengths": counts}
