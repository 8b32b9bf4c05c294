"""Image data: sources -> uint8 tensors, fixed splits, reproducible batches, picture files.

No reader here unpickles, executes or extracts anything, and none allocates memory because a header asks for
it: sizes are first checked against the bytes present, and against the limits in `host.reading`.
"""

from cdm_fast.config import PixelMap
from cdm_fast.data.load import ImageData, load_data
from cdm_fast.data.order import batch_indices
from cdm_fast.data.pictures import read_image, write_grid, write_image
from cdm_fast.data.pixels import bits_of_interval, dequantize, quantize

__all__ = [
    "ImageData",
    "batch_indices",
    "PixelMap",
    "bits_of_interval",
    "dequantize",
    "load_data",
    "quantize",
    "read_image",
    "write_grid",
    "write_image",
]
