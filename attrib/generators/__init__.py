"""Identify the generator of an image: synthetic models, fingerprints trained on them, registry, open-set verdicts."""
