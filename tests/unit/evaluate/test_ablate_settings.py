"""Settings of variants: errors before any work, file names, and the default variant."""

import pytest
from support.variants import BY_DOMAIN, COLLECTIONS, RAW, VARIANTS, VIEWS, settings_of, values_of

from attrib.common.config import validate
from attrib.common.errors import AttribError
from attrib.evaluate.ablation.settings import CHOSEN, AblateSettings, VariantSettings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variants": [RAW, RAW]}, ["variants share a name, or a file's name: ['raw']"]),
        (
            {"variants": [RAW, RAW | {"name": "ZCA 0.1"}, RAW | {"name": "ZCA-0:1"}]},
            ["variants share a name, or a file's name: ['ZCA 0.1', 'ZCA-0:1']"],
        ),
        ({"variants": [RAW, RAW | {"name": CHOSEN}]}, [f"variants share a name, or a file's name: ['{CHOSEN}']"]),
        ({"generated": COLLECTIONS["sources"]}, ["sources and generated share the name 'sources'; give each its own"]),
        ({"max_failed_share": 0.1}, ["max_failed_share: unknown key"]),
        ({"variants": []}, ["variants", "at least 1 item"]),
        ({"variants": [RAW | {"features": "fine"}]}, ["variant 'raw': no feature set 'fine'"]),
        ({"variants": [RAW | {"views": "fine"}]}, ["variant 'raw': no set of views 'fine'"]),
        ({"variants": [RAW | {"kinds": ["sepia"]}]}, ["variants.0.kinds.0", "'texture', 'colour', 'bands' or 'solo'"]),
        (
            {"variants": [VIEWS | {"kinds": ["solo", "texture"]}], "view_sets": {"standard": {"mix": {"texture": 0}}}},
            ["variant 'views': the set 'standard' has no views of kind 'texture'"],
        ),
        ({"variants": [RAW | {"kinds": ["solo"]}]}, ["variant 'raw': kinds choose among views whose features were"]),
        (
            {"variants": [VARIANTS["supervised"] | {"name": "pairs", "kinds": ["solo"]}]},
            ["variant 'pairs': kinds choose among views whose features were"],
        ),
        (
            {"variants": [VIEWS | {"kinds": ["solo"], "fine_tune": {}}]},
            ["variant 'views': kinds choose among views whose features were"],
        ),
        ({"variants": [RAW | {"name": ""}]}, ["variants.0.name"]),
        ({"variants": [RAW | {"head": {"net": "linear"}}]}, ["variant 'raw': a head with a net learns from views or"]),
        ({"variants": [RAW | {"learns_from": "views"}]}, ["variant 'raw': a head with a net learns from views or"]),
        ({"variants": [RAW | {"learns_from": "pairs"}]}, ["variant 'raw': a head with a net learns from views or"]),
        ({"variants": [RAW | {"fine_tune": {}}]}, ["variant 'raw': fine-tuning learns from views"]),
        (
            {"variants": [RAW | VARIANTS["supervised"] | {"fine_tune": {}}]},
            ["variant 'raw': fine-tuning learns from views"],
        ),
        (
            {"variants": [RAW | {"head": BY_DOMAIN}]},
            ["variant 'raw': a head for each domain learns from views, queries or pairs"],
        ),
        (
            {"variants": [RAW | {"learns_from": "queries", "head": BY_DOMAIN | {"num_directions": 5}}]},
            ["head.num_directions", "all directions are kept; remove num_directions"],
        ),
        (
            {"variants": [RAW | {"learns_from": "queries"}]},
            ["variant 'raw': queries and pairs are for heads with separate_domains"],
        ),
        (
            {"variants": [RAW | {"learns_from": "pairs", "head": {"net": "mlp"}}]},
            ["variant 'raw': queries and pairs are for heads with separate_domains"],
        ),
        (
            {"variants": [RAW | {"head": {"net": "none", "parts": {"all": {"blocks": ["moments"]}}}}]},
            ["head.parts.all names block 'moments'; the features have pooled"],
        ),
        ({"reference": "cooked"}, ["'cooked' is no variant; the variants are raw"]),
        ({"theory": ["raw", "cooked"]}, ["'cooked' is no variant; the variants are raw"]),
        ({"num_folds": 1}, ["num_folds", "greater than or equal to 2", "(got 1)"]),
        ({"variants": [RAW | {"head": {"nets": "none"}}]}, ["variants.0.head.nets: unknown key; did you mean net?"]),
        ({"feature_set": {}}, ["feature_set: unknown key; did you mean feature_sets?"]),
    ],
)
def test_wrong_settings_are_named_before_any_work(changes, expected):
    with pytest.raises(AttribError) as caught:
        validate(AblateSettings, values_of(RAW) | changes, "ablate.yaml")
    message = str(caught.value)
    assert message.startswith("ablate.yaml: these settings are not valid:")
    assert all(part in message for part in expected), message


def test_kinds_of_the_set_of_views_are_accepted():
    variants = [VIEWS | {"kinds": ["solo", "colour"]}, VIEWS | {"name": "v2", "views": "odd", "kinds": ["bands"]}]
    mixes = {"standard": {"mix": {"texture": 0}}, "odd": {"mix": {"texture": 0, "colour": 0, "solo": 0}}}
    found = settings_of(*variants, view_sets=mixes)
    assert [variant.kinds for variant in found.variants] == [("solo", "colour"), ("bands",)]


def test_a_file_name_has_only_letters_digits_and_underscores():
    assert VariantSettings(name="ZCA 0.1, by domain/größe").file_name == "ZCA_0_1__by_domain_größe"


def test_the_default_variant_is_a_control():
    found = VariantSettings(name="v")
    assert found.learns_from == "nothing" and found.head.net == "none" and found.fine_tune is None
