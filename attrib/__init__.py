"""attrib: provenance of AI-generated images at platform scale."""

__version__ = "0.1.0"
