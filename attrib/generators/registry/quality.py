"""Which images can serve as references or be assessed as queries.

References must meet the same conditions as queries. For example, a generator with blank references would be the nearest
one to every blank query, because blank images are all alike.
"""

from collections import Counter

from attrib.common.errors import ImageError
from attrib.common.storage import bytes_sha256
from attrib.generators.fingerprints.base import Method
from attrib.generators.registry.settings import VerdictSettings
from attrib.generators.signals.samples import Sample

COPIES, BLANK = "copies", "blank"
NOT_USABLE = {"read": "not readable", "decode": "not decodable"}  # by the stage of an ImageError


class ReferenceFilter:
    """Decides for one image after another whether it can be a reference; left_out counts the others by reason.

    Each distinct image is taken once, because in leave-one-out a copy would match its identical reference.
    """

    def __init__(self, method: Method):
        self.left_out: Counter[str] = Counter()
        self._method = method
        self._seen: set[str] = set()

    def takes(self, sample: Sample) -> bool:
        pixels = f"{tuple(sample.image.shape)} {bytes_sha256(sample.image.numpy().tobytes())}"
        reason = COPIES if pixels in self._seen else refusal(sample, self._method, VerdictSettings())
        self._seen.add(pixels)
        if reason is not None:
            self.left_out[reason.partition(":")[0]] += 1
        return reason is None

    def failed(self, error: ImageError) -> None:
        self.left_out[NOT_USABLE[error.stage]] += 1


def format_counts(left_out: dict[str, int]) -> str:
    """The counts as text, e.g. "45 copies, 3 too small"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))


def refusal(sample: Sample, method: Method, settings: VerdictSettings) -> str | None:
    """Why an image cannot be assessed, or None. The fingerprint is not needed for this."""
    height, width = sample.image.shape[1:]
    needed = max(method.min_side_px, settings.min_side_px)
    if sample.side_px < needed:
        return f"too small: {width}x{height} pixels, and the shorter side needs {needed}"
    pixels = sample.image.short()
    changes = pixels.diff(dim=2), pixels.diff(dim=1)
    total = sum(float(change.abs().double().sum()) for change in changes)
    detail = total / max(1, sum(change.numel() for change in changes))
    if detail < settings.min_detail_levels:
        return (
            f"blank: neighbouring pixels differ by {detail:.2g} of 255 on average, and at least "
            f"{settings.min_detail_levels:g} is needed"
        )
    if method.needs_colour and bool((pixels == pixels[:1]).all()):
        return "greyscale: the fingerprint needs colours"
    return None
