"""What the decoder makes of an encoded image."""

import numpy as np
import pytest

from attrib.common.errors import ImageError
from attrib.data.decoding import decode_image


def decoded(data: bytes) -> np.ndarray:
    return decode_image(data, max_megapixels=1.0).pixels.permute(1, 2, 0).numpy()


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_megapixels=1.0)
    return caught.value.reason
