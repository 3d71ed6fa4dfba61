"""Settings of variants: errors before any work, file names, and the default variant."""

import pytest
from support.variants import BY_DOMAIN, COLLECTIONS, RAW, VARIANTS, VIEWS, settings_of, values_of

from attrib.common.config import validate
from attrib.common.errors import AttribError
from attrib.evaluate.ablation.settings import CHOSEN, AblateSettings, VariantSettings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variants": [RAW, RAW]}, ["rename variants ['raw']"]),
        (
            {"variants": [RAW, RAW | {"name": "ZCA 0.1"}, RAW | {"name": "ZCA-0:1"}]},
            ["rename variants ['ZCA 0.1', 'ZCA-0:1']: names must differ in letters or digits"],
        ),
        ({"variants": [RAW, RAW | {"name": CHOSEN}]}, [f"rename variants ['{CHOSEN}']"]),
        ({"generated": COLLECTIONS["sources"]}, ["sources and generated share the name 'sources'; give each its own"]),
        ({"max_failed_share": 0.1}, ["max_failed_share: unknown key"]),
        ({"variants": []}, ["variants", "at least 1 item"]),
        ({"variants": [RAW | {"features": "fine"}]}, ["variant 'raw': feature_sets have no 'fine'"]),
        ({"variants": [RAW | {"views": "fine"}]}, ["variant 'raw': view_sets have no 'fine'"]),
        ({"variants": [RAW | {"kinds": ["sepia"]}]}, ["variants.0.kinds.0", "'texture', 'colour', 'bands' or 'solo'"]),
        (
            {"variants": [VIEWS | {"kinds": ["solo", "texture"]}], "view_sets": {"standard": {"mix": {"texture": 0}}}},
            ["variant 'views': view_sets.standard.mix has no 'texture'"],
        ),
        (
            {"variants": [RAW | {"kinds": ["solo"]}]},
            ["variant 'raw': kinds need learns_from 'views' without fine_tune"],
        ),
        (
            {"variants": [VARIANTS["supervised"] | {"name": "pairs", "kinds": ["solo"]}]},
            ["variant 'pairs': kinds need learns_from 'views' without fine_tune"],
        ),
        (
            {"variants": [VIEWS | {"kinds": ["solo"], "fine_tune": {}}]},
            ["variant 'views': kinds need learns_from 'views' without fine_tune"],
        ),
        ({"variants": [RAW | {"name": ""}]}, ["variants.0.name"]),
        ({"variants": [RAW | {"head": {"net": "linear"}}]}, ["variant 'raw': learns_from", "does not fit head.net"]),
        ({"variants": [RAW | {"learns_from": "views"}]}, ["variant 'raw': learns_from", "does not fit head.net"]),
        ({"variants": [RAW | {"learns_from": "pairs"}]}, ["variant 'raw': learns_from", "does not fit head.net"]),
        (
            {"variants": [RAW | {"fine_tune": {}}]},
            ["variant 'raw': fine_tune needs learns_from 'views', not 'nothing'"],
        ),
        (
            {"variants": [RAW | VARIANTS["supervised"] | {"fine_tune": {}}]},
            ["variant 'raw': fine_tune needs learns_from 'views', not 'pairs'"],
        ),
        (
            {"variants": [RAW | {"head": BY_DOMAIN}]},
            ["variant 'raw': head.separate_domains needs learns_from other than 'nothing'"],
        ),
        (
            {"variants": [RAW | {"learns_from": "queries", "head": BY_DOMAIN | {"num_directions": 5}}]},
            ["remove head.num_directions", "keeps all directions"],
        ),
        (
            {"variants": [RAW | {"learns_from": "queries"}]},
            ["variant 'raw': learns_from 'queries' needs head.separate_domains"],
        ),
        (
            {"variants": [RAW | {"learns_from": "pairs", "head": {"net": "mlp"}}]},
            ["variant 'raw': learns_from 'pairs' needs head.separate_domains"],
        ),
        (
            {"variants": [RAW | {"head": {"net": "none", "parts": {"all": {"blocks": ["moments"]}}}}]},
            ["head.parts.all uses block 'moments'", "use one of pooled"],
        ),
        ({"reference": "cooked"}, ["'cooked' is not a variant; choose one of raw"]),
        ({"theory": ["raw", "cooked"]}, ["'cooked' is not a variant; choose one of raw"]),
        ({"num_folds": 1}, ["num_folds", "greater than or equal to 2", "(got 1)"]),
        ({"variants": [RAW | {"head": {"nets": "none"}}]}, ["variants.0.head.nets: unknown key; did you mean net?"]),
        ({"feature_set": {}}, ["feature_set: unknown key; did you mean feature_sets?"]),
    ],
)
def test_errors_name_invalid_settings(changes, expected):
    with pytest.raises(AttribError) as caught:
        validate(AblateSettings, values_of(RAW) | changes, "ablate.yaml")
    message = str(caught.value)
    assert message.startswith("ablate.yaml: these settings are not valid:")
    assert all(part in message for part in expected), message


def test_kinds_of_the_view_set_are_accepted():
    variants = [VIEWS | {"kinds": ["solo", "colour"]}, VIEWS | {"name": "v2", "views": "odd", "kinds": ["bands"]}]
    mixes = {"standard": {"mix": {"texture": 0}}, "odd": {"mix": {"texture": 0, "colour": 0, "solo": 0}}}
    found = settings_of(*variants, view_sets=mixes)
    assert [variant.kinds for variant in found.variants] == [("solo", "colour"), ("bands",)]


def test_a_file_name_has_only_letters_digits_and_underscores():
    assert VariantSettings(name="ZCA 0.1, by domain/größe").file_name == "ZCA_0_1__by_domain_größe"


def test_the_default_variant_is_a_control():
    found = VariantSettings(name="v")
    assert found.learns_from == "nothing" and found.head.net == "none" and found.fine_tune is None
