"""Write `eqxproj/data/digits.parquet`, the data set that comes with the package.

It holds the 1,797 handwritten digits of 8 x 8 pixels which scikit-learn distributes as `load_digits` (the test part of
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, E. Alpaydin and C. Kaynak, 1998,
CC BY 4.0), in scikit-learn's order: `image`, 64 integers from 0 to 16, and `label`, an integer from 0 to 9.

Needs scikit-learn, which the package itself does not: `pip install scikit-learn`, then
`python benchmarks/make_digits.py`.
"""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

TARGET = pathlib.Path(__file__).resolve().parent.parent / "eqxproj" / "data" / "digits.parquet"


def main() -> None:
    """Read the digits from scikit-learn and write them as one parquet file."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.asarray(images).astype(np.uint8)
    if not np.array_equal(pixels, images):
        raise ValueError("load_digits() returned pixels that are not whole numbers from 0 to 255.")
    table = pa.table(
        {
            "image": pa.array(list(pixels), type=pa.list_(pa.uint8())),
            "label": pa.array(labels, type=pa.int64()),
        }
    )
    TARGET.parent.mkdir(exist_ok=True)
    pq.write_table(table, TARGET, compression="zstd")
    print(f"{TARGET}: {table.num_rows} rows, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
