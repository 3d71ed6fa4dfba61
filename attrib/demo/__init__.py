"""A small world with a known truth: a drawn corpus, a generator fitted to parts of it, and an encoder trained on all of it."""
