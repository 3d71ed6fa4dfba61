"""Which generator made an image: synthetic models, fingerprints trained on them, and what is said of generators never trained on."""
