"""Which generator made an image: fingerprints trained on synthetic models, then used to identify real generators.

An image of a generator that is not registered gets the verdict unknown.
"""
