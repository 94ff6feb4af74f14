"""docs/contract.md, section 3, row by row, and every refusal."""

from __future__ import annotations

from itertools import permutations

import pytest

from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.layout import Layout, plan_layout
from ncr_upload.domain.packages import SourceFile

SKU = "VASE-1001"
ID = "1f0e8a6c-93b1-4d62-8a55-0c3f7b9d2e41"
OTHER_ID = "7b2d4c9e-0a1b-4c3d-9e8f-112233445566"
MAIN = f"{SKU}/{SKU}.glb"


def plan(*keys: str, sku: str = SKU) -> dict[str, str]:
    """Target by key."""
    return targets(plan_layout([SourceFile(key, "2026-11-20 10:00:00") for key in keys], sku))


def targets(layout: Layout) -> dict[str, str]:
    return {file.key: file.target for file in layout.files}


def refusal(*keys: str, sku: str = SKU) -> Rejected:
    with pytest.raises(Rejected) as caught:
        plan(*keys, sku=sku)
    assert caught.value.next_step
    return caught.value


# --- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "target"),
    [
        pytest.param("job/work/vase_final.blend", f"{SKU}/sources/{SKU}.blend", id="rule 1"),
        pytest.param("vase.BLEND", f"{SKU}/sources/{SKU}.blend", id="rule 1, any case, no folder"),
        pytest.param("Materials/sources/vase.blend", f"{SKU}/sources/{SKU}.blend", id="rule 1 before rule 6"),
        pytest.param("job/GLB_files/mesh.glb", MAIN, id="rule 2"),
        pytest.param("job/glb_FILES/deep/MESH.GLB", MAIN, id="rule 2, any case, any depth"),
        pytest.param(f"GLB_files/Materials/{ID}.glb", MAIN, id="rule 2 before rule 3"),
        pytest.param(f"job/Materials/{ID}.glb", f"{SKU}/materials/{ID}.glb", id="rule 3"),
        pytest.param(f"job/MATERIALS/deep/oak_{ID}_v2.GLB", f"{SKU}/materials/{ID}.glb", id="rule 3, the id within the name"),
        pytest.param(f"{SKU}/Materials/{SKU}-{ID}.glb", f"{SKU}/materials/{ID}.glb", id="rule 3 before rule 4"),
        pytest.param(f"job/{SKU}/mesh.glb", MAIN, id="rule 4, in the SKU's folder"),
        pytest.param(f"{SKU.lower()}/MESH.GLB", MAIN, id="rule 4, folder in any case"),
        pytest.param(f"job/export/{SKU}.glb", MAIN, id="rule 4, named after the SKU"),
        pytest.param(f"{SKU.lower()}.GLB", MAIN, id="rule 4, name in any case, no folder"),
        pytest.param(f"{SKU}/export/mesh.glb", f"{SKU}/export/mesh.glb", id="not rule 4: deeper below the SKU's folder"),
        pytest.param("job/FBX/Vase.fbx", f"{SKU}/fbx/Vase.fbx", id="rule 5 fbx"),
        pytest.param("job/OBJ/Vase.obj", f"{SKU}/obj/Vase.obj", id="rule 5 obj"),
        pytest.param("job/OBJ/Vase.MTL", f"{SKU}/obj/Vase.MTL", id="rule 5 mtl"),
        pytest.param("job/glTF/Vase.gltf", f"{SKU}/gltf/Vase.gltf", id="rule 5 gltf"),
        pytest.param("job/glTF/Vase.bin", f"{SKU}/gltf/Vase.bin", id="rule 5 bin"),
        pytest.param("job/AR/Vase.usdz", f"{SKU}/ar/Vase.usdz", id="rule 5 usdz"),
        pytest.param("Materials/sources/FBX/Vase.fbx", f"{SKU}/fbx/Vase.fbx", id="rule 5 before rule 6"),
        pytest.param("job/Material/Sources/Oak.psd", f"{SKU}/materials/sources/Oak.psd", id="rule 6, singular"),
        pytest.param("job/materials/sources/deep/Oak.sbsar", f"{SKU}/materials/sources/Oak.sbsar", id="rule 6, plural, deep"),
        pytest.param("job/materials/oak.png", f"{SKU}/materials/oak.png", id="rule 7, plural"),
        pytest.param("job/MATERIAL/4k/oak.png", f"{SKU}/materials/oak.png", id="rule 7, singular, deep"),
        pytest.param("materials/4k/sources/oak.png", f"{SKU}/materials/oak.png", id="rule 7: sources not directly below"),
        pytest.param(f"job/material/{ID}.glb", f"{SKU}/materials/{ID}.glb", id="rule 7 takes a GLB under a singular folder"),
        pytest.param("job/Sources/deep/notes.txt", f"{SKU}/sources/notes.txt", id="rule 8"),
        pytest.param("job/sources/part.glb", f"{SKU}/sources/part.glb", id="rule 8 takes a GLB no earlier rule takes"),
        pytest.param("job/Textures/Wood_4K.PNG", f"{SKU}/textures/Wood_4K.PNG", id="rule 9"),
        pytest.param("job/parts/lid.glb", f"{SKU}/parts/lid.glb", id="rule 9 takes a GLB no earlier rule takes"),
        pytest.param(
            "job/my_materials/oak.png", f"{SKU}/my_materials/oak.png", id="rule 9: a folder matches by its whole name"
        ),
        pytest.param("job/sources_old/a.txt", f"{SKU}/sources_old/a.txt", id="rule 9: sources_old is not sources"),
        pytest.param("job/sources", f"{SKU}/job/sources", id="rule 9: a file is not a folder"),
    ],
)
def test_a_file_lands_where_the_table_says(key: str, target: str) -> None:
    assert plan(key) == {key: target}


def test_a_whole_product_is_laid_out_sorted_by_target() -> None:
    keys = [
        "u/GLB_files/mesh.glb",
        f"u/Materials/{ID}.glb",
        "u/Textures/b.png",
        "u/Textures/A.png",
        "u/vase.blend",
    ]
    layout = plan_layout([SourceFile(key, "") for key in keys], SKU)
    assert [file.target for file in layout.files] == [
        MAIN,
        f"{SKU}/materials/{ID}.glb",
        f"{SKU}/sources/{SKU}.blend",
        f"{SKU}/textures/A.png",
        f"{SKU}/textures/b.png",
    ]
    assert layout.notes == ()


# --- the main model ---------------------------------------------------------------------------------------------


def test_a_backup_folder_does_not_give_the_main_model() -> None:
    assert plan("u/old_GLB_files_backup/mesh.glb", "u/GLB_files/mesh.glb") == {
        "u/GLB_files/mesh.glb": MAIN,
        "u/old_GLB_files_backup/mesh.glb": f"{SKU}/old_glb_files_backup/mesh.glb",
    }


@pytest.mark.parametrize("name", [f"{SKU}/{ID}.glb", f"u/{ID}/{SKU}.glb"])
def test_with_a_main_model_from_glb_files_another_is_a_material_by_its_id(name: str) -> None:
    keys = ["u/GLB_files/mesh.glb", name, f"u/Textures/{ID}_normal.png"]
    layout = plan_layout([SourceFile(key, "") for key in keys], SKU)
    assert targets(layout)[name] == f"{SKU}/materials/{ID}.glb"
    assert any(repr(name) in note and "main model comes from GLB_files" in note for note in layout.notes)


def test_a_second_main_model_without_an_id_is_unplaceable() -> None:
    refused = refusal("u/GLB_files/mesh.glb", f"{SKU}/mesh.glb")
    assert refused.code == "unplaceable_key"
    assert f"'{SKU}/mesh.glb'" in refused.message


# --- material ids -----------------------------------------------------------------------------------------------


def test_a_material_without_an_id_takes_the_only_one_that_textures_carry() -> None:
    keys = ["Materials/oak.glb", f"t/{ID}_color.png", f"t/{ID.upper()}_normal.JPG"]
    layout = plan_layout([SourceFile(key, "") for key in keys], SKU)
    assert targets(layout)["Materials/oak.glb"].lower() == f"{SKU}/materials/{ID}.glb".lower()
    assert any("'Materials/oak.glb'" in note and "texture names" in note for note in layout.notes)


def test_the_products_own_id_in_a_texture_name_is_no_material_id() -> None:
    keys = ["Materials/oak.glb", f"t/{OTHER_ID.upper()}_preview.png", f"t/{ID}_color.png"]
    assert plan(*keys, sku=OTHER_ID)["Materials/oak.glb"] == f"{OTHER_ID}/materials/{ID}.glb"
    assert refusal(*keys[:2], sku=OTHER_ID).code == "unplaceable_key"


def test_the_products_own_id_in_a_material_name_is_no_material_id() -> None:
    assert plan(f"Materials/{OTHER_ID}_{ID}.glb", sku=OTHER_ID)[f"Materials/{OTHER_ID}_{ID}.glb"].endswith(
        f"materials/{ID}.glb"
    )
    assert refusal(f"Materials/{OTHER_ID}.glb", sku=OTHER_ID).code == "unplaceable_key"


@pytest.mark.parametrize(
    "name",
    [
        "oak.glb",
        "0.glb",
        "-" * 36 + ".glb",
        "1f0e8a6c93b14d628a550c3f7b9d2e41.glb",
        "1f0e8a6c-93b1-4d62-8a55-0c3f7b9d2e4.glb",
        "g1f0e8a6-93b1-4d62-8a55-0c3f7b9d2e41.glb",
        "a1f0e8a6c-93b1-4d62-8a55-0c3f7b9d2e41.glb",
        "1f0e8a6c-93b1-4d62-8a55-0c3f7b9d2e41f.glb",
        f"{ID}_{OTHER_ID}.glb",
    ],
)
def test_a_material_without_one_real_uuid_is_unplaceable(name: str) -> None:
    refused = refusal(f"Materials/{name}", "t/oak.png", f"{ID}/notes.txt")
    assert refused.code == "unplaceable_key"
    assert name in refused.message
    assert "UUID" in refused.next_step


def test_a_material_is_unplaceable_when_textures_carry_several_ids() -> None:
    refused = refusal("Materials/oak.glb", f"t/{ID}.png", f"t/{OTHER_ID}.png")
    assert (refused.code, "'Materials/oak.glb'" in refused.message) == ("unplaceable_key", True)


def test_two_materials_sharing_the_textures_id_are_refused_naming_both() -> None:
    refused = refusal("Materials/oak.glb", "Materials/steel.glb", f"t/{ID}.png")
    assert refused.code == "layout_collision"
    assert "'Materials/oak.glb'" in refused.message
    assert "'Materials/steel.glb'" in refused.message


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("a/GLB_files/mesh.glb", "b/GLB_files/mesh.glb", id="several GLB_files folders"),
        pytest.param("GLB_files/mesh.glb", "GLB_files/mesh_low.glb", id="two GLBs in one GLB_files"),
        pytest.param(f"{SKU}/mesh.glb", f"u/{SKU}.glb", id="two GLBs for the SKU"),
        pytest.param("a/vase.blend", "b/old_vase.blend", id="several .blend"),
        pytest.param(f"a/Materials/{ID}.glb", f"b/Materials/{ID}.glb", id="one material id twice"),
        pytest.param("a/textures/wood.png", "b/Textures/wood.png", id="same name in two folders of one name"),
        pytest.param("materials/oak/color.png", "materials/steel/color.png", id="same name below materials"),
        pytest.param("material/sources/a/x.psd", "materials/sources/b/x.psd", id="same name below materials/sources"),
        pytest.param("sources/a/x.txt", "sources/b/x.txt", id="same name below sources"),
        pytest.param("a/gltf/x.bin", "b/GLTF/x.bin", id="same .bin in two folders"),
    ],
)
def test_two_sources_for_one_target_are_refused_naming_both(one: str, other: str) -> None:
    refused = refusal(one, other)
    assert refused.code == "layout_collision"
    assert repr(one) in refused.message
    assert repr(other) in refused.message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("t/Wood.png", "t/wood.PNG", id="case"),
        pytest.param("t/caf\u00e9.png", "t/cafe\u0301.png", id="Unicode form"),
        pytest.param("t/CAF\u00c9.png", "t/cafe\u0301.png", id="both"),
        pytest.param("t/\u1fb2.png", "t/\u03b1\u0345\u0300.png", id="Unicode form before case"),
        pytest.param("t/stra\u00dfe.png", "t/STRASSE.png", id="sharp s"),
        pytest.param(f"Materials/{ID}.glb", f"Materials/{ID.upper()}.glb", id="material ids"),
    ],
)
@pytest.mark.parametrize("collisions", ["refuse", "newest"])
def test_targets_that_differ_only_in_case_or_unicode_form_are_refused_naming_both(
    one: str, other: str, collisions: str
) -> None:
    files = [SourceFile(one, "2026-11-20 10:00:00"), SourceFile(other, "2026-11-21 10:00:00")]
    with pytest.raises(Rejected) as caught:
        plan_layout(files, SKU, "newest" if collisions == "newest" else "refuse")
    assert caught.value.code == "case_collision"
    assert repr(one) in caught.value.message
    assert repr(other) in caught.value.message


def test_a_file_where_another_needs_a_folder_is_refused_naming_both() -> None:
    refused = refusal("materials/Sources", "materials/sources/oak.psd")
    assert refused.code == "layout_collision"
    assert "'materials/Sources'" in refused.message
    assert "'materials/sources/oak.psd'" in refused.message


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "a//b.png",
        "a/b/",
        "../x.png",
        "a/../../x.png",
        "a/..",
        "a/wood..png",
        "./x.png",
        "a/./x.png",
        "a\\..\\x.png",
        "C:\\x.png",
        "a/x\x00.png",
        "a/x\n.png",
        "a\x1b[2J/x.png",
        "a/x\x7f.png",
        "a/x\x85.png",
        "a/x\u2028.png",
        "a/x\udcff.png",
        "a/" + "x" * 252 + ".png",
        "x" * 256 + "/deep/a.png",
        "a/" + "\u00e9" * 126 + ".png",
    ],
)
def test_a_hostile_key_is_refused_by_name(key: str) -> None:
    refused = refusal(key, "t/fine.png")
    assert refused.code == "hostile_key"
    assert repr(key) in refused.message
    refused.message.encode()  # fit for a log, a database and JSON


def test_the_refusal_of_a_key_says_what_is_wrong_with_it() -> None:
    assert "absolute" in refusal("/etc/passwd").message
    assert "empty" in refusal("a//b.png").message
    assert "'..'" in refusal("a/../b.png").message
    assert "control character" in refusal("a/b\n.png").message
    assert "256 bytes" in refusal("x" * 256 + "/b.png").message


@pytest.mark.parametrize("key", ["a/" + "x" * 251 + ".png", "a/.hidden", "a/ wood .png", "a/木.png", "a/👩‍🎨.png"])
def test_an_unusual_but_harmless_key_is_kept_as_it_is(key: str) -> None:
    assert plan(key) == {key: f"{SKU}/{key}"}


def test_a_target_longer_than_its_source_is_measured_too() -> None:
    assert refusal("\u0130" * 127 + "/a.png").code == "hostile_key"  # İ takes 2 bytes, its lower case 3
    assert refusal("a.blend", sku="S" * 250).code == "hostile_key"


@pytest.mark.parametrize("key", ["wood.png", "vase.fbx", "mesh.glb"])
def test_a_file_in_no_folder_that_no_rule_takes_is_unplaceable(key: str) -> None:
    refused = refusal(key)
    assert (refused.code, repr(key) in refused.message) == ("unplaceable_key", True)


@pytest.mark.parametrize(
    "sku", ["", " ", " S1", "S1\n", ".", "..", "a/b", "a\\b", "a..b", "x\x00", "x" * 256, "None", "null", None]
)
def test_a_sku_that_is_no_folder_name_is_refused(sku: str) -> None:
    assert refusal("t/wood.png", sku=sku).code == "sku_invalid"


def test_no_files_are_refused() -> None:
    assert refusal().code == "no_files"


def test_a_refusal_does_not_depend_on_the_order() -> None:
    keys = ["a/GLB_files/m.glb", "b/GLB_files/m.glb", "c/GLB_files/m.glb", "t/Wood.png", "t/wood.png"]
    assert len({str(refusal(*order)) for order in permutations(keys)}) == 1


def test_a_key_listed_twice_is_one_file() -> None:
    assert plan("t/wood.png", "t/wood.png") == {"t/wood.png": f"{SKU}/t/wood.png"}


def test_a_refusal_of_many_sources_stays_short() -> None:
    message = refusal(*(f"{number:04}/textures/wood.png" for number in range(2000))).message
    assert "and 1995 more" in message
    assert len(message) < 500


# --- LAYOUT_COLLISIONS=newest -----------------------------------------------------------------------------------


def test_the_newest_source_wins_a_target_and_the_note_names_the_others() -> None:
    files = [
        SourceFile("a/vase.blend", "2026-11-20 10:00:00"),
        SourceFile("b/vase.blend", "2026-11-20T10:00:01"),
        SourceFile("c/vase.blend", "2026-11-19 23:00:00.5"),
    ]
    for order in permutations(files):
        layout = plan_layout(order, SKU, "newest")
        assert targets(layout) == {"b/vase.blend": f"{SKU}/sources/{SKU}.blend"}
        (note,) = layout.notes
        assert "'a/vase.blend'" in note
        assert "'c/vase.blend'" in note


@pytest.mark.parametrize("stamp", ["2026-11-20 10:00:00", "", "0000-00-00 00:00:00", "yesterday"])
def test_a_target_whose_newest_source_cannot_be_told_is_refused(stamp: str) -> None:
    files = [SourceFile("a/vase.blend", "2026-11-20 10:00:00"), SourceFile("b/vase.blend", stamp)]
    with pytest.raises(Rejected, match="no timestamp says which is the newest") as caught:
        plan_layout(files, SKU, "newest")
    assert caught.value.code == "layout_collision"


def test_a_key_listed_twice_counts_by_its_newest_row() -> None:
    files = [
        SourceFile("a/vase.blend", "2026-11-22 10:00:00"),
        SourceFile("a/vase.blend", ""),
        SourceFile("a/vase.blend", "2026-11-18 10:00:00"),
        SourceFile("b/vase.blend", "2026-11-20 10:00:00"),
    ]
    for order in permutations(files):
        assert list(targets(plan_layout(order, SKU, "newest"))) == ["a/vase.blend"]


# --- a .gltf and what it names ----------------------------------------------------------------------------------


def test_a_gltf_keeps_its_bin_and_the_textures_beside_it() -> None:
    keys = ["u/GLTF/vase.gltf", "u/GLTF/vase.bin", "u/GLTF/wood.png", "u/Textures/other.png"]
    layout = plan_layout([SourceFile(key, "") for key in keys], SKU)
    assert targets(layout)["u/GLTF/wood.png"] == f"{SKU}/gltf/wood.png"
    assert layout.notes == ()


@pytest.mark.parametrize("moved", ["u/gltf/textures/wood.png", "u/gltf/buffers/vase.bin", "u/gltf/materials/wood.ktx2"])
def test_the_timeline_says_what_the_layout_moves_away_from_a_gltf(moved: str) -> None:
    layout = plan_layout([SourceFile(key, "") for key in ("u/gltf/vase.gltf", "u/gltf/vase.bin", moved)], SKU)
    (note,) = layout.notes
    assert repr(moved) in note
    assert "'u/gltf/vase.gltf'" in note
    assert "vase.bin'" not in note or moved.endswith("vase.bin")


def test_the_timeline_says_that_a_gltf_under_materials_loses_its_textures() -> None:
    layout = plan_layout([SourceFile(key, "") for key in ("materials/oak/oak.gltf", "materials/oak/oak.png")], SKU)
    assert targets(layout) == {
        "materials/oak/oak.gltf": f"{SKU}/oak/oak.gltf",
        "materials/oak/oak.png": f"{SKU}/materials/oak.png",
    }
    assert "'materials/oak/oak.png'" in layout.notes[0]


def test_the_signature_of_a_presigned_url_in_place_of_a_key_is_not_told() -> None:
    refused = refusal("https://s3.test/studio/a.glb?X-Amz-Signature=s3cr3t")
    assert "s3cr3t" not in str(refused)
    assert "https://s3.test/studio/a.glb?…" in refused.message
