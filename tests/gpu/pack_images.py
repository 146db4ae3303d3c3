"""Pack a data set's parquet files into parts of a size, for a machine that takes only so much at a time.

  python tests/gpu/pack_images.py SOURCE OUTPUT --megabytes 54

writes OUTPUT/1, OUTPUT/2, ... Together, their files hold the images of SOURCE, bit for bit, as lossless WebP, which is
2 % smaller than the PNGs of CIFAR-10. Test images come first.
"""

import argparse
import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

OVERHEAD = 24  # bytes of a row in a file, besides the image


def smaller(encoded: bytes) -> bytes:
    """Return an encoded image as lossless WebP, unless that is larger."""
    image, packed = PIL.Image.open(io.BytesIO(encoded)), io.BytesIO()
    image.save(packed, "WEBP", lossless=True, quality=100, method=4)
    if len(packed.getvalue()) >= len(encoded):
        return encoded
    if not np.array_equal(np.asarray(PIL.Image.open(packed).convert(image.mode)), np.asarray(image)):
        raise ValueError("WebP changed an image")
    return packed.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of parquet files with a column of images and one of labels")
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=float, default=54, help="largest size of a part (default: 54)")
    args = parser.parse_args()
    folders = [args.output / "1"]
    left = args.megabytes * 1e6
    with ProcessPoolExecutor() as pool:
        for file in sorted(args.source.glob("*.parquet"), key=lambda file: ("test" not in file.name, file.name)):
            table = pq.ParquetFile(file).read()
            column = next(name for name in table.column_names if pa.types.is_struct(table.schema.field(name).type))
            images = list(pool.map(smaller, (row["bytes"] for row in table[column].to_pylist()), chunksize=256))
            start = 0
            for row, image in enumerate(images):
                if left < len(image) + OVERHEAD:
                    write(table.slice(start, row - start), column, images[start:row], folders[-1] / file.name)
                    folders.append(args.output / str(len(folders) + 1))
                    start, left = row, args.megabytes * 1e6
                left -= len(image) + OVERHEAD
            write(table.slice(start), column, images[start:], folders[-1] / file.name)
            print(f"{file.name}: {len(images)} images, up to part {len(folders)}")


def write(table: pa.Table, column: str, images: list[bytes], file: Path) -> None:
    """Write rows with other images to a file, whose name gets the number of its folder."""
    field = table.schema.field(column)
    values = pa.array([{"bytes": image, "path": None} for image in images], field.type)
    file.parent.mkdir(parents=True, exist_ok=True)
    table = table.set_column(table.column_names.index(column), field, values)
    pq.write_table(table, file.with_stem(f"{file.stem}-{file.parent.name}"), compression="none")


if __name__ == "__main__":
    main()
