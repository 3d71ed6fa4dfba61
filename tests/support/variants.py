"""Settings of variants, and synthetic features of sources, views and queries, for tests of the ablation."""

import numpy as np

from attrib.data.ids import image_ids
from attrib.evaluate.ablation.settings import AblateSettings
from attrib.evaluate.ablation.variants import AblationFeatures
from attrib.evaluate.collection import Collection
from attrib.evaluate.protocol import TruthRow
from attrib.train.augment.settings import KINDS
from attrib.train.view_features import NO_DONOR, ORIGINAL, ViewFeatures

NUM_SOURCES, NUM_GROUPS, NUM_QUERIES, NUM_FOLDS, VIEWS_EACH = 42, 36, 64, 3, 4
WIDTH = 96  # of test_resnet's output
SHRINKAGE = 0.1
BY_DOMAIN = {"projection": "whiten", "shrinkage": SHRINKAGE, "net": "none", "separate_domains": True}
TRAINED = {"num_epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "validation_share": 0.3}
RAW = {"name": "raw", "head": {"projection": "identity", "net": "none"}}
VARIANTS = {
    "raw": RAW,
    "by domain": {"learns_from": "queries", "head": BY_DOMAIN},
    "supervised": {
        "learns_from": "pairs",
        "head": {"projection": "identity", "net": "linear", "separate_domains": True},
        "optimiser": TRAINED,
    },
    "views": {"learns_from": "views", "head": {"net": "linear"}, "optimiser": TRAINED},
}
VIEWS = VARIANTS["views"] | {"name": "views"}
COLLECTIONS = {"sources": {"name": "sources", "uri": "s"}, "generated": {"name": "generated", "uri": "g"}}


def values_of(*variants: dict, **changes) -> dict:
    return {
        **COLLECTIONS,
        "truth": {"uri": "truth.tsv"},
        "output": "out",
        "backbone": {"name": "test_resnet", "weights": "random"},
        "feature_sets": {"whole": {}},
        "variants": variants,
        "num_folds": NUM_FOLDS,
        **changes,
    }


def settings_of(*variants: dict, **changes) -> AblateSettings:
    return AblateSettings(**values_of(*variants, **changes))


def drawn_features() -> tuple[AblationFeatures, list[TruthRow]]:
    """Sources (some are copies) with views, and queries mixed from a content and mostly a style, in another domain.

    Rows are not in the order of ids.
    """
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(WIDTH, WIDTH)) * rng.uniform(0.2, 2, size=WIDTH) / np.sqrt(WIDTH)
    group_features = rng.normal(size=(NUM_GROUPS, WIDTH)) @ mixing
    group_of = np.concatenate([np.arange(NUM_GROUPS), rng.integers(NUM_GROUPS, size=NUM_SOURCES - NUM_GROUPS)])
    noise = 0.1 * rng.normal(size=(NUM_SOURCES, WIDTH))
    source_keys = [f"s{i}.jpg" for i in range(NUM_SOURCES)]
    ids = image_ids("sources", source_keys)
    # Each source is followed by its views, one of each kind.
    content = np.repeat(ids, 1 + VIEWS_EACH)
    view = np.tile(np.arange(-1, VIEWS_EACH), NUM_SOURCES)
    kind = np.where(view == ORIGINAL, ORIGINAL, view % len(KINDS))
    donor = np.where((view == ORIGINAL) | (kind == KINDS.index("solo")), NO_DONOR, rng.choice(ids, len(content)))
    features = np.repeat(group_features[group_of] + noise, 1 + VIEWS_EACH, axis=0)
    features += np.where(view == ORIGINAL, 0, 0.5)[:, None] * rng.normal(size=features.shape)
    sources = ViewFeatures(features.astype(np.float16), content, donor, view, kind, [])

    query_keys = [f"q{i}.jpg" for i in range(NUM_QUERIES)]
    pairs = [rng.choice(NUM_GROUPS, 2, replace=False) for _ in query_keys]
    mixed = np.stack([0.7 * group_features[c] + 0.4 * group_features[s] for c, s in pairs])
    mixed += 0.5 * rng.normal(size=mixed.shape)
    mixed = mixed * np.exp(rng.normal(size=WIDTH)) + 2 * rng.normal(size=WIDTH)
    query_ids, one = image_ids("generated", query_keys), np.full(NUM_QUERIES, ORIGINAL)
    order = rng.permutation(NUM_QUERIES)
    queries = ViewFeatures(mixed[order].astype(np.float16), query_ids[order], one, one, one, [])
    truth = []
    for i, (key, (content_group, style_group)) in enumerate(zip(query_keys, pairs)):
        truth.append(TruthRow(key, "content", f"g{content_group}"))
        if i % 4:
            truth.append(TruthRow(key, "style", f"g{style_group}"))
    found = AblationFeatures(
        sources,
        queries,
        Collection(source_keys, ids[:, None], {"group": [f"g{group}" for group in group_of]}),
        Collection(query_keys, query_ids[:, None], {"method": ["a" if i % 5 else "b" for i in range(NUM_QUERIES)]}),
    )
    return found, truth
