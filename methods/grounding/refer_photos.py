"""Photos of a pack: encoded images in one parquet file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from methods.data.base import DataError


def packed_photos(file: Path, wanted: set[int]) -> dict[int, bytes | Path]:
    """Encoded photos of a parquet file with columns ``image_id`` and ``image`` {bytes, path}."""
    try:
        table = pq.read_table(file, columns=["image_id", "image"])
        ids, images = table["image_id"].to_pylist(), table["image"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{file} is no parquet file with columns image_id and image: {error}") from error
    if len(set(ids)) != len(ids):
        raise DataError(f"{file}: {len(ids) - len(set(ids))} image_id stand there more than once")
    found = {number: image["bytes"] for number, image in zip(ids, images, strict=True) if number in wanted}
    if missing := sorted(wanted - set(found)):
        raise DataError(
            f"{file}: {len(missing)} pictures have sentences but no photo, for instance {missing[0]}"
        )
    return found
