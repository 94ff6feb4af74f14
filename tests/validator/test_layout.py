"""The layout a package must have."""

from __future__ import annotations

import pytest

from ncr_validator.layout import MainModel, check_layout
from ncr_validator.verdicts import Result, decide
from validator.samples import MATERIAL

MAIN = "SKU1/SKU1.glb"


def found(*names: str, main_model: MainModel = "any") -> set[str]:
    return {issue.code for issue in check_layout(names, "SKU1", main_model)}


@pytest.mark.parametrize(
    "name",
    [
        f"SKU1/materials/{MATERIAL}.glb",
        f"SKU1/materials/{MATERIAL.upper()}.glb",
        "SKU1/materials/basecolor.png",
        "SKU1/materials/sources/basecolor.tga",
        "SKU1/sources/SKU1.blend",
        "SKU1/sources/Notes.TXT",
        "SKU1/obj/Chair.obj",
        "SKU1/my folder/Chair.fbx",
    ],
)
def test_every_target_of_the_delivery_rules_is_allowed(name: str) -> None:
    assert found(MAIN, name) == set()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SKU2/obj/a.obj", "LAYOUT_WRONG_FOLDER"),
        ("sku1/obj/a.obj", "LAYOUT_WRONG_FOLDER"),
        ("a.obj", "LAYOUT_WRONG_FOLDER"),
        ("SKU1", "LAYOUT_WRONG_FOLDER"),
        ("SKU1/a.obj", "LAYOUT_UNEXPECTED_FILE"),
        ("SKU1/other.glb", "LAYOUT_UNEXPECTED_FILE"),
        ("SKU1/sku1.GLB", "LAYOUT_UNEXPECTED_FILE"),
        ("SKU1/a/b/c.obj", "LAYOUT_TOO_DEEP"),
        ("SKU1/materials/other/c.png", "LAYOUT_TOO_DEEP"),
        ("SKU1/OBJ/a.obj", "LAYOUT_FOLDER_CASE"),
        ("SKU1/sources/other.blend", "LAYOUT_BLEND_PLACE"),
        ("SKU1/blend/SKU1.blend", "LAYOUT_BLEND_PLACE"),
    ],
)
def test_a_file_in_a_place_the_rules_do_not_give_is_an_error(name: str, code: str) -> None:
    issues = check_layout([MAIN, name], "SKU1", "any")
    assert [(issue.code, issue.file) for issue in issues] == [(code, name)]
    assert decide(issues) is Result.INVALID


@pytest.mark.parametrize("name", ["0.glb", "-" * 36 + ".glb", "wood.glb"])
def test_a_material_without_a_real_uuid_is_a_warning(name: str) -> None:
    issues = check_layout([MAIN, f"SKU1/materials/{name}"], "SKU1", "any")
    assert ([issue.code for issue in issues], decide(issues)) == (["LAYOUT_MATERIAL_NAME"], Result.WARNING)


@pytest.mark.parametrize(
    ("others", "main_model", "result"),
    [
        (["SKU1/obj/a.obj"], "any", Result.VALID),
        (["SKU1/usdz/a.usdz"], "any", Result.VALID),
        (["SKU1/sources/SKU1.blend"], "any", Result.VALID),
        ([f"SKU1/materials/{MATERIAL}.glb"], "any", Result.INVALID),
        (["SKU1/materials/a.png"], "any", Result.INVALID),
        (["SKU1/obj/a.obj"], "required", Result.INVALID),
        (["SKU1/materials/a.png"], "optional", Result.VALID),
    ],
)
def test_a_package_without_its_main_model_is_judged_by_what_else_is_there(
    others: list[str], main_model: MainModel, result: Result
) -> None:
    issues = check_layout(others, "SKU1", main_model)
    assert ([issue.code for issue in issues], decide(issues)) == (["LAYOUT_NO_MAIN_MODEL"], result)
