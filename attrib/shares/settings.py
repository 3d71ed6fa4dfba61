"""Options of the soft shares."""

from pydantic import Field

from attrib.common.settings import Settings


class SharesSettings(Settings):
    """AbC's soft shares (arXiv 2306.09345): t_j = relu(exp((s_j - max) * inverse_temperature) + 0.001 * offset)."""

    inverse_temperature: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    offset: float = Field(default=-50.0, gt=-1000.0, le=0.0)
